"""A request that needs more KV than its engine may have must wait, and must run as soon as the limit rises: seconds from the raise.

kvcached applies a limit that it finds in the segment only inside an allocation, and a starved engine makes none: a limit that is
written and nothing more never reaches it. Twice: by the operator's ceiling, and by a foreign process that takes all memory.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from bench.foreign import Foreign
from bench.gpu.scene import EAGER, GIB, Part, Scene, wait
from bench.workloads import Answer, ask, client
from orchestrator.cli.exits import CliError

NAME = "wedge"  # the first model once more; the daemon does not know how long its requests may be (folders.py)
ROUNDS = 3
WAITS_S = 3.0  # long against an answer (0.3 s), and against the loop (0.25 s)
APPLIED_S = 15.0
ANSWER_S = 60.0
LEAVE = 0.015  # of the card: less than the 2 % that kvcached leaves alone, so it maps nothing; activations still have room


def run(scene: Scene, budget_s: float) -> Part:
    scene.up([NAME], {NAME: str(scene.options.wedge_folder)}, EAGER)
    began = time.monotonic()
    part, launches = Part(), scene.launches()
    _rounds(scene, part, "ceiling", "wedge_s", began + budget_s / 2, lambda salt: _by_ceiling(scene, salt))
    with scene.foreign() as ballast:
        _rounds(scene, part, "foreign", "wedge_foreign_s", began + budget_s, lambda salt: _by_foreign(scene, ballast, salt))
    deaths = scene.deaths(launches)
    part.notes["wedge_deaths"] = deaths
    part.figures["dead_engines"] = len(deaths)
    part.passed["no engine died of starving"] = not deaths
    return part


def _rounds(scene: Scene, part: Part, what: str, figure: str, deadline: float, one: Callable[[str], float]) -> None:
    """ROUNDS of one kind into `part`; the longest counts. A round that goes wrong is a fault, not the end of the part."""
    seconds: list[float] = []
    faults: list[str] = []
    for number in range(ROUNDS):
        if time.monotonic() > deadline:
            faults.append(f"round {number + 1}: no time left")
            break
        scene.say(f"wedge by {what} {number + 1}")
        try:
            seconds.append(one(f"{what} {number} "))
        except CliError as error:  # the daemon refused the bound: it will refuse it again
            faults.append("; ".join([str(error), *error.lines]))
            break
        except RuntimeError as error:
            faults.append(str(error))
    if seconds:
        part.figures[figure] = max(seconds)
    part.notes[f"wedge_{what}"] = {"seconds": seconds, "faults": faults}
    part.passed[f"a starved request waits, and runs after the raise ({what})"] = bool(seconds) and not faults


def _by_ceiling(scene: Scene, salt: str) -> float:
    pool = scene.pool(NAME)
    small, large = 2 * pool["bundle_bytes"], pool["ceiling_bytes"]
    _empty_prefix_cache(scene)
    scene.box.limit(NAME, kv_ceiling=small)
    try:
        if not wait(lambda: scene.pool(NAME)["limit_bytes"] <= small and scene.pool(NAME)["status"] == "applied", APPLIED_S):
            raise RuntimeError(f"the limit of two bundles was not applied within {APPLIED_S:.0f}s: {scene.pool(NAME)}")

        def enough() -> float:
            at = time.monotonic()
            scene.box.limit(NAME, kv_ceiling=large)
            return at

        return asyncio.run(_starved(scene, salt, enough))
    finally:
        scene.box.limit(NAME, kv_ceiling=None)


def _by_foreign(scene: Scene, ballast: Foreign, salt: str) -> float:
    _empty_prefix_cache(scene)
    ballast.take(max(0, scene.free() - int(LEAVE * scene.gpu["total_bytes"])))
    try:
        few = 2 * scene.pool(NAME)["bundle_bytes"]
        if not wait(lambda: _at_most(scene, few), APPLIED_S):  # pages in reserve are spent whatever the limit is, until they are trimmed
            raise RuntimeError(f"the pool did not shrink within {APPLIED_S:.0f}s of a grab of {ballast.held_bytes / GIB:.1f} GiB")
        return asyncio.run(_starved(scene, salt, ballast.give_all))
    finally:
        ballast.give_all()


def _at_most(scene: Scene, few: int) -> bool:
    pool = scene.pool(NAME)
    return max(int(pool["limit_bytes"]), int(pool["used_bytes"]) + int(pool["prealloc_bytes"])) <= few


async def _starved(scene: Scene, salt: str, enough: Callable[[], float]) -> float:
    """Seconds from `enough` (it returns when it was done) to the answer of a request that had to wait for it."""
    pool = scene.pool(NAME)
    async with client(scene.box.url, timeout_s=ANSWER_S) as api:
        asked = asyncio.create_task(ask(api, NAME, scene.options.wedge_tokens, 1, False, salt))
        done, _ = await asyncio.wait([asked], timeout=WAITS_S)
        if done:
            answer = asked.result()
            raise RuntimeError(f"it did not wait: {answer.error or 'answered'} after {answer.total_s:.2f}s; pool {pool}")
        at = await asyncio.to_thread(enough)
        answer = await asked
        return _checked(answer, time.monotonic() - at)


def _checked(answer: Answer, seconds: float) -> float:
    if answer.error:
        raise RuntimeError(f"not answered {seconds:.1f}s after the raise: {answer.error}")
    return seconds


def _empty_prefix_cache(scene: Scene) -> None:
    """What earlier parts left in it would hold the pool above two bundles."""
    socket = Path(scene.box.models()[NAME]["engine"]["socket"])
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(socket)), base_url="http://engine", timeout=10) as http:
        http.post("/reset_prefix_cache").raise_for_status()
