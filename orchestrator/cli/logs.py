"""`logs`: what engines wrote, of one, of several or of all, with the model before each line where there is more than one."""

import zlib
from collections.abc import Iterable
from functools import partial
from urllib.parse import urlencode

import click

from orchestrator.cli import following, options, screen
from orchestrator.cli.exits import INTERRUPTED, NOT_RUNNING, CliError, Json, hint

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
WIDEST = 24  # of the column of names

Asked = list[tuple[str, object]]


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]", shell_complete=options.model_names)
@click.option("--follow", "-f", is_flag=True, help="Go on as the engines write more, also after a restart of one. Ctrl-C ends it.")
@click.option("--tail", "-n", type=click.IntRange(min=0), default=100, show_default=True, metavar="N", help="Begin with the last N lines.")
@click.option("--since", type=options.seconds, metavar="D", help="Only lines of the last D, like 5m or 1h.")
@click.option("--previous", "-p", is_flag=True, help="Of the launch before the newest: what it said before it ended.")
@options.shared
@click.pass_obj
@click.pass_context
def logs(
    ctx: click.Context, call: options.Call, names: tuple[str, ...], follow: bool, tail: int, since: float | None, previous: bool
) -> None:
    """Print what engines wrote.

    Of one model its engine's log as it is; where the engine has ended, its last one. Of several, or of all where none is
    named, one stream in the order of time, the model before each line. A model without any log is not running: exit
    code 3. With --follow it waits for a daemon that is restarted, and goes on where it was. With --json one object {"name",
    "lines"} for one model, {"lines"} for several; with --follow one object a line.

    \b
    Examples:
      orchestratorctl logs qwen --tail 20
      orchestratorctl logs -f qwen | grep -i error
      orchestratorctl logs -f                        # all engines
      orchestratorctl logs qwen --previous
    """
    if follow and previous:
        raise click.UsageError("a launch that is over writes no more: --follow or --previous")
    try:
        if len(names) == 1 and since is None and not (previous or follow):
            return _one(call, names[0], tail)
        asked = [*(("model", name) for name in names), ("tail", tail), ("follow", int(follow)), ("previous", int(previous))]
        asked += [("since", f"{since:f}")] if since is not None else []
        _follow(call, asked, len(names) != 1) if follow else _merged(call, asked, len(names) != 1)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _one(call: options.Call, name: str, tail: int) -> None:
    from orchestrator.cli.client import model_path

    client = call.client()
    kept: list[str] = []
    with client.open("GET", model_path(name, f"/logs?tail={tail}")) as answer:
        for raw in answer.lines():
            text = raw.decode(errors="replace")
            if call.for_people:
                screen.out(text, newline=False)
            kept.append(text.rstrip("\r\n"))
    if not kept and tail and not (model := client.get(model_path(name))).get("engine"):
        message = f"{name} is {model.get('state')} and has no log: {hint('start', name)} starts it"
        raise CliError(message, NOT_RUNNING, code="not_running", body={"param": "name"})
    call.show({"name": name, "lines": kept}, None, [name])


def _merged(call: options.Call, asked: Asked, named: bool) -> None:
    kept: list[Json] = []
    widest = 0
    with call.client().open("GET", f"/logs?{urlencode(asked)}") as answer:
        while (line := answer.object_line()) is not None:
            widest = min(WIDEST, max(widest, len(line["model"])))
            if call.for_people:
                screen.out(_shown(line, widest if named else None))
            kept.append(line)
    call.show({"lines": kept}, None, _models(kept))


def _follow(call: options.Call, asked: Asked, named: bool) -> None:
    """Each line says what comes `after` it: where to go on when the daemon was away."""
    ends: dict[str, str] = {}
    widest = 0
    for line in following.followed(call.client(), lambda: f"/logs?{urlencode([*asked, *(('after', at) for at in ends.values())])}"):
        model = str(line["model"])
        first, ends[model] = model not in ends, line.get("after", "")
        widest = min(WIDEST, max(widest, len(model)))
        call.show_next(line, partial(_shown, line, widest if named else None), [model] if first else [])


def _models(lines: Iterable[Json]) -> list[str]:
    return list(dict.fromkeys(line["model"] for line in lines))


def _shown(line: Json, width: int | None) -> str:
    return str(line["line"]) if width is None else f"{_named(line['model'], width)} {line['line']}"


def _named(model: str, width: int) -> str:
    """A model has the same colour in each run."""
    return click.style(f"{model:{width}} |", fg=COLOURS[zlib.crc32(model.encode()) % len(COLOURS)])
