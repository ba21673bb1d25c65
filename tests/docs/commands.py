"""The commands of ours that a page shows, and what click says of each: a verb or an option that there is not is a fault of the page."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile

import click

from orchestrator.cli.main import cli as orchestratorctl
from orchestrator.commands import main as orchestratord
from tests.docs.pages import blocks, prose

PROGRAMS: dict[str, click.Group] = {"orchestratorctl": orchestratorctl, "orchestratord": orchestratord}
COMMAND = re.compile(r"(?<![\w.-])(?:[\w./~-]*/)?(orchestratorctl|orchestratord)(?= |$)([^|&;>)`\n…]*)")


def shown(text: str) -> Iterator[tuple[str, bool]]:
    """Each command, and whether it is one to be copied: then nothing of it may be missing."""
    for block in blocks(text):
        typed = [line for line in _joined(block.lines) if block.kind in ("sh", "bash") or line.startswith("$ ")]
        for line in typed:
            yield from ((found[0], True) for found in COMMAND.finditer(line))
        for line in set(block.lines) - set(typed):
            yield from _spans(line)
    yield from _spans(prose(text))


def _spans(text: str) -> Iterator[tuple[str, bool]]:
    """Those in `code`: also parts of one, like a verb without its name."""
    for code in re.findall(r"`([^`\n]+)`", text):
        if found := COMMAND.match(code.replace("\\|", "|")):
            yield found[0], False


def _joined(lines: tuple[str, ...]) -> list[str]:
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def fault(command: str, whole: bool) -> str | None:
    """What click would say; None: nothing."""
    words = shlex.split(command, comments=True)
    ours = [*takewhile(lambda word: word not in ("--", "[--"), words)]  # what follows goes to vLLM as it stands
    try:
        program = ours[0].rpartition("/")[2]
        _walk(program, PROGRAMS[program], ours[1:], whole)
    except click.UsageError as error:
        return error.format_message()
    return None


def _walk(name: str, command: click.Command, words: list[str], whole: bool) -> None:
    context = click.Context(command, info_name=name)
    values, rest, _ = command.make_parser(context).parse_args(words)
    for param in command.params:
        given = values.get(param.name or "")
        given = given if isinstance(given, (str, tuple)) else ""  # click has a word of its own for what is not given
        if isinstance(param.type, click.Choice) and isinstance(given, str) and given.islower() and given not in param.type.choices:
            raise click.BadParameter(f"{given!r} is none of {', '.join(map(str, param.type.choices))}", param=param)
        if whole and isinstance(param, click.Argument) and param.required and not given and "--help" not in words:
            raise click.MissingParameter(param=param, ctx=context, param_type="argument")
    if isinstance(command, click.Group):
        if inner := command.get_command(context, rest[0]) if rest else None:
            _walk(f"{name} {rest[0]}", inner, rest[1:], whole)
        elif rest:
            raise click.UsageError(f"{name} has no verb {rest[0]!r}")
    elif rest:
        raise click.UsageError(f"{name} takes no more words: {' '.join(rest)}")
