"""HTTP/1.1 to one engine over its unix socket: connections that are kept, one request at a time on each, and no copy of what passes.

The hot path's own client: the parser is the server's (httptools), and nothing is made per request that is not needed to relay it.
A quarter of aiohttp's CPU a request (bench proxy). An answer that is cut, or is not HTTP, raises Broken: never a short success.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from time import monotonic
from typing import cast

from httptools import HttpParserError, HttpResponseParser

from orchestrator.api.connection import Client
from orchestrator.api.usage import Watch

CONNECT_S = 5.0
# Engines close idle connections after 75 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); this side must give up earlier, or requests meet the end.
KEEP_ALIVE_S = 60.0
HELD_BYTES = 64 << 10  # of an answer that its client has not taken yet; beyond that the engine waits
# Hop-by-hop (RFC 9110 7.6.1), or made anew on each hop; and ids, which each answer of ours bears.
DROPPED = frozenset(b"connection keep-alive te trailer transfer-encoding upgrade server date x-request-id request-id traceparent".split())


class Broken(ConnectionError):
    """`begun`: something of the answer had come."""

    def __init__(self, why: str, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class Answer(asyncio.Protocol):
    """A connection, and the answer that it carries now: `status`, `headers` (lower case, without those of the hop), read() to the end.

    `begun`: something of it has come. `over`: all of it has. `broke`: why there will be no more; None: nothing is wrong."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: "Upstream") -> None:
        self._loop, self._pool = loop, pool
        self._parser = HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self.broke: str | None = None
        self._paused = False
        self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.has_length = False
        self._watch: Watch | None = None
        self._client: Client | None = None
        self._on_news: Callable[[], None] | None = None
        self._chunks: list[bytes] = []
        self._held = 0
        self.begun = self.has_head = self.over = self._keeps = False

    # ---- its user ----

    def send(self, head: bytes, body: bytes, watch: Watch | None, on_news: Callable[[], None] | None = None) -> None:
        """Who gives `on_news` is called when something has come, or it broke, and takes all of it then."""
        self._begin()
        self._watch, self._on_news = watch, on_news
        if self.broke is not None:  # its engine ended after it was connected: a transport that is closed takes no bytes, and raises
            self._loop.call_soon(self._tell)
            return
        self._transport.writelines((head, body))

    async def head(self) -> None:
        """Until status and headers are there. Raises Broken."""
        while not self.has_head:
            if self.broke is not None:
                raise Broken(self.broke, self.begun)
            await self._news()

    def take(self) -> bytes:
        """What has come since; b"" where that is nothing."""
        chunks = self._chunks
        if not chunks:
            return b""
        self._chunks = []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def pause(self) -> None:
        if self.broke is None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.broke is None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    async def read(self) -> bytes:
        """What has come since, at least a byte; b"" at the end. Raises Broken, after what had come before the break."""
        while not self._chunks:
            if self.over:
                return b""
            if self.broke is not None:
                raise Broken(self.broke, True)
            await self._news()
        self._held = 0
        self.resume()
        return self.take()

    async def parts(self) -> AsyncIterator[bytes]:
        """All that is left. Raises Broken."""
        while part := await self.read():
            yield part

    @property
    def whole(self) -> bool:
        """Nothing is left to read."""
        return self.over and not self._chunks

    async def relay(self, client: Client) -> None:
        """To the end: what comes goes on to `client` as chunks of its answer, in the very callback that brought it, and as fast as it
        takes them. Raises Broken."""
        self._client = client
        client.on_full, client.on_drained = self.pause, self.resume
        try:
            self._pass_on()
            (self.pause if client.is_full else self.resume)()
            while not self.over:
                if self.broke is not None:
                    raise Broken(self.broke, True)
                await self._news()
        finally:
            self._client = client.on_full = client.on_drained = None
            self.resume()

    @property
    def has_more_than_head(self) -> bool:
        """Can be read without waiting."""
        return self.over or bool(self._chunks)

    def release(self) -> None:
        """Its user is done: kept for the next request if it was read to the end, else closed, which tells the engine to stop."""
        self._on_news = None
        if self.over and self._keeps and self.broke is None:
            self.resume()
            self._pool.keep(self)
        else:
            self.close()

    def close(self) -> None:
        if self.broke is None:
            self.broke = "closed"
            self._transport.abort()

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _tell(self) -> None:
        if self._on_news is not None:
            self._on_news()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- its transport ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        if self.over or self.broke is not None:
            self._break("it says more than its answer")
            return
        self.begun = True
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._break(f"its answer is not HTTP: {error}")
        if self._client is None:
            self._tell()
        else:
            self._pass_on()
            if self.over or self.broke is not None:
                self._tell()

    def _pass_on(self) -> None:
        if self._chunks:
            assert self._client is not None
            self._client.write_chunk(self.take())

    def connection_lost(self, error: Exception | None) -> None:
        if self.broke is None:
            self.broke = "the connection broke" if error is None else f"{type(error).__name__}: {error}"
        self._pool.forget(self)
        del self._parser  # it knows us: a ring that only the collector could open
        self._tell()

    def _break(self, why: str) -> None:
        if self.broke is None:
            self.broke = why
            self._transport.abort()

    # ---- its parser ----

    def on_message_begin(self) -> None:
        if self.over:
            raise ValueError("it says more than its answer")  # or that would be the next one's, who asked something else

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name not in DROPPED:
            self.headers.append((name, value))
            if name == b"content-type":
                self.content_type = value
            elif name == b"content-length":
                self.has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.status, self.has_head = status, True
        else:
            self.headers, self.has_length = [], False  # an interim answer: the real one follows

    def on_body(self, body: bytes) -> None:
        if self._watch is not None and not (body := self._watch.part(body)):
            return
        self._chunks.append(body)
        if self._client is not None or self._on_news is not None:
            return
        self._held += len(body)
        if self._held > HELD_BYTES:
            self.pause()

    def on_message_complete(self) -> None:
        if self.has_head:
            self.over, self._keeps = True, self._parser.should_keep_alive()


