"""When Python looks for objects that hold each other and nobody else: once a minute, at all that is newer than the daemon's start.

Python by itself looks when new objects are many, and under steady load there are hardly any: a request leaves none, the cycles of
operators' calls are few. They would wait for hours, and so would Python's lists of freed tuples, which only a full collection empties.
What was there at the start is frozen, so that one takes milliseconds.
"""

import asyncio
import gc

FULL_S = 60.0
NEW = 5_000  # objects until Python looks by itself; at its own 700 that was a twelfth of a busy daemon's time


def settle() -> None:
    """What is there now stays: no collection needs to look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW)


async def collect(every_s: float = FULL_S) -> None:
    while True:
        await asyncio.sleep(every_s)
        gc.collect()
