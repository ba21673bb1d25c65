"""Requests of every route, right ones and what becomes of them: bytes from a seed and a number, the same ones each time."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.api.routes import TABLE, Model, Route

MAX_BODY = 1 << 20  # of the daemon that they are sent to
MESSAGES = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 2},
    "/v1/chat/completions/render": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/completions/render": {"prompt": "x"},
    "/v1/responses": {"input": "x", "max_output_tokens": 3},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "x"},
    "/v2/embed": {"texts": ["x"]},
    "/pooling": {"input": "x"},
    "/classify": {"input": "x"},
    "/score": {"text_1": "x", "text_2": "y"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/rerank": {"query": "x", "documents": ["x"]},
    "/v1/rerank": {"query": "x", "documents": ["x"]},
    "/v2/rerank": {"query": "x", "documents": ["x"]},
    "/tokenize": {"prompt": "x"},
}
GETS = ("/v1/models", "/v1/models/{model}", "/health", "/openapi.json", "/v1/responses/resp_1", "/", "/metrics")
ODD = [b"\x00", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\t", b" ", b":", b"%00", b"%2f", b"..", b'"',
       b"{", b"]", b"\\u0000", b"\\ud800", b"1e999", b"-", b"9" * 400, b"null", b"\x1b[2J", b"--b--"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`writes` one after the other, on a connection of its own. `leaves`: then it is gone, else the answers are read to the end."""

    mutation: str
    writes: list[bytes]
    leaves: bool = False


