"""The long pages: everything about one model, and the state of the daemon. Labels to the left, values to the right.

Log lines and reasons come from engines and may hold colour codes of their own; they are shown bare.
"""

import time
from collections.abc import Sequence

import click

from orchestrator.cli import cells, screen
from orchestrator.cli.exits import Json, hint
from orchestrator.cli.tables import duration, gpu_table, gpus, seconds, size, state

LABEL = 14  # the longest label and two blanks
MARGIN = 2  # by which a page may indent these lines
READABLE = 16  # cells: in fewer, a sentence is easier to read as the terminal breaks it
SIZES = ("kv_floor", "kv_ceiling")
DURATIONS = ("sleep_timeout", "idle_timeout", "min_residency", "idle_trim", "start_timeout")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD")


def model_page(model: Json) -> str:
    parts = [_head(model)]
    for title, lines in (
        ("Failure", _failure(model.get("failure"))),
        ("Engine", _engine(model.get("engine"))),
        ("KV pool", _pool(model.get("pool"))),
        ("Footprint", _footprint(model.get("footprint"), sleeps=_spec_of(model).get("sleep_level") != 0)),
        ("Spec", _spec(_spec_of(model))),
        ("Overrides", _overrides(model)),
        ("Events", _events(model.get("events") or [])),
    ):
        if lines:
            parts.append("\n".join([click.style(title, bold=True), *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


def status_page(status: Json, wide: bool = False) -> str:
    loop = status.get("loop") or {}
    counts = status.get("models") or {}
    gpus_seen: list[Json] = status.get("gpus") or []
    simulated = status.get("gpu_source") == "simulated"
    head = labelled(
        [
            (
                "Daemon",
                f"orchestratord {status.get('version')}, pid {status.get('pid')}, up {duration(status.get('uptime_s'))}",
            ),
            ("Listens on", status.get("listen")),
            ("Admin socket", status.get("admin_socket")),
            ("Config", ", ".join(map(str, status.get("config") or [])) or "none: defaults only"),
            ("State", status.get("state_dir")),
            (
                "Loop",
                f"{loop.get('ticks')} ticks, last {_ms(loop.get('last_ms'))}, {loop.get('errors')} errors" if loop else None,
            ),
            ("Sleepers", _sleepers(status.get("host") or {})),
            ("Launch servers", _launch_servers(status.get("launch_servers") or {})),
            ("GPU readings", "simulated: no real GPU is touched" if simulated else status.get("gpu_source")),
            ("Models", ", ".join(f"{count} {state(name)}" for name, count in counts.items() if count) or "none"),
        ]
    )
    faults = [click.style(f"GPU {gpu.get('index')}: {gpu['error']}", fg="red") for gpu in gpus_seen if gpu.get("error")]
    # The daemon reads NVML every 250 ms: a reading of 5 s is twenty rounds old.
    faults += [f"GPU {gpu.get('index')}: this reading is {duration(gpu['age_s'])} old" for gpu in gpus_seen if (gpu.get("age_s") or 0) >= 5]
    if status.get("state_problem"):
        faults.append(click.style(f"State: {status['state_problem']}", fg="red"))
    return "\n".join([head, "", gpu_table(gpus_seen, wide) if gpus_seen else "no GPU seen", *faults])


def _sleepers(host: Json) -> str | None:
    held, budget = host.get("sleepers_bytes"), host.get("budget_bytes")
    return None if held is None else f"hold {size(held)} of host memory" + (f"; they may hold {size(budget)}" if budget is not None else "")


def _launch_servers(servers: Json) -> str:
    """A line for each engine venv: `default: ready, pid 7, 1.0GiB (512MiB its share), vllm 0.24.0, imported in 15s, 4 engines forked`."""
    return "\n".join(f"{name}: {', '.join(_launch_server(server))}" for name, server in sorted(servers.items()))


def _launch_server(server: Json) -> list[str]:
    said = [str(server.get("state"))]
    if server.get("pid"):
        said += [f"pid {server['pid']}", f"{size(server.get('rss_bytes'))} ({size(server.get('pss_bytes'))} its share)"]
        said += [f"{name} {version}" for name, version in (server.get("versions") or {}).items()]
        said += [f"imported in {duration(server['import_s'])}"] if server.get("import_s") is not None else []
    said += [f"{server.get('forks')} engines forked"] if server.get("forks") else []
    return [*said, *([bare(server["reason"])] if server.get("reason") else [])]


def failure_lines(failure: Json, most: int = 20) -> list[str]:
    """The engine's last words, marked as such."""
    return [f"  | {bare(line)}" for line in (failure.get("log") or [])[-most:]]


def bare(text: object) -> str:
    return click.unstyle(str(text)).rstrip()


def _head(model: Json) -> str:
    said = str(model.get("state"))
    owner = {
        "file": "file: defined in the configuration, edit it there",
        "api": "api: added at runtime, kept over restarts",
    }
    idle = model.get("idle_s")
    return labelled(
        [
            ("Name", model.get("name")),
            ("Aliases", ", ".join(model.get("aliases") or ())),
            ("Adapters", ", ".join(model.get("adapters") or ())),
            ("State", f"{state(said)} for {duration(model.get('since_s'))}"),
            ("Reason", bare(model.get("reason") or "")),
            ("Held", "yes: stopped by hand, requests do not start it" if model.get("held") else None),
            ("Pinned", "yes: it does not sleep or stop for being idle, nor for another model" if _spec_of(model).get("pinned") else None),
            ("Source", model.get("source")),
            ("Owner", owner.get(str(model.get("owner")), model.get("owner"))),
            ("Requests", f"{model.get('in_flight') or 0} running, {model.get('waiting') or 0} waiting"),
            ("Idle", None if idle is None else duration(idle)),
        ]
    )


def _spec_of(model: Json) -> Json:
    return model.get("spec") or {}


def _failure(failure: Json | None) -> list[str]:
    if not failure:
        return []
    retry = failure.get("retry_in_s")
    count = failure.get("count") or 1
    head = [
        ("Reason", bare(failure.get("reason"))),
        ("Count", f"{count} in a row"),
        ("Next try", None if retry is None else f"in {duration(retry)}"),
    ]
    return [*labelled(head).splitlines(), *failure_lines(failure)]


def _engine(engine: Json | None) -> list[str]:
    if not engine:
        return []
    phase = phase_text(engine)
    expected = engine.get("expected_start_s")
    return labelled(
        [
            ("PID", engine.get("pid")),
            ("Up", duration(engine.get("up_s"))),
            ("Phase", phase and phase + (f"; a start takes about {duration(expected)}" if expected else "")),
            ("GPU", f"{gpus(engine)} ({', '.join(map(str, engine.get('gpus') or []))})"),
            ("VRAM", size(engine.get("gpu_bytes"))),
            ("Log", engine.get("log")),
            ("Socket", engine.get("socket")),
            ("IPC name", engine.get("ipc_name")),
            ("Launch", engine.get("launch_id")),
        ]
    ).splitlines()


def phase_text(engine: Json) -> str:
    """`loading weights (2/5)`; phase_index counts from 0."""
    phase, count = engine.get("phase"), engine.get("phase_count") or 0
    if not phase:
        return ""
    return f"{phase} ({min((engine.get('phase_index') or 0) + 1, count)}/{count})" if count else str(phase)


def _pool(pool: Json | None) -> list[str]:
    if not pool:
        return []
    return labelled(
        [
            ("Used", f"{size(pool.get('used_bytes'))}, and {size(pool.get('prealloc_bytes'))} preallocated"),
            ("Limit", limit_text(pool)),
            ("Floor", size(pool.get("floor_bytes"))),
            ("Ceiling", size(pool.get("ceiling_bytes"))),
            ("Page bundle", size(pool.get("bundle_bytes"))),
        ]
    ).splitlines()


def limit_text(pool: Json) -> str:
    """`20.0GiB (draining: above its ceiling)`."""
    reason = bare(pool.get("reason") or "")
    return f"{size(pool.get('limit_bytes'))} ({pool.get('status')}{': ' + reason if reason else ''})"


def _footprint(footprint: Json | None, sleeps: bool) -> list[str]:
    if not footprint:
        return []
    parts: Json = footprint.get("parts") or {}
    start = footprint.get("start_s")
    rows: list[tuple[str, object]] = [(name, size(bytes_)) for name, bytes_ in parts.items()]
    rows += [
        ("total", f"{size(footprint.get('total_bytes'))} ({footprint.get('source')})"),
        ("start takes", start and seconds(start)),
    ]
    if sleeps and footprint.get("wake_s") is not None:
        rows += [
            ("asleep", f"{size(footprint.get('asleep_bytes'))}, and {size(footprint.get('host_bytes'))} of host memory"),
            ("sleep takes", seconds(footprint.get("sleep_s"))),
            ("wake takes", seconds(footprint["wake_s"])),
        ]
    return labelled(rows).splitlines()


def _spec(spec: Json) -> list[str]:
    rows = [(key, spec_value(key, value)) for key, value in spec.items() if value not in (None, [], {})]
    rows += [(key, "never") for key in ("sleep_timeout", "idle_timeout") if key in spec and spec[key] is None]
    return labelled(rows).splitlines()


def _overrides(model: Json) -> list[str]:
    """What `limit`, `pin` and `unpin` changed; it wins over the spec."""
    overrides: Json = model.get("overrides") or {}
    if not overrides:
        return []
    back = hint("limit --reset", str(model.get("name"))) if overrides.keys() - {"pinned"} else None
    return labelled([*((key, spec_value(key, value)) for key, value in overrides.items()), ("back to spec", back)]).splitlines()


def spec_value(key: str, value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={'***' if any(word in name.upper() for word in SECRET) else each}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return size(value) if key in SIZES else duration(value) if key in DURATIONS else str(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _events(events: Sequence[Json]) -> list[str]:
    kinds = max((len(str(event.get("kind"))) for event in events), default=0)
    return [f"{_clock(event.get('at') or 0)}  {str(event.get('kind')).ljust(kinds)}  {bare(event.get('reason') or '')}" for event in events]


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}ms"


def labelled(rows: Sequence[tuple[str, object]]) -> str:
    """`label  value` lines; a row without a value is left out, a value of several lines is indented under its first. Where labels leave
    no room on the terminal, values stand below them."""
    there = [(label, str(value)) for label, value in rows if value not in (None, "")]
    wide = max([LABEL, *(cells.width(label) + 2 for label, _ in there)])
    indent, room = "\n" + " " * wide, screen.width()
    left = None if room is None else room - wide - MARGIN
    if room is not None and left is not None and any(cells.width(value) > left for _, value in there):
        if left < READABLE:
            return "\n".join(f"{label}\n  " + "\n  ".join(cells.wrap(value, room - 2)) for label, value in there)
        there = [(label, "\n".join(cells.wrap(value, left))) for label, value in there]
    return "\n".join(f"{cells.pad(label, wide)}{value.replace(chr(10), indent)}" for label, value in there)
