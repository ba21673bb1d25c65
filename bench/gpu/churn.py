"""Sixteen models on a card made small, so that five of them fit at most: random traffic to all. Who is answered, and how late?

Somebody else's process holds the rest of the card. Each model is promised KV_FLOOR, so that the sizes do not differ too much for
"five fit" to mean something. At the end all models are removed, and nothing of them may be left.
"""

import asyncio
import random
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from bench import plots
from bench.gpu import churn_traffic, leftovers
from bench.gpu.churn_traffic import DEADLINE_S, Fate
from bench.gpu.rig import NAME, LogWatch, Rig, calls, launch_server, mib, register, remove
from bench.gpu.scene import GIB, Part, Scene

LETTERS = "abcdefghijklmnop"
SHARES = (6, 6, 4)  # of the sixteen: so many of the first, second, third folder
FIT = 5
KV_FLOOR = 8 * GIB
MARGIN = GIB // 2  # the ballast leaves this much less than FIT + 1 of the smallest would need
DRAIN_S = 45.0  # for those still under way when the traffic ends
RETURN_S = 30.0  # a model that left and is called back within this long was sent away in vain
LOOK_S = 5.0
GONE_S = 20.0
LEAST_S = 10.0
MOVES = ("starting", "ready", "asleep", "waking", "stopping", "backoff", "failed")


def run(rig: Rig, budget_s: float, part: Part) -> None:
    options, scene = rig.options, rig.scene(True)
    deadline = time.monotonic() + budget_s
    models = sixteen(rig.models, options.seed)
    for name, (_, folder) in models.items():
        register(scene, name, folder, sleep_timeout="5m", kv_floor=KV_FLOOR, min_residency=f"{options.min_residency_s:g}s")
    with rig.foreign(scene) as ballast:
        room = _room(scene, models)
        leave = scene.free() - int(scene.gpu["reserve_bytes"]) - room
        ballast.take(max(0, int(options.ballast_gib * GIB) if options.ballast_gib is not None else leave))
        rig.mark(scene, "traffic")
        part.figures["churn_ballast_gib"] = ballast.held_bytes / GIB
        part.figures["churn_room_gib"] = (scene.free() - int(scene.gpu["reserve_bytes"])) / GIB
        seconds = min(options.churn_s, deadline - time.monotonic() - DRAIN_S - GONE_S)
        if seconds < LEAST_S:
            raise RuntimeError(f"{deadline - time.monotonic():.0f}s are left: too few for traffic and what follows it")
        requests = churn_traffic.schedule(list(models), seconds, options.rate, options.seed)
        began_s = scene.box.now_s()
        with _Story(rig, scene) as story:
            drain_s = max(5.0, min(DRAIN_S, deadline - time.monotonic() - seconds - GONE_S))
            fates, cut = asyncio.run(churn_traffic.play(scene.box.url, requests, drain_s))
        rig.mark(scene, "traffic over")
        _tell(part, story, fates, cut, seconds)
        _count_ready(scene, began_s, part)
        part.notes["churn_models"] = {name: shape for name, (shape, _) in models.items()}
        part.notes["churn_explain"] = scene.box.ctl("explain", check=False).stdout.splitlines()
        _leave(rig, scene, list(models), part)
    rig.say("the ballast is gone")
    used = scene.settled(GONE_S, 2.0)
    part.figures["lost_mib"] = mib(used - scene.empty_bytes)
    part.passed["the GPU is as empty as at the start"] = part.figures["lost_mib"] <= 64
    rows = [(name, shape) for name, (shape, _) in models.items()]
    title = f"{len(models)} models, {part.figures['churn_room_gib']:.0f} GiB for them (each is promised {KV_FLOOR >> 30} of KV)"
    samples = [sample for sample in scene.box.samples() if sample.at_s >= began_s - 5]
    waits = [(fate.request.model, began_s + fate.request.at_s, fate.wait_s, fate.status is None) for fate in fates]
    marks = [(at, what) for at, what in scene.marks if at >= began_s - 5]
    plots.residency(samples, rows, waits, marks, title, rig.out / f"{NAME}.png")


def sixteen(folders: Mapping[str, str], seed: int) -> dict[str, tuple[str, str]]:
    """Name -> shape and folder, mixed."""
    shapes = [shape for shape, count in zip(folders, SHARES, strict=True) for _ in range(count)]
    random.Random(seed).shuffle(shapes)
    return {f"churn-{letter}": (shape, folders[shape]) for letter, shape in zip(LETTERS, shapes, strict=True)}


def _room(scene: Scene, models: Mapping[str, tuple[str, str]]) -> int:
    """Bytes for models: a little less than the FIT + 1 smallest need, and enough for any one of them to start."""
    known = scene.box.models()
    ready, start = [], []
    for name in models:
        footprint = known[name]["footprint"]
        passing = sum(size for part, size in footprint["parts"].items() if part in ("activations", "profiling, until ready"))
        ready.append(footprint["total_bytes"] - passing + KV_FLOOR)
        start.append(footprint["total_bytes"] + KV_FLOOR)
    return int(max(sum(sorted(ready)[: FIT + 1]) - MARGIN, max(start) + GIB))


