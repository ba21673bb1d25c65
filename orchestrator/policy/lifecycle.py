"""One model's next move, from what is wanted of it and what is seen of its engine. Level-triggered: it never asks how it came here.

A start that crashed, an engine that died, one found running after the daemon restarted: all are "seen differently than wanted".
The one move that is not made here is WAITING -> STARTING, because memory is a matter between models (decide.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.policy.actions import Action, Learn, Stop
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import Failure, Instance, State, Then
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.restart import STABLE_S, Retry, after_failure, after_hindrance
from orchestrator.policy.snapshot import EngineSeen, Snapshot, TrafficSeen

NEVER = -1e9  # on the loop's clock
RETURN_TIMEOUT_S = 60.0  # NVML shows a killed 7B engine's memory for 4 s (H200); after this long we stop waiting for it
SLEEP_TIMEOUT_S = 300.0  # the first sleep pins host memory: 11 to 20 s for 15 GB (H200)
WAKE_TIMEOUT_S = 120.0  # 0.33 s for 15 GB
UNDYING = "; SIGKILL does not end "
ASLEEP_TIMEOUT_S = 10.0  # after it says that it sleeps NVML must show less


class Want(StrEnum):
    """What a model should be."""

    NOTHING = "nothing"  # no engine
    ASLEEP = "asleep"  # or less: a model without an engine is not started to be put to sleep
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Known:
    """One registered model: its spec, and what operators did to it. Times are of the loop's clock, NEVER where it was not done.

    `started_at`: the last start, load or wake. `rested_at`: the last sleep or unload, and `rest` which of them; it holds until the
    model is used. `drained_at`: the last drain. `overrides`: what operators changed of the spec; it has them already.
    """

    spec: ModelSpec
    footprint: Footprint
    owner: str = "file"
    held: bool = False
    started_at: float = NEVER
    rested_at: float = NEVER
    rest: Want = Want.NOTHING
    drained_at: float = NEVER
    overrides: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings that decisions need."""

    reserve_bytes: int | None = None  # per GPU; None: 3 % of the card, at least 0.5 GiB more than kvcached's own headroom
    drain_timeout_s: float = 60.0
    host_budget_bytes: int = 1 << 62  # of host memory, for all that sleep
    stopping: bool = False  # the daemon itself: no model is known any more


def wanted(known: Known | None, traffic: TrafficSeen, instance: Instance, now: float) -> tuple[Want, str]:
    """What this model should be now, and why. Idle time counts from when it was ready, used or asked for, the latest."""
    if known is None:
        return Want.NOTHING, "removed"
    if known.held:
        return Want.NOTHING, "stopped by an operator"
    if traffic.in_flight or traffic.waiting:
        return Want.READY, f"{traffic.in_flight + traffic.waiting} requests"
    spec = known.spec
    used = traffic.last_used if traffic.last_used is not None else NEVER
    if known.rested_at > NEVER and known.rested_at >= max(known.started_at, used):
        return known.rest, "put to sleep by an operator" if known.rest is Want.ASLEEP else "unloaded by an operator"
    gone = instance.yielded_at is not None and instance.state not in (State.DRAINING, State.ASLEEP)
    if gone and known.started_at <= (instance.yielded_at or NEVER):
        return Want.NOTHING, instance.reason
    by_hand = known.started_at > used
    asleep = instance.state is State.ASLEEP and known.started_at > instance.since
    if instance.state in (State.STARTING, State.WAKING) or asleep or (by_hand and instance.state in (State.WAITING, State.BACKOFF)):
        return Want.READY, "asked for"  # carried through: a start may take longer than idle_timeout, and who asked may have gone
    last = max(known.started_at, used, instance.since if instance.state is State.READY else NEVER)
    if last == NEVER and instance.state is State.ASLEEP:
        last = instance.since  # found so: who used it is not known any more
    if last == NEVER:
        return Want.NOTHING, "nobody has asked for it yet"
    if spec.pinned:
        return Want.READY, "pinned"
    idle = now - last
    if spec.idle_timeout is not None and idle >= spec.idle_timeout:
        return Want.NOTHING, f"idle for {spec.idle_timeout:.0f}s"
    if instance.state is State.ASLEEP:
        return Want.ASLEEP, instance.reason  # it wakes when somebody asks for it
    if can_sleep(spec, instance) and spec.sleep_timeout is not None and idle >= spec.sleep_timeout:
        return Want.ASLEEP, f"idle for {spec.sleep_timeout:.0f}s"
    return Want.READY, "asked for" if by_hand else "used lately" if spec.idle_timeout is not None else "it has no idle timeout"


def can_sleep(spec: ModelSpec, instance: Instance) -> bool:
    """One that failed lately does not: it may be the waking that it does not survive."""
    return spec.sleep_level > 0 and instance.failures == 0


