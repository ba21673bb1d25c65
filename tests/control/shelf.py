"""A registry and what it stands on, for the tests of the registry."""

from collections.abc import Sequence

import pytest

from orchestrator.control.registry import Registry
from orchestrator.errors import ModelNotFound, SpecError
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB
from tests.control.fakes import Clock, FakeSources, FakeStore

CARDS = [GpuReading(f"GPU-{n}", n, "Fake", 80 * GIB, 79 * GIB) for n in range(2)]


class Shelf:
    """A registry and what it stands on."""

    def __init__(self, *files: ModelSpec, store: FakeStore | None = None) -> None:
        self.store, self.sources, self.clock = store or FakeStore(), FakeSources(), Clock()
        self.registry = Registry(self.store, self.sources, files, ["default"], Rules(), self.clock)

    async def load(self) -> "Shelf":
        await self.registry.load()
        return self

    async def add(self, added: ModelSpec, gpus: Sequence[GpuReading] = CARDS, start: bool = True) -> None:
        await self.registry.add(added, gpus, start)

    async def limit(self, name: str, **changes: object) -> None:
        await self.registry.limit(name, changes, CARDS)

    async def refused(self, added: ModelSpec, gpus: Sequence[GpuReading] = CARDS) -> SpecError:
        with pytest.raises(SpecError) as error:
            await self.add(added, gpus)
        assert not self.store.models
        assert not self.registry.known()
        with pytest.raises(ModelNotFound):
            self.registry.resolve(added.name)
        return error.value
