"""The division over time, against engines that obey as real ones do: late, and only when they allocate.

An engine's watcher looks at the limit every 0.1 s, and its allocator follows at its next allocation; a lower limit frees
nothing. Requests come in bursts and end slowly, foreign processes grab and release, engines come and go, a GPU can not be
read for a while. The one rule: KV growth never eats the reserve, but for what foreign memory has taken and is not yet made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.policy import budgets
from orchestrator.policy.budgets import PoolMemory
from orchestrator.policy.division import Pool
from orchestrator.policy.units import GIB, MIB

STEP_S = 0.02
WATCH_S = 0.1
RESERVE = 4 * GIB
CARD = 64 * GIB
GPUS = ("GPU-0", "GPU-1")


@dataclass
class Engine:
    """One kvcached allocator, in bundles; with tensor parallelism it holds the same on each of its GPUs."""

    key: str
    gpus: tuple[str, ...]
    bundle: int
    floor: int
    capacity: int
    weight: float
    reserved_pages: int
    next_watch: float
    stride: int = 4  # bundles that one step may fill
    limit: int = 0  # what the segment says
    seen: int = 0  # what the watcher saw last
    used: int = 0
    prealloc: int = 0
    load: int = 0  # bundles that its requests would fill
    idle_since: float = 0.0

    def __post_init__(self) -> None:
        self.limit = self.seen = self.capacity

    @property
    def mapped(self) -> int:
        return (self.used + self.prealloc) * self.bundle

    def watch(self, now: float) -> None:
        if now >= self.next_watch:
            self.seen, self.next_watch = self.limit, self.next_watch + WATCH_S

    def work(self, now: float) -> int:
        """A step: some bundles are filled or one is emptied. Returns the bytes that were newly mapped."""
        before = self.mapped
        if self.used < self.load:
            self.prealloc = max(0, min(self.prealloc, self.seen - self.used))  # the allocator follows the limit here
            for _ in range(min(self.stride, self.load - self.used)):
                if self.prealloc:
                    self.prealloc -= 1
                elif self.used + self.prealloc >= self.seen:
                    break
                self.used += 1
        elif self.used > self.load:
            self.used -= 1
            self.prealloc = min(self.prealloc + 1, self.reserved_pages)
        if self.load:
            self.idle_since = now
        return self.mapped - before

    def pool(self, now: float) -> Pool:
        return Pool(
            launch_id=self.key,
            model=f"model-{self.key}",
            gpus=self.gpus,
            bundle_bytes=self.bundle,
            floor_bytes=self.floor * self.bundle,
            ceiling_bytes=self.capacity * self.bundle,
            weight=self.weight,
            limit_bytes=self.limit * self.bundle,
            used_bytes=self.used * self.bundle,
            prealloc_bytes=self.prealloc * self.bundle,
            busy=self.load > 0,
            idle_s=now - self.idle_since,
        )


@dataclass
class Box:
    """The cards, what is on them, and the daemon's loop. `owing`: GPUs where more is promised than exists, by no growth of KV."""

    interval_s: float = 0.25
    now: float = 1000.0
    next_look: float = 1000.0
    engines: dict[str, Engine] = field(default_factory=dict)
    foreign: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GPUS, 0))
    hidden: set[str] = field(default_factory=set)
    memory: Mapping[str, PoolMemory] = field(default_factory=dict)
    owing: set[str] = field(default_factory=set)
    eaten: list[str] = field(default_factory=list)
    grown: int = 0

    def here(self, gpu: str) -> list[Engine]:
        return [engine for engine in self.engines.values() if gpu in engine.gpus]

    def free(self, gpu: str) -> int:
        return CARD - self.foreign[gpu] - sum(engine.mapped for engine in self.here(gpu))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end - STEP_S / 2:
            if self.now >= self.next_look - STEP_S / 2:
                self.look()
                self.next_look = self.now + self.interval_s
            for engine in self.engines.values():
                engine.watch(self.now)
                if engine.work(self.now) > 0:
                    self.grown += 1
                    bad = [gpu for gpu in engine.gpus if gpu not in self.owing and self.free(gpu) < RESERVE]
                    self.eaten += [f"{engine.key} grew on {gpu}: {self.free(gpu) / GIB:.2f} GiB are free at {self.now:.2f}" for gpu in bad]
            self.now += STEP_S

    def look(self) -> None:
        pools = [engine.pool(self.now) for engine in self.engines.values()]
        amounts = {gpu: self.free(gpu) + sum(e.mapped for e in self.here(gpu)) - RESERVE for gpu in GPUS if gpu not in self.hidden}
        plan = budgets.plan(pools, amounts, self.memory, self.now)
        self.memory = plan.memory
        for write in plan.writes:
            engine = self.engines[write.launch_id]
            assert write.limit_bytes % engine.bundle == 0
            assert engine.bundle <= write.limit_bytes <= engine.capacity * engine.bundle
            engine.limit = write.limit_bytes // engine.bundle
        for gpu, amount in amounts.items():
            if sum(max(e.limit * e.bundle, e.seen * e.bundle, e.mapped) for e in self.here(gpu)) <= amount:
                self.owing.discard(gpu)


