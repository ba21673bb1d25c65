"""Drives a ballast process (ballast.py on a GPU, the simulator's on a simulated one). Every command is answered within a deadline.

The process ends with the `with`, whatever happened inside it.
"""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.box import ROOT

START_S, ANSWER_S = 60.0, 20.0  # importing torch takes 5 to 15 s


class ForeignError(RuntimeError):
    """The ballast refused, was silent, or died; the text says which."""


def on_gpu(python: Path, uuid: str) -> tuple[list[str], dict[str, str]]:
    return [str(python), str(Path(__file__).with_name("ballast.py"))], {"CUDA_VISIBLE_DEVICES": uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def on_simulated(folder: Path, uuid: str) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "orchestrator.engine.simulator.ballast", "--gpu", uuid, "--bytes", "0"]
    return command, {"SIM_GPU_DIR": str(folder), "PYTHONPATH": str(ROOT)}


class Foreign:
    def __init__(self, command: tuple[Sequence[str], Mapping[str, str]], log: Path) -> None:
        self._command, self._env = command
        self._log = log
        self._answers: queue.Queue[tuple[float, str]] = queue.Queue()
        self.held_bytes = 0

    def __enter__(self) -> Self:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, env={**os.environ, **self._env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._answer(START_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def take(self, size_bytes: int) -> float:
        """Returns when it had them (time.monotonic())."""
        return self._do("take", size_bytes)

    def give(self, size_bytes: int) -> float:
        return self._do("give", size_bytes)

    def give_all(self) -> float:
        return self.give(self.held_bytes) if self.held_bytes else time.monotonic()

    def _do(self, verb: str, size_bytes: int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{verb} {size_bytes}\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ForeignError(f"the ballast is gone ({error}); see {self._log}") from None
        return self._answer(ANSWER_S)

    def _answer(self, timeout_s: float) -> float:
        try:
            heard, line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ForeignError(f"the ballast did not answer within {timeout_s:.0f}s; see {self._log}") from None
        words = line.split()
        if words[:1] != ["holding"]:
            raise ForeignError(f"the ballast said {line!r}; see {self._log}")
        self.held_bytes = int(words[1])
        return float(words[3]) if words[2:3] == ["at"] else heard

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((time.monotonic(), line.strip()))
        self._answers.put((time.monotonic(), "nothing more: it ended"))
