"""A process that stands between an experiment and one static engine, so that the engine never outlives it, however it ends.

`python -m orchestrator.experiments.keeper FD NAME` (a name for `ps`): reads one line of JSON from FD, starts the engine in a session of
its own, answers with its pid, and with how it ended where it ends by itself. When the other side closes FD, and a killed process closes
all it has, the whole session is ended: SIGTERM, then SIGKILL until nobody is left (an EngineCore outlives its API server); the private
folder is removed. Signals for the terminal pass it by.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.drivers import processes
from orchestrator.drivers.processes import Child, Process

POLL_S = 0.1
AGAIN_S = 1.0
LAST_S = 30.0  # SIGKILL takes milliseconds, 4 s where a driver unmaps a whole card; what it does not end hangs in the kernel


def main(fd: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        processes.adopt_orphans()
    with socket.socket(fileno=fd) as channel:
        order = _order(channel)
        try:
            if order is not None:
                _keep(channel, order)
        finally:
            shutil.rmtree(order["folder"] if order else "", ignore_errors=True)


def _keep(channel: socket.socket, order: dict[str, Any]) -> None:
    try:
        process, child = processes.spawn(order["argv"], order["env"], Path(order["log"]))
    except OSError as error:
        _say(channel, {"error": f"{error.strerror}: {order['argv'][0]}"})
        return
    try:
        _say(channel, {"pid": process.pid, "create_time": process.create_time})
        _until_over(channel, child)
    finally:
        end(process, child, float(order["grace_s"]))


def _until_over(channel: socket.socket, child: Child) -> None:
    """Until the other side is gone. An engine that ends before that is told, and waits for it, too."""
    told = False
    while not select.select([channel], [], [], POLL_S)[0] or channel.recv(1):
        if not told and (code := child.poll()) is not None:
            told = True
            _say(channel, {"ended": processes.how_it_ended(code)})


def end(process: Process, child: Child | None, grace_s: float) -> None:
    """Returns when nobody of the session is left, or LAST_S after SIGKILL. `child`: its leader, where that is ours to bury."""
    began = time.monotonic()
    number, sent_at = signal.SIGTERM, float("-inf")
    while processes.members(process) or (child is not None and child.poll() is None):
        processes.reap()
        now = time.monotonic()
        if number is signal.SIGTERM and now - began >= grace_s:
            number, sent_at = signal.SIGKILL, float("-inf")
        if now - began > grace_s + LAST_S:
            return
        if now - sent_at >= (AGAIN_S if number is signal.SIGKILL else grace_s + LAST_S):
            processes.signal_session(process, number)
            sent_at = now
        time.sleep(POLL_S / 2)


def _order(channel: socket.socket) -> dict[str, Any] | None:
    """None where the other side went before it had said it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = channel.recv(1 << 16)
        if not part:
            return None
        line += part
    order: dict[str, Any] = json.loads(line)
    return order


def _say(channel: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other side is gone: seen at the next look
        channel.sendall(json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    os.umask(0o077)
    main(int(sys.argv[1]))
