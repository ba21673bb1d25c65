"""What the parts of gpu-residency share: a daemon that forks its engines and one that does not, on one card, and what is done to models.

A time is that of a user: from the request to its first token. The two daemons are made when a part first needs them.
"""

import argparse
import asyncio
import contextlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.box import Box
from bench.foreign import Foreign, on_gpu, on_simulated
from bench.gpu import parts
from bench.gpu.scene import MIB, OOM_WORDS, Scene, wait
from bench.workloads import Answer, ask, client
from orchestrator.cli.client import Client, model_path
from orchestrator.cli.exits import CliError
from orchestrator.cli.target import Target

NAME = "gpu-residency"
REQUEST = (32, 8)  # tokens in and out of a request that is timed
STATE_S = 60.0
TAIL_LINES = 200  # of each log that is kept


class Rig:
    """`models`: three folders by name, the smallest first."""

    def __init__(self, options: argparse.Namespace, models: Mapping[str, str], args: Sequence[str]) -> None:
        self.options, self.models, self.args = options, models, args
        self._began = time.monotonic()
        self._scenes: dict[bool, Scene] = {}
        self._held: dict[bool, contextlib.ExitStack] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for forking in list(self._held):
            self.close(forking)

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @property
    def small(self) -> str:
        return next(iter(self.models))

    @property
    def large(self) -> str:
        return list(self.models)[-1]

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f}s] {what}", flush=True)

    def mark(self, scene: Scene, what: str) -> None:
        """What the picture shows too."""
        scene.marks.append((scene.box.now_s(), what))
        self.say(what)

    def scene(self, forking: bool) -> Scene:
        """A daemon with, or without, a launch server."""
        if forking not in self._scenes:
            log = self.out / f"{NAME}.daemon-{'fork' if forking else 'exec'}.log"
            self._held[forking] = held = contextlib.ExitStack()
            box = held.enter_context(Box(self._settings(forking), log=log, sampled=forking))
            self._scenes[forking] = Scene(box, self.options, self.models, self.args)
        return self._scenes[forking]

    def close(self, forking: bool) -> None:
        """End that daemon and its engines, if it is there."""
        if forking in self._held:
            self._scenes.pop(forking, None)
            self._held.pop(forking).close()

    def there(self) -> Iterable[Scene]:
        return list(self._scenes.values())

    def foreign(self, scene: Scene) -> Foreign:
        if scene.simgpu is not None:
            command = on_simulated(scene.simgpu, scene.gpu["uuid"])
        else:
            command = on_gpu(self.options.engine_python, scene.gpu["uuid"])
        return Foreign(command, self.out / f"{NAME}.ballast.log")

    def keep_logs(self) -> None:
        """The ends of all engines' logs, in one file."""
        with open(self.out / f"{NAME}.engines.log", "w") as kept:
            for scene in self.there():
                for path in sorted(scene.box.logs().glob("*.log")):
                    tail = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
                    kept.write("\n".join([f"==== {path.name}", *tail, ""]))

    def _settings(self, forking: bool) -> dict[str, str]:
        load_s = 0.5 if forking else 2.0
        found = parts.settings(self.options, ["--load-format", "dummy"], 0.02, load_s, launch_server=forking) | {"ORCH_LOG__LEVEL": "info"}
        if self.options.simulated:
            found["ORCH_MEMORY__SLEEPERS"] = "64GiB"  # half of the host that this is measured on
        return found


# ---- what is done to models -------------------------------------------------------------------------------------------


def calls(scene: Scene) -> Client:
    return Client(Target(str(scene.box.socket), socket=str(scene.box.socket)))


def register(scene: Scene, name: str, folder: str, **fields: Any) -> None:
    """Known, and not started. It stays as it is left: nothing happens to it for being idle."""
    spec = {"name": name, "source": folder, "args": scene.args, "idle_timeout": None, "sleep_timeout": None, **fields}
    calls(scene).send("POST", "/models?start=false", spec)


def remove(scene: Scene, names: Sequence[str]) -> bool:
    """Whether they and their engines are gone in time."""
    for name in names:
        with contextlib.suppress(CliError):  # it was never added
            calls(scene).send("DELETE", model_path(name))
    return wait(lambda: not set(names) & set(scene.box.models()), STATE_S, 0.1)


def tell(scene: Scene, name: str, verb: str, state: str) -> float:
    """sleep, unload, …: seconds until it is so. Raises RuntimeError if it is not in time, CliError if it is refused."""
    wait(lambda: not scene.box.models()[name]["in_flight"], STATE_S, 0.02)
    began = time.monotonic()
    calls(scene).send("POST", model_path(name, f"/{verb}"))
    if not wait(lambda: scene.box.models()[name]["state"] == state, STATE_S, 0.02):
        model = scene.box.models()[name]
        raise RuntimeError(f"{name} was told to {verb}, and is {model['state']} after {STATE_S:.0f}s: {model['reason']}")
    return time.monotonic() - began


def first_token(scene: Scene, name: str, timeout_s: float) -> Answer:
    """One short streamed request. Raises RuntimeError if it is not answered."""

    async def one() -> Answer:
        async with client(scene.box.url, timeout_s) as api:
            return await ask(api, name, *REQUEST, stream=True)

    answer = asyncio.run(one())
    if answer.error:
        raise RuntimeError(f"{name}: {answer.error}; {scene.box.models()[name]['reason']}")
    return answer


def wait_s(answer: Answer) -> float:
    """To the first token; to the end where that says nothing sooner."""
    return answer.total_s if answer.first_s is None else answer.first_s


def launch_server(scene: Scene) -> Mapping[str, Any]:
    return dict(scene.box.status()["launch_servers"].get("default") or {})


def available_bytes() -> int:
    """Host memory that could be had now."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


class LogWatch:
    """Lines of engines' logs that speak of memory that was not there. Old logs are dropped while models come and go: look often."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at: dict[Path, int] = {}
        self.found: list[str] = []

    def look(self) -> None:
        for path in sorted(self._folder.glob("*.log")):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(self._at.get(path, 0))
                text = file.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._at[path] = self._at.get(path, 0) + len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    if any(word in line.lower() for word in OOM_WORDS):
                        self.found.append(f"{path.name}: {line.strip()[:300]}")


def mib(size_bytes: float) -> float:
    return size_bytes / MIB
