"""What users do, through the endpoint and with the official openai client."""

import asyncio
import time
from dataclasses import dataclass

from openai import AsyncOpenAI


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


def client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)


async def ask(api: AsyncOpenAI, model: str, prompt_tokens: int, max_tokens: int, stream: bool) -> Answer:
    """One completion of exactly max_tokens tokens (ignore_eos), about `prompt_tokens` tokens in."""
    began = time.monotonic()
    first: float | None = None
    prompt = "x " * (prompt_tokens // 2)
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
    """`requests` at once, every second one streamed."""
    return list(await asyncio.gather(*(ask(api, model, prompt_tokens, max_tokens, n % 2 == 0) for n in range(requests))))
