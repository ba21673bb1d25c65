"""orchestratorctl as a real process: with pipes, or on a terminal of its own (a pty).

Each wait is for a text or an end, with a deadline far beyond what a busy machine needs; passing it is a failure.
"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import orchestrator

ROOT = str(Path(orchestrator.__file__).parent.parent)
COMMAND = (sys.executable, "-W", "error", "-m", "orchestrator.cli")
DEADLINE_S = 60.0


def environment(**more: str) -> dict[str, str]:
    """Nothing of the tester's own settings; a terminal that can redraw."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if key in os.environ}
    return {**kept, "PYTHONPATH": ROOT, "TERM": "xterm-256color", **more}


def run(*words: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


class Terminal:
    """A running command whose stderr, and stdout unless `piped`, is a terminal of 100 columns."""

    def __init__(self, *words: str, env: Mapping[str, str], piped: bool = False) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        stdout = subprocess.PIPE if piped else theirs
        self.process = subprocess.Popen([*COMMAND, *words], env=env, stdin=theirs, stdout=stdout, stderr=theirs)
        os.close(theirs)
        self.raw = ""

    @property
    def text(self) -> str:
        """What was shown, without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

    def wait_for(self, wanted: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while wanted not in self.text:
            assert self._read(deadline), f"ended without {wanted!r}: {self.text!r}"

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Reads to the end; the exit code."""
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline):
            pass
        return self.process.wait(DEADLINE_S)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came: {self.text!r}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._ours)
