"""uvicorn as this daemon runs it: stopped by the daemon, awake once a second, and with a bound on how many it serves at the same time.

Who opens connections and keeps them without a use for them loses them first: near the bound those that idle are closed, the longest idle
first. At the bound who comes is told to come back. What connections are: see connection.py.
"""

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from typing import Any, cast

import uvicorn

from orchestrator.api.connection import KEEP_ALIVE_S, Connection, Direct
from orchestrator.api.refusal import whole
from orchestrator.api.websocket import WebSocket
from orchestrator.errors import ModelUnavailable

MOST_CONNECTIONS = 16_384  # of 10 KiB each
OTHER_FILES = 512  # engines, logs, the state
STOP_S = 3  # open streams of the admin API are cut after this
TICK_S = 1.0  # how often the Date header is made anew, and connections are looked at


class Counted(Connection):
    """One of those that a server bounds."""

    @property
    def idle_since(self) -> float | None:
        """None while there is a request, or a part of one."""
        busy = self._begun or self._is_refused or (self.cycle is not None and not self.cycle.response_complete)
        return None if busy else self._since


class _TooMany(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        there = cast(asyncio.WriteTransport, transport)  # uvloop's are no subclass
        there.write(whole(ModelUnavailable("Too many connections: close some, or try again later.", code="busy", retry_after_s=1.0), []))
        there.close()


def most_connections() -> int:
    """Each may need two files, its own and one to an engine: half of those that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(64, min(MOST_CONNECTIONS, (soft - OTHER_FILES) // 2))


class Server(uvicorn.Server):
    """`direct`: see Connection. `most`: connections at the same time."""

    def __init__(self, app: object, direct: Direct | None = None, most: int | None = None) -> None:
        self._direct, self._most = direct, most or most_connections()
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                loop="uvloop",
                http=self._connection,  # type: ignore[arg-type]
                ws=WebSocket,
                ws_per_message_deflate=False,  # a small frame may not become a large one here
                lifespan="off",
                access_log=False,  # ours is access.py
                log_config=None,
                server_header=False,
                proxy_headers=False,  # asking.py reads what is needed of them
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_S,
                backlog=2048,
            )
        )
        self._stopping = asyncio.Event()

    def stop(self, at_once: bool = False) -> None:
        """Requests under way are given STOP_S, or no time at all."""
        self.should_exit, self.force_exit = True, at_once
        self._stopping.set()

    def _connection(self, **given: Any) -> asyncio.Protocol:
        return Counted(direct=self._direct, **given) if len(self.server_state.connections) < self._most else _TooMany()

    def _close_idle(self) -> None:
        """Down to three quarters, the longest idle first."""
        found = [(one.idle_since, one) for one in self.server_state.connections if isinstance(one, Counted)]
        idle = sorted(((since, one) for since, one in found if since is not None), key=lambda pair: pair[0])
        for _, one in idle[: len(self.server_state.connections) - self._most * 3 // 4]:
            one.transport.close()

    def stop_listening(self) -> None:
        """The address is free at once; connections stay. startup() with another socket listens anew."""
        for server in self.servers:
            server.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: the daemon stops things in its own order."""
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # at 0 it makes the Date header, which uvicorn's own loop does at every tenth of its ticks
            now = asyncio.get_running_loop().time()
            if len(self.server_state.connections) > self._most * 9 // 10:
                self._close_idle()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.look(now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()