engines = st.builds(
    Engine,
    key=st.just(""),
    gpus=st.sampled_from(((GPUS[0],), (GPUS[0],), (GPUS[1],), GPUS)),
    bundle=st.sampled_from((128 * MIB, 512 * MIB, GIB)),
    floor=st.integers(1, 8),
    capacity=st.integers(8, 120),
    weight=st.sampled_from((0.5, 1.0, 4.0)),
    reserved_pages=st.sampled_from((0, 2, 10)),
    next_watch=st.floats(1000.0, 1000.0 + WATCH_S),
    stride=st.sampled_from((4, 120)),
)


class Simulation(RuleBasedStateMachine):
    box = Box()
    count = 0

    @initialize(interval_s=st.sampled_from((0.25, 0.25, 0.02)), first=st.lists(engines, min_size=2, max_size=4))
    def boot(self, interval_s: float, first: list[Engine]) -> None:
        self.box = Box(interval_s)
        for engine in first:
            self.launch(engine)

    @precondition(lambda self: len(self.box.engines) < 5)
    @rule(engine=engines)
    def launch(self, engine: Engine) -> None:
        """Its limit is all it can address until the daemon's first write."""
        self.count += 1
        engine.key = f"e{self.count}"
        engine.next_watch += self.box.now - 1000.0
        engine.idle_since = self.box.now
        self.box.engines[engine.key] = engine
        self.box.owing |= set(engine.gpus)

    @precondition(lambda self: len(self.box.engines) > 1)
    @rule(which=st.integers(0, 4))
    def end(self, which: int) -> None:
        keys = sorted(self.box.engines)
        del self.box.engines[keys[which % len(keys)]]

    @rule(which=st.integers(0, 4), bundles=st.integers(0, 120), seconds=st.floats(0.02, 1.0))
    def burst(self, which: int, bundles: int, seconds: float) -> None:
        keys = sorted(self.box.engines)
        self.box.engines[keys[which % len(keys)]].load = bundles
        self.box.pass_time(seconds)

    @rule(bundles=st.integers(20, 120), seconds=st.floats(0.02, 3.0))
    def rush(self, bundles: int, seconds: float) -> None:
        """All at once: whoever has a limit uses it up."""
        for engine in self.box.engines.values():
            engine.load = bundles
        self.box.pass_time(seconds)

    @rule(gpu=st.sampled_from(GPUS), size=st.integers(1, 40))
    def grab(self, gpu: str, size: int) -> None:
        taken = max(0, min(size * GIB, self.box.free(gpu)))
        self.box.foreign[gpu] += taken
        if taken:
            self.box.owing.add(gpu)

    @rule(gpu=st.sampled_from(GPUS), share=st.floats(0.1, 1.0))
    def release(self, gpu: str, share: float) -> None:
        self.box.foreign[gpu] -= int(self.box.foreign[gpu] * share)

    @rule(gpu=st.sampled_from(GPUS), seconds=st.floats(0.02, 1.0))
    def driver_hangs(self, gpu: str, seconds: float) -> None:
        self.box.hidden = {gpu}
        self.box.pass_time(seconds)
        self.box.hidden = set()

    @rule(seconds=st.floats(0.02, 4.0))
    def wait(self, seconds: float) -> None:
        self.box.pass_time(seconds)

    @rule()
    def daemon_restarts(self) -> None:
        """It takes longer than a settle window, so nothing it forgot still counts."""
        self.box.next_look = self.box.now + budgets.SETTLE_S
        self.box.pass_time(budgets.SETTLE_S)
        self.box.memory = {}

    @invariant()
    def the_reserve_is_not_eaten(self) -> None:
        assert not self.box.eaten, self.box.eaten

    def teardown(self) -> None:
        """When all is quiet: floors are kept, limits fit, and what was lent is back."""
        if not self.box.engines:
            return
        for engine in self.box.engines.values():
            engine.load = 0
        self.box.foreign = dict.fromkeys(GPUS, 0)
        self.box.pass_time(4.0)
        assert not self.box.eaten, self.box.eaten
        for gpu in GPUS:
            pools = [engine.pool(self.box.now) for engine in self.box.here(gpu)]
            if sum(pool.least for pool in pools) > CARD - RESERVE:
                return
            assert sum(pool.limit_bytes for pool in pools) <= CARD - RESERVE
            assert gpu not in self.box.owing
        assert all(pool.limit_bytes >= pool.least for pool in (engine.pool(self.box.now) for engine in self.box.engines.values()))


