"""What the page shows, as JSON: a row a model, and each GPU's history. Made at most once a second, whoever looks on.

Times are seconds since the epoch, so that a row that does not change is the same row. A viewer who may not use all models sees no name
of another, also not in a reason.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from orchestrator.api import projections
from orchestrator.api.projections import Json
from orchestrator.control.counts import Counts
from orchestrator.control.history import History, Row
from orchestrator.control.reconciler import Reconciler, View
from orchestrator.control.registry import Registry
from orchestrator.policy.instance import State
from orchestrator.policy.stored import Event

EVENTS = 200  # what a page begins with
NAMELESS = "another model"
EVER = -1e9
Allows = Callable[[str], bool]


class Board:
    """`events`: model or None, how many -> the newest, oldest first."""

    def __init__(
        self,
        registry: Registry,
        reconciler: Reconciler,
        counts: Counts,
        history: History,
        events: Callable[[str | None, int], Awaitable[Sequence[Event]]],
    ) -> None:
        self._registry, self._loop, self._counts, self._events = registry, reconciler, counts, events
        self.history = history
        self._rows: dict[str, Json] = {}
        self._recent: Sequence[Event] = ()
        self._ticks = -1

    async def models(self) -> dict[str, Json]:
        """The same object until the loop has looked again."""
        view = self._loop.view
        if view is not None and view.ticks != self._ticks:
            self._ticks = view.ticks
            indexes = {uuid: gpu.index for uuid, gpu in view.snapshot.gpus.items()}
            self._rows = {name: self._row(name, view, indexes) for name in projections.names(self._registry.known(), view)}
            self._recent = await self._events(None, EVENTS)
        return self._rows

    def events_after(self, last: Event | None) -> list[Event]:
        """What happened since `last`; all that is kept in mind where that is none, or too long ago."""
        found = list(self._recent)
        return found[found.index(last) + 1 :] if last in found else [event for event in found if last is None or event.at >= last.at]

    def cards(self, allows: Allows, rows: Callable[[str], Iterable[Row]]) -> list[Json]:
        """`rows`: of a GPU's uuid."""
        shown = sorted(self.history.cards.items(), key=lambda item: item[1].index)
        return [
            {
                "uuid": uuid,
                "index": card.index,
                "name": card.name,
                "total_bytes": card.total_bytes,
                "runs": _runs(row.seen_by(allows) for row in rows(uuid)),
            }
            for uuid, card in shown
        ]

    def _row(self, name: str, view: View, indexes: dict[str, int]) -> Json:
        known, found, requests = self._registry.known().get(name), projections.instance(name, view), projections.traffic(name, view)
        launch = found.launch if found.state is not State.WAITING else None
        pool, seen = (view.plan.pools.get(launch.id), view.snapshot.engines.get(launch.id)) if launch else (None, None)
        used_at = max(requests.last_used or EVER, known.started_at if known else EVER)
        counted, boot = self._counts.models.get(name), self.history.boot
        return {
            "name": name,
            "source": known.spec.source if known else None,
            "state": found.state.value,
            "since": round(boot + found.since) if found.since else None,
            "reason": found.reason,
            "held": known.held if known else True,
            "pinned": known.spec.pinned if known else False,
            "adapters": sorted(known.spec.adapters) if known else [],
            "in_flight": requests.in_flight,
            "waiting": requests.waiting,
            "used_at": round(boot + used_at) if used_at > EVER else None,
            "gpus": sorted(indexes[uuid] for uuid in launch.gpus if uuid in indexes) if launch else [],
            "phase": seen.phase if seen and found.state is State.STARTING else None,
            "kv": {
                "used_bytes": seen.segment.mapped_bytes,
                "limit_bytes": pool.limit_bytes,
                "status": pool.status,
                "reason": pool.reason,
            }
            if pool and seen and seen.segment
            else None,
            "prompt_tokens": counted.prompt_tokens if counted else 0,
            "completion_tokens": counted.completion_tokens if counted else 0,
            "failure": found.failure.reason if found.failure else None,
        }


class Sight:
    """What one viewer has been told, and so need not be told again."""

    def __init__(self, board: Board, allows: Allows, sees_all: bool) -> None:
        self._board, self._allows, self._sees_all = board, allows, sees_all
        self._told: dict[str, Json] = {}
        self._last: Event | None = None
        self._at = board.history.latest

    async def news(self, now: float) -> Json:
        """Rows that changed, names that are gone, what happened, what each GPU's memory was used for since."""
        rows = await self._board.models()
        mask = self._mask(rows)
        seen = {name: row for name, row in rows.items() if self._allows(name)}
        changed = [mask(row) for name, row in seen.items() if self._told.get(name) != row]
        gone = [name for name in self._told if name not in seen]
        happened = self._board.events_after(self._last)
        self._told, self._last = seen, happened[-1] if happened else self._last
        since, self._at = self._at, self._board.history.latest
        return {
            "at": now,
            "models": changed,
            "gone": gone,
            "events": [
                mask({**projections.event(event), "model": event.model})
                for event in happened
                if self._sees_all or (event.model and self._allows(event.model))
            ],
            "gpus": self._board.cards(self._allows, lambda uuid: self._board.history.cards[uuid].since(since)),
        }

    def _mask(self, rows: Iterable[str]) -> Callable[[Json], Json]:
        """Reasons name other models."""
        hidden = [] if self._sees_all else sorted((name for name in rows if not self._allows(name)), key=len, reverse=True)
        if not hidden:
            return lambda row: row
        words = re.compile(r"(?<![\w.:/@+-])(?:" + "|".join(map(re.escape, hidden)) + r")(?![\w/@+-])")

        def masked(value: Any) -> Any:
            return words.sub(NAMELESS, value) if isinstance(value, str) else value

        return lambda row: {key: value if key in ("name", "model") else masked(value) for key, value in row.items()}


def _runs(rows: Iterable[Row]) -> list[Json]:
    """Rows with the same models together: {"models", "rows": [[at, MiB…]…]}."""
    found: list[Json] = []
    names: tuple[str, ...] | None = None
    for row in rows:
        if row.models != names:
            names = row.models
            found.append({"models": names, "rows": []})
        found[-1]["rows"].append([round(row.at, 1), *row.mib])
    return found
