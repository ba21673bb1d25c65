"""After a failure: try again, when, and why; or give up. One unit, so that the answer always comes with its reason."""

from dataclasses import dataclass

MAX_FAILURES = 5  # in a row, before an operator must look
FIRST_DELAY_S, LONGEST_DELAY_S = 2.0, 60.0
HINDERED_DELAY_S = 10.0  # a disk that is full stays so until somebody looks
STABLE_S = 300.0  # a run this long forgives earlier failures: dying after an hour is not dying while loading

# Words in an engine's last lines that no retry mends.
FINAL = (
    "unrecognized arguments",
    "error: argument",
    "is not a valid model identifier",
    "does not exist",
    "Invalid repository ID or local directory",
    "No such file or directory",
    "is not supported",
    "KVCachedConfigError",
    "ModuleNotFoundError",
    "larger than the available KV cache memory",
    "Cannot access gated repo",
    "trust_remote_code",
)


@dataclass(frozen=True, slots=True)
class Retry:
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def after_hindrance(now: float) -> Retry:
    """The engine has not failed: nobody counts, and nobody gives up."""
    return Retry(now + HINDERED_DELAY_S, f"no failure of the engine, tried again in {HINDERED_DELAY_S:.0f}s")


def after_failure(failures: int, now: float, log: tuple[str, ...], was_ready: bool) -> Retry | GiveUp:
    """`failures`: in a row, this one counted. A mistake in the spec is final at its first start; nothing is final once it was ready."""
    if not was_ready:
        for line in reversed(log):
            if any(word in line for word in FINAL):
                return GiveUp(f"no retry can mend this: {line.strip()[:300]}")
    if failures >= MAX_FAILURES:
        return GiveUp(f"failed {failures} times in a row: mend the cause, then start it by hand")
    delay = min(FIRST_DELAY_S * 2 ** (failures - 1), LONGEST_DELAY_S)
    return Retry(now + delay, f"attempt {failures + 1} of {MAX_FAILURES} in {delay:.0f}s")
