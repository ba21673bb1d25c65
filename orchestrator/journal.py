"""journald's own protocol: a datagram with the fields of a line, so that `journalctl ORCHESTRATOR_MODEL=qwen` finds what it is asked for.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL: `NAME=value` a line; a value of several lines by its length. Where the journal takes nothing
(it is full, or away), the line goes where it would go without it.
"""

import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
MOST = 64 * 1024  # bytes of a value: one datagram holds 200 KiB
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # syslog(3)


def reads_stderr() -> bool:
    """Whether stderr goes to the journal: JOURNAL_STREAM names its device and inode, and may be inherited from somebody whose did."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


class JournalHandler(logging.Handler):
    """`otherwise` gets what the journal does not take."""

    def __init__(self, otherwise: logging.Handler, path: Path = SOCKET) -> None:
        super().__init__()
        self._path, self._otherwise = path, otherwise
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = b"".join(_field(name, value) for name, value in fields(record, self.format(record)))
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.sendto(data, socket.MSG_DONTWAIT, str(self._path))  # a journal that hangs holds nobody up
        except OSError:
            self._otherwise.handle(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        super().close()


def fields(record: logging.LogRecord, message: str) -> Iterator[tuple[str, object]]:
    yield "MESSAGE", message
    yield "PRIORITY", next((number for level, number in PRIORITIES if record.levelno >= level), 7)
    yield "SYSLOG_IDENTIFIER", "orchestratord"
    yield "CODE_FILE", record.pathname
    yield "CODE_LINE", record.lineno
    yield "CODE_FUNC", record.funcName
    yield "LOGGER", record.name
    for name, value in getattr(record, "told", {}).items():
        yield f"ORCHESTRATOR_{name.upper()}", value


def _field(name: str, value: object) -> bytes:
    data = str(value).encode(errors="replace")[:MOST]
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return b"%b=%b\n" % (name.encode(), data)
