"""soak: steady load on one daemon with simulated engines, for an hour: does anything of the daemon grow in the second half?

Whole answers, streams, clients that leave, unknown models, wrong keys and operators' questions, all the time; one model falls asleep and
is woken, another is stopped and started again and again. Slopes are least squares over the time after the warm-up.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import results
from bench.chaos.asking import Ask, Fate, ask
from bench.chaos.daemon import Daemon
from bench.chaos.http import Broken, Connection, call

MINUTES = 64.0
WARM_UP = 0.5  # the share that is not counted: the page's memory of each GPU fills for half an hour (control/history.py)
SAMPLE_S = 5.0
CLIENTS, PAUSE_S = 8, 0.15  # a pause is drawn with this mean: about 30 requests a second
DEADLINE_S = 60.0
STEADY = ("busy-0", "busy-1", "busy-2")
NAPS_S, STOPS_S = 12.0, 60.0  # how often the one that sleeps after 5 s, and the one that stops after 20 s, are asked
ADMIN = ("/status", "/models", "/explain", "/events?tail=50", "/keys", "/keys/usage")

# Told by the daemon itself, where it is asked: nobody else knows its tasks.
COUNT = """
import asyncio, os, signal
def count(*_):
    with open(os.environ["SOAK_COUNT"] + ".new", "w") as file:
        file.write(str(len(asyncio.all_tasks())))
    os.replace(os.environ["SOAK_COUNT"] + ".new", os.environ["SOAK_COUNT"])
signal.signal(signal.SIGUSR2, count)
"""


@dataclass(frozen=True)
class Sample:
    """`minutes` since the load began; the daemon's own but for `segments`, `engine_processes` and `state_kib`."""

    minutes: float
    rss_kib: int
    fds: int
    threads: int
    tasks: int
    segments: int
    engine_processes: int
    state_kib: int


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--pause", type=float, default=PAUSE_S, help="of a client between two requests, on average, in seconds")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    env = {
        "ORCH_GPUS__SIMULATED": json.dumps({"count": 2, "memory": "24GiB"}),
        "SIM_LOAD_S": "0.1",
        "SIM_STEP_S": "0.02",
    }
    with Daemon(env, COUNT) as daemon:
        figures, notes = asyncio.run(_soaked(daemon, options.minutes * 60, options.pause))
    path = results.write("soak", results.typed("soak", argv), figures, notes, "simulated", folder=options.out)
    return results.verdict(figures, notes["passed"], path)


