"""A request for a stopped model: how long until its first token, with engines that are forked from a launch server and without.

The first request also waits for the launch server itself; later ones find it warm. Each is for the same small model, unloaded
between.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from bench.rig import Rig, first_token, launch_server, mib, register, tell, wait_s
from bench.scene import Part, Scene, wait

WARM_RUNS = 5
EXEC_RUNS = 2
EXEC_S = 60.0  # kept for at least one start by exec: 41 s on an H200
ANSWER_S = 170.0


def run(rig: Rig, budget_s: float, part: Part) -> None:
    deadline = time.monotonic() + budget_s
    forking = rig.scene(True)
    _first(rig, forking, part)
    forked = _several(rig, forking, part, "forked", WARM_RUNS, deadline - EXEC_S)
    server = launch_server(forking)
    part.notes["launch_server"] = server
    part.figures |= {
        "launch_server_import_s": server.get("import_s") or 0.0,
        "launch_server_rss_mib": mib(server.get("rss_bytes") or 0),
        "launch_server_pss_mib": mib(server.get("pss_bytes") or 0),
        "cold_05b_s": statistics.median(forked),
        "cold_05b_most_s": max(forked),
        "cold_05b_runs": len(forked),
    }
    part.passed["every engine of the daemon with a launch server was forked"] = server.get("forks") == 1 + len(forked)
    executing = rig.scene(False)
    register(executing, rig.small, rig.models[rig.small])
    executed = _several(rig, executing, part, "executed", EXEC_RUNS, deadline)
    part.figures |= {
        "cold_exec_05b_s": statistics.median(executed),
        "cold_exec_05b_runs": len(executed),
        "cold_speedup": statistics.median(executed) / statistics.median(forked),
    }


def _first(rig: Rig, scene: Scene, part: Part) -> None:
    """It starts the launch server, whose own time is seen beside it."""
    began = time.monotonic()
    register(scene, rig.small, rig.models[rig.small])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first_token, scene, rig.small, ANSWER_S)
        wait(lambda: launch_server(scene).get("state") == "ready" or asked.done(), ANSWER_S)
        if launch_server(scene).get("state") == "ready":
            part.figures["launch_server_start_s"] = time.monotonic() - began
        part.figures["cold_first_05b_s"] = wait_s(asked.result())
    rig.say(f"the first request: {part.figures['cold_first_05b_s']:.2f}s, launch server included")
    tell(scene, rig.small, "unload", "stopped")


def _several(rig: Rig, scene: Scene, part: Part, how: str, runs: int, deadline: float) -> list[float]:
    """One at least, and what fits before the deadline."""
    seconds: list[float] = []
    longest = 0.0
    while len(seconds) < runs and (not seconds or time.monotonic() + 1.1 * longest < deadline):
        began = time.monotonic()
        seconds.append(wait_s(first_token(scene, rig.small, ANSWER_S)))
        rig.say(f"{rig.small} {how}: request to first token {seconds[-1]:.2f}s")
        tell(scene, rig.small, "unload", "stopped")
        longest = max(longest, time.monotonic() - began)
    part.notes[f"cold_{how}"] = seconds
    return seconds
