"""The sockets that the daemon listens on. Whoever cannot have one is told why: StartupError."""

import contextlib
import errno
import grp
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StartupError


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def loopback_of(host: str) -> str:
    """This machine's own address, of the same family."""
    return "::1" if ":" in host else "127.0.0.1"


def listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        what = {errno.EADDRINUSE: "is in use by another program", errno.EACCES: "needs privileges (ports below 1024)"}
        why = what.get(error.errno or 0, str(error.strerror))
        raise StartupError(f"listen: {host}:{port} {why}: stop that, or set listen.port (ORCH_LISTEN__PORT)") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """The runtime folder's lock is held, so a socket file that lies there belongs to a dead daemon. Anything else is not ours to remove.

    Every user may connect: who may do more than that is asked on each connection (api/peers.py)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            if path.is_socket():
                path.unlink()
            sock.bind(str(path))
            path.chmod(0o666)
        except OSError as error:
            raise StartupError(f"admin.socket: {path}: {error.strerror or error}") from None
        sock.listen(128)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def group(name: str | None, default: str) -> tuple[str, int] | None:
    """Name and gid; of `default`, if there is one, where no name is given."""
    try:
        found = grp.getgrnam(name or default)
    except KeyError:
        if name is None:
            return None
        raise StartupError(f"admin.group: there is no group {name!r} here: `sudo groupadd {name}` makes it, or name another one") from None
    return found.gr_name, found.gr_gid