def step(instance: Instance, known: Known | None, snapshot: Snapshot, rules: Rules) -> tuple[Instance, list[Action]]:
    """The next instance and what to do. At most one move a look."""
    now = snapshot.now
    traffic = snapshot.traffic.get(instance.model, TrafficSeen())
    want, why = wanted(known, traffic, instance, now)
    if known is None and rules.stopping:
        why = "the daemon stops"
    seen = snapshot.engines.get(instance.launch.id) if instance.launch else None
    match instance.state:
        case State.STOPPED if want is Want.READY:
            if _forgiven(instance, known, now):
                return instance.to(State.WAITING, now, why, failures=0), []
            if now >= instance.retry_at:
                return instance.to(State.WAITING, now, why), []
        case State.WAITING if want is not Want.READY:
            return instance.to(State.STOPPED, now, why, reserved=False, retry_at=0.0), []
        case State.STARTING:
            return _starting(instance, known, seen, snapshot, want, why)
        case State.READY:
            return _ready(instance, known, seen, now, want, why)
        case State.DRAINING:
            return _draining(instance, known, seen, snapshot, want, why, rules)
        case State.ASLEEP:
            return _asleep(instance, known, seen, now, want, why)
        case State.WAKING:
            return _waking(instance, seen, snapshot, want, why)
        case State.STOPPING:
            return _stopping(instance, seen, snapshot)
        case State.BACKOFF:
            if want is not Want.READY:
                return instance.to(State.STOPPED, now, why), []
            if now >= instance.retry_at or (known and known.started_at > instance.since):
                again = f" after {instance.failures} failures" if instance.failures else ""
                return instance.to(State.WAITING, now, f"trying again{again}"), []
        case State.FAILED:
            if known is None or known.held:
                return instance.to(State.STOPPED, now, why), []
            if known.started_at > instance.since:
                return instance.to(State.WAITING, now, "started by an operator", failures=0, failure=None), []
    return instance, []


def _forgiven(instance: Instance, known: Known | None, now: float) -> bool:
    """One that failed lately begins where it left off when somebody asks again: impatient users are no reason to start it without end."""
    by_hand = known is not None and known.started_at > instance.since
    return instance.failure is None or by_hand or now - instance.failure.at > STABLE_S


def _starting(
    instance: Instance, known: Known | None, seen: EngineSeen | None, snapshot: Snapshot, want: Want, why: str
) -> tuple[Instance, list[Action]]:
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine did not start", was_ready=False)
    mapped = seen.segment.mapped_bytes if seen.segment else 0
    held = max((snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus), default=0)
    instance = replace(instance, peak_bytes=max(instance.peak_bytes, held - mapped))
    if want is not Want.READY:
        return instance.to(State.STOPPING, now, why), [Stop(launch.id, instance.model, why)]
    if seen.ready:
        took = now - seen.started_at
        learned: list[Action] = []
        if held and not seen.adopted:
            figures = {"start_bytes": instance.peak_bytes, "ready_bytes": held - mapped, "start_s": took}
            learned.append(Learn(instance.model, launch.spec.footprint_key(), figures))
        if seen.asleep:
            return instance.to(State.ASLEEP, now, "found asleep"), []
        return instance.to(State.READY, now, "answers" if seen.adopted else f"started in {took:.1f}s"), learned
    timeout = known.spec.start_timeout if known else launch.spec.start_timeout
    if now - instance.since > timeout:
        reason = f"not ready after {timeout:.0f}s (start_timeout); it was at: {seen.phase}"
        return _fail(instance, seen, now, reason, was_ready=False)
    return instance, []


def _ready(
    instance: Instance, known: Known | None, seen: EngineSeen | None, now: float, want: Want, why: str
) -> tuple[Instance, list[Action]]:
    assert instance.launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, _end_of(seen), was_ready=True)
    if want is not Want.READY:
        return instance.to(State.DRAINING, now, why, then=Then.SLEEP if want is Want.ASLEEP else Then.STOP), []
    if known and not known.spec.served_by(instance.launch.spec):
        return instance.to(State.DRAINING, now, "its spec changed"), []
    if known and known.drained_at >= instance.since:
        return instance.to(State.DRAINING, now, "drained by an operator", yielded_at=now), []
    if instance.failures and now - instance.since > STABLE_S:
        return replace(instance, failures=0, failure=None), []
    return instance, []


def _draining(
    instance: Instance, known: Known | None, seen: EngineSeen | None, snapshot: Snapshot, want: Want, why: str, rules: Rules
) -> tuple[Instance, list[Action]]:
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, _end_of(seen), was_ready=True)
    if instance.sent_at is not None:
        return _falling_asleep(instance, seen, snapshot)
    if known and known.drained_at >= instance.since and (instance.then is Then.SLEEP or instance.yielded_at is None):
        instance = replace(instance, then=Then.STOP, yielded_at=now, reason="drained by an operator")
    in_flight = snapshot.traffic.get(instance.model, TrafficSeen()).in_flight
    same = known is not None and known.spec.served_by(launch.spec)
    yields = instance.yielded_at is not None
    if want is Want.READY and same and not yields:
        return instance.to(State.READY, now, f"wanted again: {why}"), []
    if in_flight and (now - instance.since <= rules.drain_timeout_s or (yields and want is not Want.NOTHING)):
        return instance, []  # requests are not cut to make room
    if instance.then is Then.SLEEP and want is not Want.NOTHING and not in_flight:
        return instance, []  # it sleeps when it is its turn on its GPUs (decide.py)
    cut = f"; {in_flight} requests cut after {rules.drain_timeout_s:.0f}s" if in_flight else ""
    reason = instance.reason + cut
    return instance.to(State.STOPPING, now, reason), [Stop(launch.id, instance.model, reason)]


