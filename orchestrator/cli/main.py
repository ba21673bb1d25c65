"""orchestratorctl: the group of verbs, and the one place where an error becomes text, JSON and an exit code.

Verbs raise; nothing below this file prints an error or exits with a code of its own.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from orchestrator import __version__
from orchestrator.cli import adapt, change, doctor, keys, limit, look, options, plan, residency, screen, service
from orchestrator.cli.exits import (
    INTERRUPTED,
    MEANINGS,
    OK,
    PIPE_CLOSED,
    TIMED_OUT,
    USAGE,
    CliError,
    DeadlinePassed,
)

COMPLETE = "_ORCHESTRATORCTL_COMPLETE"


class Verbs(click.Group):
    """The group. Its `main` is click's, with our exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as registered: in the order of a model's life, not of the alphabet

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
        sys.exit(code)

    def _run(self, words: list[str], prog_name: str) -> int:
        as_json = "--json" in _before_dashes(words)  # also where the words are too wrong for click to read them
        try:
            with self.make_context(prog_name, words) as ctx:
                self.invoke(ctx)
            return OK
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.UsageError as fault:
            fault.show()
            param = getattr(fault.param, "name", None) if isinstance(fault, click.BadParameter) else None
            if as_json:
                error = {"message": fault.format_message(), "type": "usage_error", "param": param, "code": "usage"}
                screen.out_json({"error": error})
            return USAGE
        except CliError as fault:
            return _report(fault, as_json)
        except DeadlinePassed:
            return _report(CliError("--timeout passed", TIMED_OUT, code="timeout"), as_json)
        except KeyboardInterrupt:
            return _report(CliError("interrupted", INTERRUPTED, code="interrupted"), as_json)


def _report(fault: CliError, as_json: bool) -> int:
    mark = "" if fault.exit_code == INTERRUPTED else click.style("error: ", fg="red")
    if fault.exit_code == INTERRUPTED and screen.live():
        screen.err("")  # the terminal has just written ^C
    screen.err("\n".join([mark + fault.message, *fault.lines]))
    if as_json:
        screen.out_json({"error": fault.body})
    return fault.exit_code


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
    stderr. --host, --admin-key and --json may stand before or after the verb.

    \b
    Examples:
      orchestratorctl add-model qwen Qwen/Qwen2.5-7B-Instruct
      orchestratorctl ls
      eval "$(_ORCHESTRATORCTL_COMPLETE=bash_source orchestratorctl)"    # completion; zsh_source, fish_source
    """


for verb in (
    change.add_model,
    change.rm,
    change.start,
    change.stop,
    residency.load,
    residency.unload,
    residency.sleep,
    residency.wake,
    residency.drain,
    residency.pin,
    residency.unpin,
    plan.plan,
    limit.limit,
    adapt.adapt,
    look.ls,
    look.ps,
    look.describe,
    look.explain,
    look.logs,
    look.status,
    doctor.doctor,
    keys.keys,
    service.reload,
    service.restart_daemon,
):
    cli.add_command(verb)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A log line that the terminal's encoding lacks is shown escaped rather than as a traceback.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    cli.main(prog_name="orchestratorctl")
