"""Objects that only hold each other are freed also where hardly anything new comes, so that Python itself would not look."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from orchestrator import garbage
from tests.support.eventually import eventually


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def as_the_daemon() -> Iterator[None]:
    """And Python does not look by itself at all."""
    before = gc.get_threshold()
    gc.disable()
    yield
    gc.enable()
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.asyncio
async def test_a_cycle_is_freed(as_the_daemon: None) -> None:
    garbage.settle()
    cycle = Cycle()
    ended = weakref.ref(cycle)
    del cycle
    collecting = asyncio.create_task(garbage.collect(0.01))
    try:
        await eventually(lambda: ended() is None, "the cycle is freed")
    finally:
        collecting.cancel()


def test_what_was_there_at_the_start_is_never_looked_at_again(as_the_daemon: None) -> None:
    cycle = Cycle()
    garbage.settle()
    frozen = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert frozen() is not None
