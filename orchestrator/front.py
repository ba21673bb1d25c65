"""Where users reach us: where the settings say, but on loopback alone as long as anybody there would be served without a key."""

import logging
import socket

from orchestrator.api.server import Server
from orchestrator.control.keys import Keys
from orchestrator.drivers import sockets
from orchestrator.errors import StartupError

log = logging.getLogger("orchestrator")


class Front:
    def __init__(self, host: str, port: int, keys: Keys, handed: socket.socket | None = None) -> None:
        """`handed`: a listening socket from whoever was here before; taken where it listens at the right place. Raises StartupError."""
        self._wanted = host
        self.is_narrow = not sockets.is_loopback(host) and not keys.needed and keys.required != "never"
        self.server: Server | None = None
        where = sockets.loopback_of(host) if self.is_narrow else host
        if handed is not None and not _listens_at(handed, where, port):
            handed.close()
            handed = None
        self._listen(where, port, handed)

    async def widen(self) -> None:
        """A key was made. Connections that are open stay."""
        if not self.is_narrow or self.server is None:
            return
        self.server.stop_listening()  # the kernel gives no port of all addresses while somebody listens on it at one
        for host in (self._wanted, sockets.loopback_of(self._wanted)):
            try:
                self._listen(host, self.port)
            except StartupError as error:  # the key is made all the same
                log.error("not listening on %s: %s; the next key, or a restart, tries again", host, error)
                continue
            self.is_narrow = host != self._wanted
            log.info("there is an API key now: listening on %s", self.url)
            await self.server.startup([self.socket])
            return

    def kept(self) -> socket.socket:
        """The same socket once more: it goes on to listen when the server has closed its own."""
        return self.socket.dup()

    def _listen(self, host: str, port: int, handed: socket.socket | None = None) -> None:
        """Raises StartupError."""
        self.socket = handed or sockets.listen(host, port)
        self.port, self.url = self.socket.getsockname()[1], sockets.url_of(self.socket)


def _listens_at(sock: socket.socket, host: str, port: int) -> bool:
    try:
        (_, _, _, _, wanted), *_ = socket.getaddrinfo(host, port, sock.family, socket.SOCK_STREAM)
        at = sock.getsockname()
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1 and at[0] == wanted[0] and port in (0, at[1])
    except OSError:
        return False