@dataclass(frozen=True)
class Request:
    """A right one."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def raw(self, headers: list[tuple[bytes, bytes]] | None = None, body: bytes | None = None, line: bytes | None = None) -> bytes:
        lines = [line or self.line, *(b"%b: %b" % pair for pair in (self.headers if headers is None else headers))]
        return b"\r\n".join(lines) + b"\r\n\r\n" + (self.body if body is None else body)

    def without(self, *names: bytes) -> list[tuple[bytes, bytes]]:
        return [pair for pair in self.headers if pair[0].lower() not in names]


def case(seed: int, number: int, model: str) -> Case:
    chance = random.Random(f"{seed}:{number}")
    name = chance.choice(list(MUTATIONS))
    return Case(name, MUTATIONS[name](chance, right(chance, model)), leaves=chance.random() < 0.1)


def right(chance: random.Random, model: str) -> Request:
    if chance.random() < 0.15:
        return Request(b"GET %b HTTP/1.1" % chance.choice(GETS).format(model=model).encode(), [(b"Host", b"h")], b"")
    route = chance.choice(TABLE)
    line = f"{'GET' if route.model is Model.TALK else route.method} {route.path.format(id='resp_1')} HTTP/1.1".encode()
    headers = [(b"Host", b"h"), *chance.sample(FOR_US, chance.randrange(3))]
    if route.model is Model.TALK:
        return Request(
            line.replace(b" HTTP", b"?model=%b HTTP" % model.encode() if chance.random() < 0.5 else b" HTTP"), headers + UPGRADE, b""
        )
    body, kind = _body(chance, route, model)
    return Request(line, [*headers, (b"Content-Type", kind), (b"Content-Length", b"%d" % len(body))], body)


FOR_US = [
    (b"X-Priority", b"3"), (b"X-Request-Timeout", b"5"), (b"X-Progress", b"sse"), (b"X-Request-Id", b"one"), (b"Expect", b"100-continue"),
    (b"Authorization", b"Bearer x"), (b"traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"), (b"Connection", b"close"),
]  # fmt: skip
UPGRADE = [
    (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13"),
    (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
]  # fmt: skip


def _body(chance: random.Random, route: Route, model: str) -> tuple[bytes, bytes]:
    if route.model is Model.ID:
        return b"", b"application/json"
    if route.model is Model.FORM:
        fields = [f'name="model"\r\n\r\n{model}', 'name="file"; filename="a.wav"\r\n\r\nRIFF' + "x" * 50]
        chance.shuffle(fields)
        form = "".join(f"--b\r\nContent-Disposition: form-data; {field}\r\n" for field in fields) + "--b--\r\n"
        return form.encode(), b"multipart/form-data; boundary=b"
    body = {"model": model, **BODIES.get(route.path, {})}
    if route.streams and chance.random() < 0.5:
        body["stream"] = True
    return json.dumps(body).encode(), b"application/json"


# ---- what becomes of them ---------------------------------------------------------------------------------------------


def unchanged(chance: random.Random, request: Request) -> list[bytes]:
    return [request.raw()]


def strange_bytes(chance: random.Random, request: Request) -> list[bytes]:
    """Anywhere, in the head too."""
    raw = bytearray(request.raw())
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(raw))
        raw[at : at + chance.randrange(4)] = chance.choice([chance.choice(ODD), chance.randbytes(chance.randrange(5))])
    return [bytes(raw)]


def strange_bytes_in_the_body(chance: random.Random, request: Request) -> list[bytes]:
    """With its length declared as it is."""
    body = bytearray(request.body or b"{}")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        body[at : at + chance.randrange(3)] = chance.choice(ODD)
    return [_sized(request, bytes(body))]


def pieces_twice_or_gone(chance: random.Random, request: Request) -> list[bytes]:
    raw = request.raw()
    first, last = sorted((chance.randrange(len(raw)), chance.randrange(len(raw))))
    return [chance.choice([raw[:first] + raw[last:], raw[:last] + raw[first:]])]


def header_flood(chance: random.Random, request: Request) -> list[bytes]:
    count, size = chance.choice([(101, 1), (5000, 1), (90, 1000), (1, 70_000), (1, 1 << 20), (98, 10)])
    return [request.raw(headers=[*request.headers, *((b"X-%d" % n, b"y" * size) for n in range(count))])]


def strange_headers(chance: random.Random, request: Request) -> list[bytes]:
    extra = chance.choice(
        [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"gzip, chunked"),
         (b"Content-Length", b"-1"), (b"Content-Length", b"1" * 400), (b"Content-Length", b"0x10"),
         (b"Transfer-Encoding", b"identity"), (b"Upgrade", b"h2c"),
         (b"X-Priority", b"99"), (b"X-Request-Timeout", b"nan"), (b"X-Request-Timeout", b"0.001"), (b"X-Progress", b"\xff"),
         (b"Content-Type", b"multipart/form-data; boundary=" + b"-" * 80), (b"Content-Encoding", b"gzip"),
         (b"Connection", b"close, \xff, ,"), (b" Folded", b"x"), (b"X", b"a\r\n folded"), (b"X ", b"a"), (b"", b"a"),
         (b"Host", b"other"), (b"Cookie", b"\xff" * 50),
         (b"X-Forwarded-For", b"\xff, , 1"), (b"Authorization", b"Bearer \xff"), (b"x-api-key", b"\x80"), (b"Range", b"bytes=0-1")]
    )  # fmt: skip
    headers = list(request.headers)
    headers.insert(chance.randrange(len(headers) + 1), extra)
    return [request.raw(headers=headers)]


def strange_line(chance: random.Random, request: Request) -> list[bytes]:
    method, target, version = request.line.split(b" ")
    changed = chance.choice(
        [(chance.choice([b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"PRI", b"get", b"\x00"]), target, version),
         (method, target + chance.choice([b"/", b"?model=\xff", b"#", b"%00", b"%2f..", b";a"]), version),
         (method, b"/" + target, version), (method, b"http://[::1" + target, version), (method, b"*", version),
         (method, b"/" * 9000, version),
         (method, target, chance.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"", b"http/1.1"]))]
    )  # fmt: skip
    return [request.raw(line=b" ".join(changed))]


def model_twice(chance: random.Random, request: Request) -> list[bytes]:
    """And other keys that count, in any order, some of them escaped."""
    inner = request.body[1:-1] if request.body.startswith(b"{") else b'"x":1'
    keys = [b'"model"', b'"\\u006dodel"', b'"stream"', b'"max_tokens"', b'"previous_response_id"', b'"stream_options"']
    values = [b'"nobody"', b'""', b"null", b"1", b"true", b"[]", b'"\\u0000"', b'"resp_1"', b"{}", b"1e999", b'"\\ud800"']
    more = [b"%b:%b" % (chance.choice(keys), chance.choice(values)) for _ in range(chance.randint(1, 4))]
    fields = [inner, *more]
    chance.shuffle(fields)
    return [_sized(request, b"{" + b",".join(fields) + b"}")]


def deep_or_huge(chance: random.Random, request: Request) -> list[bytes]:
    depth = chance.choice([100, 2000, 100_000])
    grown = chance.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'"' + b"\\u0000" * depth + b'"', b"9" * depth])
    inner = request.body[1:-1] if request.body.startswith(b"{") else b'"x":1'
    return [_sized(request, b"{" + inner + b',"x":' + grown + b"}")]


def body_flood(chance: random.Random, request: Request) -> list[bytes]:
    """Around the largest body that there may be: declared, or only sent."""
    body = request.body + b" " * (MAX_BODY + chance.choice([-1, 0, 1, 100_000]) - len(request.body))
    if chance.random() < 0.5:
        return _split(chance, _sized(request, body), 8)
    return [
        request.raw(headers=[*request.without(b"content-length"), (b"Content-Length", b"%d" % (1 << chance.randrange(20, 63)))], body=b"x")
    ]


def chunks_without_end(chance: random.Random, request: Request) -> list[bytes]:
    head = request.raw(headers=[*request.without(b"content-length"), (b"Transfer-Encoding", b"chunked")], body=b"")
    size = chance.choice([1, 1000, 65_536])
    count = min(2000, 2 * MAX_BODY // size)
    return [head, *[b"%x\r\n%b\r\n" % (size, b"[" * size) * max(1, count // 8) for _ in range(8)]]


def broken_chunks(chance: random.Random, request: Request) -> list[bytes]:
    head = request.raw(headers=[*request.without(b"content-length"), (b"Transfer-Encoding", b"chunked")], body=b"")
    rest = request.body
    parts = []
    while rest:
        size = chance.randint(1, len(rest))
        parts.append(b"%x\r\n%b\r\n" % (size, rest[:size]))
        rest = rest[size:]
    end = chance.choice(
        [b"0\r\n\r\n", b"0\r\n", b"0\r\nX: y\r\n\r\n", b"", b"-1\r\n\r\n", b"f" * 20 + b"\r\n", b"1;" + b"x" * 70_000, b"\x00\r\n"]
    )
    if parts and chance.random() < 0.5:
        where = chance.randrange(len(parts))
        parts[where] = chance.choice(
            [parts[where][:-1], b"z" + parts[where], parts[where].replace(b"\r\n", b"\n"), b"0" * 5000 + parts[where]]
        )
    return [head, *parts, end]


def cut_off(chance: random.Random, request: Request) -> list[bytes]:
    """Slow-loris: what is missing never comes."""
    raw = request.raw()
    return [raw[: chance.randrange(len(raw))]]


def in_small_pieces(chance: random.Random, request: Request) -> list[bytes]:
    return _split(chance, request.raw(), 30)


def several_at_once(chance: random.Random, request: Request) -> list[bytes]:
    """In one write, with something between them."""
    between = chance.choice([b"", b"", b"\r\n", b"\r\n\r\n", b"\x00", b"GET", b"0\r\n\r\n"])
    return [between.join([request.raw()] * chance.randint(2, 5))]


def frames(chance: random.Random, request: Request) -> list[bytes]:
    """A WebSocket that is opened, and then says nothing, or what is no frame, or no event."""
    query = chance.choice([b"", b"?model=nobody", b"?model=%00", b"?" + request.line.split(b" ")[1].partition(b"?")[2]])
    head = Request(b"GET /v1/realtime" + query + b" HTTP/1.1", [(b"Host", b"h"), *UPGRADE], b"").raw()
    said = [_frame(b"{}"), _frame(b'{"type":"session.update"}'), _frame(b'{"type":"session.update","model":"nobody"}'), _frame(b"\xff", 1),
            _frame(b"[" * 5000), _frame(b"", 9), _frame(b"x", 11), _frame(b"", 8), b"\x81\xff" + b"\xff" * 8, b"\x81\x05Hello",
            b"GET / HTTP/1.1\r\n", chance.randbytes(40)]  # fmt: skip
    return [head, *chance.sample(said, chance.randrange(4))]


def _sized(request: Request, body: bytes) -> bytes:
    return request.raw(headers=[*request.without(b"content-length"), (b"Content-Length", b"%d" % len(body))], body=body)


def _split(chance: random.Random, raw: bytes, most: int) -> list[bytes]:
    cuts = sorted(chance.randrange(len(raw)) for _ in range(chance.randint(1, most)))
    return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]


def _frame(data: bytes, opcode: int = 1) -> bytes:
    length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + b"\x00" * 4 + data  # masked with nothing


MUTATIONS: dict[str, Callable[[random.Random, Request], list[bytes]]] = {
    function.__name__.replace("_", " "): function
    for function in (
        unchanged, strange_bytes, strange_bytes_in_the_body, pieces_twice_or_gone, header_flood, strange_headers, strange_line, model_twice,
        deep_or_huge, body_flood, chunks_without_end, broken_chunks, cut_off, in_small_pieces, several_at_once, frames,
    )
}  # fmt: skip
