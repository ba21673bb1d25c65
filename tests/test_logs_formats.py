"""The daemon's log as a terminal, the journal and programs get it: real sockets, a real terminal, and the way back where one is gone."""

import json
import logging
import os
import pty
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.journal import JournalHandler

PROGRAM = """
import logging, sys
from orchestrator import journal, logs
journal.SOCKET = __import__("pathlib").Path(sys.argv[1])
journal.JournalHandler.__init__.__defaults__ = (journal.SOCKET,)
logs.set_up("info", sys.argv[2], sys.argv[3] == "access")
log = logging.getLogger("orchestrator")
log.info("a: ready: started", extra={"told": {"model": "a", "kind": "ready"}})
log.warning("two\\nlines")
logging.getLogger("orchestrator.access").info("a request")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
"""


@pytest.fixture
def journald() -> Iterator[tuple[socket.socket, Path]]:
    with tempfile.TemporaryDirectory(prefix="o-") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(f"{folder}/socket")
        found.settimeout(20)
        yield found, Path(folder) / "socket"


def read(data: bytes) -> dict[str, str]:
    """As systemd-journald takes a datagram apart."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, data = rest[8 : 8 + size], rest[8 + size :]
            assert data[:1] == b"\n"
            data = data[1:]
        else:
            data = rest
        found[name.decode()] = value.decode()
    return found


def run(path: Path, style: str, access: str = "", journal: bool = False) -> "subprocess.CompletedProcess[str]":
    """`journal`: JOURNAL_STREAM names stderr, as systemd has it."""
    ours, theirs = os.pipe()
    stat = os.fstat(theirs)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    env |= {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"} if journal else {}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), style, access], env=env, stderr=theirs)
    os.close(theirs)
    with open(ours) as pipe:
        text = pipe.read()
    return subprocess.CompletedProcess([], process.wait(20), "", text)


def test_the_journal_gets_each_line_with_its_fields(journald: tuple[socket.socket, Path]) -> None:
    found, path = journald
    assert run(path, "auto", journal=True).stderr == ""
    first, second, third = (read(found.recv(1 << 20)) for _ in range(3))
    assert first.items() >= {
        "MESSAGE": "a: ready: started", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "orchestratord", "ORCHESTRATOR_MODEL": "a",
        "ORCHESTRATOR_KIND": "ready", "LOGGER": "orchestrator", "CODE_FUNC": "<module>", "CODE_FILE": "<string>",
    }.items()  # fmt: skip
    assert first["CODE_LINE"].isdigit()
    assert (second["MESSAGE"], second["PRIORITY"]) == ("two\nlines", "4")
    assert third["PRIORITY"] == "3"
    assert third["MESSAGE"].startswith("it failed\nTraceback")


def test_where_there_is_no_journal_the_lines_are_text(tmp_path: Path) -> None:
    text = run(tmp_path / "none", "journald").stderr
    assert "INFO    a: ready: started" in text
    assert "ZeroDivisionError" in text


def test_a_journal_stream_that_was_inherited_is_not_taken_for_ours(journald: tuple[socket.socket, Path], tmp_path: Path) -> None:
    os.environ["JOURNAL_STREAM"] = "1:2"
    try:
        lines = [json.loads(line) for line in run(journald[1], "auto").stderr.splitlines()]
    finally:
        del os.environ["JOURNAL_STREAM"]
    assert lines[0].items() >= {"level": "info", "message": "a: ready: started", "model": "a", "kind": "ready"}.items()


def test_a_value_is_never_larger_than_a_datagram(journald: tuple[socket.socket, Path]) -> None:
    found, path = journald
    failed: list[logging.LogRecord] = []
    otherwise = logging.Handler()
    otherwise.addFilter(lambda record: bool(failed.append(record)))  # type: ignore[func-returns-value]
    handler = JournalHandler(otherwise, path)
    handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, "y" * 1_000_000, (), None, "g"))
    assert (len(read(found.recv(1 << 20))["MESSAGE"]), failed) == (64 * 1024, [])
    for _ in range(10_000):  # one that reads nothing: nobody waits for it
        handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, "y" * 10_000, (), None, "g"))
    assert failed
    handler.close()


@pytest.mark.parametrize(("access", "told"), [("access", True), ("", False)])
def test_requests_are_told_only_where_that_is_wished(tmp_path: Path, access: str, told: bool) -> None:
    assert ("a request" in run(tmp_path, "text", access).stderr) is told


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_terminal_has_colours_and_short_times(tmp_path: Path, environment: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", **environment}
    env.pop("JOURNAL_STREAM", None)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), "auto", ""], env=env, stderr=theirs)
    os.close(theirs)
    text = ""
    while True:
        try:
            text += os.read(ours, 65536).decode()
        except OSError:  # EIO: the other side is closed
            break
    process.wait(20)
    os.close(ours)
    first = text.splitlines()[0]
    assert ("\x1b[33mwarning: two" in text) is coloured
    assert (len(first.split(" ")[0]) == len("08:00:00")) is coloured
    assert first.endswith("a: ready: started")
