"""Verbs that look: ls, ps, describe, explain, logs, status. They change nothing, and their data goes to stdout."""

import sys
from typing import TYPE_CHECKING

import click

from orchestrator.cli import describe as pages
from orchestrator.cli import explain as gpu_pages
from orchestrator.cli import options, screen, tables
from orchestrator.cli.exits import INTERRUPTED, NOT_FOUND, NOT_RUNNING, USAGE, CliError, Json, hint

if TYPE_CHECKING:
    from orchestrator.cli.client import Client


@click.command()
@options.shared
@click.pass_obj
def ls(call: options.Call) -> None:
    """List the registered models.

    REQUESTS counts those in the engine, and +N that wait. KV-USED and KV-LIMIT are the model's KV memory now and what
    it may grow to. OWNER says who defined it: `file` (the configuration) or `api` (add-model).

    \b
    Examples:
      orchestratorctl ls
      orchestratorctl ls --json | jq -r '.models[] | select(.state == "ready").name'
    """
    found = call.client().models()
    if call.json:
        return screen.out_json(found)
    screen.out(tables.ls(found["models"]))
    if not found["models"] and sys.stdout.isatty():
        screen.err("no model yet: `orchestratorctl add-model NAME SOURCE` adds one")


@click.command()
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
      watch -n1 orchestratorctl ps
    """
    found = call.client().models()
    running = [model for model in found["models"] if model.get("engine")]
    if call.json:
        return screen.out_json({**found, "models": running})
    screen.out(tables.ps(running))


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
    if call.json:
        return screen.out_json(model)
    screen.out(pages.model_page(model))


@click.command()
@click.argument("what", metavar="[GPU|MODEL]", required=False, shell_complete=options.model_names)
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
      orchestratorctl explain --json | jq '.gpus[].lines[] | select(.what == "foreign")'
    """
    client = call.client()
    found = client.explained()
    gpus, model = (found["gpus"], None) if what is None else _chosen(client, found["gpus"], what)
    if call.json:
        return screen.out_json({**found, "gpus": gpus})
    no_pool = f"{model['name']} is {model.get('state')} and has no KV pool here" if model else "no KV pool on this GPU"
    screen.out(gpu_pages.page(gpus, no_pool))


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
@options.name_argument
@click.option("--follow", "-f", is_flag=True, help="Go on as the engine writes more. Ctrl-C ends it.")
@click.option(
    "--tail",
    "-n",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="Begin with the last N lines.",
)
@options.shared
@click.pass_obj
@click.pass_context
def logs(ctx: click.Context, call: options.Call, name: str, follow: bool, tail: int) -> None:
    """Print what a model's engine wrote.

    Where the engine has ended, its last log. A model without any log is not running: exit code 3. With --json one
    object {"name", "lines"}; with --follow one object {"line"} per line.

    \b
    Examples:
      orchestratorctl logs qwen --tail 20
      orchestratorctl logs -f qwen | grep -i error
    """
    from orchestrator.cli.client import model_path

    client = call.client()
    kept: list[str] = []
    lines = 0
    try:
        with client.open("GET", model_path(name, f"/logs?tail={tail}&follow={int(follow)}")) as answer:
            for raw in answer.lines():
                lines += 1
                text = raw.decode(errors="replace")
                if not call.json:
                    screen.out(text, newline=False)
                elif follow:
                    screen.out_json_line({"line": text.rstrip("\r\n")})
                else:
                    kept.append(text.rstrip("\r\n"))
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    if not lines and not follow and tail and not (model := client.get(model_path(name))).get("engine"):
        message = f"{name} is {model.get('state')} and has no log: {hint('start', name)} starts it"
        raise CliError(message, NOT_RUNNING, code="not_running", body={"param": "name"})
    if call.json and not follow:
        screen.out_json({"name": name, "lines": kept})


@click.command()
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
      orchestratorctl --host http://gpu-box:8000 status --json | jq '.gpus[].foreign_bytes'
    """
    found = call.client().get("/status")
    if call.json:
        return screen.out_json(found)
    screen.out(pages.status_page(found))
