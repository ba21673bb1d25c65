"""What operators are shown: plain functions of the registry's models and of the loop's last look, as JSON takes them.

They change nothing and wait for nothing. Bytes are per GPU unless a name says host; seconds that pass are rounded, and what is told
at each change (`without_clocks`) leaves them out.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.control.reconciler import View
from orchestrator.errors import Problem
from orchestrator.policy import explain
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known, wanted
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.preview import Preview
from orchestrator.policy.snapshot import EngineSeen, GpuReading, TrafficSeen
from orchestrator.policy.stored import Event

SECRET = re.compile(r"TOKEN(?!S)|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)  # of a variable's name; not KVCACHED_MAX_CACHED_TOKENS
HIDDEN = "(hidden)"
Json = dict[str, Any]
Models = Mapping[str, Known]


@dataclass(frozen=True)
class Places:
    """Where to look for an engine: its socket by launch id, its newest log by model. `phases`: of a start, in their order."""

    socket_of: Callable[[str], str]
    log_file: Callable[[str], Path | None]
    phases: tuple[str, ...]


# ---- who is there -----------------------------------------------------------------------------------------------------


def names(known: Models, view: View | None) -> list[str]:
    """Registered models, and removed ones whose engine is not gone yet."""
    return sorted(known.keys() | (view.plan.instances.keys() if view else set()))


def instance(name: str, view: View | None) -> Instance:
    found = view.plan.instances.get(name) if view else None
    return found or Instance(name, reason="just added")


def traffic(name: str, view: View | None) -> TrafficSeen:
    return view.snapshot.traffic.get(name, TrafficSeen()) if view else TrafficSeen()


def gpus(view: View | None) -> list[GpuReading]:
    return sorted(view.snapshot.gpus.values(), key=lambda gpu: gpu.index) if view else []


# ---- one model --------------------------------------------------------------------------------------------------------


def model(name: str, known: Models, view: View | None, places: Places) -> Json:
    registered, found, now = known.get(name), instance(name, view), time.monotonic()
    launch = found.launch if found.state is not State.WAITING else None
    spec = registered.spec if registered else (found.launch.spec if found.launch else None)
    requests = traffic(name, view)
    seen = view.snapshot.engines.get(launch.id) if view and launch else None
    last_used = max(
        (at for at in (requests.last_used, registered.started_at if registered else None) if at is not None and at > -1e9), default=None
    )
    failure = found.failure
    return {
        "name": name,
        "source": spec.source if spec else None,
        "aliases": list(spec.aliases) if spec else [],
        "adapters": dict(spec.adapters) if spec else {},
        "owner": registered.owner if registered else "removed",
        "state": found.state.value,
        "since_s": round(max(0.0, now - found.since), 1) if found.since else 0.0,
        "reason": found.reason,
        "wanted": wanted(registered, requests, found, now)[0].value,
        "held": registered.held if registered else True,
        "in_flight": requests.in_flight,
        "waiting": requests.waiting,
        "idle_s": 0.0 if requests.in_flight else (round(now - last_used, 1) if last_used is not None else None),
        "spec": _spec(spec) if spec else {},
        "overrides": dict(registered.overrides) if registered else {},
        "engine": _engine(found, seen, view, places) if view and launch else None,
        "pool": _pool(launch.id, view) if view and launch else None,
        "failure": None
        if failure is None
        else {
            "reason": failure.reason,
            "log": list(failure.log),
            "count": found.failures,
            "retry_in_s": round(max(0.0, found.retry_at - now), 1) if found.state is State.BACKOFF else None,
        },
        "footprint": _footprint(registered.footprint) if registered else None,
    }


def _spec(spec: ModelSpec) -> Json:
    return {**spec.model_dump(mode="json"), "env": shown_env(spec.env)}


def shown_env(env: Mapping[str, str]) -> dict[str, str]:
    """Less what it must not tell: whoever reads this over a shoulder, or in a ticket, is no operator."""
    return {name: HIDDEN if SECRET.search(name) else value for name, value in env.items()}


def _engine(found: Instance, seen: EngineSeen | None, view: View, places: Places) -> Json:
    launch = found.launch
    assert launch is not None
    phase = seen.phase if seen else places.phases[0]
    return {
        "launch_id": launch.id,
        "pid": seen.pid if seen else None,
        "ipc_name": launch.ipc_name,
        "socket": places.socket_of(launch.id),
        "log": str(places.log_file(found.model) or ""),
        "phase": phase,
        "phase_index": places.phases.index(phase),
        "phase_count": len(places.phases),
        "gpus": list(launch.gpus),
        "gpu_indexes": [view.snapshot.gpus[uuid].index for uuid in launch.gpus if uuid in view.snapshot.gpus],
        "gpu_bytes": sum(view.snapshot.held_bytes(launch.id, uuid) for uuid in launch.gpus),
        "up_s": round(time.monotonic() - seen.started_at, 1) if seen else 0.0,
        "expected_start_s": launch.expected_start_s,
    }


def _pool(launch_id: str, view: View) -> Json | None:
    pool, seen = view.plan.pools.get(launch_id), view.snapshot.engines.get(launch_id)
    if pool is None or seen is None or seen.segment is None:
        return None
    return {
        "limit_bytes": pool.limit_bytes,
        "used_bytes": seen.segment.used_bytes,
        "prealloc_bytes": seen.segment.prealloc_bytes,
        "floor_bytes": pool.floor_bytes,
        "ceiling_bytes": pool.ceiling_bytes,
        "bundle_bytes": pool.bundle_bytes,
        "status": pool.status,
        "reason": pool.reason,
    }


def _footprint(footprint: Footprint) -> Json:
    """Estimated until the engine has shown it: `source` says so of the start, the figures of sleep follow with the first sleep."""
    return {
        "source": footprint.source,
        "total_bytes": footprint.start_bytes,
        "parts": dict(footprint.parts),
        "start_s": footprint.start_s,
        "asleep_bytes": footprint.asleep_bytes,
        "host_bytes": footprint.host_bytes,
        "sleep_s": footprint.sleep_s,
        "sleep_again_s": footprint.sleep_again_s,
        "wake_s": footprint.wake_s,
    }


def without_clocks(shown: Mapping[str, Any]) -> Json:
    """What makes a change worth telling: not the seconds that pass."""
    engine = {k: v for k, v in shown["engine"].items() if k not in ("up_s",)} if shown["engine"] else None
    failure = {k: v for k, v in shown["failure"].items() if k != "retry_in_s"} if shown["failure"] else None
    return {k: v for k, v in shown.items() if k not in ("since_s", "idle_s", "engine", "failure")} | {"engine": engine, "failure": failure}


def event(happened: Event) -> Json:
    return {"at": happened.at, "kind": happened.kind, "reason": happened.reason}


def plan(name: str, found: Preview, held: bool) -> Json:
    """`held`: an operator stopped it, so `load` is refused; the rest is what `start` would do."""
    return {
        "model": name,
        "held": held,
        "fits": found.fits,
        "why": found.why,
        "need_bytes": found.need_bytes,
        "need": dict(found.need),
        "steps": [
            {"what": step.what, "model": step.model, "bytes": step.bytes, "seconds": step.seconds, "why": step.why} for step in found.steps
        ],
        "seconds": found.seconds,
        "retry_in_s": found.retry_in_s,
    }


# ---- the box ----------------------------------------------------------------------------------------------------------


def counts(known: Models, view: View | None) -> dict[str, int]:
    """How many models are in which state."""
    found: dict[str, int] = {}
    for name in names(known, view):
        state = instance(name, view).state.value
        found[state] = found.get(state, 0) + 1
    return found


def budgets(view: View | None) -> list[Json]:
    """Each GPU's memory, divided: reserve + foreign + fixed + claims + pool = total."""
    return [_budget(gpu, view) for gpu in gpus(view)] if view else []


