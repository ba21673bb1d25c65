"""One request of a user, and what became of it: its answer whole and its model's own, a refusal, cut, or nothing in time.

Simulated engines say their model's name and then a word a token, so a whole answer is known by its text.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from bench.chaos.http import Broken, Connection


@dataclass(frozen=True)
class Ask:
    """`leave_after`: the client goes away after so many chunks. `patience_s`: what it says that it waits for its model."""

    model: str
    chat: bool
    stream: bool
    prompt_tokens: int
    max_tokens: int
    key: str | None = None
    leave_after: int | None = None
    patience_s: float | None = None


@dataclass(frozen=True)
class Fate:
    """`how`: answered, refused (`status`, `code`), event (a stream ended with an error), cut, unreachable, hung, left, wrong (`detail`).

    `by`: the models that the answer bears. Times are those of time.monotonic().
    """

    ask: Ask
    how: str
    began: float
    ended: float
    status: int = 0
    code: str = ""
    by: frozenset[str] = frozenset()
    detail: str = ""

    @property
    def words(self) -> str:
        return " ".join(str(part) for part in (self.how, self.status or "", self.code) if part)


async def ask(connection: Connection, wanted: Ask, deadline_s: float) -> Fate:
    """Its fate; `hung` at the deadline. A connection that was kept and has ended meanwhile is made anew, as clients do."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(deadline_s):
            found = await _ask(connection, wanted, began)
    except TimeoutError:
        connection.close()
        return Fate(wanted, "hung", began, time.monotonic(), connection.status)
    except asyncio.CancelledError:
        connection.close()
        raise
    return replace(found, ended=time.monotonic())


async def _ask(connection: Connection, wanted: Ask, began: float) -> Fate:
    path = "/v1/chat/completions" if wanted.chat else "/v1/completions"
    text = "x" * wanted.prompt_tokens
    body: dict[str, Any] = {"model": wanted.model, "max_tokens": wanted.max_tokens, "ignore_eos": True, "stream": wanted.stream}
    body |= {"messages": [{"role": "user", "content": text}]} if wanted.chat else {"prompt": text}
    headers = {"Authorization": f"Bearer {wanted.key}"} if wanted.key else {}
    if wanted.patience_s is not None:
        headers["X-Request-Timeout"] = f"{wanted.patience_s:g}"
    was_kept = connection.used > 0
    try:
        try:
            await connection.send("POST", path, body, headers)
        except Broken:
            if not was_kept:
                raise
            await connection.send("POST", path, body, headers)
        status = connection.status
        if status == 200 and wanted.stream:
            return await _stream(connection, wanted, began)
        text = (await connection.whole()).decode()
    except Broken as error:
        return Fate(wanted, "cut" if error.begun else "unreachable", began, 0.0, connection.status, detail=str(error))
    except UnicodeDecodeError as error:
        return Fate(wanted, "wrong", began, 0.0, connection.status, detail=str(error))
    try:
        return _read(wanted, began, status, json.loads(text))
    except (ValueError, LookupError, TypeError) as error:
        return Fate(wanted, "wrong", began, 0.0, status, detail=f"{type(error).__name__}: {error}: {text[:300]}")


def _read(wanted: Ask, began: float, status: int, body: Any) -> Fate:
    if status != 200:
        return Fate(wanted, "refused", began, 0.0, status, str(body["error"]["code"]), detail=str(body["error"]["message"])[:300])
    choice = body["choices"][0]
    text = choice["message"]["content"] if wanted.chat else choice["text"]
    return _checked(wanted, began, frozenset([body["model"]]), text, choice["finish_reason"])


async def _stream(connection: Connection, wanted: Ask, began: float) -> Fate:
    texts, models, finish, done, chunks = list[str](), set[str](), None, False, 0
    events = connection.events()
    try:
        async for data in events:
            if done:
                return Fate(wanted, "wrong", began, 0.0, 200, detail=f"after [DONE]: {data[:200]}")
            if data == "[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                code = str(chunk["error"].get("code"))
                await _end(events)
                return Fate(wanted, "event", began, 0.0, 200, code, frozenset(models), str(chunk["error"].get("message"))[:300])
            models.add(chunk["model"])
            for choice in chunk["choices"]:
                texts.append((choice["delta"].get("content") if wanted.chat else choice["text"]) or "")
                finish = choice["finish_reason"] or finish
            chunks += 1
            if wanted.leave_after is not None and chunks >= wanted.leave_after:
                connection.close()
                return Fate(wanted, "left", began, 0.0, 200, by=frozenset(models))
    except Broken as error:
        return Fate(wanted, "cut", began, 0.0, 200, by=frozenset(models), detail=str(error))
    except (ValueError, LookupError, TypeError) as error:
        connection.close()
        return Fate(wanted, "wrong", began, 0.0, 200, detail=f"{type(error).__name__}: {error}")
    if not done:
        return Fate(wanted, "wrong", began, 0.0, 200, by=frozenset(models), detail="the stream ended in order, without [DONE] or an error")
    return _checked(wanted, began, frozenset(models), "".join(texts), finish)


async def _end(events: AsyncIterator[str]) -> None:
    """What follows an error is read, so that the connection may be used again; its being cut is in order."""
    try:
        async for _ in events:
            pass
    except Broken:
        pass


def _checked(wanted: Ask, began: float, models: frozenset[str], text: str, finish: str | None) -> Fate:
    words = text.split()
    by = models | frozenset(words[:1])
    whole = words[1:] == [f"w{n}" for n in range(1, wanted.max_tokens + 1)] and finish == "length"
    if not whole:
        said = f"{len(words)} words of {wanted.max_tokens + 1}, finish_reason {finish}: {text[:80]} … {text[-40:]}"
        return Fate(wanted, "wrong", began, 0.0, 200, by=by, detail=said)
    return Fate(wanted, "answered", began, 0.0, 200, by=by)
