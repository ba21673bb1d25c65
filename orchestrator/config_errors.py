"""Read config files and environment into Settings, or say everything that is wrong with them at once: file, line, nearest right name.

pydantic checks values; here is what it does not do: where a value stood (marked_yaml.py), and environment variables that no setting has
(pydantic-settings ignores them silently).
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from orchestrator import marked_yaml
from orchestrator.errors import ConfigError, Problem
from orchestrator.marked_yaml import Loc, loc_of
from orchestrator.settings import Settings

OTHER_VARIABLES = {"ORCH_CONFIG", "ORCH_HOST", "ORCH_ADMIN_KEY"}  # orchestratord's --config, orchestratorctl's target


class Source:
    """Where the values of Settings were written, for faults that are found later than here."""

    def __init__(self, places: Mapping[Loc, str], environ: Mapping[str, str]) -> None:
        self._places, self._environ = places, environ

    def problem(self, field: str, what: str) -> Problem:
        """`field`: models.qwen.source. The problem names the file and line, or the variable, that gave it."""
        return Problem(_where(loc_of(field, self._places), self._places, self._environ), f"{field}: {what}")


def load(files: Sequence[Path], environ: Mapping[str, str]) -> Settings:
    """Raises ConfigError with every problem found. Later files add to earlier ones and override single values."""
    return read(files, environ)[0]


def read(files: Sequence[Path], environ: Mapping[str, str]) -> tuple[Settings, Source]:
    """As load(), and where each value was written."""
    problems: list[Problem] = []
    places: dict[Loc, str] = {}
    data: dict[str, Any] = {}
    for path in files:
        read = marked_yaml.read(path, places, problems)
        for name in sorted(_models_named(data) & _models_named(read)):
            problems.append(Problem(places[("models", name)], f"models.{name}: is defined in an earlier config file too: remove one"))
        data = _merge(data, read)
    problems.extend(_unknown_variables(environ))
    said = {problem.where for problem in problems}
    while True:
        try:
            settings = Settings(**data)
        except SettingsError as error:
            problems.append(Problem("environment", f"{error}: lists and maps are written as JSON there"))
        except ValidationError as error:
            for detail in error.errors():
                found = [p for p in _explain(detail, places, environ) if p.where not in said or not p.where.startswith("ORCH_")]
                problems.extend(p for p in found if p not in problems)
            rest = _without([detail["loc"] for detail in error.errors()], data)
            if rest != data:
                data = rest  # the checks between values are made only where each value is right
                continue
        else:
            if not problems:
                return settings, Source(places, environ)
        raise ConfigError(problems)


def _models_named(data: Mapping[str, Any]) -> set[str]:
    models = data.get("models")
    return set(models) if isinstance(models, dict) else set()


def _without(locs: Sequence[Loc], data: dict[str, Any]) -> dict[str, Any]:
    """A copy without the values that are wrong. Nothing is removed whose absence would be a fault of its own."""
    rest = copy.deepcopy(data)
    for loc in locs:
        cut = loc[: {"admin": 1, "models": 3}.get(str(loc[0]), len(loc))] if loc else ()
        around: list[Any] = [rest]
        for part in cut:
            if not isinstance(around[-1], dict) or part not in around[-1]:
                break
            around.append(around[-1][part])
        depth = len(around) - 1
        if depth >= (3 if cut[:1] == ("engines",) else min(2, len(cut))) and depth:
            del around[depth - 1][cut[depth - 1]]
    return rest


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(detail: Any, places: Mapping[Loc, str], environ: Mapping[str, str]) -> Iterator[Problem]:
    """One pydantic error as one line (or several, where a check of our own found several)."""
    loc = _plain(detail["loc"], places)
    message, context = str(detail["msg"]).removeprefix("Value error, "), detail.get("ctx", {})
    if not loc and "error" in context:
        for line in str(context["error"]).split("\n"):
            field = line.split(":")[0]
            yield Problem(_where(loc_of(field, places), places, environ), line)
        return
    name = ".".join(map(str, loc))
    if detail["type"] == "extra_forbidden":
        known = sorted(_fields(Settings, loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        message = f"unknown setting; {hint}"
    elif detail["type"] == "missing":
        message = "is missing"
    elif "error" not in context and not isinstance(detail["input"], (dict, list)):
        shown = "(hidden)" if loc == ("admin", "key") else repr(detail["input"])
        message = f"{shown}: {message[0].lower()}{message[1:]}"
    yield Problem(_where(loc, places, environ), f"{name}: {message}")


def _plain(loc: Loc, places: Mapping[Loc, str]) -> Loc:
    """Without pydantic's own words in it: which member of a union it tried, or the kind of a list's item."""
    kept: Loc = ()
    for part in loc:
        in_list = bool(kept) and isinstance(kept[-1], int)
        if isinstance(part, int) or (*kept, part) in places or not (in_list or "[" in part or part.startswith("function-")):
            kept = (*kept, part)
    return kept


def _where(loc: Loc, places: Mapping[Loc, str], environ: Mapping[str, str]) -> str:
    """The variable or the line that the value came from; for a value that is missing, the nearest thing around it."""
    for end in range(len(loc), 0, -1):
        variable = "ORCH_" + "__".join(str(part).upper() for part in loc[:end])
        for given in environ:
            if given.upper() == variable:
                return given
        if loc[:end] in places:
            return places[loc[:end]]
    return ""


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[Problem]:
    names = sorted(_variables(Settings, "ORCH_"))
    for given in sorted(environ):
        if not given.upper().startswith("ORCH_") or given in OTHER_VARIABLES:
            continue
        parts = tuple(part.lower() for part in given[5:].split("__"))
        annotation: Any = Settings
        for part in parts:
            annotation = _inner(annotation, part)
        if annotation is None:
            near = difflib.get_close_matches(given.upper(), names, 1)
            hint = f"did you mean {near[0]}?" if near else "`orchestratord schema` lists all settings"
            yield Problem(given, f"there is no such setting; {hint}")


def _models_in(annotation: Any) -> Iterator[Any]:
    """The pydantic models and dicts inside an annotation such as `Section | None` or `Annotated[dict[str, Engine], …]`."""
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models_in(inner)


def _inner(annotation: Any, part: str) -> Any:
    """The annotation of a field or dict value; None if there is none by that name."""
    for model in _models_in(annotation):
        if get_origin(model) is dict:
            return get_args(model)[1]
        if part in model.model_fields:
            return model.model_fields[part].annotation
    return None


def _fields(annotation: Any, loc: Loc) -> list[str]:
    for part in loc:
        annotation = _inner(annotation, str(part))
    return [name for model in _models_in(annotation) if get_origin(model) is not dict for name in model.model_fields if name != "name"]


def _variables(annotation: Any, prefix: str) -> Iterator[str]:
    for name in _fields(annotation, ()):
        inner = _inner(annotation, name)
        yield prefix + name.upper()
        yield from _variables(inner, f"{prefix}{name.upper()}__")