class Upstream:
    """One engine's connections."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: list[Answer] = []
        self._closed = False

    async def ask(self, head: bytes, body: bytes, watch: Watch | None = None) -> Answer:
        """Send a request; returns when the head of its answer is there. The caller must release() it. `watch` sees each part of its
        body. Raises OSError: Broken, or why it could not be connected.

        A kept connection may have ended in the very moment that it was used: then nothing has come back, and the request is sent once more.
        """
        kept = self.kept()
        if kept is not None:
            try:
                return await self._on(kept, head, body, watch)
            except Broken as broken:
                if broken.begun:
                    raise
        return await self._on(await self.connect(), head, body, watch)

    async def _on(self, answer: Answer, head: bytes, body: bytes, watch: Watch | None) -> Answer:
        try:
            answer.send(head, body, watch)
            await answer.head()
        except BaseException:
            answer.close()
            raise
        return answer

    def kept(self) -> Answer | None:
        """A connection that carries nothing, where there is one. Whoever gets it must release() it."""
        while self._idle:
            answer = self._idle.pop()  # the one used last: the others may grow old and go
            if answer.broke is None and monotonic() - answer.idle_since < KEEP_ALIVE_S:
                return answer
            answer.close()
        return None

    async def connect(self) -> Answer:
        """Raises OSError, TimeoutError among them."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            return (await loop.create_unix_connection(partial(Answer, loop, self), self._path))[1]

    def keep(self, answer: Answer) -> None:
        if self._closed:
            answer.close()
            return
        answer.idle_since = monotonic()
        self._idle.append(answer)

    def forget(self, answer: Answer) -> None:
        if answer in self._idle:
            self._idle.remove(answer)

    def close(self) -> None:
        """Of those that carry an answer nothing is broken: they end with it."""
        self._closed = True
        for answer in list(self._idle):
            answer.close()
        self._idle.clear()

    def tidy(self) -> None:
        """Close what has been idle for too long."""
        for answer in [one for one in self._idle if monotonic() - one.idle_since >= KEEP_ALIVE_S]:
            answer.close()


class Upstreams:
    """The engines' connections by launch id, made when first asked for. `socket_of`: launch id -> path of the engine's socket."""

    def __init__(self, socket_of: Callable[[str], str]) -> None:
        self._socket_of = socket_of
        self._engines: dict[str, Upstream] = {}

    def of(self, launch_id: str) -> Upstream:
        engine = self._engines.get(launch_id)
        if engine is None:
            engine = self._engines[launch_id] = Upstream(self._socket_of(launch_id))
        return engine

    def tidy(self, launch_ids: Collection[str]) -> None:
        """Close what has been idle for too long, and all that is idle to engines other than these."""
        for launch_id in self._engines.keys() - launch_ids:
            self._engines.pop(launch_id).close()
        for engine in self._engines.values():
            engine.tidy()
