"""The admin API as a script: what each call answers, and which states a watch shows, in the order the test wrote them.

Serves HTTP/1.1 with chunked streams, as the daemon does, on a unix socket or a TCP port of this process. A step HANG
keeps a stream open and silent until the test ends; a step that is an Event waits for the test to set it.
"""

import itertools
import json
import socketserver
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

Json = dict[str, Any]
GIB, MIB = 1 << 30, 1 << 20
HANG = threading.Event()  # never set: told apart by identity
CUT = object()  # the daemon dies here: the stream ends without its last chunk


@dataclass
class Request:
    method: str
    path: str  # as sent, still percent-encoded
    headers: dict[str, str]
    body: Any


@dataclass
class Reply:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


def error(status: int, message: str, code: str | None = None, **more: Any) -> Reply:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code, **more}
    return Reply(status, {"error": body})


def model(name: str = "qwen", state: str = "ready", **more: Any) -> Json:
    """A Model object with all fields; a state with an engine has one, and a pool where it has memory."""
    running = state in ("starting", "ready", "asleep", "waking", "draining", "stopping")
    return {
        "name": name,
        "source": "Qwen/Qwen2.5-7B-Instruct",
        "aliases": ["q"],
        "owner": "api",
        "state": state,
        "since_s": 0.0,
        "reason": "",
        "held": False,
        "in_flight": 0,
        "waiting": 0,
        "idle_s": None,
        "spec": {
            "name": name,
            "kv_floor": 2 * GIB,
            "idle_timeout": 1800.0,
            "pinned": False,
            "env": {"HF_TOKEN": "hf_x", "A": "1"},
        },
        "engine": engine() if running else None,
        "pool": pool() if state in ("ready", "draining") else None,
        "failure": None,
        "footprint": None,
        **more,
    }


def engine(phase: str = "serving", index: int = 4, count: int = 5, **more: Any) -> Json:
    return {
        "launch_id": "a1b2",
        "pid": 4242,
        "ipc_name": "orch-qwen-a1b2",
        "socket": "/run/o/qwen.sock",
        "log": "/var/log/o/qwen.log",
        "phase": phase,
        "phase_index": index,
        "phase_count": count,
        "gpus": ["GPU-0a"],
        "gpu_indexes": [0],
        "gpu_bytes": 17 * GIB,
        "up_s": 312.0,
        "expected_start_s": 41.0,
        **more,
    }


def pool(**more: Any) -> Json:
    return {
        "limit_bytes": 20 * GIB,
        "used_bytes": 640 * MIB,
        "prealloc_bytes": 64 * MIB,
        "floor_bytes": 2 * GIB,
        "ceiling_bytes": 60 * GIB,
        "bundle_bytes": 56 * MIB,
        "status": "applied",
        "reason": "",
        **more,
    }


def failure(**more: Any) -> Json:
    return {
        "reason": "out of memory",
        "log": ["loading", "\x1b[31mCUDA OOM\x1b[0m"],
        "count": 2,
        "retry_in_s": 8.0,
        **more,
    }


def gpu(index: int = 0, **more: Any) -> Json:
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H200",
        "total_bytes": 140 * GIB,
        "used_bytes": 50 * GIB,
        "free_bytes": 90 * GIB,
        "reserve_bytes": 2 * GIB,
        "foreign_bytes": 10 * GIB,
        "fixed_bytes": 34 * GIB,
        "claims_bytes": 0,
        "kv_used_bytes": 6 * GIB,
        "kv_limit_bytes": 80 * GIB,
        "pool_bytes": 88 * GIB,
        "age_s": 0.1,
        "error": None,
        **more,
    }


def line(what: str, amount: int, of: str | None = None, who: str | None = None, why: str = "because") -> Json:
    return {"what": what, "who": who, "model": of, "bytes": amount, "why": why}


def explained(index: int = 0, **more: Any) -> Json:
    """A GPU of `explain`: 140 GiB, of which qwen has 54, night is promised 9, and alice holds 10."""
    return {
        "index": index,
        "uuid": f"GPU-{index}a-beef",
        "name": "NVIDIA H200",
        "error": None,
        "total_bytes": 140 * GIB,
        "lines": [
            line("reserve", 2 * GIB, why="kept free"),
            line("foreign", 10 * GIB, who="alice: python3 (pid 4711)", why="not ours"),
            line("fixed", 34 * GIB, "qwen", why="weights and context"),
            line("kv", 20 * GIB, "qwen", why="KV it has mapped"),
            line("claim", 9 * GIB, "night", why="it is starting"),
            line("room", 65 * GIB, why="free for KV to grow into"),
        ],
        "pool_bytes": 85 * GIB,
        "pools": [explained_pool()],
        **more,
    }


