"""The same work through the daemon (proxy, kvcached, limits) and on a plain vLLM beside it, in turns: tokens a second, ours / plain.

Both run the same model with the same vLLM arguments in the same venv; the plain one has its KV from the start, as vLLM does. Where a
model is named for this part it runs with CUDA graphs, as people run it: an eager engine is bound by its own Python, and rounds of it
differ by a tenth.
"""

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from bench.gpu.scene import BOUNDED, EAGER, Part, Scene, wait
from bench.workloads import at_most, client, engine_client
from orchestrator.drivers.vllm import EngineVenv
from orchestrator.experiments.asker import Asker
from orchestrator.experiments.static_engine import SOCKET, Recipe, StaticEngine

UTILIZATION = 0.55
PROMPT, TOKENS = 256, 128
PLAIN_START_S = 120.0
OVER_S = 30.0  # over its time: then something hangs
ROUNDS = 8  # of each, in turns: single rounds differ by a tenth


def run(scene: Scene, budget_s: float) -> Part:
    chosen = scene.options.throughput_model
    name, folder = chosen or next(iter(scene.models.items()))
    own = BOUNDED if chosen else (*EAGER, *BOUNDED)
    scene.up([name], {name: folder}, own)
    part = Part(
        notes={
            "throughput_model": name,
            "eager": not chosen,
            "requests": scene.options.requests,
            "together": scene.options.together,
            "prompt": PROMPT,
            "tokens": TOKENS,
        }
    )
    deadline = time.monotonic() + budget_s
    with contextlib.ExitStack() as held:
        scene.say("plain vLLM starts")
        socket = held.enter_context(_plain(scene, name, folder, own, min(PLAIN_START_S, budget_s - 40)))
        held.enter_context(scene.box.unwatched())
        rounds = asyncio.run(asyncio.wait_for(_in_turns(scene, name, socket, deadline), deadline + OVER_S - time.monotonic()))
    part.notes["rounds"] = rounds
    for arm in ("ours", "direct", "plain"):
        runs = [one for one in rounds if one["arm"] == arm]
        if runs:
            part.figures[f"throughput_{arm}_tokens_s"] = sum(one["tokens"] for one in runs) / sum(one["seconds"] for one in runs)
    for figure, arm in (("throughput_ratio", "ours"), ("throughput_direct_ratio", "direct")):
        ratios = [_speed(rounds, arm, n) / _speed(rounds, "plain", n) for n in sorted({one["number"] for one in rounds})]
        part.figures[figure] = statistics.median(ratios)
        part.figures[f"{figure}_least"], part.figures[f"{figure}_most"] = min(ratios), max(ratios)
    part.figures["throughput_rounds"] = len(rounds) // 3
    part.figures["failed_requests"] = sum(one["failed"] for one in rounds)
    part.passed["every request of the throughput part was answered"] = part.figures["failed_requests"] == 0
    return part


def _speed(rounds: list[dict[str, Any]], arm: str, number: int) -> float:
    """Tokens a second of one arm in one round."""
    return next(float(one["tokens"] / one["seconds"]) for one in rounds if (one["arm"], one["number"]) == (arm, number))


async def _in_turns(scene: Scene, name: str, socket: Path, deadline: float) -> list[dict[str, Any]]:
    """In turns, another arm first each time; after a warm-up of each. One round at least, ROUNDS at most, what fits before the deadline."""
    rounds: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as held:
        arms: dict[str, AsyncOpenAI] = {"ours": await held.enter_async_context(client(scene.box.url, timeout_s=90))}
        engine = Path(scene.box.models()[name]["engine"]["socket"])
        arms["direct"] = await held.enter_async_context(engine_client(engine, timeout_s=90))  # our engine, without the proxy
        arms["plain"] = await held.enter_async_context(engine_client(socket, timeout_s=90))
        for arm, api in arms.items():
            await at_most(api, name, scene.options.together, scene.options.together, PROMPT, TOKENS, f"warm {arm}")
        longest = 0.0
        for number in range(ROUNDS):
            if rounds and time.monotonic() + longest > deadline:
                break
            began = time.monotonic()
            order = list(arms.items())
            for arm, api in order[number % len(order) :] + order[: number % len(order)]:
                scene.say(f"throughput {arm} {number + 1}")
                rounds.append(await _measured(api, arm, name, scene, number))
            longest = max(longest, time.monotonic() - began)
    return rounds


async def _measured(api: AsyncOpenAI, arm: str, name: str, scene: Scene, number: int) -> dict[str, Any]:
    began = time.monotonic()
    answers = await at_most(api, name, scene.options.requests, scene.options.together, PROMPT, TOKENS, f"{arm} {number}")
    seconds = time.monotonic() - began
    errors = [f"{arm}: {answer.error}" for answer in answers if answer.error]
    tokens = sum(answer.tokens for answer in answers)
    return {"arm": arm, "number": number, "seconds": seconds, "tokens": tokens, "failed": len(errors), "errors": errors[:3]}


@contextmanager
def _plain(scene: Scene, name: str, folder: str, own: Sequence[str], start_s: float) -> Iterator[Path]:
    """A vLLM without kvcached; every process of its session is gone afterwards."""
    env = {**scene.options.engine_env, **({"SIM_GPU_DIR": str(scene.simgpu)} if scene.simgpu else {})}
    venv = EngineVenv("simulated" if scene.simulated else "vllm", scene.options.engine_python or Path(sys.executable), env, scene.args)
    recipe = Recipe(name, folder, venv, own, {}, [scene.gpu["uuid"]], 1, UTILIZATION)
    with Asker() as asker, StaticEngine(recipe, scene.out / "gpu-budgets.plain-vllm.log") as engine:
        if not wait(lambda: engine.ready(asker), start_s, 0.2):
            raise RuntimeError(f"the plain vLLM was not healthy within {start_s:.0f}s; its log: {engine.log}")
        yield engine.folder / SOCKET
