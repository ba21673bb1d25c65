"""A request for a model that sleeps: how long until its first token, against a cold start of the same large model by exec.

And what sleep gives back: on the GPU by NVML, and what it takes of the host's memory.
"""

import statistics
import time

from bench.gpu.rig import Rig, available_bytes, first_token, launch_server, mib, register, tell, wait_s
from bench.gpu.scene import MIB, Part, Scene, wait

ROUNDS = 6  # of sleep and wake; the first sleep pins host memory: 11 to 20 s for 15 GB (H200)
ANSWER_S = 170.0
SHOWN_S = 5.0  # until NVML shows what was given back


def run(rig: Rig, budget_s: float, part: Part) -> None:
    deadline = time.monotonic() + budget_s
    scene, name = rig.scene(True), rig.large
    register(scene, name, rig.models[name])
    if launch_server(scene).get("state") != "ready":
        _first(rig, scene, part)
    _executed(rig, part)
    _asleep_and_back(rig, scene, part, deadline)
    part.figures["wake_speedup"] = part.figures["cold_exec_7b_s"] / part.figures["wake_7b_s"]


def _first(rig: Rig, scene: Scene, part: Part) -> None:
    """It starts the launch server too."""
    part.figures["cold_first_7b_s"] = wait_s(first_token(scene, rig.large, ANSWER_S))
    rig.say(f"{rig.large} first: request to first token {part.figures['cold_first_7b_s']:.2f}s, the launch server's start included")
    tell(scene, rig.large, "unload", "stopped")


def _executed(rig: Rig, part: Part) -> None:
    """After the launch server's imports, which have warmed the disk's cache."""
    executing = rig.scene(False)
    register(executing, rig.large, rig.models[rig.large])
    part.figures["cold_exec_7b_s"] = wait_s(first_token(executing, rig.large, ANSWER_S))
    rig.say(f"{rig.large} executed: request to first token {part.figures['cold_exec_7b_s']:.2f}s")
    rig.close(False)  # with its engine: nothing measured later has company


def _asleep_and_back(rig: Rig, scene: Scene, part: Part, deadline: float) -> None:
    name, before = rig.large, scene.settled(SHOWN_S, 1.0)
    cold = first_token(scene, name, ANSWER_S)
    awake, host = scene.used_bytes(), available_bytes()
    rig.say(f"{name} forked: request to first token {wait_s(cold):.2f}s")
    sleeps = [tell(scene, name, "sleep", "asleep")]
    wait(lambda: scene.used_bytes() < (awake + before) / 2, SHOWN_S)
    asleep, host_asleep = scene.settled(SHOWN_S, 1.0), available_bytes()
    rig.say(f"{name} asleep after {sleeps[0]:.2f}s: {mib(awake - before):.0f} MiB on the GPU became {mib(asleep - before):.0f}")
    described = scene.box.models()[name]
    wakes: list[float] = []
    texts = {cold.text}
    while True:
        woken = first_token(scene, name, ANSWER_S)
        wakes.append(wait_s(woken))
        texts.add(woken.text)
        rig.say(f"{name} asleep: request to first token {wakes[-1]:.2f}s")
        if len(wakes) == ROUNDS or time.monotonic() > deadline:
            break
        sleeps.append(tell(scene, name, "sleep", "asleep"))
    tell(scene, name, "unload", "stopped")
    gone = scene.settled(SHOWN_S, 1.0)
    part.figures |= {
        "cold_7b_s": wait_s(cold),
        "wake_7b_s": statistics.median(wakes),
        "wake_7b_most_s": max(wakes),
        "wake_7b_runs": len(wakes),
        "first_sleep_s": sleeps[0],
        "sleep_s": statistics.median(sleeps[1:] or sleeps),
        "awake_7b_mib": mib(awake - before),
        "asleep_7b_mib": mib(asleep - before),
        "unloaded_7b_mib": mib(gone - before),
        "sleep_host_mib": mib(host - host_asleep),
    }
    said = described["footprint"].get("host_bytes") or (described["engine"] or {}).get("host_bytes")
    if said:
        part.figures["sleep_host_said_mib"] = mib(said)
    part.notes |= {"wakes_s": wakes, "sleeps_s": sleeps, "asleep": described}
    part.passed["sleep gave back most of its memory on the GPU"] = asleep - before < (awake - before) / 2
    part.passed["an unloaded model leaves nothing on the GPU"] = gone - before <= 64 * MIB
    part.passed["the same words after each wake"] = len(texts) == 1
