"""The state file under the daemon: full, locked, damaged, newer, killed while it changes. Streams run on, and what was answered holds."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e import state_kills
from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import DEADLINE_S, Daemon, eventually

TOKENS = 300
MIB = 1 << 20


class Stream(threading.Thread):
    def __init__(self, api: openai.OpenAI, model: str) -> None:
        super().__init__()
        self._api, self._model = api, model
        self.words: list[str] = []

    def run(self) -> None:
        with self._api.completions.create(model=self._model, prompt="x", max_tokens=TOKENS, stream=True) as chunks:
            for chunk in chunks:
                self.words += chunk.choices[0].text.split()

    def whole(self) -> bool:
        self.join(DEADLINE_S)
        return len(self.words) == TOKENS + 1  # its name, then a word a token


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return filler


def given(daemon: Daemon, name: str) -> dict[str, Any]:
    return {"name": daemon.name(name), "source": str(daemon.model_folder)}


def names(daemon: Daemon) -> set[str]:
    return {model["name"] for model in daemon.get("/models")["models"]}


def test_on_a_full_disk_changes_are_refused_with_the_mend_and_all_else_goes_on(fresh: Fresh, client: Client) -> None:
    daemon = fresh(SIM_STEP_S="0.01")
    daemon.env["ORCH_DIRS__LOGS"] = str(daemon.folder / "logs")
    with small_disk(daemon.folder / "s", 2 * MIB) as disk:
        try:
            daemon.start()
            name = daemon.name("a")
            daemon.add(name)
            daemon.post("/models?start=false", given(daemon, "before"))
            stream = Stream(client(daemon), name)
            stream.start()
            eventually(lambda: stream.words, "it streams")
            filler = fill(disk)
            for number in range(20):
                status, error = daemon.refusal("POST", "/models?start=false", given(daemon, f"more{number}"))
                assert (status, error["code"]) == (503, "state_not_writable")
                assert f"{disk}/state.db" in error["message"]
                assert "free space" in error["message"] or "`df`" in error["message"]
            assert daemon.refusal("DELETE", f"/models/{daemon.name('before')}")[0] == 503
            status, error = daemon.refusal("POST", "/restart?keep_engines=true")
            assert (status, error["code"]) == (503, "state_not_writable")
            assert error["message"].startswith(f"{disk}: No space left on device: free space on its disk")
            assert error["message"].endswith("nothing was restarted")
            assert names(daemon) == {name, daemon.name("before")}
            assert stream.whole()
            for verb, state in (("sleep", "asleep"), ("wake", "ready")) * 3:  # each an event
                daemon.tell(name, verb)
                daemon.until_state(name, state)
            assert client(daemon).completions.create(model=name, prompt="x", max_tokens=3).choices[0].finish_reason == "length"
            lines = [line for line in daemon.log.read_text().splitlines() if "disk" in line]
            assert 1 <= len(lines) <= 3, lines
            filler.unlink()
            daemon.post("/models?start=false", given(daemon, "after"))
            assert "state.db is written again" in daemon.log.read_text()
            fill(disk)
            daemon.kill()
            daemon.start()  # with the files that it left
            assert client(daemon).completions.create(model=name, prompt="x", max_tokens=3).choices[0].finish_reason == "length"
            filler.unlink()
            kinds = [event["kind"] for event in daemon.get(f"/events?model={name}&tail=1000")["events"]]
            assert kinds.count("sleep") == 3, "events of that time were lost"
            daemon.kill()
            daemon.start()
            assert names(daemon) == {name, daemon.name("before"), daemon.name("after")}
        finally:
            daemon.close()


def test_while_somebody_holds_it_changes_are_refused_and_all_else_goes_on(fresh: Fresh, client: Client) -> None:
    daemon = fresh(SIM_STEP_S="0.01").start()
    name = daemon.name("a")
    daemon.add(name)
    stream = Stream(client(daemon), name)
    stream.start()
    eventually(lambda: stream.words, "it streams")
    with contextlib.closing(sqlite3.connect(daemon.folder / "s/state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            status, error = daemon.refusal("POST", "/models?start=false", given(daemon, "b"))
            assert (status, error["code"]) == (503, "state_not_writable")
            assert "another program holds it: `fuser" in error["message"]
        assert names(daemon) == {name}
        assert stream.whole()
        other.execute("ROLLBACK")
    daemon.post("/models?start=false", given(daemon, "b"))
    assert names(daemon) == {name, daemon.name("b")}


def test_a_damaged_file_is_moved_aside_and_the_config_files_models_are_served(fresh: Fresh, client: Client) -> None:
    daemon = fresh()
    filed = daemon.name("filed")
    config = daemon.folder / "models.yaml"
    config.write_text(f"models: {{{filed}: {{source: {daemon.model_folder}}}}}\n")
    daemon.env["ORCH_CONFIG"] = str(config)
    daemon.start()
    daemon.post("/models?start=false", given(daemon, "added"))
    daemon.signal(signal.SIGTERM)  # in order: SQLite moves its log into the file, which would mend the damage
    daemon.wait()
    with (daemon.folder / "s/state.db").open("r+b") as file:
        file.write(random.Random(1).randbytes(8192))
    daemon.start()
    assert names(daemon) == {filed}
    lost = [event for event in daemon.get("/events")["events"] if event["kind"] == "state-lost"]
    assert len(lost) == 1
    assert "config files alone" in lost[0]["reason"]
    assert "STATE LOST" in daemon.log.read_text()
    assert len(list((daemon.folder / "s").glob("state.db.corrupt-*Z"))) == 1
    # its keys can not be read any more, so nobody without one is let in
    with pytest.raises(openai.AuthenticationError):
        client(daemon).completions.create(model=filed, prompt="x", max_tokens=1)
    key = daemon.post("/keys", {"name": "new"})["key"]
    api = openai.OpenAI(base_url=daemon.url, api_key=key, max_retries=0, timeout=DEADLINE_S)
    with contextlib.closing(api):
        assert api.completions.create(model=filed, prompt="x", max_tokens=3).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fault", "said"), [("newer", "was written by a newer version (schema 99"), ("locked", "another program holds it: `fuser")]
)
def test_what_can_not_be_used_at_the_start_is_said_and_left_alone(fresh: Fresh, fault: str, said: str) -> None:
    daemon = fresh().start()
    daemon.post("/models?start=false", given(daemon, "a"))
    daemon.kill()
    with contextlib.closing(sqlite3.connect(daemon.folder / "s/state.db", isolation_level=None)) as other:
        if fault == "newer":
            other.execute("PRAGMA user_version = 99")
        else:
            other.execute("BEGIN IMMEDIATE")
        words = [sys.executable, "-m", "orchestrator.daemon", "serve"]
        done = subprocess.run(words, env=daemon.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not list((daemon.folder / "s").glob("*corrupt*"))
    with contextlib.closing(sqlite3.connect(daemon.folder / "s/state.db")) as db:
        assert db.execute("SELECT name FROM models").fetchall() == [(daemon.name("a"),)]


@pytest.mark.timeout(300)
def test_kills_at_random_moments_lose_nothing_that_was_answered(fresh: Fresh) -> None:
    """`python -m tests.e2e.state_kills 500` is the long run."""
    kills = int(os.environ.get("STATE_KILLS", "10"))
    ledger = state_kills.run(fresh(), kills, seed=kills)
    assert not ledger.violations
    assert ledger.answered > kills
    assert ledger.cut > 0
