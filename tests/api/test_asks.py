"""What the proxy reads of a body to tell the loop how much it may need. It never refuses for it: lengths are the engine's to judge."""

import json
from pathlib import Path

import pytest

from orchestrator.api.asking import LIKELY_TOKENS, UNBOUNDED_TOKENS
from tests.api.house import house

QWEN = {"name": "qwen", "source": "org/qwen"}
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.asyncio


def body(**fields: object) -> bytes:
    return json.dumps({"model": "qwen", **fields}).encode()


WRONG = [
    b'"5"', b"true", b"null", b"[1]", b"{}", b"-1", b"0", b"1.5", b"1e9", b"1e400", b'{"a":1e999}', b"1" + b"0" * 30, b"1" + b"0" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=lambda value: value[:12].decode())
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
async def test_what_is_no_length_goes_to_the_engine_untouched(folder: Path, field: str, value: bytes) -> None:
    sent = b'{"model":"qwen","%s":%s, "prompt":"x"}' % (field.encode(), value)
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, sent)
        exchange = await at.upstream.request()
        assert exchange.body == sent
        assert at.seen("qwen").largest_tokens == len(sent) + UNBOUNDED_TOKENS  # no bound: all that its model takes
        assert at.loop.view is not None
        ticks, errors = at.loop.view.ticks, at.loop.view.errors
        await at.until(lambda: at.loop.view and at.loop.view.ticks > ticks + 1, "it has looked at it")
        assert at.loop.view.errors == errors
        await exchange.answer(400, b"{}")
        assert (await client.answer()).status == 400


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 90}, 7),
        ({"max_tokens": "7", "max_completion_tokens": 90}, 90),
        ({"max_output_tokens": 1000}, 1000),
        ({"max_tokens": 999_999_999}, 999_999_999),
    ],
)
async def test_bytes_and_the_answers_bound_are_the_most_it_may_need(folder: Path, fields: dict[str, object], answer: int) -> None:
    sent = body(prompt="ž" * 100, **fields)
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, sent)
        exchange = await at.upstream.request()
        assert at.seen("qwen").largest_tokens == len(sent) + answer
        await exchange.answer(200, b"{}")
        await client.answer()
        await at.until_counts("qwen", 0, 0)
        assert at.seen("qwen").largest_tokens == 0


async def test_those_that_wait_are_guessed_smaller(folder: Path) -> None:
    sent = body(prompt="x" * 400, max_tokens=4000)
    async with house(folder, QWEN | {"max_concurrency": 1}) as at, at.client() as first, at.client() as second:
        await first.request(CHAT, body(max_tokens=1))
        running = await at.upstream.request()
        await second.request(CHAT, sent)
        await at.until_counts("qwen", 1, 1)
        assert at.seen("qwen").waiting_tokens == len(sent) // 4 + LIKELY_TOKENS
        assert at.seen("qwen").largest_tokens == len(sent) + 4000
        for client, exchange in ((first, running), (second, None)):
            await (exchange or await at.upstream.request()).answer(200, b"{}")
            assert (await client.answer()).status == 200
