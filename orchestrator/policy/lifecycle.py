"""One model's next move, from what is wanted of it and what is seen of its engine. Level-triggered: it never asks how it came here.

A start that crashed, an engine that died, one found running after the daemon restarted: all are "seen differently than wanted".
The one move that is not made here is WAITING -> STARTING, because memory is a matter between models (decide.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.policy.actions import Action, Learn, Stop
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import Failure, Instance, State
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.restart import STABLE_S, Retry, after_failure
from orchestrator.policy.snapshot import EngineSeen, Snapshot, TrafficSeen

NEVER = -1e9  # on the loop's clock
RETURN_TIMEOUT_S = 60.0  # NVML shows a killed 7B engine's memory for 4 s (H200); after this long we stop waiting for it


@dataclass(frozen=True, slots=True)
class Known:
    """One registered model: its spec, and what operators did to it. `started_at`: the loop's clock at the last `start`.

    `overrides`: what `orchestratorctl limit` changed; the spec has them already.
    """

    spec: ModelSpec
    footprint: Footprint
    owner: str = "file"
    held: bool = False
    started_at: float = NEVER
    overrides: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings that decisions need."""

    reserve_bytes: int | None = None  # per GPU; None: 3 % of the card, at least 0.5 GiB more than kvcached's own headroom
    drain_timeout_s: float = 60.0


def wanted(known: Known | None, traffic: TrafficSeen, instance: Instance, now: float) -> tuple[bool, str]:
    """Should this model have an engine now, and why. Idle time counts from when it was ready, used or asked for, the latest."""
    if known is None:
        return False, "removed"
    if known.held:
        return False, "stopped by an operator"
    if traffic.in_flight or traffic.waiting:
        return True, f"{traffic.in_flight + traffic.waiting} requests"
    used = traffic.last_used if traffic.last_used is not None else NEVER
    by_hand = known.started_at > used
    if instance.state is State.STARTING or (by_hand and instance.state in (State.WAITING, State.BACKOFF)):
        return True, "asked for"  # carried through: a start may take longer than idle_timeout, and who asked may have gone
    last = max(known.started_at, used, instance.since if instance.state is State.READY else NEVER)
    if last == NEVER:
        return False, "nobody has asked for it yet"
    if known.spec.pinned or known.spec.idle_timeout is None:
        return True, "pinned" if known.spec.pinned else "it has no idle timeout"
    if now - last < known.spec.idle_timeout:
        return True, "asked for" if by_hand else "used lately"
    return False, f"idle for {known.spec.idle_timeout:.0f}s"


def step(instance: Instance, known: Known | None, snapshot: Snapshot, rules: Rules) -> tuple[Instance, list[Action]]:
    """The next instance and what to do. At most one move a look."""
    now = snapshot.now
    traffic = snapshot.traffic.get(instance.model, TrafficSeen())
    want, why = wanted(known, traffic, instance, now)
    seen = snapshot.engines.get(instance.launch.id) if instance.launch else None
    match instance.state:
        case State.STOPPED if want:
            return instance.to(State.WAITING, now, why, failures=0), []
        case State.WAITING if not want:
            return instance.to(State.STOPPED, now, why, reserved=False), []
        case State.STARTING:
            return _starting(instance, known, seen, snapshot, want, why)
        case State.READY:
            return _ready(instance, known, seen, now, want, why)
        case State.DRAINING:
            return _draining(instance, known, seen, traffic, now, want, why, rules)
        case State.STOPPING:
            return _stopping(instance, seen, snapshot)
        case State.BACKOFF:
            if not want:
                return instance.to(State.STOPPED, now, why), []
            if now >= instance.retry_at or (known and known.started_at > instance.since):
                return instance.to(State.WAITING, now, f"trying again after {instance.failures} failures"), []
        case State.FAILED:
            if known is None or known.held:
                return instance.to(State.STOPPED, now, why), []
            if known.started_at > instance.since:
                return instance.to(State.WAITING, now, "started by an operator", failures=0, failure=None), []
    return instance, []


