"""gpu-survive: two real engines under load, and one thing after the other is killed. Who is served again, when, and what is left?

Faults: the daemon, an engine's API server, its EngineCore, all of an engine, the launch server, NVML's process killed by SIGKILL; an
EngineCore and an API server stopped (SIGSTOP: they live, and do nothing); a segment removed. After each one both models must answer
again, the other model must not have lost a request (but where the daemon was killed), and the GPU must hold what it held before.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from threading import Event, Thread

import psutil

from bench import results
from bench.box import Box
from bench.demo import SHAPES
from bench.gpu import leftovers, parts
from bench.gpu.rig import mib
from bench.gpu.scene import EAGER, MIB, Scene, wait
from bench.workloads import Answer, ask, client
from orchestrator.drivers import kvcached

NAME = "gpu-survive"
TOGETHER = 4  # requests of each model, all the time
REQUEST = (64, 200)  # tokens in and out: a second of an eager 0.5B engine
LOAD_S = 2.0  # before each fault
PAUSE_S = 0.2  # of a client that was refused
HEAL_S = 120.0
SHOWN_S, STILL_S = 20.0, 1.5
SAME_BYTES = 384 * MIB  # an engine's idle memory from one start to the next


@dataclass
class Fate:
    """Of one fault. `healed_s`: from it to the first whole answer of the model that was hit, asked after it; where answers never
    stopped, to the moment that what was broken is there again. None: not in time."""

    fault: str
    healed_s: float | None
    cut: int
    refused: int
    others_failed: int
    restarted: bool
    kept_mib: float  # more on the GPU than before, when all is quiet
    reason: str


class Load:
    """Requests to each model, TOGETHER at a time, from a thread of its own. `answers`: with the moment of their end."""

    def __init__(self, box: Box, names: list[str]) -> None:
        self._box, self._names = box, names
        self.answers: list[tuple[float, float, Answer]] = []
        self._over = Event()
        self._thread = Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Load":
        self._url = self._box.url
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(HEAL_S)

    async def _run(self) -> None:
        async with client(self._url, HEAL_S) as api:

            async def worker(name: str, number: int) -> None:
                while not self._over.is_set():
                    began = time.monotonic()
                    answer = await ask(api, name, *REQUEST, number % 2 == 0)
                    self.answers.append((began, time.monotonic(), answer))
                    if answer.error:
                        await asyncio.sleep(PAUSE_S)

            await asyncio.gather(*(worker(name, number) for name in self._names for number in range(TOGETHER)))

    def healed(self, name: str, since: float) -> float | None:
        """When a whole answer to a request of after `since` had come."""
        ends = [end for began, end, answer in self.answers if answer.model == name and began > since and answer.error is None]
        return min(ends, default=None)


def main(argv: list[str]) -> int:
    parser = parts.parser(NAME, __doc__, FAULTS, 560.0, "twice")
    options = parts.parsed(parser, argv, FAULTS, 2, "--engine-python and twice --model are needed (or --simulated)")
    with parts.placed(options, NAME, SHAPES):
        return _run(options, results.typed(NAME, argv))


def _run(options: argparse.Namespace, command: str) -> int:
    models = dict(options.model)
    names, began, fates = list(models), time.monotonic(), list[Fate]()
    with Box(_settings(options), log=options.out / f"{NAME}.daemon.log", sampled=False) as box:
        scene = Scene(box, options, models, EAGER)
        gpu, folder = str(scene.gpu["name"]), box.folder
        scene.up(names)
        for number, fault in enumerate(options.parts):  # each hits the other model: five failures in a row would be one too many
            if time.monotonic() - began > options.limit_s - 45:
                print(f"{fault}: no time is left")
                break
            fates.append(_one(scene, names[:: -1 if number % 2 else 1], fault))
            print(json.dumps(asdict(fates[-1])), flush=True)
        for name in names:
            box.ctl("rm", name)
        wait(lambda: not box.models(), 60)
        errors = box.status()["loop"]["errors"]
        lost = scene.settled(SHOWN_S, STILL_S) - scene.empty_bytes
        if not all(fate.healed_s for fate in fates):
            scene.keep_logs()
    left = leftovers.writers(folder)
    figures = {
        "faults": len(fates),
        "healed": sum(fate.healed_s is not None for fate in fates),
        "lost_mib": mib(lost),
        "kept_most_mib": max((fate.kept_mib for fate in fates), default=0.0),
        "others_failed": sum(fate.others_failed for fate in fates),
        "orphans": len(left),
        "loop_errors": errors,
        **{f"{fate.fault.replace('-', '_')}_s": fate.healed_s for fate in fates if fate.healed_s is not None},
    }
    passed = {
        "every fault was tried": len(fates) == len(options.parts),
        "every fault healed": figures["healed"] == len(fates),
        "no request of the other model failed": figures["others_failed"] == 0,
        "a killed daemon's engines were not started again": not any(fate.restarted for fate in fates if fate.fault == "daemon"),
        "the GPU held what it held before, after each": all(abs(fate.kept_mib) <= SAME_BYTES / MIB for fate in fates),
        "nothing is left": lost <= 64 * MIB and not left and not leftovers.paths(names),
        "the loop had no errors": errors == 0,
    }
    notes = {"fates": [asdict(fate) for fate in fates], "left": left, "models": models, "passed": passed, "simulated": options.simulated}
    path = results.write(NAME, command, figures, notes, gpu, ("vllm", "kvcached", "torch"), options.out)
    return results.verdict(figures, passed, path)


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """A port that stays: clients come back to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = ["--load-format", "dummy"]
    return parts.settings(options, args, 0.005, launch_server=True) | {"ORCH_LISTEN__PORT": str(port)}


