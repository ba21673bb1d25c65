"""The ring of what GPUs' memory was used for: bounded whatever happens, and nothing of what a viewer may not see."""

from array import array
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.history import COARSE_FOR_S, FINE_FOR_S, NAMED, OTHERS, Card, History, Row
from orchestrator.control.reconciler import View
from orchestrator.policy.decide import GpuBudget
from orchestrator.policy.instance import Instance, Launch, State
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, Snapshot
from orchestrator.policy.units import GIB, MIB


@dataclass
class _Plan:
    """As much of a plan as is looked at."""

    instances: dict[str, Instance]
    gpus: dict[str, GpuBudget]
    pools: dict[str, Any] = field(default_factory=dict)
    claims: dict[tuple[str, str], int] = field(default_factory=dict)


def view(now: float, models: int, busy_mib: int = 64) -> View:
    instances, engines, pools, held = {}, {}, {}, {}
    for n in range(models):
        name, launch_id = f"m{n:03}", f"l{n}"
        spec = ModelSpec(name=name, source="/m")
        launch = Launch(launch_id, f"orch-{launch_id}", spec, ("G",), GIB, 0, 4 * GIB)
        instances[name] = Instance(name, State.READY, 1.0, "", launch)
        held[n + 10] = (200 + n) * MIB + busy_mib * MIB
        segment = Segment(512 * MIB, busy_mib * MIB, 0)
        engines[launch_id] = EngineSeen(launch_id, True, ready=True, pid=n + 10, pids=frozenset({n + 10}), segment=segment)
        pools[launch_id] = SimpleNamespace(limit_bytes=512 * MIB)
    used = sum(held.values()) + 3 * GIB
    gpu = GpuReading("G", 0, "Card", 640 * GIB, 640 * GIB - used, held, now)
    kv = models * busy_mib * MIB
    budget = GpuBudget(640 * GIB, used, 2 * GIB, 0, sum(held.values()) - kv, 3 * GIB, kv, 0, 0)
    plan = _Plan(instances, {"G": budget}, pools)
    return View(Snapshot(now, {"G": gpu}, engines, {}), cast(Any, plan), 1, 0, 0.0)


def test_a_row_says_who_has_what_in_mib() -> None:
    history = History(1000.0)
    history.look(view(10.0, 2))
    (row,) = history.cards["G"].fine
    assert (row.at, row.models) == (1010.0, ("m000", "m001"))
    assert list(row.mib) == [2048, 3072, 0, 200, 64, 512, 201, 64, 512]
    assert row.used == 2048 + 3072 + 200 + 64 + 201 + 64


def test_most_looks_are_passed_over() -> None:
    history = History(0.0)
    for quarter in range(81):
        history.look(view(10.0 + quarter / 4, 1))
    assert [row.at for row in history.cards["G"].fine] == [10.0 + 2 * n for n in range(11)]


def test_of_many_models_the_largest_are_named_and_the_rest_is_one() -> None:
    history = History(0.0)
    history.look(view(10.0, 200))
    (row,) = history.cards["G"].fine
    assert len(row.models) == NAMED + 1
    assert row.models[-1] == OTHERS
    assert "m199" in row.models
    assert "m000" not in row.models
    assert row.used == 2048 + 3072 + sum(range(200, 400)) + 200 * 64


def test_a_day_is_kept_coarsely_with_the_fullest_look_of_each_half_minute() -> None:
    card, now = Card(0, "Card", GIB), 0.0
    while now < COARSE_FOR_S + 3600:
        peak = 900 if now % 600 == 4 else 100
        card.add(Row(now, (), array("I", [peak, 0, 0])))
        now += 2
    assert len(card.fine) == FINE_FOR_S / 2
    assert len(card.coarse) == COARSE_FOR_S / 30
    assert sum(row.mib[0] == 900 for row in card.coarse) == COARSE_FOR_S / 600
    assert {row.mib[0] for row in card.rows(COARSE_FOR_S, now)} == {100, 900}
    assert [row.at for row in card.since(now - 5)] == [now - 4, now - 2]
    assert card.rows(300, now)[0].at == now - 298


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=6, unique_by=lambda t: t[0])
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_what_is_hidden_has_no_name_and_keeps_its_bytes(models: list[tuple[int, int, int, int]]) -> None:
    names = tuple(f"m{n}" for n, *_ in models)
    row = Row(1.0, names, array("I", [1, 2, 3, *(size for _, *three in models for size in three)]))
    seen = row.seen_by(lambda name: name in ("m0", "m1"))
    assert set(seen.models) <= {"m0", "m1", OTHERS}
    assert seen.used == row.used
    assert sum(seen.mib) == sum(row.mib)
    assert len(seen.mib) == 3 + 3 * len(seen.models)


def test_a_card_that_is_another_begins_anew() -> None:
    history = History(0.0)
    history.look(view(10.0, 1))
    other = view(20.0, 1)
    gpu = replace(other.snapshot.gpus["G"], total_bytes=GIB)
    history.look(replace(other, snapshot=replace(other.snapshot, gpus={"G": gpu})))
    assert [row.at for row in history.cards["G"].fine] == [20.0]


@pytest.mark.parametrize("models", [0, 1])
def test_an_empty_card_has_rows_too(models: int) -> None:
    history = History(0.0)
    history.look(view(10.0, models))
    assert len(history.cards["G"].fine[0].mib) == 3 + 3 * models
