"""Exit codes, a contract with scripts, and the error that carries one.

The numbers follow what scripts know already: 2 is click's, 3 is LSB `status`, 69, 75 and 78 are sysexits.h, 124 is
timeout(1), 130 and 141 are 128 + the signal. Only `CliError` and click's own errors leave a verb; main.py turns both
into a code.
"""

import shlex
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

OK = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3
NOT_FOUND = 4
DENIED = 5
UNREACHABLE = 69
BUSY = 75
CONFIG = 78
TIMED_OUT = 124
INTERRUPTED = 130
PIPE_CLOSED = 141

MEANINGS = {
    OK: "done",
    FAILED: "the operation failed (a start failed, a name is taken, the model belongs to the config file)",
    USAGE: "wrong usage: an unknown option, a value that cannot be",
    NOT_RUNNING: "the model is not running",
    NOT_FOUND: "no such model",
    DENIED: "no permission on the socket, or no valid admin key",
    UNREACHABLE: "no daemon answers",
    BUSY: "busy, or no room now: try again later",
    CONFIG: "the daemon refused the spec",
    TIMED_OUT: "--timeout passed; the daemon goes on",
    INTERRUPTED: "Ctrl-C; the daemon goes on",
    PIPE_CLOSED: "the reader of the output left (`| head`)",
}


class CliError(Exception):
    """What went wrong, for people (`message`, then `lines`) and for scripts (`exit_code`, and `body` under --json)."""

    def __init__(self, message: str, exit_code: int, *, code: str, lines: Sequence[str] = (), body: Json | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.lines = tuple(lines)
        self.body: Json = {"message": message, "type": "cli_error", "param": None, "code": code, **(body or {})}

    @property
    def is_away(self) -> bool:
        """No daemon answers, or it says that it ends or begins: what follows it waits for the next one."""
        return self.exit_code in (UNREACHABLE, BUSY)


class DeadlinePassed(Exception):
    """The --timeout of this call is over. The verb that set it says what goes on without us."""


def hint(verb: str, *names: str) -> str:
    """A command that can be copied as it stands."""
    return f"`{' '.join(['orchestratorctl', verb, *map(shlex.quote, names)])}`"