def _one(scene: Scene, names: list[str], fault: str) -> Fate:
    box, (hit, other) = scene.box, names
    box.until_ready(names, HEAL_S)
    before, launches = scene.settled(SHOWN_S, STILL_S), scene.launches()
    with Load(box, names) as load:
        time.sleep(LOAD_S)
        at, told_after = time.monotonic(), time.time()
        mended = FAULTS[fault](box, hit)
        everyone = names if fault == "daemon" else [hit]
        mended_at = time.monotonic() if mended is None or wait(mended, HEAL_S, 0.01) else None
        wait(lambda: all(load.healed(name, at) for name in everyone), HEAL_S)
    ends = [load.healed(name, at) for name in everyone]
    healed_at = None if None in ends else mended_at if mended else max(filter(None, ends))
    failed = [answer for _, end, answer in load.answers if answer.error and end > at]
    box.until_ready(names, HEAL_S)
    told = [event for event in box.events() if event["model"] == hit and event["at"] >= told_after]
    reasons = [event["reason"] for event in told if event["kind"] in ("stopping", "backoff", "adopted")]
    return Fate(
        fault=fault,
        healed_s=healed_at and healed_at - at,
        cut=sum("StatusError" not in str(a.error) and not _refused(a) for a in failed if a.model == hit or fault == "daemon"),
        refused=sum(_refused(a) for a in failed if a.model == hit or fault == "daemon"),
        others_failed=0 if fault == "daemon" else sum(a.model == other for a in failed),
        restarted=scene.launches() != launches,
        kept_mib=mib(scene.settled(SHOWN_S, STILL_S) - before),
        reason=reasons[-1] if reasons else "",
    )


def _refused(answer: Answer) -> bool:
    """Told in order, or not connected: nothing of it had begun."""
    return any(word in str(answer.error) for word in ("InternalServerError", "RateLimit", "APIConnectionError", "APIStatusError"))


# ---- the faults -------------------------------------------------------------------------------------------------------
# Each returns what must hold again besides answers, where these do not show it.


def _daemon(box: Box, hit: str) -> None:
    box.kill()
    box.begin()


def _api_server(box: Box, hit: str) -> None:
    _server(box, hit).kill()


def _engine_core(box: Box, hit: str) -> None:
    _core(box, hit).kill()


def _engine(box: Box, hit: str) -> None:
    server = _server(box, hit)
    for process in (server, *server.children(recursive=True)):
        process.kill()


def _launch_server(box: Box, hit: str) -> None:
    """And an engine that must be started then."""
    os.kill(int(box.status()["launch_servers"]["default"]["pid"]), signal.SIGKILL)
    _core(box, hit).kill()


def _nvml(box: Box, hit: str) -> Callable[[], bool] | None:
    readers = _readers(box)
    for reader in readers:
        reader.kill()
    if not readers:  # simulated GPUs have none
        return None
    return lambda: bool(set(_readers(box)) - set(readers)) and not any(gpu["error"] for gpu in box.status()["gpus"])


def _segment(box: Box, hit: str) -> Callable[[], bool]:
    segment = kvcached.SHM / str(box.models()[hit]["engine"]["ipc_name"])
    segment.unlink()
    return lambda: (found := kvcached.read(segment.name)) is not None and found.limit_bytes > 0


def _stopped_core(box: Box, hit: str) -> None:
    _core(box, hit).suspend()


def _stopped_server(box: Box, hit: str) -> None:
    _server(box, hit).suspend()


def _readers(box: Box) -> list[psutil.Process]:
    children = psutil.Process(box.process.pid).children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "nvml_reader" in " ".join(child.cmdline())]


def _server(box: Box, hit: str) -> psutil.Process:
    return psutil.Process(int(box.models()[hit]["engine"]["pid"]))


def _core(box: Box, hit: str) -> psutil.Process:
    """EngineCore renames itself; the simulated engine's core is its server's only child."""
    children = _server(box, hit).children()
    named = [child for child in children if "EngineCore" in child.name() + " ".join(child.cmdline())]
    return (named or [child for child in children if "resource_tracker" not in " ".join(child.cmdline())])[0]


FAULTS: Mapping[str, Callable[[Box, str], Callable[[], bool] | None]] = {
    "daemon": _daemon,
    "api-server": _api_server,
    "engine-core": _engine_core,
    "engine": _engine,
    "launch-server": _launch_server,
    "nvml": _nvml,
    "segment": _segment,
    "stopped-core": _stopped_core,
    "stopped-server": _stopped_server,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
