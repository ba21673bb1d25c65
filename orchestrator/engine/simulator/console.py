"""Lines of the log, in the words and the format of vLLM and kvcached.

Each line is one write to stdout, so lines of the two processes, which share the file, never mix.
"""

from __future__ import annotations

import os
import sys
import time
import traceback


class Console:
    """The log of one process; `process` is the name vLLM puts before each of its lines."""

    def __init__(self, process: str) -> None:
        self._process = process

    def plain(self, text: str) -> None:
        """A line without a prefix, as C++ code prints it."""
        data = (text + "\n").encode()
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]

    def line(self, text: str) -> None:
        prefix = f"({self._process} pid={os.getpid()}) "
        self.plain("\n".join(prefix + part for part in text.split("\n")))

    def vllm(self, level: str, place: str, text: str) -> None:
        self.line(f"{level} {time.strftime('%m-%d %H:%M:%S')} [{place}] {text}")

    def info(self, place: str, text: str) -> None:
        self.vllm("INFO", place, text)

    def kvcached(self, level: str, place: str, text: str) -> None:
        self.line(f"[kvcached][{level}][{time.strftime('%Y-%m-%d %H:%M:%S')}][{place}] {text}")

    def failure(self, error: BaseException, name: str | None = None) -> None:
        """A traceback as Python prints it, its last line under `name` (the class that the real engine raises)."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        self.line(f"Traceback (most recent call last):\n{frames}{name or type(error).__name__}: {error}")
