"""What a person sees while a model starts or stops: a bar on a terminal, else one line per phase; always on stderr.

rich is imported only for the bar (60 ms). A reason that blocks the start (no memory yet) is printed whole, once.
"""

from typing import TYPE_CHECKING, Protocol, Self

from orchestrator.cli import screen
from orchestrator.cli.describe import bare, phase_text
from orchestrator.cli.exits import Json
from orchestrator.cli.tables import duration

if TYPE_CHECKING:
    from rich.progress import Progress


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


class Lines:
    """One line per phase: for logs of a script."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, model: Json) -> None:
        line = f"{model.get('name')}: {step(model)}"
        if line != self._last:
            screen.err(line)
        self._last = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Bar:
    """A bar that fills by phases, with the time so far and the time that starts of this model take."""

    def __init__(self) -> None:
        self._bar = _rich_bar()
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
            self._bar.console.print(reason, markup=False, highlight=False)
        self._reason = reason

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _rich_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    # transient: the verb's last line says what came of it, a full bar above it says nothing more.
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[expected]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
