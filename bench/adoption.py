"""adoption: eight engines on a simulated GPU, all ready; the daemon is killed and started again. When is each of the eight served again?

Counted from the start of the new process: its imports, its look at every engine, one request answered by each. The worst of the rounds is
the figure. Then the same with `restart-daemon --keep-engines` under requests: how many fail, and how long the longest waits.
"""

import argparse
import asyncio
import json
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from bench import results
from bench.box import SIMULATED_CARD, Box
from bench.demo import QWEN, SHAPES
from bench.folders import of_shape
from bench.workloads import Answer, ask, client

ENGINES = 8
GOAL_S = 3.0
ROUNDS = 5
READY_S = 120.0
BACK_S = 60.0
POLL_S = 0.01
REST_S = 1.0  # of traffic before and after a restart that keeps the engines
STREAM = (32, 4000)  # tokens in and out of the requests that the daemon's death cuts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench adoption", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the daemon is killed")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    names = [f"sim-{number}" for number in range(ENGINES)]
    with tempfile.TemporaryDirectory(prefix="orch-models-") as folder:
        source = of_shape(Path(folder) / "qwen-0.5b", QWEN | SHAPES["qwen-0.5b"])
        with Box(_settings(names, source), sampled=False) as box:
            box.until_ready(names, READY_S)
            killed = [_killed(box, names) for _ in range(options.rounds)]
            kept, errors = asyncio.run(_kept(box, names))
    seconds = [float(each["back_s"]) for each in killed]
    figures = {
        "engines": ENGINES,
        "restarted": sum(int(each["restarted"]) for each in killed),
        "back_s": max(seconds),
        "back_p50_s": results.percentile(seconds, 0.5),
        "rounds": len(killed),
        "cut_requests": sum(int(each["cut"]) for each in killed),
        **kept,
    }
    passed = {
        "no engine was restarted": figures["restarted"] == 0 and figures["keep_restarted"] == 0,
        f"each was served again within {GOAL_S:g} s": figures["back_s"] <= GOAL_S,
        "requests of the dead daemon failed, none of them short": figures["cut_requests"] == ENGINES * options.rounds,
        "a restart that keeps the engines failed no request": figures["keep_failed"] == 0,
    }
    notes = {"rounds": killed, "keep_errors": errors, "passed": passed}
    path = results.write("adoption", results.typed("adoption", argv), figures, notes, "simulated", folder=options.out)
    return results.verdict(figures, passed, path)


def _settings(names: Sequence[str], source: Path) -> dict[str, str]:
    """A fixed port: clients know where to come back to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spec = {"source": str(source), "preload": True, "pinned": True}
    return {
        "ORCH_LISTEN__PORT": str(port),
        **SIMULATED_CARD,
        "ORCH_MODELS": json.dumps(dict.fromkeys(names, spec)),
        "SIM_LOAD_S": "0",
    }


# ---- killed -----------------------------------------------------------------------------------------------------------


def _killed(box: Box, names: Sequence[str]) -> dict[str, Any]:
    """One round: killed with a request in each engine, started again, asked until each has answered."""
    url, before = box.url, _launches(box)
    fates = asyncio.run(_cut(url, names, box.kill))
    began = time.monotonic()
    box.begin()
    back = asyncio.run(_all_back(url, names, began))
    after = _launches(box)
    return {
        "back_s": max(back.values()),
        "first_back_s": min(back.values()),
        "restarted": sum(before[name] != after[name] for name in names),
        "cut": sum(fate.error is not None for fate in fates),
    }


async def _cut(url: str, names: Sequence[str], kill: Callable[[], None]) -> list[Answer]:
    """A stream from each engine runs; then `kill`. What became of the streams."""
    async with client(url, BACK_S) as api:
        streams = [asyncio.create_task(ask(api, name, *STREAM, stream=True)) for name in names]
        async with asyncio.timeout(BACK_S):
            for name in names:
                await _until_answered(api, name)
        await asyncio.to_thread(kill)
        return list(await asyncio.gather(*streams))


async def _all_back(url: str, names: Sequence[str], began: float) -> dict[str, float]:
    """Seconds from `began` to a first answer of each, all of them asked all the time. Raises TimeoutError."""

    async def one(name: str) -> float:
        await _until_answered(api, name)
        return time.monotonic() - began

    async with client(url, BACK_S) as api, asyncio.timeout(BACK_S):
        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


async def _until_answered(api: AsyncOpenAI, name: str) -> None:
    while True:
        if (await ask(api, name, 8, 1, stream=False)).error is None:
            return
        await asyncio.sleep(POLL_S)


# ---- told to keep them ------------------------------------------------------------------------------------------------


async def _kept(box: Box, names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """`restart-daemon --keep-engines` while each engine is asked without a pause, each time over a new connection: figures, and errors."""
    url, before, over = box.url, _launches(box), asyncio.Event()

    async def traffic(name: str) -> list[Answer]:
        answers = []
        async with client(url, BACK_S) as api:
            anew = api.with_options(default_headers={"Connection": "close"})
            while not over.is_set():
                answers.append(await ask(anew, name, 8, 4, stream=False))
        return answers

    asking = [asyncio.create_task(traffic(name)) for name in names]
    await asyncio.sleep(REST_S)
    began = time.monotonic()
    await asyncio.to_thread(box.ctl, "restart-daemon", "--keep-engines")
    took = time.monotonic() - began
    await asyncio.sleep(REST_S)
    over.set()
    answers = [answer for each in await asyncio.gather(*asking) for answer in each]
    after = _launches(box)
    errors = [answer.error for answer in answers if answer.error is not None]
    return {
        "keep_restarted": sum(before[name] != after[name] for name in names),
        "keep_requests": len(answers),
        "keep_failed": len(errors),
        "keep_longest_s": max(answer.total_s for answer in answers),
        "keep_command_s": took,
    }, errors


def _launches(box: Box) -> Mapping[str, str]:
    return {name: str((model["engine"] or {}).get("launch_id")) for name, model in box.models().items()}
