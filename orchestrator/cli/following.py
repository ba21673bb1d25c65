"""-f: a stream of the daemon that outlives its restarts, for `events` and `logs`.

Each object says where its reader stands; who was cut off asks anew from there, so nothing is lost and nothing comes twice.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from orchestrator.cli import screen
from orchestrator.cli.exits import CliError, Json

if TYPE_CHECKING:
    from orchestrator.cli.client import Client

SILENT_S = 45.0  # the daemon says something each 15 s
AGAIN_S = 0.5


def followed(client: "Client", path: Callable[[], str], begun: bool = False) -> Iterator[Json]:
    """The objects of `path()`, which is asked again whenever the daemon was away. Raises CliError where it will not have us, and where it
    is not there at the first time, unless what follows has `begun` already."""
    while True:
        try:
            with client.open("GET", path()) as answer:
                begun = True
                while (found := answer.object_line(SILENT_S)) is not None:
                    yield found
        except (CliError, TimeoutError) as fault:
            if not begun or (isinstance(fault, CliError) and not fault.is_away):
                raise
        screen.err("the daemon is away; waiting for it")
        _until_back(client)
        screen.err("the daemon is back")


def _until_back(client: "Client") -> None:
    while True:
        try:
            client.get("/status")
        except CliError as fault:
            if not fault.is_away:
                raise
            time.sleep(AGAIN_S)
        else:
            return
