"""LiteLLM as a client library, unchanged: it looks at what it gets with a table of its own, and raises classes of its own."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.conftest import Guarded
from tests.clients.holding import full
from tests.e2e.running import DEADLINE_S, Daemon

pytestmark = [pytest.mark.xdist_group("clients"), pytest.mark.filterwarnings("ignore")]  # its own, of pydantic and asyncio

litellm: Any = pytest.importorskip("litellm", reason="it cannot live beside the newest openai: test_older.py runs this file")

ASK = [{"role": "user", "content": "Hello"}]


def chat(url: str, model: str, key: str = "sk-none", **given: Any) -> Any:
    asked = {"model": f"openai/{model}", "messages": ASK, "max_tokens": 3, "num_retries": 0, "timeout": DEADLINE_S, **given}
    return litellm.completion(api_base=url, api_key=key, **asked)


def test_chat(daemon: Daemon, model: str) -> None:
    answer = chat(daemon.url, model)
    assert answer.choices[0].message.content == f"{model} w1 w2 w3"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 3)


def test_chat_streamed(daemon: Daemon, model: str) -> None:
    chunks = list(chat(daemon.url, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == f"{model} w1 w2 w3"
    assert [usage.completion_tokens for chunk in chunks if (usage := getattr(chunk, "usage", None))] == [3]


def test_embeddings(daemon: Daemon, model: str) -> None:
    answer = litellm.embedding(model=f"openai/{model}", input=["one", "two"], api_base=daemon.url, api_key="sk-none")
    assert [len(one["embedding"]) for one in answer.data] == [16, 16]


def test_what_the_engine_refuses(daemon: Daemon, model: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="maximum context length"):
        chat(daemon.url, model, max_tokens=100_000)


def test_what_the_daemon_refuses(daemon: Daemon) -> None:
    with pytest.raises(litellm.NotFoundError, match="nobody") as refused:
        chat(daemon.url, "nobody")
    assert refused.value.status_code == 404


def test_a_wrong_key(guarded: Guarded) -> None:
    with pytest.raises(litellm.AuthenticationError) as refused:
        chat(guarded.url, guarded.model)
    assert refused.value.status_code == 401
    with pytest.raises(litellm.APIError) as forbidden:  # it has no class for a 403 of OpenAI's kind
        chat(guarded.url, guarded.model, guarded.key)
    assert forbidden.value.status_code == 403


@pytest.fixture(scope="module")
def narrow(daemon: Daemon) -> Iterator[str]:
    name = daemon.name("narrow-l")
    daemon.add(name, "--max-concurrency", "1", "--max-queue", "1")
    yield name
    daemon.ctl("rm", name)


def test_a_full_queue(daemon: Daemon, narrow: str) -> None:
    with full(daemon, narrow), pytest.raises(litellm.RateLimitError) as refused:
        chat(daemon.url, narrow, max_retries=0)
    assert refused.value.status_code == 429


def test_a_stopped_model(daemon: Daemon, narrow: str) -> None:
    daemon.tell(narrow, "stop")
    daemon.until_state(narrow, "stopped")
    with pytest.raises(litellm.ServiceUnavailableError) as refused:
        chat(daemon.url, narrow, max_retries=0)
    assert refused.value.status_code == 503
