"""An engine that costs next to nothing: raw asyncio on a socket, answers made beforehand. What a proxy in front of it costs is its own.

    python -m bench.proxy.mock_engine (--uds PATH | --port N) [--model NAME]

A POST whose body says `"stream":true` gets CHUNKS events of 215 bytes, the first at once and then one every PAUSE_S; any other a
completion of 2 KB. GETs are for the probes of a daemon: /v1/models names the model, all else is an empty object. A body
`"tokens": N` is not looked at: each stream is the same, and each chunk holds its number, so that a reader sees what is lost.
"""

import argparse
import asyncio
import json
from typing import cast

import uvloop

CHUNKS = 100
PAUSE_S = 0.02  # 50 tokens a second for each stream
CHUNK_BYTES = 215
ANSWER_BYTES = 2048


def event(number: int, model: str) -> bytes:
    """One SSE event of CHUNK_BYTES; the client finds `number` in it."""
    head = f'data: {{"id":"cmpl-1","object":"text_completion","created":1,"model":"{model}","choices":[{{"index":0,"text":"{number:06} '
    tail = '","finish_reason":null}]}\n\n'
    return (head + "x" * (CHUNK_BYTES - len(head) - len(tail)) + tail).encode()


def answer(model: str) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model, "choices": [], "usage": usage}
    text = "x" * (ANSWER_BYTES - len(json.dumps(body)) - 60)
    body["choices"] = [{"index": 0, "text": text, "finish_reason": "stop"}]
    return json.dumps(body).encode()


class MockEngine(asyncio.Protocol):
    """One connection. `made`: the ready answers, shared by all."""

    def __init__(self, made: "Made", loop: asyncio.AbstractEventLoop) -> None:
        self._made, self._loop = made, loop
        self._buffer = b""
        self._streams: set[asyncio.TimerHandle] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def connection_lost(self, error: Exception | None) -> None:
        for timer in self._streams:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = _length(head)
            if len(self._buffer) < end + 4 + length:
                if b"expect: 100-continue" in head:
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            if head.startswith(b"get"):
                self._transport.write(self._made.models if b" /v1/models " in head else self._made.empty)
            elif b'"stream":true' in body or b'"stream": true' in body:
                self._transport.write(self._made.stream_head)
                self._chunk(0)
            else:
                self._transport.write(self._made.plain)

    def _chunk(self, number: int) -> None:
        self._transport.write(self._made.chunks[number])
        if number + 1 < len(self._made.chunks):
            timer = self._loop.call_later(PAUSE_S, self._next, number + 1)
            self._streams = {timer}

    def _next(self, number: int) -> None:
        if not self._transport.is_closing():
            self._chunk(number)


class Made:
    """Every answer as bytes on the wire."""

    def __init__(self, model: str, chunks: int) -> None:
        self.plain = _response(answer(model))
        self.empty = _response(b"{}")
        self.models = _response(json.dumps({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "mock"}]}).encode())
        self.stream_head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        self.chunks = [_chunked(event(number, model)) for number in range(chunks)]
        self.chunks[-1] += _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _response(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _length(head: bytes) -> int:
    at = head.find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    made = Made(options.model, options.chunks)
    if options.uds:
        server = await loop.create_unix_server(lambda: MockEngine(made, loop), options.uds, backlog=2048)
    else:
        server = await loop.create_server(lambda: MockEngine(made, loop), "127.0.0.1", options.port, backlog=2048)
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.mock_engine", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds")
    where.add_argument("--port", type=int)
    parser.add_argument("--model", default="mock")
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