async def _soaked(daemon: Daemon, seconds: float, pause_s: float) -> tuple[dict[str, float], dict[str, Any]]:
    os.environ["SOAK_COUNT"] = str(daemon.folder / "tasks")
    names = {role: f"{daemon.prefix}-{role}" for role in (*STEADY, "naps", "stops")}
    times = {"naps": {"sleep_timeout": "5s", "idle_timeout": None}, "stops": {"sleep_timeout": None, "idle_timeout": "20s"}}
    steady = {"sleep_timeout": None, "idle_timeout": None, "preload": True}
    specs = {name: {"source": str(daemon.tiny), "min_residency": 0, **times.get(role, steady)} for role, name in names.items()}
    daemon.config.write_text(json.dumps({"models": specs}))  # JSON is YAML
    await daemon.start()
    status, made = await call(daemon.admin, "POST", "/api/v1/keys", {"name": "soak"})
    assert status == 201, made
    load = Load(daemon, names, str(made["key"]), pause_s)
    samples = list[Sample]()
    began, ends = time.monotonic(), time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(load.users(number, ends))
        group.create_task(load.now_and_then("naps", NAPS_S, ends))
        group.create_task(load.now_and_then("stops", STOPS_S, ends))
        group.create_task(load.operator(ends))
        while time.monotonic() < ends:
            samples.append(await _sample(daemon, (time.monotonic() - began) / 60))
            await asyncio.sleep(min(SAMPLE_S, max(0.0, ends - time.monotonic())))
    launches = sum(event["kind"] == "starting" for event in (await daemon.get("/events?tail=10000"))["events"])
    loop = (await daemon.get("/status"))["loop"]
    status = await daemon.end()
    said = daemon.log.read_text()
    late = [sample for sample in samples if sample.minutes >= WARM_UP * seconds / 60]
    counted_min = late[-1].minutes - late[0].minutes
    slopes = {
        f"{of}_slope_{unit}per_min": slope([s.minutes for s in late], [getattr(s, f"{of}{suffix}") for s in late])
        for of, unit, suffix in (("rss", "kib_", "_kib"), ("fds", "", ""), ("threads", "", ""), ("tasks", "", ""), ("segments", "", ""))
    }
    last = late[len(late) // 2 :]
    figures: dict[str, float] = {
        **slopes,
        "rss_last_half_slope_kib_per_min": slope([s.minutes for s in last], [s.rss_kib for s in last]),
        "minutes": seconds / 60,
        "counted_minutes": counted_min,
        "requests": sum(load.fates.values()),
        "errors": sum(load.errors.values()),
        "starts": launches,
        "rss_first_mib": late[0].rss_kib / 1024,
        "rss_last_mib": late[-1].rss_kib / 1024,
        "rss_most_mib": max(s.rss_kib for s in samples) / 1024,
        "fds_last": late[-1].fds,
        "threads_last": late[-1].threads,
        "tasks_last": late[-1].tasks,
    }
    passed = {
        "no request failed that should not": not load.errors,
        "RSS grew by less than 1 MiB in the counted half": figures["rss_slope_kib_per_min"] * counted_min < 1024,
        "file descriptors flat": abs(figures["fds_slope_per_min"]) * counted_min < 3,
        "threads flat": abs(figures["threads_slope_per_min"]) * counted_min < 2,
        "tasks flat": abs(figures["tasks_slope_per_min"]) * counted_min < 3,
        "no fault of the loop, no traceback": loop["errors"] == 0 and "Traceback" not in said,
        "it ended in order, and nothing is left": status == 0 and not daemon.remains(),
    }
    notes = {
        "passed": passed,
        "fates": dict(load.fates),
        "errors": dict(load.errors),
        "remains": {what: str(value) for what, value in daemon.remains().items()},
        "log_lines": said.count("\n"),
        "each_minute": [asdict(sample) for sample in samples[:: max(1, round(60 / SAMPLE_S))]],
    }
    return figures, notes


class Load:
    """Who asks for what. `fates`: by their words; `errors`: those that nothing explains."""

    def __init__(self, daemon: Daemon, names: dict[str, str], key: str, pause_s: float) -> None:
        self._daemon, self._names, self._key, self._pause_s = daemon, names, key, pause_s
        self.fates: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def users(self, number: int, ends: float) -> None:
        dice, connection = random.Random(number), Connection(self._daemon.port)
        while time.monotonic() < ends:
            await asyncio.sleep(dice.expovariate(1 / self._pause_s))
            wanted, due = self._drawn(dice)
            fate = await ask(connection, wanted, DEADLINE_S)
            self._count(fate, due)
            if dice.random() < 0.2:
                connection.close()
        connection.close()

    async def now_and_then(self, role: str, pause_s: float, ends: float) -> None:
        connection = Connection(self._daemon.port)
        while time.monotonic() < ends:
            self._count(await ask(connection, Ask(self._names[role], True, False, 20, 4, self._key), DEADLINE_S), "answered 200")
            await asyncio.sleep(min(pause_s, max(0.0, ends - time.monotonic())))
        connection.close()

    async def operator(self, ends: float) -> None:
        dice = random.Random(0)
        while time.monotonic() < ends:
            await asyncio.sleep(1.0)
            path = dice.choice([*ADMIN, f"/models/{self._names['busy-0']}"])
            try:
                await self._daemon.get(path)
                self.fates["operator 200"] += 1
            except (Broken, RuntimeError, TimeoutError) as error:
                self.errors[f"operator {path}: {error}"] += 1

    def _drawn(self, dice: random.Random) -> tuple[Ask, str]:
        """A request, and the fate that is due to it."""
        name = self._names[dice.choice(STEADY)]
        wanted = Ask(name, dice.random() < 0.5, dice.random() < 0.5, dice.randint(1, 400), dice.randint(1, 40), self._key)
        match dice.random():
            case kind if kind < 0.05:
                return Ask("nobody", True, False, 5, 1, self._key), "refused 404 model_not_found"
            case kind if kind < 0.08:
                return Ask(name, True, False, 5, 1, "wrong"), "refused 401 invalid_api_key"
            case kind if kind < 0.16:
                return Ask(name, True, True, 50, 100, self._key, leave_after=dice.randint(1, 20)), "left 200"
        return wanted, "answered 200"

    def _count(self, fate: Fate, due: str) -> None:
        self.fates[fate.words] += 1
        own = fate.by <= {fate.ask.model}
        if fate.words != due or not own:
            self.errors[f"{fate.ask.model}: {fate.words}, not {due}: {fate.detail} {sorted(fate.by)}"] += 1


async def _sample(daemon: Daemon, minutes: float) -> Sample:
    assert daemon.process is not None
    pid, told = daemon.process.pid, daemon.folder / "tasks"
    told.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    status = _status(pid)
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    await _until(told.exists)
    state = sum(path.stat().st_size for path in daemon.state.glob("state.db*"))
    return Sample(
        round(minutes, 3), int(status["VmRSS"].split()[0]), fds, int(status["Threads"]), int(told.read_text()),
        len([path for path in daemon.paths() if path.startswith("/dev/shm")]), len(daemon.engine_processes()), state // 1024,
    )  # fmt: skip


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


async def _until(there: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(DEADLINE_S):
        while not there():  # noqa: ASYNC110 - it is another process that does it
            await asyncio.sleep(0.01)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares: y an x."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
