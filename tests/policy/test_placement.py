"""Which GPUs: tables for the plain cases, and properties for all: allowed, distinct, with room, and the best of those."""

from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.model import ModelSpec
from orchestrator.policy.placement import MOST_SETS, Placed, Refused, allowed, never_fits, place, pressures, sets
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB

CARDS = {f"GPU-{name}": GpuReading(f"GPU-{name}", index, "H200", 140 * GIB, 139 * GIB) for index, name in enumerate("abcd")}


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "source": "org/m", **fields})


@pytest.mark.parametrize(
    ("gpus", "found", "unknown"),
    [
        ("auto", ["GPU-a", "GPU-b", "GPU-c", "GPU-d"], []),
        ([2, 0], ["GPU-c", "GPU-a"], []),
        (["1"], ["GPU-b"], []),
        (["GPU-d", 1], ["GPU-d", "GPU-b"], []),
        ([0, "GPU-a"], ["GPU-a"], []),
        ([9, "GPU-x", 0], ["GPU-a"], [9, "GPU-x"]),
    ],
)
def test_allowed(gpus: Any, found: list[str], unknown: list[int | str]) -> None:
    assert allowed(spec(gpus=gpus), CARDS) == (found, unknown)


@pytest.mark.parametrize(
    ("fields", "room", "gpus"),
    [
        ({}, (10, 30, 20, 5), ("GPU-b",)),
        ({}, (20, 20, 20, 20), ("GPU-a",)),
        ({"gpus": [3, 2]}, (90, 90, 20, 20), ("GPU-c",)),
        ({"gpus": [0, 2]}, (10, 90, 20, 90), ("GPU-c",)),
        ({"tensor_parallel_size": 2}, (10, 30, 20, 40), ("GPU-d", "GPU-b")),
        ({"tensor_parallel_size": 4}, (10, 10, 11, 10), ("GPU-c", "GPU-a", "GPU-b", "GPU-d")),
        ({}, (10, None, None, None), ("GPU-a",)),
    ],
)
def test_it_goes_where_the_most_room_is(fields: dict[str, Any], room: tuple[int | None, ...], gpus: tuple[str, ...]) -> None:
    rooms = {uuid: size * GIB for uuid, size in zip(CARDS, room, strict=True) if size is not None}
    assert place(spec(**fields), 10 * GIB, rooms, CARDS) == Placed(gpus)


@pytest.mark.parametrize(
    ("fields", "room", "pressure", "gpus"),
    [
        ({}, (30, 30, 30, 30), (3, 1, 2, 4), ("GPU-b",)),
        ({}, (30, 5, 30, 30), (3, 1, 2, 4), ("GPU-c",)),  # the least pressure is no use without room
        ({}, (40, 20, 30, 50), (1, 1, 1, 1), ("GPU-b",)),  # then best fit: the large room is left whole
        ({}, (40, 9, 30, 50), (0, 0, 0, 0), ("GPU-c",)),
        ({}, (30, 30, 30, 30), (1, 1, 1, 1), ("GPU-a",)),
        ({}, (30, 30, 30, 30), (1, None, 1, 1), ("GPU-b",)),
        ({"gpus": ["GPU-d", "GPU-c"]}, (30, 30, 30, 30), (1, 1, 5, 4), ("GPU-d",)),
        ({"gpus": ["GPU-a"]}, (30, 30, 30, 30), (9, 1, 5, 4), ("GPU-a",)),
        ({"tensor_parallel_size": 2}, (30, 40, 30, 30), (3, 1, 2, 1), ("GPU-d", "GPU-b")),
    ],
)
def test_it_goes_where_the_least_pressure_is_then_where_it_fits_best(
    fields: dict[str, Any], room: tuple[int, ...], pressure: tuple[float | None, ...], gpus: tuple[str, ...]
) -> None:
    rooms = {uuid: size * GIB for uuid, size in zip(CARDS, room, strict=True)}
    pressed = {uuid: size for uuid, size in zip(CARDS, pressure, strict=True) if size is not None}
    assert place(spec(**fields), 10 * GIB, rooms, CARDS, pressed) == Placed(gpus)


def test_pressure_is_the_rate_for_each_byte_that_is_left_beside_the_newcomer() -> None:
    room = {"a": 30, "b": 20, "c": 10, "d": 5, "e": 30}
    assert pressures({"a": 10.0, "b": 10.0, "c": 10.0, "d": 10.0}, room, 10) == {"a": 0.5, "b": 1.0, "c": 10.0, "d": 10.0, "e": 0.0}


SLICES = {f"MIG-{name}": GpuReading(f"MIG-{name}", 0, "H200 MIG 3g.71gb", 70 * GIB, 69 * GIB) for name in "ab"}


def test_mig_devices_are_named_by_uuid_and_hold_one_rank() -> None:
    rooms = dict.fromkeys(SLICES, 60 * GIB)
    assert place(spec(gpus=["MIG-b"]), GIB, rooms, SLICES) == Placed(("MIG-b",))
    assert place(spec(), GIB, rooms, SLICES) == Placed(("MIG-a",))
    refused = place(spec(tensor_parallel_size=2), GIB, rooms, SLICES)
    why = ": CUDA shows a process one MIG device, so engines on them have tensor_parallel_size 1"
    assert refused == Refused(f"2 GPUs wanted, 0 can be read{why}")
    mixed = SLICES | CARDS
    assert place(spec(tensor_parallel_size=2), GIB, dict.fromkeys(mixed, 60 * GIB), mixed) == Placed(("GPU-a", "GPU-b"))
    assert never_fits(spec(tensor_parallel_size=2), {}, 0, dict.fromkeys(SLICES, 0), list(SLICES.values())) == (
        f"2 GPUs wanted, and it may use MIG devices only{why}"
    )
    assert never_fits(spec(), {}, 0, dict.fromkeys(SLICES, 0), list(SLICES.values())) is None
    assert sets(spec(tensor_parallel_size=2), SLICES) == ()