def _budget(gpu: GpuReading, view: View) -> Json:
    budget = view.plan.gpus[gpu.uuid]
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "total_bytes": budget.total_bytes,
        "used_bytes": budget.used_bytes,
        "free_bytes": gpu.free_bytes,
        "reserve_bytes": budget.reserve_bytes,
        "foreign_bytes": budget.foreign_bytes,
        "fixed_bytes": budget.fixed_bytes,
        "claims_bytes": budget.claims_bytes,
        "kv_used_bytes": budget.kv_mapped_bytes,
        "kv_limit_bytes": budget.kv_limit_bytes,
        "pool_bytes": budget.pool_bytes,
        "age_s": round(max(0.0, time.monotonic() - gpu.read_at), 3),
        "error": gpu.error,
    }


def venv(kind: str, python: Path, args: Sequence[str], env: Mapping[str, str], version: str) -> Json:
    """What engines of a venv are started with, but for what is secret."""
    return {"kind": kind, "python": str(python), "args": list(args), "env": shown_env(env), "version": version}


def host(known: Models, view: View | None, budget_bytes: int | None) -> Json:
    """Host memory of those that sleep, and of those that have slept and keep it, as the budget counts it: measured, or else estimated."""
    held = 0
    for found in view.plan.instances.values() if view else ():
        if view and found.launch:
            seen, registered = view.snapshot.engines.get(found.launch.id), known.get(found.model)
            guess = registered.footprint.host_bytes if registered and found.state is State.ASLEEP else 0
            held += (seen.host_bytes if seen and not seen.gone else 0) or guess
    return {"sleepers_bytes": held, "budget_bytes": budget_bytes}


