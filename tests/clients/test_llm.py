"""llm, the command, as a process with a folder of its own: the model is one line of its extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import Guarded
from tests.e2e.running import DEADLINE_S, Daemon

pytestmark = pytest.mark.xdist_group("clients")


def llm(folder: Path, url: str, model: str, *words: str, key: str = "sk-none") -> "subprocess.CompletedProcess[str]":
    here = {"model_id": "here", "model_name": model, "api_base": url, "api_key_name": "here"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([here]))
    command = [sys.executable, "-m", "llm", "-m", "here", "--key", key, "-o", "max_tokens", "3", *words, "Hello"]
    env = {**os.environ, "LLM_USER_PATH": str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_chat(daemon: Daemon, model: str, tmp_path: Path) -> None:
    done = llm(tmp_path, daemon.url, model, "--no-stream")
    assert (done.stdout, done.returncode) == (f"{model} w1 w2 w3\n", 0), done.stderr


def test_chat_streamed(daemon: Daemon, model: str, tmp_path: Path) -> None:
    done = llm(tmp_path, daemon.url, model)
    assert (done.stdout, done.returncode) == (f"{model} w1 w2 w3\n", 0), done.stderr


def test_what_the_daemon_refuses(daemon: Daemon, tmp_path: Path) -> None:
    done = llm(tmp_path, daemon.url, "nobody")
    assert (done.stdout.strip(), done.returncode) == ("", 1)
    assert "404" in done.stderr
    assert "Known models: " in done.stderr


def test_a_wrong_key(guarded: Guarded, tmp_path: Path) -> None:
    done = llm(tmp_path, guarded.url, guarded.model)
    assert done.returncode == 1
    assert "Error code: 401 - This needs a valid API key" in done.stderr
    assert "Error code: 403 - " in llm(tmp_path, guarded.url, guarded.model, key=guarded.key).stderr
