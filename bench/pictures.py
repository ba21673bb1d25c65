"""pictures: what `orchestratorctl top` and `explain` show of a busy daemon, as docs/pictures/*.svg.

The commands run on a terminal of their own, against a daemon with a simulated GPU, under load; no picture is made by hand.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from bench.box import ROOT, Box
from bench.demo import QWEN, SHAPES
from bench.folders import of_shape
from bench.workloads import ask, client

COLUMNS, LINES = 112, 26
WARM_S = 25.0  # of traffic before the first picture: `top` shows rates of 15 s
MODELS = {
    "qwen-0.5b": "qwen-0.5b",
    "qwen-1.5b": "qwen-1.5b",
    "team/night": "qwen-0.5b",
    "team/summaries": "qwen-0.5b",
    "spare": "qwen-1.5b",
}
LOAD = {"qwen-0.5b": 12, "qwen-1.5b": 5}  # requests at once
TOKENS = (5000, 120)  # in and out
ENGINE = {"kind": "simulated", "env": {"SIM_LOAD_S": "1.0", "SIM_STEP_S": "0.02"}, "args": ["--max-model-len", "8192"]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures", help="folder for the pictures")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder:
        env = {
            "ORCH_GPUS__SOURCE": "simulated",
            "ORCH_GPUS__SIMULATED": json.dumps({"count": 1, "memory": "24GiB"}),
            "ORCH_ENGINES": json.dumps({"default": ENGINE}),
        }
        with Box(env, sampled=False) as box:
            for name, shape in MODELS.items():
                source = of_shape(Path(folder) / shape, QWEN | SHAPES[shape])
                box.ctl("add-model", name, str(source), *(["--no-start"] if name == "spare" else []))
            box.ctl("sleep", "team/night")
            asyncio.run(_busy(box, options.out))
    return 0


async def _busy(box: Box, folder: Path) -> None:
    """Pictures, taken while requests run."""
    async with client(box.url, 60.0) as api:

        async def on(name: str) -> None:
            while True:
                await ask(api, name, *TOKENS, stream=True)

        tasks = [asyncio.create_task(on(name)) for name, count in LOAD.items() for _ in range(count)]
        try:
            top = await asyncio.to_thread(shown, box, ["top"], WARM_S)
            explain = await asyncio.to_thread(shown, box, ["explain"], None)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
    for name, text in (("top", top), ("explain", explain)):
        path = folder / f"{name}.svg"
        path.write_text(svg(text, f"orchestratorctl {name} (simulated GPU)"))
        print(path)


def shown(box: Box, words: Sequence[str], seconds: float | None) -> str:
    """What the command shows on a terminal, with its colours: its last whole frame after so many seconds; None: all, when it has ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "orchestrator.cli", "--host", str(box.socket), *words]
    env = {**{key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env)
    os.close(theirs)
    ends, raw = time.monotonic() + (seconds or 60.0), b""
    with contextlib.suppress(OSError):  # EIO: the other side has ended
        while (left := ends - time.monotonic()) > 0:
            if select.select([ours], [], [], left)[0]:
                raw += os.read(ours, 65536)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):
        while os.read(ours, 65536):
            pass
    process.wait()
    os.close(ours)
    text = raw.decode()
    frames = text.split("\x1b[H")
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-ln-z]", "", frames[-2 if len(frames) > 2 else -1])  # the last may be cut


def svg(text: str, title: str) -> str:
    """The same picture for the same text."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(re.sub(r"\r+\n", "\n", text).rstrip()), soft_wrap=True)
    return console.export_svg(title=title, theme=MONOKAI, unique_id=f"orchestratorctl-{title.split()[1]}")
