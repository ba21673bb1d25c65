"""What systemd and its services say to each other: READY, RELOADING, STATUS, the watchdog's food (sd_notify), and sockets handed over.

Does nothing where systemd did not start us. A daemon that becomes its successor (exec) hands over its listening socket in the same way
(LISTEN_FDS): the kernel keeps who connects meanwhile.
"""

import contextlib
import os
import socket
import time

FIRST_FD = 3  # sd_listen_fds(3)


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


def reloading(status: str) -> bool:
    """READY=1 must follow, whatever comes of it. The time tells the manager (Type=notify-reload) which reload it is."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}\nSTATUS={status}")


def handed_socket() -> socket.socket | None:
    """The listening socket that was handed over to this very process. Once: whoever is started from here has none."""
    given, to = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if to != str(os.getpid()) or not given.isdecimal() or int(given) < 1:
        return None
    try:
        sock = socket.socket(fileno=FIRST_FD)
    except OSError:
        return None
    sock.set_inheritable(False)
    return sock


def hand_over(sock: socket.socket) -> None:
    """To what this process becomes by exec; nothing may be opened or closed in between."""
    os.dup2(sock.fileno(), FIRST_FD)
    os.set_inheritable(FIRST_FD, True)  # dup2 leaves one alone that is itself
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
