"""NVML in a process of its own (nvml_reader.py): every GPU's memory, and which process holds how much. Keys are UUIDs; indices move.

A driver that hangs, crashes or answers nonsense costs that process and nothing else: it is killed and started again, later each time,
and until it answers each read says why there is none. Only one exists at a time: one that can not be killed hangs in the kernel, and
so would the next.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.drivers import processes
from orchestrator.policy.snapshot import GpuReading

READER = Path(__file__).with_name("nvml_reader.py")
START_S = 30.0  # without nvidia-persistenced each card is set up anew when NVML begins, 1-3 s a card
ANSWER_S = 5.0  # 0.2 ms on a healthy card
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # before it is started again
STABLE_S = 60.0  # one that ran this long forgives earlier failures
RENEW_S = 60.0  # where a card fails: a new process sees the cards that there are then
GONE_S = 1.0  # a killed process is gone in milliseconds, where no system call holds it
MOST_BYTES = 16 << 20  # of an answer: 20 bytes a process on a card


class Nvml:
    """Raises OSError (from the constructor too) with NVML's own words and the mend where there is one. `log`: of its process.

    From one thread at a time, one that lives on: the kernel ends the process with the thread that started it.
    """

    def __init__(self, log: Path = Path(os.devnull)) -> None:
        self._log = log
        self._reader: _Reader | None = None
        self._ended: _Reader | None = None  # killed, and not yet seen to be gone
        self._failures, self._retry_at, self._why = 0, 0.0, ""
        self._seen: dict[str, GpuReading] = {}
        self.read()

    def read(self) -> Sequence[GpuReading]:
        """All cards; one that can not be read now as it was, with why. Blocks while the driver hangs, START_S at most."""
        reader = self._reader or self._start()
        try:
            readings = reader.ask()
        except OSError as error:
            self._failed(reader, str(error))
            raise
        good = {reading.uuid: reading for reading in readings if not reading.error}
        bad = {reading.uuid: reading.error for reading in readings if reading.error}
        self._seen |= good
        if bad and reader.age_s > RENEW_S:
            self._end(reader)
        for uuid in self._seen.keys() - good.keys():  # one that was lost before this process began has no UUID now
            if why := bad.get(uuid) or bad.get(""):
                good[uuid] = replace(self._seen[uuid], error=why)
        return sorted(good.values(), key=lambda reading: reading.index)

    def close(self) -> None:
        if self._reader is not None:
            self._end(self._reader)

    def _start(self) -> "_Reader":
        if time.monotonic() < self._retry_at:
            raise OSError(self._why)
        if self._ended is not None and not self._ended.is_gone(GONE_S):
            self._later(f"NVML: process {self._ended.pid} hangs in the driver and can not be killed: see `dmesg`; reset the GPU or reboot")
            raise OSError(self._why)
        try:
            self._reader, self._ended = _Reader(self._log), None
        except OSError as error:
            self._later(f"NVML: its process can not be started: {error}")
            raise OSError(self._why) from None
        return self._reader

    def _failed(self, reader: "_Reader", why: str) -> None:
        if reader.age_s > STABLE_S:
            self._failures = 0
        self._later(why)
        self._end(reader)

    def _later(self, why: str) -> None:
        self._why = why
        self._retry_at = time.monotonic() + min(FIRST_WAIT_S * 2**self._failures, LONGEST_WAIT_S)
        self._failures = min(self._failures + 1, 10)  # of months of failures, 2 ** n would be no float any more

    def _end(self, reader: "_Reader") -> None:
        reader.kill()
        self._reader, self._ended = None, reader


class _Reader:
    """One process."""

    def __init__(self, log: Path) -> None:
        """Raises OSError."""
        self._log = _emptied(log)
        self._started_at = time.monotonic()
        self._patience_s = START_S
        self._socket, theirs = socket.socketpair()
        argv = [sys.executable, "-P", str(READER), str(theirs.fileno())]
        try:
            with theirs:
                process, self._child = processes.spawn(argv, os.environ, self._log, (theirs.fileno(),))
        except OSError:
            self._socket.close()
            raise
        self.pid = process.pid

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_at

    def ask(self) -> list[GpuReading]:
        """Those with an error have no figures, nor a UUID where it was never known. Raises OSError: then this process is of no more use."""
        try:
            line = self._line()
        except TimeoutError:
            raise OSError(f"NVML: the driver has not answered for {self._patience_s:g} s; its process was killed") from None
        except ConnectionError:
            raise OSError(f"NVML: {self._how_it_ended()}") from None
        self._patience_s = ANSWER_S
        try:
            answer = json.loads(line)
            if error := answer.get("error"):
                raise OSError(str(error))
            return [_reading(card) for card in answer["cards"]]
        except (ValueError, TypeError, LookupError, AttributeError):
            raise OSError(f"NVML: its process answered nonsense: {line[:80]!r}") from None

    def kill(self) -> None:
        self._child.kill()
        self._socket.close()

    def is_gone(self, within_s: float) -> bool:
        return self._code(within_s) is not None

    def _line(self) -> bytes:
        """Raises TimeoutError, ConnectionError."""
        deadline = time.monotonic() + self._patience_s
        self._socket.settimeout(self._patience_s)
        self._socket.sendall(b"?")
        line = b""
        while not line.endswith(b"\n") and len(line) < MOST_BYTES:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            line += part
        return line

    def _code(self, within_s: float) -> int | None:
        with contextlib.suppress(TimeoutError):
            return self._child.wait(within_s)
        return None

    def _how_it_ended(self) -> str:
        code = self._code(GONE_S)
        how = f"its process {processes.how_it_ended(code)}"
        with contextlib.suppress(OSError):
            if words := self._log.read_bytes()[-300:].decode(errors="replace").strip():
                return f"{how}: {words.splitlines()[-1]}" if code and code > 0 else f"{how}; {self._log} has its last words"
        return how


def _emptied(log: Path) -> Path:
    """The last one's words alone are of use. A disk that is full takes none, and that is no reason not to look."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError:
        return Path(os.devnull)
    return log


def _reading(card: Sequence[object]) -> GpuReading:
    """Raises ValueError for what no card can be."""
    match card:
        case [int(index), str() | None as uuid, str(name), _, _, _, str(error)]:
            return GpuReading(uuid or "", index, name, 0, 0, error=error)
        case [int(index), str(uuid), str(name), int(total), int(free), list(held), None] if 0 <= free <= total and total:
            return GpuReading(uuid, index, name, total, free, {int(pid): int(size) for pid, size in held})
    raise ValueError(card)
