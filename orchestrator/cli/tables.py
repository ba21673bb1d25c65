"""Rows under headers, sizes and durations: the short pages.

One layout for terminals and pipes, so that what is seen is what `awk` gets: a cell holds no blank (but the last of -o wide, a reason),
"-" stands for nothing. A terminal adds colour; one that is too narrow gets fewer columns, never broken rows.
"""

import time
from collections.abc import Sequence

import click

from orchestrator.cli import cells, screen
from orchestrator.cli.exits import Json

MIB, GIB = 1 << 20, 1 << 30
GAP = "  "
ELASTIC_MIN, NAME_MIN = 12, 8  # cells that still tell one from another

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


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], elastic: str | None = None, least: Sequence[str] = ()) -> str:
    """The lines of a table, without the last newline.

    On a terminal that is too narrow the column named `elastic` gives way, then those of `least` go, in that order, then the first is cut.
    """
    columns = [[header, *cells] for header, cells in zip(headers, zip(*rows, strict=True) if rows else [()] * len(headers), strict=True)]
    if room := screen.width():
        columns = _fitted(columns, room, elastic, least)
    widths = [max(map(cells.width, column)) for column in columns]
    at = next((at for at, column in enumerate(columns) if column[0] == "STATE"), -1)
    return "\n".join(_line(row, widths, at if number else -1) for number, row in enumerate(zip(*columns, strict=True)))


def _fitted(columns: list[list[str]], room: int, elastic: str | None, least: Sequence[str]) -> list[list[str]]:
    for gone in (None, *least):
        columns = [column for column in columns if column[0] != gone]
        over = _wide(columns) - room
        if over > 0:
            columns = [_cut(column, over, ELASTIC_MIN) if column[0] == elastic else column for column in columns]
        if _wide(columns) <= room:
            return columns
    return [_cut(columns[0], _wide(columns) - room, NAME_MIN), *columns[1:]] if least else columns


def _cut(column: Sequence[str], over: int, shortest: int) -> list[str]:
    most = max(shortest, max(map(cells.width, column)) - over)
    return [cells.tail(cell, most) for cell in column]


def _wide(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(cells.width, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def _line(row: Sequence[str], widths: Sequence[int], state_at: int) -> str:
    parts = [cells.pad(cell, wide) for cell, wide in zip(row, widths, strict=True)]
    parts[-1] = row[-1]
    if state_at >= 0:
        parts[state_at] = state(row[state_at], parts[state_at])
    return GAP.join(parts).rstrip()


LS = ("NAME", "STATE", "SOURCE", "GPU", "KV-USED", "KV-LIMIT", "REQUESTS", "IDLE", "OWNER")
LS_LEAST = ("OWNER", "SOURCE", "GPU", "KV-LIMIT", "IDLE", "KV-USED", "REQUESTS")  # on a narrow terminal the first goes first
LS_WIDE = (*LS, "WANTED", "HELD", "PINNED", "PRIORITY", "VENV", "PID", "SINCE", "LAST-USED", "REASON")
PS = ("NAME", "STATE", "PID", "GPU", "VRAM", "KV-USED", "KV-LIMIT", "LIMIT-STATUS", "REQUESTS", "UP")
PS_LEAST = ("LIMIT-STATUS", "PID", "GPU", "UP", "KV-LIMIT", "KV-USED", "REQUESTS", "VRAM")
PS_WIDE = (*PS, "VENV", "PINNED", "IDLE", "FLOOR", "CEILING", "WEIGHT", "IPC-NAME", "LIMIT-REASON")
GPUS = (
    "GPU", "TOTAL", "USED", "FREE", "OURS", "FOREIGN", "CLAIMS", "RESERVE", "KV-POOL", "KV-USED", "KV-LIMIT", "NAME",
)  # fmt: skip
GPUS_LEAST = ("NAME", "RESERVE", "TOTAL", "CLAIMS", "KV-POOL", "KV-USED", "OURS", "KV-LIMIT", "USED")


def ls(models: Sequence[Json], wide: bool = False) -> str:
    if wide:
        return table(LS_WIDE, [_ls_row(model) + _ls_more(model) for model in models])
    return table(LS, [_ls_row(model) for model in models], elastic="SOURCE", least=LS_LEAST)


def _ls_row(model: Json) -> list[str]:
    pool = model.get("pool") or {}
    return [
        str(model.get("name")), str(model.get("state")), str(model.get("source", "-")), gpus(model.get("engine")),
        size(pool.get("used_bytes")), size(pool.get("limit_bytes")), requests(model), duration(model.get("idle_s")),
        str(model.get("owner", "-")),
    ]  # fmt: skip


def _ls_more(model: Json) -> list[str]:
    spec = model.get("spec") or {}
    idle, reason = model.get("idle_s"), click.unstyle(str(model.get("reason") or ""))
    return [
        _or_dash(model.get("wanted")), _yes(model.get("held")), _yes(spec.get("pinned")), _or_dash(spec.get("priority")),
        _or_dash(spec.get("engine")), _or_dash((model.get("engine") or {}).get("pid")), duration(model.get("since_s")),
        "-" if idle is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - idle)), _or_dash(reason),
    ]  # fmt: skip


def ps(models: Sequence[Json], wide: bool = False) -> str:
    running = [model for model in models if model.get("engine")]
    if wide:
        return table(PS_WIDE, [_ps_row(model, model["engine"]) + _ps_more(model, model["engine"]) for model in running])
    return table(PS, [_ps_row(model, model["engine"]) for model in running], least=PS_LEAST)


def _ps_row(model: Json, engine: Json) -> list[str]:
    pool = model.get("pool") or {}
    return [
        str(model.get("name")), str(model.get("state")), _or_dash(engine.get("pid")), gpus(engine),
        size(engine.get("gpu_bytes")), size(pool.get("used_bytes")), size(pool.get("limit_bytes")),
        _or_dash(pool.get("status")), requests(model), duration(engine.get("up_s")),
    ]  # fmt: skip


def _ps_more(model: Json, engine: Json) -> list[str]:
    spec, pool = model.get("spec") or {}, model.get("pool") or {}
    return [
        _or_dash(spec.get("engine")), _yes(spec.get("pinned")), duration(model.get("idle_s")), size(pool.get("floor_bytes")),
        size(pool.get("ceiling_bytes")), _or_dash(spec.get("kv_weight")), _or_dash(engine.get("ipc_name")), _or_dash(pool.get("reason")),
    ]  # fmt: skip


def gpu_table(seen: Sequence[Json], wide: bool = False) -> str:
    if wide:
        return table((*GPUS, "AGE", "UUID"), [[*_gpu_row(gpu), seconds(gpu.get("age_s")), _or_dash(gpu.get("uuid"))] for gpu in seen])
    return table(GPUS, [_gpu_row(gpu) for gpu in seen], least=GPUS_LEAST)


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


def _yes(value: object) -> str:
    return "yes" if value else "no"
