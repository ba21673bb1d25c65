"""A request for a stopped model: how long until its first token, with engines that are forked from a launch server and without.

The first request also waits for the launch server itself, whose imports warm the disk's cache for all that follows; later ones find
it there. Each is for the same small model, unloaded between.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from bench.gpu.rig import Rig, first_token, launch_server, mib, register, tell, wait_s
from bench.gpu.scene import Part, Scene, wait

WARM_RUNS = 5
EXEC_RUNS = 2
ANSWER_S = 170.0


def run(rig: Rig, budget_s: float, part: Part) -> None:
    deadline = time.monotonic() + budget_s
    forking = rig.scene(True)
    forks = launch_server(forking).get("forks", 0)
    register(forking, rig.small, rig.models[rig.small])
    _first(rig, forking, part)
    executing = rig.scene(False)
    register(executing, rig.small, rig.models[rig.small])
    began = time.monotonic()
    executed = _several(rig, executing, "executed", 1, deadline)
    kept_s = 1.1 * (time.monotonic() - began)  # for one more
    forked = _several(rig, forking, "forked", WARM_RUNS, deadline - kept_s)
    executed += _several(rig, executing, "executed", EXEC_RUNS - 1, deadline, kept_s)
    server = launch_server(forking)
    part.notes |= {"launch_server": server, "cold_forked_s": forked, "cold_executed_s": executed}
    part.figures |= {
        "launch_server_import_s": server.get("import_s") or 0.0,
        "launch_server_rss_mib": mib(server.get("rss_bytes") or 0),
        "launch_server_pss_mib": mib(server.get("pss_bytes") or 0),
        "cold_05b_s": statistics.median(forked),
        "cold_05b_most_s": max(forked),
        "cold_05b_runs": len(forked),
        "cold_exec_05b_s": statistics.median(executed),
        "cold_exec_05b_runs": len(executed),
        "cold_speedup": statistics.median(executed) / statistics.median(forked),
    }
    part.passed["every engine of the daemon with a launch server was forked"] = server.get("forks") == forks + 1 + len(forked)


def _first(rig: Rig, scene: Scene, part: Part) -> None:
    """Unless an earlier part did, it starts the launch server, whose own time is seen beside it."""
    warm = launch_server(scene).get("state") == "ready"
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first_token, scene, rig.small, ANSWER_S)
        wait(lambda: launch_server(scene).get("state") == "ready" or asked.done(), ANSWER_S)
        ready_s = time.monotonic() - began
        first_s = wait_s(asked.result())
    if not warm and launch_server(scene).get("state") == "ready":
        part.figures |= {"launch_server_start_s": ready_s, "cold_first_05b_s": first_s}
    rig.say(f"{rig.small} first: request to first token {first_s:.2f}s, {'the launch server was there' if warm else 'its start included'}")
    tell(scene, rig.small, "unload", "stopped")


def _several(rig: Rig, scene: Scene, how: str, runs: int, deadline: float, first_s: float = 0.0) -> list[float]:
    """What fits before the deadline. `first_s`: what the first will need, where that is known; else there is one in any case."""
    seconds: list[float] = []
    longest = first_s
    while len(seconds) < runs and (not longest or time.monotonic() + longest < deadline):
        began = time.monotonic()
        seconds.append(wait_s(first_token(scene, rig.small, ANSWER_S)))
        rig.say(f"{rig.small} {how}: request to first token {seconds[-1]:.2f}s")
        tell(scene, rig.small, "unload", "stopped")
        longest = max(longest, 1.1 * (time.monotonic() - began))
    return seconds
