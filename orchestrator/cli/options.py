"""Options that every verb takes, before or after it, and the kinds of values that options have.

The daemon checks a spec and names every fault at once; here only what cannot be sent at all is refused (exit 2).
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli import screen
from orchestrator.cli.exits import Json
from orchestrator.cli.target import Target, find, parse, places

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

Verb = TypeVar("Verb", bound=Callable[..., Any])
Value = TypeVar("Value")


FORMATS = ("table", "wide", "json", "yaml", "name")
INTERVAL_S = 1.0
COMPLETION_S = 0.3


class Call:
    """What the shared options say about this call. `every`: seconds between two looks of --watch; None: one look."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.admin_key: str | None = None
        self.output = "table"
        self.every: float | None = None
        self._client: Client | None = None

    @property
    def json(self) -> bool:
        return self.output == "json"

    @property
    def wide(self) -> bool:
        return self.output == "wide"

    @property
    def for_people(self) -> bool:
        """Whether sentences and pages are wanted, not data alone."""
        return self.output in ("table", "wide")

    def show(self, data: Json, page: Callable[[], str] | None, names: Sequence[str]) -> None:
        """What a verb has to show, as -o says: the API's own object, its page, or only the names. `page` None: it was told already."""
        if self.output == "json":
            screen.out_json(data)
        elif self.output == "yaml":
            screen.out_yaml(data)
        elif self.output == "name":
            screen.out("".join(f"{name}\n" for name in names), newline=False)
        elif page is not None:
            screen.out(page())

    def show_next(self, data: Json, page: Callable[[], str] | None, names: Sequence[str]) -> None:
        """The same of one of many, as they come: an object a line under -o json, a document each under -o yaml."""
        if self.output == "json":
            return screen.out_json_line(data)
        if self.output == "yaml":
            screen.out("---")
        self.show(data, page, names)

    def client(self, timeout_s: float | None = None, answer_s: float | None = None) -> "Client":
        """A client of the chosen daemon; `timeout_s` counts from now."""
        import os

        where = self.target or find(places(os.environ))
        from orchestrator.cli import client  # http.client: 35 ms that --help and completion need not wait for

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._client = client.Client(where, self.admin_key, deadline, client.ANSWER_S if answer_s is None else answer_s)
        return self._client

    def misread(self, fault: Exception) -> Exception | None:
        """Why an answer was not what this program takes it for: a daemon of another version. None: a fault of ours."""
        missing = f"its answer has no {fault}" if isinstance(fault, KeyError) else "its answer is of another form"
        return self._client.other_version(f"says something else than expected ({missing})") if self._client else None


def shared(verb: Verb) -> Verb:
    """--host, --admin-key, -o and --json, as the group and each verb take them; what stands after the verb wins."""
    return _shared(verb, host_env=None, key_env=None)


def shared_by_group(verb: Verb) -> Verb:
    """The same, and the environment variables: read once, so that they never win over an option before the verb."""
    return _shared(verb, host_env="ORCH_HOST", key_env="ORCH_ADMIN_KEY")


def _shared(verb: Verb, host_env: str | None, key_env: str | None) -> Verb:
    host = click.option(
        "--host", "-H", metavar="WHERE", envvar=host_env, expose_value=False, callback=_set_target,
        help="The daemon: a socket's path, unix:///PATH or http://HOST:PORT. "
        "[env: ORCH_HOST; default: the first admin.sock found]",
    )  # fmt: skip
    key = click.option(
        "--admin-key", metavar="KEY", envvar=key_env, expose_value=False, callback=_set_key,
        help="The admin key. Better in the environment: other users can read your command line. [env: ORCH_ADMIN_KEY]",
    )  # fmt: skip
    output = click.option(
        "--output", "-o", type=click.Choice(FORMATS), expose_value=False, callback=_set_output,
        help="`wide`: with all columns; `json`, `yaml`: the API's own object, errors as {\"error\": ...} too; "
        "`name`: only names, a line each. [default: table]",
    )  # fmt: skip
    as_json = click.option("--json", "short", is_flag=True, expose_value=False, callback=_set_json, help="Short for -o json.")
    return host(key(output(as_json(verb))))


def quiet_option(verb: Verb) -> Verb:
    return click.option("--quiet", "-q", is_flag=True, expose_value=False, callback=_set_quiet, help="Short for -o name.")(verb)


def watched(verb: Verb) -> Verb:
    """--watch, and --interval, which means it."""
    watch = click.option(
        "--watch", "-w", is_flag=True, expose_value=False, callback=_set_watch,
        help="Look again and again: redraws a terminal, elsewhere prints what has changed. Ctrl-C ends it.",
    )  # fmt: skip
    return watch(interval_option(verb))


def interval_option(verb: Verb) -> Verb:
    return click.option(
        "--interval", type=seconds, metavar="S", expose_value=False, callback=_set_interval,
        help=f"How long between two looks: 5, 5s, 1m. [default: {INTERVAL_S:g}]",
    )(verb)  # fmt: skip


