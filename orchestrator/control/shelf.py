"""All models as config files and store have them, what a change made of them, and what may never be: data and pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.errors import Problem
from orchestrator.policy.footprint import Footprint, request_bytes
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import show_bytes


@dataclass(slots=True)
class Shelf:
    """All models as files and store have them, before anybody sees it."""

    known: dict[str, Known] = field(default_factory=dict)
    bases: dict[str, ModelSpec] = field(default_factory=dict)  # as it was written, before overrides
    by_name: dict[str, str] = field(default_factory=dict)  # names, aliases and adapters -> model
    dropped: list[str] = field(default_factory=list)  # models whose overrides no longer go with their spec
    overruled: list[str] = field(default_factory=list)  # models in the store whose name a config file has taken: the file wins


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload made of the models. `changed`: the fields of each that are others now; of one that another owner has, `owner` too."""

    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    unchanged: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` makes, or would make, of the models. `changed`: each before and after. `unchanged`: of those that were given."""

    added: tuple[ModelSpec, ...]
    changed: tuple[tuple[ModelSpec, ModelSpec], ...]
    removed: tuple[ModelSpec, ...]
    unchanged: tuple[str, ...]


def overridden(spec: ModelSpec, overrides: Mapping[str, object]) -> ModelSpec:
    """Raises pydantic's ValidationError."""
    return ModelSpec.model_validate({**spec.model_dump(), **overrides}) if overrides else spec


def ceiling_problems(spec: ModelSpec, footprint: Footprint) -> list[Problem]:
    """A request that its ceiling can never hold would stall the engine for ever, so a ceiling must hold the longest."""
    if spec.kv_ceiling is None or not footprint.bundle_bytes:
        return []
    least = max(2 * footprint.bundle_bytes, request_bytes(footprint, footprint.max_model_len) if footprint.max_model_len else 0)
    if spec.kv_ceiling >= least:
        return []
    what = f"one request of {footprint.max_model_len} tokens" if footprint.max_model_len else "two page bundles"
    mend = "raise it, or lower --max-model-len"
    return [Problem("kv_ceiling", f"{show_bytes(spec.kv_ceiling)} cannot hold {what} ({show_bytes(least)}): {mend}")]
