"""Specs that can not work here are refused with the field, the arithmetic and the mend; nothing of them is kept."""

import pytest

from orchestrator.control.registry import Registry
from orchestrator.errors import SpecError
from orchestrator.policy.footprint import Shape
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB
from tests.control.fakes import BUNDLE, FakeSources, FakeStore, spec
from tests.control.shelf import Shelf

pytestmark = pytest.mark.asyncio


async def test_every_fault_of_a_spec_is_told_at_once() -> None:
    shelf = await Shelf().load()
    shelf.sources.bad["/models/small"] = "there is no folder '/models/small'"
    error = await shelf.refused(spec("a", engine="gpu2", gpus=[5, "GPU-1"]))
    assert [problem.where for problem in error.problems] == ["engine", "source", "gpus"]
    assert "known: default" in error.message
    assert "no GPU here is 5; there are: 0 (GPU-0), 1 (GPU-1)" in error.message


async def test_more_ranks_than_gpus() -> None:
    shelf = await Shelf().load()
    error = await shelf.refused(spec("a", tensor_parallel_size=3))
    assert [problem.where for problem in error.problems] == ["tensor_parallel_size"]
    assert "3 GPUs wanted, 2 here" in error.message


async def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    shelf = await Shelf().load()
    shelf.sources.shapes["/models/small"] = Shape(100 * GIB, 80, 8, 128, 8192, "safetensors")
    error = await shelf.refused(spec("a"))
    for part in ("can never fit", "weights 100.0GiB", "context 1024MiB", "KV floor", "80.0GiB", "in reserve", "tensor_parallel_size"):
        assert part in error.message
    await shelf.add(spec("a", tensor_parallel_size=2))  # 50 GiB on each of two do


async def test_what_fits_to_the_byte_is_taken_and_a_byte_more_is_not() -> None:
    """A card whose size is what is needed: parts, KV floor and the reserve."""
    shelf = await Shelf().load()
    await shelf.add(spec("probe"))
    footprint = shelf.registry.get("probe").footprint
    floor = 6 * BUNDLE
    need = footprint.start_bytes + floor
    registry = Registry(FakeStore(), FakeSources(), (), ["default"], Rules(reserve_bytes=1 * GIB))
    await registry.load()
    exact, short = (GpuReading("GPU-0", 0, "Fake", total, total) for total in (need + GIB, need + GIB - 1))
    with pytest.raises(SpecError, match="can never fit"):
        await registry.add(spec("a", kv_floor=floor), [short], True)
    await registry.add(spec("a", kv_floor=floor), [exact], True)


async def test_a_learned_footprint_decides_too() -> None:
    store = FakeStore(footprints={spec("a").footprint_key(): {"start_bytes": 90.0 * GIB, "ready_bytes": 88.0 * GIB, "start_s": 9.0}})
    error = await (await Shelf(store=store).load()).refused(spec("a"))
    assert "learned 90.0GiB" in error.message


async def test_an_unknown_shape_is_not_refused_for_its_size() -> None:
    shelf = await Shelf().load()
    shelf.sources.shapes["/models/small"] = None
    tiny = GpuReading("GPU-0", 0, "Fake", 1 * GIB, 1 * GIB)
    await shelf.add(spec("a"), gpus=[tiny])
    assert not shelf.registry.get("a").footprint.known


async def test_a_ceiling_that_cannot_hold_one_request() -> None:
    shelf = await Shelf().load()
    error = await shelf.refused(spec("a", kv_ceiling=2 * BUNDLE))
    assert [problem.where for problem in error.problems] == ["kv_ceiling"]
    assert "one request of 32768 tokens" in error.message
    assert "--max-model-len" in error.message
    await shelf.add(spec("a", kv_ceiling=2 * BUNDLE, args=["--max-model-len", "4k"]))
