"""curl as a process, the way README shows it: plain, streamed, a file, errors; and leaving with Ctrl-C."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.running import DEADLINE_S, Daemon, eventually

pytestmark = [pytest.mark.xdist_group("clients"), pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")]


def curl(*words: str) -> str:
    done = subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def given(**body: object) -> list[str]:
    return ["-H", "Content-Type: application/json", "-d", json.dumps(body)]


def test_chat(base: str, model: str) -> None:
    body = given(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=2)
    assert json.loads(curl(f"{base}/v1/chat/completions", *body))["choices"][0]["message"]["content"] == f"{model} w1 w2"


def test_completions(base: str, model: str) -> None:
    events = curl("-N", f"{base}/v1/completions", *given(model=model, prompt="x", max_tokens=3, stream=True)).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == f"{model} w1 w2 w3"


@pytest.mark.parametrize("order", ["model first", "file first"])
def test_transcriptions(base: str, model: str, tmp_path: Path, order: str) -> None:
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"RIFF" + bytes(100_000))
    words = ["-F", f"model={model}", "-F", f"file=@{sound};type=audio/wav"]
    if order == "file first":
        words = words[2:] + words[:2]
    for task in ("transcriptions", "translations"):
        answer = json.loads(curl(f"{base}/v1/audio/{task}", *words))
        assert answer == {"text": f"{model} w1 w2 w3 w4", "usage": {"type": "duration", "seconds": 4}}
    events = curl("-N", f"{base}/v1/audio/transcriptions", *words, "-F", "stream=true").split("\n\n")
    assert events[-2] == "data: [DONE]"


def test_what_the_daemon_refuses(base: str, model: str) -> None:
    answer = curl("-i", f"{base}/v1/completions", *given(model="nobody"))
    assert answer.startswith("HTTP/1.1 404 Not Found")
    assert "x-request-id: " in answer
    assert json.loads(answer.partition("\n\n")[2] or answer.splitlines()[-1])["error"]["code"] == "model_not_found"
    assert '"route_not_found"' in curl("--path-as-is", f"{base}/v1/../collective_rpc", *given(model=model))
    assert '"missing_required_parameter"' in curl(f"{base}/v1/audio/transcriptions", "-F", "file=x")
    assert '"method_not_allowed"' in curl(f"{base}/v1/completions")


def running(daemon: Daemon, model: str) -> int:
    """Requests in its engine, by its own word."""
    socket = daemon.model(model)["engine"]["socket"]
    (line,) = (
        one for one in curl("--unix-socket", socket, "http://engine/metrics").splitlines() if one.startswith("vllm:num_requests_running{")
    )
    return int(float(line.split()[-1]))


@pytest.mark.parametrize("streamed", [True, False])
def test_leaving_stops_the_engines_work(daemon: Daemon, base: str, model: str, streamed: bool) -> None:
    body = given(model=model, prompt="x", max_tokens=4000, stream=streamed)
    asking = subprocess.Popen(["curl", "-sSN", f"{base}/v1/completions", *body], stdout=subprocess.PIPE)
    eventually(lambda: running(daemon, model) == 1, "its engine works")
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=DEADLINE_S)
    eventually(lambda: running(daemon, model) == 0, "its engine has stopped")
    eventually(lambda: daemon.model(model)["in_flight"] == 0, "its place is free")
