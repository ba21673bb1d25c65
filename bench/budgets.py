"""budgets: what the allocator costs and how soon its word counts. No GPU: 16 simulated engines on a simulated box with eight cards.

plan() for 8, 64 and 512 pools; the whole daemon's share of a core, idle and with light traffic; seconds until an engine obeys.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import limit_timing, plan_timing, results
from bench.box import Box
from bench.demo import QWEN, SHAPES
from bench.folders import LONGEST, of_shape
from bench.workloads import Answer, ask, client

ENGINES, GPUS = 16, 8
CPU_S = 25.0
REST_S = 13.0  # after the last engine is ready: first limits are set, and what is idle was trimmed (idle_trim: 10 s)
REQUESTS_S = 4.0  # light traffic: so many a second, over all models
STEPS = 4  # changes of each engine's limit
SIM = {"SIM_LOAD_S": "0", "SIM_STEP_S": "0.01"}
HEADS = {"num_key_value_heads": 14}  # seven times the KV a token: a few thousand tokens are enough to starve an engine
TOKEN_BYTES = 24 * 2 * 14 * 64 * 2  # layers, K and V, heads, their size, bf16


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench budgets", description=__doc__)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    began = time.monotonic()
    notes: dict[str, Any] = {"engines": ENGINES, "simulated_gpus": GPUS, "requests_a_second": REQUESTS_S}
    figures = plan_timing.measure()
    print(f"[{time.monotonic() - began:5.1f}s] plan() is timed", flush=True)
    shape = {key: value for key, value in (QWEN | SHAPES["qwen-0.5b"] | HEADS).items() if key != LONGEST}
    seconds = asyncio.run(limit_timing.launcher(SIM, shape))
    figures |= _spread("set_limit_to_acked", seconds)
    print(f"[{time.monotonic() - began:5.1f}s] Launcher.set_limit is timed", flush=True)
    names = [f"sim-{number:02}" for number in range(ENGINES)]
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder:
        source = of_shape(Path(folder) / "qwen-0.5b", shape)
        with Box(_settings(names, source), sampled=False) as box:
            passed = _with_engines(box, names, figures, notes, began)
    figures["minutes"] = (time.monotonic() - began) / 60
    notes["passed"] = passed
    path = results.write("budgets", results.typed("budgets", argv), figures, notes, "none", folder=options.out)
    print()
    return results.verdict(figures, passed, path)


def _settings(names: Sequence[str], source: Path) -> dict[str, str]:
    engine = {"kind": "simulated", "env": SIM}
    models = {name: {"source": str(source), "preload": True, "pinned": True} for name in names}
    return {
        "ORCH_GPUS__SOURCE": "simulated",
        "ORCH_GPUS__SIMULATED": json.dumps({"count": GPUS, "memory": "141GiB"}),
        "ORCH_ENGINES": json.dumps({"default": engine}),
        "ORCH_MODELS": json.dumps(models),
    }


def _with_engines(box: Box, names: Sequence[str], figures: dict[str, float], notes: dict[str, Any], began: float) -> dict[str, bool]:
    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:5.1f}s] {what}", flush=True)

    box.until_ready(names, 90)
    say(f"{len(names)} engines are ready")
    time.sleep(REST_S)
    figures["loop_core_percent"], figures["loop_ticks_s"] = _core_percent(box, CPU_S)
    say("idle: the daemon's CPU time is read")
    figures["loop_core_traffic_percent"], figures["loop_ticks_traffic_s"], answers = asyncio.run(_with_traffic(box, names))
    say("light traffic: the same")
    failed = [answer.error for answer in answers if answer.error]
    half = len(names) // 2
    times = asyncio.run(limit_timing.in_force(box, names[:half], names[half:], STEPS, TOKEN_BYTES))
    say("limits moved")
    both = times.seconds["idle"] + times.seconds["starved"]
    figures |= _spread("in_force", both)
    for kind, several in times.seconds.items():
        figures |= _spread(f"in_force_{kind}", several)
    figures |= {"in_force_changes": len(both), "in_force_late": len(times.late)}
    notes |= {"late": times.late[:10], "traffic_requests": len(answers), "traffic_errors": failed[:3], "in_force_s": times.seconds}
    figures["loop_errors"] = box.status()["loop"]["errors"]
    return {
        "light traffic was answered": not failed,
        "at least 40 limits moved, all in force in time": len(both) >= 40 and not times.late,
        "the loop had no errors": figures["loop_errors"] == 0,
    }


def _core_percent(box: Box, seconds: float) -> tuple[float, float]:
    """Of one core, all threads of the daemon; and its looks a second."""
    cpu, ticks, began = _cpu_s(box.process.pid), box.status()["loop"]["ticks"], time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return 100 * (_cpu_s(box.process.pid) - cpu) / took, (box.status()["loop"]["ticks"] - ticks) / took


async def _with_traffic(box: Box, names: Sequence[str]) -> tuple[float, float, list[Answer]]:
    dice, answers = random.Random(3), []
    async with client(box.url, timeout_s=60) as api:
        measuring = asyncio.create_task(asyncio.to_thread(_core_percent, box, CPU_S))
        number = 0
        while not measuring.done():
            answers.append(asyncio.create_task(ask(api, dice.choice(names), 200, 32, number % 2 == 0, f"{number} ")))
            await asyncio.sleep(1 / REQUESTS_S)
            number += 1
        percent, ticks = await measuring
        return percent, ticks, list(await asyncio.gather(*answers))


def _cpu_s(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of its stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_p50_s": results.percentile(seconds, 0.5),
        f"{name}_p99_s": results.percentile(seconds, 0.99),
        f"{name}_max_s": max(seconds),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
