"""The largest things that are still right: they pass, others are served meanwhile, and the memory comes back."""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from tests.api.rawclient import Client, connected
from tests.e2e.running import DEADLINE_S, Daemon, eventually

pytestmark = pytest.mark.xdist_group("fuzz")

IMAGE_BYTES = 64 << 20


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True) as folder:
        made = Daemon(Path(folder))
        try:
            yield made.start()
        finally:
            made.close()


def test_an_image_of_64_mib(daemon: Daemon) -> None:
    """What an engine makes of it is its own affair; that it gets it, and that nobody else has to wait for it, is ours."""
    name = daemon.name("m")
    daemon.add(name)
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * IMAGE_BYTES}}
    asking = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, image]}]
    with openai.OpenAI(base_url=daemon.url, api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        answer = client.chat.completions.create(model=name, messages=asking, max_tokens=3)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == f"{name} w1 w2 w3"
    eventually(lambda: process.memory_info().rss - before < 16 << 20, "its memory came back")


def test_who_floods_with_bodies_keeps_nobody_waiting(daemon: Daemon) -> None:
    """Four bodies of 16 MiB that come as fast as they can, and never end; meanwhile others are answered."""
    address = urlsplit(daemon.url)

    async def pour(client: Client, stop: asyncio.Event) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (100 << 20)
        await client.send(head + b'{"model":"nobody","x":"')
        for _ in range(16):
            if stop.is_set():
                return
            await client.send(b"x" * (1 << 20))
        await stop.wait()

    async def run() -> float:
        stop, slowest = asyncio.Event(), 0.0
        where = (str(address.hostname), int(address.port or 0))
        async with connected(where) as a, connected(where) as b, connected(where) as c, connected(where) as d, connected(where) as own:
            pouring = [asyncio.create_task(pour(client, stop)) for client in (a, b, c, d)]
            for _ in range(50):
                begun = time.monotonic()
                await own.request("/health", method="GET")
                assert json.loads((await own.answer()).body) == {"status": "ok"}
                slowest = max(slowest, time.monotonic() - begun)
            stop.set()
            await asyncio.gather(*pouring)
        return slowest

    assert asyncio.run(run()) < 1.0
