"""What users do, through the endpoint and with the official openai client."""

import asyncio
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

_FRESH = itertools.count()


@dataclass(frozen=True)
class Answer:
    """One request's fate: seconds to the first token (streams) and to the end, tokens received, or the error."""

    model: str
    streamed: bool
    first_s: float | None
    total_s: float
    tokens: int
    text: str
    error: str | None = None


def client(url: str, timeout_s: float = 600) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout_s)


def engine_client(socket: Path, timeout_s: float = 600) -> AsyncOpenAI:
    """Straight to a vLLM that listens on a unix socket."""
    transport = httpx2.AsyncHTTPTransport(uds=str(socket), limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=100))
    http = DefaultAsyncHttpxClient(transport=transport)
    return AsyncOpenAI(base_url="http://engine/v1", api_key="none", max_retries=0, timeout=timeout_s, http_client=http)


async def ask(api: AsyncOpenAI, model: str, prompt_tokens: int, max_tokens: int, stream: bool, salt: str = "") -> Answer:
    """One completion of exactly max_tokens tokens (ignore_eos), about `prompt_tokens` tokens in.

    `salt` begins the prompt: requests with the same one share their KV through the engine's prefix cache, others do not.
    """
    began = time.monotonic()
    first: float | None = None
    prompt = (salt + "x " * (prompt_tokens // 2))[: max(prompt_tokens, 1)] if salt else "x " * (prompt_tokens // 2)
    try:
        if stream:
            text, tokens = "", 0
            chunks = await api.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for chunk in chunks:
                if chunk.choices and chunk.choices[0].text:
                    first = first or time.monotonic() - began
                    text += chunk.choices[0].text
                if chunk.usage:
                    tokens = chunk.usage.completion_tokens
        else:
            whole = await api.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
            )
            text, tokens = whole.choices[0].text, whole.usage.completion_tokens if whole.usage else 0
    except Exception as error:  # a bench reports what happened to each request, whatever it was
        return Answer(model, stream, first, time.monotonic() - began, 0, "", f"{type(error).__name__}: {error}")
    return Answer(model, stream, first, time.monotonic() - began, tokens, text)


async def burst(api: AsyncOpenAI, model: str, requests: int, prompt_tokens: int, max_tokens: int) -> list[Answer]:
    """`requests` at once with prompts of their own, every second one streamed."""
    asks = (ask(api, model, prompt_tokens, max_tokens, n % 2 == 0, f"{next(_FRESH)} ") for n in range(requests))
    return list(await asyncio.gather(*asks))


async def at_most(
    api: AsyncOpenAI, model: str, requests: int, together: int, prompt_tokens: int, max_tokens: int, salt: str
) -> list[Answer]:
    """`requests` of the same size with prompts of their own, `together` at a time, none of them streamed."""
    numbers = itertools.count()

    async def worker() -> list[Answer]:
        answers = []
        while (number := next(numbers)) < requests:
            answers.append(await ask(api, model, prompt_tokens, max_tokens, False, f"{salt} {number} "))
        return answers

    return [answer for several in await asyncio.gather(*(worker() for _ in range(together))) for answer in several]
