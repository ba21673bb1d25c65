"""One experiment from the first word to the last, alike for all: said, asked, measured, models as they were, results written.

SIGTERM and SIGHUP are Ctrl-C here: the one way to end. Whatever ends it, what was measured until then is kept, marked as incomplete.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli import options, screen, tables
from orchestrator.cli.bench_kinds import Bursts, Mix
from orchestrator.cli.exits import FAILED, INTERRUPTED, CliError, DeadlinePassed, Json, hint

if TYPE_CHECKING:
    from orchestrator.experiments.house import House

Value = TypeVar("Value")
PLOTS = "for pictures: pip install 'gpu-orchestrator[bench]' (matplotlib)"


class Run:
    """`given`: the options that all kinds have."""

    def __init__(self, call: options.Call, given: Mapping[str, Any]) -> None:
        self._call, self._given = call, given

    def run(self, kind: Bursts | Mix) -> None:
        from orchestrator.experiments import report

        with _one_way_to_end():
            house = self._house(kind.names)
            lines, seconds = _heeded(lambda: kind.before(house))
            out: Path = self._given["out"] or Path(f"orchestratorctl-bench-{kind.kind}-{time.strftime('%Y%m%d-%H%M%S')}")
            self._announce(house, lines, seconds, out)
            with _written():
                out.mkdir(parents=True, exist_ok=True)
            result = report.head(kind.kind, f"orchestratorctl {shlex.join(sys.argv[1:])}", house, vars(kind.plan))
            fault = self._measured(kind, house, out)
            result |= {
                "complete": fault is None,
                "why": None if fault is None else _why(fault),
                "notes": kind.record.notes,
                **kind.result(),
            }
            with _written():
                report.write_samples(kind.record.samples, kind.record.arms, out)
                report.write_result(result, out)
            self._show(kind, result, out)
        if fault is not None:
            raise _error(fault, out)

    def _house(self, names: Sequence[str]) -> "House":
        from orchestrator.experiments.house import House

        python = self._given.get("engine_python")
        where = Path(os.path.abspath(os.path.expanduser(python))) if python else None
        client = self._call.client()
        return _heeded(lambda: House(client, names, self._given["api_key"], where, self._given["foreign_tolerance"]))

    def _announce(self, house: "House", lines: Sequence[str], seconds: float, out: Path) -> None:
        from orchestrator.experiments import beforehand
        from orchestrator.experiments.report import SIMULATED

        if house.simulated:
            screen.err(click.style(SIMULATED, fg="yellow", bold=True))
        for gpu in house.gpus:
            used = house.readings[gpu["uuid"]].used_bytes
            screen.err(f"GPU {gpu['index']}: {gpu['name']}, {tables.size(used)} of {tables.size(gpu['total_bytes'])} in use now")
        for number, line in enumerate([*lines, "models go back to where they were"], 1):
            screen.err(f"  {number}. {line}")
        screen.err(f"about {tables.duration(seconds)}; results in {out}")
        if room := beforehand.makes_room(house):
            screen.err(f"loading them makes room: {', '.join(room)}; loaded again afterwards")
        if others := beforehand.others(house):
            screen.err(f"on the same GPU, left alone, and in the figures where they move: {', '.join(others)}")
        for line in beforehand.busy(house):
            screen.err(f"{line}: they are in the figures, too")
        asks = not self._given["yes"] and sys.stdin.isatty() and sys.stderr.isatty()
        if asks and not click.confirm("Go on?", default=True, err=True):
            raise CliError("nothing was changed", INTERRUPTED, code="interrupted")

    def _measured(self, kind: Bursts | Mix, house: "House", out: Path) -> BaseException | None:
        """What ended it before its end, if anything did. Models are where they were, as far as the daemon still answers."""
        from orchestrator.cli.bench_screen import progress

        fault: BaseException | None = None
        try:
            with house, house.watch() as watch, progress() as shown:
                kind.record.samples = watch.samples
                try:
                    kind.measure(house, watch, out, shown)
                except (Exception, KeyboardInterrupt) as stopped:  # a fault of ours, too: models must not stay where they are
                    fault = stopped
                    shown.say("stopping: what was started is ended, models go back to where they were; Ctrl-C again leaves them")
                house.restore(shown.say)
        except (CliError, DeadlinePassed, KeyboardInterrupt) as stopped:
            fault = fault or stopped
            screen.err(f"models were not brought back to where they were: {hint('ls')} shows where they are")
        return fault

    def _show(self, kind: Bursts | Mix, result: Json, out: Path) -> None:
        from orchestrator.experiments import report

        if not self._given["no_plots"]:
            try:
                kind.pictures(result, out)
            except ImportError:
                screen.err(PLOTS)

        def page() -> str:
            lines = [click.style(report.SIMULATED, fg="yellow", bold=True)] if result["simulated"] else []
            lines += [] if result["complete"] else [click.style(f"INCOMPLETE: {result['why']}", fg="red")]
            return "\n".join([*lines, *kind.page(result), *(f"note: {note}" for note in result["notes"]), f"results: {out}"])

        self._call.show(result, page, [str(out)])


def _heeded(work: Callable[[], Value]) -> Value:
    """What is wrong before anything was changed, as an error of this command."""
    from orchestrator.experiments.trouble import Trouble

    try:
        return work()
    except Trouble as trouble:
        raise CliError(trouble.message, FAILED, code="bench_refused", lines=[f"  {line}" for line in trouble.lines]) from None


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CliError(f"the results can not be written: {error}: name another folder with --out", FAILED, code="not_written") from None


def _why(fault: BaseException) -> str:
    return "interrupted" if isinstance(fault, KeyboardInterrupt) else str(getattr(fault, "message", fault)) or type(fault).__name__


def _error(fault: BaseException, out: Path) -> BaseException:
    from orchestrator.experiments.trouble import Trouble

    kept = f"what was measured until then, marked as incomplete: {out}"
    if isinstance(fault, KeyboardInterrupt):
        return CliError(f"interrupted; {kept}", INTERRUPTED, code="interrupted")
    if isinstance(fault, CliError):
        return CliError(fault.message, fault.exit_code, code=str(fault.body["code"]), lines=[*fault.lines, kept], body=fault.body)
    if isinstance(fault, Trouble):
        return CliError(fault.message, FAILED, code="bench_failed", lines=[*(f"  {line}" for line in fault.lines), kept])
    return CliError(str(fault), FAILED, code="bench_failed", lines=[kept]) if isinstance(fault, OSError) else fault


@contextmanager
def _one_way_to_end() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, end it as Ctrl-C does."""
    old = {number: signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT)) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
