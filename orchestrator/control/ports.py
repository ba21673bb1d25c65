"""What the loop needs of the outside, as Protocols owned by their user. drivers/ implements them; a fake and the real thing
pass the same contract tests (tests/contract)."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from orchestrator.policy.footprint import Shape
from orchestrator.policy.instance import Launch
from orchestrator.policy.key import StoredKey, Used
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment
from orchestrator.policy.stored import Event, Stored


class Gpus(Protocol):
    def read(self) -> Sequence[GpuReading]:
        """All GPUs now; one that can not be read now is as it was last, with `error`. Blocks (the driver may take its time), so it is
        called in a thread. Raises OSError if nothing can be read."""
        ...


class Engines(Protocol):
    """Engine processes. start and stop return at once: what becomes of them is seen by look()."""

    async def adopt(self) -> Sequence[Launch]:
        """Once, at boot: take over what a former daemon's records name and still runs; clean up after the rest."""
        ...

    def start(self, launch: Launch) -> None: ...

    def stop(self, launch_id: str) -> None:
        """End every process of its session, harder as time passes, then remove what it leaves. Asking again is harmless."""
        ...

    def set_limit(self, launch_id: str, limit_bytes: int) -> None:
        """Write and read back the limit, and have the engine apply it. Raises OSError where the segment is not there."""
        ...

    def sleep(self, launch_id: str, level: int) -> None:
        """Move its weights to host memory (1) or drop them (2). Returns at once; what does not sleep then has an error."""
        ...

    def wake(self, launch_id: str) -> None:
        """Bring its weights back. Returns at once; it is awake when it has answered a token."""
        ...

    def trim(self, launch_id: str) -> None:
        """Have an idle engine give back what it can do without. Returns at once; asking again meanwhile is harmless."""
        ...

    def repair(self, launch_id: str) -> None:
        """Make its segment anew, with what the engine says of itself. Returns at once; asking again meanwhile is harmless."""
        ...

    def look(self) -> Mapping[str, EngineSeen]: ...

    def segments(self) -> Mapping[str, Segment | None]:
        """The segments alone, of the engines that look() has shown before: cheaper, and one that was removed since may be missed."""
        ...

    def forget(self, launch_id: str) -> None:
        """Its end was seen; look() need not name it again."""
        ...


class Sources(Protocol):
    def problem(self, spec: ModelSpec) -> str | None:
        """Why this source can not be served from here, or None. A hub id that is not downloaded is no problem."""
        ...

    def shape(self, spec: ModelSpec) -> Shape | None: ...


class Store(Protocol):
    """What must survive a restart. Every call returns when it is durable; raises StoreError."""

    async def load(self) -> Stored: ...

    async def put_model(self, spec: ModelSpec, added_at: float) -> None: ...

    async def remove_model(self, name: str) -> None: ...

    async def change_models(self, put: Sequence[ModelSpec], removed: Sequence[str], at: float) -> None:
        """All of it or nothing. What was changed of each is forgotten; one that was there stays held if it was."""
        ...

    async def set_overrides(self, name: str, overrides: Mapping[str, object]) -> None: ...

    async def set_held(self, name: str, held: bool) -> None: ...

    async def put_footprint(self, key: str, figures: Mapping[str, float]) -> None: ...

    async def add_events(self, events: Sequence[Event]) -> None:
        """Never raises StoreError, as put_footprint: what can not be written now is kept for later."""
        ...

    async def events(self, model: str | None, limit: int, kind: str | None = None, since: float = 0.0, after: int = 0) -> Sequence[Event]:
        """The newest `limit`, oldest first: of one model or of all, of a kind, not older than `since` (epoch), with an id above `after`."""
        ...


class KeyStore(Protocol):
    """Keys and their usage. Every call returns when it is durable; raises StoreError, and then nothing was changed."""

    async def keys(self) -> tuple[Sequence[StoredKey], bool]:
        """And whether there was ever any, also one that this version does not understand."""
        ...

    async def put_key(self, key: StoredKey) -> None: ...

    async def revoke_key(self, name: str, at: float) -> None: ...

    async def add_usage(self, used: Sequence[tuple[Used, str]], last_used_at: Mapping[str, float]) -> None: ...

    async def usage(self, key: str | None = None, since: str = "") -> Sequence[Used]: ...
