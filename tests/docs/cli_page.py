"""docs/cli.md below its mark: each verb of orchestratorctl and orchestratord with its options, as click knows them."""

import inspect
import re
from collections.abc import Iterator

import click

from orchestrator.cli.main import cli as orchestratorctl
from orchestrator.commands import main as orchestratord
from tests.docs.pages import cell, table

NOT_TOLD = {"help", "_click_default_help", "version"}  # every one has them


def made() -> str:
    return "\n".join([*_program("orchestratorctl", orchestratorctl), *_program("orchestratord", orchestratord)])


def _program(name: str, group: click.Group) -> Iterator[str]:
    context = click.Context(group, info_name=name)
    shared = {option.name or "" for option in group.params} - NOT_TOLD
    yield f"## {name}\n\n{_text(group.help)}\n"
    verbs = ((f"[{verb.name}](#{name}-{verb.name})", verb.get_short_help_str(200)) for verb in group.commands.values() if not verb.hidden)
    yield f"{table(('verb', ''), verbs)}\n"
    if shared:
        yield f"Each verb takes these, and `--help`:\n\n{_options(group, context, leave=set())}\n"
    for verb in group.commands.values():
        yield from _verb(verb, context, shared)


def _verb(verb: click.Command, parent: click.Context, shared: set[str]) -> Iterator[str]:
    if verb.hidden:
        return
    context = click.Context(verb, info_name=verb.name, parent=parent)
    usage = " ".join([context.command_path, *verb.collect_usage_pieces(context)])
    yield f"### {context.command_path}\n\n```\n{usage}\n```\n\n{_text(verb.help)}\n"
    if options := _options(verb, context, leave=shared):
        yield f"{options}\n"
    if isinstance(verb, click.Group):
        for inner in verb.commands.values():
            yield from _verb(inner, context, shared)


def _options(verb: click.Command, context: click.Context, leave: set[str]) -> str:
    records = [
        record
        for option in verb.get_params(context)
        if isinstance(option, click.Option) and option.name not in leave | NOT_TOLD and (record := option.get_help_record(context))
    ]
    return table(("option", ""), ((f"`{names}`", told) for names, told in records)) if records else ""


def _text(told: str | None) -> str:
    """The help of a verb: paragraphs; what stands in its lines as they are (\\b) becomes a block."""
    parts = []
    for paragraph in inspect.cleandoc(told or "").split("\n\n"):
        head, as_it_is, lines = paragraph.partition("\b\n")
        if as_it_is:
            first, _, rest = lines.partition("\n")
            parts.append(f"{first}\n\n```\n{inspect.cleandoc(rest)}\n```")
        else:
            parts.append(cell(re.sub(r"\s+", " ", head)).replace("\\|", "|"))
    return "\n\n".join(parts)