def _falling_asleep(instance: Instance, seen: EngineSeen, snapshot: Snapshot) -> tuple[Instance, list[Action]]:
    """Over when the engine says so and NVML shows it."""
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    passed = now - (instance.sent_at or now)
    if not seen.asleep:
        if passed > SLEEP_TIMEOUT_S:
            return _fail(instance, seen, now, f"not asleep after {passed:.0f}s", was_ready=True)
        return instance, []
    held = max((snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus), default=0)
    if held and held >= instance.held_bytes and passed < ASLEEP_TIMEOUT_S + (seen.sleep_s or 0.0):
        return instance, []
    figures = {"sleep_again_s" if instance.slept else "sleep_s": seen.sleep_s or 0.0, "host_bytes": float(seen.host_bytes)}
    if held and held < instance.held_bytes:
        figures["asleep_bytes"] = float(max(0, held - (seen.segment.mapped_bytes if seen.segment else 0)))
    return instance.to(State.ASLEEP, now, instance.reason), [Learn(instance.model, launch.spec.footprint_key(), figures)]


def _asleep(
    instance: Instance, known: Known | None, seen: EngineSeen | None, now: float, want: Want, why: str
) -> tuple[Instance, list[Action]]:
    """Where it is wanted it wakes when its memory is there (decide.py)."""
    assert instance.launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine died in its sleep", was_ready=True)
    if want is Want.NOTHING or known is None or not known.spec.served_by(instance.launch.spec):
        reason = why if want is Want.NOTHING else "its spec changed"
        return instance.to(State.STOPPING, now, reason), [Stop(instance.launch.id, instance.model, reason)]
    if want is Want.ASLEEP and instance.reserved:
        return replace(instance, reserved=False), []
    return instance, []


def _waking(instance: Instance, seen: EngineSeen | None, snapshot: Snapshot, want: Want, why: str) -> tuple[Instance, list[Action]]:
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is None or not seen.alive or seen.error:
        return _fail(instance, seen, now, "the engine did not wake", was_ready=True)
    if want is Want.NOTHING:
        return instance.to(State.STOPPING, now, why), [Stop(launch.id, instance.model, why)]
    if not seen.asleep:
        took = seen.wake_s if seen.wake_s is not None else now - instance.since
        return instance.to(State.READY, now, f"woke in {took:.2f}s"), [Learn(instance.model, launch.spec.footprint_key(), {"wake_s": took})]
    if now - instance.since > WAKE_TIMEOUT_S:
        return _fail(instance, seen, now, f"not awake after {WAKE_TIMEOUT_S:.0f}s", was_ready=True)
    return instance, []


def _stopping(instance: Instance, seen: EngineSeen | None, snapshot: Snapshot) -> tuple[Instance, list[Action]]:
    """Over only when no process is left and NVML shows none of its memory: until then it is nobody's to give away."""
    now, launch = snapshot.now, instance.launch
    assert launch is not None
    if seen is not None and not seen.gone:
        undying = f"{UNDYING}{seen.undying}" if seen.undying else ""
        return replace(instance, reason=instance.reason.partition(UNDYING)[0] + undying), []
    instance = replace(instance, reason=instance.reason.partition(UNDYING)[0])
    held = sum(snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus)
    if held and now - instance.since < RETURN_TIMEOUT_S:
        return instance, []
    if not instance.failing:
        return instance.to(State.STOPPED, now, instance.reason), []
    assert instance.failure is not None
    failure = instance.failure
    answer = after_hindrance(now) if failure.hindered else after_failure(instance.failures, now, failure.log, failure.was_ready)
    if isinstance(answer, Retry):
        return instance.to(State.BACKOFF, now, f"{instance.reason}; {answer.reason}", failing=False, retry_at=answer.at), []
    return instance.to(State.FAILED, now, f"{instance.reason}; {answer.reason}", failing=False), []


def _end_of(seen: EngineSeen | None) -> str:
    return "the engine died" if seen is None or not seen.alive else "the engine failed"


def _fail(instance: Instance, seen: EngineSeen | None, now: float, reason: str, was_ready: bool) -> tuple[Instance, list[Action]]:
    assert instance.launch is not None
    if seen is not None and seen.error:
        reason = f"{reason}: {seen.error}"
    stable = was_ready and now - instance.since > STABLE_S
    hindered = seen is not None and seen.hindered
    failure = Failure(reason, seen.log_tail if seen else (), now, was_ready, hindered)
    failures = instance.failures if hindered else 1 if stable else instance.failures + 1
    moved = instance.to(State.STOPPING, now, reason, failing=True, failures=failures, failure=failure)
    return moved, [Stop(instance.launch.id, instance.model, reason)]
