"""What survives a restart, as data: events, and what the store gives back at boot."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.policy.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Event:
    """One real change, with its reason. `at`: seconds since the epoch. `kind`: the state it led to, or what an operator did. `id`: grows
    from each that is kept to the next, also over restarts; 0: not kept yet."""

    at: float
    model: str
    kind: str
    reason: str
    id: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Stored:
    models: tuple[ModelSpec, ...] = ()
    held: frozenset[str] = frozenset()
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    footprints: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