class _Story:
    """What the daemon tells meanwhile, and the engines' logs: both forget, so both are read again and again."""

    def __init__(self, rig: Rig, scene: Scene) -> None:
        self._rig, self._scene = rig, scene
        self._logs = LogWatch(scene.box.logs())
        self._seen: dict[tuple[float, str, str], Mapping[str, Any]] = {}
        self._since = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.failed: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self._look()

    @property
    def events(self) -> list[Mapping[str, Any]]:
        return sorted(self._seen.values(), key=lambda event: float(event["at"]))

    @property
    def ooms(self) -> list[str]:
        return self._logs.found

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self._look()
            except Exception as error:  # one look that failed is made up for by the next
                self.failed.append(f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        for event in self._scene.box.events():
            if event["at"] >= self._since:
                self._seen[event["at"], event["model"], event["kind"]] = event
        self._logs.look()
        states = [model["state"] for model in self._scene.box.models().values()]
        shown = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        self._rig.say(f"{shown}; {self._scene.free() / GIB:.1f} GiB free")


def _tell(part: Part, story: _Story, fates: Sequence[Fate], cut: int, seconds: float) -> None:
    events = story.events
    counts = {kind: sum(event["kind"] == kind for event in events) for kind in MOVES}
    returned, left = thrash(events)
    failures = [f"{event['model']}: {event['reason']}" for event in events if event["kind"] in ("backoff", "failed")]
    part.figures |= churn_traffic.figures(fates, cut)
    part.figures |= {
        "churn_s": seconds,
        "churn_starts": counts["starting"],
        "churn_wakes": counts["waking"],
        "churn_sleeps": counts["asleep"],
        "churn_stops": counts["stopping"],
        "churn_sleeps_in_vain": slept_in_vain(events),
        "churn_failures": len(failures),
        "churn_thrash_percent": 100 * returned / max(1, left),
        "oom_lines": len(story.ooms),
    }
    part.notes |= churn_traffic.notes(fates)
    part.notes |= {"churn_failures": failures[:10], "oom": story.ooms[:10], "story_failed": story.failed[:3]}
    part.passed |= {
        "every request to the sixteen was answered": part.figures["churn_answered"] == part.figures["churn_requests"] - cut,
        "none waited longer than it said": all(fate.answer.total_s < DEADLINE_S + 5 for fate in fates if fate.status is not None),
        "no engine ran out of memory": not story.ooms,
        "no engine failed": not failures,
    }


def _count_ready(scene: Scene, began_s: float, part: Part) -> None:
    """Whether the card was as small as it was meant to be."""
    counts = [
        sum(model["state"] == "ready" for model in sample.models.values()) for sample in scene.box.samples() if sample.at_s >= began_s
    ]
    part.figures |= {"churn_most_ready": max(counts, default=0), "churn_mean_ready": sum(counts) / max(1, len(counts))}
    part.passed[f"at most {FIT} were ready at a time"] = max(counts, default=0) <= FIT


def thrash(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many models that went to sleep or were stopped were called back within RETURN_S, and how many went."""
    went: dict[str, float] = {}
    returned = left = 0
    for event in events:
        name, at = str(event["model"]), float(event["at"])
        if event["kind"] in ("asleep", "stopping"):
            left += name not in went  # one that sleeps and is then stopped has left once
            went.setdefault(name, at)
        elif event["kind"] in ("waking", "starting") and name in went:
            returned += at - went.pop(name) < RETURN_S
    return returned, left


def slept_in_vain(events: Sequence[Mapping[str, Any]]) -> int:
    """Sleeps that ended with a stop: the first sleep of a large engine takes many seconds, for nothing then."""
    asleep: set[str] = set()
    count = 0
    for event in events:
        if event["kind"] == "asleep":
            asleep.add(event["model"])
        elif event["kind"] in ("waking", "stopping") and event["model"] in asleep:
            asleep.remove(event["model"])
            count += event["kind"] == "stopping"
    return count


def _leave(rig: Rig, scene: Scene, models: Sequence[str], part: Part) -> None:
    """All models are removed; nothing of any engine may be left but the launch server."""
    began = time.monotonic()
    everyone = [*scene.box.models()]
    gone = remove(scene, everyone)
    server = launch_server(scene).get("pid")
    orphans = leftovers.writers(scene.box.logs(), {server} if server else set())
    left = leftovers.paths([*models, *everyone])
    part.figures |= {"orphans": len(orphans), "leftover_paths": len(left), "removed_s": time.monotonic() - began}
    part.notes |= {"orphans": orphans, "leftover_paths": left}
    part.passed["every model is gone"] = gone and not calls(scene).models()["models"]
    part.passed["no process, segment or socket is left"] = not orphans and not left
    rig.say(f"all removed after {part.figures['removed_s']:.1f}s; {len(orphans)} orphans, {len(left)} segments and sockets left")
