"""The daemon's log: one line per real change. Text for people, JSON for a journal; one handler, set up once."""

import json
import logging
import logging.config
import os
import sys
from typing import Any


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
            "filters": {"no_cuts": {"()": _NotACut}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["no_cuts"]}},
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
