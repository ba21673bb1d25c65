"""The experiment mix: many models share the GPUs, some popular, most not, asked in bursts; how many requests are answered as promised.

The promise is made by each model alone: before the mix it is asked one request at a time, and its 95th percentiles, times a factor, are
what is good enough in the mix. Requests come when they come (an open loop): whoever is slow gets more of them at once.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.experiments import figures
from orchestrator.experiments.answers import Answer, ask, prompt
from orchestrator.experiments.arrivals import TRACES, Request, mix
from orchestrator.experiments.house import House
from orchestrator.experiments.progress import Progress
from orchestrator.experiments.watch import Watch

TTFT_FACTOR, TPOT_FACTOR = 5.0, 2.0  # times what a model needs alone, as the serving papers promise
STEP_S = 0.5
WARMUP = 2
MOVES = {"starting": "starts", "waking": "wakes", "asleep": "sleeps", "stopping": "stops", "backoff": "failures", "failed": "failures"}


@dataclass(frozen=True)
class Plan:
    """`ttft_s`, `tpot_s`: promised to all models alike; None: found out."""

    rate: float
    seconds: float
    alpha: float
    variation: float
    trace: str = "conversation"
    on_s: float = 0.0
    off_s: float = 0.0
    scale: float = 1.0
    seed: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    calibration: int = 5  # requests of each model
    timeout_s: float = 120.0

    @property
    def calibrates(self) -> bool:
        return self.ttft_s is None or self.tpot_s is None

    def seconds_in_all(self, house: House) -> float:
        """About how long it takes."""
        starts = sum(house.start_s(name) + 3.0 * (self.calibration + WARMUP) for name in house.names) if self.calibrates else 0.0
        return starts + self.seconds + 15.0

    def requests(self, names: Sequence[str], longest: Mapping[str, int]) -> list[Request]:
        """`longest`: tokens of a request, prompt and answer, of the models that say so."""
        found = mix(
            names,
            TRACES[self.trace],
            rate=self.rate,
            seconds=self.seconds,
            alpha=self.alpha,
            variation=self.variation,
            on_s=self.on_s,
            off_s=self.off_s,
            scale=self.scale,
            seed=self.seed,
        )
        return [fitted(request, longest.get(request.model)) for request in found]


@dataclass
class Outcome:
    """Written while it runs."""

    answers: list[Answer] = field(default_factory=list)
    alone: list[Answer] = field(default_factory=list)
    promised: dict[str, tuple[float, float]] = field(default_factory=dict)  # model -> seconds to the first token, and for each after it
    planned: int = 0
    seconds: float = 0.0
    moves: dict[str, int] = field(default_factory=dict)
    window: tuple[float, float] | None = None


def fitted(request: Request, longest: int | None) -> Request:
    """One that its model can answer: no longer than `longest` tokens in all."""
    if longest is None:
        return request
    answer = max(1, min(request.answer_tokens, longest // 2))
    return Request(request.at_s, request.model, max(1, min(request.prompt_tokens, longest - answer - 1)), answer)


def run(house: House, watch: Watch, plan: Plan, outcome: Outcome, progress: Progress) -> None:
    """Fills `outcome`. Raises Trouble."""
    longest = house.longest()
    for name in house.names:
        if plan.calibrates:
            house.load(name, watch, progress.say)
            progress.say(f"{name}: {plan.calibration} requests alone")
            house.warm(house.endpoint, name, WARMUP, 8, plan.timeout_s)
            outcome.alone += house.asker.run(_alone(house, name, plan, longest.get(name)))
            watch.check()
        outcome.promised[name] = promise(plan, [answer for answer in outcome.alone if answer.model == name])
    requests = plan.requests(house.names, longest)
    outcome.planned = len(requests)
    since, begin = time.time(), watch.now_s()
    try:
        house.asker.run(_open_loop(house, watch, plan, requests, outcome, progress))
    finally:
        outcome.window = (begin, watch.now_s())
        outcome.seconds = min(plan.seconds, watch.now_s() - begin)
    for event in house.events(since):
        if event["model"] in house.names and (move := MOVES.get(str(event["kind"]))):
            outcome.moves[move] = outcome.moves.get(move, 0) + 1


def promise(plan: Plan, alone: Sequence[Answer]) -> tuple[float, float]:
    """What is good enough: as the plan says, else from what the model needs `alone`. Unbounded where it was never answered."""
    good = [answer for answer in alone if answer.error is None]
    first = [answer.first_s for answer in good if answer.first_s is not None]
    each = [answer.token_s for answer in good if answer.token_s is not None]
    ttft = plan.ttft_s if plan.ttft_s is not None else TTFT_FACTOR * figures.percentile(first, 0.95) if first else float("inf")
    tpot = plan.tpot_s if plan.tpot_s is not None else TPOT_FACTOR * figures.percentile(each, 0.95) if each else float("inf")
    return ttft, tpot


def figures_of(outcome: Outcome, names: Sequence[str]) -> dict[str, float]:
    """Of all models together; then the same of each, under its name."""
    answers, seconds = outcome.answers, outcome.seconds
    found: dict[str, float] = {"planned": outcome.planned, **_of(answers, outcome, seconds)}
    found["refused"] = sum(figures.refusals(answers).values())
    found |= {move: outcome.moves.get(move, 0) for move in dict.fromkeys(MOVES.values())}
    for name in names:
        found |= {f"{name}_{key}": value for key, value in _of([a for a in answers if a.model == name], outcome, seconds).items()}
        if name in outcome.promised:
            found |= dict(zip((f"{name}_ttft_slo_s", f"{name}_tpot_slo_s"), outcome.promised[name], strict=True))
    return {key: value for key, value in found.items() if value != float("inf")}


def _of(answers: Sequence[Answer], outcome: Outcome, seconds: float) -> dict[str, float]:
    tokens = sum(answer.tokens for answer in answers if answer.error is None)
    speed = {"requests_per_s": len(answers) / seconds, "tokens_per_s": tokens / seconds} if seconds > 0 else {}
    return {"requests": len(answers), **figures.times(answers), **figures.goodput(answers, outcome.promised, seconds), **speed}


async def _alone(house: House, name: str, plan: Plan, longest: int | None) -> list[Answer]:
    found, dice, trace = [], random.Random(f"{plan.seed} {name} alone"), TRACES[plan.trace]
    for number in range(plan.calibration):
        sizes = (max(2, round(plan.scale * lengths.draw(dice))) for lengths in (trace.prompt, trace.answer))
        one = fitted(Request(0.0, name, *sizes), longest)
        ids = prompt(one.prompt_tokens, f"{name} alone {number}")
        found.append(await ask(house.endpoint, name, ids, max(2, one.answer_tokens), plan.timeout_s))
    return found


async def _open_loop(house: House, watch: Watch, plan: Plan, requests: Sequence[Request], outcome: Outcome, progress: Progress) -> None:
    """Each when its time has come; then those under way may end, within their timeout. What has not ended when this is cut is lost."""
    began, sent = time.monotonic(), 0
    under_way: set[asyncio.Task[None]] = set()

    async def one(number: int, request: Request) -> None:
        ids = prompt(request.prompt_tokens, f"{plan.seed} {request.model} {number}")
        outcome.answers.append(await ask(house.endpoint, request.model, ids, request.answer_tokens, plan.timeout_s))

    while sent < len(requests) or under_way:
        watch.check()
        now = time.monotonic() - began
        while sent < len(requests) and requests[sent].at_s <= now:
            under_way.add(asyncio.create_task(one(sent, requests[sent])))
            sent += 1
        waiting = f"{len(outcome.answers)} answered, {len(under_way)} under way"
        progress.step(len(outcome.answers), len(requests), waiting)
        until = min(STEP_S, max(0.0, requests[sent].at_s - (time.monotonic() - began))) if sent < len(requests) else STEP_S
        if under_way and sent == len(requests):
            await asyncio.wait(under_way, timeout=until)
        else:
            await asyncio.sleep(until)
        under_way = {task for task in under_way if not task.done()}
