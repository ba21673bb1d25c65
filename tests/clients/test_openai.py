"""OpenAI's own client, unchanged: what it can ask for, and which exception it makes of what is refused."""

import io
import json
import os
import signal
import threading
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.clients.conftest import MAX_BODY, Guarded
from tests.clients.holding import full
from tests.e2e.running import DEADLINE_S, Daemon, eventually

pytestmark = pytest.mark.xdist_group("clients")

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}


class Step(BaseModel):
    what: str
    done: bool


class Plan(BaseModel):
    title: str
    hours: int
    first: Step


def test_chat(by_openai: openai.OpenAI, model: str) -> None:
    answer = by_openai.chat.completions.create(model=model, messages=ASK, max_tokens=5)
    assert answer.choices[0].message.content == f"{model} w1 w2 w3 w4 w5"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 5)


@pytest.mark.parametrize("counted", [True, False])
def test_chat_streamed(by_openai: openai.OpenAI, model: str, counted: bool) -> None:
    chunks = list(
        by_openai.chat.completions.create(model=model, messages=ASK, max_tokens=5, stream=True, stream_options={"include_usage": counted})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == f"{model} w1 w2 w3 w4 w5"
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == ([5] if counted else [])


def test_tools(by_openai: openai.OpenAI, model: str) -> None:
    answer = by_openai.chat.completions.create(model=model, messages=ASK, tools=[TOOL], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x", "unit": "C"})
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tools_streamed(by_openai: openai.OpenAI, model: str) -> None:
    with by_openai.chat.completions.stream(model=model, messages=ASK, tools=[TOOL], tool_choice="required") as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x", "unit": "C"})


def test_structured_output(by_openai: openai.OpenAI, model: str) -> None:
    answer = by_openai.chat.completions.parse(model=model, messages=ASK, response_format=Plan)
    assert answer.choices[0].message.parsed == Plan(title="x", hours=0, first=Step(what="x", done=False))


def test_structured_output_streamed(by_openai: openai.OpenAI, model: str) -> None:
    with by_openai.chat.completions.stream(model=model, messages=ASK, response_format=Plan) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Plan(title="x", hours=0, first=Step(what="x", done=False))


def test_completions(by_openai: openai.OpenAI, model: str) -> None:
    assert by_openai.completions.create(model=model, prompt="x", max_tokens=2).choices[0].text == f"{model} w1 w2"
    chunks = by_openai.completions.create(model=model, prompt="x", max_tokens=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"{model} w1 w2"


def test_embeddings(by_openai: openai.OpenAI, model: str) -> None:
    answer = by_openai.embeddings.create(model=model, input=["one", "two", "one"])
    assert [len(one.embedding) for one in answer.data] == [16, 16, 16]
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/rerank", {"query": "red fox", "documents": ["a dog", "the red fox"], "top_n": 1}, "results"),
        ("/v2/rerank", {"query": "x", "documents": ["x"]}, "results"),
        ("/rerank", {"query": "x", "documents": ["x"]}, "results"),
        ("/score", {"text_1": "a b", "text_2": ["a", "c"]}, "data"),
        ("/v1/score", {"text_1": "a", "text_2": "a"}, "data"),
        ("/classify", {"input": ["a", "b"]}, "data"),
        ("/pooling", {"input": "a"}, "data"),
        ("/v2/embed", {"texts": ["a"]}, "embeddings"),
        ("/tokenize", {"prompt": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [97, 98]}, "prompt"),
        ("/v1/chat/completions/batch", {"messages": [ASK, ASK], "max_tokens": 2}, "choices"),
        ("/v1/chat/completions/render", {"messages": ASK}, "tokens"),
        ("/v1/completions/render", {"prompt": "abc"}, "tokens"),
        ("/v1/chat/completions/derender", {"tokens": [97]}, "prompt"),
        ("/v1/completions/derender", {"tokens": [97]}, "prompt"),
    ],
)
def test_all_other_routes(by_openai: openai.OpenAI, base: str, model: str, path: str, body: dict[str, object], field: str) -> None:
    answer = by_openai.with_options(base_url=base).post(path, cast_to=object, body={"model": model, **body})
    assert isinstance(answer, dict)
    assert answer[field]
    if path == "/v1/rerank":
        assert [result["index"] for result in answer[field]] == [1]


def test_responses(by_openai: openai.OpenAI, model: str) -> None:
    made = by_openai.responses.create(model=model, input="Hello", max_output_tokens=3)
    assert (made.output_text, made.status) == (f"{model} w1 w2 w3", "completed")
    assert by_openai.responses.retrieve(made.id).output_text == made.output_text
    with by_openai.responses.stream(model=model, input="Hello", max_output_tokens=3, previous_response_id=made.id) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_text == made.output_text
    assert by_openai.responses.retrieve(final.id).id == final.id


def test_responses_in_the_background(by_openai: openai.OpenAI, daemon: Daemon, model: str) -> None:
    made = by_openai.responses.create(model=model, input="Hello", max_output_tokens=4000, background=True)
    assert made.status == "queued"
    eventually(lambda: daemon.model(model)["in_flight"] == 1, "it counts as running: its engine does not sleep meanwhile")
    assert by_openai.responses.retrieve(made.id).status == "queued"
    assert by_openai.responses.cancel(made.id).status == "cancelled"
    eventually(lambda: daemon.model(model)["in_flight"] == 0, "its place is free")
    with pytest.raises(openai.NotFoundError) as refused:
        by_openai.responses.retrieve("resp_that_nobody_made")
    assert refused.value.code == "response_not_found"


@pytest.mark.filterwarnings("ignore:deprecated")
def test_transcriptions(by_openai: openai.OpenAI, model: str) -> None:
    sound = ("a.wav", io.BytesIO(b"\r\n--x\x00\xff" * 20_000))
    assert by_openai.audio.transcriptions.create(model=model, file=sound).text.startswith(f"{model} w1")
    sound[1].seek(0)
    assert by_openai.audio.translations.create(model=model, file=sound).text.startswith(f"{model} w1")
    with pytest.raises(openai.NotFoundError) as refused:
        by_openai.audio.transcriptions.create(model="nobody", file=("a.wav", b"x"))
    assert refused.value.code == "model_not_found"


def test_what_the_engine_refuses(by_openai: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        by_openai.completions.create(model=model, prompt="x", max_tokens=100_000)


def test_what_the_daemon_refuses(by_openai: openai.OpenAI, base: str, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        by_openai.chat.completions.create(model="", messages=ASK)
    assert (refused.value.param, refused.value.code) == ("model", "missing_required_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        by_openai.chat.completions.create(model="nobody", messages=ASK)
    assert (missing.value.code, missing.value.request_id is not None) == ("model_not_found", True)
    with pytest.raises(openai.NotFoundError) as nowhere:
        by_openai.images.generate(model=model, prompt="x")
    assert nowhere.value.code == "route_not_found"
    with pytest.raises(openai.APIStatusError) as large:
        by_openai.completions.create(model=model, prompt="x" * MAX_BODY)
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")


def test_a_wrong_key(guarded: Guarded) -> None:
    def error(key: str, kind: type[openai.APIStatusError]) -> str | None:
        with openai.OpenAI(base_url=guarded.url, api_key=key, max_retries=0) as client, pytest.raises(kind) as refused:
            client.chat.completions.create(model=guarded.model, messages=ASK)
        return refused.value.code

    assert error("sk-none", openai.AuthenticationError) == "invalid_api_key"
    assert error(guarded.key, openai.PermissionDeniedError) == "model_not_allowed"


@pytest.fixture(scope="module")
def narrow(daemon: Daemon) -> Iterator[str]:
    name = daemon.name("narrow")
    daemon.add(name, "--max-concurrency", "1", "--max-queue", "1")
    yield name
    daemon.ctl("rm", name)


def test_a_full_queue(by_openai: openai.OpenAI, daemon: Daemon, narrow: str) -> None:
    with full(daemon, narrow), pytest.raises(openai.RateLimitError) as refused:
        by_openai.completions.create(model=narrow, prompt="x")
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_stopped_model(by_openai: openai.OpenAI, daemon: Daemon, narrow: str) -> None:
    daemon.tell(narrow, "stop")
    daemon.until_state(narrow, "stopped")
    with pytest.raises(openai.InternalServerError) as refused:
        by_openai.completions.create(model=narrow, prompt="x")
    assert (refused.value.status_code, refused.value.code) == (503, "model_stopped")
    daemon.tell(narrow, "start")
    daemon.until_state(narrow, "ready")


def test_a_retry_when_the_queue_was_full(by_openai: openai.OpenAI, daemon: Daemon, narrow: str) -> None:
    refusals = threading.Event()
    patient = by_openai.with_options(max_retries=5)
    inner = patient._client.event_hooks["response"]
    inner.append(lambda answer: refusals.set() if answer.status_code == 429 else None)
    found: list[int] = []

    def ask() -> None:
        answer = patient.completions.with_raw_response.create(model=narrow, prompt="x", max_tokens=2)
        found.append(answer.retries_taken)

    asking = threading.Thread(target=ask)
    with full(daemon, narrow):
        asking.start()
        assert refusals.wait(DEADLINE_S)
    asking.join()
    assert found[0] >= 1


def test_a_retry_when_its_model_was_not_ready_in_time(by_openai: openai.OpenAI, daemon: Daemon) -> None:
    """It is told at once when to come back, and the model has been started meanwhile."""
    name = daemon.name("slow")
    daemon.add(name, "--env", "SIM_FAULT=slow_start:2")
    daemon.tell(name, "unload")
    daemon.until_state(name, "stopped")
    hasty = by_openai.with_options(timeout=1.0)
    with pytest.raises(openai.InternalServerError) as refused:
        hasty.completions.create(model=name, prompt="x")
    assert (refused.value.status_code, refused.value.code) == (503, "not_ready_in_time")
    answer = hasty.with_options(max_retries=3).completions.with_raw_response.create(model=name, prompt="x", max_tokens=2)
    assert answer.parse().choices[0].text == f"{name} w1 w2"
    daemon.ctl("rm", name)


def test_an_engine_that_dies(by_openai: openai.OpenAI, daemon: Daemon) -> None:
    name = daemon.name("mortal")
    pid = daemon.add(name)["engine"]["pid"]
    with daemon.engines_held():
        plain: list[BaseException] = []

        def ask() -> None:
            try:
                by_openai.completions.create(model=name, prompt="x")
            except openai.OpenAIError as error:
                plain.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: daemon.model(name)["in_flight"] == 1, "it is at its engine")
        os.kill(pid, signal.SIGKILL)
        asking.join()
    assert isinstance(plain[0], openai.InternalServerError)
    assert (plain[0].status_code, plain[0].code) == (502, "engine_error")
    # The next request starts it anew.
    patient = by_openai.with_options(max_retries=5)
    with patient.completions.create(model=name, prompt="x", max_tokens=4000, stream=True) as chunks:
        assert next(iter(chunks)).choices[0].text.startswith(name)
        os.kill(daemon.model(name)["engine"]["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="broke off"):
            for _ in chunks:
                pass
    daemon.ctl("rm", name)


def test_no_daemon() -> None:
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_models(by_openai: openai.OpenAI, model: str) -> None:
    assert model in {one.id for one in by_openai.models.list()}
    assert by_openai.models.retrieve(model).id == model
