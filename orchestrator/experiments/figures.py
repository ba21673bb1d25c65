"""Figures of what was measured: percentiles, memory, goodput. Pure; bytes in, MiB out, and seconds."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.experiments.answers import Answer
from orchestrator.experiments.samples import Sample
from orchestrator.policy.units import MIB

SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: a value that was measured, never one between two. With fewer than 100 values the 99th is the largest.

    Raises ValueError where there is none.
    """
    if not values:
        raise ValueError("no values were measured")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def percentiles(values: Sequence[float], name: str) -> dict[str, float]:
    """`name_p50_s` and its like; nothing where nothing was measured."""
    return {f"{name}_{key}_s": percentile(values, share) for key, share in SHARES.items()} if values else {}


def times(answers: Sequence[Answer]) -> dict[str, float]:
    """Of those that were answered: seconds to the first token, for each token after it, and to the end."""
    good = [answer for answer in answers if answer.error is None]
    return {
        **percentiles([answer.first_s for answer in good if answer.first_s is not None], "ttft"),
        **percentiles([answer.token_s for answer in good if answer.token_s is not None], "tpot"),
        **percentiles([answer.total_s for answer in good], "latency"),
    }


def memory(idle: Sequence[Sample], bursts: Sequence[Sample], after: Sequence[Sample]) -> dict[str, float]:
    """`idle`: after the warm-up and before the bursts; what it came to rest at is the least of it. flex: peak - idle."""
    found: dict[str, float] = {}
    if idle:
        found["idle_mib"] = min(sample.used_bytes for sample in idle) / MIB
    if bursts:
        found["peak_mib"] = max(sample.used_bytes for sample in bursts) / MIB
    if idle and bursts:
        found["flex_mib"] = max(0.0, found["peak_mib"] - found["idle_mib"])
    if after:
        found["end_mib"] = min(sample.used_bytes for sample in after) / MIB
    return found


def throughput(bursts: Sequence[Sequence[Answer]]) -> float:
    """Tokens a second while bursts ran: pauses between them are nobody's work."""
    tokens = sum(answer.tokens for burst in bursts for answer in burst)
    seconds = sum(max(answer.at_s + answer.total_s for answer in burst) - min(answer.at_s for answer in burst) for burst in bursts if burst)
    return tokens / seconds if seconds > 0 else 0.0


def saving(ours: float, static: float, empty: float) -> float | None:
    """The part of the static engine's memory that ours does not hold; both as the card shows them, `empty` the card without either."""
    return 1 - (ours - empty) / (static - empty) if static > empty else None


def within(answer: Answer, ttft_s: float, tpot_s: float) -> bool:
    """Whether it was answered as promised: first token and each after it."""
    return (
        answer.error is None
        and answer.first_s is not None
        and answer.first_s <= ttft_s
        and (answer.token_s is None or answer.token_s <= tpot_s)
    )


def goodput(answers: Sequence[Answer], promised: Mapping[str, tuple[float, float]], seconds: float) -> dict[str, float]:
    """Requests answered as `promised` (model -> seconds to the first token, and for each after it): their part, and how many a second."""
    good = sum(within(answer, *promised[answer.model]) for answer in answers)
    return {"goodput": good / len(answers) if answers else 0.0, "goodput_per_s": good / seconds if seconds > 0 else 0.0}


def refusals(answers: Sequence[Answer]) -> dict[str, int]:
    """How many by the error's code."""
    return dict(Counter(answer.code or "error" for answer in answers if answer.error is not None).most_common())


def ratio(ours: Mapping[str, float], static: Mapping[str, float], key: str) -> float | None:
    return ours[key] / static[key] if key in ours and static.get(key) else None
