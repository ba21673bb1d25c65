"""A foreign process takes and gives back GPU memory while engines work: how soon do the limits fit what is left?

Measured from the moment the ballast has its memory to the first look at the segments and at NVML where the limits together are
no more than P. Nothing is asked of the daemon meanwhile but requests.
"""

import random
import time
from collections.abc import Callable, Sequence

from bench import plots
from bench.card import Row, Watch, write_rows
from bench.foreign import Foreign
from bench.gpu.closed_loop import Load
from bench.gpu.scene import GIB, Part, Scene, wait
from bench.results import percentile

WARM_S = 8.0  # until the clients' first answers are there and the limits lie where they will
FIT_S = 5.0  # limits that do not fit by then are a failure, and count as this
HOLD_S = 1.0
REGROW_S = 4.0
APART_S = (0.3, 1.0)  # after the limits have grown again: a grab right behind a look of the loop would always meet its whole interval
BEFORE_S, AFTER_S = 0.3, 1.0  # what the CSV and the picture show of each grab


def run(scene: Scene, budget_s: float) -> Part:
    options, part = scene.options, Part()
    names = list(scene.models)
    scene.up(names)
    began = time.monotonic()
    launches = scene.launches()
    taken: list[float] = []
    fits: list[float] = []
    back: list[float] = []
    above: list[float] = []
    bit = 0
    load = Load(scene.box.url, names, options.clients, options.scale)
    with scene.foreign() as ballast, load, scene.watch(names) as watch:
        if options.base_gib:
            ballast.take(int(options.base_gib * GIB))
        time.sleep(WARM_S)
        for number in range(options.grabs):
            if time.monotonic() - began > budget_s:
                part.notes["cut"] = f"after {number} grabs: {budget_s:.0f}s were over"
                break
            asked, at = _grab(scene, ballast, watch, int(options.grab_gib * GIB), number)
            taken.append(at)
            over = next((row.at for row in watch.rows if asked <= row.at <= at + FIT_S and not row.fits), None)
            above.append(0.0 if over is None else _seconds_until(watch.rows, max(over, at), lambda row: row.fits) + max(0.0, at - over))
            fits.append(_seconds_until(watch.rows, at, lambda row: row.fits))
            back.append(_seconds_until(watch.rows, at, lambda row: row.free >= row.reserve))
            first = next((row for row in watch.rows if row.at >= at), None)
            before = next((row for row in reversed(watch.rows) if row.at < at - HOLD_S / 4), None)
            bit += bool(first and (not first.fits or (before and first.limit < before.limit)))
        scene.say("grabs over")
        ballast.give_all()
    deaths = scene.deaths(launches)
    part.figures = {
        "grabs": len(fits),
        "grabs_that_forced_a_shrink": bit,
        "grab_limits_fit_p50_s": percentile(fits, 0.5),
        "grab_limits_fit_p99_s": percentile(fits, 0.99),
        "grab_limits_fit_max_s": max(fits),
        "grab_limits_above_pool_p99_s": percentile(above, 0.99),  # NVML shows the memory gone before the ballast says so
        "grab_reserve_free_again_max_s": max(back),
        "grab_least_free_gib": min(row.free for row in watch.rows) / GIB,
        "limits_above_pool_percent": 100 * sum(not row.fits for row in watch.rows) / len(watch.rows),
        "watch_hz": watch.hz(),
        "watch_widest_gap_s": watch.widest_gap_s(),
        "grab_requests": load.said.get("requests", 0),
        "failed_requests": load.said.get("failed", 0),
        "dead_engines": len(deaths),
    }
    part.notes |= {"load": load.said, "deaths": deaths, "fit_s": fits, "watch_failed": watch.failed[:3]}
    part.passed = {
        "every grab was made": len(fits) == options.grabs,
        "the limits fitted after every grab": max(fits) < FIT_S,
        "no request failed while others grabbed memory": part.figures["failed_requests"] == 0 and part.figures["grab_requests"] > 0,
        "no engine died while others grabbed memory": not deaths,
        "the segments were read at 50 Hz": watch.hz() >= 50,
    }
    _write(scene, watch, taken, names)
    return part


def _grab(scene: Scene, ballast: Foreign, watch: Watch, size: int, number: int) -> tuple[float, float]:
    """Takes, waits until the limits fit and then a while, gives back, waits until they have grown again.

    Returns when it was asked for, and when it was taken.
    """
    scene.say(f"grab {number + 1}")
    time.sleep(random.Random(number).uniform(*APART_S))
    asked = time.monotonic()
    at = ballast.take(size)
    wait(lambda: any(row.at >= at and row.fits for row in watch.rows[-100:]), FIT_S, 0.02)
    time.sleep(HOLD_S)
    given = ballast.give(size)
    wait(lambda: time.monotonic() > given + 0.5 and watch.rows[-1].limit >= watch.rows[-1].pool - size / 4, REGROW_S)
    return asked, at


def _seconds_until(rows: Sequence[Row], at: float, holds: Callable[[Row], bool]) -> float:
    for row in rows:
        if row.at >= at and holds(row):
            return min(FIT_S, row.at - at)
    return FIT_S


def _write(scene: Scene, watch: Watch, taken: Sequence[float], names: Sequence[str]) -> None:
    shown = [row for row in watch.rows if any(-BEFORE_S <= row.at - at <= AFTER_S for at in taken)]
    if not shown:
        return
    write_rows(shown, watch.rows[0].at, scene.out / "gpu-budgets.grabs.csv")
    title = f"{scene.options.grab_gib:g} GiB taken by somebody else, {len(taken)} times, with {len(names)} engines at work"
    plots.grabs(shown, taken, BEFORE_S, AFTER_S, title, scene.out / "gpu-budgets.grabs.png")
