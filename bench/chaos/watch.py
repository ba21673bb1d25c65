"""What must hold at every moment of a run: looked at four times a second, from outside and from what the daemon says of itself.

The card's rule: what is held of a card, and what its engines' limits let them take besides, is no more than the card has. It may be
broken while limits follow what somebody else has taken: for PATIENCE_S of a daemon that is up, and for a bundle an engine, their least.
"""

import asyncio
import contextlib
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

from bench.chaos.book import Book
from bench.chaos.daemon import Daemon
from bench.chaos.http import Broken

LOOK_S, ASK_S = 0.25, 1.0
PATIENCE_S = 6.0
# anyio's unix sockets: a callback that was due already when what waits for it was cancelled. Nothing is lost by it; counted.
NOISE = re.compile(
    r"[^\n]*Exception in callback <built-in method set_result[^\n]*\n(?:[^\n]*\n){3}"
    r"asyncio.exceptions.InvalidStateError: [^\n]*\n"
)
ORPHAN_S = 40.0  # the grace of an end, and a daemon that was killed in it


class Watch:
    """`problems`: those found, in words; each kind once."""

    def __init__(self, daemon: Daemon, book: Book) -> None:
        self._daemon, self._book = daemon, book
        self.problems: list[str] = []
        self.looks = 0
        self.pools_seen = self.looks_over = 0
        self.most_over_s = 0.0
        self.noise = 0
        self._models: dict[str, Any] = {}
        self._servers: set[int] = set()
        self._over: dict[str, tuple[float, float]] = {}  # card -> since when, and the daemon's up_since then
        self._strange: dict[int, float] = {}
        self._read = 0
        self._ticks = 0
        self._found: set[str] = set()

    async def run(self) -> None:
        asked = 0.0
        while True:
            if time.monotonic() - asked >= ASK_S and self._daemon.up:
                await self._ask()
                asked = time.monotonic()
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        self.looks += 1
        process = self._daemon.process
        if self._daemon.up is False and process is not None and process.poll() is not None and not self._daemon.expected_down:
            self._say(f"the daemon ended by itself, with {process.returncode}")
        self._log()
        self._cards()
        self._orphans()

    async def _ask(self) -> None:
        with contextlib.suppress(Broken, TimeoutError, RuntimeError):
            status = await self._daemon.get("/status", 10.0)
            if status["loop"]["errors"]:
                self._say(f"the loop has failed {status['loop']['errors']} times")
            self._servers = {server["pid"] for server in status["launch_servers"].values() if server.get("pid")}
            self._models = await self._daemon.models()

    def _say(self, what: str) -> None:
        if what not in self._found:
            self._found.add(what)
            self.problems.append(what)

    def _log(self) -> None:
        with contextlib.suppress(OSError), open(self._daemon.log, "rb") as file:
            file.seek(self._read)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1].decode(errors="replace")
            self._read += len(whole.encode(errors="replace"))
            whole, noise = NOISE.subn("", whole)
            self.noise += noise
            if "Traceback" in whole:
                lines = whole[max(0, whole.rfind("\n", 0, whole.index("Traceback") - 1)) :].splitlines()
                self._say("a traceback in the daemon's log:\n" + "\n".join(lines[:60]))

    # ---- cards ----------------------------------------------------------------------------------------------------

    def _cards(self) -> None:
        held, now = self._daemon.held(), time.monotonic()
        for uuid, size in self._daemon.cards().items():
            may, bundles, told = 0, 0, list[str]()
            for name, model in self._models.items():
                engine, pool = model["engine"], model["pool"]
                if not (engine and pool and uuid in engine["gpus"]):
                    continue
                segment = _segment(engine["ipc_name"])
                if segment is None or not os.path.exists(f"/proc/{engine['pid']}"):
                    continue
                limit, mapped = segment[0], segment[1] + segment[2]
                self.pools_seen += 1
                may += max(0, limit - mapped)
                bundles += pool["bundle_bytes"]
                told.append(f"{name} {model['state']} limit {limit} mapped {mapped}")
            over = held.get(uuid, 0) + may - size - bundles
            if over <= 0 or not self._daemon.up:
                self._over.pop(uuid, None)
                continue
            self.looks_over += 1
            since, _ = self._over.setdefault(uuid, (now, self._daemon.up_since))
            self.most_over_s = max(self.most_over_s, now - since)
            if now - since > PATIENCE_S and now - self._daemon.up_since > PATIENCE_S:
                self._over[uuid] = (now, 0.0)
                self._say(f"limits are above the card by {over} bytes for {now - since:.1f} s: held {held.get(uuid, 0)} of {size}; {told}")

    # ---- orphans --------------------------------------------------------------------------------------------------

    def _orphans(self) -> None:
        now = time.monotonic()
        known = {model["engine"]["pid"] for model in self._models.values() if model["engine"]} | self._servers
        strange = {}
        for pid in self._daemon.engine_processes() if self._daemon.up else ():
            with contextlib.suppress(OSError):
                if os.getsid(pid) not in known:
                    strange[pid] = self._strange.get(pid, now)
        self._strange = strange
        for pid, since in strange.items():
            if now - max(since, self._daemon.up_since) > ORPHAN_S:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:100] if os.path.exists(f"/proc/{pid}") else b""
                self._say(f"process {pid} is no model's engine and no launch server, for {now - since:.0f} s: {words!r}")


def _segment(name: str) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError, struct.error):
        found = struct.unpack("=qqq", (Path("/dev/shm") / name).read_bytes())
        return found if found[0] > 0 else None
    return None
