"""The process that engines are forked from: it has imported what they need, holds no GPU, and waits for launches.

    <engine python> launch_server.py --kind vllm|simulated --fd N

N is a SEQPACKET socket to the daemon. First message: what was imported, or {"error"}. Then, for each {"id", "argv", "env"} with two
descriptors, the engine's log and a pipe, {"id", "pid"} or {"id", "error"}. The daemon's end of the socket closed: the end. Engines
live on: each is a session of its own, and no child of this process but of the daemon, which alone buries it and learns how it ended.
"""

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing.process
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

MESSAGE_BYTES = 1 << 20


@dataclass
class Engine:
    """What is forked here: `refresh` sets anew what imports froze, `run` is its whole life."""

    versions: dict[str, str]
    refresh: Callable[[], None]
    run: Callable[[], int | None]


def _vllm() -> Engine:
    serve, preloaded = (importlib.import_module(name) for name in ("serve", "preloaded"))  # beside this file
    return Engine(preloaded.load(), preloaded.refresh, serve.main)


def _simulated() -> Engine:
    simulator, _ = (importlib.import_module(f"orchestrator.engine.simulator.{name}") for name in ("__main__", "serving"))
    return Engine({"simulated": simulator.VERSION}, lambda: None, simulator.main)


KINDS = {"vllm": _vllm, "simulated": _simulated}


def main() -> int | None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()
    control = socket.socket(fileno=options.fd)
    control.set_inheritable(False)
    given = dict(os.environ)
    titles = _titles()
    began = time.monotonic()
    try:
        engine = KINDS[options.kind]()
    except BaseException as error:
        traceback.print_exc()  # into the log, before the daemon can end us
        _say(control, {"error": f"{type(error).__name__}: {error}"})
        return 1
    imports_set = {key: value for key, value in os.environ.items() if given.get(key) != value}
    gc.collect()
    gc.freeze()  # a collection would write to every object, and what is written is no longer shared
    _say(control, {"versions": engine.versions, "import_s": round(time.monotonic() - began, 2), "threads": _threads()})
    launch = _wait(control)
    if launch is None:
        return 0
    os.environ.clear()
    os.environ.update(imports_set | launch["env"])
    sys.argv = launch["argv"][2:] if launch["argv"][1] == "-m" else launch["argv"][1:]
    titles(" ".join(launch["argv"]))
    multiprocessing.process.current_process().authkey = os.urandom(32)
    engine.refresh()
    return engine.run()


def _wait(control: socket.socket) -> dict[str, Any] | None:
    """Serve until the daemon is gone: None. In each forked engine: its launch."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 2)
        if not message:
            return None
        launch: dict[str, Any] = {}
        try:
            launch = json.loads(message)
            log, go = fds
            pid = _fork(control, log, go)
            if pid == 0:
                return launch
            answer = {"id": launch["id"], "pid": pid}
        except Exception as error:
            answer = {"id": launch.get("id"), "error": f"{type(error).__name__}: {error}"}
        for fd in fds:
            os.close(fd)
        try:
            _say(control, answer)
        except OSError:
            return None


def _fork(control: socket.socket, log: int, go: int) -> int:
    """A process of nobody's here that waits for its byte; its pid. 0 in that process, once it may run.

    Twice forked: what is in between ends at once, and the kernel gives the inner one to the daemon, as a child of its own.
    """
    hears, tells = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)  # C++ has buffers of its own, and each fork would write them again
    try:
        between = os.fork()
    except OSError:
        os.close(hears)
        os.close(tells)
        raise
    if between:
        os.close(tells)
        os.waitpid(between, 0)
        with open(hears, "rb") as pipe:
            pid = pipe.read()
        if not pid:
            raise ChildProcessError("the process ended before it could say its pid")
        return int(pid)
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.write(tells, str(os.getpid()).encode())
        for fd in (hears, tells, log):
            os.close(fd)
        control.close()
        if os.read(go, 1) != b"g":
            os._exit(0)  # nobody wants it any more
        os.close(go)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    except BaseException as error:
        os.write(2, f"a forked engine could not begin: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    return 0


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    control.send(json.dumps(message).encode())


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _titles() -> Callable[[str], None]:
    """What sets the line that ps shows. vLLM's engines name themselves with setproctitle, and only its first call finds the place."""
    try:
        setproctitle: ModuleType = importlib.import_module("setproctitle")
    except ImportError:
        return _overwrite_arguments
    setproctitle.getproctitle()
    title: Callable[[str], None] = setproctitle.setproctitle
    return title


def _overwrite_arguments(title: str) -> None:
    """Over the arguments, and the environment behind them, which os.environ has moved elsewhere by now."""
    places = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, arguments_end, _, end = map(int, places[45:49])  # proc(5): arg_start, arg_end, env_start, env_end
    text = title.encode()[: end - begin - 1].ljust(arguments_end - begin, b" ")  # no 0 where they ended: the kernel reads on
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))


if __name__ == "__main__":
    sys.exit(main())
