"""The users' server on a real socket with one model, `one`, whose door is published by hand: so a test holds every moment of a wait."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.api.app import UsersApp
from orchestrator.api.bodies import Bodies
from orchestrator.api.fate import Fates
from orchestrator.api.openai import forwarded
from orchestrator.api.proxy import Proxy
from orchestrator.api.realtime import Realtime
from orchestrator.api.server import Server
from orchestrator.api.upstream import Upstreams
from orchestrator.control.counts import Counts
from orchestrator.control.keys import Keys
from orchestrator.control.traffic import Door, Traffic
from tests.api.rawclient import Client, connected
from tests.api.upstream import Upstream, scripted
from tests.support.eventually import eventually

DEADLINE_S = 20.0


@dataclass
class Doorway:
    address: tuple[str, int]
    traffic: Traffic
    upstream: Upstream
    upstreams: Upstreams
    server: Server
    counts: Counts

    def door(self, launch_id: str | None = "one", **fields: object) -> None:
        self.traffic.publish({"one": Door(launch_id, **fields)})  # type: ignore[arg-type]

    def client(self) -> "contextlib.AbstractAsyncContextManager[Client]":
        return connected(self.address)

    async def until_counts(self, in_flight: int, waiting: int) -> None:
        def reached() -> bool:
            seen = self.traffic.seen()["one"]
            return (seen.in_flight, seen.waiting) == (in_flight, waiting)

        await eventually(reached, f"{in_flight} in flight, {waiting} waiting; {self.traffic.seen()}")


@contextlib.asynccontextmanager
async def doorway(folder: Path, max_wait_s: float = 60.0, max_queue: int = 4096, max_body_bytes: int = 1 << 20) -> AsyncIterator[Doorway]:
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted(folder / "engine.sock"))
        traffic = Traffic(lambda: None, max_wait_s, max_queue=max_queue)
        upstreams = Upstreams(lambda launch_id: str(upstream.path))
        fates = Fates(counts := Counts())
        proxy = Proxy(traffic, lambda name: name, upstreams, Keys(), Bodies(max_body_bytes, 1 << 30), fates)
        realtime = Realtime(traffic, lambda name: name, lambda launch_id: str(upstream.path), Keys(), fates)
        public = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = Server(UsersApp([], forwarded(proxy, realtime), None, None), direct=proxy.direct)
        serving = asyncio.create_task(server.serve([public]))

        async def stop() -> None:
            server.stop(at_once=True)
            await asyncio.wait_for(serving, DEADLINE_S)
            upstreams.tidy(())

        stack.push_async_callback(stop)
        yield Doorway(public.getsockname(), traffic, upstream, upstreams, server, counts)
