"""Which GPUs: tables for the plain cases, and properties for all: allowed, distinct, with room, and those with the most of it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.model import ModelSpec
from orchestrator.policy.placement import Placed, Refused, allowed, never_fits, place
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
    ("fields", "room", "reason"),
    [
        ({}, {"GPU-a": 9, "GPU-b": -3}, "it needs 10.0GiB on a GPU; beside the floors of the others GPU 0 has 9216MiB, GPU 1 has 0MiB"),
        (
            {"tensor_parallel_size": 2},
            {"GPU-a": 99, "GPU-b": 1},
            "it needs 10.0GiB on each of 2 GPUs; .*GPU 0 has 99.0GiB, GPU 1 has 1024MiB",
        ),
        ({"tensor_parallel_size": 2}, {"GPU-a": 99}, "2 GPUs wanted, 1 can be read"),
        ({}, {}, "1 GPUs wanted, 0 can be read"),
        ({"gpus": [7]}, {"GPU-a": 99}, "1 GPUs wanted, 0 can be read"),
        ({"gpus": [0, "GPU-a"], "tensor_parallel_size": 2}, {"GPU-a": 99, "GPU-b": 99}, "2 GPUs wanted, 1 can be read"),
    ],
)
def test_why_it_goes_nowhere(fields: dict[str, Any], room: dict[str, int], reason: str) -> None:
    answer = place(spec(**fields), 10 * GIB, {uuid: size * GIB for uuid, size in room.items()}, CARDS)
    assert isinstance(answer, Refused)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(answer.reason)


NAMES = st.sampled_from((0, 1, 2, 3, "0", "3", "GPU-a", "GPU-b", 9, "GPU-x"))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.just("auto") | st.lists(NAMES, min_size=1, max_size=6, unique_by=str),
    st.integers(1, 4),
    st.dictionaries(st.sampled_from(list(CARDS)), st.integers(-50, 50)),
    st.integers(0, 40),
)
def test_wherever_it_goes(gpus: Any, size: int, room: dict[str, int], need: int) -> None:
    if gpus != "auto" and len(gpus) < size:
        return
    wanted = spec(gpus=gpus, tensor_parallel_size=size)
    answer = place(wanted, need, room, CARDS)
    may = {uuid for uuid in allowed(wanted, CARDS)[0] if room.get(uuid, -1) >= need}
    if isinstance(answer, Refused):
        assert len(may) < size
        return
    assert len(set(answer.gpus)) == len(answer.gpus) == size
    assert set(answer.gpus) <= may
    assert all(room[other] <= min(room[uuid] for uuid in answer.gpus) for other in may - set(answer.gpus))


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