def asked_format(words: Sequence[str]) -> str:
    """The last --json or -o among words that may be too wrong for click to read them."""
    found = "table"
    for at, word in enumerate(words):
        if word == "--json":
            found = "json"
        elif word in ("-o", "--output"):
            found = words[at + 1] if at + 1 < len(words) else found
        elif word.startswith("--output="):
            found = word.partition("=")[2]
        elif word.startswith("-o") and word[2:] in FORMATS:
            found = word[2:]
    return found


def _set_target(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    call = ctx.ensure_object(Call)
    if value:
        try:
            call.target = parse(value)
        except ValueError as fault:
            raise click.BadParameter(str(fault)) from None


def _set_key(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    call = ctx.ensure_object(Call)
    if value and value.strip():
        if not re.fullmatch(r"[!-~]+", value.strip()):  # the value itself stays out of the message: it is a secret
            raise click.BadParameter("the key holds a space or a character that no key has: check what was copied")
        call.admin_key = value.strip()


def _set_output(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    call = ctx.ensure_object(Call)
    call.output = value or call.output


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    _set_output(ctx, param, "json" if value else None)


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    _set_output(ctx, param, "name" if value else None)


def _set_watch(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    call = ctx.ensure_object(Call)
    call.every = call.every or (INTERVAL_S if value else None)


def _set_interval(ctx: click.Context, param: click.Parameter, value: float | None) -> None:
    call = ctx.ensure_object(Call)
    call.every = value or call.every


def seconds(text: str) -> float:
    """90, 90s, 10m, 1h30m, 2d."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    days, hours, minutes, rest = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0, 0.0)
    total = days * 86400 + hours * 3600 + minutes * 60 + rest
    if not 0 < total <= 366 * 86400:
        raise click.BadParameter(f"{text!r} is not a duration up to 366 days: write it like 90s, 10m or 1h30m")
    return total


def weight(text: str) -> float:
    """A number above 0. JSON has no word for nan and inf, which float() reads."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise click.BadParameter(f"{text!r} is not a number above 0: write it like 2 or 0.5")
    return number


def priority(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,4}", text.strip()):
        raise click.BadParameter(f"{text!r} is not a whole number: write it like 2 or -1")
    return int(text)


DEFAULT = "default"


def or_default(kind: Callable[[str], Value]) -> Callable[[str], Value | str]:
    """`default`, which gives a bound back to the spec, or a value of this kind."""

    def convert(text: str) -> Value | str:
        return DEFAULT if text.strip().lower() == DEFAULT else kind(text)

    return convert


def variable(text: str) -> tuple[str, str]:
    """K=V; the value may hold more `=`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not K=V: write it like HF_HUB_OFFLINE=1")
    return key, value


def adapter(text: str) -> tuple[str, str]:
    """NAME=SOURCE."""
    name, equals, source = text.partition("=")
    if not equals or not name or not source:
        raise click.BadParameter(f"{text!r} is not NAME=SOURCE: write it like sql=/adapters/sql")
    return name, source


def gpu(text: str) -> int | str:
    """An index, a UUID, or `auto`."""
    return int(text) if re.fullmatch(r"[0-9]{1,4}", text.strip()) else text.strip()


def model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of NAME."""
    return beginning(ctx, incomplete, lambda client: [model.get("name") for model in client.models()["models"]])


def gpus_and_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of [GPU|MODEL]."""
    return [*gpu_indexes(ctx, param, incomplete), *model_names(ctx, param, incomplete)]


def gpu_indexes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return beginning(ctx, incomplete, lambda client: [gpu.get("index") for gpu in client.get("/status")["gpus"]])


def beginning(ctx: click.Context, incomplete: str, look: "Callable[[Client], Sequence[object]]") -> list[str]:
    """What `look` finds that begins so. Silent where no daemon answers: a shell must not hang or print at a TAB."""
    from orchestrator.cli.exits import CliError, DeadlinePassed

    call = ctx.find_object(Call) or Call()
    try:
        found = [str(each) for each in look(call.client(timeout_s=COMPLETION_S))]
    except (CliError, DeadlinePassed, LookupError, TypeError, AttributeError):
        return []
    return [each for each in found if each.startswith(incomplete)]


def name_argument(verb: Verb) -> Verb:
    return click.argument("name", shell_complete=model_names)(verb)


def names_argument(verb: Verb) -> Verb:
    return click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)(verb)


def timeout_option(verb: Verb) -> Verb:
    return click.option(
        "--timeout", type=seconds, metavar="S",
        help="Stop waiting after S (90, 90s, 10m) with exit code 124; the daemon goes on. "
        "[default: wait as long as it takes]",
    )(verb)  # fmt: skip


def no_wait_option(verb: Verb) -> Verb:
    return click.option("--no-wait", is_flag=True, help="Return as soon as the daemon has taken the order.")(verb)
