"""The daemon that is fuzzed, with one simulated engine, and what it holds: nothing of a request may stay there when it is over.

Its patience is made short, so that a connection that says nothing more is closed in a second and not in a minute.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.e2e.running import Daemon, eventually
from tests.fuzz.requests import MAX_BODY

PATIENCE_S = 0.5
HASTE = f"""
from orchestrator.api import connection, realtime, server
connection.SLOW_S = connection.KEEP_ALIVE_S = realtime.SILENCE_S = {PATIENCE_S}
connection.LINGER_S, server.TICK_S, server.KEEP_ALIVE_S = 0.2, 0.1, {PATIENCE_S}
"""
GROWTH_BYTES = 24 << 20  # of the daemon's memory, once it has seen a few hundred of each
UTF8 = "Invalid UTF-8 sequence received from client"  # uvicorn shows where it saw it, and closes with 1007: no fault
SPARE_FDS = 100  # connections to its engine, which it keeps for the next requests


class Ground:
    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.model = daemon, daemon.name("m")
        engine = daemon.add(self.model, "--env", "VLLM_ENABLE_RESPONSES_API_STORE=1", "--env", "SIM_STEP_S=0.0005")["engine"]
        self._engine_pid = engine["pid"]
        assert daemon.process is not None
        self._process = psutil.Process(daemon.process.pid)
        self.url = daemon.url.removesuffix("/v1")
        address = urlsplit(self.url)
        self.address = (str(address.hostname), int(address.port or 0))
        self._fds = self._process.num_fds()

    @property
    def rss_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def until_at_rest(self) -> None:
        """Raises AssertionError with what it still holds."""
        held: dict[str, int] = {}

        def nothing() -> bool:
            model = self.daemon.model(self.model)
            clients = [one for one in self._process.net_connections("tcp") if one.laddr[1] == self.address[1] and one.status != "LISTEN"]
            spare = max(0, self._process.num_fds() - self._fds - SPARE_FDS)
            held.update(in_flight=model["in_flight"], waiting=model["waiting"], clients=len(clients), fds=spare)
            return not any(held.values())

        try:
            eventually(nothing, "nothing is held any more")
        except AssertionError:
            raise AssertionError(f"it still holds {held}") from None
        records = re.split(r"^(?=\d{4}-\d\d-\d\d )", self.daemon.log.read_text(), flags=re.MULTILINE)
        faults = [record for record in records if "Traceback" in record and UTF8 not in record]
        assert not faults, "".join(faults[:3])
        engine = self.daemon.model(self.model)["engine"]
        assert engine is not None
        assert engine["pid"] == self._engine_pid, "its engine died"


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True) as folder:
        daemon = Daemon(Path(folder), HASTE, ORCH_REQUESTS__MAX_BODY=str(MAX_BODY), PYTHONFAULTHANDLER="1", TZ=os.environ.get("TZ", "UTC"))
        try:
            yield Ground(daemon.start())
        finally:
            daemon.close()
