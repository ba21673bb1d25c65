"""chaos: a daemon with simulated engines under clients and an operator, while by a seed's schedule everything around it goes wrong.

Invariants are checked all the time and at the end: no answer of a wrong model, none lost without an error, none that hangs, limits within
the card, no orphan, registrations as commanded, no fault of the daemon's own, and everything heals when the faults stop. Each violation
is printed with its seed, its time, the steps before it, and the command that replays it.
"""

import argparse
import asyncio
import functools
import multiprocessing
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import results
from bench.chaos.daemon_faults import RELOADS
from bench.chaos.run import Outcome, one
from bench.chaos.schedule import FAULTS, GAP_S

MINUTES = 2.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", default="1-3", help="several: 1-20 or 3,7,9")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of faults for each seed")
    parser.add_argument("--gap", type=float, default=GAP_S, help="seconds between two faults, on average")
    parser.add_argument("--without", default="", help="faults to leave out, by name, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="how many seeds at once, each with a daemon of its own")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results, and for the logs of a violation")
    options = parser.parse_args(argv)
    seeds = [options.seed] if options.seed is not None else _numbers(options.seeds)
    without = {name for name in options.without.split(",") if name}
    if unknown := without - FAULTS.keys():
        parser.error(f"--without: there is no {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    if not RELOADS:
        print("left out: reload, bad-reload, restart-daemon: this orchestratord has none of them")
        without |= {"reload", "bad-reload", "restart-daemon"}
    print("left out: the NVML process: simulated GPUs have none")
    run = functools.partial(_run, minutes=options.minutes, without=without, gap_s=options.gap, kept=options.out)
    outcomes = list[Outcome]()
    with multiprocessing.Pool(options.jobs, maxtasksperchild=1) as pool:  # which ends its workers with it, and they what they started
        for outcome in pool.imap(run, seeds):
            outcomes.append(outcome)
            _show(outcome)
    figures = figures_of(outcomes)
    path = results.write("chaos", results.typed("chaos", argv), figures, notes_of(outcomes, without), "simulated", folder=options.out)
    for key, value in figures.items():
        print(f"{key:24} {value:10.2f}")
    print(path)
    return 1 if figures["violations"] else 0


def _run(seed: int, minutes: float, without: Collection[str], gap_s: float, kept: Path) -> Outcome:
    return asyncio.run(one(seed, minutes, without, gap_s, kept))


# ---- what came of it --------------------------------------------------------------------------------------------------


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    total: Counter[str] = sum((o.fates for o in outcomes), Counter())
    back = [each for o in outcomes for each in o.back_s]
    return {
        "seeds": len(outcomes),
        "minutes": sum(o.minutes for o in outcomes),
        "violations": sum(len(o.violations) for o in outcomes),
        "faults": sum(sum(o.faults.values()) for o in outcomes),
        "requests": sum(total.values()),
        "answered": sum(count for words, count in total.items() if words.startswith("answered")),
        "commands": sum(sum(o.commands.values()) for o in outcomes),
        "heal_most_s": max(o.heal_s for o in outcomes),
        "limits_over_most_s": max(o.over_s for o in outcomes),
        **({"daemon_back_most_s": max(back)} if back else {}),
    }


def notes_of(outcomes: Sequence[Outcome], without: Collection[str]) -> dict[str, Any]:
    def summed(several: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return dict(sorted(sum((Counter(each) for each in several), Counter[str]()).items()))

    return {
        "faults": {name: {"what": FAULTS[name][1], "done": count} for name, count in summed([o.faults for o in outcomes]).items()},
        "skipped": summed([o.skipped for o in outcomes]),
        "left_out": [*sorted(without), "the NVML process: simulated GPUs have none"],
        "fates": summed([o.fates for o in outcomes]),
        "commands": summed([o.commands for o in outcomes]),
        "starts_refused_by_a_full_disk": sum(o.starts_refused for o in outcomes),
        "looks": {
            "in all": sum(o.looks[0] for o in outcomes),
            "pools seen": sum(o.looks[1] for o in outcomes),
            "limits above a card, for a moment": sum(o.looks[2] for o in outcomes),
        },
        "cancelled_reads_that_anyio_logs": sum(o.noise for o in outcomes),
        "started_by_hand": sum(o.restarted_by_hand for o in outcomes),
        "healed": sum(o.healed for o in outcomes),
        "seeds": [o.seed for o in outcomes],
        "violations": [asdict(violation) for o in outcomes for violation in o.violations],
    }


def _show(outcome: Outcome) -> None:
    answered = outcome.fates.get("answered 200", 0)
    print(
        f"seed {outcome.seed}: {outcome.minutes:g} minutes, {sum(outcome.faults.values())} faults, {sum(outcome.fates.values())} requests"
        f" ({answered} answered), {sum(outcome.commands.values())} commands, healed in {outcome.heal_s:.1f} s,"
        f" {len(outcome.violations)} violations",
        flush=True,
    )


def _numbers(text: str) -> list[int]:
    """1-3,7 -> 1 2 3 7."""
    found = list[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
