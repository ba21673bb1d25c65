"""HTTP/1.1 as orchestratorctl needs it: one connection, one request, one answer, read whole or line by line.

The standard library's client would cost each start 25 ms, most of it the email parser. A body ends as RFC 9112 says: with its last chunk,
after its length, or with the connection; one that ends before that is `Cut`.
"""

import socket
from collections.abc import Iterator, Mapping

LONGEST_LINE = 64 * 1024
MOST_HEADERS = 200


class NotHttp(Exception):
    """What answers there speaks something else."""


class Cut(ConnectionError):
    """The connection ended before the answer did."""


class Connection:
    """To a unix socket's path, or to (host, port); `timeout`: seconds that the connect may take. Raises OSError."""

    def __init__(self, address: str | tuple[str, int], timeout: float) -> None:
        if isinstance(address, tuple):
            self.host = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
            self.socket = socket.create_connection(address, timeout)
            return
        self.host = "localhost"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout)
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> "Response":
        """Sends, and returns with the head of the answer. Raises OSError, NotHttp."""
        if not path.isascii() or any(each <= " " for each in path):
            raise NotHttp(f"{path!r} cannot be asked for")
        lines = {"Host": self.host, "Connection": "close", **headers}
        if body is not None:
            lines["Content-Length"] = str(len(body))
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""])
        self.socket.sendall(head.encode("latin-1") + (body or b""))
        return Response(self.socket)

    def close(self) -> None:
        self.socket.close()


class Response:
    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")
        self.status, self.headers = self._head()
        while self.status < 200:  # 100, 103: the answer follows
            self.status, self.headers = self._head()
        self._pieces = self._body()
        self._rest = b""

    def read(self) -> bytes:
        """All that is left of the body."""
        rest, self._rest = self._rest, b""
        return rest + b"".join(self._pieces)

    def line(self) -> bytes:
        """The next line with its end; b"" after the last."""
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            piece = next(self._pieces, None)
            if piece is None:
                self._rest = b""
                return b"".join(parts)
            parts.append(piece)
        line, end, self._rest = b"".join(parts).partition(b"\n")
        return line + end

    def close(self) -> None:
        self._file.close()

    def _head(self) -> tuple[int, dict[str, str]]:
        words = self._line().split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise NotHttp(repr(words))
        headers: dict[str, str] = {}
        while text := self._line().decode("latin-1").strip():
            name, colon, value = text.partition(":")
            if not colon or len(headers) >= MOST_HEADERS:
                raise NotHttp(repr(text[:60]))
            headers[name.strip().lower()] = value.strip()
        return int(words[1]), headers

    def _body(self) -> Iterator[bytes]:
        """As it comes: a chunk of a stream is told when it is there."""
        if self.status in (204, 304):
            return
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := self._size():
                yield self._exactly(size)
                self._line()
            while self._line().strip():  # trailers
                pass
        elif length := self.headers.get("content-length"):
            if not length.isdigit():
                raise NotHttp(f"Content-Length: {length[:60]}")
            yield self._exactly(int(length))
        else:
            while data := self._file.read1(LONGEST_LINE):
                yield data

    def _size(self) -> int:
        text = self._line().partition(b";")[0].strip()
        try:
            return int(text, 16)
        except ValueError:
            raise NotHttp(f"a chunk of {text[:60]!r} bytes") from None

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise Cut("the connection ended within the answer")
        return data

    def _line(self) -> bytes:
        line = self._file.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise NotHttp(repr(line[:60]))
        if not line.endswith(b"\n"):
            if line:
                raise NotHttp(repr(line[:60]))
            raise Cut("the connection ended")
        return line
