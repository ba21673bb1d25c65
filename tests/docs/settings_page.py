"""The tables of docs/settings.md: each setting and each field of a model, as the pydantic classes have them. They are the one source."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from orchestrator.policy.model import ModelSpec, ZeroOrDuration
from orchestrator.policy.units import GIB, KIB, MIB, TIB, Duration, Size
from orchestrator.reload import LIVE
from orchestrator.settings import Engine, Settings
from tests.docs.pages import table

WORDS = {
    Size: "size", Duration: "duration", ZeroOrDuration: "duration, or 0", str: "text", Path: "path", SecretStr: "text, never shown",
    int: "number", float: "number", bool: "`true`, `false`",
}  # fmt: skip
# A spec that differs from PLAIN in one field: does it need another engine?
PLAIN = ModelSpec(name="a", source="org/a")
OTHERS: dict[str, Any] = {
    "name": "b", "source": "org/b", "aliases": ("c",), "adapters": {"d": "org/d"}, "gpus": (0,), "tensor_parallel_size": 2,
    "args": ("--x",), "env": {"X": "1"}, "engine": "other", "kv_floor": GIB, "kv_ceiling": GIB, "kv_weight": 2.0, "priority": 1,
    "pinned": True, "preload": True, "sleep_timeout": None, "sleep_level": 0, "idle_timeout": None, "min_residency": 0.0,
    "start_timeout": 1.0, "idle_trim": None, "prefix_cache_tokens": 0, "max_concurrency": 1, "max_queue": 1,
}  # fmt: skip


def made() -> str:
    parts = []
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts.append(f"## {name}\n\n{_settings(section, f'{name}.')}\n")
        elif name == "engines":
            parts.append(f"## engines\n\n{field.description}\n\n{_settings(Engine, 'engines.NAME.')}\n")
        else:
            parts.append(f"## models\n\n{field.description} A reload takes all of it.\n\n{_fields()}\n")
    return "\n".join(parts)


def _settings(section: type[BaseModel], path: str) -> str:
    return table(("setting", "", "default", "change", ""), _rows(section, path))


def _rows(section: type[BaseModel], path: str) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _rows(inner, f"{path}{name}.")
            continue
        change = "at once" if path + name in LIVE else "restart"
        yield f"`{path}{name}`", kind(hints[name], field), default(hints[name], field), change, field.description or ""


def _fields() -> str:
    hints = get_type_hints(ModelSpec, include_extras=True)
    rows = (
        (f"`{name}`", kind(hints[name], field), default(hints[name], field), _on_change(name), field.description or "")
        for name, field in ModelSpec.model_fields.items()
    )
    return table(("field", "", "default", "change", ""), rows)


def _on_change(field: str) -> str:
    if field == "name":
        return "another model"
    other = PLAIN.model_copy(update={field: OTHERS[field]})
    return "at once" if other.served_by(PLAIN) else "new engine"


def kind(hint: Any, field: FieldInfo) -> str:
    """What may be written: `0 to 65535`, `size, or null`, `duration, at least 1s`."""
    ends = {end: value for bound in field.metadata for end in ("gt", "ge", "le") if (value := getattr(bound, end, None)) is not None}
    if hint in (int, float) and ends:
        low = f"above {ends['gt']}" if "gt" in ends else str(ends["ge"])
        return f"{low} to {ends['le']:,}" if "le" in ends else f"{low} or more"
    least = f", at least {_shown(hint, ends['ge'])}" if "ge" in ends else ""
    told = _kind(hint)
    return told.replace(", or null", f"{least}, or null") if ", or null" in told else told + least


def _kind(hint: Any) -> str:
    if hint in WORDS:
        return WORDS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        several = [_kind(each) for each in inner if each is not type(None)]
        return ", or ".join(several + (["null"] if type(None) in inner else []))
    if origin is Annotated:
        return _kind(inner[0])
    if origin is tuple:
        return f"list of {_plural(_kind(inner[0]))}"
    if origin is dict:
        return f"map of {_plural(_kind(inner[1]))} by name"
    raise TypeError(f"no word for {hint}: add one to WORDS")


def _plural(word: str) -> str:
    return " or ".join(f"{each}s" for each in word.split(", or "))


def default(hint: Any, field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "null" if value is None else "none"
    return f"`{_shown(hint, value)}`"


def _shown(hint: Any, value: Any) -> str:
    """As a config file writes it."""
    if Size in (hint, *get_args(hint)):
        return size(value)
    if {Duration, ZeroOrDuration} & {hint, *get_args(hint)}:
        return duration(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def size(count: int) -> str:
    units = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB}
    return next((f"{count // unit}{name}" for name, unit in units.items() if count % unit == 0), str(count))


def duration(seconds: float) -> str:
    if seconds >= 60 and seconds % 60 == 0:
        return f"{seconds / 60:g}m"
    return f"{seconds:g}s"
