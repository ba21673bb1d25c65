"""Downloads from the model hub: one process each, of an engine venv's Python and with its environment (engine/pull.py).

One at a time of a source: who asks for it again follows the same. It runs as long as anybody follows, and what it has loaded is kept.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.drivers import vllm
from orchestrator.drivers.vllm import EngineVenv

PROGRAM = Path(__file__).parents[1] / "engine" / "pull.py"
LAST = ("done", "failed")  # phases
END_S = 5.0  # from SIGTERM to SIGKILL: a download has nothing to put in order
MOST_LINE = 1 << 20  # the first names each file that is left out

Json = dict[str, Any]


class Pulls:
    def __init__(self, venvs: Mapping[str, EngineVenv]) -> None:
        self._venvs = venvs
        self._running: dict[tuple[str, str, str], _Pull] = {}

    @property
    def engines(self) -> frozenset[str]:
        return frozenset(self._venvs)

    async def follow(self, engine: str, source: str, revision: str, env: Mapping[str, str]) -> AsyncIterator[Json]:
        """What it says: `asked` first, then how far it is, at last `done` or `failed`. `env`: of the model, besides its venv's."""
        key = (engine, source, revision)
        pull = self._running.get(key)
        if pull is None:
            environment = vllm.venv_environment(self._venvs[engine], os.environ) | dict(env)
            words = (str(self._venvs[engine].python), str(PROGRAM), "--revision", revision, "--", source)
            pull = self._running[key] = _Pull(words, environment)
            pull.task.add_done_callback(lambda task: self._running.pop(key, None))
        pull.followers += 1
        try:
            async for line in pull.lines():
                yield line
        finally:
            pull.followers -= 1
            if not pull.followers:
                self._running.pop(key, None)
                pull.task.cancel()

    async def close(self) -> None:
        for pull in list(self._running.values()):
            pull.task.cancel()
            await asyncio.wait([pull.task])


class _Pull:
    def __init__(self, words: tuple[str, ...], env: Mapping[str, str]) -> None:
        self.followers = 0
        self._first: Json | None = None
        self._last: Json | None = None
        self._said = asyncio.Event()
        self.task = asyncio.create_task(self._run(words, env), name="pull")

    async def lines(self) -> AsyncIterator[Json]:
        """From the first line on, and each later one that is the newest when it can be told."""
        last = None
        while True:
            said = self._said
            if self._first is not None and last is None:
                last = self._first
                yield last
            if self._last is not last and self._last is not None:
                last = self._last
                yield last
            if last is not None and last["phase"] in LAST:
                return
            if self._last is last:
                await said.wait()

    def _say(self, line: Json) -> None:
        self._first = self._first or line
        self._last = line
        said, self._said = self._said, asyncio.Event()
        said.set()

    async def _run(self, words: tuple[str, ...], env: Mapping[str, str]) -> None:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *words, env=dict(env), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, limit=MOST_LINE, cwd="/"
            )
        except OSError as error:
            return self._say(_failed(f"{words[0]}: {error.strerror}: is the engine's venv there? `make engine`"))
        assert process.stdout is not None
        assert process.stderr is not None
        complaints = asyncio.create_task(_tail(process.stderr))
        try:
            async for line in process.stdout:
                with contextlib.suppress(msgspec.DecodeError):
                    self._say(msgspec.json.decode(line))
            code, text = await process.wait(), await complaints
            if self._last is None or self._last["phase"] not in LAST:
                self._say(_failed(f"the download ended with code {code}: {text or 'it said nothing'}"))
        finally:
            await _end(process)
            complaints.cancel()


async def _tail(stream: asyncio.StreamReader) -> str:
    """Its last line."""
    last = ""
    async for line in stream:
        last = line.decode(errors="replace").strip() or last
    return last[-300:]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _failed(message: str) -> Json:
    return {"phase": "failed", "code": "pull_failed", "message": message}
