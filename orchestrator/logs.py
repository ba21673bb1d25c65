"""The daemon's log: one line per real change. Text for people, JSON for a journal; one handler, set up once.

What a client can cause a line of, it can cause a million lines of: of such, a few a minute are written and the rest is counted.
"""

import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Whose lines a client can cause: one for each thing that it says which is not HTTP, and for each fault of ours that it finds.
CLIENTS = ("uvicorn.error", "websockets", "asyncio", "orchestrator.proxy", "orchestrator.realtime")
MOST = 20  # of one kind a minute
MOST_KINDS = 100
MINUTE_S = 60.0


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"at": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


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


def set_up(level: str, style: str, access: bool) -> None:
    """`style`: auto, text or json; auto is text on a terminal."""
    text = style == "text" or (style == "auto" and sys.stderr.isatty())
    if os.environ.get("JOURNAL_STREAM") and style == "auto":
        text = True  # journald adds its own fields to the line
    formatter: dict[str, Any] = {"format": "%(asctime)s %(levelname)-7s %(message)s"} if text else {"()": JsonFormatter}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": formatter},
            "filters": {"no_cuts": {"()": _NotACut}, "few": {"()": lambda: FEW}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["no_cuts", "few"]}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            "loggers": {
                "uvicorn": {"level": "WARNING"},
                "uvicorn.access": {"level": "INFO" if access else "CRITICAL"},
                "httpx2": {"level": "WARNING"},
                "httpcore2": {"level": "WARNING"},
                "asyncio": {"level": "WARNING"},
            },
        }
    )
