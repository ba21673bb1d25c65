"""What a person sees while a model starts or stops: a bar on a terminal, else one line per phase; always on stderr.

Bars of other work (pull.py, bench_screen.py) are made of the same parts. rich is imported only for the bar (60 ms). A reason that blocks
the start (no memory yet) is printed whole, once.
"""

from typing import TYPE_CHECKING, Protocol, Self

from orchestrator.cli import screen
from orchestrator.cli.describe import bare, phase_text
from orchestrator.cli.exits import Json
from orchestrator.cli.tables import duration

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TextColumn


class Display(Protocol):
    def show(self, model: Json) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def display() -> Display:
    return Bar() if screen.live() else Lines()


def step(model: Json) -> str:
    """What the model is at: `starting: loading weights (2/5)`, `waiting: needs 12.1GiB, 3.0GiB are free`."""
    state, engine = str(model.get("state")), model.get("engine") or {}
    phase = phase_text(engine) if state == "starting" else ""
    detail = phase or bare(model.get("reason") or "")
    return f"{state}: {detail}" if detail else state


class Still:
    """A display that holds nothing of the terminal."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Moving:
    """A display that draws its bar from its begin to its end."""

    def __init__(self, bar: "Progress") -> None:
        self._bar = bar

    def say(self, text: str) -> None:
        """A line above the bar, which stays."""
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def bar(*columns: "str | ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    # transient: the verb's last line says what came of it, a full bar above it says nothing more.
    return Progress(*columns, console=Console(stderr=True), transient=True)


def description() -> "TextColumn":
    """What it is at, in one line however narrow the terminal is."""
    from rich.progress import TextColumn
    from rich.table import Column

    return TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))


class Lines(Still):
    """One line per phase: for logs of a script."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, model: Json) -> None:
        line = f"{model.get('name')}: {step(model)}"
        if line != self._last:
            screen.err(line)
        self._last = line


class Bar(Moving):
    """A bar that fills by phases, with the time so far and the time that starts of this model take."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

        expected = TextColumn("{task.fields[expected]}", markup=False)
        super().__init__(bar(SpinnerColumn(), description(), BarColumn(bar_width=24), TimeElapsedColumn(), expected))
        self._task = self._bar.add_task("", total=None, expected="")
        self._reason = ""

    def show(self, model: Json) -> None:
        engine = model.get("engine") or {}
        count = engine.get("phase_count") or 0
        filling = model.get("state") == "starting" and count > 0
        if model.get("state") in ("waiting", "asleep"):
            self._explain(step(model))
        expected = engine.get("expected_start_s")
        self._bar.update(
            self._task,
            description=f"{model.get('name')}: {step(model) if filling else model.get('state')}",
            total=count if filling else None,
            completed=min(engine.get("phase_index") or 0, count) if filling else 0,
            expected=f"of about {duration(expected)}" if filling and expected else "",
        )

    def _explain(self, reason: str) -> None:
        if reason != self._reason:
            self.say(reason)
        self._reason = reason
