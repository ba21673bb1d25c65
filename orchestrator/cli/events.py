"""`events`: what the daemon did and why, a line each. Following outlives a restart of the daemon, and nothing is lost in between."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import click

from orchestrator.cli import following, options, screen
from orchestrator.cli.describe import bare
from orchestrator.cli.exits import INTERRUPTED, Json

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

BAD = frozenset({"failed", "backoff", "not reloaded", "state-lost"})


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on as more happens. Ctrl-C ends it.")
@click.option("--model", "-m", metavar="NAME", shell_complete=options.model_names, help="Only those of this model.")
@click.option("--kind", "-k", metavar="KIND", help="Only those of a kind: a state (`ready`, `failed`), `limit`, `added`, `reloaded`, …")
@click.option("--since", type=options.seconds, metavar="D", help="Only those of the last D, like 1h or 5m.")
@click.option("--tail", "-n", type=click.IntRange(0, 10_000), metavar="N", help="Begin with the last N. [default: 100; all with --since]")
@options.shared
@click.pass_context
@click.pass_obj
def events(
    call: options.Call, ctx: click.Context, follow: bool, model: str | None, kind: str | None, since: float | None, tail: int | None
) -> None:
    """Show what happened, with the reason of each.

    A line for each change of a model's state and for what operators did: time, model, kind, reason. `-` stands for the
    daemon itself. With --follow it waits for a daemon that is restarted, and goes on where it was. With --json one object
    {"events"}; with --follow too, one object a line. -o name: their ids.

    \b
    Examples:
      orchestratorctl events
      orchestratorctl events -f --model qwen
      orchestratorctl events --kind failed --since 1h
    """
    asked = {"model": model, "kind": kind, "since": None if since is None else f"{since:f}"}
    asked["tail"] = str((100 if since is None else 10_000) if tail is None else tail)
    query = {key: value for key, value in asked.items() if value is not None}
    client = call.client()
    found = client.get(f"/events?{urlencode(query)}")
    if not (follow or call.for_people):
        return call.show(found, None, [str(event["id"]) for event in found["events"]])
    for event in found["events"]:
        _show(call, event)
    if not (found["events"] or follow) and sys.stdout.isatty():
        screen.err("nothing like that has happened")
    try:
        for event in _followed(client, model, kind, found) if follow else ():
            _show(call, event)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _show(call: options.Call, event: Json) -> None:
    call.show_next(event, lambda: line(event), [str(event["id"])])


def line(event: Json) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
    kind = f"{event['kind']!s:12}"
    kind = click.style(kind, fg="red") if event["kind"] in BAD else kind
    return f"{click.style(at, dim=True)}  {event.get('model') or '-':20}  {kind}  {' '.join(bare(event.get('reason') or '').splitlines())}"


def _followed(client: "Client", model: str | None, kind: str | None, found: Json) -> Iterator[Json]:
    """All that came after `found`, also while the daemon was away."""
    asked = (
        ("model", model),
        ("kind", kind),
        ("follow", "true"),
        ("after", max([found["newest"], *(each["id"] for each in found["events"])])),
    )
    query = {key: value for key, value in asked if value is not None}
    for event in following.followed(client, lambda: f"/events?{urlencode(query)}", begun=True):
        query["after"] = event["id"]
        yield event
