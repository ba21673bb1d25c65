"""What goes to the terminal: data to stdout, all else to stderr, colour only to a terminal that wants it.

NO_COLOR (https://no-color.org) and TERM=dumb switch colour off; nothing switches it on in a pipe: click
strips it there, also from an engine's log lines.
"""

import json
import os
import sys

import click


def out(text: str, *, newline: bool = True) -> None:
    click.echo(text, nl=newline, color=_colour())


def err(text: str) -> None:
    click.echo(text, err=True, color=_colour())


def out_json(value: object) -> None:
    # ASCII escapes: valid JSON under every locale of the reader.
    out(json.dumps(value, indent=2))


def out_json_line(value: object) -> None:
    out(json.dumps(value))


def out_yaml(value: object) -> None:
    import yaml  # 20 ms

    # The one in C is ten times faster: 200 models are 300 KiB.
    out(yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False), newline=False)


def live() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def redraws() -> bool:
    """Whether stdout is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", None)


def width() -> int | None:
    """Columns of the terminal that shows stdout; None for a pipe or a file, where nothing may be cut."""
    return _size("COLUMNS", 0)


def height() -> int | None:
    """Lines of it; None alike."""
    return _size("LINES", 1)


def can_show(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plain(text: str) -> str:
    """Without its colours where they are switched off."""
    return click.unstyle(text) if _colour() is False else text


def _size(variable: str, at: int) -> int | None:
    if not sys.stdout.isatty():
        return None
    try:
        return int(os.environ.get(variable) or os.get_terminal_size(sys.stdout.fileno())[at]) or None
    except (OSError, ValueError):
        return None


def _colour() -> bool | None:
    off = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return False if off else None  # None: click looks whether the stream is a terminal
