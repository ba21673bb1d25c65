"""`python -m orchestrator.engine.simulator [vLLM's arguments]`: bind, fork EngineCore, wait until it is ready, serve.

The socket is bound first and listened on last, as in vLLM: until then a connection is refused. EngineCore is forked
before any event loop or thread exists, and while it loads, this process imports its HTTP server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from .args import EngineArgs, parse_args
from .console import Console
from .core import run_core
from .environment import Environment
from .shapes import load_shape

VERSION = "0.24.0"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    args = parse_args(sys.argv[1:])
    console = Console("APIServer")
    try:
        env = Environment.read()
        console.info("api_utils.py:339", f"vLLM server version {VERSION}, serving model {args.model}")
        console.info("api_utils.py:273", f"non-default args: {args.non_default}")
        shape = load_shape(args.model)
        listener = _bind(args)
    except Exception as error:
        console.failure(error)
        return 1
    ours, theirs = socket.socketpair()
    # Held back until each process has its handlers: a signal in between would leave EngineCore alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    core = os.fork()
    if core == 0:
        ours.close()
        listener.close()
        os._exit(run_core(args, shape, env, theirs))
    theirs.close()
    return _serve(args, env, listener, ours, core, console)


def _serve(args: EngineArgs, env: Environment, listener: socket.socket, channel: socket.socket, core: int, console: Console) -> int:
    _end_while_loading(core, env, console)
    from .serving import Serving, end_core

    hello = _await_ready(channel)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if hello is None:
        error = RuntimeError(
            f"Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': {end_core(core)}}}"
        )
        console.failure(error)
        return 1
    return Serving(args, env, core, hello).run(listener, channel)


def _bind(args: EngineArgs) -> socket.socket:
    """A stale file of --uds makes this fail, and two servers on one port both succeed: as in vLLM."""
    if args.uds:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(args.uds)
        return listener
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((args.host, args.port))
    return listener


def _end_while_loading(core: int, env: Environment, console: Console) -> None:
    def end(*_: object) -> None:
        if "orphan_core" not in env.faults:
            with contextlib.suppress(ProcessLookupError):
                os.kill(core, signal.SIGTERM)
                os.waitpid(core, 0)
        console.line("KeyboardInterrupt: terminated")
        os._exit(130)

    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN if "ignore_sigterm" in env.faults else end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _await_ready(channel: socket.socket) -> dict[str, Any] | None:
    """EngineCore's first line, or None when it ended without one. Read byte by byte: the rest belongs to the client."""
    line = bytearray()
    while not line.endswith(b"\n"):
        try:
            byte = channel.recv(1)
        except OSError:
            return None
        if not byte:
            return None
        line += byte
    hello: dict[str, Any] = json.loads(line)
    return hello


if __name__ == "__main__":
    sys.exit(main())
