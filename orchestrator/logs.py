"""The daemon's log: one line per real change. Coloured for a terminal, fields for the journal, JSON elsewhere; one handler, set up once.

What a client can cause a line of, it can cause a million lines of: of such, a few a minute are written and the rest is counted.
"""

import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from orchestrator import journal

# Whose lines a client can cause: one for each thing that it says which is not HTTP, and for each fault of ours that it finds.
CLIENTS = ("uvicorn.error", "websockets", "asyncio", "orchestrator.proxy", "orchestrator.realtime")
MOST = 20  # of one kind a minute
MOST_KINDS = 100
MINUTE_S = 60.0
TEXT = "%(asctime)s %(levelname)-7s %(message)s"


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"at": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "told", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Coloured(logging.Formatter):
    """For eyes on a terminal: the time of day, and a level only where something is wrong."""

    COLOURS: ClassVar = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31;1"}

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if colour := self.COLOURS.get(record.levelno):
            time_of_day, _, rest = text.partition(" ")
            level = "" if record.levelno == logging.DEBUG else f"{record.levelname.lower()}: "
            return f"{time_of_day} \x1b[{colour}m{level}{rest}\x1b[0m"
        return text


class _NotACut(logging.Filter):
    """uvicorn complains when an ASGI app ends a response without finishing it; the proxy does so on purpose (an engine died)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returned without completing response" not in record.getMessage()


class Few(logging.Filter):
    """At most MOST lines of a kind a minute of those that clients cause; the first of a later minute tells how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._since = clock, clock()
        self._seen: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(CLIENTS):
            return True
        if self._clock() - self._since >= MINUTE_S:
            self._since, self._seen, self._left_out = self._clock(), {}, {k: n - MOST for k, n in self._seen.items() if n > MOST}
        kind = f"{record.name} {str(record.msg)[:100]}"
        if kind not in self._seen and len(self._seen) >= MOST_KINDS:
            kind = "others"
        count = self._seen[kind] = self._seen.get(kind, 0) + 1
        if before := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} ({before} more of these were left out)"
        if count == MOST:
            record.msg = f"{record.msg} (more of these are counted, and left out for up to a minute)"
        return count <= MOST


FEW = Few()


def _to_journal() -> logging.Handler:
    otherwise = logging.StreamHandler()
    otherwise.setFormatter(logging.Formatter(TEXT))
    return journal.JournalHandler(otherwise)


def set_up(level: str, style: str, access: bool) -> None:
    """`style`: auto, text, json or journald; auto: for people on a terminal, fields for the journal where stderr goes there, else json."""
    if style == "auto":
        style = "journald" if journal.reads_stderr() else "terminal" if sys.stderr.isatty() else "json"
    if style == "terminal" and (os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"):
        style = "text"
    formatters: dict[str, Any] = {
        "text": {"format": TEXT},
        "journald": {"format": "%(message)s"},
        "terminal": {"()": Coloured},
        "json": {"()": JsonFormatter},
    }
    handler: dict[str, Any] = {"()": _to_journal} if style == "journald" else {"class": "logging.StreamHandler"}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": formatters,
            "filters": {"no_cuts": {"()": _NotACut}, "few": {"()": lambda: FEW}},
            "handlers": {"all": {**handler, "formatter": style, "filters": ["no_cuts", "few"]}},
            "root": {"level": level.upper(), "handlers": ["all"]},
            "loggers": {
                "uvicorn": {"level": "WARNING"},
                "uvicorn.access": {"level": "CRITICAL"},  # ours is api/access.py
                "orchestrator.access": {"level": "INFO" if access else "CRITICAL"},
                "httpx2": {"level": "WARNING"},
                "httpcore2": {"level": "WARNING"},
                "asyncio": {"level": "WARNING"},
            },
        }
    )
