"""One launch server that runs, and the socket to it (SEQPACKET; engine/vllm/launch_server.py is the other end).

A request carries the engine's log and a pipe. What the server forks reads one byte of that pipe before it does anything, and only a
caller who has the answer and still wants the engine writes it. So a request that was given up, unanswered or not, never becomes an
engine, however late the server wakes.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.drivers import processes, vllm
from orchestrator.drivers.processes import Child, Process
from orchestrator.drivers.vllm import EngineVenv

MESSAGE_BYTES = 1 << 20
END_S = 5.0  # a SIGKILL needs this only where the machine is choking


class NoFork(Exception):
    """No engine was started and none will be; the text says why."""


class Lost(Exception):
    """The server ended, hangs or makes no sense; nor was an engine started."""


class Control:
    def __init__(self, process: Process, child: Child, sock: socket.socket) -> None:
        self.process, self._child, self._sock = process, child, sock
        self._asked = 0
        self.hello: Mapping[str, Any] = {}  # what it said when it was ready
        self.unwatch: Callable[[], None] = lambda: None

    @classmethod
    def spawn(cls, venv: EngineVenv, env: Mapping[str, str], log: Path) -> "Control":
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                log.unlink(missing_ok=True)
                command = vllm.launch_server_command(venv, theirs.fileno())
                process, child = processes.spawn(command, env, log, pass_fds=(theirs.fileno(),))
            except OSError:
                ours.close()
                raise
        return cls(process, child, ours)

    async def ready(self, timeout_s: float) -> None:
        """Wait for its imports. Raises Lost."""
        hello = await self._receive(timeout_s, "while importing")
        if said := hello.get("error"):
            raise Lost(str(said))
        self.hello = hello

    async def fork(self, argv: Sequence[str], env: Mapping[str, str], log: Path, timeout_s: float) -> tuple[Process, Child | None]:
        """Raises NoFork, Lost. One at a time."""
        self._asked += 1
        message = json.dumps({"id": self._asked, "argv": list(argv), "env": dict(env)}).encode()
        waits, go = os.pipe()
        try:
            self._send(message, log, waits)
            while (answer := await self._receive(timeout_s, "while it was asked for an engine")).get("id") != self._asked:
                pass  # to a request that was given up
            if said := answer.get("error"):
                raise NoFork(f"its launch server could not fork: {said}")
            try:
                engine = processes.forked(int(answer["pid"]))
                os.write(go, b"g")
            except OSError as error:
                raise NoFork(f"what its launch server forked ended at once: {error}") from None
            return engine
        finally:
            os.close(go)

    async def end(self) -> None:
        """All of its session: engines have their own."""
        self.unwatch()
        self._sock.close()
        await asyncio.to_thread(processes.signal_session, self.process, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.to_thread(self._child.wait, END_S)

    @property
    def was_killed(self) -> bool:
        """By somebody, or by the kernel for memory: that says nothing of what it was doing."""
        return self._child.poll() in (-signal.SIGKILL, -signal.SIGTERM)

    def how_it_ended(self) -> str:
        return "it " + processes.how_it_ended(self._child.poll())

    def _send(self, message: bytes, log: Path, waits: int) -> None:
        try:
            with open(log, "ab") as out:
                try:
                    socket.send_fds(self._sock, [message], [out.fileno(), waits])
                except OSError as error:
                    raise Lost(f"it can not be asked for an engine: {error}") from None
        finally:
            os.close(waits)

    async def _receive(self, timeout_s: float, when: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                message = await asyncio.get_running_loop().sock_recv(self._sock, MESSAGE_BYTES)
        except TimeoutError:
            raise Lost(f"it said nothing for {timeout_s:g} s {when}") from None
        except OSError:  # it left our request unread
            message = b""
        if not message:
            with contextlib.suppress(TimeoutError):
                await asyncio.to_thread(self._child.wait, END_S)
            raise Lost(f"{self.how_it_ended()} {when}")
        try:
            answer: dict[str, Any] = json.loads(message)
        except ValueError:
            raise Lost(f"it said {message[:100]!r} {when}") from None
        return answer
