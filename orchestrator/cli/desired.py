"""Verbs of desired state: apply, diff, export. A file says which models there are to be; the daemon takes it whole or not at all.

The daemon checks every spec; here a fault that it names is given the file and line where the value stands.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import options, screen, wait
from orchestrator.cli.exits import CONFIG, FAILED, CliError, Json

if TYPE_CHECKING:
    from orchestrator.marked_yaml import Loc

DIFFERS = 1  # as kubectl diff

file_option = click.option(
    "--file", "-f", "files", multiple=True, required=True, metavar="FILE",
    help="YAML with a `models:` map, as in the daemon's config files; `-` is stdin. Repeatable: all files together are what is desired.",
)  # fmt: skip
prune_option = click.option(
    "--prune", is_flag=True, help="Models that are in none of the files go, too; never those of the daemon's config files."
)


@click.command()
@file_option
@prune_option
@click.option("--yes", "-y", is_flag=True, help="Remove with --prune without asking; where stdin is no terminal nobody is asked.")
@click.option("--dry-run", is_flag=True, help="Check all of it and say what would change; nothing is done.")
@click.option("--wait", "waits", is_flag=True, help="Wait until what changed is in force: engines replaced, removed models gone.")
@options.timeout_option
@options.shared
@click.pass_obj
def apply(call: options.Call, files: tuple[str, ...], prune: bool, yes: bool, dry_run: bool, waits: bool, timeout: float | None) -> None:
    """Make the registered models those of a file.

    New models are added (started with `preload`, else by their first request), those that differ are changed, those that
    are the same do not notice. Bounds, pins and timeouts change at once; what an engine is started with has it finish its
    requests and replaced. What `limit`, `pin` and `adapt` changed since counts as a difference; `stop` is no part of it.
    All is checked before anything is done: one fault, and nothing changes (exit code 78).

    \b
    Examples:
      orchestratorctl apply -f models.yaml
      orchestratorctl apply -f models.yaml --prune --dry-run
      orchestratorctl export | ssh other-box orchestratorctl apply -f -
    """
    desired = Desired(files)
    client = call.client(timeout)
    if prune and not yes and not dry_run and sys.stdin.isatty() and "-" not in files:
        going = [model["name"] for model in desired.send(client, prune=True, dry_run=True)["removed"]]
        if going and not _agreed(f"{', '.join(going)}: remove {'it' if len(going) == 1 else 'them'}?"):
            raise CliError("nothing was changed", FAILED, code="declined")
    asked_at = time.monotonic()
    done = desired.send(client, prune=prune, dry_run=dry_run)
    if call.for_people:
        screen.out("\n".join(summary(done)))
    if waits and not dry_run:
        _wait(client, done, asked_at)
    call.show(done, None, _differing(done))


@click.command()
@file_option
@prune_option
@options.shared
@click.pass_context
@click.pass_obj
def diff(call: options.Call, ctx: click.Context, files: tuple[str, ...], prune: bool) -> None:
    """Show what `apply` would change, field by field.

    Exit code 0 where there is no difference, 1 where there is, more where it could not be found out. A field that is not
    written is at its default.

    \b
    Examples:
      orchestratorctl diff -f models.yaml
      orchestratorctl diff -f models.yaml --prune || echo "somebody has changed something"
    """
    found = Desired(files).send(call.client(), prune=prune, dry_run=True)
    names = _differing(found)
    call.show(found, (lambda: "\n".join(differences(found))) if names else None, names)
    if names:
        ctx.exit(DIFFERS)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]", shell_complete=options.model_names)
@click.option("--secrets", is_flag=True, help="Write variables that look like secrets, too; `apply` keeps what is (hidden).")
@options.shared
@click.pass_obj
def export(call: options.Call, names: tuple[str, ...], secrets: bool) -> None:
    """Write models as YAML that `apply` takes back unchanged.

    Those that were added with `add-model` or `apply`, as they are now: also what `limit`, `pin` and `adapt` changed.
    Models of the daemon's config files are written there already.

    \b
    Examples:
      orchestratorctl export > models.yaml
      orchestratorctl export qwen --secrets > qwen.yaml
    """
    from urllib.parse import urlencode

    query = urlencode([*(("name", name) for name in names), ("secrets", str(secrets).lower())])
    found = call.client().get(f"/specs?{query}")
    if call.for_people:
        return screen.out_yaml(found)
    call.show(found, None, list(found["models"]))


def _agreed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        raise KeyboardInterrupt from None


class Desired:
    """The models of all files. Raises CliError with everything that is wrong with them as YAML."""

    def __init__(self, files: Sequence[str]) -> None:
        from orchestrator.errors import Problem

        self._places: dict[Loc, str] = {}
        self.models: Json = {}
        problems: list[Problem] = []
        for file in files:
            places: dict[Loc, str] = {}
            for key, value in _read(file, places, problems).items():
                if key != "models":
                    problems.append(Problem(places[(key,)], f"{key}: only `models:` is applied; settings are the config files'"))
                elif not isinstance(value, dict):
                    problems.append(Problem(places[(key,)], "models: is a map of models by name"))
                else:
                    for name in sorted(self.models.keys() & value.keys()):
                        problems.append(Problem(places[("models", name)], f"models.{name}: is in an earlier file too: remove one"))
                    self.models |= value
            self._places |= places
        if problems:
            raise _refused([(problem.where, problem.what) for problem in problems], {})

    def send(self, client: Any, prune: bool, dry_run: bool) -> Json:
        """The daemon's answer. Raises CliError; each fault with the place where it stands."""
        from orchestrator import marked_yaml

        try:
            answer: Json = client.send("PUT", "/models", {"models": self.models, "prune": prune, "dry_run": dry_run})
        except CliError as fault:
            told = [each for each in fault.body.get("errors") or [] if isinstance(each, dict)]
            if not told:
                raise
            faults = [(str(each.get("field")), str(each.get("message"))) for each in told]
            raise _refused([(marked_yaml.place(field, self._places), f"{field}: {what}") for field, what in faults], fault.body) from None
        return answer


