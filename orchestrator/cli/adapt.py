"""`adapt`: LoRA adapters of a model, added and removed while it serves."""

import click

from orchestrator.cli import options, screen
from orchestrator.cli.change import as_the_daemon_sees_it
from orchestrator.cli.exits import Json

RUNNING = frozenset({"ready", "starting", "waking", "asleep", "draining"})


@click.command()
@options.name_argument
@click.option("--add", "added", multiple=True, type=options.adapter, metavar="NAME=SOURCE",
              help="Add an adapter, or replace the one of that name. SOURCE: a Hub id or a folder. Repeatable.")  # fmt: skip
@click.option("--rm", "removed", multiple=True, metavar="NAME", help="Remove an adapter. Repeatable.")
@options.shared
@click.pass_obj
def adapt(call: options.Call, name: str, added: tuple[tuple[str, str], ...], removed: tuple[str, ...]) -> None:
    """Show, add and remove a model's LoRA adapters.

    Users ask for an adapter as for a model. Of a model that runs, the engine finishes its requests and is replaced by one
    that has the new adapters; requests wait meanwhile. Kept over restarts.

    \b
    Examples:
      orchestratorctl adapt qwen                                  # which it has
      orchestratorctl adapt qwen --add sql=/adapters/sql --rm old
    """
    from orchestrator.cli.client import model_path

    if both := {adapter for adapter, _ in added} & set(removed):
        raise click.UsageError(f"{min(both)} is to be added and to be removed: choose one")
    changes: Json = {**dict.fromkeys(removed), **{adapter: as_the_daemon_sees_it(source) for adapter, source in added}}
    client = call.client()
    model = client.send("POST", model_path(name, "/adapters"), changes) if changes else client.get(model_path(name))
    adapters: Json = model.get("adapters") or {}
    page = "\n".join(f"{adapter}  {source}" for adapter, source in adapters.items()) or f"{model['name']} has no adapters"
    call.show(model, lambda: page, list(adapters))
    if call.for_people and changes and model.get("state") in RUNNING:
        screen.err(f"the engine of {model['name']} finishes its requests and is replaced; requests wait meanwhile")
