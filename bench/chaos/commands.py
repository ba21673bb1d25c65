"""An operator who commands at random, and keeps the book: what was answered 2xx is so, what was refused is not, and what was lost may be.

Also keys: a client's key is made and revoked while clients use it.
"""

import asyncio
import math
import random
import time
from typing import Any

from bench.chaos.book import Book, Entry, Span
from bench.chaos.daemon import Daemon
from bench.chaos.http import Broken, call

PAUSE_S = 0.7
ANSWER_S = 40.0  # a held daemon is held for 7 s
ADDED = ("a-0", "a-1", "a-2", "a-3", "a-4")
BIG = ("a-3", "a-4")
KEYS = ("k-0", "k-1")
SHARED = "shared"  # an alias that goes from model to model
REFUSALS = {400, 404, 409, 422, 503}
VERBS = ("load", "unload", "sleep", "wake", "drain", "start", "start", "start", "stop", "pin", "unpin")  # who is stopped is hit by nothing


class Operator:
    """`fixed`: the models of the config file. `turn`: while it is held nothing is commanded."""

    def __init__(self, daemon: Daemon, book: Book, seed: int, fixed: list[str]) -> None:
        self._daemon, self._book, self._dice, self._fixed = daemon, book, random.Random(seed * 7919 + 1), fixed
        self.secrets: dict[str, str] = {}  # of keys, the newest of each
        self.problems: list[str] = []
        self.turn = asyncio.Lock()

    def name(self, role: str) -> str:
        return f"{self._daemon.prefix}-{role}"

    async def run(self, ends: float) -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(self._dice.expovariate(1 / PAUSE_S))
            async with self.turn:
                await self._command()

    async def _command(self) -> None:
        kind = self._dice.random()
        if kind < 0.16:
            await self.add(self._dice.choice(ADDED))
        elif kind < 0.28:
            await self.remove(self.name(self._dice.choice(ADDED)))
        elif kind < 0.38:
            await self.weigh(self._someone(), self._dice.choice([None, 0.5, 2.0, 4.0]))
        elif kind < 0.44:
            await self.key(self._dice.choice(KEYS))
        else:
            await self.tell(self._someone(), self._dice.choice(VERBS))

    def _someone(self) -> str:
        return self._dice.choice([*self._fixed, *map(self.name, ADDED)])

    async def send(self, method: str, path: str, body: Any = None) -> tuple[int | None, Any]:
        """None: the answer was lost."""
        try:
            status, answer = await call(self._daemon.admin, method, f"/api/v1{path}", body, ANSWER_S)
        except Broken:
            status, answer = None, None
        except TimeoutError:
            status, answer = None, None
            self.problems.append(f"{method} {path} was not answered within {ANSWER_S:.0f} s")
        what = path.rpartition("/")[2] if path.count("/") > 2 else {"POST": "add", "DELETE": "remove"}.get(method, "")
        self._book.commands[f"{what if '-' not in what else method} {status or 'lost'}"] += 1
        if status is not None and status >= 400 and status not in REFUSALS:
            self.problems.append(f"{method} {path}: {status} {answer}")
        return status, answer

    # ---- models ---------------------------------------------------------------------------------------------------

    async def add(self, role: str) -> None:
        name, began = self.name(role), time.monotonic()
        aliases = [self.name(SHARED)] if self._dice.random() < 0.4 else []
        source = self._daemon.large if role in BIG else self._daemon.tiny
        times = {"sleep_timeout": self._dice.choice([2, 10, None]), "idle_timeout": self._dice.choice([6, 30, None]), "min_residency": 0}
        spans = [Span(name, began) for _ in (name, *aliases)]
        for each, span in zip((name, *aliases), spans, strict=True):
            self._book.names.setdefault(each, []).append(span)
        new = name not in self._book.models
        if new:
            self._book.unsure.add(name)
        status, _ = await self.send("POST", "/models", {"name": name, "source": str(source), "aliases": aliases, **times})
        now = time.monotonic()
        if status == 201:
            self._book.models[name] = Entry()
            self._book.unsure.discard(name)
            for span in spans:
                span.sure_from = now
        elif status is not None:
            if new:
                self._book.unsure.discard(name)
            for span in spans:
                span.maybe_to = now

    async def remove(self, name: str) -> None:
        spans = [span for several in self._book.names.values() for span in several if span.model == name and span.maybe_to == math.inf]
        before, began = [span.sure_to for span in spans], time.monotonic()
        for span in spans:
            span.sure_to = min(span.sure_to, began)
        known = name in self._book.models
        self._book.unsure.add(name)
        status, _ = await self.send("DELETE", f"/models/{name}")
        if status == 202 or status == 404:
            if status == 404 and known:
                self.problems.append(f"{name} was added, and `rm` does not find it")
            self._book.models.pop(name, None)
            self._book.unsure.discard(name)
            for span in [*spans, *(s for s in self._book.holds.get(name, ()) if s.maybe_to == math.inf)]:
                span.maybe_to = time.monotonic()
            self._book.hurt(name, "removed")
        elif status is not None:
            if known:
                self._book.unsure.discard(name)
            for span, sure_to in zip(spans, before, strict=True):
                span.sure_to = sure_to
        else:
            self._book.hurt(name, "perhaps removed")

    async def tell(self, name: str, verb: str) -> None:
        if verb == "stop":
            self._book.holds.setdefault(name, []).append(Span(name, time.monotonic()))
            self._book.hurt(name, "stopped by an operator: its requests are cut after the drain time")
        change = {"start": ("held", False), "stop": ("held", True), "pin": ("pinned", True), "unpin": ("pinned", None)}.get(verb)
        status = await self._changing(name, "POST", f"/models/{name}/{verb}", None, change)
        if verb == "start" and status == 202:
            for span in self._book.holds.get(name, ()):
                span.maybe_to = min(span.maybe_to, time.monotonic())

    async def weigh(self, name: str, weight: float | None) -> None:
        await self._changing(name, "POST", f"/models/{name}/limit", {"kv_weight": weight}, ("weight", weight))

    async def _changing(self, name: str, method: str, path: str, body: Any, change: tuple[str, Any] | None) -> int | None:
        """`change`: the field of its entry that is this, if it is taken; where the answer is lost nobody knows."""
        entry = self._book.models.get(name)
        if entry is None or change is None:
            return (await self.send(method, path, body))[0]
        field, value = change
        was_unsure = field in entry.unsure
        entry.unsure.add(field)
        status, _ = await self.send(method, path, body)
        if status is not None and status < 300:
            setattr(entry, field, value)
        if status is not None and (status < 300 or not was_unsure):
            entry.unsure.discard(field)
        return status

    # ---- keys -----------------------------------------------------------------------------------------------------

    async def key(self, name: str) -> None:
        secret = self.secrets.get(name)
        if secret is None:
            status, made = await self.send("POST", "/keys", {"name": name})
            if status == 201:
                self.secrets[name] = str(made["key"])
                self._book.keys.setdefault(str(made["key"]), []).append(Span(name, time.monotonic(), time.monotonic()))
            elif status == 409:  # one that was made by a call whose answer was lost: nobody has it
                await self.send("DELETE", f"/keys/{name}")
            return
        for span in self._book.keys[secret]:
            span.sure_to = min(span.sure_to, time.monotonic())
        status, _ = await self.send("DELETE", f"/keys/{name}")
        if status is not None and status < 500:
            del self.secrets[name]

    # ---- looking --------------------------------------------------------------------------------------------------

    async def compare(self) -> list[str]:
        """With nothing commanded meanwhile. What is not known any more is learned by it."""
        async with self.turn:
            shown = await self._daemon.models()
            found = self._book.compare(shown)
            now = time.monotonic()
            for name in list(self._book.unsure):
                self._learn(name, shown.get(name), now)
            for name, entry in self._book.models.items():
                if entry.unsure and (model := shown.get(name)):
                    entry.held, entry.unsure = model["held"], set()
                    entry.pinned, entry.weight = model["overrides"].get("pinned"), model["overrides"].get("kv_weight")
            return found

    def _learn(self, name: str, model: Any, now: float) -> None:
        self._book.unsure.discard(name)
        spans = [span for several in self._book.names.values() for span in several if span.model == name and span.maybe_to == math.inf]
        if model is None or model["owner"] == "removed":
            self._book.models.pop(name, None)
            for span in [*spans, *(s for s in self._book.holds.get(name, ()) if s.maybe_to == math.inf)]:
                span.maybe_to = now
            return
        self._book.models[name] = Entry(model["held"], model["overrides"].get("pinned"), model["overrides"].get("kv_weight"))
        for each, several in self._book.names.items():
            for span in several:
                if span.model == name and span.maybe_to == math.inf:
                    if each in (name, *model["aliases"]):
                        if span.sure_from == math.inf:
                            span.sure_from = now
                        elif span.sure_to < now:
                            several.append(Span(name, now, now))
                            span.maybe_to = now
                            break
                    else:
                        span.maybe_to = now
