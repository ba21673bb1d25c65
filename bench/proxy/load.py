"""A client that costs little, for measuring what is between it and an engine: raw asyncio on TCP, keep-alive, one JSON object as result.

    python -m bench.proxy.load --port N --model NAME (--plain SECONDS --connections C | --streams S --rounds R | --stalled S)

`--stalled`: streams whose client does not read at all, until this is ended. Otherwise every byte that comes back is looked at: a plain
answer must be whole, a stream must hold each of its chunks once and in order.
Prints {"requests", "chunks", "bad", "seconds", "p50_s", "p99_s"}: times to the whole plain answer, or to a stream's first chunk.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import cast

import uvloop

from bench.results import percentile

Clock = Callable[[], float]


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, request: bytes, again: Callable[[], bool], result: "Result") -> None:
        self._request, self._again, self._result = request, again, result
        self._buffer = bytearray()
        self._first = False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def send(self) -> None:
        self._buffer.clear()
        self._first = False
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._result.bad.append(f"connection lost: {error}")
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._result.streams:
            if not self._first and b"data: " in self._buffer:
                self._first = True
                self._result.seconds.append(time.perf_counter() - self._began)
            if self._buffer.endswith(b"0\r\n\r\n"):
                self._over(_check_stream(bytes(self._buffer), self._result))
            return
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        if b"content-length: " in head:
            length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            whole = len(self._buffer) == end + 4 + length
        else:
            whole = self._buffer.endswith(b"\r\n0\r\n\r\n")
        if whole:
            self._result.seconds.append(time.perf_counter() - self._began)
            self._over("" if head.startswith(b"http/1.1 200") else bytes(self._buffer[:300]).decode("latin-1"))

    def _over(self, bad: str) -> None:
        self._result.requests += 1
        if bad:
            self._result.bad.append(bad)
        if self._again():
            self.send()
        else:
            self.done.set_result(None)


class Result:
    def __init__(self, streams: int) -> None:
        self.streams = streams
        self.requests = self.chunks = 0
        self.bad: list[str] = []
        self.seconds: list[float] = []


def _check_stream(raw: bytes, result: Result) -> str:
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return raw[:300].decode("latin-1")
    events = [event for event in _dechunked(body).split(b"\n\n") if event]
    if not events or events[-1] != b"data: [DONE]":
        return f"a stream without its end: {events[-1:]!r}"
    numbers = [int(event.split(b'"text":"', 1)[1][:6]) for event in events[:-1]]
    result.chunks += len(numbers)
    return "" if numbers == list(range(len(numbers))) else f"chunks lost or out of order: {numbers[:10]}…"


def _dechunked(body: bytes) -> bytes:
    out, at = [], 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        out.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(out)


async def run(options: argparse.Namespace) -> dict[str, object]:
    body = {"model": options.model, "prompt": "x" * 200, "max_tokens": 100, "stream": bool(options.streams or options.stalled)}
    payload = json.dumps(body, separators=(",", ":")).encode()
    request = (
        f"POST {options.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
        + "".join(f"{header}\r\n" for header in options.header)
        + f"User-Agent: OpenAI/Python 3.54.0\r\nContent-Length: {len(payload)}\r\n\r\n"
    ).encode() + payload
    result = Result(options.streams)
    loop = asyncio.get_running_loop()
    deadline = time.perf_counter() + (options.plain or 0)

    def again() -> bool:
        return not options.streams and time.perf_counter() < deadline

    if options.stalled:
        return await _stall(request, options)
    count = options.streams or options.connections
    began = time.perf_counter()
    for _ in range(options.rounds if options.streams else 1):
        connections = []
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: Connection(request, again, result), "127.0.0.1", options.port)
            connections.append(connection)
        for connection in connections:
            connection.send()
        for connection in connections:
            await connection.done
            connection._transport.close()
    return {
        "requests": result.requests,
        "chunks": result.chunks,
        "bad": len(result.bad),
        "why": result.bad[:3],
        "seconds": time.perf_counter() - began,
        "p50_s": percentile(result.seconds, 0.5) if result.seconds else None,
        "p99_s": percentile(result.seconds, 0.99) if result.seconds else None,
    }


async def _stall(request: bytes, options: argparse.Namespace) -> dict[str, object]:
    class Deaf(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            own = cast(asyncio.Transport, transport)
            own.write(request)
            own.pause_reading()

    for _ in range(options.stalled):
        await asyncio.get_running_loop().create_connection(Deaf, "127.0.0.1", options.port)
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.load", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--plain", type=float, help="seconds")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--stalled", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    print(json.dumps(uvloop.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
