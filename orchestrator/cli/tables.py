"""Rows under headers, sizes and durations: the short pages.

One layout for terminals and pipes, so that what is seen is what `awk` gets: a cell holds no blank, "-" stands for
nothing. A terminal adds colour and may shorten one column to fit.
"""

from collections.abc import Sequence

import click

from orchestrator.cli import screen
from orchestrator.cli.exits import Json

MIB, GIB = 1 << 20, 1 << 30

COLOURS = {
    "ready": "green", "starting": "cyan", "waking": "cyan", "waiting": "yellow", "draining": "yellow",
    "stopping": "yellow", "backoff": "red", "failed": "red", "asleep": "blue", "stopped": "bright_black",
}  # fmt: skip


def size(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0:
        return f"-{size(-value)}"
    if value == 0 or MIB <= value < 1023.5 * MIB:
        return f"{value / MIB:.0f}MiB"
    return f"{value / MIB:.1f}MiB" if 0 < value < MIB else f"{value / GIB:.1f}GiB"


def duration(value: float | None) -> str:
    """3s, 5m12s, 2h03m, 4d07h: two units say enough."""
    if value is None:
        return "-"
    seconds = max(0, int(value))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02d}h"


def seconds(value: float | None) -> str:
    """0.3s, 4.5s, then as duration(): for what may take less than one."""
    return duration(value) if value is None or value >= 9.95 else f"{round(max(0.0, value), 2):.2g}s"


def state(value: str, padded: str | None = None) -> str:
    return click.style(padded or value, fg=COLOURS.get(value))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], elastic: str | None = None) -> str:
    """The lines of a table, without the last newline. The column named `elastic` gives way on a narrow terminal."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(headers))]
    room = screen.width()
    if room is not None and elastic is not None:
        at = headers.index(elastic)
        spare = room - (sum(widths) + 2 * (len(widths) - 1))
        if spare < 0:
            widths[at] = max(12, widths[at] + spare)
            for row in cells:
                row[at] = _tail(row[at], widths[at])
    return "\n".join(_line(headers, row, widths, paint=number > 0) for number, row in enumerate(cells))


def _line(headers: Sequence[str], row: Sequence[str], widths: Sequence[int], paint: bool) -> str:
    parts = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    parts[-1] = row[-1]
    if paint and "STATE" in headers:
        at = headers.index("STATE")
        parts[at] = state(row[at], parts[at])
    return "  ".join(parts).rstrip()


def _tail(text: str, most: int) -> str:
    """The end of a path or hub id says which model it is; its beginning is alike for all."""
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]


LS = ("NAME", "STATE", "SOURCE", "GPU", "KV-USED", "KV-LIMIT", "REQUESTS", "IDLE", "OWNER")
PS = ("NAME", "STATE", "PID", "GPU", "VRAM", "KV-USED", "KV-LIMIT", "LIMIT-STATUS", "REQUESTS", "UP")
GPUS = (
    "GPU", "TOTAL", "USED", "FREE", "OURS", "FOREIGN", "CLAIMS", "RESERVE", "KV-POOL", "KV-USED", "KV-LIMIT", "NAME",
)  # fmt: skip


def ls(models: Sequence[Json]) -> str:
    return table(LS, [_ls_row(model) for model in models], elastic="SOURCE")


def _ls_row(model: Json) -> list[str]:
    pool = model.get("pool") or {}
    return [
        str(model.get("name")), str(model.get("state")), str(model.get("source", "-")), gpus(model.get("engine")),
        size(pool.get("used_bytes")), size(pool.get("limit_bytes")), requests(model), duration(model.get("idle_s")),
        str(model.get("owner", "-")),
    ]  # fmt: skip


def ps(models: Sequence[Json]) -> str:
    return table(PS, [_ps_row(model, model["engine"]) for model in models if model.get("engine")])


def _ps_row(model: Json, engine: Json) -> list[str]:
    pool = model.get("pool") or {}
    return [
        str(model.get("name")), str(model.get("state")), _or_dash(engine.get("pid")), gpus(engine),
        size(engine.get("gpu_bytes")), size(pool.get("used_bytes")), size(pool.get("limit_bytes")),
        _or_dash(pool.get("status")), requests(model), duration(engine.get("up_s")),
    ]  # fmt: skip


def gpu_table(seen: Sequence[Json]) -> str:
    return table(GPUS, [_gpu_row(gpu) for gpu in seen])


def _gpu_row(gpu: Json) -> list[str]:
    used, foreign = gpu.get("used_bytes"), gpu.get("foreign_bytes")
    # Weights, graphs and KV: all that is used and not foreign. Subtracted, so that OURS + FOREIGN = USED in every row.
    ours = None if used is None or foreign is None else max(0, used - foreign)
    sizes = [
        gpu.get("total_bytes"), used, gpu.get("free_bytes"), ours, foreign, gpu.get("claims_bytes"),
        gpu.get("reserve_bytes"), gpu.get("pool_bytes"), gpu.get("kv_used_bytes"), gpu.get("kv_limit_bytes"),
    ]  # fmt: skip
    return [_or_dash(gpu.get("index")), *(size(each) for each in sizes), _or_dash(gpu.get("name")).replace(" ", "-")]


def gpus(engine: Json | None) -> str:
    indexes = (engine or {}).get("gpu_indexes") or []
    return ",".join(str(index) for index in indexes) or "-"


def requests(model: Json) -> str:
    """`3`, or `3+2` where two more wait."""
    waiting = model.get("waiting") or 0
    return f"{model.get('in_flight') or 0}" + (f"+{waiting}" if waiting else "")


def _or_dash(value: object) -> str:
    return "-" if value is None or value == "" else str(value)
