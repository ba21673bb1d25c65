"""The verb `wait`: until models are in a state, whoever brings them there. It orders nothing.

A state that only an operator's next word could end counts as the end: `failed` where another one was waited for, `removed`.
"""

import time
from typing import TYPE_CHECKING

import click

from orchestrator.cli import options, residency, screen, wait
from orchestrator.cli.describe import bare, failure_lines
from orchestrator.cli.exits import FAILED, INTERRUPTED, NOT_FOUND, TIMED_OUT, CliError, DeadlinePassed, Json, hint

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

STATES = ("ready", "asleep", "stopped", "deleted", "failed", "waiting", "starting", "waking", "draining", "stopping", "backoff")
BACK_S = 0.5  # between two tries of a daemon that is away


@click.command("wait")
@options.names_argument
@click.option("--for", "goal", type=click.Choice(STATES), default="ready", show_default=True, help="The state to wait for.")
@options.timeout_option
@options.shared
@click.pass_obj
def until(call: options.Call, names: tuple[str, ...], goal: str, timeout: float | None) -> None:
    """Wait until models are in a state.

    It orders nothing: a request, a timeout or another operator brings them there. Several are waited for in turn. Exit
    code 0 when all were there, 1 with the reason when one can no longer come there (it failed, it was removed), 124
    when --timeout passes first. A daemon that restarts meanwhile is waited for. `deleted` is reached, too, where there
    is no such model.

    \b
    Examples:
      orchestratorctl wait qwen
      orchestratorctl wait qwen llama --for=ready --timeout 5m
      orchestratorctl rm qwen --no-wait && orchestratorctl wait qwen --for=deleted
      orchestratorctl wait qwen --for=asleep && echo "the card is free"
    """
    told: dict[str, Json] = {}
    faults: list[CliError] = []
    names = tuple(dict.fromkeys(names))
    name = names[0]
    try:
        client = call.client(timeout)
        client.get("/status")  # one that is not there at all is an error; one that goes is waited for
        for name in names:
            with residency.kept(faults):
                told[name] = _reached(client, name, goal)
                if call.for_people:
                    screen.out(f"{name} is {told[name]['state'] if goal != 'deleted' else goal}")
    except KeyboardInterrupt:
        raise CliError("interrupted; nothing was changed", INTERRUPTED, code="interrupted") from None
    except DeadlinePassed:
        message = f"--timeout passed: {name} is not {goal} yet; {hint('describe', name)} to look"
        raise CliError(message, TIMED_OUT, code="timeout", lines=[fault.message for fault in faults]) from None
    if faults:
        raise residency.together(faults, list(told.values()), len(names))
    call.show(told[names[0]] if len(names) == 1 else {"models": list(told.values())}, None, list(told))


def _reached(client: "Client", name: str, goal: str) -> Json:
    """The model as it got there. Raises CliError where it can not any more."""
    away = False
    while True:
        try:
            model = wait.watched(client, name, lambda model: judge(model, goal))[1]
            break
        except CliError as fault:
            if fault.exit_code == NOT_FOUND and goal == "deleted":
                return {"name": name, "state": "removed"}
            if not fault.is_away:
                raise
            if not away:
                screen.err(f"waiting for the daemon: {fault.message}")
            away = True
        client.patience(None)  # the deadline
        time.sleep(BACK_S)
    if judge(model, goal) == "reached":
        return model
    state, failure = model.get("state"), model.get("failure") or {}
    reason = bare(failure.get("reason") or model.get("reason") or "no reason given")
    message = f"{name} was removed" if state == "removed" else f"{name} is {state} and does not become {goal} by itself: {reason}"
    lines = [*failure_lines(failure), f"{hint('start', name)} tries it again"] if state == "failed" else []
    raise CliError(message, FAILED, code=str(state), lines=lines, body={"model": model})


def judge(model: Json, goal: str) -> wait.Verdict:
    state = str(model.get("state"))
    if state == ("removed" if goal == "deleted" else goal):
        return "reached"
    return "failed" if state in ("removed", "failed") and goal != "deleted" else "go on"
