"""Who may rule. Over TCP, whoever bears the admin key; over the admin socket, root, the daemon's own user and the members of one group.

The socket is open to all (0666) and this is the gate: a socket that the kernel shuts says nothing but EACCES, and a daemon that is not
root could not give it to a group that it is not in. Credentials are those of the moment of connect(), also of groups.
"""

import hmac
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from orchestrator.api.connection import CLIENT
from orchestrator.errors import Forbidden

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python does not name it
GROUPS_BYTES = 1024  # the most that Python's getsockopt takes: 256 groups


@dataclass(frozen=True)
class Group:
    name: str
    gid: int


class Peers:
    def __init__(self, group: Group | None) -> None:
        self._group = group

    async def check(self, request: Request) -> None:
        """Raises Forbidden, which says who may."""
        connection = request.scope["extensions"][CLIENT].get_extra_info("socket")
        _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid in (0, os.geteuid()) or (self._group and self._group.gid in {gid, *_groups(connection)}):
            return
        members = f"members of the group {self._group.name!r}" if self._group else "nobody else, as admin.group names no group"
        join = f": `sudo usermod -aG {self._group.name} $USER`, then log in again" if self._group else ""
        raise Forbidden(f"The admin socket is for root, the daemon's own user (uid {os.geteuid()}) and {members}; you are uid {uid}{join}.")


def bears(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), key.encode())


def _groups(connection: Any) -> tuple[int, ...]:
    try:
        given = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES)
    except OSError:  # more than 256: only the first counts
        return ()
    return struct.unpack(f"{len(given) // 4}I", given)
