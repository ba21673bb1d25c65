"""The fixtures of the tests that start engines."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.support.probes import Bench
from tests.support.simulated import Workshop, workshop


@pytest_asyncio.fixture
async def shop() -> AsyncIterator[Workshop]:
    async with workshop() as made:
        yield made


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        await made.close()
