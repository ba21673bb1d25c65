"""A model whose only place is taken and whose only waiting place too, so that whoever comes next is refused."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import openai

from tests.e2e.running import Daemon, eventually


@contextlib.contextmanager
def full(daemon: Daemon, name: str) -> Iterator[None]:
    """`name` was added with --max-concurrency 1 --max-queue 1. Its engine stands still inside."""

    def ask() -> None:
        with openai.OpenAI(base_url=daemon.url, api_key="none", max_retries=0) as client:
            client.completions.create(model=name, prompt="x", max_tokens=2)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    with daemon.engines_held():
        for count, thread in enumerate(asking, 1):
            thread.start()
            eventually(partial(_has, daemon, name, count), f"{count} at the door of {name}")
        yield
    for thread in asking:
        thread.join()


def _has(daemon: Daemon, name: str, count: int) -> bool:
    model = daemon.model(name)
    return int(model["in_flight"]) + int(model["waiting"]) == count
