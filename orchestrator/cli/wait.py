"""Follow a model until it is ready, stopped or removed. The daemon does the work; leaving early changes nothing there.

A state seen first may be older than our order (a `start` of a failed model still shows `failed` until the daemon's next
round): a failure counts when it is younger than the order, or when nothing follows it for STALE_S.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from orchestrator.cli import describe, progress
from orchestrator.cli.exits import FAILED, INTERRUPTED, NOT_FOUND, TIMED_OUT, CliError, DeadlinePassed, Json, hint
from orchestrator.cli.tables import duration

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

Goal = Literal["ready", "stopped", "removed"]
Verdict = Literal["go on", "reached", "failed", "stale failure", "undone"]

STALE_S = 5.0  # twenty rounds of the daemon's loop
ROUNDING_S = 0.1  # since_s may have been rounded up
UNDER_WAY = frozenset({"waiting", "starting", "waking"})
ENDING = frozenset({"draining", "stopping"})
DOING: dict[Goal, str] = {"ready": "starting", "stopped": "stopping", "removed": "being removed"}


@contextmanager
def detachable(name: str, goal: Goal, undo: str | None) -> Iterator[None]:
    """Ctrl-C and --timeout end the waiting, not the work: says so, and how to look and to undo."""
    advice = f"still {DOING[goal]}; {hint('describe', name)} to look" + (f", {undo} to undo" if undo else "")
    try:
        yield
    except KeyboardInterrupt:
        raise CliError(advice, INTERRUPTED, code="interrupted") from None
    except DeadlinePassed:
        raise CliError(f"--timeout passed: {advice}", TIMED_OUT, code="timeout") from None


def follow(client: "Client", name: str, goal: Goal, asked_at: float) -> Json:
    """The model as it reached `goal`; CliError where it cannot any more. `asked_at`: time.monotonic() of the order."""
    from orchestrator.cli.client import model_path

    seen: set[str] = set()
    try:
        answer = client.open("GET", model_path(name, "/watch"))
    except CliError as fault:
        if goal == "removed" and fault.exit_code == NOT_FOUND:
            return {"name": name, "state": "removed"}
        raise
    with answer, progress.display() as display:
        model = answer.object_line()
        while model is not None:
            found = verdict(model, goal, seen, time.monotonic() - asked_at)
            if found == "reached":
                return model
            if found in ("failed", "undone"):
                break
            state = model.get("state")
            if state in UNDER_WAY or state in ENDING:  # else: rest, which our order is about to end
                display.show(model)
            if state in UNDER_WAY:
                seen.add(state)
            try:
                model = answer.object_line(wait_s=STALE_S if found == "stale failure" else None)
            except TimeoutError:
                break
        if model is None:
            raise client.lost(ConnectionResetError("the watch ended"))
    raise _failure(name, goal, model)


def verdict(model: Json, goal: Goal, seen: set[str], waited_s: float) -> Verdict:
    """What `model` means to one who ordered `goal` `waited_s` ago and has `seen` these states since."""
    state = model.get("state")
    if state == goal:
        return "reached"
    if state == "removed":
        return "undone"
    if goal == "ready":
        if state == "asleep" and seen & {"starting", "waking"}:
            return "reached"  # it was ready and was put to sleep since: changes close together may show as one
        if state == "stopped" and seen:
            return "undone"
        if state in ("failed", "backoff"):
            fresh = seen or model.get("since_s", 0.0) <= waited_s + ROUNDING_S
            return "failed" if fresh else "stale failure"
    if goal == "stopped" and state in ("failed", "backoff"):
        return "stale failure"
    return "go on"


def _failure(name: str, goal: Goal, model: Json) -> CliError:
    state = str(model.get("state"))
    if state == "removed":
        return CliError(f"{name} was removed while it was {DOING[goal]}", FAILED, code="removed", body={"model": model})
    if state == "stopped":
        reason = describe.bare(model.get("reason") or "no reason given")
        return CliError(f"{name} was stopped before it was ready: {reason}", FAILED, code="stopped", body={"model": model})
    failure: Json = model.get("failure") or {}
    reason = describe.bare(failure.get("reason") or model.get("reason") or "no reason given")
    log = describe.failure_lines(failure)
    retry = failure.get("retry_in_s")
    again = f", tries again in {duration(retry)}" if retry is not None else ""
    return CliError(
        f"{name} failed to {'start' if goal == 'ready' else 'stop'}: {reason}",
        FAILED,
        code=f"{'start' if goal == 'ready' else 'stop'}_failed",
        lines=[
            *(["the engine's last log lines:", *log] if log else []),
            f"{name} stays registered (state {state}{again}): {hint('logs', name)} for more, {hint('rm', name)} to remove it",
        ],
        body={"model": model},
    )