def explained(view: View | None, who: Callable[[int], str]) -> list[Json]:
    """Every GPU's memory as lines that add up to the card, and its pools with what would change their limits. `who`: a pid, in words."""
    return [_explained(gpu, view, who) for gpu in gpus(view)] if view else []


def _explained(gpu: GpuReading, view: View, who: Callable[[int], str]) -> Json:
    lines = [
        {"what": line.what, "bytes": line.bytes, "why": line.why, "model": line.model, "who": who(line.pid) if line.pid else None}
        for line in explain.lines(gpu.uuid, view.snapshot, view.plan)
    ]
    here = [i for i in view.plan.instances.values() if i.launch and gpu.uuid in i.launch.gpus and i.launch.id in view.plan.pools]
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "error": gpu.error,
        "total_bytes": gpu.total_bytes,
        "lines": lines,
        "pool_bytes": view.plan.gpus[gpu.uuid].pool_bytes,
        "pools": [_explained_pool(i.model, i.launch.id, view) for i in here if i.launch],
    }


def _explained_pool(of: str, launch_id: str, view: View) -> Json:
    pool = view.plan.pools[launch_id]
    more = {"target_bytes": pool.target_bytes, "demand_bytes": pool.demand_bytes, "charge_bytes": pool.charge_bytes}
    shown = _pool(launch_id, view) or {}
    return {"model": of, "launch_id": launch_id, **shown, **more, "weight": pool.weight, "change": explain.change(pool)}


# ---- what is wrong ----------------------------------------------------------------------------------------------------


def spec_problems(details: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """`details`: what pydantic found, its errors()."""
    problems = []
    for detail in details:
        field = ".".join(str(part) for part in detail["loc"] if "[" not in str(part)) or "spec"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"unknown field; a spec has: {', '.join(ModelSpec.model_fields)}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif "error" not in detail.get("ctx", {}) and not isinstance(detail["input"], (dict, list)):
            message = f"{detail['input']!r}: {message[0].lower()}{message[1:]}"
        head = message.split(" ", 1)[0].rstrip(":")  # a check between fields names the one to mend first
        if field == "spec" and head in ModelSpec.model_fields:
            field, message = head, message.removeprefix(f"{head}: ")
        problems.append(Problem(field, message))
    return problems
