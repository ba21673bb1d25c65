"""The experiments single and shared: the same bursts through the daemon, then on static engines side by side. single is shared of one.

Both arms get the same prompts, lengths and pauses, and rest until their memory is still before the first burst. A request is a stream
of a fixed number of tokens; prompts share no prefix, so that no arm gains by its cache.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.experiments import beforehand
from orchestrator.experiments.answers import Answer, Endpoint, ask, prompt
from orchestrator.experiments.house import EMPTY_BYTES, House
from orchestrator.experiments.progress import Progress, counted
from orchestrator.experiments.record import Arm, Record
from orchestrator.experiments.static_engine import StaticEngine
from orchestrator.experiments.trouble import Trouble
from orchestrator.experiments.watch import Watch

STATIC_START_S = 600.0
BACK_S = 30.0  # SIGKILLed engines of 15 GB are gone from NVML after 4 s
LOOK_S = 2.0  # of the rest before the bursts: what is called idle


@dataclass(frozen=True)
class Plan:
    """`utilization`: what the static engines have of each GPU together; None: no static arm. `turns`: bursts of each model."""

    turns: int
    requests: int
    tokens: int
    prompt_tokens: int
    pause_s: float
    utilization: float | None
    rounds: int = 1
    warmup: int = 6
    settle_s: float = 20.0
    still_s: float = 4.0
    timeout_s: float = 120.0

    def seconds(self, house: House) -> float:
        """About how long it takes: a burst is guessed at 3 s."""
        arm = self.turns * len(house.names) * (self.pause_s + 3.0) + self.settle_s * 1.5 + 3.0
        start = sum(0.0 if house.before[name]["state"] == "ready" else house.start_s(name) for name in house.names)
        static = 0.0 if self.utilization is None else arm + (3.0 if house.simulated else 65.0) + 10.0
        return start + self.rounds * (arm + static)


def check(house: House, plan: Plan) -> None:
    """Raises Trouble where it can not be done, before anything is changed."""
    if plan.utilization is None:
        return
    beforehand.check_python(house)
    beforehand.check_fits(house, plan.utilization)


def run(house: House, watch: Watch, plan: Plan, record: Record, out: Path, progress: Progress) -> None:
    """Fills `record`. Raises Trouble; whatever happens, no static engine is left. Restoring the models is the caller's."""
    for number in range(plan.rounds):
        _through_daemon(house, watch, plan, record.begin("daemon", number, watch.now_s()), progress)
        if plan.utilization is not None:
            house.unload(house.names, watch)
            watch.settle(plan.settle_s, plan.still_s)
            record.empty_bytes.append(watch.used_bytes)
            _on_static_engines(house, watch, plan, record, number, out, progress)


def _through_daemon(house: House, watch: Watch, plan: Plan, arm: Arm, progress: Progress) -> None:
    for name in house.names:
        house.load(name, watch, progress.say)
    quiet_s = max(plan.still_s, min(plan.settle_s, house.trim_s + 1.0))  # idle engines give back what they do not need after that
    _play(house, watch, plan, arm, dict.fromkeys(house.names, house.endpoint), lambda: None, progress, quiet_s)


def _on_static_engines(house: House, watch: Watch, plan: Plan, record: Record, number: int, out: Path, progress: Progress) -> None:
    assert plan.utilization is not None
    count = len(house.names)
    empty = watch.used_bytes
    with contextlib.ExitStack() as held:
        held.callback(watch.static.clear)
        engines: dict[str, StaticEngine] = {}
        for name in house.names:
            recipe = house.recipe(name, plan.utilization / count, fixed_pool=count > 1)
            engine = engines[name] = StaticEngine(recipe, out / f"static-{name.replace('/', '_')}.log")
            held.enter_context(engine)
            watch.static[name] = engine.leader
        progress.say(f"{'plain vLLM starts' if not house.simulated else 'a static simulated engine starts'}: {', '.join(house.names)}")
        for engine in engines.values():
            if not watch.until(partial(engine.ready, house.asker), STATIC_START_S):
                raise Trouble(
                    f"the static engine of {engine.recipe.model} is not ready after {STATIC_START_S:.0f} s; its log: {engine.log}"
                )

        def living() -> None:
            for engine in engines.values():
                engine.check()
            if back := [name for name in house.names if house.model(name)["state"] not in ("stopped", "failed")]:
                note = f"requests of others brought {', '.join(back)} back beside the static engine"
                record.notes += [note] if note not in record.notes else []

        endpoints = {name: engine.endpoint for name, engine in engines.items()}
        arm = record.begin("static", number, watch.now_s())
        _play(house, watch, plan, arm, endpoints, living, progress, plan.still_s)
    progress.say("the static engines have ended" if count > 1 else "the static engine has ended")
    if not watch.until(lambda: watch.used_bytes <= empty + EMPTY_BYTES, BACK_S):
        record.notes.append(f"the GPU does not show all memory of the static arm as free after {BACK_S:.0f} s")


def _play(
    house: House,
    watch: Watch,
    plan: Plan,
    arm: Arm,
    endpoints: Mapping[str, Endpoint],
    living: Callable[[], None],
    progress: Progress,
    still_s: float,
) -> None:
    """`living` raises Trouble where whoever serves it has ended. `still_s`: memory that has not fallen for so long is at rest."""
    what = "through the daemon" if arm.name == "daemon" else "static"
    for name, endpoint in endpoints.items():
        progress.say(f"{name}, {what}: {counted(plan.warmup, 'request')} to warm up")
        house.warm(endpoint, name, plan.warmup, plan.tokens, plan.timeout_s)
    warm = watch.now_s()
    watch.settle(plan.settle_s, still_s)
    arm.idle = (max(warm, watch.now_s() - LOOK_S), watch.now_s())
    done, total = 0, plan.turns * len(endpoints)
    for turn in range(plan.turns):
        for name, endpoint in endpoints.items():
            progress.step(done, total, f"{what}: burst {done + 1} of {total}: {counted(plan.requests, 'request')} for {name}")
            begin = watch.now_s()
            salts = [f"{name} {turn} {number}" for number in range(plan.requests)]
            arm.answers.append(house.asker.run(_burst(endpoint, name, plan, salts)))
            arm.bursts.append((name, begin, watch.now_s()))
            done += 1
            living()
            watch.check()
            if all(answer.error is not None for answer in arm.answers[-1]):
                house.check_daemon()
                raise Trouble(f"not one request of a burst for {name} was answered: {arm.answers[-1][0].error}")
            if done < total:
                watch.rest(plan.pause_s)
    progress.step(done, total, f"{what}: done")
    begin = watch.now_s()
    watch.rest(plan.pause_s)
    watch.settle(plan.settle_s / 2, still_s)
    arm.after = (begin, watch.now_s())
    arm.ended_s = watch.now_s()


async def _burst(endpoint: Endpoint, name: str, plan: Plan, salts: Sequence[str]) -> list[Answer]:
    asks = (ask(endpoint, name, prompt(plan.prompt_tokens, salt), plan.tokens, plan.timeout_s) for salt in salts)
    return list(await asyncio.gather(*asks))
