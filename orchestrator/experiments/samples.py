"""What one look saw: a frozen row. Bytes, and seconds since the experiment began."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Held(NamedTuple):
    """Of one model: what its engine holds besides KV, and the KV that is mapped. A static engine's KV is no figure of its own: fixed."""

    fixed_bytes: int
    kv_bytes: int
    state: str


@dataclass(frozen=True)
class Sample:
    """`used_bytes`: of all GPUs that are looked at, as the driver says. `foreign_bytes`: of processes that are neither the daemon's
    engines nor ours; None where the driver names none."""

    at_s: float
    used_bytes: int
    foreign_bytes: int | None = None
    models: Mapping[str, Held] = field(default_factory=dict)
