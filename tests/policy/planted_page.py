"""docs/planted-bugs.md, as text: made from a whole run of planted.py, and from nothing else."""

from collections.abc import Mapping, Sequence

from tests.policy.planted_bugs import Bug
from tests.policy.planted_run import Seen

PAGE = "docs/planted-bugs.md"
HEAD = """# Planted bugs

Made by `make planted`, which plants one bug after the other in a copy of the allocator and runs its tests on it. It fails where a bug
survives. *Properties* are tried on random cases; the *simulation* runs random histories and stories against engines that obey as real
ones do, late; *examples* are tables. A rule that only examples hold is a choice, and its row says of what.
"""


def page(caught: Sequence[tuple[Bug, Mapping[str, Sequence[str]]]], sound: Sequence[Seen]) -> str:
    lines = [HEAD, "| bug | what it would do | caught by properties and simulation | caught by examples |", "|---|---|---|---|"]
    for bug, by in caught:
        random = in_words([*by["property"], *by["simulation"]]) or f"a choice: {bug.choice or '**not caught**'}"
        lines.append(f"| {bug.name} | {bug.harm} | {random} | {in_words(by['example']) or '-'} |")
    lines += ["", "## The properties", "", "Each with the number of random cases that it is tried on in `make test`.", ""]
    lines += ["| property | cases |", "|---|---|"]
    lines += [f"| `{one.test}` | {one.examples} |" for one in sound if one.examples is not None]
    lines += ["", f"And {sum(one.kind == 'simulation' and one.examples is None for one in sound)} stories of simulated engines, "]
    lines[-1] += f"{sum(one.kind == 'example' for one in sound)} tests of examples."
    return "\n".join(lines) + "\n"


def in_words(tests: Sequence[str]) -> str:
    """The first two, in words: all are in bench/results/planted-bugs.json."""
    words = [test.rpartition("::")[2] if "Simulation" not in test else "random histories" for test in tests]
    plain = [word.removeprefix("test_").replace("_", " ") for word in words]
    more = f", and {len(plain) - 2} more" if len(plain) > 2 else ""
    return "; ".join(plain[:2]) + more
