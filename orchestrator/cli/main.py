"""orchestratorctl: the group of verbs, and the one place where an error becomes text, JSON and an exit code.

Verbs raise; nothing below this file prints an error or exits with a code of its own.
"""

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TextIO

import click

from orchestrator import __version__
from orchestrator.cli import completion, options, screen
from orchestrator.cli.exits import (
    FAILED,
    INTERRUPTED,
    MEANINGS,
    OK,
    PIPE_CLOSED,
    TIMED_OUT,
    USAGE,
    CliError,
    DeadlinePassed,
    Json,
)

COMPLETE = completion.VARIABLE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of whatever stdout is


# Each verb and where it is, in the order of a model's life.
PLACES = {
    "add-model": "change.add_model",
    "rm": "change.rm",
    "start": "change.start",
    "stop": "change.stop",
    "pull": "pull.pull",
    "load": "residency.load",
    "unload": "residency.unload",
    "sleep": "residency.sleep",
    "wake": "residency.wake",
    "drain": "residency.drain",
    "pin": "residency.pin",
    "unpin": "residency.unpin",
    "plan": "plan.plan",
    "limit": "limit.limit",
    "apply": "desired.apply",
    "diff": "desired.diff",
    "export": "desired.export",
    "adapt": "adapt.adapt",
    "ls": "look.ls",
    "ps": "look.ps",
    "describe": "look.describe",
    "explain": "look.explain",
    "logs": "logs.logs",
    "status": "look.status",
    "top": "top.top",
    "wait": "until.until",
    "events": "events.events",
    "doctor": "doctor.doctor",
    "bench": "bench.bench",
    "keys": "keys.keys",
    "reload": "service.reload",
    "restart-daemon": "service.restart_daemon",
    "completion": "completion.completion",
}


class OnDemand(MutableMapping[str, click.Command]):
    """The verbs by name. Only the one that is called is imported: all of them would cost each start 40 ms."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places: dict[str, str | click.Command] = dict(places)

    def __getitem__(self, name: str) -> click.Command:
        found = self._places[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(".")
            found = getattr(importlib.import_module(f"orchestrator.cli.{module}"), attribute)
            assert isinstance(found, click.Command)
            self._places[name] = found
        return found

    def __setitem__(self, name: str, verb: click.Command) -> None:
        self._places[name] = verb

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Verbs(click.Group):
    """The group. Its `main` is click's, with our exit codes."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.commands: MutableMapping[str, click.Command] = OnDemand(PLACES)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in their own order, not the alphabet's

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences, wrapped where they are long: click would cut them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in self.commands.items() if not verb.hidden])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = COMPLETE,
        standalone_mode: bool = True,
        **more: Any,
    ) -> Any:
        if COMPLETE in os.environ:  # a shell asks for completions
            return super().main(args, prog_name, complete_var=complete_var)
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = self._run(words, prog_name or "orchestratorctl")
            sys.stdout.flush()
        except KeyboardInterrupt:  # a second Ctrl-C, while the first is being reported
            code = INTERRUPTED
        except BrokenPipeError:
            _drop_output()
            code = PIPE_CLOSED
        except OSError as fault:
            if fault.errno not in FULL:
                raise
            _drop_output()
            code = _report(CliError(f"the output can not be written: {fault.strerror}", FAILED, code="not_written"), "table")
        sys.exit(code)

    def _run(self, words: list[str], prog_name: str) -> int:
        form = options.asked_format(_before_dashes(words))
        call = options.Call()
        try:
            with self.make_context(prog_name, words, obj=call) as ctx:
                try:
                    self.invoke(ctx)
                except (LookupError, TypeError, AttributeError, ValueError) as fault:
                    if told := call.misread(fault):
                        raise told from fault
                    raise
            return OK
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.UsageError as fault:
            fault.show()
            param = getattr(fault.param, "name", None) if isinstance(fault, click.BadParameter) else None
            _as_data({"message": fault.format_message(), "type": "usage_error", "param": param, "code": "usage"}, form)
            return USAGE
        except CliError as fault:
            return _report(fault, form)
        except DeadlinePassed:
            return _report(CliError("--timeout passed", TIMED_OUT, code="timeout"), form)
        except KeyboardInterrupt:
            return _report(CliError("interrupted", INTERRUPTED, code="interrupted"), form)


def _report(fault: CliError, form: str) -> int:
    mark = "" if fault.exit_code == INTERRUPTED else click.style("error: ", fg="red")
    if fault.exit_code == INTERRUPTED and screen.live():
        screen.err("")  # the terminal has just written ^C
    screen.err("\n".join([mark + fault.message, *fault.lines]))
    _as_data(fault.body, form)
    return fault.exit_code


def _as_data(error: Json, form: str) -> None:
    if form in ("json", "yaml"):
        (screen.out_json if form == "json" else screen.out_yaml)({"error": error})


def _before_dashes(words: list[str]) -> list[str]:
    return words[: words.index("--")] if "--" in words else words


def _drop_output() -> None:
    """The reader is gone (`| head`): what is still buffered would raise again as the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


def _nowhere(number: int) -> TextIO:
    """A stream that was closed by who called us (`>&-`): nobody wants it, and its number must not become a socket's."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return open(number, "w", closefd=False)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        screen.out(f"orchestratorctl {__version__}")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items()),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@options.shared_by_group
def cli() -> None:
    """Add, watch and remove the models that share this machine's GPUs.

    Talks to the daemon's admin API over its unix socket, or to --host. Data goes to stdout; progress and errors go to
    stderr. --host, --admin-key, -o and --json may stand before or after the verb.

    \b
    Examples:
      orchestratorctl add-model qwen Qwen/Qwen2.5-7B-Instruct
      orchestratorctl top
      orchestratorctl completion --help       # TAB completes verbs and model names
    """


def main() -> None:
    sys.stdout, sys.stderr = sys.stdout or _nowhere(1), sys.stderr or _nowhere(2)
    for stream in (sys.stdout, sys.stderr):
        # A log line that the terminal's encoding lacks is shown escaped rather than as a traceback.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    cli.main(prog_name="orchestratorctl")
