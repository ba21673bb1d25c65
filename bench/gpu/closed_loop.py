"""Continuous load, in a process of its own: so many clients a model, each sends its next request when the last one is answered.

Prompts and lengths are mixed and seeded; no two requests share a prefix. Ends when its stdin does: requests under way get DRAIN_S.
Prints one JSON object: {"requests", "failed", "cut", "tokens", "seconds", "errors", "first_p50_s", "first_p99_s"}.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from bench.box import ROOT
from bench.results import percentile
from bench.workloads import Answer, ask, client

DRAIN_S = 20.0
PROMPTS = (64, 256, 1024, 4000)
ANSWERS = (16, 64, 128, 256)
AFTER_ERROR_S = 0.2  # a daemon that refuses at once is not to be asked ten thousand times


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.closed_loop", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, default=24, help="for each model")
    parser.add_argument("--scale", type=float, default=1.0, help="of prompts and answers")
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(_run(options))), flush=True)
    return 0


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    answers: list[Answer] = []
    began = time.monotonic()
    async with client(options.url, timeout_s=120) as api:

        async def one(model: str, number: int) -> None:
            dice = random.Random(f"{model} {number}")
            turn = 0
            while not ended.is_set():
                prompt, tokens = (max(8, int(dice.choice(sizes) * options.scale)) for sizes in (PROMPTS, ANSWERS))
                answers.append(await ask(api, model, prompt, tokens, turn % 2 == 0, f"{number} {turn} "))
                if answers[-1].error:
                    await asyncio.sleep(AFTER_ERROR_S)
                turn += 1

        tasks = [asyncio.create_task(one(model, number)) for model in options.models for number in range(options.clients)]
        await ended.wait()
        seconds = time.monotonic() - began
        _, late = await asyncio.wait(tasks, timeout=DRAIN_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    failed = [answer for answer in answers if answer.error]
    first = [answer.first_s for answer in answers if answer.first_s is not None and not answer.error]
    return {
        "requests": len(answers),
        "failed": len(failed),
        "cut": len(late),  # not answered within DRAIN_S of the end: under way, not failed
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": round(seconds, 1),
        "errors": [f"{answer.model}: {answer.error}" for answer in failed[:5]],
        "first_p50_s": percentile(first, 0.5) if first else None,
        "first_p99_s": percentile(first, 0.99) if first else None,
    }


class Load:
    """The process, from the caller's side; `said` is what it measured, once the `with` has ended."""

    def __init__(self, url: str, models: Sequence[str], clients: int, scale: float) -> None:
        options = ["--url", url, "--clients", str(clients), "--scale", str(scale)]
        self._command = [sys.executable, "-m", "bench.gpu.closed_loop", *options, *models]
        self.said: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            text, _ = self._process.communicate(timeout=DRAIN_S + 20)
            self.said = json.loads(text)
        except (subprocess.TimeoutExpired, ValueError) as fault:
            self._process.kill()
            self._process.wait()
            self.said = {"requests": 0, "failed": 1, "errors": [f"the load itself failed: {fault}"]}


if __name__ == "__main__":
    sys.exit(main())