TestSimulation = Simulation.TestCase
TestSimulation.settings = settings(
    max_examples=30,
    derandomize=True,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def box_of(*engines_: Engine, interval_s: float = 0.25) -> Box:
    box = Box(interval_s, engines={engine.key: engine for engine in engines_})
    box.owing = set(GPUS)
    box.pass_time(4.0)
    assert not box.owing
    return box


def engine(key: str, capacity: int = 60, gpus: tuple[str, ...] = ("GPU-0",), **fields: int) -> Engine:
    return Engine(key, gpus, GIB, fields.get("floor", 2), capacity, 1.0, fields.get("reserved_pages", 2), 1000.03, fields.get("stride", 4))


def test_a_burst_beside_an_idle_neighbour_is_served_from_its_surplus() -> None:
    box = box_of(engine("a"), engine("b"))
    box.engines["a"].load = 50
    box.pass_time(3.0)
    assert box.engines["a"].used == 50
    assert box.engines["b"].limit >= 2
    assert not box.eaten


def test_two_that_want_all_get_half_each_and_never_more_than_there_is() -> None:
    box = box_of(engine("a"), engine("b"), interval_s=0.02)
    for one in box.engines.values():
        one.load = 60
    box.pass_time(5.0)
    assert [one.used for one in box.engines.values()] == [30, 30]
    assert box.free("GPU-0") == RESERVE
    assert not box.eaten


def test_memory_goes_from_one_to_the_other_only_as_requests_end() -> None:
    """`b` waits for memory that `a` holds: its growth follows what `a` frees, look by look, and the reserve stays whole."""
    box = box_of(engine("a"), engine("b"))
    box.engines["a"].load = 56
    box.pass_time(5.0)
    assert box.engines["a"].used == 56
    box.engines["b"].load = 40
    box.pass_time(2.0)
    assert box.engines["b"].used <= 4, "a's requests still run"
    box.engines["a"].load = 0
    box.pass_time(4.0)
    assert box.engines["b"].used >= 25, "the peak of a is forgotten slowly, and until then it counts as demand"
    box.pass_time(10.0)
    assert box.engines["b"].used == 40
    assert not box.eaten


@pytest.mark.parametrize("watch_s", [0.01, 0.03, 0.05, 0.07, 0.09])
@pytest.mark.parametrize("neighbours_s", [0.03, 0.07])
def test_an_engine_that_has_not_seen_its_smaller_limit_may_burst_all_the_same(watch_s: float, neighbours_s: float) -> None:
    """With a look each 20 ms the daemon is faster than a watcher: what `a` must give back is not given out yet, whenever it bursts."""
    for late in range(12):
        first, second = engine("a", stride=60), engine("b", stride=60)
        first.next_watch, second.next_watch = 1000.0 + watch_s, 1000.0 + neighbours_s
        box = box_of(first, second, interval_s=0.02)
        second.load = 60
        box.pass_time(late * STEP_S)
        first.load = 60
        box.pass_time(1.0)
        assert not box.eaten, f"a burst {late} steps after b: {box.eaten}"


def test_a_foreign_grab_is_yielded_to_and_its_release_is_used() -> None:
    box = box_of(engine("a"), engine("b"))
    for one in box.engines.values():
        one.load = 20
    box.pass_time(3.0)
    box.foreign["GPU-0"] = 24 * GIB
    box.owing.add("GPU-0")
    box.pass_time(0.26)
    assert sum(one.limit for one in box.engines.values()) * GIB <= CARD - 24 * GIB - RESERVE
    for one in box.engines.values():
        one.load = 10
    box.pass_time(1.0)
    for one in box.engines.values():
        one.load = 40
    box.pass_time(2.0)
    assert box.free("GPU-0") >= RESERVE
    assert sum(one.used for one in box.engines.values()) == 36
    box.foreign["GPU-0"] = 0
    box.pass_time(3.0)
    assert sum(one.used for one in box.engines.values()) == 60
    assert not box.eaten


def test_a_tensor_parallel_pool_is_bound_by_its_tightest_gpu_and_the_rest_is_used() -> None:
    box = box_of(engine("wide", gpus=GPUS), engine("tight"), engine("near", gpus=("GPU-1",)))
    box.foreign["GPU-0"] = 40 * GIB
    box.owing.add("GPU-0")
    box.pass_time(1.0)  # a burst in the same instant would be faster than any look
    for one in box.engines.values():
        one.load = 60
    box.pass_time(6.0)
    used = {key: one.used for key, one in box.engines.items()}
    assert used == {"wide": 10, "tight": 10, "near": 50}
    assert not box.eaten
