"""What can be told to somebody whose request, command or configuration is wrong, read from the source: docs/errors.md has all of it."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "orchestrator"
NO_API = ("cli", "engine", "experiments")  # a client of it; another program; clients again
PULL = PACKAGE / "engine/pull.py"  # runs in an engine's venv; what it says is passed on
SPOKEN = ("ValueError", "Problem", "StartupError", "append")
SOURCES = "drivers/sources.py"  # returns what is wrong
OF_CONFIG = (
    "config_errors.py", "marked_yaml.py", "settings.py", "policy/model.py", "policy/units.py", "control/registry.py", "control/shelf.py",
    "daemon.py", "ending.py", "drivers/sockets.py", SOURCES,
)  # fmt: skip


def of_the_api() -> set[str]:
    """Each code that an answer of the daemon can have."""
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in NO_API]
    return {code for path in (*files, PULL) for code in _codes(ast.parse(path.read_text()))}


def of_the_cli() -> set[str]:
    """Each code that orchestratorctl says of its own under --json; … where a word is put in."""
    return {code for path in (PACKAGE / "cli").rglob("*.py") for code in _codes(ast.parse(path.read_text()))} | {"usage"}


def _codes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            given += node.args[:1] if _name(node.func) == "Failed" else []
        elif isinstance(node, ast.Assign):
            given = [value for target, value in _assigned(node.targets[0], node.value) if _name(target) == "code"]
        else:
            continue
        yield from (told for value in given if (told := text(value)) and told != "…")


def _assigned(target: ast.expr, value: ast.expr) -> Iterable[tuple[ast.expr, ast.expr]]:
    several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    return zip(target.elts, value.elts, strict=True) if several else [(target, value)]  # type: ignore[attr-defined]


def of_configuration() -> set[str]:
    """What may be said of config files, environment, specs and this machine, before a model or the daemon starts."""
    found = set()
    for file in OF_CONFIG:
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.Call) and _name(node.func) in SPOKEN and node.args and file != SOURCES:
                found.add(text(node.args[-1]) or "")
            elif isinstance(node, ast.Return) and node.value is not None and file == SOURCES:
                found.add(text(node.value) or "")
    return {_landmark(told) for told in found if " " in _landmark(told)}


def _name(node: ast.expr) -> str:
    """`code` of `code` and of `error.code`."""
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def text(node: ast.expr) -> str | None:
    """What a literal says, … for what is put in; None for what is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def _landmark(told: str) -> str:
    """The longest part of it that always is the same."""
    return max(told.split("…"), key=len).strip(" :;,.()'")
