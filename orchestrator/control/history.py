"""What each GPU's memory was used for, kept in memory: half an hour finely, a day coarsely. For pictures, never for decisions.

Its size has a bound whatever happens: so many rows a card, in each so many models by name, the rest of them together. A row is MiB in
one flat array, and rows with the same engines share their names.
"""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.control.reconciler import View
from orchestrator.policy import explain
from orchestrator.policy.units import MIB

FINE_S, FINE_FOR_S = 2.0, 1800.0
COARSE_S, COARSE_FOR_S = 30.0, 86_400.0
NAMED = 40  # models by name in a row, the largest; a chart shows no more bands
OTHERS = ""  # the name of the rest
EARLY_S = 0.1  # looks are not made on the dot


@dataclass(frozen=True, slots=True)
class Row:
    """`at`: seconds since the epoch. `mib`: reserve, foreign, claims; then of each model what is fixed, its KV, its limit."""

    at: float
    models: tuple[str, ...]
    mib: "array[int]"

    @property
    def used(self) -> int:
        return sum(self.mib) - sum(self.mib[5::3])

    def seen_by(self, allows: Callable[[str], bool]) -> "Row":
        """The models that are not allowed are the rest."""
        hidden = [name == OTHERS or not allows(name) for name in self.models]
        if not any(hidden):
            return self
        shown, rest = array("I", self.mib[:3]), [0, 0, 0]
        for at, hide in enumerate(hidden):
            three = self.mib[3 + 3 * at : 6 + 3 * at]
            if hide:
                rest = [one + more for one, more in zip(rest, three, strict=True)]
            else:
                shown.extend(three)
        shown.extend(rest)
        return Row(self.at, (*(name for name, hide in zip(self.models, hidden, strict=True) if not hide), OTHERS), shown)


@dataclass(slots=True)
class Card:
    """One GPU's. `coarse` has the fullest look of each half minute."""

    index: int
    name: str
    total_bytes: int
    fine: deque[Row] = field(default_factory=lambda: deque(maxlen=int(FINE_FOR_S / FINE_S)))
    coarse: deque[Row] = field(default_factory=lambda: deque(maxlen=int(COARSE_FOR_S / COARSE_S)))
    fullest: Row | None = None
    began: float = 0.0

    def add(self, row: Row) -> None:
        self.fine.append(row)
        if self.fullest is not None and row.at - self.began >= COARSE_S - EARLY_S:
            self.coarse.append(self.fullest)
            self.fullest = None
        if self.fullest is None:
            self.began, self.fullest = row.at, row
        elif row.used > self.fullest.used:
            self.fullest = row

    def rows(self, span_s: float, now: float) -> list[Row]:
        """Of the last `span_s`: the fine ones where they reach so far back."""
        if span_s <= FINE_FOR_S:
            return [row for row in self.fine if row.at > now - span_s]
        return [row for row in (*self.coarse, *((self.fullest,) if self.fullest else ())) if row.at > now - span_s]

    def since(self, at: float) -> list[Row]:
        """The fine ones after that."""
        found: list[Row] = []
        for row in reversed(self.fine):
            if row.at <= at:
                break
            found.append(row)
        return found[::-1]


class History:
    """`boot`: the wall's clock less the loop's."""

    def __init__(self, boot: float) -> None:
        self.boot, self.cards = boot, dict[str, Card]()
        self._at = 0.0

    @property
    def latest(self) -> float:
        """When the newest rows were made, by the wall."""
        return self.boot + self._at

    def look(self, view: View) -> None:
        """After each look of the loop; most of them are passed over."""
        now = view.snapshot.now
        if now - self._at < FINE_S - EARLY_S:
            return
        self._at = now
        for uuid, gpu in view.snapshot.gpus.items():
            card = self.cards.get(uuid)
            if card is None or card.total_bytes != gpu.total_bytes:
                card = self.cards[uuid] = Card(gpu.index, gpu.name, gpu.total_bytes)
            card.add(_row(uuid, view, self.boot + now, card.fine[-1].models if card.fine else ()))


def _row(uuid: str, view: View, at: float, before: tuple[str, ...]) -> Row:
    """The lines of `explain`, added up, and the limits."""
    whole = {"reserve": 0, "foreign": 0, "claim": 0}
    models: dict[str, list[int]] = {}
    for line in explain.lines(uuid, view.snapshot, view.plan):
        if line.what in whole:
            whole[line.what] += line.bytes
        elif line.model is not None:
            models.setdefault(line.model, [0, 0, 0])[line.what == "kv"] += line.bytes
    for name, three in models.items():
        launch = view.plan.instances[name].launch
        if launch is not None and (pool := view.plan.pools.get(launch.id)) is not None:
            three[2] = pool.limit_bytes
    if len(models) > NAMED:
        models = _largest(models)
    names = tuple(models)
    mib = array("I", [max(0, whole[what]) // MIB for what in ("reserve", "foreign", "claim")])
    mib.extend(max(0, size) // MIB for three in models.values() for size in three)
    return Row(at, before if before == names else names, mib)


def _largest(models: dict[str, list[int]]) -> dict[str, list[int]]:
    """Still by name."""
    ranked: Sequence[str] = sorted(models, key=lambda name: -(models[name][0] + models[name][1]))
    named = set(ranked[:NAMED])
    found = {name: three for name, three in models.items() if name in named}
    found[OTHERS] = [sum(models[name][at] for name in ranked[NAMED:]) for at in range(3)]
    return found
