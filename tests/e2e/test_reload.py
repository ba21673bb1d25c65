"""Config files changed under a daemon that serves: what is unchanged does not notice, what is wrong changes nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import DEADLINE_S, Daemon, eventually


class Filed:
    """A daemon whose models are in a config file."""

    def __init__(self, fresh: Fresh, **env: str) -> None:
        self.daemon: Daemon = fresh(**env)
        self.file = self.daemon.folder / "c.yaml"
        self.daemon.env["ORCH_CONFIG"] = str(self.file)

    def write(self, models: dict[str, dict[str, Any]], **settings: Any) -> None:
        folder = str(self.daemon.model_folder)
        named = {self.daemon.name(name): {"source": folder, **fields} for name, fields in models.items()}
        self.file.write_text(json.dumps({**settings, "models": named}, indent=1))

    def reload(self) -> dict[str, Any]:
        done = self.daemon.ctl("reload", "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def names(self) -> dict[str, str]:
        return {model["name"].removeprefix(f"{self.daemon.prefix}-"): model["state"] for model in self.daemon.get("/models")["models"]}

    def pid(self, name: str) -> int:
        return int(self.daemon.model(self.daemon.name(name))["engine"]["pid"])


@pytest.fixture
def filed(fresh: Fresh) -> Filed:
    return Filed(fresh)


def test_a_stream_runs_through_a_reload_that_adds_changes_and_removes_others(filed: Filed, client: Client) -> None:
    filed.write({"kept": {"preload": True}, "changed": {"preload": True}, "gone": {"preload": True}})
    daemon = filed.daemon.start()
    for name in ("kept", "changed", "gone"):
        daemon.until_state(daemon.name(name), "ready")
    kept, changed = filed.pid("kept"), filed.pid("changed")
    texts, last = [], None
    with client(daemon).completions.create(model=daemon.name("kept"), prompt="x", max_tokens=300, stream=True) as chunks:
        texts.append(next(iter(chunks)).choices[0].text)
        filed.write(
            {"kept": {"preload": True}, "changed": {"preload": True, "args": ["--max-model-len", "4096"]}, "new": {"preload": True}}
        )
        with daemon.engines_held():
            answer = filed.reload()
        for chunk in chunks:
            texts.append(chunk.choices[0].text)
            last = chunk.choices[0].finish_reason or last
    assert (last, len("".join(texts).split())) == ("length", 301)
    assert answer["models"] == {
        "added": [daemon.name("new")], "changed": {daemon.name("changed"): ["args"]}, "removed": [daemon.name("gone")], "unchanged": 1,
    }  # fmt: skip
    assert filed.pid("kept") == kept
    daemon.until_state(daemon.name("new"), "ready")
    eventually(lambda: filed.names() == {"kept": "ready", "changed": "ready", "new": "ready"}, f"replaced: {filed.names()}")
    assert filed.pid("changed") != changed
    assert len(daemon.engine_processes()) == 6  # two processes an engine
    kinds = [(event["model"], event["kind"]) for event in daemon.get("/events?tail=200")["events"]]
    assert ("", "reloaded") in kinds
    assert (daemon.name("changed"), "changed") in kinds


def test_a_changed_bound_needs_no_other_engine(filed: Filed) -> None:
    filed.write({"a": {"preload": True}})
    daemon = filed.daemon.start()
    daemon.until_state(daemon.name("a"), "ready")
    pid = filed.pid("a")
    filed.write({"a": {"preload": True, "kv_weight": 3}})
    assert filed.reload()["models"]["changed"] == {daemon.name("a"): ["kv_weight"]}
    assert (filed.pid("a"), daemon.model(daemon.name("a"))["spec"]["kv_weight"]) == (pid, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models:\n  a: {sauce: /x}\n", "c.yaml:2:7: models.a.sauce: unknown setting; did you mean 'source'?"),
        ("models:\n  a: {source: /nowhere}\n", "c.yaml:2:7: models.a.source: there is no folder '/nowhere'"),
        ("models: {\n", "c.yaml:2:1: not YAML"),
        ("models:\n  a: {source: o/m, gpus: [7]}\n", "c.yaml:2:20: models.a.gpus: no GPU here is"),
    ],
)
def test_a_wrong_file_changes_nothing_and_says_where(filed: Filed, text: str, says: str) -> None:
    filed.write({"a": {}})
    daemon = filed.daemon.start()
    before = filed.names()
    filed.file.write_text(text)
    done = daemon.ctl("reload")
    assert done.returncode == 78
    assert "the configuration is wrong, nothing was changed: 1 problem" in done.stderr or "problems" in done.stderr
    assert says in done.stderr
    assert filed.names() == before
    assert f"not reloaded, nothing is changed: {filed.file.parent}/{says}" in daemon.log.read_text()
    assert "not reloaded" in [event["kind"] for event in daemon.get("/events")["events"]]
    daemon.signal(signal.SIGHUP)
    eventually(lambda: daemon.log.read_text().count(f"{filed.file.parent}/{says}") == 2, "a signal says it, too")
    filed.write({"b": {}})
    daemon.signal(signal.SIGHUP)
    eventually(lambda: filed.names() == {"b": "stopped"}, "the mended one is taken")


def test_settings_that_can_change_do_and_the_others_are_named(filed: Filed) -> None:
    filed.write({})
    daemon = filed.daemon.start()
    assert daemon.get("/status")["host"]["budget_bytes"] != 1 << 30
    filed.write({}, memory={"sleepers": "1GiB"}, log={"level": "debug"}, listen={"port": 9}, requests={"max_body": "1MiB"})
    assert filed.reload()["settings"] == {"applied": ["log.level", "memory.sleepers"], "needs_restart": ["requests.max_body"]}
    assert daemon.get("/status")["host"]["budget_bytes"] == 1 << 30
    done = daemon.ctl("reload")
    assert "only after `orchestratorctl restart-daemon --keep-engines`: requests.max_body" in done.stdout
    assert "log.level: in force" not in done.stdout


def test_a_model_added_by_api_yields_to_a_file_and_comes_back(filed: Filed) -> None:
    filed.write({})
    daemon = filed.daemon.start()
    daemon.add(daemon.name("a"), "--no-start", "--priority", "3")
    filed.write({"a": {}})
    assert filed.reload()["models"]["changed"] == {daemon.name("a"): ["priority", "owner"]}
    assert daemon.model(daemon.name("a"))["owner"] == "file"
    filed.write({})
    filed.reload()
    model = daemon.model(daemon.name("a"))
    assert (model["owner"], model["spec"]["priority"]) == ("api", 3)


def test_check_config_says_the_same(filed: Filed) -> None:
    filed.file.write_text("models:\n  a: {source: /nowhere}\n")
    words = [sys.executable, "-m", "orchestrator.daemon", "check-config"]
    done = subprocess.run(words, env=filed.daemon.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 78
    assert f"{Path(filed.file)}:2:7: models.a.source: there is no folder '/nowhere'" in done.stderr
