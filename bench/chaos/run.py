"""One seed's run: a daemon, clients, an operator and the seed's faults at once; then all must heal, end, and leave nothing."""

import asyncio
import contextlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos.asking import Ask, ask
from bench.chaos.book import Book, Entry, Span
from bench.chaos.commands import ADDED, SHARED, Operator
from bench.chaos.daemon import Daemon
from bench.chaos.faults import Faults
from bench.chaos.http import Broken, Connection, call
from bench.chaos.schedule import GAP_S, Step, drawn
from bench.chaos.watch import Watch
from bench.foreign import Foreign, on_simulated

CLIENTS, PAUSE_S = 6, 0.2
PATIENCE_S, DEADLINE_S = 20.0, 60.0  # what a client waits for its model, and for everything
HEAL_S = 90.0  # from the end of the faults to an answer of each; a model may be in a backoff of 60 s
COMPARE_S = 4.0
MOST_TOLD = 10  # violations of one seed that are printed; all are written
TMPFS_MIB = 16
ENV = {
    "ORCH_GPUS__SIMULATED": json.dumps({"count": 2, "memory": "24GiB"}),
    "ORCH_ENGINES": json.dumps({"default": {"stop_grace": "2s"}, "exec": {"stop_grace": "2s", "launch_server": False}}),
    "ORCH_REQUESTS__DRAIN_TIMEOUT": "5s",
    "ORCH_MEMORY__SLEEPERS": "20GiB",
    "SIM_LOAD_S": "0.1",
}


@dataclass
class Violation:
    seed: int
    at_s: float
    what: str
    last: list[str]
    replay: str


@dataclass
class Outcome:
    """Of one seed."""

    seed: int
    minutes: float
    violations: list[Violation] = field(default_factory=list)
    fates: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    back_s: list[float] = field(default_factory=list)
    heal_s: float = 0.0
    healed: int = 0
    over_s: float = 0.0
    looks: tuple[int, int, int] = (0, 0, 0)  # in all; pools seen in them; looks at a card whose limits were above it, for a moment
    restarted_by_hand: int = 0
    starts_refused: int = 0
    noise: int = 0


async def one(seed: int, minutes: float, without: Collection[str], gap_s: float, kept: Path | None) -> Outcome:
    """A whole run of a seed: faults for so long, then all must heal, and nothing be left."""
    with Daemon(ENV, tmpfs_mib=TMPFS_MIB) as daemon:
        run = Run(daemon, seed, minutes, drawn(seed, minutes * 60, without, gap_s), without, gap_s)
        try:
            await run.all()
        except Exception as error:
            run.violated(f"the run broke off: {type(error).__name__}: {error}")
        if run.outcome.violations and kept is not None:
            folder = kept / f"chaos-{seed}.logs"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.copy(daemon.log, folder)
            (folder / "steps").write_text("\n".join(sorted([*run.told, *run.found])) + "\n")
            for log in daemon.logs.glob("*.log"):
                shutil.copy(log, folder)
        return run.outcome


