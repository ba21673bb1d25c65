"""The verb `top`: each GPU's memory as a bar, each model's KV memory as another, who runs and waits, and what happened last.

A frame is text of exactly the terminal's size: columns go where it is narrow, the least active models where it is low. Tokens are those
that the engines themselves have counted (/metrics/engines), as a mean over WINDOW_S.
"""

import contextlib
import re
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from orchestrator.cli import cells, options, screen, watch
from orchestrator.cli.describe import bare
from orchestrator.cli.exits import CliError, Json
from orchestrator.cli.tables import GAP, duration, gpus, size, state, table
from orchestrator.cli.watch import Shown

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

WINDOW_S, SCRAPE_S = 10.0, 2.0
WRITTEN = re.compile(r'^vllm:generation_tokens_total\{model="([^"]*)".*\} ([0-9.e+]+)', re.MULTILINE)
EVENTS = 5
BUSY_GPUS = 3  # with more of them than this, a GPU has one line

# What a card holds, from left to right: the key in its JSON (None: what is left), glyph, glyph in ASCII, colour.
PARTS: tuple[tuple[str, str | None, str, str, str | None], ...] = (
    ("fixed", "fixed_bytes", "█", "#", "blue"),
    ("kv", "kv_used_bytes", "▓", "=", "green"),
    ("claims", "claims_bytes", "▒", "+", "yellow"),
    ("foreign", "foreign_bytes", "▞", "x", "red"),
    ("reserve", "reserve_bytes", "·", ".", "bright_black"),
    ("free", None, " ", " ", None),
)
COLUMNS = ("MODEL", "STATE", "GPU", "KV", "USED", "LIMIT", "FIXED", "RUN", "WAIT", "TOK/S", "IDLE")
LEAST = ("GPU", "FIXED", "LIMIT", "IDLE", "USED", "TOK/S", "KV", "WAIT")
RANKS = {"ready": 1, "asleep": 2, "failed": 3, "stopped": 4}  # what is on its way comes before them


@click.command()
@click.option("--once", is_flag=True, help="One frame, and no more; also what a pipe gets.")
@options.interval_option
@options.shared
@click.pass_obj
def top(call: options.Call, once: bool) -> None:
    """Show live who has the GPUs, and who works.

    Per GPU one bar: `fixed` is the engines' weights and context, `kv` the KV memory they have mapped, `claims` what is
    promised to models that start, `foreign` other people's processes, `reserve` what is never given out. Per model its
    KV memory as a bar of its limit, its requests that RUN and WAIT, its tokens a second (of the last 10 s), and how
    long nobody has asked for it. The most active models come first. Ctrl-C or q ends it.

    \b
    Examples:
      orchestratorctl top
      orchestratorctl top --interval 5s
      orchestratorctl top --once            # a single frame, for a ticket
    """
    rates = Rates()
    client = call.client()

    def look(client: "Client") -> Shown:
        status, models = client.get("/status"), client.models()["models"]
        events = client.get(f"/events?tail={EVENTS}")["events"]
        rates.look(client)
        names = [str(model.get("name")) for model in _by_activity(models, rates)]
        return Shown({"status": status, "models": models, "events": events}, lambda: frame(status, models, events, rates), names)

    if once or not call.for_people or not screen.redraws():
        call.show(*look(client))
    else:
        watch.redraw(client, look, call.every or options.INTERVAL_S, titled=False)


