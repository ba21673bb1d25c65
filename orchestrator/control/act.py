"""The only place that changes the world: a plan's actions -> calls of the ports, in the plan's order. Never waits, never decides."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from orchestrator.control.ports import Engines
from orchestrator.control.registry import Registry
from orchestrator.policy.actions import Action, Learn, Repair, SetLimit, Sleep, Start, Stop, Trim, Wake
from orchestrator.policy.units import show_bytes

log = logging.getLogger(__name__)


def act(actions: tuple[Action, ...], engines: Engines, registry: Registry, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """`spawn` runs a coroutine beside the loop and logs its failure."""
    for action in actions:
        match action:
            case Start(launch=launch):
                engines.start(launch)
            case Stop(launch_id=launch_id):
                engines.stop(launch_id)
            case SetLimit():
                _set_limit(action, engines)
            case Sleep(launch_id=launch_id, level=level):
                engines.sleep(launch_id, level)
            case Wake(launch_id=launch_id):
                engines.wake(launch_id)
            case Trim(launch_id=launch_id):
                log.debug("%s: gives back what it can do without: %s", action.model, action.reason)
                engines.trim(launch_id)
            case Repair(launch_id=launch_id):
                log.debug("%s: %s", action.model, action.reason)
                engines.repair(launch_id)
            case Learn():
                spawn(registry.learn(action))


def _set_limit(action: SetLimit, engines: Engines) -> None:
    said = f"{action.model}: limit {show_bytes(action.was_bytes)} -> {show_bytes(action.limit_bytes)}: {action.reason}"
    try:
        engines.set_limit(action.launch_id, action.limit_bytes)
    except OSError as error:  # the engine went away between the look and the write: the next look sees it
        log.warning("%s: not written: %s", said, error)
    else:
        log.debug("%s", said)
