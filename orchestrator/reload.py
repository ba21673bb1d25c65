"""Reload: the config files read anew while the daemon runs. Whole or not at all: what is wrong in them is said, and nothing is changed.

Models follow at once, and so do the settings in LIVE. Every other setting is read once, at the start: one that is another now is named
in the answer, and a restart that keeps the engines makes it so.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import config_errors
from orchestrator.api import projections
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry
from orchestrator.control.shelf import Reloaded
from orchestrator.drivers import systemd
from orchestrator.errors import ConfigError, SpecError
from orchestrator.settings import Settings

log = logging.getLogger("orchestrator")

LIVE = frozenset(
    {
        "log.level", "log.format", "loop.interval", "memory.reserve", "memory.sleepers",
        "requests.drain_timeout", "requests.max_queue", "requests.max_wait",
    }
)  # fmt: skip
RESTART = "`orchestratorctl restart-daemon --keep-engines`"


class Reload:
    """`config`: as the daemon was started with. `heed`: has the settings in LIVE obeyed."""

    def __init__(
        self, config: Settings, files: Sequence[Path], registry: Registry, loop: Reconciler, heed: Callable[[Settings], None]
    ) -> None:
        self._first = self.now = config  # `now`: with what was reloaded
        self._files, self._registry, self._loop, self._heed = files, registry, loop, heed
        self._turn = asyncio.Lock()

    async def __call__(self) -> dict[str, Any]:
        """What was changed. Raises ConfigError with every problem found, StoreError; then nothing was."""
        async with self._turn:
            systemd.reloading("reading the configuration")
            try:
                return await self._reload()
            except ConfigError as error:
                for problem in error.problems:
                    log.error("not reloaded, nothing is changed: %s", problem)
                self._loop.note("", "not reloaded", "; ".join(map(str, error.problems)))
                raise
            finally:
                systemd.notify("READY=1")

    async def read(self) -> Settings:
        """The files as they are now. Raises ConfigError where the daemon could not be started with them."""
        return await asyncio.to_thread(config_errors.load, self._files, os.environ)

    async def _reload(self) -> dict[str, Any]:
        config, source = await asyncio.to_thread(config_errors.read, self._files, os.environ)
        try:
            models = await self._registry.reload(config.models.values(), projections.gpus(self._loop.view))
        except SpecError as error:
            told = [source.problem(p.where, p.what + (f": {RESTART}" if p.where.endswith(".engine") else "")) for p in error.problems]
            raise ConfigError(told) from None
        applied = [name for name in differences(self.now, config) if name in LIVE]
        late = [name for name in differences(self._first, config) if name not in LIVE]
        self.now = config
        self._heed(config)
        self._tell(models, applied, late)
        return {
            "config": [str(path) for path in self._files],
            "models": {
                "added": list(models.added),
                "changed": {name: list(fields) for name, fields in models.changed.items()},
                "removed": list(models.removed),
                "unchanged": models.unchanged,
            },
            "settings": {"applied": applied, "needs_restart": late},
            "warnings": warnings(self._registry),
        }

    def _tell(self, models: Reloaded, applied: Sequence[str], late: Sequence[str]) -> None:
        for name in models.added:
            self._loop.note(name, "added", "by a reload of the config files")
        for name, fields in models.changed.items():
            self._loop.note(name, "changed", f"by a reload of the config files: {', '.join(fields)}")
        for name in models.removed:
            self._loop.note(name, "removed", "by a reload of the config files")
        told = [f"{len(models.added)} models added, {len(models.changed)} changed, {len(models.removed)} removed"]
        told += [f"{models.unchanged} untouched"]
        told += [f"settings now in force: {', '.join(applied)}"] if applied else []
        log.info("reloaded: %s", "; ".join(told))
        if late:
            log.warning("only at the next start: %s; %s", ", ".join(late), RESTART)
        for warning in warnings(self._registry):
            log.warning("%s", warning)
        self._loop.note("", "reloaded", "; ".join(told))


def warnings(registry: Registry) -> list[str]:
    """What is worth a word of what was read, at the start and at each reload."""
    return [
        *(f"{name}: a config file defines this name now; the one added by API is not used" for name in registry.overruled),
        *(
            f"{name}: what `orchestratorctl limit` changed no longer goes with its spec and is not used"
            for name in registry.dropped
        ),
        *map(str, registry.source_problems()),
    ]  # fmt: skip


def differences(before: Settings, after: Settings) -> list[str]:
    """The settings, models aside, that differ: "listen.port". Values are not named: one of them is a key."""
    old, new = dict(_leaves(before.model_dump(exclude={"models"}))), dict(_leaves(after.model_dump(exclude={"models"})))
    return sorted(name for name in old.keys() | new.keys() if name not in old or name not in new or old[name] != new[name])


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}", inner
