"""Wait for a condition with a deadline. A test that sleeps for a fixed time is either slow or wrong; these are neither.

The deadline is far above what is ever needed: it is there so that a fault fails loudly, not so that it is met.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DEADLINE_S = 30.0
POLL_S = 0.01


async def eventually(probe: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `probe`."""
    end = time.monotonic() + deadline_s
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return value


def eventually_now(probe: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The same where there is no event loop."""
    end = time.monotonic() + deadline_s
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(POLL_S)
    return value


async def turns(count: int = 10) -> None:
    """Let everything run that is ready to run: `count` rounds of the event loop, no time."""
    for _ in range(count):
        await asyncio.sleep(0)
