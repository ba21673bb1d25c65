"""Verbs that move models in and out of memory, each for several names: load, unload, sleep, wake, drain, pin, unpin.

All orders are sent before the first is waited for, so that the daemon works on them at the same time. A model that is refused or
fails does not hold up the others: what became of them is said first, and the first failure's exit code is that of the call.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import click

from orchestrator.cli import options, screen, wait
from orchestrator.cli.exits import DENIED, UNREACHABLE, CliError, Json, hint

WAYS_DOWN = """\b
Which way down:
  sleep   its weights go to host memory; the next request wakes it, in under a second
  unload  all its memory is free now; the next request starts it again
  drain   as unload, but its requests end first, however long that takes
  stop    its requests have the daemon's drain time; then it is down until `start`, whoever asks for it
"""


@click.command()
@options.names_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def load(call: options.Call, names: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Have models in GPU memory, and wait until they are ready.

    Starts those without an engine and wakes those that sleep, as a request would. Where memory is short, idle models of
    less use sleep or stop for them: `plan load` shows which, and does nothing. One that `stop` holds down is refused:
    `start` lifts that. A model that is loaded sleeps and stops again when it is idle for its timeouts; `pin` keeps it.

    \b
    Examples:
      orchestratorctl load qwen
      orchestratorctl load qwen llama --timeout 2m      # before the morning's first users
      orchestratorctl plan load qwen                    # first look who would go for it
    """
    _order(call, "load", names, "ready", no_wait, timeout, undo="unload", taken="is being loaded")


@click.command(epilog=WAYS_DOWN)
@options.names_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def unload(call: options.Call, names: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Free all memory of models now, and wait until it is free.

    Their engines are ended, on the GPU and on the host. The next request starts a model again. One that has requests is
    refused (exit code 75): `drain` lets them end first.

    \b
    Examples:
      orchestratorctl unload qwen
      orchestratorctl unload qwen llama && nvidia-smi
    """
    done = "is unloaded; a request loads it again"
    _order(call, "unload", names, "unloaded", no_wait, timeout, undo="load", taken="is being unloaded", done=done)


@click.command(epilog=WAYS_DOWN)
@options.names_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def sleep(call: options.Call, names: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Put models to sleep, and wait until their GPU memory is free.

    The weights of a sleeping model are in host memory (`sleep_level: 2`: dropped, and read again), its engine stays. The
    next request wakes it in under a second. The first sleep of an engine takes longer: it makes the room on the host. One
    that has requests is refused (exit code 75), and a request that comes meanwhile undoes it.

    \b
    Examples:
      orchestratorctl sleep qwen
      orchestratorctl sleep qwen && orchestratorctl describe qwen      # what it holds asleep
    """
    _order(call, "sleep", names, "asleep", no_wait, timeout, undo="wake", taken="goes to sleep", done="is asleep; a request wakes it")


@click.command()
@options.names_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def wake(call: options.Call, names: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Wake models that sleep, and wait until they are ready.

    As `load`, but a model that has no engine is refused rather than started.

    \b
    Examples:
      orchestratorctl wake qwen
      orchestratorctl wake qwen llama --no-wait
    """
    _order(call, "wake", names, "ready", no_wait, timeout, undo="sleep", taken="wakes")


@click.command(epilog=WAYS_DOWN)
@options.names_argument
@options.no_wait_option
@options.timeout_option
@options.shared
@click.pass_obj
def drain(call: options.Call, names: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Let models finish their requests, then unload them.

    Waits until their memory is free. No request is cut. Those that come meanwhile wait, and start the model again when it has gone.
    A model that is not ready yet, and that requests wait for, is refused (exit code 75): it has nothing to finish.

    \b
    Examples:
      orchestratorctl drain qwen
      orchestratorctl drain qwen llama --timeout 10m     # before the box is needed for something else
    """
    done = "is drained and unloaded; a request loads it again"
    _order(call, "drain", names, "unloaded", no_wait, timeout, undo="load", taken="finishes its requests", done=done)


@click.command()
@options.names_argument
@options.shared
@click.pass_obj
def pin(call: options.Call, names: tuple[str, ...]) -> None:
    """Keep models in memory.

    A pinned model does not sleep or stop for being idle, nor for another model; an operator's word still counts. The pin
    is kept over restarts. It loads nothing by itself that was never used: `load` does.

    \b
    Examples:
      orchestratorctl pin qwen
      orchestratorctl pin qwen && orchestratorctl load qwen
    """
    _order(call, "pin", names, taken="is pinned")


@click.command()
@options.names_argument
@options.shared
@click.pass_obj
def unpin(call: options.Call, names: tuple[str, ...]) -> None:
    """Undo `pin`: models sleep and stop again.

    Also one whose spec pins it. Kept over restarts.

    \b
    Examples:
      orchestratorctl unpin qwen
    """
    _order(call, "unpin", names, taken="is not pinned")


def _order(
    call: options.Call,
    verb: str,
    names: Sequence[str],
    goal: wait.Goal | None = None,
    no_wait: bool = True,
    timeout: float | None = None,
    *,
    undo: str | None = None,
    taken: str,
    done: str | None = None,
) -> None:
    """`taken` is said of a model whose order was only taken, `done` of one that got there; None: how long it took."""
    asked_at, names = time.monotonic(), list(dict.fromkeys(names))
    told: dict[str, Json] = {}
    faults: list[CliError] = []
    with wait.detachable(names, goal, hint(undo, *names) if undo else None) if goal else contextlib.nullcontext():
        client = call.client(timeout)
        from orchestrator.cli.client import model_path

        for name in names:
            with kept(faults):
                told[name] = client.send("POST", model_path(name, f"/{verb}"))
        for name in list(told):
            with kept(faults):
                model = told.pop(name)
                told[name] = model if no_wait or goal is None else wait.follow(client, name, goal, asked_at)
                if call.for_people:
                    screen.out(f"{name} {taken}" if no_wait else _arrived(name, told[name], done, asked_at))
    if faults:
        raise together(faults, list(told.values()), len(names))
    call.show(told[names[0]] if len(names) == 1 else {"models": list(told.values())}, None, list(told))


def _arrived(name: str, model: Json, done: str | None, asked_at: float) -> str:
    if done is None:
        return wait.arrival(name, model, asked_at)
    if model.get("state") in wait.UNDER_WAY:
        return f"{name} was unloaded; requests that came meanwhile start it again"
    if model.get("state") == "failed":
        return f"{name} has no engine: it has failed, and {hint('start', name)} tries again"
    return f"{name} {done}"


@contextlib.contextmanager
def kept(faults: list[CliError]) -> Iterator[None]:
    """One model's failure is kept for the end. A daemon that is gone or does not let us in is so for all."""
    try:
        yield
    except CliError as fault:
        if fault.exit_code in (UNREACHABLE, DENIED):
            raise
        faults.append(fault)


def together(faults: Sequence[CliError], done: Sequence[Json], asked: int) -> CliError:
    """One error of all: a single one as it stands. `models`: those that got there."""
    first = faults[0]
    if asked == 1:
        return first
    body = {**first.body, "models": list(done)}
    if len(faults) == 1:
        return CliError(first.message, first.exit_code, code=str(body["code"]), lines=first.lines, body=body)
    lines = [line for fault in faults for line in (f"  {fault.message}", *(f"  {each}" for each in fault.lines))]
    message = f"{len(faults)} of {asked} failed"
    body |= {"message": message, "failures": [fault.body for fault in faults]}
    return CliError(message, first.exit_code, code=str(body["code"]), lines=lines, body=body)
