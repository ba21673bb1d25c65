"""Verbs that look: ls, ps, describe, explain, status. They change nothing, and their data goes to stdout."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from orchestrator.cli import describe as pages
from orchestrator.cli import explain as gpu_pages
from orchestrator.cli import options, screen, tables, watch
from orchestrator.cli.exits import NOT_FOUND, NOT_RUNNING, USAGE, CliError, Json, hint
from orchestrator.cli.watch import Shown

if TYPE_CHECKING:
    from orchestrator.cli.client import Client


@click.command()
@options.quiet_option
@options.watched
@options.shared
@click.pass_obj
def ls(call: options.Call) -> None:
    """List the registered models.

    REQUESTS counts those in the engine, and +N that wait. KV-USED and KV-LIMIT are the model's KV memory now and what
    it may grow to. OWNER says who defined it: `file` (the configuration) or `api` (add-model).

    \b
    Examples:
      orchestratorctl ls
      orchestratorctl ls --watch                  # until Ctrl-C
      orchestratorctl ls -o wide
      orchestratorctl ls -q | xargs orchestratorctl pin
      orchestratorctl ls --json | jq -r '.models[] | select(.state == "ready").name'
    """
    shown = watch.show(call, lambda client: _models(client.models(), lambda models: tables.ls(models, call.wide)))
    if not shown.names and call.for_people and sys.stdout.isatty():
        screen.err("no model yet: `orchestratorctl add-model NAME SOURCE` adds one")


@click.command()
@options.quiet_option
@options.watched
@options.shared
@click.pass_obj
def ps(call: options.Call) -> None:
    """List the models that have an engine now, also those that sleep.

    VRAM is all GPU memory of the engine; asleep it keeps a little. LIMIT-STATUS: `applied`; `draining`, where the engine
    still holds more than a lowered limit and gives it back as requests finish; `unverified`. UP counts from the engine's
    launch.

    \b
    Examples:
      orchestratorctl ps
      orchestratorctl ps --watch --interval 5s
      orchestratorctl ps -o wide                  # with bounds, and the reason for each limit
    """

    def look(client: "Client") -> Shown:
        found = client.models()
        running = [model for model in found["models"] if model.get("engine")]
        return _models({**found, "models": running}, lambda models: tables.ps(models, call.wide))

    watch.show(call, look)


def _models(found: Json, page: Callable[[list[Json]], str]) -> Shown:
    return Shown(found, lambda: page(found["models"]), [str(model.get("name")) for model in found["models"]])


@click.command()
@options.name_argument
@options.shared
@click.pass_obj
def describe(call: options.Call, name: str) -> None:
    """Show everything about one model.

    State and reason, the last failure with the engine's log lines, engine, KV pool, memory footprint by part and asleep,
    the spec, and the events with the reason of each decision. Values of variables that look like secrets are hidden (not
    under --json).

    \b
    Examples:
      orchestratorctl describe qwen
      orchestratorctl describe qwen --json | jq '.events[-1]'
    """
    from orchestrator.cli.client import model_path

    model = call.client().get(model_path(name))
    call.show(model, lambda: pages.model_page(model), [str(model.get("name"))])


@click.command()
@click.argument("what", metavar="[GPU|MODEL]", required=False, shell_complete=options.gpus_and_models)
@options.watched
@options.shared
@click.pass_obj
def explain(call: options.Call, what: str | None) -> None:
    """Show who has a GPU's memory, and why each limit is what it is.

    GPU is an index, a UUID or the beginning of one; MODEL a name or alias; without either, every GPU is shown. The
    lines of a GPU add up to the card: `reserve` is kept free, `foreign` belongs to processes that are not ours,
    `fixed` is an engine's weights and context, `kv` the KV memory it has mapped, `claim` is promised to an engine
    that starts, `room` is free for KV to grow into (below zero: memory is missing). For a MODEL, all that is not its
    own is one line, `others`.

    Then each KV pool: what it may take (LIMIT) and holds (USED, PREALLOC), the bounds of its limit (FLOOR, CEILING),
    what it could use now (DEMAND), where the daemon wants its limit (TARGET), the reason, and what would change it.

    \b
    Examples:
      orchestratorctl explain
      orchestratorctl explain 0
      orchestratorctl explain qwen
      orchestratorctl explain 0 --watch
      orchestratorctl explain --json | jq '.gpus[].lines[] | select(.what == "foreign")'
    """

    def look(client: "Client") -> Shown:
        found = client.explained()
        try:
            gpus, model = (found["gpus"], None) if what is None else _chosen(client, found["gpus"], what)
        except CliError as fault:
            if fault.exit_code != NOT_RUNNING or call.every is None:
                raise
            said = fault.message  # it may come yet
            return Shown({**found, "gpus": []}, lambda: said, [])
        no_pool = f"{model['name']} is {model.get('state')} and has no KV pool here" if model else "no KV pool on this GPU"
        return Shown({**found, "gpus": gpus}, lambda: gpu_pages.page(gpus, no_pool, call.wide), _indexes(gpus))

    watch.show(call, look)


def _indexes(gpus: list[Json]) -> list[str]:
    return [str(gpu.get("index")) for gpu in gpus]


def _chosen(client: "Client", gpus: list[Json], what: str) -> tuple[list[Json], Json | None]:
    """The GPUs that `what` means, and the model where it means one. A name wins over the beginning of a UUID."""
    if exact := gpu_pages.named(gpus, options.gpu(what)):
        return exact, None
    from orchestrator.cli.client import model_path

    try:
        model = client.get(model_path(what))
    except CliError as fault:
        if fault.exit_code != NOT_FOUND:
            raise
        return _beginning(gpus, what, fault), None
    concerned = [part for part in (gpu_pages.about(gpu, model) for gpu in gpus) if part is not None]
    if not concerned:
        reason = f": {gpu_pages.plain(model['reason'])}" if model.get("reason") else ""
        raise CliError(
            f"{model['name']} is {model.get('state')} and has no GPU memory{reason}",
            NOT_RUNNING,
            code="not_running",
            lines=[f"{hint('describe', model['name'])} says more; `orchestratorctl explain` shows who has the memory"],
            body={"param": "name", "model": model},
        )
    return concerned, model


def _beginning(gpus: list[Json], text: str, fault: CliError) -> list[Json]:
    """The one GPU whose UUID begins so; `fault` is the daemon's word that no model is called so."""
    begun = gpu_pages.beginning(gpus, text)
    if len(begun) == 1:
        return begun
    listed = [f"  GPU {gpu.get('index')}: {gpu.get('uuid')}" for gpu in begun or gpus]
    if begun:
        message = f"{text!r} begins the UUIDs of {len(begun)} GPUs: write more of it, or the index"
        raise CliError(message, USAGE, code="usage", lines=listed, body={"param": "what"})
    lines = [*fault.lines, "nor is it a GPU; there are:", *(listed or ["  none"])]
    raise CliError(fault.message, NOT_FOUND, code=str(fault.body["code"]), lines=lines, body=fault.body)


@click.command()
@options.watched
@options.shared
@click.pass_obj
def status(call: options.Call) -> None:
    """Show the daemon, its GPUs and what they hold.

    Also how many models are in which state, and the host memory of those that sleep. Per GPU: OURS (engines: weights,
    graphs, KV) and FOREIGN (other processes) make up USED; CLAIMS is promised to models that start or wake and not yet
    visible; RESERVE is never given out; KV-POOL is what all KV together may take, KV-LIMIT what is given out.

    \b
    Examples:
      orchestratorctl status
      orchestratorctl status --watch
      orchestratorctl --host http://gpu-box:8000 status --json | jq '.gpus[].foreign_bytes'
    """

    def look(client: "Client") -> Shown:
        found = client.get("/status")
        return Shown(found, lambda: pages.status_page(found, call.wide), _indexes(found.get("gpus") or []))

    watch.show(call, look)
