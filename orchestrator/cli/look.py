"""Verbs that look: ls, ps, describe, logs, status. They change nothing, and their data goes to stdout."""

import sys

import click

from orchestrator.cli import describe as pages
from orchestrator.cli import options, screen, tables
from orchestrator.cli.exits import INTERRUPTED, NOT_RUNNING, CliError, hint


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
    """List the models that have an engine now.

    VRAM is all GPU memory of the engine. LIMIT-STATUS: `applied`; `draining`, where the engine still holds more than
    a lowered limit and gives it back as requests finish; `unverified`. UP counts from the engine's launch.

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

    State and reason, the last failure with the engine's log lines, engine, KV pool, memory footprint by part, the
    spec, and the events with the reason of each decision. Values of variables that look like secrets are hidden (not
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

    Also how many models are in which state. Per GPU: OURS (engines: weights, graphs, KV) and FOREIGN (other processes)
    make up USED; CLAIMS is promised to models that start and not yet visible; RESERVE is never given out; KV-POOL is
    what all KV together may take, KV-LIMIT what is given out.

    \b
    Examples:
      orchestratorctl status
      orchestratorctl --host http://gpu-box:8000 status --json | jq '.gpus[].foreign_bytes'
    """
    found = call.client().get("/status")
    if call.json:
        return screen.out_json(found)
    screen.out(pages.status_page(found))
