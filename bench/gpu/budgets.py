"""gpu-budgets: what the limits are worth on a GPU: an idle engine's memory, grabs by others, starved requests, throughput.

Parts: idle (one engine alone, empty and after a burst), grabs (three engines under load, a foreign process takes and gives back),
wedge (a request that must wait for its limit), throughput (through the daemon against a plain vLLM). Each is bounded in time; one
that fails is noted and the others go on; results are written after each.
"""

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.box import Box
from bench.demo import SHAPES
from bench.folders import of_unknown_length
from bench.gpu import grabs, parts, throughput, wedge
from bench.gpu.scene import MIB, Part, Scene
from bench.workloads import at_most, client

BURST = (48, 3000, 128)  # requests, prompt tokens, answer tokens
IDLE_S, STILL_S = 40.0, 15.0  # wait for an idle engine at most so long, and until it has not shrunk for so long
SUMS = ("failed_requests", "dead_engines")  # over all parts


def idle(scene: Scene, budget_s: float) -> Part:
    """One engine alone on the card: what NVML shows above the empty card."""
    name = next(iter(scene.models))
    scene.up([name])
    part = Part(figures={"empty_mib": scene.empty_bytes / MIB, "idle_05b_ready_mib": _above(scene, scene.settled(IDLE_S / 2, STILL_S / 3))})
    scene.mark("burst")
    answers = asyncio.run(_burst(scene, name))
    failed = [answer.error for answer in answers if answer.error]
    after = scene.used_bytes()
    scene.mark("pause")
    began = time.monotonic()
    least = scene.settled(min(IDLE_S, budget_s), STILL_S)
    part.figures |= {
        "idle_05b_mib": _above(scene, least),
        "idle_after_burst_mib": _above(scene, after),
        "idle_pause_s": time.monotonic() - began,
    }
    part.notes["idle_pool"] = scene.pool(name)
    part.notes["idle_errors"] = failed[:3]
    part.figures["failed_requests"] = len(failed)
    part.passed["the idle part's burst was answered"] = not failed
    return part


PARTS: dict[str, tuple[Callable[[Scene, float], Part], float]] = {  # and how long each may take, engine starts apart
    "idle": (idle, 70.0),
    "grabs": (grabs.run, 150.0),
    "wedge": (wedge.run, 70.0),
    "throughput": (throughput.run, 230.0),
}


def main(argv: list[str]) -> int:
    options = _options(argv)
    with parts.placed(options, "gpu-budgets", SHAPES) as folder:
        options.wedge_folder = of_unknown_length(folder / "unknown-length", Path(options.model[0][1]))
        return _run(options, results.typed("gpu-budgets", argv))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = parts.parser("gpu-budgets", __doc__, PARTS, 480.0, "three times; the first is the one that is measured alone")
    parser.add_argument("--grabs", type=int, default=20)
    parser.add_argument("--grab-gib", type=float, default=20.0)
    parser.add_argument("--base-gib", type=float, default=0.0, help="held by the foreign process all the time, so that the card is small")
    parser.add_argument("--clients", type=int, default=24, help="for each model, while others grab memory")
    parser.add_argument("--scale", type=float, default=1.0, help="of those clients' prompts and answers")
    parser.add_argument(
        "--throughput-model",
        nargs=2,
        metavar=("NAME", "FOLDER"),
        help="for the throughput part, with CUDA graphs; default: the first, eager",
    )
    parser.add_argument("--requests", type=int, default=512, help="of one round of the throughput part")
    parser.add_argument("--together", type=int, default=64, help="of these at once")
    parser.add_argument("--wedge-tokens", type=int, default=24000, help="prompt of the request that must wait: more than two bundles hold")
    return parts.parsed(parser, argv, PARTS, None, "--engine-python and --model are needed (or --simulated)")


def _run(options: argparse.Namespace, command: str) -> int:
    began = time.monotonic()
    models = dict(options.model)
    for name, folder in list(models.items()):  # three engines at least: the first shape again under another name
        if len(models) < 3:
            models[f"{name}-again"] = folder
    args = ["--load-format", "dummy"]
    whole = Part(notes={"parts": {}, "models": models, "simulated": options.simulated})
    settings = parts.settings(options, args, 0.02) | {"ORCH_LOG__LEVEL": "debug"}
    with Box(settings, log=options.out / "gpu-budgets.daemon.log") as box:
        scene = Scene(box, options, models, args)
        for name in options.parts:
            run, budget_s = PARTS[name]
            left = options.limit_s - (time.monotonic() - began)
            whole.notes["parts"][name] = _one(scene, whole, name, run, min(budget_s, left - 20))
            _write(scene, whole, command)
        whole.notes["parts"]["end"] = _one(scene, whole, "end", _end, 30.0)
        if not all(whole.passed.values()):
            scene.keep_logs()
        whole.figures["minutes"] = (time.monotonic() - began) / 60
        path = _write(scene, whole, command)
        _picture(scene)
    print()
    return results.verdict(whole.figures, whole.passed, path)


def _one(scene: Scene, whole: Part, name: str, run: Callable[[Scene, float], Part], budget_s: float) -> dict[str, Any]:
    """Runs one part into `whole`. Whatever it raises is a part that failed, not the end of the others."""
    if budget_s < 20:
        whole.passed[f"the part {name} ran"] = False
        return {"left_out": "no time left"}
    began = time.monotonic()
    scene.mark(f"part {name}")
    said: dict[str, Any] = {}
    try:
        part = run(scene, budget_s)
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
        part = Part()
        scene.keep_logs()
    for key in SUMS:
        part.figures[key] = whole.figures.get(key, 0) + part.figures.get(key, 0)
    whole.figures |= part.figures
    whole.notes |= part.notes
    whole.passed |= part.passed | {f"the part {name} ran": "error" not in said}
    return said | {"seconds": round(time.monotonic() - began, 1)}


def _end(scene: Scene, budget_s: float) -> Part:
    """What the daemon and the engines' logs have to say of the whole run."""
    failures, ooms, errors = scene.failures(), scene.oom_lines(), scene.box.status()["loop"]["errors"]
    return Part(
        figures={"loop_errors": errors, "oom_lines": len(ooms)},
        notes={"failures": failures, "oom": ooms[:10]},
        passed={"no engine failed, and none ran out of memory": not ooms and not failures, "the loop had no errors": errors == 0},
    )


def _write(scene: Scene, whole: Part, command: str) -> Path:
    notes = {**whole.notes, "passed": whole.passed, "marks": scene.marks}
    packages = ("vllm", "kvcached", "torch")
    return results.write("gpu-budgets", command, whole.figures, notes, str(scene.gpu["name"]), packages, scene.out)


def _picture(scene: Scene) -> None:
    title = "gpu-budgets: limits, use and foreign memory"
    try:
        samples = scene.box.samples()
        models = list(dict.fromkeys(name for sample in samples for name in sample.models))
        plots.memory_over_time(samples, models, scene.marks, title, scene.out / "gpu-budgets.png")
    except Exception:  # the figures are there; a picture that fails must not take them along
        traceback.print_exc()


async def _burst(scene: Scene, name: str) -> Any:
    requests, prompt, tokens = BURST
    async with client(scene.box.url, timeout_s=60) as api:
        return await at_most(api, name, requests, requests, prompt, tokens, "idle")


def _above(scene: Scene, used_bytes: int) -> float:
    return (used_bytes - scene.empty_bytes) / MIB


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