class Rates:
    """Tokens a second of each model that is awake, from what its engine had written at looks of the last WINDOW_S."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def look(self, client: "Client") -> None:
        """Asks no oftener than SCRAPE_S: a vLLM says 100 KiB. Where it cannot be known, there are no rates."""
        if not self._seen or time.monotonic() - self._seen[-1][0] >= SCRAPE_S:
            with contextlib.suppress(CliError):
                self.see(client.text("/metrics/engines"), time.monotonic())

    def see(self, metrics: str, now: float) -> None:
        """`now`: time.monotonic() of the look."""
        totals: dict[str, float] = {}
        for name, value in WRITTEN.findall(metrics):
            totals[name] = totals.get(name, 0.0) + float(value)
        self._seen.append((now, totals))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def of(self, name: str) -> float | None:
        """None: not known, or not yet."""
        told = [(at, totals[name]) for at, totals in self._seen if name in totals]
        anew = max((at for at in range(1, len(told)) if told[at][1] < told[at - 1][1]), default=0)  # another engine counts from 0
        (first, before), (last, total) = (told[anew], told[-1]) if told else ((0.0, 0.0), (0.0, 0.0))
        return (total - before) / (last - first) if last > first else None


# ---- a frame ----------------------------------------------------------------------------------------------------------


def frame(status: Json, models: Sequence[Json], events: Sequence[Json], rates: Rates) -> str:
    """Lines of the terminal's width and height; whole where there is no terminal."""
    room, high = screen.width(), screen.height()
    cards: list[Json] = status.get("gpus") or []
    above = [*_head(status, models, rates, room), "", *(line for card in cards for line in _card(card, len(cards), room)), ""]
    below = [] if high is not None and high < len(above) + 2 * EVENTS else _events(events, room)
    left = None if high is None else max(2, high - len(above) - len(below))
    return "\n".join(cells.head(line, room) if room else line for line in [*above, *_models(models, rates, room, left), *below])


def _head(status: Json, models: Sequence[Json], rates: Rates, room: int | None) -> list[str]:
    running, waiting = (sum(int(model.get(key) or 0) for model in models) for key in ("in_flight", "waiting"))
    total = [rates.of(str(model.get("name"))) for model in models]
    said = [f"orchestratord {status.get('version')}, up {duration(status.get('uptime_s'))}"]
    said += [", ".join(f"{count} {state(name)}" for name, count in (status.get("models") or {}).items() if count) or "no models"]
    said += [f"{running} running, {waiting} waiting"]
    said += [f"{sum(filter(None, total)):.0f} tokens/s"] if any(rate is not None for rate in total) else []
    said += [click.style("simulated GPUs", fg="yellow")] if status.get("gpu_source") == "simulated" else []
    return _flow(said, room)


def _card(card: Json, count: int, room: int | None) -> list[str]:
    """Its bar and, where there are few, what the parts of the bar are."""
    label, total = f"GPU {card.get('index')}", int(card.get("total_bytes") or 0)
    told = f"{size(card.get('used_bytes'))} of {size(total)}"
    amounts = [int(card.get(key) or 0) if key else 0 for _, key, *_ in PARTS]
    amounts[-1] = max(0, total - sum(amounts))
    wide = max(8, min(room or 100, 140) - cells.width(label) - cells.width(told) - 2 * len(GAP) - 2)
    lines = [f"{label}{GAP}[{_stack(amounts, wide)}]{GAP}{told}"]
    if card.get("error"):
        lines.append(click.style(f"{label}: {bare(card['error'])}", fg="red"))
    if count <= BUSY_GPUS:
        limit = f" of {size(card.get('kv_limit_bytes'))}"
        parts = [
            f"{click.style(_glyph(part), fg=part[4])} {part[0]} {size(amount)}{limit if part[0] == 'kv' else ''}".strip()
            for part, amount in zip(PARTS, amounts, strict=True)
        ]
        lines += _flow(parts, room, " " * (cells.width(label) + len(GAP)) if (room or 100) >= 80 else "")
    return lines


def _stack(amounts: Sequence[int], wide: int) -> str:
    """The parts side by side, rounded at their edges, so that together they are always the whole bar."""
    whole, before, at, bar = max(1, sum(amounts)), 0, 0, ""
    for part, amount in zip(PARTS, amounts, strict=True):
        before += amount
        edge = round(wide * before / whole)
        bar += click.style(_glyph(part) * (edge - at), fg=part[4]) if edge > at else ""
        at = edge
    return bar


def _glyph(part: tuple[str, str | None, str, str, str | None]) -> str:
    return part[2] if screen.can_show("".join(each[2] for each in PARTS)) else part[3]


