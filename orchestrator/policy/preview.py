"""What loading a model would do, step by step, and nothing done: one decision, made as if an operator had asked for it now.

Seconds are those that the models have shown, or an estimate. Steps of one kind run at the same time where they are on other GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.policy.actions import SetLimit, Start, Wake
from orchestrator.policy.decide import Plan
from orchestrator.policy.footprint import floor_bytes
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.resident import START_S
from orchestrator.policy.units import show_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """`what`: limit (lowered), sleep, stop, start or wake. Bytes per GPU that it gives back, or that it takes (negative)."""

    what: str
    model: str
    bytes: int
    seconds: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Preview:
    """`fits`: now, after (these steps), later (not yet: `why` and `retry_in_s`), or ready (nothing to do)."""

    fits: str
    why: str
    need_bytes: int
    need: Mapping[str, int]
    steps: tuple[Step, ...]
    seconds: float | None
    retry_in_s: float | None = None


def preview(name: str, before: Mapping[str, Instance], plan: Plan, known: Mapping[str, Known], now: float) -> Preview:
    """`plan`: what decide() makes of `before` when `name` is wanted now."""
    model, instance = known[name], plan.instances[name]
    footprint = model.footprint
    was = before.get(name, instance).state
    if was in (State.READY, State.STARTING, State.WAKING) and instance.state is not State.DRAINING:
        return Preview("ready", f"it is {was.value}", 0, {}, (), 0.0 if was is State.READY else None)
    asleep = was is State.ASLEEP
    floor = floor_bytes(model.spec, footprint)
    wakes = max(0, footprint.ready_bytes - footprint.asleep_bytes)
    need = {"weights and the rest": wakes, "KV floor": floor} if asleep else {**footprint.parts, "KV floor": floor}
    total = wakes + floor if asleep else footprint.start_bytes + floor
    steps = [
        Step("limit", a.model, a.was_bytes - a.limit_bytes, None, a.reason)
        for a in plan.actions
        if isinstance(a, SetLimit) and a.limit_bytes < a.was_bytes
    ]
    for victim in plan.leaving:
        steps.append(Step(victim.how, victim.model, victim.frees_bytes, victim.takes_s, victim.reason))
    acts = [a for a in plan.actions if isinstance(a, Start | Wake) and (a.launch.spec.name if isinstance(a, Start) else a.model) == name]
    retry_in_s = instance.retry_at - now if instance.retry_at > now else None
    if not acts and not plan.leaving and not instance.reserved and "on their way" not in instance.reason:
        return Preview("later", instance.reason, total, need, (), None, retry_in_s)
    seconds = footprint.wake_s if asleep else footprint.start_s or START_S
    steps.append(Step("wake" if asleep else "start", name, -total, seconds, f"it needs {show_bytes(total)} on each of its GPUs"))
    known_s = [step.seconds for step in steps if step.seconds is not None]
    return Preview("now" if acts else "after", instance.reason, total, need, tuple(steps), sum(known_s))
