"""How far an experiment is: a bar on a terminal, else one line a step; always on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.cli import screen
from orchestrator.cli.describe import bare
from orchestrator.cli.progress import bar
from orchestrator.experiments.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


@contextmanager
def progress() -> Iterator[Progress]:
    if not screen.live():
        yield Lines()
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    with bar(SpinnerColumn(), text, BarColumn(bar_width=24), TimeElapsedColumn()) as drawn:
        yield OnTerminal(drawn)


class Lines(Progress):
    """What a script's log gets: a line for each tenth at most."""

    def __init__(self) -> None:
        self._last, self._tenth = "", -1

    def say(self, text: str) -> None:
        if text != self._last:
            screen.err(bare(text))
        self._last = text

    def step(self, done: int, of: int, what: str) -> None:
        tenth = 10 * done // of if of else 10
        if tenth != self._tenth:
            screen.err(f"[{done}/{of}] {bare(what)}")
        self._tenth = tenth


class OnTerminal(Progress):
    def __init__(self, bar: "Bar") -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=bare(text))
        self._bar.console.print(bare(text), markup=False, highlight=False)

    def step(self, done: int, of: int, what: str) -> None:
        self._bar.update(self._task, description=bare(what), total=of, completed=done)
