"""`pull`: a model from the hub into the engines' cache, before anybody waits for it. A bar on a terminal, else a line per 10 %."""

from typing import Any

import click

from orchestrator.cli import options, screen
from orchestrator.cli.exits import FAILED, INTERRUPTED, CliError, Json, hint
from orchestrator.cli.progress import Display, Moving, Still, bar, description
from orchestrator.cli.tables import seconds, size

ASK_S = 120.0  # the hub may be slow, and is asked several times
SILENT_S = 60.0
SHOWN = 5  # of the files that are left out


@click.command()
@click.argument("source", shell_complete=options.model_names)
@click.option("--revision", metavar="R", help="A branch, a tag or a commit. [default: main, or the model's own --revision]")
@click.option("--engine", metavar="E", help="Whose venv and environment load it. [default: default, or the model's own]")
@options.shared
@click.pass_obj
def pull(call: options.Call, source: str, revision: str | None, engine: str | None) -> None:
    """Load a model from the hub, so that its first start need not.

    SOURCE is a hub id, or the name of a registered model. The daemon loads it with the engine's own Python and environment,
    into the cache that its engines read: only the files that vLLM needs, after a look at their size and at the disk.
    Ctrl-C ends it; what is loaded is kept, and the same command goes on from there. HF_HUB_OFFLINE=1 in the engine's
    environment is respected; HF_TOKEN there opens gated models.

    \b
    Examples:
      orchestratorctl pull Qwen/Qwen2.5-7B-Instruct
      orchestratorctl pull qwen --json
    """
    asked: Json = {"source": source, **{key: value for key, value in (("revision", revision), ("engine", engine)) if value}}
    last: Json = {}
    try:
        with call.client(answer_s=ASK_S).open("POST", "/pull", asked) as answer, _display(call) as display:
            while (line := answer.object_line(SILENT_S)) is not None:
                last = line
                display.show(line)
    except KeyboardInterrupt:
        raise CliError(f"ended; what is loaded is kept, {hint('pull', source)} goes on", INTERRUPTED, code="interrupted") from None
    except TimeoutError:
        raise CliError(f"the daemon says nothing any more; {hint('pull', source)} goes on", FAILED, code="silent") from None
    if last.get("phase") != "done":
        message = str(last.get("message") or f"the daemon ended it; {hint('pull', source)} goes on")
        raise CliError(message, FAILED, code=str(last.get("code") or "cut"))
    if call.for_people:
        screen.out(_end(source, last))
    elif call.output == "name":
        screen.out(str(last["path"]))


def _end(source: str, done: Json) -> str:
    if done.get("offline"):
        return f"{source} is complete in {done['path']} ({size(done['total_bytes'])}); HF_HUB_OFFLINE is set, nothing was asked"
    if not done["loaded_bytes"]:
        return f"{source} was complete already: {done['path']} ({size(done['total_bytes'])})"
    return f"{source} is loaded: {size(done['loaded_bytes'])} in {seconds(done['seconds'])}, in {done['path']}"


def _begin(line: Json) -> list[str]:
    what = f"{line['source']}: {line['files']} files, {size(line['total_bytes'])}"
    rest = f", {size(line['need_bytes'])} to load" if line["need_bytes"] != line["total_bytes"] else ""
    lines = [f"{what}{rest}; {size(line['free_bytes'])} free in {line['path']}"]
    if skipped := line["skipped"]:
        names = ", ".join(each["file"] for each in skipped[:SHOWN]) + (f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else "")
        lines.append(f"left out, vLLM does not need it: {names} ({size(sum(each['bytes'] for each in skipped))})")
    return lines


def _display(call: options.Call) -> Display:
    if call.output in ("json", "yaml"):
        return Raw(call)
    return Bar() if screen.live() else Lines()


class Raw(Still):
    """What the daemon says, as data."""

    def __init__(self, call: options.Call) -> None:
        self._call = call

    def show(self, line: Json) -> None:
        self._call.show_next(line, None, [])


class Lines(Still):
    """For the logs of a script."""

    def __init__(self) -> None:
        self._told = 0

    def show(self, line: Json) -> None:
        if line["phase"] == "asked":
            for text in _begin(line):
                screen.err(text)
        elif line["phase"] == "downloading":
            tenth = 10 * line["done_bytes"] // max(1, line["total_bytes"])
            if tenth > self._told:
                screen.err(f"{10 * tenth} % of {size(line['total_bytes'])}: {line['file']}")
            self._told = max(tenth, self._told)


class Bar(Moving):
    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        done = DownloadColumn(binary_units=True)
        super().__init__(bar(description(), BarColumn(bar_width=24), done, TransferSpeedColumn(), TimeRemainingColumn()))
        self._task: Any = None

    def show(self, line: Json) -> None:
        if line["phase"] == "asked":
            for text in _begin(line):
                self.say(text)
            self._task = self._bar.add_task(line["source"], total=line["total_bytes"], completed=line["total_bytes"] - line["need_bytes"])
        elif line["phase"] == "downloading":
            self._bar.update(self._task, description=line["file"], completed=line["done_bytes"])
