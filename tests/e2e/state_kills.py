"""The whole daemon, killed at random moments while models are added and removed; after each, what was answered 2xx must hold.

    python -m tests.e2e.state_kills 500 --seed 7

A kill may come while the daemon starts, while it answers, or between. A change that was not answered must be whole or absent.
"""

import argparse
import contextlib
import http.client
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.running import Daemon, eventually

STARTING = 0.2  # of the kills: before the daemon answers
CHANGING_S = 0.25  # the others come within so much of its first answer, while it is changed without a pause
MODELS = 6


@dataclass
class Ledger:
    """What the daemon has said."""

    sure: dict[str, int] = field(default_factory=dict)  # name -> idle_timeout, another one each time it is added
    unsure: tuple[str, int | None] | None = None  # the change that was not answered: None removes
    answered: int = 0
    refused: int = 0
    cut: int = 0  # changes that were not answered
    while_starting: int = 0
    violations: list[str] = field(default_factory=list)

    def check(self, found: dict[str, int]) -> None:
        after = dict(self.sure)
        if self.unsure is not None:
            name, mark = self.unsure
            after.pop(name, None)
            if mark is not None:
                after[name] = mark
        if found not in (self.sure, after):
            self.violations.append(f"found {found}, expected {self.sure} or {after}")
        self.sure, self.unsure = found, None


def run(daemon: Daemon, kills: int, seed: int) -> Ledger:
    dice, ledger = random.Random(seed), Ledger()
    for _ in range(kills):
        ledger.violations += _integrity(daemon)
        starting = dice.random() < STARTING
        launched = time.monotonic()
        _launch(daemon)
        if starting:
            ledger.while_starting += 1
            time.sleep(dice.uniform(0, 1.5))
            daemon.kill()
            continue
        eventually(lambda: _answers(daemon), f"it answers after {time.monotonic() - launched:.1f} s; {daemon.log.read_text()[-3000:]}")
        ledger.check(_models(daemon))
        killing = threading.Timer(dice.uniform(0, CHANGING_S), daemon.signal, (signal.SIGKILL,))
        killing.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                _change(daemon, ledger, dice)
        killing.join()
        daemon.wait()
        ledger.cut += ledger.unsure is not None
    daemon.start()
    ledger.check(_models(daemon))
    if "STATE LOST" in daemon.log.read_text():
        ledger.violations.append("a file was taken for damaged")
    return ledger


def _launch(daemon: Daemon) -> None:
    with daemon.log.open("ab") as log:
        command = [sys.executable, "-m", "orchestrator.daemon", "serve"]
        daemon.process = subprocess.Popen(command, env=daemon.env, cwd=daemon.folder, stdin=subprocess.DEVNULL, stderr=log)


def _change(daemon: Daemon, ledger: Ledger, dice: random.Random) -> None:
    """Raises OSError or HTTPException where the daemon is gone: then it is unsure."""
    name = daemon.name(f"m{dice.randrange(MODELS)}")
    if name in ledger.sure:
        ledger.unsure = (name, None)
        status, _ = daemon._call("DELETE", f"/models/{name}")
    else:
        mark = dice.randrange(1, 1_000_000)
        ledger.unsure = (name, mark)
        given = {"name": name, "source": str(daemon.model_folder), "idle_timeout": mark}
        status, _ = daemon._call("POST", "/models?start=false", given)
    name, now = ledger.unsure
    ledger.unsure = None
    if status >= 300:
        ledger.refused += 1
        return
    ledger.answered += 1
    if now is None:
        del ledger.sure[name]
    else:
        ledger.sure[name] = now


def _models(daemon: Daemon) -> dict[str, int]:
    return {model["name"]: model["spec"]["idle_timeout"] for model in daemon.get("/models")["models"] if model["owner"] == "api"}


def _answers(daemon: Daemon) -> bool:
    assert daemon.process is not None
    assert daemon.process.poll() is None, daemon.log.read_text()[-3000:]
    with contextlib.suppress(OSError, http.client.HTTPException):
        return bool(daemon.get("/status"))
    return False


def _integrity(daemon: Daemon) -> list[str]:
    """Of a copy: to look at the file itself would tidy up what the kill has left."""
    if not (daemon.folder / "s/state.db").exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        for file in (daemon.folder / "s").glob("state.db*"):
            shutil.copy(file, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / "state.db")) as db:
            found = db.execute("PRAGMA integrity_check").fetchone()[0]
    return [] if found == "ok" else [f"integrity_check: {found}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.state_kills", description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True) as folder:
        daemon = Daemon(Path(folder))
        try:
            ledger = run(daemon, options.kills, options.seed)
        finally:
            daemon.close()
    figures = {
        "kills": options.kills,
        "seed": options.seed,
        "while_starting": ledger.while_starting,
        "changes_answered": ledger.answered,
        "changes_refused": ledger.refused,
        "changes_cut": ledger.cut,
        "violations": len(ledger.violations),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(figures))
    for violation in ledger.violations:
        print(violation)
    return 1 if ledger.violations or not ledger.cut else 0


if __name__ == "__main__":
    sys.exit(main())
