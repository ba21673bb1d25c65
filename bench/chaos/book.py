"""What was commanded and what was done to whom: by it each request's fate is judged, and what is registered is compared.

A name was *surely* a model's from the answer of what made it so to the next command against it; *possibly* from the asking on to the
answer. A bad end must have a cause within REACH_S, a 404 or a refusal for being stopped a moment at which it may have been true.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.chaos.asking import Fate

REACH_S = 20.0  # an engine that was hurt is found, ended, and its successor ready within this long
GRACE_S = 1.0  # of clocks and of what is under way


@dataclass
class Span:
    """Possible in [maybe_from, maybe_to], sure in [sure_from, sure_to]."""

    model: str
    maybe_from: float
    sure_from: float = math.inf
    sure_to: float = math.inf
    maybe_to: float = math.inf

    def maybe(self, began: float, ended: float) -> bool:
        return self.maybe_from <= ended and began <= self.maybe_to + GRACE_S

    def sure(self, began: float, ended: float) -> bool:
        return self.sure_from <= began and ended <= self.sure_to


@dataclass
class Harm:
    """`model`: None for all of them."""

    model: str | None
    what: str
    began: float
    ended: float = math.inf


@dataclass
class Entry:
    """A model as it was commanded; None: not known, for the command's answer was lost."""

    held: bool | None = False
    pinned: bool | None = None
    weight: float | None = None
    unsure: set[str] = field(default_factory=set)


class Book:
    def __init__(self) -> None:
        self.names: dict[str, list[Span]] = {}  # what users write -> whose it was
        self.holds: dict[str, list[Span]] = {}
        self.keys: dict[str, list[Span]] = {}
        self.harms: list[Harm] = []
        self.models: dict[str, Entry] = {}  # those that must be there
        self.unsure: set[str] = set()  # those of which nobody knows
        self.fates: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()

    # ---- what was done --------------------------------------------------------------------------------------------

    def harm(self, model: str | None, what: str) -> Harm:
        """From now on; over REACH_S after its `ended` is set."""
        self.harms.append(harm := Harm(model, what, time.monotonic()))
        return harm

    def hurt(self, model: str | None, what: str) -> None:
        self.harm(model, what).ended = time.monotonic()

    def why(self, model: str | None, began: float, ended: float, reach_s: float = REACH_S) -> str | None:
        """What may have hurt that model, if anything did."""
        for harm in self.harms:
            if harm.model in (None, model) and harm.began <= ended + GRACE_S and began <= harm.ended + reach_s:
                return harm.what
        return None

    # ---- judging --------------------------------------------------------------------------------------------------

    def judge(self, fate: Fate, down: bool) -> str | None:
        """What is wrong with it, or None. `down`: the daemon was away, or going, at that time."""
        self.fates[fate.words] += 1
        name, began, ended = fate.ask.model, fate.began, fate.ended
        spans = [span for span in self.names.get(name, ()) if span.maybe(began, ended)]
        models = {span.model for span in spans}
        told = f"{name}: {fate.words}: {fate.detail} (asked {fate.ask}, took {ended - began:.1f}s)"
        if not fate.by <= models:
            return f"answered by the wrong model: {sorted(fate.by)}, not {sorted(models)}; {told}"
        hurt = next((why for model in models or {name} if (why := self.why(model, began, ended))), None)
        match fate.how:
            case "answered" | "left":
                return None
            case "hung":
                return f"no answer and no error in time; {told}"
            case "wrong":
                return f"an answer that is not whole, without an error; {told}"
            case "unreachable" | "cut":
                return None if down or (hurt and fate.how == "cut") else f"lost without an error; {told}"
            case "event":
                return None if hurt or down else f"an error that nothing explains; {told}"
        return self._refused(fate, spans, hurt, down, told)

    def _refused(self, fate: Fate, spans: list[Span], hurt: str | None, down: bool, told: str) -> str | None:
        began, ended = fate.began, fate.ended
        held = any(span.maybe(began, ended) for each in spans for span in self.holds.get(each.model, ()))
        match fate.status, fate.code:
            case 404, "model_not_found":
                good = not any(span.sure(began, ended) for span in spans)
            case 401, "invalid_api_key":
                key = fate.ask.key or ""
                good = not any(span.sure(began, ended) for span in self.keys.get(key, ()))
            case 503, "model_stopped":
                good = held or not all(span.sure(began, ended) for span in spans)
            case 503, "shutting_down":
                good = down
            case 503, "model_failed":
                good = any(harm.model in (None, *(span.model for span in spans)) for harm in self.harms)
            case 502, "engine_error":
                good = bool(hurt or down or held) or not all(span.sure(began, ended) for span in spans)
            case 500, "500":  # the engine's own
                good = bool(hurt)
            case (503, "timeout" | "not_ready_in_time" | "model_unavailable") | (429, "queue_full"):
                good = True
            case _:
                good = False
        return None if good else f"a refusal that is not true, or of no known kind; {told}"

    # ---- what must be there ---------------------------------------------------------------------------------------

    def compare(self, shown: dict[str, Any]) -> list[str]:
        """What is registered otherwise than it was commanded."""
        wrong = []
        there = {name: model for name, model in shown.items() if model["owner"] != "removed"}
        for name, entry in self.models.items():
            model = there.get(name)
            if model is None:
                if name not in self.unsure:
                    wrong.append(f"{name} was added, and is not there")
                continue
            found = {"held": model["held"], "pinned": model["overrides"].get("pinned"), "weight": model["overrides"].get("kv_weight")}
            wanted = {"held": entry.held, "pinned": entry.pinned, "weight": entry.weight}
            for field_name in found.keys() - entry.unsure:
                if found[field_name] != wanted[field_name]:
                    wrong.append(f"{name}: {field_name} is {found[field_name]}, commanded was {wanted[field_name]}")
        strangers = there.keys() - self.models.keys() - self.unsure
        return wrong + [f"{name} was removed, or never added, and is there" for name in sorted(strangers)]
