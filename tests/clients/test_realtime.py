"""The realtime WebSocket with the `websockets` client and with OpenAI's, as vLLM's own examples use it."""

import json
from typing import Any

import openai
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.e2e.running import Daemon, eventually

pytestmark = pytest.mark.xdist_group("clients")


def events(socket: ClientConnection, until: str) -> list[Any]:
    found = [json.loads(socket.recv(timeout=20))]
    while found[-1]["type"] != until:
        found.append(json.loads(socket.recv(timeout=20)))
    return found


@pytest.mark.parametrize("query", ["", "?model={}"])
def test_sounds_become_words(daemon: Daemon, base: str, model: str, query: str) -> None:
    with connect(f"{base.replace('http', 'ws')}/v1/realtime{query.format(model)}", proxy=None) as socket:
        events(socket, "session.created")
        socket.send(json.dumps({"type": "session.update", "model": model}))
        for _ in range(3):
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"}))
        socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        *deltas, done = events(socket, "transcription.done")
        assert "".join(delta["delta"] for delta in deltas) == done["text"] == f"{model} w1 w2 w3"
        eventually(lambda: daemon.model(model)["in_flight"] == 1, "it holds its place")
    eventually(lambda: daemon.model(model)["in_flight"] == 0, "its place is free")


@pytest.mark.filterwarnings("ignore:connect\\(\\) must be used")
def test_openais_client_connects_and_is_told_of_an_unknown_model(by_openai: openai.OpenAI, model: str) -> None:
    with by_openai.realtime.connect(model=model) as connection:
        assert json.loads(connection.recv_bytes())["type"] == "session.created"
        connection._connection.send(json.dumps({"type": "session.update", "model": "nobody"}))
        assert json.loads(connection.recv_bytes())["code"] == "model_not_found"
    with pytest.raises(Exception, match="404"), by_openai.realtime.connect(model="nobody"):
        pass


def test_a_sleeping_model_is_woken_for_it(daemon: Daemon, base: str, model: str) -> None:
    daemon.tell(model, "sleep")
    daemon.until_state(model, "asleep")
    with connect(f"{base.replace('http', 'ws')}/v1/realtime?model={model}", proxy=None) as socket:
        events(socket, "session.created")
        assert daemon.until_state(model, "ready")
