"""What goes wrong when, drawn from a seed before anything runs: so a seed is replayed by its number.

Which engine is hit depends on who lives at that moment: `which` picks among them.
"""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

GAP_S = 1.6  # between two faults, on average
FIRST_S = 2.0

FAULTS: Mapping[str, tuple[float, str]] = {
    # name: how often, and what it is
    "kill-api": (2, "SIGKILL of an engine's API server alone"),
    "kill-core": (2, "SIGKILL of an EngineCore alone"),
    "kill-engine": (2, "SIGKILL of an engine's whole session"),
    "stop-api": (1.5, "SIGSTOP, later SIGCONT of an API server"),
    "stop-core": (1.5, "SIGSTOP, later SIGCONT of an EngineCore"),
    "stop-engine": (0.7, "SIGSTOP, later SIGCONT of a whole session"),
    "hang": (1.5, "an EngineCore makes no tokens and answers no call, /health stays 200; later it goes on"),
    "die-later": (1, "an EngineCore dies while the next request is answered"),
    "errors-500": (0.7, "an engine answers 500 for a while"),
    "slow": (0.7, "an engine takes five times as long for a token"),
    "deaf": (0.7, "an engine ignores SIGTERM"),
    "orphan": (0.7, "SIGTERM leaves an engine's EngineCore behind"),
    "bad-wake": (0.7, "an engine can not wake: out of memory"),
    "bad-sleep": (0.5, "an engine loses its weights when it is put to sleep"),
    "kill-launch-server": (1, "SIGKILL of the launch server"),
    "stop-launch-server": (0.7, "SIGSTOP, later SIGCONT of the launch server"),
    "kill-daemon": (1.2, "SIGKILL of the daemon, and a new one"),
    "stop-daemon": (1, "SIGSTOP, later SIGCONT of the daemon"),
    "end-daemon": (0.5, "SIGTERM of the daemon, and a new one"),
    "restart-daemon": (0.7, "the daemon told to start again and keep its engines"),
    "zero-segment": (1, "24 zero bytes in an engine's segment"),
    "delete-segment": (1, "an engine's segment removed"),
    "cut-segment": (1, "an engine's segment cut to 8 bytes or none"),
    "starve": (1, "an engine's limit set to one bundle by somebody else"),
    "grab": (3, "a foreign process takes up to nine tenths of what is free on a card, and gives it back later"),
    "fill-disk": (0.8, "the state folder's file system full for a while"),
    "reload": (1.5, "the config file changed and reloaded: models added, changed, removed"),
    "bad-reload": (0.7, "the config file made wrong and reloaded: refused, nothing is changed"),
}


@dataclass(frozen=True)
class Step:
    """`which` and `how`, 0 to 1: choices among what there is then. `for_s`: until it is undone, where it can be."""

    at_s: float
    fault: str
    which: float
    how: float
    for_s: float

    def __str__(self) -> str:
        return f"{self.at_s:7.2f}s {self.fault} (which {self.which:.2f}, how {self.how:.2f}, for {self.for_s:.1f}s)"


def drawn(seed: int, seconds: float, without: Collection[str] = (), gap_s: float = GAP_S) -> list[Step]:
    """The steps of a seed. The same for all lengths, up to the shorter one; those left out leave the others where they are."""
    dice, steps = random.Random(seed), list[Step]()
    names, weights = list(FAULTS), [often for often, _ in FAULTS.values()]
    at = FIRST_S
    while True:
        at += dice.expovariate(1 / gap_s)
        step = Step(at, dice.choices(names, weights)[0], dice.random(), dice.random(), 0.3 + min(dice.expovariate(1 / 2.0), 6.0))
        if at >= seconds:
            return steps
        if step.fault not in without:
            steps.append(step)
