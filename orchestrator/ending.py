"""How the daemon ends: for good, or to become its own successor, with the engines or without; and which signal means what.

The successor is the same process (exec): systemd's main process, the terminal's job and the parent of the engines stay who they are, and
what is installed by then is what runs.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from orchestrator.drivers import systemd
from orchestrator.errors import ConfigError, OrchestratorError, StartupError

log = logging.getLogger("orchestrator")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ending:
    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.stopped = asyncio.Event()  # for good, whatever was asked for before
        self.restart = self.keep_engines = False
        self.listening: socket.socket | None = None  # what the successor is handed
        self._reload: Callable[[], Coroutine[Any, Any, Any]] | None = None
        self._reloading: set[asyncio.Task[Any]] = set()
        self._had_terminal = has_terminal()

    def stop(self) -> None:
        self.restart = self.keep_engines = False
        self.stopped.set()
        self.asked.set()

    def begin_again(self, keep_engines: bool) -> None:
        """The first word counts, but that a stop is one always."""
        if not self.asked.is_set():
            self.restart, self.keep_engines = True, keep_engines
            self.asked.set()

    def heed_signals(self) -> None:
        """Those that a former self held back come now."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def reload_by(self, reload: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._reload = reload

    def become_next(self) -> NoReturn:
        """Raises StartupError where what is to run is not there any more."""
        if self.listening is not None:
            systemd.hand_over(self.listening)
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError as error:
            raise StartupError(f"{sys.executable}: {error.strerror}: the daemon can not be started again") from None

    def _hang_up(self) -> None:
        """SIGHUP is a reload, as for other daemons; but the kernel sends it, too, when a terminal is closed: then that is gone."""
        if self._had_terminal and not has_terminal():
            self.stop()
        elif self._reload is None or self.asked.is_set():
            log.warning("SIGHUP: not now: the daemon is being started or ended")
        else:
            task = asyncio.ensure_future(self._reload())
            self._reloading.add(task)
            task.add_done_callback(self._reloaded)

    def _reloaded(self, task: "asyncio.Task[Any]") -> None:
        self._reloading.discard(task)
        if task.cancelled() or (error := task.exception()) is None or isinstance(error, ConfigError):  # a ConfigError was told
            return
        if isinstance(error, OrchestratorError):
            log.error("not reloaded, nothing is changed: %s", error)
        else:
            log.error("the reload failed", exc_info=error)


def has_terminal() -> bool:
    """A controlling one: a session loses it when it is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
