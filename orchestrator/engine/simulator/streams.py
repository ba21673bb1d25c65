"""A running request as an answer: server-sent events as tokens come, or one body at the end.

Whatever ends the answer first (the last token, the engine's death, a client that leaves), the run is closed at once:
that is what aborts the request in EngineCore.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .answers import Answer, Json, error_body, sse, words
from .client import EngineDead, Progress
from .messages import MessageAnswer, broken
from .responses import ResponseAnswer

Run = AsyncGenerator[Progress]


async def completion_chunks(answer: Answer, run: Run, own_end: bool, *, with_usage: bool) -> AsyncIterator[bytes]:
    told = 0
    try:
        async for tokens, reason in run:
            if answer.chat and told == 0:
                yield sse(answer.role_chunk())
            text = words(answer.model, told + 1, tokens)
            told = tokens
            if answer.tool or answer.instead:
                continue
            yield sse(answer.chunk(text, None if reason is None else reason_of(reason, own_end)))
        if answer.tool or answer.instead:
            for chunk in answer.canned():
                yield sse(chunk)
        if with_usage:
            yield sse(answer.usage_chunk(told))
        yield sse("[DONE]")
    except EngineDead as error:
        yield sse(error_body(str(error), "InternalServerError", 500))
    finally:
        await run.aclose()  # Now, not when the garbage is collected.


async def response_events(answer: ResponseAnswer, run: Run, keep: Callable[[Json], None]) -> AsyncIterator[bytes]:
    told = 0
    try:
        async for tokens, _ in run:
            if told == 0:
                for event in answer.opening():
                    yield event
            yield answer.delta(words(answer.model, told + 1, tokens))
            told = tokens
        text = words(answer.model, 1, told)
        keep(answer.whole(text, told, "completed"))
        for event in answer.closing(text, told):
            yield event
    except EngineDead as error:
        yield sse(error_body(str(error), "InternalServerError", 500))
    finally:
        await run.aclose()


async def message_events(answer: MessageAnswer, run: Run) -> AsyncIterator[bytes]:
    told, reason = 0, "length"
    try:
        async for tokens, ended in run:
            if told == 0:
                for event in answer.opening():
                    yield event
            yield answer.delta(words(answer.model, told + 1, tokens))
            told, reason = tokens, ended or reason
        for event in answer.closing(told, reason):
            yield event
    except EngineDead as error:
        yield broken(str(error))
    finally:
        await run.aclose()


async def transcription_chunks(model: str, run: Run) -> AsyncIterator[bytes]:
    told = 0
    try:
        async for tokens, reason in run:
            choice = {"delta": {"content": words(model, told + 1, tokens)}, "finish_reason": reason and "stop"}
            yield sse({"object": "transcription.chunk", "model": model, "choices": [choice]})
            told = tokens
        yield sse("[DONE]")
    except EngineDead as error:
        yield sse(error_body(str(error), "InternalServerError", 500))
    finally:
        await run.aclose()


async def last_of(run: Run) -> tuple[int, str]:
    tokens, reason = 0, "abort"
    try:
        async for progress in run:
            tokens, reason = progress[0], progress[1] or reason
    finally:
        await run.aclose()
    return tokens, reason


def reason_of(reason: str, own_end: bool) -> str:
    return "stop" if own_end and reason == "length" else reason


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The work's answer; a client that leaves first cancels it."""
    answer = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
