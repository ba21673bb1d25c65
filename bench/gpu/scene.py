"""What the parts of gpu-budgets share: the box, its models, the card, the ballast's command; on a GPU or on a simulated one.

A part returns a Part: figures (numbers), notes (what explains them), and what must hold (a name, and whether it did).
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.box import Box
from bench.card import Watch, free_reader
from bench.foreign import Foreign, on_gpu, on_simulated

MIB, GIB = 1 << 20, 1 << 30
BOUNDED = ("--max-model-len", "32768")
EAGER = ("--enforce-eager",)  # without CUDA graphs an engine starts in a tenth of the time
OOM_WORDS = ("out of memory", "outofmemory", "cuda error")


@dataclass
class Part:
    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)


@dataclass
class Scene:
    box: Box
    options: argparse.Namespace
    models: Mapping[str, str]  # name -> folder
    args: Sequence[str]  # vLLM's, the same for every engine
    marks: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gpu = self.box.status()["gpus"][0]
        self.free = free_reader(self.gpu, self.simgpu)
        self.empty_bytes = self.used_bytes()

    @property
    def simulated(self) -> bool:
        return bool(self.options.simulated)

    @property
    def simgpu(self) -> Path | None:
        return self.box.folder / "run/simgpu" if self.simulated else None

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    def used_bytes(self) -> int:
        return int(self.gpu["total_bytes"]) - self.free()

    def settled(self, most_s: float, still_s: float) -> int:
        """The least that the card's use fell to: waits until it has not fallen for `still_s`, `most_s` at most."""
        deadline = time.monotonic() + most_s
        least, fell = self.used_bytes(), time.monotonic()
        while time.monotonic() < min(deadline, fell + still_s):
            time.sleep(0.2)
            if (used := self.used_bytes()) < least:
                least, fell = used, time.monotonic()
        return least

    def say(self, what: str) -> None:
        print(f"[{self.box.now_s():6.1f}s] {what}", flush=True)

    def mark(self, what: str) -> None:
        """What the picture shows too."""
        self.marks.append((self.box.now_s(), what))
        self.say(what)

    def up(self, names: Sequence[str], more: Mapping[str, str] | None = None, own: Sequence[str] = (*EAGER, *BOUNDED)) -> None:
        """Has these models ready, and adds those that are not there. `more`: folders of models that only one part needs; `own`: vLLM's
        arguments besides those of every engine."""
        folders = {**self.models, **(more or {})}
        there = self.box.models()
        for name in names:
            if name not in there:
                began = time.monotonic()
                self.box.ctl("add-model", name, folders[name], "--idle-timeout", "never", "--timeout", "150", "--", *own, timeout_s=160)
                self.say(f"{name} added in {time.monotonic() - began:.1f}s")
        self.box.until_ready(names, 60)

    def watch(self, names: Sequence[str]) -> Watch:
        there = self.box.models()
        ipc_names = {name: there[name]["engine"]["ipc_name"] for name in names}
        return Watch(self.free, ipc_names, int(self.gpu["reserve_bytes"]))

    def foreign(self) -> Foreign:
        if self.simgpu is not None:
            command = on_simulated(self.simgpu, self.gpu["uuid"])
        else:
            command = on_gpu(self.options.engine_python, self.gpu["uuid"])
        return Foreign(command, self.out / "gpu-budgets.ballast.log")

    def pool(self, name: str) -> Mapping[str, Any]:
        return dict(self.box.models()[name]["pool"] or {})

    def launches(self) -> dict[str, str]:
        return {name: model["engine"]["launch_id"] for name, model in self.box.models().items() if model["engine"]}

    def deaths(self, before: Mapping[str, str]) -> list[str]:
        """Engines of `before` that are not there as they were."""
        after = self.box.models()
        gone = []
        for name, launch_id in before.items():
            engine = after.get(name, {}).get("engine") or {}
            if engine.get("launch_id") != launch_id or after[name]["state"] != "ready":
                gone.append(f"{name}: {after.get(name, {}).get('state')}: {after.get(name, {}).get('reason')}")
        return gone

    def failures(self) -> list[str]:
        """What the daemon says of engines that failed, since it started."""
        return [
            f"{event['model']}: {event['kind']}: {event['reason']}" for event in self.box.events() if event["kind"] in ("backoff", "failed")
        ]

    def oom_lines(self) -> list[str]:
        """Lines of the engines' logs that speak of memory that was not there."""
        found = []
        for path in sorted(self.box.logs().glob("*.log")):
            for line in path.read_text(errors="replace").splitlines():
                if any(word in line.lower() for word in OOM_WORDS):
                    found.append(f"{path.name}: {line.strip()[:300]}")
        return found

    def keep_logs(self) -> None:
        """The ends of the engines' logs, for whoever must find out why."""
        for path in self.box.logs().glob("*.log"):
            tail = path.read_text(errors="replace").splitlines()[-400:]
            (self.out / f"gpu-budgets.{path.name}").write_text("\n".join(tail) + "\n")


def wait(probe: Callable[[], bool], timeout_s: float, period_s: float = 0.05) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not probe():
        if time.monotonic() >= deadline:
            return False
        time.sleep(period_s)
    return True
