"""When the loop need not decide: what it sees is what it saw, and nobody asks for anything. It looks as often as ever.

decide() is pure, so the same look gives the same plan, but for the time that has passed. What time alone brings (an idle timeout, a trim,
a surplus that drifts) comes in seconds and may wait for two. What follows upon something (a shrink, its settling, the grow into it)
comes within two seconds, and until then the loop is not calm.
"""

from collections.abc import Mapping

from orchestrator.policy.decide import Plan
from orchestrator.policy.instance import State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.snapshot import Snapshot

AFTER_S = 3.0  # without a change; the allocator's longest pause between two moves of a pool is 2 s
DECIDE_S = 2.0  # all the same
RESTING = frozenset({State.STOPPED, State.READY, State.ASLEEP, State.FAILED})


class Calm:
    def __init__(self) -> None:
        self._known: Mapping[str, Known] = {}
        self._snapshot: Snapshot | None = None
        self._moved_at = self._decided_at = 0.0

    def holds(self, known: Mapping[str, Known], snapshot: Snapshot) -> bool:
        """Whether the last plan is good for this look too."""
        if self._snapshot is None or not _same(snapshot, self._snapshot) or known != self._known:
            self._moved_at = snapshot.now
        return snapshot.now - self._moved_at >= AFTER_S and snapshot.now - self._decided_at < DECIDE_S

    def decided(self, known: Mapping[str, Known], snapshot: Snapshot, plan: Plan) -> None:
        self._known, self._snapshot, self._decided_at = known, snapshot, snapshot.now
        if plan.actions or not all(instance.state in RESTING for instance in plan.instances.values()):
            self._moved_at = snapshot.now


def _same(one: Snapshot, other: Snapshot) -> bool:
    return (
        one.engines == other.engines
        and one.gpus == other.gpus
        and one.traffic.keys() == other.traffic.keys()
        and all(
            seen.in_flight == seen.waiting == 0 and seen.last_used == other.traffic[name].last_used for name, seen in one.traffic.items()
        )
    )
