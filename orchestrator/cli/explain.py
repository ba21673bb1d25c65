"""The page of `explain`: a GPU's memory as lines that add up to the card, then its KV pools and what would change their limits.

The lines are shown in whole MiB, as nvidia-smi does, and rounded so that what is seen adds up too. The sum of the bytes is
checked here: a daemon whose lines do not add up is not believed in silence. Names of processes are other people's text, so
they are shown without control characters.
"""

import math
from collections.abc import Sequence

import click

from orchestrator.cli import cells, screen
from orchestrator.cli.describe import READABLE, bare, labelled
from orchestrator.cli.exits import Json
from orchestrator.cli.tables import GAP, MIB, NAME_MIN, size, table

BUDGET = ("WHAT", "SIZE", "MODEL", "WHY")
POOLS = ("MODEL", "LIMIT", "USED", "PREALLOC", "FLOOR", "CEILING", "DEMAND", "TARGET", "WEIGHT", "STATUS")
POOLS_LEAST = ("WEIGHT", "PREALLOC", "TARGET", "CEILING", "FLOOR", "DEMAND", "STATUS", "USED")
POOL_SIZES = tuple(f"{column.lower()}_bytes" for column in POOLS[1:8])


def named(gpus: Sequence[Json], wanted: int | str) -> list[Json]:
    """Those with this index or this whole UUID."""
    return [gpu for gpu in gpus if wanted == gpu.get("index") or str(wanted).lower() == str(gpu.get("uuid")).lower()]


def beginning(gpus: Sequence[Json], text: str) -> list[Json]:
    return [gpu for gpu in gpus if str(gpu.get("uuid")).lower().startswith(text.lower())]


def about(gpu: Json, model: Json) -> Json | None:
    """What of `gpu` concerns one model: its own lines, one for all others so that they still add up, its pools. None: nothing."""
    own = [line for line in _lines(gpu) if line.get("model") == model["name"]]
    pools = [pool for pool in _pools(gpu) if pool.get("model") == model["name"]]
    engine = model.get("engine") or {}
    if not own and not pools and gpu.get("uuid") not in (engine.get("gpus") or ()):
        return None
    rest = [line for line in _lines(gpu) if line.get("model") != model["name"]]
    return {**gpu, "lines": [*own, _others(rest)] if rest else own, "pools": pools}


def page(gpus: Sequence[Json], no_pool: str = "no KV pool on this GPU", wide: bool = False) -> str:
    return "\n\n".join(_gpu(gpu, no_pool, wide) for gpu in gpus) or "no GPU seen"


def plain(text: object) -> str:
    """One line without control characters: a process may be called anything, a terminal must not obey it."""
    return "".join(each if each.isprintable() else "?" for each in bare(text))