@pytest.mark.parametrize(
    ("fields", "cards", "count"),
    [
        ({}, 4, 4),
        ({"gpus": [2, 0]}, 4, 2),
        ({"tensor_parallel_size": 2}, 4, 6),
        ({"tensor_parallel_size": 4}, 8, 70),
        ({"tensor_parallel_size": 8}, 16, 9),
        ({"tensor_parallel_size": 4}, 3, 0),
    ],
)
def test_the_sets_that_are_looked_through_are_all_or_neighbours(fields: dict[str, Any], cards: int, count: int) -> None:
    gpus = {f"g{n}": GpuReading(f"g{n}", n, "H200", 140 * GIB, 139 * GIB) for n in range(cards)}
    found = sets(spec(**fields), gpus)
    assert len(found) == len(set(found)) == count <= MOST_SETS
    assert all(list(each) == sorted(each, key=lambda uuid: gpus[uuid].index) for each in found)
    assert list(found) == sorted(found, key=lambda each: [gpus[uuid].index for uuid in each])
    if 0 < count < 9:
        assert set(found) == set(combinations(found[0] + found[-1] if "gpus" in fields else tuple(gpus), len(found[0])))


@pytest.mark.parametrize(
    ("fields", "room", "reason"),
    [
        ({}, {"GPU-a": 9, "GPU-b": -3}, "it needs 10.0GiB on a GPU; beside the floors of the others GPU 0 has 9216MiB, GPU 1 has 0MiB"),
        (
            {"tensor_parallel_size": 2},
            {"GPU-a": 99, "GPU-b": 1},
            "it needs 10.0GiB on each of 2 GPUs; .*GPU 0 has 99.0GiB, GPU 1 has 1024MiB",
        ),
        ({"tensor_parallel_size": 2}, {"GPU-a": 99}, "2 GPUs wanted, 1 can be read"),
        ({}, {}, "1 GPU wanted, 0 can be read"),
        ({"gpus": [7]}, {"GPU-a": 99}, "1 GPU wanted, 0 can be read"),
        ({"gpus": [0, "GPU-a"], "tensor_parallel_size": 2}, {"GPU-a": 99, "GPU-b": 99}, "2 GPUs wanted, 1 can be read"),
    ],
)
def test_why_it_goes_nowhere(fields: dict[str, Any], room: dict[str, int], reason: str) -> None:
    answer = place(spec(**fields), 10 * GIB, {uuid: size * GIB for uuid, size in room.items()}, CARDS)
    assert isinstance(answer, Refused)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(answer.reason)


NAMES = st.sampled_from((0, 1, 2, 3, "0", "3", "GPU-a", "GPU-b", 9, "GPU-x"))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.just("auto") | st.lists(NAMES, min_size=1, max_size=6, unique_by=str),
    st.integers(1, 4),
    st.dictionaries(st.sampled_from(list(CARDS)), st.integers(-50, 50)),
    st.integers(0, 40),
    st.none() | st.dictionaries(st.sampled_from(list(CARDS)), st.sampled_from((0.0, 0.5, 2.0))),
    st.randoms(use_true_random=False),
)
def test_wherever_it_goes(gpus: Any, size: int, room: dict[str, int], need: int, pressure: dict[str, float] | None, random: Random) -> None:
    if gpus != "auto" and len(gpus) < size:
        return
    wanted = spec(gpus=gpus, tensor_parallel_size=size)
    answer = place(wanted, need, room, CARDS, pressure)
    mixed = random.sample(list(CARDS), len(CARDS))
    cards, rooms = {uuid: CARDS[uuid] for uuid in mixed}, {uuid: room[uuid] for uuid in mixed if uuid in room}
    assert place(wanted, need, rooms, cards, pressure and dict(sorted(pressure.items(), reverse=True))) == answer
    may = {uuid for uuid in allowed(wanted, CARDS)[0] if room.get(uuid, need - 1) >= need}
    if isinstance(answer, Refused):
        assert len(may) < size
        return
    assert len(set(answer.gpus)) == len(answer.gpus) == size
    assert set(answer.gpus) <= may

    def merit(uuid: str) -> tuple[float, int]:
        return (0.0, -room[uuid]) if pressure is None else (pressure.get(uuid, 0.0), room[uuid])

    assert all(merit(other) >= max(merit(uuid) for uuid in answer.gpus) for other in may - set(answer.gpus))
    assert tuple(sorted(answer.gpus, key=lambda uuid: CARDS[uuid].index)) in sets(wanted, CARDS)


RESERVE = dict.fromkeys(CARDS, 4 * GIB)


@pytest.mark.parametrize(
    ("size", "weights", "cards", "said"),
    [
        (1, 100, "ab", None),
        (1, 134, "a", None),
        (
            1,
            135,
            "a",
            "it needs 137.0GiB on a GPU (weights 135.0GiB + KV floor 2048MiB), but GPU 0 has 140.0GiB, of which 4096MiB are kept",
        ),
        (2, 135, "ab", "it needs 137.0GiB on each of 2 GPUs"),
        (2, 100, "a", "it needs 102.0GiB on each of 2 GPUs"),
        (1, 1, "", "no GPU that it may use can be read"),
    ],
)
def test_what_never_fits_is_said_with_the_arithmetic(size: int, weights: int, cards: str, said: str | None) -> None:
    answer = never_fits(spec(tensor_parallel_size=size), {"weights": weights * GIB}, 2 * GIB, RESERVE, [CARDS[f"GPU-{c}"] for c in cards])
    assert (answer is None) if said is None else (answer is not None and answer.startswith(said))
