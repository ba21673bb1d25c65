"""--watch: the same look again and again. A terminal is redrawn in one write a frame, elsewhere each change is printed once.

A daemon that goes away meanwhile is waited for, and that is said; only the first look may fail for it. Whatever happens, the terminal is
given back as it was.
"""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click

from orchestrator.cli import cells, screen
from orchestrator.cli.exits import INTERRUPTED, CliError, Json
from orchestrator.cli.options import Call

if TYPE_CHECKING:
    from orchestrator.cli.client import Client


class Shown(NamedTuple):
    """What a look found: the API's object, its page (drawn when it is needed), the names in it."""

    data: Json
    page: Callable[[], str]
    names: Sequence[str]


Look = Callable[["Client"], Shown]

# What is never twice the same: passing time, and what the daemon's own work costs.
CLOCKS = frozenset(
    ("since_s", "idle_s", "up_s", "uptime_s", "age_s", "retry_in_s", "ticks", "last_ms", "rss_bytes", "pss_bytes", "threads")
)
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the alternate screen, without a cursor; and back
HOME, TO_END_OF_LINE, TO_END = "\x1b[H", "\x1b[K", "\x1b[J"


def show(call: Call, look: Look) -> Shown:
    """One look, or with --watch one after another until Ctrl-C (exit code 130)."""
    client = call.client()
    if call.every is None:
        shown = look(client)
        call.show(*shown)
        return shown
    if call.for_people and screen.redraws():
        redraw(client, look, call.every)
    print_changes(call, client, look, call.every)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None


def redraw(client: "Client", look: Look, every: float, titled: bool = True) -> NoReturn:
    """Frames on the alternate screen, until Ctrl-C, or q (exit code 0). `titled`: a line above says what this is."""
    with _interruptible(), _terminal() as pressed:
        page: Callable[[], str] = str
        for shown, trouble in looks(client, look):
            page = shown.page if shown else page
            _draw(page(), trouble, every if titled else None)
            if pressed(every):
                break
    raise click.exceptions.Exit(0)


def print_changes(call: Call, client: "Client", look: Look, every: float) -> NoReturn:
    """A block for each change; an object a line under -o json, a document each under -o yaml."""
    last: object = None
    away = False
    with _interruptible():
        for shown, trouble in looks(client, look):
            if bool(trouble) != away:
                screen.err(trouble or "the daemon is back")
                away = not away
            if shown and (still := without_clocks(shown.data)) != last:
                _print(call, shown, first=last is None)
                last = still
            time.sleep(every)
    raise AssertionError("looks() ends only by an error")


def _print(call: Call, shown: Shown, first: bool) -> None:
    if not first and call.output not in ("json", "yaml"):
        screen.out("")
    call.show_next(*shown)
    sys.stdout.flush()


def looks(client: "Client", look: Look) -> Iterator[tuple[Shown | None, str]]:
    """What each look found; None, and why, where the daemon does not answer. Where the first does not, its error is raised."""
    seen = False
    while True:
        try:
            shown, trouble = look(client), ""
        except CliError as fault:
            if not seen or not fault.is_away:
                raise
            shown, trouble = None, f"waiting for the daemon: {fault.message}"
        seen = True
        yield shown, trouble


def without_clocks(value: object) -> object:
    """What makes a change worth telling."""
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if key not in CLOCKS}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


def _draw(page: str, trouble: str, every: float | None) -> None:
    wide, high = screen.width() or 80, screen.height() or 24
    lines = page.split("\n")
    if every is not None:
        words = " ".join(["orchestratorctl", *map(shlex.quote, sys.argv[1:])])
        title = cells.head(f"{time.strftime('%H:%M:%S')}  every {every:g}s, q ends  {words}", wide)
        lines = [click.style(title, dim=True), "", *lines]
    if trouble:
        lines = [click.style(cells.head(trouble, wide), fg="red"), *lines[1:]]
    if len(lines) > high:
        lines = [
            *lines[: high - 1],
            click.style(cells.head(f"{len(lines) - high + 1} more lines: a higher terminal shows them", wide), dim=True),
        ]
    shown = (TO_END_OF_LINE + "\n").join(screen.plain(cells.head(line, wide)) for line in lines)
    sys.stdout.write(HOME + shown + TO_END_OF_LINE + TO_END)
    sys.stdout.flush()


@contextlib.contextmanager
def _terminal() -> Iterator[Callable[[float], bool]]:
    """The alternate screen, and a wait of so many seconds that says whether q was pressed. SIGTERM leaves in order, too."""
    import signal

    def leave(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with _keys() as pressed:
            sys.stdout.write(ENTER)
            try:
                yield pressed
            finally:
                sys.stdout.write(LEAVE)
                sys.stdout.flush()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Keys as they are pressed, not shown; where stdin is no terminal, none."""
    if not sys.stdin.isatty():
        yield _never
        return
    import select
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def pressed(wait_s: float) -> bool:
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0:
            if select.select([stdin], [], [], left)[0]:
                key = os.read(stdin, 64)
                if not key or b"q" in key.lower():
                    return True
        return False

    try:
        tty.setcbreak(stdin)
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _never(wait_s: float) -> bool:
    time.sleep(wait_s)
    return False
