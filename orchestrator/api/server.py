"""uvicorn as this daemon runs it: stopped by the daemon, and awake once a second. What its connections are: see connection.py."""

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial

import uvicorn

from orchestrator.api.connection import KEEP_ALIVE_S, Connection, Direct
from orchestrator.api.websocket import WebSocket

STOP_S = 3  # open streams of the admin API are cut after this
TICK_S = 1.0  # how often the Date header is made anew, and connections are looked at


class Server(uvicorn.Server):
    """`direct`: see Connection; not with an access log, which uvicorn's own cycles write."""

    def __init__(self, app: object, access_log: bool, direct: Direct | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                loop="uvloop",
                http=partial(Connection, direct=None if access_log else direct),  # type: ignore[arg-type]
                ws=WebSocket,
                ws_per_message_deflate=False,  # a small frame may not become a large one here
                lifespan="off",
                access_log=access_log,
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
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.look(now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()
