"""What a plan asks of the world. Each carries its reason; control/act.py does it, and only the next look shows whether it happened."""

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
class Learn:
    """Keep the footprint that a first start showed. Bytes per GPU, besides KV."""

    model: str
    footprint_key: str
    start_bytes: int
    ready_bytes: int
    start_s: float


Action = Start | Stop | SetLimit | Trim | Repair | Learn
