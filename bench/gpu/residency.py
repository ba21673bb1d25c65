"""gpu-residency: who is on a GPU, and what it costs to come back: cold starts, sleep and wake, and many models on a card for few.

Parts: cold (a small stopped model, forked from a launch server and executed), wake (a large model asleep, against its cold start),
churn (sixteen models on a card for five under random traffic, and what is left of them). Each is bounded in time; one that fails is
noted and the others go on; results are written after each.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import results
from bench.demo import SHAPES
from bench.gpu import churn, cold, leftovers, parts, wakes
from bench.gpu.rig import NAME, Rig
from bench.gpu.scene import Part

LARGE: dict[str, Any] = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                            "intermediate_size": 18944, "tie_word_embeddings": False}  # fmt: skip
SIMULATED = {**SHAPES, "qwen-7b": LARGE}
LENGTH = "8192"  # tokens: --max-model-len of every engine
ARGS = ("--enforce-eager", "--max-model-len", LENGTH)  # of each model, so that they are known when its footprint is estimated
CHURN_MORE_S = 75.0  # for the ballast, for requests under way at the end, and for the removals
OF_A_RUN = frozenset({"orphans", "loop_errors", "minutes", "oom_lines"})
LEAST_S = 25.0  # a part is not begun with less
PARTS: Mapping[str, Callable[[Rig, float, Part], None]] = {"cold": cold.run, "wake": wakes.run, "churn": churn.run}


def main(argv: list[str]) -> int:
    options = _options(argv)
    with parts.placed(options, NAME, SIMULATED):
        return _run(options, results.typed(NAME, argv))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = parts.parser(NAME, __doc__, PARTS, 560.0, "three times, the smallest first: 0.5B, 1.5B, 7B")
    parser.add_argument("--add-to", type=Path, help="results of a run of other parts, which this one completes: they stay, and are said")
    parser.add_argument("--cold-s", type=float, default=120.0, help="for the part cold")
    parser.add_argument("--wake-s", type=float, default=110.0, help="for the part wake")
    parser.add_argument("--churn-s", type=float, default=300.0, help="of random traffic; less where the limit leaves less")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of that, for all models together")
    parser.add_argument("--min-residency-s", type=float, default=10.0, help="of each of its models; the daemon's default is 30")
    parser.add_argument("--ballast-gib", type=float, help="that somebody else holds meanwhile (default: so much that five models fit)")
    parser.add_argument("--seed", type=int, default=1)
    return parts.parsed(parser, argv, PARTS, 3, "--engine-python and three times --model are needed (or --simulated)")


def _run(options: argparse.Namespace, command: str) -> int:
    began = time.monotonic()
    earlier = json.loads(options.add_to.read_text()) if options.add_to else None
    whole = Part(notes={"parts": {}, "models": dict(options.model), "args": ARGS, "simulated": options.simulated, "seed": options.seed})
    budgets = {"cold": options.cold_s, "wake": options.wake_s, "churn": options.churn_s + CHURN_MORE_S}
    with Rig(options, dict(options.model), ARGS) as rig:
        gpu = str(rig.scene(True).gpu["name"])
        for name in options.parts:
            left = options.limit_s - (time.monotonic() - began)
            print(f"\n{name}: {left:.0f}s of {options.limit_s:.0f}s are left, {budgets[name]:.0f}s are for this part", flush=True)
            whole.notes["parts"][name] = _one(rig, whole, name, min(budgets[name], left - 10))
            _write(options, whole, command, gpu)
        folders = _end(rig, whole)
    _after(whole, folders)
    whole.figures["minutes"] = (time.monotonic() - began) / 60
    if earlier is not None:
        _complete(whole, earlier)
    path = _write(options, whole, command, gpu)
    print()
    return results.verdict(whole.figures, whole.passed, path)


def _one(rig: Rig, whole: Part, name: str, budget_s: float) -> dict[str, Any]:
    """Runs one part into `whole`, to which it gives what it has measured also when it fails then. The others go on."""
    if budget_s < LEAST_S:
        whole.passed[f"the part {name} ran"] = False
        return {"left_out": f"{budget_s:.0f}s were left"}
    began = time.monotonic()
    said: dict[str, Any] = {}
    part = Part()
    try:
        PARTS[name](rig, budget_s, part)
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    whole.figures |= part.figures
    whole.notes |= part.notes
    whole.passed |= part.passed | {f"the part {name} ran": "error" not in said}
    return said | {"seconds": round(time.monotonic() - began, 1)}


def _end(rig: Rig, whole: Part) -> list[Path]:
    """What the daemons have to say of the whole run; the folders whose processes must be gone when they are."""
    errors, failures, folders = 0, [], []
    for scene in rig.there():
        errors += scene.box.status()["loop"]["errors"]
        failures += scene.failures()
        folders.append(scene.box.folder)
        whole.notes.setdefault("marks", []).extend(scene.marks)
    whole.figures["loop_errors"] = errors
    whole.notes["failures"] = failures[:10]
    whole.passed["the loop had no errors"] = errors == 0
    if not all(whole.passed.values()):
        rig.keep_logs()
    return folders


def _after(whole: Part, folders: list[Path]) -> None:
    """The daemons are gone: so is everything that they started."""
    left = {pid: words for folder in folders for pid, words in leftovers.writers(folder).items()}
    whole.figures["orphans"] = whole.figures.get("orphans", 0) + len(left)
    whole.notes["after"] = {"processes": left}
    whole.passed["nothing outlives the daemons"] = not left


def _complete(whole: Part, earlier: Mapping[str, Any]) -> None:
    """Figures of parts that only the earlier run had; of those that belong to a run and not to a part, the worse."""
    for key, value in earlier["figures"].items():
        whole.figures[key] = max(value, whole.figures[key]) if key in OF_A_RUN and key in whole.figures else whole.figures.get(key, value)
    whole.notes["earlier"] = {key: earlier[key] for key in ("date", "command", "commit", "machine", "versions", "notes")}
    whole.passed |= {f"{text} (earlier run)": ok for text, ok in earlier["notes"]["passed"].items()}


def _write(options: argparse.Namespace, whole: Part, command: str, gpu: str) -> Path:
    notes = {**whole.notes, "passed": whole.passed}
    return results.write(NAME, command, whole.figures, notes, gpu, ("vllm", "kvcached", "torch"), options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
