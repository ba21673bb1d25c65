"""A model hub of this process, on a port of its own: what huggingface_hub asks for, with ranges, and faults that the test chooses.

`hold`: after so many bytes of a large file its answers wait until `go` is set, so that a test can end the download in the middle.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
PIECE = 1 << 16


class Hub:
    def __init__(self, files: Mapping[str, bytes], name: str = "org/tiny") -> None:
        self.files, self.name = dict(files), name
        self.hold: int | None = None
        self.go, self.held = threading.Event(), threading.Event()
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.01), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def loads(self, file: str) -> list[str]:
        """The ranges of the downloads of a file; "" for one of the whole."""
        return [asked for method, path, asked in self.asked if method == "GET" and path.endswith(f"/{file}")]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.refusal:
            status, code = self.hub.refusal
            return self._answer(status, b'{"error":"no"}', {"X-Error-Code": code})
        if path.startswith(f"/api/models/{self.hub.name}"):
            return self._answer(200, json.dumps(self._info()).encode(), {"Content-Type": "application/json"})
        file = path.partition("/resolve/")[2].partition("/")[2]
        if not path.startswith(f"/{self.hub.name}/") or file not in self.hub.files:
            code = "EntryNotFound" if path.startswith(f"/{self.hub.name}/") else "RepoNotFound"
            return self._answer(404, b"{}", {"X-Error-Code": code})
        data, begin = self.hub.files[file], 0
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
        more = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if asked else {}
        self._answer(206 if asked else 200, data[begin:], {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, **more})
        return None

    def _info(self) -> dict[str, object]:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": "0" * 40,
                "lfs": {"sha256": _digest(data), "size": len(data), "pointerSize": 1},
            }
            for name, data in self.hub.files.items()
        ]
        return {"id": self.hub.name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self._send(body)
        except ConnectionError:
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        for at in range(0, len(body), PIECE):
            if self.hub.hold is not None and at >= self.hub.hold and not self.hub.go.is_set():
                self.hub.held.set()
                self.hub.go.wait(60)
            self.wfile.write(body[at : at + PIECE])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
