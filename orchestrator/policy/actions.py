"""What a plan asks of the world. Each carries its reason; control/act.py does it, and only the next look shows whether it happened."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.policy.instance import Launch


@dataclass(frozen=True, slots=True)
class Start:
    launch: Launch
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine and remove what it leaves. Asking again is harmless."""

    launch_id: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetLimit:
    """Write a pool's limit (bytes per GPU). Within a plan every shrink comes before every grow."""

    launch_id: str
    model: str
    limit_bytes: int
    was_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Trim:
    """An idle engine gives back what it can do without: its prefix cache, reserved pages, what PyTorch keeps."""

    launch_id: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Repair:
    """Make a living engine's segment anew: somebody removed it or changed its size."""

    launch_id: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """An engine that serves nobody moves its weights to host memory (level 1) or drops them (level 2)."""

    launch_id: str
    model: str
    level: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    launch_id: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Learn:
    """Keep what an engine has shown of its footprint (policy/footprint.py). Bytes per GPU, besides KV; seconds."""

    model: str
    footprint_key: str
    figures: Mapping[str, float]


Action = Start | Stop | SetLimit | Trim | Repair | Sleep | Wake | Learn
