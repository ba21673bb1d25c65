"""What requests of each model find: open for a READY one, shut with the reason where waiting would not help, else they wait.

Pure: the loop's plan in, a Door out. How long it will take is what the model has shown (footprint), less what has passed.
"""

from orchestrator.control.traffic import Door
from orchestrator.errors import ModelNotFound, ModelUnavailable
from orchestrator.policy.decide import Plan
from orchestrator.policy.footprint import fitting_tokens
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.resident import START_S
from orchestrator.policy.snapshot import Snapshot

SHUT_S = 60.0  # Retry-After where only an operator can change it


def door(name: str, model: Known | None, plan: Plan, snapshot: Snapshot) -> Door:
    instance = plan.instances.get(name)
    if model is None or instance is None:
        return Door(error=ModelNotFound(f"The model {name!r} was removed.", param="model"))
    if model.held:
        message = f"The model {name!r} was stopped by an operator; `orchestratorctl start {name}` brings it back."
        return Door(error=ModelUnavailable(message, code="model_stopped", retry_after_s=SHUT_S))
    if instance.state is State.FAILED:
        return Door(error=ModelUnavailable(f"The model {name!r} has failed: {instance.reason}", code="model_failed", retry_after_s=SHUT_S))
    ready = instance.launch.id if instance.state is State.READY and instance.launch else None
    pool = plan.pools.get(ready) if ready else None
    return Door(
        launch_id=ready,
        retry_after_s=max(1.0, _remaining_s(instance, model, snapshot.now)),
        max_concurrency=model.spec.max_concurrency,
        max_queue=model.spec.max_queue,
        fitting_tokens=fitting_tokens(model.footprint, pool.sure_bytes) if pool else None,
        phase=_phase(instance, snapshot),
        timed=model.footprint.start_s is not None,
    )


def shutting_down() -> Door:
    return Door(error=ModelUnavailable("The daemon is shutting down.", code="shutting_down", retry_after_s=30))


def _remaining_s(instance: Instance, model: Known, now: float) -> float:
    """Until it is ready, as far as one can know."""
    footprint = model.footprint
    start_s = (instance.launch.expected_start_s if instance.launch else None) or footprint.start_s or START_S
    passed = now - instance.since
    until_turn = max(0.0, instance.retry_at - now)  # in BACKOFF, and where somebody else must be there long enough before it goes
    match instance.state:
        case State.READY:
            return 0.0
        case State.STARTING:
            return start_s - passed
        case State.WAKING:
            return footprint.wake_s - passed
        case State.ASLEEP:
            return until_turn + footprint.wake_s
        case State.DRAINING if instance.sent_at is not None:
            return (footprint.sleep_again_s if instance.slept else footprint.sleep_s) + footprint.wake_s - passed
    return until_turn + start_s


def _phase(instance: Instance, snapshot: Snapshot) -> str:
    seen = snapshot.engines.get(instance.launch.id) if instance.launch else None
    if instance.state is State.STARTING and seen is not None:
        return f"{instance.state}, {seen.phase}"
    if instance.state is State.READY:
        return str(instance.state)
    return f"{instance.state}, {instance.reason}"
