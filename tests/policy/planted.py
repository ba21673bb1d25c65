"""`make planted`: plants one bug after the other in a copy of the allocator, and shows which tests catch it.

    python -m tests.policy.planted            all of them; writes bench/results/planted-bugs.json and docs/planted-bugs.md
    python -m tests.policy.planted ceiling    those whose name has the word; writes nothing

The rule that keeps it right: it fails where a bug survives, where no property and no simulated engine catches one that is no
matter of choice, where a text to change is not there exactly once, and where a test fails without any bug.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import results
from tests.policy.planted_bugs import BUGS, Bug
from tests.policy.planted_page import PAGE, page
from tests.policy.planted_run import ROOT, Misplanted, Seen, copy, planted, run

KINDS = ("property", "simulation", "example")


@dataclass(frozen=True)
class Caught:
    """Which tests failed with one bug in the code."""

    bug: Bug
    seen: Sequence[Seen]

    def by(self, *kinds: str) -> list[str]:
        return [one.test for one in self.seen if one.failed and one.kind in kinds]

    @property
    def wrong(self) -> str | None:
        if not self.by(*KINDS):
            return "no test catches it"
        if not self.bug.choice and not self.by("property", "simulation"):
            return "examples alone catch it: it needs a property, or a word on why it is a choice"
        return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.policy.planted", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="plant only bugs whose name has one of these; nothing is written")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if not options.words or any(word in bug.name for word in options.words)]
    began = time.monotonic()
    try:
        sound, caught = _plant(bugs, options.jobs)
    except Misplanted as error:
        print(error, file=sys.stderr)
        return 1
    faults = [f"{one.bug.name}: {one.wrong}" for one in caught if one.wrong]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(caught) - len(faults)} of {len(caught)} bugs are caught")
    if not options.words:
        figures = {**_figures(sound, caught), "bugs_survived": len(faults), "minutes": (time.monotonic() - began) / 60}
        notes = {one.bug.name: {**{kind: one.by(kind) for kind in KINDS}, "choice": one.bug.choice} for one in caught}
        print(
            results.write("planted-bugs", "python -m tests.policy.planted", figures, notes, "none", ("hypothesis", "pytest"), options.out)
        )
        (ROOT / PAGE).write_text(page([(one.bug, {kind: one.by(kind) for kind in KINDS}) for one in caught], sound))
        print(ROOT / PAGE)
    return 1 if faults else 0


def _plant(bugs: Sequence[Bug], jobs: int) -> tuple[Sequence[Seen], list[Caught]]:
    """How the tests end without a bug, and with each. Prints a line for each bug, in the order of the table."""
    caught = []
    with tempfile.TemporaryDirectory(prefix="planted-") as name, ThreadPoolExecutor(max(1, jobs)) as pool:
        folder = Path(name)
        copy(folder / "original")
        for bug in bugs:
            planted(bug, folder / "original")
        sound = run(None, folder / "original", folder / "sound")
        if failed := [one.test for one in sound if one.failed]:
            raise Misplanted(f"without any bug these fail: {', '.join(failed)}")
        print(f"{'bug':55} {'properties':>10} {'simulation':>10} {'examples':>10}", flush=True)
        runs = [pool.submit(run, bug, folder / "original", folder / str(number)) for number, bug in enumerate(bugs)]
        try:
            for bug, one in zip(bugs, runs, strict=True):
                caught.append(Caught(bug, one.result()))
                counts = " ".join(f"{len(caught[-1].by(kind)) or '-':>10}" for kind in KINDS)
                print(f"{bug.name:55} {counts}{'   ' + caught[-1].wrong if caught[-1].wrong else ''}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return sound, caught


def _figures(sound: Sequence[Seen], caught: Sequence[Caught]) -> dict[str, float]:
    return {
        "bugs": len(caught),
        "caught_by_properties": sum(bool(one.by("property")) for one in caught),
        "caught_by_simulation": sum(bool(one.by("simulation")) for one in caught),
        "caught_by_properties_or_simulation": sum(bool(one.by("property", "simulation")) for one in caught),
        "caught_by_examples": sum(bool(one.by("example")) for one in caught),
        "properties": sum(one.examples is not None for one in sound),
        "examples_of_properties": sum(one.examples or 0 for one in sound),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
