"""The verbs under `keys`: make, list and revoke keys of the users' endpoint, and show what they have used.

A key is printed once, alone on stdout, when it is made: the daemon keeps only its SHA-256.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from orchestrator.cli import options, screen, tables
from orchestrator.cli.exits import Json, hint

Verb = TypeVar("Verb", bound=Callable[..., Any])
LIMITS = {"rpm": "rpm", "tpm": "tpm", "concurrency": "concurrency", "monthly_tokens": "monthly"}
COLUMNS = ("NAME", "STATE", "KEY", "MODELS", "PRIORITY", "WEIGHT", "LIMITS", "LAST-USED", "TODAY", "MONTH", "EXPIRES")
LEAST = ("KEY", "WEIGHT", "PRIORITY", "LAST-USED", "MODELS", "LIMITS", "MONTH", "EXPIRES")  # go first where the terminal is narrow
USAGE = ("KEY", "MODEL", "REQUESTS", "PROMPT-TOKENS", "COMPLETION-TOKENS")
USAGE_LEAST = ("REQUESTS", "PROMPT-TOKENS")


class Keys(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def key_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return options.beginning(ctx, incomplete, lambda client: [key.get("name") for key in client.get("/keys")["keys"]])


@click.group(cls=Keys)
@options.shared
def keys() -> None:
    """Make, list and revoke API keys of the users' endpoint.

    Until the first key is made everybody is served, and only on loopback; from then on every request needs one, also
    when all are revoked (`keys.required` in the configuration). Usage is counted for each key and model.

    \b
    Examples:
      orchestratorctl keys create ci --model qwen --rpm 60
      orchestratorctl keys ls
      orchestratorctl keys usage ci
      orchestratorctl keys revoke ci
    """


@keys.command()
@click.argument("name")
@click.option(
    "--model", "-m", "models", multiple=True, metavar="M", shell_complete=options.model_names,
    help="A model that it may use; may be given more than once. [default: all]",
)  # fmt: skip
@click.option("--priority", type=options.priority, metavar="N", help="-8 to 8: the highest that its requests may have. [default: 0]")
@click.option("--weight", type=options.weight, metavar="W", help="How many turns it has where other keys have one. [default: 1]")
@click.option("--rpm", type=int, metavar="N", help="Requests a minute.")
@click.option("--tpm", type=int, metavar="N", help="Tokens a minute, of prompts and answers, counted when answers end.")
@click.option("--concurrency", type=int, metavar="N", help="Requests at the same time, those that wait included.")
@click.option("--monthly-tokens", type=int, metavar="N", help="Tokens in a calendar month (UTC).")
@click.option("--expires", metavar="WHEN", help="A duration (30d, 12h) or the first date on which it is no longer valid (2027-01-31, UTC).")
@options.shared
@click.pass_obj
def create(call: options.Call, /, name: str, models: tuple[str, ...], **given: Any) -> None:
    """Make a key, and print it: once, and never again.

    Only the key goes to stdout. It is used as OpenAI's (`Authorization: Bearer`) and as Anthropic's (`x-api-key`).

    \b
    Examples:
      orchestratorctl keys create alice
      orchestratorctl keys create ci --model qwen --rpm 60 --concurrency 4 --expires 30d
      OPENAI_API_KEY=$(orchestratorctl keys create batch --priority -4 --weight 0.5 --monthly-tokens 50000000)
    """
    order: Json = {"name": name, **{field: value for field, value in given.items() if value is not None}}
    if models:
        order["models"] = list(models)
    made = call.client().send("POST", "/keys", order)
    call.show(made, lambda: str(made["key"]), [name])
    if call.for_people:
        screen.err(f"this is the key of {name}, shown only now: {hint('keys revoke', name)} ends it")


@keys.command()
@options.shared
@click.pass_obj
def ls(call: options.Call) -> None:
    """List the keys, also those that were revoked.

    KEY is how each begins. TODAY and MONTH are requests/tokens of this day and this month (UTC). LAST-USED and EXPIRES
    are times from now.

    \b
    Examples:
      orchestratorctl keys ls
      orchestratorctl keys ls --json | jq -r '.keys[] | select(.state == "expired").name'
    """
    found = call.client().get("/keys")
    keys_seen: list[Json] = found["keys"]
    page = lambda: tables.table(COLUMNS, list(map(_row, keys_seen)), elastic="MODELS", least=() if call.wide else LEAST)  # noqa: E731
    call.show(found, page, [str(key.get("name")) for key in keys_seen])
    if not keys_seen and call.for_people and sys.stdout.isatty():
        screen.err("no key yet, who is on this machine needs none: `orchestratorctl keys create NAME` makes the first")


@keys.command()
@click.argument("name", shell_complete=key_names)
@options.shared
@click.pass_obj
def revoke(call: options.Call, name: str) -> None:
    """Revoke a key: its next request is refused.

    Requests that it has now end in order. Its usage is kept, and its name can be used for a new key.

    \b
    Examples:
      orchestratorctl keys revoke ci
    """
    from urllib.parse import quote  # 4 ms

    revoked = call.client().send("DELETE", f"/keys/{quote(name, safe='')}")
    running = revoked.get("running") or 0
    call.show(revoked, lambda: f"{name} is revoked" + (f"; requests of it that still run: {running}" if running else ""), [name])


@keys.command()
@click.argument("name", required=False, shell_complete=key_names)
@click.option("--since", metavar="DATE", help="Only from this day on (2027-01-31, UTC). [default: all there is]")
@options.shared
@click.pass_obj
def usage(call: options.Call, name: str | None, since: str | None) -> None:
    """Show what keys have used: for each key and model, requests and tokens.

    With a NAME, of that key alone. Counted when an answer has ended, as its engine has said.

    \b
    Examples:
      orchestratorctl keys usage
      orchestratorctl keys usage ci --since 2027-01-01
      orchestratorctl keys usage --json | jq '[.usage[].completion_tokens] | add'
    """
    from urllib.parse import quote

    query = "&".join(f"{field}={quote(value, safe='')}" for field, value in (("name", name), ("since", since)) if value is not None)
    found = call.client().get("/keys/usage" + (f"?{query}" if query else ""))
    fields = ("key", "model", "requests", "prompt_tokens", "completion_tokens")
    rows = [[str(row.get(field, "-")) for field in fields] for row in found["usage"]]
    names = list(dict.fromkeys(str(row.get("key")) for row in found["usage"]))
    call.show(found, lambda: tables.table(USAGE, rows, least=USAGE_LEAST), names)


def _row(key: Json) -> list[str]:
    now = time.time()
    used, expires = key.get("last_used_at"), key.get("expires_at")
    limits = ",".join(f"{word}={key[field]}" for field, word in LIMITS.items() if key.get(field) is not None)
    return [
        str(key.get("name")), str(key.get("state")), f"{key.get('prefix')}…", ",".join(key.get("models") or ()) or "all",
        str(key.get("priority")), f"{key.get('weight', 1):g}", limits or "-", tables.duration(None if used is None else now - used),
        _amount(key.get("today")), _amount(key.get("month")), tables.duration(None if expires is None else expires - now),
    ]  # fmt: skip


def _amount(used: Json | None) -> str:
    """`12/3456`: requests/tokens."""
    if not used:
        return "-"
    return f"{used.get('requests', 0)}/{used.get('prompt_tokens', 0) + used.get('completion_tokens', 0)}"