def _models(models: Sequence[Json], rates: Rates, room: int | None, left: int | None) -> list[str]:
    """The table, the most active first; `left`: lines that it may take."""
    ordered = _by_activity(models, rates)
    shown = ordered if left is None or len(ordered) < left else ordered[: max(0, left - 2)]
    wide = 8 if room and room < 80 else 12 if room and room < 110 else 20
    lines = table(COLUMNS, [_row(model, rates, wide) for model in shown], least=LEAST).split("\n")
    if rest := ordered[len(shown) :]:
        kinds = dict.fromkeys(str(model.get("state")) for model in rest)
        counts = [f"{sum(model.get('state') == kind for model in rest)} {kind}" for kind in kinds]
        lines.append(click.style(f"+{len(rest)} more: {', '.join(counts)}", dim=True))
    return lines


def _by_activity(models: Sequence[Json], rates: Rates) -> list[Json]:
    def key(model: Json) -> tuple[float, float, int, float, str]:
        name, asked = str(model.get("name")), (model.get("in_flight") or 0) + (model.get("waiting") or 0)
        idle = model.get("idle_s")
        return (-asked, -(rates.of(name) or 0.0), RANKS.get(str(model.get("state")), 0), float("inf") if idle is None else idle, name)

    return sorted(models, key=key)


def _row(model: Json, rates: Rates, wide: int) -> list[str]:
    engine, pool = model.get("engine") or {}, model.get("pool") or {}
    used, limit = pool.get("used_bytes"), pool.get("limit_bytes")
    held = (used or 0) + (pool.get("prealloc_bytes") or 0)
    # All of its GPU memory that is not KV, on all of its GPUs together.
    fixed = max(0, engine["gpu_bytes"] - held * len(engine.get("gpus") or ())) if engine.get("gpu_bytes") is not None else None
    rate, running, waiting = rates.of(str(model.get("name"))), int(model.get("in_flight") or 0), int(model.get("waiting") or 0)
    return [
        str(model.get("name")), str(model.get("state")), gpus(engine), _share(used, limit, wide, running + waiting > 0),
        size(used), size(limit), size(fixed),
        str(running), str(waiting), "-" if rate is None else f"{rate:.0f}",
        duration(model.get("idle_s")),
    ]  # fmt: skip


def _share(used: int | None, limit: int | None, wide: int, asked: bool) -> str:
    """KV in use as a part of its limit: red where it is all of it and more may be needed."""
    if used is None or not limit:
        return "-"
    share = min(1.0, used / limit)
    full, empty = ("█", "░") if screen.can_show("█░") else ("#", ".")
    filled = max(round(wide * share), 1 if used else 0)
    colour = "red" if share > 0.95 else "yellow" if share > 0.75 else "green"
    return click.style(full * filled, fg=colour if asked else "green") + empty * (wide - filled)


def _events(events: Sequence[Json], room: int | None) -> list[str]:
    if not events:
        return []
    last = events[-EVENTS:]
    names = max(cells.width(str(event.get("model") or "daemon")) for event in last)
    kinds = max(cells.width(str(event.get("kind"))) for event in last)
    at = [time.strftime("%H:%M:%S", time.localtime(event.get("at") or 0)) for event in last]
    most = names if room is None else min(names, max(8, room // 4))
    return ["", *(
        GAP.join([clock, cells.pad(cells.tail(str(event.get("model") or "daemon"), most), most), cells.pad(str(event.get("kind")), kinds),
                  bare(event.get("reason") or "")])
        for clock, event in zip(at, last, strict=True)
    )]  # fmt: skip


def _flow(items: Sequence[str], room: int | None, indent: str = "") -> list[str]:
    """Items side by side, on as many lines as they need."""
    lines = [indent]
    for item in items:
        longer = lines[-1] + (GAP if lines[-1] != indent else "") + item
        if room is None or lines[-1] == indent or cells.width(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(indent + item)
    return lines
