"""Desired state: all models that are added by API as one document, checked whole and taken whole or not at all.

`GET /specs` writes what `PUT /models` takes back unchanged. A secret in a model's environment is written as (hidden), and one that comes
so stays what it is here.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from orchestrator.api import projections
from orchestrator.api.admin import json_object, next_look, refuse_unknown
from orchestrator.api.projections import HIDDEN, SECRET, Json
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry
from orchestrator.control.shelf import Applied
from orchestrator.errors import BadRequest, Conflict, Problem, SpecError
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import GIB, KIB, MIB

SIZES = ("kv_floor", "kv_ceiling")
DURATIONS = ("sleep_timeout", "idle_timeout", "min_residency", "start_timeout", "idle_trim")
SIZE_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB}
DURATION_UNITS = {"h": 3600, "m": 60, "s": 1}
SHAPE = 'Desired state is a JSON object: {"models": {NAME: SPEC, …}, "prune": false, "dry_run": false}.'


class DesiredApi:
    def __init__(self, registry: Registry, loop: Reconciler) -> None:
        self._registry, self._loop = registry, loop

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/models", self.apply, methods=["PUT"])
        router.add_api_route("/specs", self.specs, methods=["GET"])
        return router

    async def apply(self, request: Request) -> Json:
        """What was changed, or would be: with `dry_run` all is checked and nothing done."""
        given = await json_object(request, SHAPE)
        models, prune, dry_run = given.get("models", {}), given.get("prune", False), given.get("dry_run", False)
        refuse_unknown(given, {"models", "prune", "dry_run"}, SHAPE)
        if not isinstance(models, dict) or not isinstance(prune, bool) or not isinstance(dry_run, bool):
            raise BadRequest(SHAPE)
        applied = await self._registry.apply(self._specs(models), prune, projections.gpus(self._loop.view), dry_run)
        told = _told(applied)
        if not dry_run and (applied.added or applied.changed or applied.removed):
            self._note(applied)
            await next_look(self._loop)
        return {**told, "dry_run": dry_run}

    async def specs(self, request: Request, secrets: bool = False) -> Json:
        """Those that `name` names, any number of times; all where it is not given. As they are now, with what `limit`, `pin` and `adapt`
        changed: only what is not the default."""
        known, names = self._registry.known(), request.query_params.getlist("name")
        chosen = [self._registry.resolve(name) for name in names] or [each for each, model in known.items() if model.owner == "api"]
        if files := [each for each in chosen if known[each].owner == "file"]:
            raise Conflict(f"The model {files[0]!r} is defined in a config file: it is written there already.", param="name")
        return {"models": {each: written(known[each].spec, secrets) for each in sorted(chosen)}}

    def _specs(self, models: Mapping[str, Any]) -> list[ModelSpec]:
        """Raises SpecError with every fault of every model."""
        specs, problems = [], []
        for name, body in models.items():
            if not isinstance(body, dict):
                problems.append(Problem(f"models.{name}", "a model is a map of fields, like `source: Qwen/Qwen2.5-7B-Instruct`"))
            elif body.get("name", name) != name:
                problems.append(Problem(f"models.{name}.name", f"{body['name']!r} is not its key: remove `name`, the key is the name"))
            else:
                try:
                    specs.append(self._unhidden(ModelSpec.model_validate({**body, "name": name})))
                except ValidationError as error:
                    problems += [Problem(_under(name, each.where), each.what) for each in projections.spec_problems(error.errors())]
                except SpecError as error:
                    problems += error.problems
        if problems:
            raise SpecError(problems)
        return specs

    def _unhidden(self, spec: ModelSpec) -> ModelSpec:
        """With the secrets that are kept here in the place of those that were not shown."""
        known = self._registry.known().get(spec.name)
        kept = known.spec.env if known else {}
        hidden = [name for name, value in spec.env.items() if value == HIDDEN]
        if lost := [name for name in hidden if name not in kept]:
            mend = "write it, or export it with `orchestratorctl export --secrets`"
            raise SpecError([Problem(f"models.{spec.name}.env.{each}", f"is hidden, and none is kept here: {mend}") for each in lost])
        return spec.model_copy(update={"env": {**spec.env, **{name: kept[name] for name in hidden}}}) if hidden else spec

    def _note(self, applied: Applied) -> None:
        for spec in applied.added:
            self._loop.note(spec.name, "added", "by apply")
        for before, after in applied.changed:
            self._loop.note(after.name, "changed", f"by apply: {', '.join(_differing(before, after))}")
        for spec in applied.removed:
            self._loop.note(spec.name, "removed", "by apply")


def written(spec: ModelSpec, secrets: bool = False) -> Json:
    """Its fields that are not the default, as people write them in a file; the name is its key there."""
    fields = spec.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    return {field: _human(field, value, secrets) for field, value in fields.items()}


def _human(field: str, value: Any, secrets: bool) -> Any:
    if field in SIZES and value:
        return _in_units(value, SIZE_UNITS)
    if field in DURATIONS and value and value == int(value):
        return _in_units(int(value), DURATION_UNITS)
    if field == "env" and not secrets:
        return {name: HIDDEN if SECRET.search(name) else text for name, text in value.items()}
    return value


def _in_units(value: int, units: Mapping[str, int]) -> int | str:
    """In the largest unit that it is whole in."""
    return next((f"{value // size}{unit}" for unit, size in units.items() if value % size == 0), value)


def _told(applied: Applied) -> Json:
    return {
        "added": [{"name": spec.name, "spec": written(spec)} for spec in applied.added],
        "changed": [
            {
                "name": after.name,
                "fields": {each: {"before": _shown(before, each), "after": _shown(after, each)} for each in _differing(before, after)},
                "new_engine": not after.served_by(before),
            }
            for before, after in applied.changed
        ],
        "removed": [{"name": spec.name, "spec": written(spec)} for spec in applied.removed],
        "unchanged": list(applied.unchanged),
    }


def _differing(before: ModelSpec, after: ModelSpec) -> list[str]:
    return [field for field in ModelSpec.model_fields if getattr(before, field) != getattr(after, field)]


def _shown(spec: ModelSpec, field: str) -> Any:
    return _human(field, spec.model_dump(mode="json", include={field})[field], secrets=False)


def _under(name: str, field: str) -> str:
    return f"models.{name}" if field == "spec" else f"models.{name}.{field}"
