"""YAML with the place of every value: file:line:column of each key and item, and what YAML itself passes over in silence.

Keys given twice, keys that are no text, files that are missing. For the daemon's config files and for what `orchestratorctl apply` sends.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import Problem

Loc = tuple[str | int, ...]
TEXT_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Dates stay text: no setting is a date, and a model may be named 2024-11-20."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(path: Path, places: dict[Loc, str], problems: list[Problem]) -> dict[str, Any]:
    """The map in a file; what is wrong with it is added to `problems`, and where each value stands to `places`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        problems.append(Problem(str(path), f"there is no such config file{hint}"))
        return {}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), f"cannot be read: {error}"))
        return {}
    return parse(text, path, places, problems)


def parse(text: str, path: Path | str, places: dict[Loc, str], problems: list[Problem]) -> dict[str, Any]:
    """As read(), of a text that came from `path`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problems.append(Problem(where, f"not YAML: {error.problem or error.context}"))
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. `!!int x`; braces a thousand deep
        problems.append(Problem(str(path), f"not YAML: {error}"))
        return {}
    if node is None:
        return {}
    if not isinstance(data, dict):
        problems.append(Problem(f"{path}:1:1", "a config file is a map of settings, like `listen: {port: 8000}`"))
        return {}
    try:
        _walk(node, (), path, places, problems)
        return {key: value for key, value in _with_text_keys(data).items() if value is not None}
    except RecursionError:
        problems.append(Problem(str(path), "an anchor (&) holds its own alias (*): write the value out"))
        return {}


def _walk(node: yaml.Node, loc: Loc, path: Path | str, places: dict[Loc, str], problems: list[Problem]) -> None:
    """Note where each key and item stands; report keys that are not text, or given twice (YAML takes the last one silently)."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            where = f"{path}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            said = ".".join(map(str, (*loc, name)))
            if name in first:
                problems.append(Problem(where, f"{said}: is given twice (first in line {first[name]}): remove one"))
            elif key.tag not in TEXT_KEYS:
                problems.append(Problem(where, f'{said}: the key {name} is not text: quote it, "{name}"'))
            first.setdefault(name, key.start_mark.line + 1)
            places[(*loc, name)] = where
            _walk(value, (*loc, name), path, places, problems)
    elif isinstance(node, yaml.SequenceNode):
        for at, item in enumerate(node.value):
            places[(*loc, at)] = f"{path}:{item.start_mark.line + 1}:{item.start_mark.column + 1}"
            _walk(item, (*loc, at), path, places, problems)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_text_keys(inner) for key, inner in value.items() if isinstance(key, str)}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def loc_of(field: str, places: Mapping[Loc, str]) -> Loc:
    """`models.qwen2.5.engine` as a place. Names hold dots too: the longest known place that begins the text decides."""
    known = {".".join(map(str, loc)): loc for loc in places}
    begin = max((said for said in known if field == said or field.startswith(f"{said}.")), key=len, default="")
    rest = field[len(begin) :].strip(".")
    return (*known.get(begin, ()), *(rest.split(".") if rest else ()))


def place(field: str, places: Mapping[Loc, str]) -> str:
    """Where `models.qwen.source` was written; for what is missing, the nearest thing around it; "" where nothing of it was."""
    loc = loc_of(field, places)
    return next((places[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in places), "")
