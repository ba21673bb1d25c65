"""The fixture of the tests that start engines."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.simulated import Workshop, workshop


@pytest_asyncio.fixture
async def shop() -> AsyncIterator[Workshop]:
    async with workshop() as made:
        yield made
