"""Anthropic's own client, unchanged: messages, their stream, counted tokens, and the exception that each refusal becomes."""

import os
import signal
from collections.abc import Iterator

import anthropic
import pytest

from tests.clients.conftest import MAX_BODY, Guarded
from tests.clients.holding import full
from tests.e2e.running import Daemon

pytestmark = pytest.mark.xdist_group("clients")

ASK: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]


def test_messages(by_anthropic: anthropic.Anthropic, model: str) -> None:
    answer = by_anthropic.messages.create(model=model, max_tokens=3, messages=ASK, system="Be brief")
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == f"{model} w1 w2 w3"
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.stop_reason) == (13, 3, "max_tokens")
    assert answer._request_id is not None


def test_messages_streamed(by_anthropic: anthropic.Anthropic, model: str) -> None:
    with by_anthropic.messages.stream(model=model, max_tokens=3, messages=ASK) as stream:
        assert "".join(stream.text_stream) == f"{model} w1 w2 w3"
        final = stream.get_final_message()
    assert (final.usage.output_tokens, final.stop_reason) == (3, "max_tokens")


def test_counted_tokens(by_anthropic: anthropic.Anthropic, model: str) -> None:
    assert by_anthropic.messages.count_tokens(model=model, messages=ASK).input_tokens == 5


def test_what_the_daemon_refuses(by_anthropic: anthropic.Anthropic, model: str) -> None:
    def error(kind: type[anthropic.APIStatusError], **given: object) -> tuple[int, str, bool]:
        with pytest.raises(kind) as refused:
            by_anthropic.messages.create(**{"model": model, "max_tokens": 3, "messages": ASK, **given})  # type: ignore[call-overload]
        body = refused.value.body
        assert isinstance(body, dict)
        assert body["type"] == "error"
        return refused.value.status_code, body["error"]["type"], body.get("request_id") == refused.value.request_id

    assert error(anthropic.NotFoundError, model="nobody") == (404, "not_found_error", True)
    assert error(anthropic.BadRequestError, model="") == (400, "invalid_request_error", True)
    assert error(anthropic.APIStatusError, system="x" * MAX_BODY) == (413, "request_too_large", True)
    assert error(anthropic.BadRequestError, max_tokens=-1) == (400, "BadRequestError", False)  # the engine's own words


def test_a_wrong_key(guarded: Guarded) -> None:
    def error(key: str, kind: type[anthropic.APIStatusError], says: str) -> None:
        base = guarded.url.removesuffix("/v1")
        with anthropic.Anthropic(base_url=base, api_key=key, max_retries=0) as client, pytest.raises(kind, match=says):
            client.messages.create(model=guarded.model, max_tokens=3, messages=ASK)

    error("sk-none", anthropic.AuthenticationError, "authentication_error")
    error(guarded.key, anthropic.PermissionDeniedError, "permission_error")


@pytest.fixture(scope="module")
def narrow(daemon: Daemon) -> Iterator[str]:
    name = daemon.name("narrow-a")
    daemon.add(name, "--max-concurrency", "1", "--max-queue", "1")
    yield name
    daemon.ctl("rm", name)


def test_a_full_queue(by_anthropic: anthropic.Anthropic, daemon: Daemon, narrow: str) -> None:
    with full(daemon, narrow), pytest.raises(anthropic.RateLimitError, match="rate_limit_error"):
        by_anthropic.messages.create(model=narrow, max_tokens=3, messages=ASK)


def test_a_stopped_model(by_anthropic: anthropic.Anthropic, daemon: Daemon, narrow: str) -> None:
    daemon.tell(narrow, "stop")
    daemon.until_state(narrow, "stopped")
    with pytest.raises(anthropic.InternalServerError, match="overloaded_error") as refused:
        by_anthropic.messages.create(model=narrow, max_tokens=3, messages=ASK)
    assert refused.value.status_code == 503
    daemon.tell(narrow, "start")


def test_an_engine_that_dies(by_anthropic: anthropic.Anthropic, daemon: Daemon) -> None:
    name = daemon.name("mortal-a")
    pid = daemon.add(name)["engine"]["pid"]
    with by_anthropic.messages.stream(model=name, max_tokens=4000, messages=ASK) as stream:
        assert next(iter(stream.text_stream)).startswith(name)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(anthropic.APIStatusError, match="api_error"):
            for _ in stream.text_stream:
                pass
    daemon.ctl("rm", name)
