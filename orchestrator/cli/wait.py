"""Follow a model until it is where an order wants it. The daemon does the work; leaving early changes nothing there.

A state seen first may be older than our order (a `start` of a failed model still shows `failed` until the daemon's next
round): a failure counts when it is younger than the order, and what our order should have ended when nothing follows it for
STALE_S. Requests may undo an order to sleep or to unload: that is said, never waited out.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from orchestrator.cli import describe, progress
from orchestrator.cli.exits import BUSY, FAILED, INTERRUPTED, NOT_FOUND, TIMED_OUT, CliError, DeadlinePassed, Json, hint
from orchestrator.cli.tables import duration, gpus, seconds

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

Goal = Literal["ready", "asleep", "unloaded", "stopped", "removed"]
Verdict = Literal["go on", "reached", "failed", "stale", "undone"]

STALE_S = 5.0  # twenty rounds of the daemon's loop
ROUNDING_S = 0.1  # since_s may have been rounded up
UNDER_WAY = frozenset({"waiting", "starting", "waking"})
ENDING = frozenset({"draining", "stopping"})
DOING: dict[Goal, str] = {
    "ready": "starting",
    "asleep": "going to sleep",
    "unloaded": "being unloaded",
    "stopped": "stopping",
    "removed": "being removed",
}
FAILED_TO: dict[Goal, str] = {"ready": "start", "asleep": "sleep", "unloaded": "unload", "stopped": "stop", "removed": "stop"}


@contextmanager
def detachable(names: Sequence[str], goal: Goal, undo: str | None) -> Iterator[None]:
    """Ctrl-C and --timeout end the waiting, not the work: says so, and how to look and to undo."""
    look = hint("describe", names[0]) if len(names) == 1 else hint("ls")
    advice = f"still {DOING[goal]}; {look} to look" + (f", {undo} to undo" if undo else "")
    try:
        yield
    except KeyboardInterrupt:
        raise CliError(advice, INTERRUPTED, code="interrupted") from None
    except DeadlinePassed:
        raise CliError(f"--timeout passed: {advice}", TIMED_OUT, code="timeout") from None


def follow(client: "Client", name: str, goal: Goal, asked_at: float) -> Json:
    """The model as it reached `goal`; CliError where it cannot any more. `asked_at`: time.monotonic() of the order."""
    seen: set[str] = set()

    def judge(model: Json) -> Verdict:
        found = verdict(model, goal, seen, time.monotonic() - asked_at)
        seen.update({str(model.get("state"))} & (UNDER_WAY | ENDING))
        return found

    try:
        found, model = watched(client, name, judge)
    except CliError as fault:
        if goal == "removed" and fault.exit_code == NOT_FOUND:
            return {"name": name, "state": "removed"}
        raise
    if found != "reached":
        raise _failure(name, goal, model)
    return model


def watched(client: "Client", name: str, judge: Callable[[Json], Verdict]) -> tuple[Verdict, Json]:
    """The model as `judge` ended the watch, and with which verdict. What is stale for STALE_S has failed."""
    from orchestrator.cli.client import model_path

    with client.open("GET", model_path(name, "/watch")) as answer, progress.display() as display:
        model = answer.object_line()
        while model is not None:
            found = judge(model)
            if found in ("reached", "failed", "undone"):
                return found, model
            state = str(model.get("state"))
            if state in UNDER_WAY or state in ENDING or (state == "asleep" and model.get("wanted") == "ready"):
                display.show(model)
            last = model
            try:
                model = answer.object_line(wait_s=STALE_S if found == "stale" else None)
            except TimeoutError:
                return "failed", last
    raise client.lost(ConnectionResetError("the watch ended"))


def verdict(model: Json, goal: Goal, seen: set[str], waited_s: float) -> Verdict:
    """What `model` means to one who ordered `goal` `waited_s` ago and has `seen` these states since."""
    state = str(model.get("state"))
    if state == ("stopped" if goal == "unloaded" else goal):
        return "reached"
    if state == "removed":
        return "undone"
    if goal == "ready":
        return _coming(model, state, seen & UNDER_WAY, waited_s)
    if goal in ("asleep", "unloaded"):
        return _going(model, state, goal, seen, waited_s)
    return "stale" if goal == "stopped" and state in ("failed", "backoff") else "go on"


def _coming(model: Json, state: str, seen: set[str], waited_s: float) -> Verdict:
    if state == "asleep" and seen & {"starting", "waking"}:
        return "reached"  # it was ready and was put to sleep since: changes close together may show as one
    if state in ("asleep", "stopped") and model.get("wanted", "ready") != "ready":
        return "undone"  # another order came, or it was ready and went for another model before we looked
    if state == "stopped" and seen:
        return "undone"
    if state in ("failed", "backoff"):
        return "failed" if seen or _fresh(model, waited_s) else "stale"
    return "go on"


def _going(model: Json, state: str, goal: Goal, seen: set[str], waited_s: float) -> Verdict:
    if state in ENDING or (goal == "asleep" and state == "waking"):
        return "go on"
    if goal == "unloaded" and "stopping" in seen and state in UNDER_WAY:
        return "reached"  # and requests that came meanwhile have it loaded again
    if goal == "unloaded" and state == "failed":
        return "reached"  # it has no engine
    if state in ("failed", "backoff"):
        return "failed" if seen & ENDING or _fresh(model, waited_s) else "stale"
    if state == "stopped" or seen & ENDING or min(waited_s, _since_s(model)) > STALE_S:
        return "undone"
    return "stale"


def _fresh(model: Json, waited_s: float) -> bool:
    return _since_s(model) <= waited_s + ROUNDING_S


def _since_s(model: Json) -> float:
    return float(model.get("since_s", 0.0))


def arrival(name: str, model: Json, asked_at: float) -> str:
    """`qwen is ready on GPU 0 after 0.4s`."""
    on = gpus(model.get("engine"))
    where = "" if on == "-" else f" on GPU {on}"
    return f"{name} is {model['state']}{where} after {seconds(time.monotonic() - asked_at)}"


def _failure(name: str, goal: Goal, model: Json) -> CliError:
    state = str(model.get("state"))
    if state == "removed":
        return CliError(f"{name} was removed while it was {DOING[goal]}", FAILED, code="removed", body={"model": model})
    reason = describe.bare(model.get("reason") or "no reason given")
    if state == "stopped":
        before = "it slept" if goal == "asleep" else "it was ready"
        return CliError(f"{name} was stopped before {before}: {reason}", FAILED, code="stopped", body={"model": model})
    if goal == "ready" and state == "asleep":
        return CliError(f"{name} is asleep: {reason}", FAILED, code="asleep", body={"model": model})
    if state not in ("failed", "backoff"):
        lines = [f"it is in use: {hint('drain', name)} lets its requests end, then frees its memory"]
        return CliError(f"{name} is {state}, not {goal}: {reason}", BUSY, code="busy", lines=lines, body={"model": model})
    failure: Json = model.get("failure") or {}
    reason = describe.bare(failure.get("reason") or model.get("reason") or "no reason given")
    log = describe.failure_lines(failure)
    retry = failure.get("retry_in_s")
    again = f", tries again in {duration(retry)}" if retry is not None else ""
    return CliError(
        f"{name} failed to {FAILED_TO[goal]}: {reason}",
        FAILED,
        code=f"{FAILED_TO[goal]}_failed",
        lines=[
            *(["the engine's last log lines:", *log] if log else []),
            f"{name} stays registered (state {state}{again}): {hint('logs', name)} for more, {hint('rm', name)} to remove it",
        ],
        body={"model": model},
    )
