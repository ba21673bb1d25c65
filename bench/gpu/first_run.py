"""gpu-first-run: two real engines added with orchestratorctl, asked at the same time, and removed; NVML at every stage.

Shows: two IPC names, the limits that the daemon set as the engine venv's own `kvctl` reads them, and that nothing is left.
"""

import argparse
import asyncio
import glob
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.box import Box
from bench.workloads import Answer, ask, burst, client

MIB = 1 << 20
SETTLE_S = 30.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-first-run", description=__doc__)
    parser.add_argument("--engine-python", type=Path, required=True, help="python of the engine venv; kvctl lies beside it")
    parser.add_argument("--model", nargs=2, action="append", metavar=("NAME", "FOLDER"), required=True, help="twice: the models to serve")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    parser.add_argument("--engine-arg", action="append", default=[], help="one more vLLM argument for both")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with Box(_settings(options.engine_python), log=options.out / "gpu-first-run.daemon.log") as box:
        figures, notes, passed = _run(box, options)
        events = [(at, name) for name, at in notes.pop("marks").items()]
        models = [name for name, _ in options.model]
        plots.memory_over_time(
            box.samples(), models, events, "gpu-first-run: two vLLM engines on one GPU", options.out / "gpu-first-run.png"
        )
    notes["passed"] = passed
    command = results.typed("gpu-first-run", argv)
    gpu_name = str(notes.get("gpu"))
    path = results.write("gpu-first-run", command, figures, notes, gpu_name, ("vllm", "kvcached", "torch"), options.out)
    return results.verdict(figures, passed, path)


def _settings(python: Path) -> dict[str, str]:
    env = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    engine = {"default": {"python": str(python), "env": env, "args": ["--enforce-eager", "--load-format", "dummy"]}}
    return {"ORCH_ENGINES": json.dumps(engine), "ORCH_GPUS__SOURCE": "nvml", "ORCH_LOG__LEVEL": "debug"}


def _run(box: Box, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any], dict[str, bool]]:
    figures: dict[str, float] = {"models": len(options.model)}
    notes: dict[str, Any] = {"marks": {}, "gpu": box.status()["gpus"][0]["name"]}
    passed: dict[str, bool] = {}

    def mark(stage: str) -> None:
        notes["marks"][stage] = box.now_s()
        figures[f"{stage}_mib"] = _used_mib(box)
        print(f"[{box.now_s():6.1f}s] {stage}: {figures[f'{stage}_mib']:.0f} MiB used on the GPU", flush=True)

    mark("before")
    for name, folder in options.model:
        began = time.monotonic()
        print(f"$ orchestratorctl add-model {name} {folder}", flush=True)
        done = box.ctl("add-model", name, folder, "--", *options.engine_arg) if options.engine_arg else box.ctl("add-model", name, folder)
        print(done.stdout + done.stderr, flush=True)
        figures[f"add_{name}_s"] = time.monotonic() - began
    names = [name for name, _ in options.model]
    ipc = {name: model["engine"]["ipc_name"] for name, model in box.models().items()}
    notes["ipc_names"] = ipc
    passed["two engines, two IPC names"] = len(set(ipc.values())) == len(names)
    mark("idle")

    together = asyncio.run(_together(box.url, names))
    notes["together"] = [vars(answer) for answer in together]
    passed["plain and streaming answers of both at the same time"] = all(a.error is None and a.tokens == 32 for a in together)

    peak = asyncio.run(_bursts(box, names, notes))
    passed["bursts answered"] = peak["failed"] == 0
    figures |= {"burst_requests": peak["requests"], "burst_failed": peak["failed"]}
    mark("after")

    passed["kvctl reads the limits that the daemon set"], notes["kvctl"] = _kvctl_agrees(box, options.engine_python)
    print(json.dumps(notes["kvctl"]), flush=True)
    print(box.ctl("ps").stdout, flush=True)
    print(box.ctl("status").stdout, flush=True)
    notes["steps"] = {"ps": box.ctl("ps").stdout, "status": box.ctl("status").stdout}
    notes["footprints"] = {name: model["footprint"] for name, model in box.models().items()}
    sockets, pids = [m["engine"]["socket"] for m in box.models().values()], [m["engine"]["pid"] for m in box.models().values()]
    for name in names:
        print(box.ctl("rm", name).stdout, flush=True)
    deadline = time.monotonic() + SETTLE_S
    while _used_mib(box) > figures["before_mib"] + 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    mark("gone")
    left = [path for path in (*sockets, *(f"/dev/shm/{n}" for n in ipc.values()), *(f"/proc/{p}" for p in pids)) if Path(path).exists()]
    left += [path for n in ipc.values() for path in glob.glob(f"/tmp/kvcached-tp-{n}*")]
    left += subprocess.run(["pgrep", "-f", "EngineCore|engine/vllm/serve.py"], capture_output=True, text=True, check=False).stdout.split()
    notes["left"] = left
    figures["leftovers"] = len(left)
    figures["peak_mib"] = max(gpu["used_bytes"] for s in box.samples() for gpu in s.status["gpus"]) / MIB
    figures["burst_mib"] = peak["used_mib"]
    passed["nothing left: no process, segment or socket"] = not left
    passed["NVML back to the start"] = abs(figures["gone_mib"] - figures["before_mib"]) <= 1
    passed["the loop had no errors"] = box.status()["loop"]["errors"] == 0
    return figures, notes, passed


async def _together(url: str, names: list[str]) -> list[Answer]:
    async with client(url) as api:
        return list(await asyncio.gather(*(ask(api, name, 64, 32, stream) for name in names for stream in (False, True))))


async def _bursts(box: Box, names: list[str], notes: dict[str, Any]) -> Mapping[str, float]:
    """Three rounds; in each, every model gets a burst in turn, then all at once."""
    answers: list[Answer] = []
    async with client(box.url) as api:
        for turn in range(3):
            for name in names:
                notes["marks"][f"burst {turn + 1} {name}"] = box.now_s()
                answers += await burst(api, name, 48, 6000, 200)
        notes["marks"]["burst of all"] = at = box.now_s()
        for several in await asyncio.gather(*(burst(api, name, 96, 6000, 200) for name in names)):
            answers += several
    failed = [answer.error for answer in answers if answer.error]
    notes["burst_errors"] = failed[:5]
    in_burst = max((gpu["used_bytes"] for s in box.samples() if s.at_s >= at for gpu in s.status["gpus"]), default=0)
    return {"requests": len(answers), "failed": len(failed), "used_mib": in_burst / MIB}


def _kvctl_agrees(box: Box, python: Path) -> tuple[bool, Any]:
    """Limits move while we look, so look until both agree, a few times at the most."""
    said: Any = None
    for _ in range(5):
        done = subprocess.run([str(python.parent / "kvctl"), "list", "--json"], capture_output=True, text=True, check=False)
        try:
            said = json.loads(done.stdout)
        except json.JSONDecodeError:
            return False, done.stdout + done.stderr
        limits = {row["ipc"]: row["limit_bytes"] for row in said}
        ours = {m["engine"]["ipc_name"]: m["pool"]["limit_bytes"] for m in box.models().values()}
        if all(limits.get(ipc) == limit for ipc, limit in ours.items()):
            return True, said
    return False, {"kvctl": said, "daemon": ours}


def _used_mib(box: Box) -> float:
    return sum(float(gpu["used_bytes"]) for gpu in box.status()["gpus"]) / MIB


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