def explained_pool(**more: Any) -> Json:
    return {
        "model": "qwen",
        "launch_id": "a1b2",
        **pool(reason="it needs more"),
        "target_bytes": 24 * GIB,
        "demand_bytes": 22 * GIB,
        "charge_bytes": 20 * GIB,
        "weight": 2.0,
        "change": "alice's memory coming back",
        **more,
    }


def status(**more: Any) -> Json:
    return {
        "version": "0.1.0",
        "pid": 812,
        "uptime_s": 7380.0,
        "listen": "http://0.0.0.0:8000",
        "admin_socket": "/run/o/admin.sock",
        "gpu_source": "nvml",
        "config": ["/etc/o/o.yaml"],
        "state_dir": "/var/lib/o",
        "models": {"ready": 2, "stopped": 1, "failed": 0},
        "gpus": [gpu()],
        "loop": {"ticks": 12, "last_ms": 1.25, "errors": 0},
        **more,
    }


class StubDaemon:
    """`models` answer ls and describe, `gpus` explain, `watches` a watch, `logs` an engine's output, `merged` that of several.

    `replies` override any call. `looks` are the loop's ticks, one for each question for the status; two after its bounds
    were changed a model has become `limited`.
    """

    def __init__(self, server: socketserver.BaseServer) -> None:
        self.models: list[Json] = []
        self.gpus: list[Json] = [explained()]
        self.limited: Json | None = None
        self.looks: Iterator[int] = itertools.count(13)
        self._ticks = 12
        self._limited_at: int | None = None
        self.watches: dict[str, list[object]] = {}
        self.logs: dict[str, list[object]] = {}
        self.merged: list[object] = []
        self.replies: dict[tuple[str, str], Reply] = {}
        self.requests: list[Request] = []
        self.over = threading.Event()
        self._server = server
        server.stub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sent(self, method: str) -> Request:
        """The one request with this method."""
        (found,) = [each for each in self.requests if each.method == method]
        return found

    def answer(self, request: Request) -> Reply | Iterable[object]:
        """A Reply, or the steps of a stream."""
        path = urlsplit(request.path).path.removeprefix("/api/v1")
        if reply := self.replies.get((request.method, path)):
            return reply
        if path == "/status":
            self._ticks = next(self.looks)
            return Reply(200, status(loop={"ticks": self._ticks, "last_ms": 1.25, "errors": 0}))
        if path == "/logs":
            return self.merged
        if path == "/explain":
            return Reply(200, {"gpus": self.gpus})
        if path == "/models":
            return Reply(201, model(request.body["name"], "stopped")) if request.method == "POST" else Reply(200, {"models": self.models})
        name, _, verb = path.removeprefix("/models/").partition("/")
        return self._about(unquote(name), verb, request.method)

    def _about(self, name: str, verb: str, method: str) -> Reply | Iterable[object]:
        if verb == "watch" and name in self.watches:
            return self.watches[name]
        if verb == "logs" and name in self.logs:
            return self.logs[name]
        known = [each for each in self.models if name in (each["name"], *each["aliases"])]
        if not known:
            return error(404, f"the model {name!r} does not exist", "model_not_found")
        if verb == "limit":
            self._limited_at = self._ticks + 2
            return Reply(200, known[0])
        if self.limited is not None and self._limited_at is not None and self._ticks >= self._limited_at:
            return Reply(200, self.limited)
        return Reply(200 if method == "GET" else 202, known[0])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        stub: StubDaemon = self.server.stub  # type: ignore[attr-defined]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        request = Request(self.command, self.path, dict(self.headers.items()), body)
        stub.requests.append(request)
        answer = stub.answer(request)
        try:
            if isinstance(answer, Reply):
                self._reply(answer)
            else:
                self._stream(answer, stub)
        except ConnectionError:
            self.close_connection = True  # the client has left: Ctrl-C, --timeout, `| head`

    def _reply(self, reply: Reply) -> None:
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **reply.headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, steps: Iterable[object], stub: StubDaemon) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in steps:
            if step is HANG:
                stub.over.wait()
            elif step is CUT:
                self.close_connection = True
                return
            elif isinstance(step, threading.Event):
                step.wait(60)
            else:
                data = step.encode() if isinstance(step, str) else json.dumps(step).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class TcpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