def whole_mib(values: Sequence[int]) -> list[int]:
    """Each value in MiB, off by less than one, with the sum of all rounded once: the largest fractions are rounded up."""
    shown = [value // MIB for value in values]
    spare = math.floor(sum(values) / MIB + 0.5) - sum(shown)
    for at in sorted(range(len(values)), key=lambda at: -(values[at] % MIB))[:spare]:
        shown[at] += 1
    return shown


def _gpu(gpu: Json, no_pool: str, wide: bool) -> str:
    index, pools = gpu.get("index"), _pools(gpu)
    head = click.style(f"GPU {index}", bold=True) + f": {gpu.get('name')}, {gpu.get('uuid')}"
    if error := gpu.get("error"):
        head += "\n" + click.style(f"GPU {index}: {plain(error)}", fg="red")
        if not _lines(gpu):
            return head
        head += "\nthese figures are the last that could be read"
    if not pools:
        return "\n\n".join([head, _budget(gpu), no_pool])
    share = f"KV memory for all pools of this GPU: {size(gpu.get('pool_bytes'))}"
    words = labelled([(str(pool.get("model")), _words(pool)) for pool in pools])
    return "\n\n".join([head, _budget(gpu), "\n".join([share, _pool_table(pools, wide)]), words])


def _budget(gpu: Json) -> str:
    """The lines, the total, and the verdict on their sum."""
    lines, total = _lines(gpu), int(gpu.get("total_bytes") or 0)
    amounts = [int(line.get("bytes") or 0) for line in lines]
    gap = sum(amounts) - total
    shown = [f"{each}MiB" for each in (*whole_mib(amounts), *whole_mib([total]))]
    wide = max(len(each) for each in (*shown, BUDGET[1]))
    meaning = "the card; the lines add up to it" if gap == 0 else "the card"
    whats = [(str(line.get("what")), str(line.get("model") or "-"), _why(line)) for line in lines]
    whats.append(("total", "-", meaning))
    rows = [[what, amount.rjust(wide), model, why] for (what, model, why), amount in zip(whats, shown, strict=True)]
    text = _folded((BUDGET[0], BUDGET[1].rjust(wide), *BUDGET[2:]), rows)
    if gap:
        fault = f"these lines do NOT add up: they sum to {sum(amounts)} bytes, {abs(gap)} {'more' if gap > 0 else 'less'} than the card"
        text += "\n" + click.style(f"{fault}; a fault of the daemon's, please report it", fg="red")
    return text


def _folded(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table; on a narrow terminal names give way and reasons are folded in their column, or stand below their line."""
    room = screen.width()
    if room is None:
        return table(headers, rows)
    shorter = [[what, amount, cells.tail(model, max(NAME_MIN, room // 4))] for what, amount, model, _ in rows]
    left = table(headers[:3], shorter).split("\n")
    wide = max(map(cells.width, left)) + len(GAP)
    beside = room - wide >= READABLE
    lines = [cells.pad(left[0], wide) + headers[3] if beside else left[0]]
    for line, (*_, why) in zip(left[1:], rows, strict=True):
        parts = cells.wrap(why, room - wide if beside else room - len(GAP))
        lines += (
            [cells.pad(line, wide) + parts[0], *(" " * wide + part for part in parts[1:])] if beside else [line, *(GAP + p for p in parts)]
        )
    return "\n".join(lines)


def _why(line: Json) -> str:
    return "; ".join(plain(part) for part in (line.get("who"), line.get("why")) if part)


def _others(rest: Sequence[Json]) -> Json:
    """All lines that are not this model's as one, with what they are made of."""
    whats = list(dict.fromkeys(str(line.get("what")) for line in rest))
    amounts = [sum(int(line.get("bytes") or 0) for line in rest if str(line.get("what")) == what) for what in whats]
    why = ", ".join(f"{what} {amount}MiB" for what, amount in zip(whats, whole_mib(amounts), strict=True))
    return {"what": "others", "who": None, "model": None, "bytes": sum(amounts), "why": why}


def _pool_table(pools: Sequence[Json], wide: bool) -> str:
    if wide:
        rows = [
            [*_pool_row(pool), size(pool.get("charge_bytes")), size(pool.get("bundle_bytes")), str(pool.get("launch_id"))] for pool in pools
        ]
        return table((*POOLS, "CHARGE", "BUNDLE", "LAUNCH"), rows)
    return table(POOLS, [_pool_row(pool) for pool in pools], least=POOLS_LEAST)


def _pool_row(pool: Json) -> list[str]:
    weight = pool.get("weight")
    sizes = [size(pool.get(key)) for key in POOL_SIZES]
    return [str(pool.get("model")), *sizes, "-" if weight is None else f"{weight:g}", str(pool.get("status") or "-")]


def _words(pool: Json) -> str:
    reason, change = plain(pool.get("reason") or "no reason given"), plain(pool.get("change") or "")
    return reason + (f"\nwhat would change it: {change}" if change else "")


def _lines(gpu: Json) -> list[Json]:
    return gpu.get("lines") or []


def _pools(gpu: Json) -> list[Json]:
    return gpu.get("pools") or []
