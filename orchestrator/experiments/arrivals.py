"""Who asks what, and when: popularity, bursty arrivals and lengths of requests. Pure: the same seed makes the same requests.

Lengths are those of the Azure LLM inference trace 2023 (github.com/Azure/AzurePublicDataset, CC-BY), as log-normals fitted to its
percentiles; arrivals are gamma renewals, as BurstGPT (arXiv 2401.17644) fits them: the coefficient of variation says how bursty.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Z90, Z99 = 1.2816, 2.3263  # standard deviations of a normal from its median to that percentile
LEAST_TOKENS = 2
STEADY = 0.01  # gaps that vary less are all the same


@dataclass(frozen=True)
class Lengths:
    """Tokens: the median, the 90th and the 99th percentile."""

    p50: float
    p90: float
    p99: float

    @property
    def sigma(self) -> float:
        """Of the logarithm: least squares over both percentiles above the median."""
        over = Z90 * math.log(self.p90 / self.p50) + Z99 * math.log(self.p99 / self.p50)
        return over / (Z90**2 + Z99**2)

    def draw(self, dice: random.Random) -> int:
        """Never above what one in a thousand is: a log-normal's tail is longer than any context."""
        longest = self.p50 * math.exp(3.09 * self.sigma)
        return round(max(LEAST_TOKENS, min(longest, dice.lognormvariate(math.log(self.p50), self.sigma))))


@dataclass(frozen=True)
class Trace:
    prompt: Lengths
    answer: Lengths


TRACES = {
    "conversation": Trace(Lengths(1020, 2734, 4142), Lengths(129, 424, 601)),
    "code": Trace(Lengths(1469, 5186, 7436), Lengths(13, 55, 249)),
}


@dataclass(frozen=True)
class Request:
    """`at_s`: seconds after the begin."""

    at_s: float
    model: str
    prompt_tokens: int
    answer_tokens: int


def shares(count: int, alpha: float) -> list[float]:
    """Zipf: the n-th is asked for 1 / n**alpha as often as the first; they add up to 1."""
    weights = [n**-alpha for n in range(1, count + 1)]
    return [weight / sum(weights) for weight in weights]


def times(rate: float, variation: float, seconds: float, dice: random.Random) -> list[float]:
    """Arrivals within `seconds`: `rate` times `seconds` of them, so that a short run with long bursts has the load that it says.
    `variation`: of the gaps (1: Poisson; above: bursts; 0: a metronome)."""
    count = int(rate * seconds + dice.random())
    gaps = [dice.gammavariate(1 / variation**2, 1.0) if variation > STEADY else 1.0 for _ in range(count + 1)]
    if not (whole := sum(gaps)):  # gaps so uneven that all of them are nothing to a float
        return [seconds * dice.random()] * count
    reached = list(itertools.accumulate(gaps[:-1]))
    return [min(seconds * at / whole, math.nextafter(seconds, 0)) for at in reached]


def on_off(at: Sequence[float], on_s: float, off_s: float) -> list[float]:
    """Arrivals of a time that knows no pauses, with a pause of `off_s` after each `on_s`."""
    return [one + (one // on_s) * off_s if on_s else one for one in at]


def mix(
    models: Sequence[str],
    trace: Trace,
    *,
    rate: float,
    seconds: float,
    alpha: float,
    variation: float,
    on_s: float = 0.0,
    off_s: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
) -> list[Request]:
    """Requests of all models in the order they come; the first model is the most popular. `rate`: all of them, a second, on average,
    pauses included. `scale`: of all lengths."""
    busy = on_s / (on_s + off_s) if on_s else 1.0
    found: list[Request] = []
    for model, share in zip(models, shares(len(models), alpha), strict=True):
        dice = random.Random(f"{seed} {model}")  # of its own: one model more changes no other's requests but for their rate
        for at in on_off(times(rate * share / busy, variation, seconds * busy, dice), on_s, off_s):
            prompt, answer = (max(LEAST_TOKENS, round(scale * lengths.draw(dice))) for lengths in (trace.prompt, trace.answer))
            found.append(Request(at, model, prompt, answer))
    return sorted(found, key=lambda request: (request.at_s, request.model))
