"""What the simulated engine answers: the bodies of the OpenAI API, and vLLM's refusals.

The official client reads them, over the unix socket; one engine serves all tests here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from .conftest import make_gpus
from .harness import Engine, eventually

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path) -> Iterator[Engine]:
    """One engine for all tests here: none of them changes it."""
    flags = ["--kv-cache-memory-bytes", "400M", "--max-model-len", "1000", "--api-key", "secret"]
    engine = Engine(folder, make_gpus(folder / "gpu"), model, flags, {"VLLM_SERVER_DEV_MODE": "0"})
    with contextlib.closing(engine):
        yield engine.ready()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(engine.uds))
    with (
        httpx2.Client(transport=transport, timeout=20) as http,
        openai.OpenAI(base_url="http://engine/v1", api_key="secret", http_client=http, max_retries=0) as client,
    ):
        yield client


def post(engine: Engine, path: str, body: Any, **headers: str) -> Any:
    return engine.post(path, body, authorization="Bearer secret", **headers)


def events(text: str) -> list[Any]:
    """The data of each server-sent event; the last is `[DONE]`."""
    datas = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def test_chat(engine: Engine) -> None:
    body = post(engine, "/v1/chat/completions", CHAT | {"max_tokens": 3}).json
    (choice,) = body["choices"]
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert choice["message"]["role"] == "assistant"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("tiny w1 w2 w3", "length")
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def test_chat_ends_by_itself_when_no_length_is_asked_for(engine: Engine) -> None:
    body = post(engine, "/v1/chat/completions", CHAT).json
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (64, "stop")


def test_chat_stream(engine: Engine) -> None:
    options = {"max_completion_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    reply = post(engine, "/v1/chat/completions", CHAT | options)
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, one, two, usage, done = events(reply.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["delta"]["content"] for c in (one, two)] == ["tiny w1", " w2"]
    assert [c["choices"][0]["finish_reason"] for c in (first, one, two)] == [None, None, "length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 2, "[DONE]")
    assert len({c["id"] for c in (first, one, two, usage)}) == 1


def test_completion_and_its_stream(engine: Engine) -> None:
    body = {"model": "alias", "prompt": "abc"}
    whole = post(engine, "/v1/completions", body).json
    assert whole["model"] == "tiny"  # both names answer, the first is echoed
    assert whole["usage"]["completion_tokens"] == 16
    assert whole["choices"][0]["finish_reason"] == "length"
    chunks = events(post(engine, "/v1/completions", body | {"stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]


def test_responses_stream(engine: Engine) -> None:
    request = {"model": "tiny", "input": "hi", "max_output_tokens": 2, "stream": True}
    told = events(post(engine, "/v1/responses", request).text)
    kinds = [event["type"] for event in told]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert [e["delta"] for e in told if e["type"] == "response.output_text.delta"] == ["tiny w1", " w2"]


def test_tokens(engine: Engine) -> None:
    tokens = post(engine, "/tokenize", {"model": "tiny", "prompt": "hé"}).json
    assert (tokens["count"], tokens["max_model_len"]) == (2, 1000)
    assert post(engine, "/detokenize", {"model": "tiny", "tokens": tokens["tokens"]}).json == {"prompt": "hé"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", CHAT | {"model": "x"}, 404, "The model `x` does not exist."),
        ("/v1/completions", {"model": "tiny"}, 400, "prompt"),
        ("/v1/chat/completions", {"model": "tiny"}, 400, "messages"),
        ("/v1/completions", b"{", 400, "JSON decode error"),
        ("/v1/completions", [1], 500, "has no attribute"),
        (
            "/v1/completions",
            {"prompt": "x" * 1000, "max_tokens": 1},
            400,
            "This model's maximum context length is 1000",
        ),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1000}, 400, "This model's maximum context length is 1000"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
    ],
)
def test_refusals(engine: Engine, path: str, body: Any, status: int, message: str) -> None:
    reply = post(engine, path, body)
    assert reply.status == status
    assert message in reply.json["error"]["message"]
    assert reply.json["error"]["code"] == status


def test_the_body_of_an_unknown_model(engine: Engine) -> None:
    error = post(engine, "/v1/embeddings", {"model": "x", "input": "a"}).json["error"]
    assert (error["type"], error["param"]) == ("NotFoundError", "model")


def test_other_media_types(engine: Engine) -> None:
    assert post(engine, "/v1/completions", b"prompt=x", content_type="text/plain").status == 415


def test_the_key_guards_v1_only(engine: Engine) -> None:
    assert engine.post("/v1/completions", {"prompt": "x"}).status == 401
    assert engine.get("/v1/models").json == {"error": "Unauthorized"}
    assert engine.get("/health").status == engine.get("/ping").status == engine.get("/metrics").status == 200
    assert engine.post("/tokenize", {"prompt": "x"}).status == 200
    assert engine.get("/version").json == {"version": "0.24.0"}
    assert engine.get("/nothing").status == 404


def test_the_request_id_is_echoed(engine: Engine) -> None:
    assert post(engine, "/tokenize", {"prompt": "x"}, x_request_id="r-1").headers["x-request-id"] == "r-1"
    assert "x-request-id" not in post(engine, "/tokenize", {"prompt": "x"}).headers


def test_metrics(engine: Engine) -> None:
    before = engine.metric("generation_tokens_total")
    post(engine, "/v1/completions", {"prompt": "x", "max_tokens": 7})
    eventually(lambda: engine.metric("generation_tokens_total") == before + 7, "the tokens are counted")
    text = engine.get("/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in text
    assert "# TYPE vllm:num_preemptions_total counter" in text


def test_the_official_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    assert whole.choices[0].message.content == "tiny w1 w2"
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices[0].text == "tiny w1"
    (vector,) = client.embeddings.create(model="tiny", input=["x"]).data
    assert len(vector.embedding) == 16
    response = client.responses.create(model="tiny", input="hi", max_output_tokens=2)
    assert response.output_text == "tiny w1 w2"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="x", prompt="x")


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "tiny w1 w2 w3"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    with client.responses.stream(model="tiny", input="hi", max_output_tokens=2) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == "tiny w1 w2"