def _read(file: str, places: "dict[Loc, str]", problems: list[Any]) -> Json:
    from pathlib import Path

    from orchestrator import marked_yaml

    if file != "-":
        return marked_yaml.read(Path(file), places, problems)
    return marked_yaml.parse(sys.stdin.read(), "stdin", places, problems)


def _refused(faults: Sequence[tuple[str, str]], body: Json) -> CliError:
    count = f"{len(faults)} problem{'' if len(faults) == 1 else 's'}"
    lines = [f"  {where}: {what}" if where else f"  {what}" for where, what in faults]
    return CliError(f"nothing was changed: {count}", CONFIG, code="invalid_spec", lines=lines, body=body)


def summary(done: Json) -> Iterator[str]:
    """A line a model that changes."""
    would = " (dry run: nothing was done)" if done["dry_run"] else ""
    yield from (f"{model['name']}: added" for model in done["added"])
    for model in done["changed"]:
        yield f"{model['name']}: changed: {', '.join(model['fields'])}" + ("; a new engine" if model["new_engine"] else "")
    yield from (f"{model['name']}: removed" for model in done["removed"])
    yield f"{len(done['unchanged'])} unchanged{would}"


def differences(found: Json) -> Iterator[str]:
    """As diff(1) writes them: `-` is what there is, `+` what is desired."""
    for model in found["added"]:
        yield f"{model['name']}: is not there"
        yield from (_plus(f"  + {field}: {_value(value)}") for field, value in model["spec"].items())
    for model in found["changed"]:
        yield f"{model['name']}:" + (" (its engine would be replaced)" if model["new_engine"] else "")
        for field, both in model["fields"].items():
            hidden = both["before"] == both["after"]  # a secret, of which neither is shown
            yield _minus(f"  - {field}: {_value(both['before'])}")
            yield _plus(f"  + {field}: {_value(both['after'])}" + (" (another one)" if hidden else ""))
    for model in found["removed"]:
        yield f"{model['name']}: is not in the files"
        yield from (_minus(f"  - {field}: {_value(value)}") for field, value in model["spec"].items())


def _differing(done: Json) -> list[str]:
    return [each["name"] for each in (*done["added"], *done["changed"], *done["removed"])]


def _value(value: object) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plus(line: str) -> str:
    return click.style(line, fg="green")


def _minus(line: str) -> str:
    return click.style(line, fg="red")


def _wait(client: Any, done: Json, asked_at: float) -> None:
    from orchestrator.cli.client import model_path

    with wait.detachable(_differing(done) or ["-"], "ready", None):
        for model in done["removed"]:
            wait.follow(client, model["name"], "removed", asked_at)
        for model in (*done["added"], *done["changed"]):
            name = model["name"]
            if client.get(model_path(name)).get("wanted") == "ready":
                screen.err(wait.arrival(name, wait.follow(client, name, "ready", asked_at), asked_at))
