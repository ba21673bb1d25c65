"""sd_notify: tell systemd READY, STATUS, STOPPING, and feed its watchdog. Does nothing where systemd did not start us."""

import contextlib
import os
import socket


def notify(message: str) -> bool:
    """Send e.g. "READY=1" or "WATCHDOG=1\\nSTATUS=3 models ready". True if it was sent."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(message.encode())
        return True
    return False