class Run:
    def __init__(self, daemon: Daemon, seed: int, minutes: float, steps: Sequence[Step], without: Collection[str], gap_s: float) -> None:
        self._daemon, self._seed, self._minutes, self._steps = daemon, seed, minutes, steps
        self._book = Book()
        self._models = self._config()
        self._operator = Operator(daemon, self._book, seed, list(self._models))
        self._watch = Watch(daemon, self._book)
        self._key = ""
        self._began = time.monotonic()
        self.told, self.found = list[str](), list[str]()  # the steps so far, and what was found
        self.outcome = Outcome(seed, minutes)
        options = f"--gap {gap_s:g}" if gap_s != GAP_S else ""
        options += f" --without {','.join(sorted(without))}" if without else ""
        self._replay = f"python -m bench chaos --seed {seed} --minutes {minutes:g} {options}".strip()

    def _config(self) -> dict[str, Any]:
        """Two small models, one over both cards, one of which two fit a card; each rests soon."""
        tiny, large = str(self._daemon.tiny), str(self._daemon.large)
        shared = {"min_residency": 0}
        specs: dict[str, dict[str, Any]] = {
            "f-one": {"source": tiny, "preload": True, "sleep_timeout": "6s", "idle_timeout": "20s"},
            "f-two": {"source": tiny, "preload": True, "engine": "exec", "sleep_timeout": None, "idle_timeout": None},
            "f-wide": {"source": tiny, "tensor_parallel_size": 2, "preload": True, "sleep_timeout": "4s", "idle_timeout": "9s"},
            "f-big": {"source": large, "sleep_timeout": "5s", "idle_timeout": "15s"},
        }
        return {f"{self._daemon.prefix}-{role}": {**spec, **shared} for role, spec in specs.items()}

    async def all(self) -> None:
        self._daemon.config.write_text(json.dumps({"models": self._models}))  # JSON is YAML
        now = time.monotonic()
        for name in self._models:
            self._book.names[name] = [Span(name, now, now)]
            self._book.models[name] = Entry()
        await self._daemon.start()
        status, made = await call(self._daemon.admin, "POST", "/api/v1/keys", {"name": "chaos"})
        assert status == 201, made
        self._key = str(made["key"])
        self._book.keys[self._key] = [Span("chaos", now, now)]
        self._began = time.monotonic()
        ends = self._began + self._minutes * 60
        with contextlib.ExitStack() as stack:
            cards = sorted(self._daemon.cards())
            foreign = [
                stack.enter_context(Ballast(on_simulated(self._daemon.simgpu, u), self._daemon.folder / "ballast.log")) for u in cards
            ]
            self._faults = Faults(self._daemon, self._book, self._operator, self._models, foreign)
            watching = asyncio.create_task(self._watch.run())
            working = [asyncio.create_task(self._client(number, ends)) for number in range(CLIENTS)]
            working += [asyncio.create_task(self._operator.run(ends)), asyncio.create_task(self._comparing(ends))]
            working += [asyncio.create_task(self._faulty(step)) for step in self._steps]
            _, late = await asyncio.wait(working, timeout=ends - time.monotonic() + DEADLINE_S * 2 + 60)
            for task in working:
                if task in late:
                    task.cancel()
                    self.violated(f"not over in time: {task.get_coro()}")
                elif (error := task.exception()) is not None:
                    self.violated(f"the run's own fault: {type(error).__name__}: {error}")
            await self._faults.mend()
            await self._heal()
            watching.cancel()
        await self._end()
        self.outcome.fates, self.outcome.commands = self._book.fates, self._book.commands
        self.outcome.faults, self.outcome.skipped = self._faults.done, self._faults.skipped
        self.outcome.noise = self._watch.noise
        self.outcome.looks = self._watch.looks, self._watch.pools_seen, self._watch.looks_over
        self.outcome.back_s, self.outcome.over_s = self._faults.of_daemon.back_s, self._watch.most_over_s

    # ---- while it goes on -----------------------------------------------------------------------------------------

    async def _faulty(self, step: Step) -> None:
        await asyncio.sleep(max(0.0, self._began + step.at_s - time.monotonic()))
        self.told.append(str(step))
        await self._faults.do(step)
        self._gather()

    async def _client(self, number: int, ends: float) -> None:
        dice, connection = random.Random(self._seed * 1000 + number), Connection(self._daemon.port)
        while time.monotonic() < ends:
            await asyncio.sleep(dice.expovariate(1 / PAUSE_S))
            fate = await ask(connection, self._drawn(dice), DEADLINE_S)
            if problem := self._book.judge(fate, self._daemon.was_down(fate.began - 1.0, fate.ended + 1.0)):
                self.violated(problem)
            if fate.how == "unreachable":
                await asyncio.sleep(0.2)
            if dice.random() < 0.3:
                connection.close()
        connection.close()

    def _drawn(self, dice: random.Random) -> Ask:
        names = [*self._models, *self._book.models, *self._book.models]
        if dice.random() < 0.15:
            names = list(map(self._operator.name, (*ADDED, SHARED, SHARED, "f-extra", "nobody")))
        name = dice.choice(names)
        key = self._key
        if self._operator.secrets and dice.random() < 0.2:
            key = dice.choice(sorted(self._operator.secrets.values()))
        tokens = dice.choice([1, 5, 20, 60, 200])
        leave = dice.randint(1, 10) if dice.random() < 0.1 else None
        stream = dice.random() < 0.6
        return Ask(name, dice.random() < 0.5, stream, dice.randint(1, 2000), tokens, key, leave if stream else None, PATIENCE_S)

    async def _comparing(self, ends: float) -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(COMPARE_S)
            await self._compare()

    async def _compare(self) -> None:
        with contextlib.suppress(Broken, TimeoutError, RuntimeError):
            for wrong in await self._operator.compare():
                self.violated(wrong)
        self._gather()

    def _gather(self) -> None:
        """What the others have found since."""
        for several in (self._watch.problems, self._operator.problems, self._faults.of_daemon.problems):
            while several:
                self.violated(several.pop(0))
        while self._daemon.refused:
            why = self._daemon.refused.pop(0)
            if any(harm.what == "fill-disk" for harm in self._book.harms):  # systemd starts it again until there is room
                self.outcome.starts_refused += 1
            else:
                self.violated(f"the daemon did not start: {why}")

    def violated(self, what: str) -> None:
        at = time.monotonic() - self._began
        found = Violation(self._seed, round(at, 2), what, self.told[-8:], self._replay)
        self.outcome.violations.append(found)
        self.found.append(f"{at:7.2f}s VIOLATED: {what}")
        if len(self.found) <= MOST_TOLD:  # one that goes on says the same again and again
            print(f"VIOLATED seed {self._seed} at {at:.2f} s: {what}", *found.last, self._replay, sep="\n    ", flush=True)

    # ---- after it -------------------------------------------------------------------------------------------------

    async def _heal(self) -> None:
        """Each model that is not held down answers, and everything is as it was commanded."""
        began = time.monotonic()
        await self._compare()
        await self._compare()  # what was not known is known now
        wanted = sorted(name for name, entry in self._book.models.items() if entry.held is False)
        gate = asyncio.Semaphore(3)

        async def one(name: str) -> None:
            async with gate:
                await self._until_answered(name, began)

        await asyncio.gather(*map(one, wanted))
        self.outcome.heal_s = time.monotonic() - began
        await self._compare()
        status = await self._daemon.get("/status")
        if status["loop"]["errors"]:
            self.violated(f"the loop has failed {status['loop']['errors']} times")

    async def _until_answered(self, name: str, began: float) -> None:
        connection, fate = Connection(self._daemon.port), None
        while time.monotonic() < began + HEAL_S:
            left = began + HEAL_S - time.monotonic()
            fate = await ask(connection, Ask(name, False, True, 50, 3, self._key, None, max(1.0, left)), left + 5.0)
            if fate.how == "answered" and fate.by == {name}:
                self.outcome.healed += 1
                return connection.close()
            if fate.code == "model_failed":  # five faults in a row: it is an operator's to start it, as its words say
                self.outcome.restarted_by_hand += 1
                await self._operator.tell(name, "start")
            await asyncio.sleep(0.3)
        shown = (await self._daemon.models()).get(name, {})
        self.violated(f"{name} did not heal within {HEAL_S:.0f} s: {fate}; it is {shown.get('state')}: {shown.get('reason')}")

    async def _end(self) -> None:
        try:
            status = await self._daemon.end()
        except Exception as error:
            return self.violated(f"it did not end: {type(error).__name__}: {error}")
        if status:
            self.violated(f"told to end, it ended with {status}")
        if remains := self._daemon.remains():
            self.violated(f"left after the end: {remains}")
        self._watch.look()
        self._gather()


class Ballast(Foreign):
    """Whose pipe is closed when it has ended: many of them come and go here."""

    def _read(self) -> None:
        super()._read()
        assert self._process.stdout is not None
        self._process.stdout.close()
