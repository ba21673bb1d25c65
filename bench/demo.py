"""demo: two models share a small simulated GPU. Adds them with orchestratorctl, sends alternating bursts through /v1 with the
official openai client, shows live who holds how much KV and how the budgets move, writes the same as a picture, leaves nothing.
"""

import argparse
import asyncio
import glob
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench import plots
from bench.box import ROOT, Box, Sample
from bench.workloads import Answer, burst, client

MIB = 1 << 20
# The public shapes of Qwen2.5; a folder with a config.json is all that a simulated engine needs of a model.
QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
SHAPES = {
    "qwen-0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                  "intermediate_size": 4864, "tie_word_embeddings": True},
    "qwen-1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                  "intermediate_size": 8960, "tie_word_embeddings": True},
}  # fmt: skip
ROUNDS = 3
# requests, prompt tokens, answer tokens of one burst: about 5 GiB of KV, which is more than an equal share of the pool
BURSTS = {"qwen-0.5b": (64, 6400, 220), "qwen-1.5b": (28, 6400, 220)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", help="folder for the picture")
    options = parser.parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder, Box(configs=[ROOT / "config/demo.yaml"]) as box:
        _write_models(Path(folder))
        console.print(f"[bold]A daemon with a simulated GPU[/] serves {box.url}\n")
        for name in SHAPES:
            _say(console, box, "add-model", name, f"{folder}/{name}", "--alias", name.replace("qwen-", "q"))
        ipc = [model["engine"]["ipc_name"] for model in box.models().values()]
        marks: list[tuple[float, str]] = []
        with _live(console, box, marks):
            answers = asyncio.run(_bursts(box, marks))
        _say(console, box, "ps")
        picture = options.out / "demo.png"
        plots.memory_over_time(box.samples(), list(SHAPES), marks, "Two models share one GPU (simulated)", picture)
        failed = [answer.error for answer in answers if answer.error]
        console.print(f"{len(answers)} requests answered, {len(failed)} failed; {_moved(box.samples())}")
        for error in failed[:3]:
            console.print(f"  {error}", style="red")
        for name in SHAPES:
            _say(console, box, "rm", name)
    left = [path for name in ipc for path in (*glob.glob(f"/dev/shm/{name}*"), *glob.glob(f"/tmp/kvcached-tp-{name}*"))]
    left += [str(box.folder)] if box.folder.exists() else []
    console.print(f"left behind: {', '.join(left) or 'nothing'}")
    console.print(f"[bold]The same as a picture: {picture}[/]")
    return 1 if failed or left else 0


def _write_models(folder: Path) -> None:
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(QWEN | shape))


def _say(console: Console, box: Box, *words: str) -> None:
    console.print(f"[dim]$[/] orchestratorctl {' '.join(words)}", highlight=False)
    console.print(box.ctl(*words).stdout, highlight=False)


async def _bursts(box: Box, marks: list[tuple[float, str]]) -> list[Answer]:
    """Alternating: while one model works, the other is idle and its budget goes over."""
    answers: list[Answer] = []
    async with client(box.url) as api:
        for turn in range(ROUNDS):
            for name, (requests, prompt, tokens) in BURSTS.items():
                marks.append((box.now_s(), f"{name} #{turn + 1}"))
                answers += await burst(api, name, requests, prompt, tokens)
    marks.append((box.now_s(), "done"))
    return answers


@contextmanager
def _live(console: Console, box: Box, marks: Sequence[tuple[float, str]]) -> Iterator[None]:
    """A table that moves, on a terminal; else a line every two seconds."""
    stop = threading.Event()

    def show() -> None:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=5) as live:
                while not stop.wait(0.2):
                    live.update(_table(box.samples()[-1:], marks, console.width))
        else:
            while not stop.wait(2.0):
                for sample in box.samples()[-1:]:
                    console.print(_line(sample), highlight=False)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _table(last: Sequence[Sample], marks: Sequence[tuple[float, str]], width: int) -> Table:
    cells = max(8, min(40, width - 66))
    table = Table(title=f"burst: {marks[-1][1] if marks else '-'}", title_justify="left", expand=False)
    for column in ("model", "requests", "█ used │ limit", "used/limit MiB", "why"):
        table.add_column(column, no_wrap=True)
    for sample in last:
        scale = max(1, sample.status["gpus"][0]["pool_bytes"])
        for name, model in sample.models.items():
            pool = model["pool"]
            if pool:
                bar = _bar(pool["used_bytes"] / scale, pool["prealloc_bytes"] / scale, pool["limit_bytes"] / scale, cells)
                held = f"{pool['used_bytes'] / MIB:5.0f}/{pool['limit_bytes'] / MIB:5.0f}"
                table.add_row(name, f"{model['in_flight']:3d} +{model['waiting']}", bar, held, pool["reason"].split(";")[0])
    return table


def _bar(used: float, prealloc: float, limit: float, width: int) -> str:
    """Shares of the pool memory, as so many cells: used █, preallocated ▒, the limit │."""
    cells = ["░"] * width
    end = min(width, round(used * width))
    more = min(width, round((used + prealloc) * width))
    cells[:more] = ["█"] * end + ["▒"] * (more - end)
    cells[min(width - 1, round(limit * width))] = "│"
    return "".join(cells)


def _line(sample: Sample) -> str:
    parts = []
    for name, model in sample.models.items():
        if pool := model["pool"]:
            held = f"{pool['used_bytes'] / MIB:5.0f} of {pool['limit_bytes'] / MIB:5.0f} MiB"
            parts.append(f"{name}: KV {held}, {model['in_flight']:2d} requests")
    return f"[{sample.at_s:5.1f}s] " + "   ".join(parts)


def _moved(samples: Sequence[Sample]) -> str:
    """How far each limit went while both engines were there."""
    spans = []
    both = [s for s in samples if all(s.models.get(name, {}).get("pool") for name in SHAPES)]
    for name in SHAPES:
        limits = [s.models[name]["pool"]["limit_bytes"] / MIB for s in both]
        if limits:
            spans.append(f"{name}'s budget moved between {min(limits):.0f} and {max(limits):.0f} MiB")
    return "; ".join(spans)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
