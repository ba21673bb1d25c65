"""Random traffic to many models: Poisson arrivals, Zipf popularity, small requests, every second one streamed. Seeded: the same each time.

Each client says that it waits DEADLINE_S (X-Request-Timeout) and not longer.
"""

import asyncio
import itertools
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.results import percentile
from bench.workloads import Answer, ask, client
from orchestrator.experiments.arrivals import shares

DEADLINE_S = 120.0
PROMPTS = (16, 64, 256, 512)
ANSWERS = (8, 16, 32, 64)
REFUSED = (429, 503)
LATE = "'code': 'timeout'"  # in the words of a refusal: it had waited
ZIPF = 1.0


@dataclass(frozen=True)
class Request:
    """`at_s`: seconds after the traffic began."""

    at_s: float
    model: str
    prompt: int
    tokens: int
    stream: bool


@dataclass(frozen=True)
class Fate:
    """What became of one. `status`: of the refusal, 0 for a broken answer; None: it was answered."""

    request: Request
    answer: Answer
    status: int | None

    @property
    def wait_s(self) -> float:
        """To the first token of a stream, to the end of the others: those are short."""
        return self.answer.total_s if self.answer.first_s is None else self.answer.first_s

    @property
    def refused(self) -> bool:
        return self.status in REFUSED

    @property
    def failed(self) -> bool:
        return self.status is not None and not self.refused


def schedule(models: Sequence[str], seconds: float, rate: float, seed: int) -> list[Request]:
    """`rate`: requests a second, of all together. Which model is how popular is drawn too."""
    dice = random.Random(seed)
    ranked = dice.sample(list(models), len(models))
    weights = shares(len(ranked), ZIPF)
    found: list[Request] = []
    at = dice.expovariate(rate)
    while at < seconds:
        model = dice.choices(ranked, weights)[0]
        found.append(Request(at, model, dice.choice(PROMPTS), dice.choice(ANSWERS), len(found) % 2 == 0))
        at += dice.expovariate(rate)
    return found


async def play(url: str, requests: Sequence[Request], drain_s: float) -> tuple[list[Fate], int]:
    """Their fates in the order of the requests, and how many still waited `drain_s` after the last one: those were cut off."""
    numbers = itertools.count()
    began = time.monotonic()
    async with client(url, timeout_s=DEADLINE_S + 30) as plain:
        api = plain.with_options(default_headers={"X-Request-Timeout": f"{DEADLINE_S:.0f}"})

        async def one(request: Request) -> Fate:
            answer = await ask(api, request.model, request.prompt, request.tokens, request.stream, f"{next(numbers)} ")
            return Fate(request, answer, status_of(answer))

        asked: list[asyncio.Task[Fate]] = []
        for request in requests:
            await asyncio.sleep(max(0.0, began + request.at_s - time.monotonic()))
            asked.append(asyncio.create_task(one(request)))
        _, late = await asyncio.wait(asked, timeout=drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [task.result() for task in asked if not task.cancelled()], len(late)


def status_of(answer: Answer) -> int | None:
    if answer.error is None:
        return None
    found = re.search(r"Error code: (\d+)", answer.error)
    return int(found[1]) if found else 0


def figures(fates: Sequence[Fate], cut: int) -> dict[str, float]:
    waits = [fate.wait_s for fate in fates if fate.status is None]
    found: dict[str, float] = {
        "churn_requests": len(fates) + cut,
        "churn_answered": len(waits),
        "churn_errors": sum(fate.failed for fate in fates),
        "churn_late": sum(LATE in (fate.answer.error or "") for fate in fates),
        "churn_refused": sum(fate.refused for fate in fates),
        "churn_cut": cut,
    }
    for share in (0.5, 0.95, 0.99) if waits else ():
        found[f"churn_wait_p{100 * share:.0f}_s"] = percentile(waits, share)
    return found | ({"churn_wait_most_s": max(waits)} if waits else {})


def notes(fates: Sequence[Fate]) -> dict[str, Any]:
    by_model: dict[str, list[Fate]] = {}
    for fate in fates:
        by_model.setdefault(fate.request.model, []).append(fate)
    unanswered = [f"{fate.request.at_s:.1f}s {fate.request.model}: {fate.answer.error}" for fate in fates if fate.status is not None]
    return {
        "churn_by_model": {
            name: {
                "requests": len(some),
                "unanswered": sum(fate.status is not None for fate in some),
                "wait_most_s": round(max(fate.wait_s for fate in some), 2),
            }
            for name, some in sorted(by_model.items())
        },
        "churn_unanswered": unanswered[:10],
    }
