"""`python -m tests.fuzz [all|raw|answers|schema] --minutes 10 --seed 1`: fuzzes the running daemon for so long, and prints what it counted.

Exit status 1 where anything was wrong: each such case with its seed and number, which `--only` sends again, alone.
"""

import argparse
import asyncio
import itertools
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import schema
from tests.fuzz.answers import say_all
from tests.fuzz.ground import GROWTH_BYTES, Ground, ground
from tests.fuzz.raw import Counts, Wrong, send, send_all
from tests.fuzz.requests import case

ROUND = 2500


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("what", choices=["all", "raw", "answers", "schema"], default="all", nargs="?")
    given.add_argument("--minutes", type=float, default=10)
    given.add_argument("--seed", type=int, default=int(time.time()))
    given.add_argument("--only", type=int)
    asked = given.parse_args()
    parts = ["answers", "raw", "schema"] if asked.what == "all" else [asked.what]
    seconds = asked.minutes * 60 / len(parts)
    print(f"seed {asked.seed}, {seconds:.0f} s each: {', '.join(parts)}", flush=True)
    wrong: list[str] = []
    if "answers" in parts:
        wrong += _answers(asked.seed, seconds)
    if asked.what != "answers":
        with ground() as at:
            if asked.only is not None:
                return _only(at, asked.seed, asked.only)
            if "raw" in parts:
                wrong += _raw(at, asked.seed, seconds)
            if "schema" in parts:
                wrong += _schema(at, asked.seed, seconds)
    print("\n".join(wrong) or "nothing was wrong")
    return 1 if wrong else 0


def _answers(seed: int, seconds: float) -> list[str]:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of each answer that was cut it says so
    counts, end = Counts(), time.monotonic() + seconds
    for first in itertools.count(0, ROUND):
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-") as folder:
            asyncio.run(say_all(Path(folder), seed, range(first, first + ROUND), counts))
        if time.monotonic() > end or counts.wrong:
            break
    _show("answers of engines", counts)
    return counts.wrong


def _raw(at: Ground, seed: int, seconds: float) -> list[str]:
    counts, end, before = Counts(), time.monotonic() + seconds, 0
    for first in itertools.count(0, ROUND):
        asyncio.run(send_all(at.address, at.model, seed, range(first, first + ROUND), counts))
        at.until_at_rest()
        before = before or at.rss_bytes
        if time.monotonic() > end or counts.wrong:
            break
    _show("requests", counts)
    return counts.wrong + _grown(at, before)


def _schema(at: Ground, seed: int, seconds: float) -> list[str]:
    _, said = schema.run(at, seed, 3)
    before = at.rss_bytes
    cases, said_later = (0, "") if said else schema.run(at, seed, 100_000, max(1, int(seconds)))
    print(f"Schemathesis: {cases} cases")
    at.until_at_rest()
    return [one for one in (said, said_later) if one] + _grown(at, before)


def _grown(at: Ground, before: int) -> list[str]:
    grown = at.rss_bytes - before
    print(f"  at rest nothing is held; memory {at.rss_bytes >> 20} MiB, grown by {grown / (1 << 20):.1f} MiB since the first round")
    return [f"memory has grown by {grown >> 20} MiB"] if grown > GROWTH_BYTES else []


def _only(at: Ground, seed: int, number: int) -> int:
    one = case(seed, number, at.model)
    print(one)
    try:
        print(asyncio.run(send(at.address, one)))
    except Wrong as wrong:
        print(wrong)
    at.until_at_rest()
    return 0


def _show(what: str, counts: Counts) -> None:
    print(f"{what}: {counts.cases} cases, {len(counts.wrong)} wrong")
    for title, found in (("  what became of them", counts.by_mutation), ("  what was answered", counts.by_outcome)):
        print(f"{title}: {', '.join(f'{name} {count}' for name, count in found.most_common())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