def _starting(
    instance: Instance, known: Known | None, seen: EngineSeen | None, snapshot: Snapshot, want: bool, why: str
) -> tuple[Instance, list[Action]]:
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine did not start", was_ready=False)
    mapped = seen.segment.mapped_bytes if seen.segment else 0
    held = max((snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus), default=0)
    instance = replace(instance, peak_bytes=max(instance.peak_bytes, held - mapped))
    if not want:
        return instance.to(State.STOPPING, now, why), [Stop(launch.id, instance.model, why)]
    if seen.ready:
        took = now - seen.started_at
        learned: list[Action] = []
        if held and not seen.adopted:
            key = launch.spec.footprint_key()
            learned.append(Learn(instance.model, key, start_bytes=instance.peak_bytes, ready_bytes=held - mapped, start_s=took))
        return instance.to(State.READY, now, "answers" if seen.adopted else f"started in {took:.1f}s"), learned
    timeout = known.spec.start_timeout if known else launch.spec.start_timeout
    if now - instance.since > timeout:
        reason = f"not ready after {timeout:.0f}s (start_timeout); it was at: {seen.phase}"
        return _fail(instance, seen, now, reason, was_ready=False)
    return instance, []


def _ready(
    instance: Instance, known: Known | None, seen: EngineSeen | None, now: float, want: bool, why: str
) -> tuple[Instance, list[Action]]:
    assert instance.launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine died", was_ready=True)
    if not want:
        return instance.to(State.DRAINING, now, why), []
    if known and not known.spec.served_by(instance.launch.spec):
        return instance.to(State.DRAINING, now, "its spec changed"), []
    if instance.failures and now - instance.since > STABLE_S:
        return replace(instance, failures=0, failure=None), []
    return instance, []


def _draining(
    instance: Instance,
    known: Known | None,
    seen: EngineSeen | None,
    traffic: TrafficSeen,
    now: float,
    want: bool,
    why: str,
    rules: Rules,
) -> tuple[Instance, list[Action]]:
    assert instance.launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine died", was_ready=True)
    same = known is not None and known.spec.served_by(instance.launch.spec)
    if want and same:
        return instance.to(State.READY, now, f"wanted again: {why}"), []
    if traffic.in_flight == 0 or now - instance.since > rules.drain_timeout_s:
        cut = f"; {traffic.in_flight} requests cut after {rules.drain_timeout_s:.0f}s" if traffic.in_flight else ""
        reason = instance.reason + cut
        return instance.to(State.STOPPING, now, reason), [Stop(instance.launch.id, instance.model, reason)]
    return instance, []


def _stopping(instance: Instance, seen: EngineSeen | None, snapshot: Snapshot) -> tuple[Instance, list[Action]]:
    """Over only when no process is left and NVML shows none of its memory: until then it is nobody's to give away."""
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is not None and not seen.gone:
        return instance, []
    held = sum(snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus)
    if held and now - instance.since < RETURN_TIMEOUT_S:
        return instance, []
    if not instance.failing:
        return instance.to(State.STOPPED, now, instance.reason), []
    assert instance.failure is not None
    answer = after_failure(instance.failures, now, instance.failure.log, instance.failure.was_ready)
    if isinstance(answer, Retry):
        return instance.to(State.BACKOFF, now, f"{instance.reason}; {answer.reason}", failing=False, retry_at=answer.at), []
    return instance.to(State.FAILED, now, f"{instance.reason}; {answer.reason}", failing=False), []


def _fail(instance: Instance, seen: EngineSeen | None, now: float, reason: str, was_ready: bool) -> tuple[Instance, list[Action]]:
    assert instance.launch is not None
    if seen is not None and seen.error:
        reason = f"{reason}: {seen.error}"
    stable = was_ready and now - instance.since > STABLE_S
    failure = Failure(reason, seen.log_tail if seen else (), now, was_ready)
    moved = instance.to(State.STOPPING, now, reason, failing=True, failures=1 if stable else instance.failures + 1, failure=failure)
    return moved, [Stop(instance.launch.id, instance.model, reason)]
