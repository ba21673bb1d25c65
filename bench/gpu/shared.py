"""gpu-shared: `orchestratorctl bench single` and `bench shared`, as a user types them, on a daemon of its own and real engines.

The first model alone, then both in turns; each beside plain vLLM engines with static pools. All figures are the product's own; here they
are put together, and it is checked that nothing is left: no process, no memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench import results
from bench.box import ROOT, Box
from bench.demo import SHAPES
from bench.gpu import parts
from bench.gpu.scene import MIB, wait

KINDS = {"single": 1, "shared": 2}  # and how many models each takes
# Prompts of a size that takes several page bundles of a small model's KV; single twice, in turns with its rival: a host's speed drifts.
WORDS = {"single": ["--prompt-tokens", "2000", "--rounds", "2"], "shared": ["--prompt-tokens", "2000"]}
SETTLE = "24s"  # an idle engine gives back its caches after 10 s; nothing must fall for as long after that
BACK_S = 30.0
PREFIX = "/tmp/orch-bench-"  # of the folders of static engines, which are in their command lines


def main(argv: list[str]) -> int:
    made = parts.parser("gpu-shared", __doc__, KINDS, 480.0, "twice: the models; the first is the one that runs alone")
    options = parts.parsed(made, argv, KINDS, 2, "--engine-python and two --model are needed (or --simulated)")
    with parts.placed(options, "gpu-shared", SHAPES):
        return _run(options, results.typed("gpu-shared", argv))


def _run(options: argparse.Namespace, command: str) -> int:
    began = time.monotonic()
    figures: dict[str, float] = {"models": len(options.model)}
    notes: dict[str, Any] = {"simulated": options.simulated, "models": dict(options.model)}
    passed: dict[str, bool] = {}
    args = ["--load-format", "dummy", "--max-model-len", "8192"]
    settings = parts.settings(options, args, 0.005) | {"ORCH_LOG__LEVEL": "debug"}
    with Box(settings, log=options.out / "gpu-shared.daemon.log", sampled=False) as box:
        gpu = box.status()["gpus"][0]
        for name, folder in options.model:
            box.ctl("add-model", name, folder, "--no-start")
        for kind in options.parts:
            names = [name for name, _ in options.model][: KINDS[kind]]
            left_s = options.limit_s - (time.monotonic() - began)
            result = _bench(box, kind, names, options.out / f"gpu-shared-{kind}", left_s)
            figures |= {f"{kind}_{key}": float(value) for key, value in result.get("figures", {}).items()}
            notes[kind] = {key: result.get(key) for key in ("complete", "why", "notes", "settings", "versions", "command")}
            passed[f"{kind}: complete"] = bool(result.get("complete"))
            answered = [result.get("figures", {}).get(f"{arm}_failed") for arm in ("daemon", "static")]
            passed[f"{kind}: every request of both arms was answered"] = answered == [0, 0]
        passed["no static engine is left, nor its keeper"] = wait(lambda: not _left(), BACK_S, 0.5)
        passed["the GPU is as it was"] = wait(lambda: _used(box) <= int(gpu["used_bytes"]) + 64 * MIB, BACK_S, 0.5)
        passed["the loop had no errors"] = box.status()["loop"]["errors"] == 0
    figures |= {
        ours: figures[theirs]
        for ours, theirs in (
            ("idle_saving_vs_static", "single_idle_saving_vs_static"),
            ("latency_ratio", "single_latency_ratio"),
            ("flex_mib", "single_daemon_flex_mib"),
        )
        if theirs in figures
    }
    figures["minutes"] = (time.monotonic() - began) / 60
    notes["passed"] = passed
    packages = ("vllm", "kvcached", "torch")
    path = results.write("gpu-shared", command, figures, notes, str(gpu["name"]), packages, options.out)
    return results.verdict(figures, passed, path)


def _bench(box: Box, kind: str, names: Sequence[str], out: Path, left_s: float) -> dict[str, Any]:
    """Its result.json; of one that did not come so far, why."""
    words = ["--host", str(box.socket), "bench", kind, *names, *WORDS[kind], "--yes", "--settle", SETTLE, "--out", str(out)]
    print(f"\n$ orchestratorctl bench {kind} {' '.join([*names, *WORDS[kind]])}", flush=True)
    (out / "result.json").unlink(missing_ok=True)  # of an earlier run
    process = subprocess.Popen([sys.executable, "-m", "orchestrator.cli", *words], cwd=ROOT)
    try:
        process.wait(max(30.0, left_s - BACK_S))
    except subprocess.TimeoutExpired:
        process.terminate()  # as Ctrl-C: it ends what it started, and writes what it has
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    try:
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
    except (OSError, ValueError) as error:
        return {"complete": False, "why": f"exit {process.returncode}, {error}"}
    return result


def _left() -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(PREFIX) for word in words) or "orchestrator.experiments.keeper" in words:
            found.append(process.pid)
    return found


def _used(box: Box) -> int:
    return int(box.status()["gpus"][0]["used_bytes"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
