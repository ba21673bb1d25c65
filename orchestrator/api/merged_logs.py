"""The logs of several engines as one, a JSON object a line: in the order of time where lines carry one, each with its model.

vLLM writes `INFO 11-22 07:45:01`, without a year and in local time; kvcached and we write dates. A line without a time, as of a traceback,
has that of the line before it. Each says where it ends: who follows and was cut off asks for what came `after` that, and has lost nothing.
Files are read in a thread.
"""

import asyncio
import heapq
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from orchestrator.api.events import begin_of
from orchestrator.api.logs import LOG_POLL_S, MAX_TAIL, read_from, tail_of
from orchestrator.errors import BadRequest, ModelNotFound

ALIVE_S = 15.0
CONTEXT = 500  # lines
HEAD = 120  # characters of a line in which its time is looked for
DATED = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)")
OF_THE_YEAR = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d\d-\d\d \d\d:\d\d:\d\d)")
DAY_S = 86400.0


@dataclass(slots=True)
class Line:
    at: float
    model: str
    text: str
    end: str

    def shown(self) -> bytes:
        return msgspec.json.encode({"model": self.model, "at": self.at or None, "line": self.text, "after": self.end}) + b"\n"


class LogsApi:
    """`names`: of all models that there are; `log_files`: a model's logs, the newest launch first."""

    def __init__(
        self, names: Callable[[], Iterable[str]], resolve: Callable[[str], str], log_files: Callable[[str], Sequence[Path]]
    ) -> None:
        self._names, self._resolve, self._log_files = names, resolve, log_files
        self._closed = False

    def close(self) -> None:
        """The daemon ends, and streams with it."""
        self._closed = True

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/logs", self.logs, methods=["GET"])
        return router

    async def logs(
        self,
        request: Request,
        tail: int = Query(100, ge=0, le=MAX_TAIL),
        since: str | None = None,
        follow: bool = False,
        previous: bool = False,
    ) -> StreamingResponse:
        """Of the models that `model` names, any number of times; of all where none is. `previous`: of the launch before the newest.
        `after`: for each model of which something was told, the last line's own; the others begin with `tail`."""
        begin = begin_of(since)
        if follow and previous:
            raise BadRequest("A launch that is over writes no more: follow, or previous.", param="follow")
        chosen = [self._resolve(name) for name in request.query_params.getlist("model")]
        back = int(previous)
        found = {name: files[back] for name in (chosen or self._names()) if len(files := self._log_files(name)) > back}
        if chosen and not found and not follow:
            which = "was started once at most" if previous else "was never started"
            raise ModelNotFound(f"There is no log of {', '.join(map(repr, chosen))}: it {which}.", code="no_log")
        known = self._known(request.query_params.getlist("after"), chosen)
        return StreamingResponse(self._told(chosen, found, known, tail, begin, follow), media_type="application/x-ndjson")

    def _known(self, ends: Iterable[str], chosen: Sequence[str]) -> dict[str, "_Reader"]:
        """Readers that stand where `ends` say. A log that is gone counts as none."""
        at = {file: int(end) for file, _, end in (each.rpartition(":") for each in ends) if end.isdecimal()}
        files = ((name, path) for name in (chosen or self._names() if at else ()) for path in self._log_files(name))
        return {name: _Reader(name, path, at[path.name]) for name, path in files if path.name in at}

    async def _told(
        self, chosen: Sequence[str], found: dict[str, Path], known: dict[str, "_Reader"], tail: int, begin: float, follow: bool
    ) -> AsyncIterator[bytes]:
        fresh = {name: _Reader(name, path) for name, path in found.items() if name not in known}
        readers = fresh | known
        before = await asyncio.gather(
            *(asyncio.to_thread(reader.tail, tail, begin) for reader in fresh.values()),
            *(asyncio.to_thread(reader.rest) for reader in known.values()),
        )
        merged = list(heapq.merge(*before, key=lambda line: line.at))
        yield b"".join(line.shown() for line in (merged if known else merged[-tail:] if tail else []))
        silent_since = time.monotonic()
        while follow and not self._closed:
            for name in chosen or self._names():
                reader, files = readers.get(name), self._log_files(name)
                if files and (reader is None or (reader.still and reader.path != files[0])):
                    readers[name] = _Reader(name, _next(files, reader))
            more = await asyncio.gather(*(asyncio.to_thread(reader.more) for reader in readers.values()))
            if told := b"".join(line.shown() for line in heapq.merge(*more, key=lambda line: line.at)):
                yield told
            elif time.monotonic() - silent_since < ALIVE_S:
                await asyncio.sleep(LOG_POLL_S)
                continue
            else:
                yield b"\n"
            silent_since = time.monotonic()


class _Reader:
    """One file, read on from where it was read to; only whole lines. `still`: nothing more was there at the last look."""

    def __init__(self, model: str, path: Path, at: int = 0) -> None:
        self.model, self.path, self.still = model, path, False
        self._at, self._rest, self._last = at, b"", 0.0

    def tail(self, lines: int, begin: float) -> list[Line]:
        """The last lines, not older than `begin`; more are read, to know the times of those that have none."""
        data, self._at = tail_of(self.path, lines + CONTEXT)
        found = self._lines(data)[-lines:] if lines else []
        at = 0.0 if self._last else self.path.stat().st_mtime  # where none has a time: not newer than that
        return [line for line in found if (line.at or at) >= begin]

    def more(self) -> list[Line]:
        data, self._at = read_from(self.path, self._at)
        self.still = not data
        return self._lines(data)

    def rest(self) -> list[Line]:
        found: list[Line] = []
        while not self.still:
            found += self.more()
        return found

    def _lines(self, data: bytes) -> list[Line]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        texts = [line.decode(errors="replace").rstrip("\r") for line in whole]
        if not self._last:  # what comes before the first time has that one
            self._last = next((at for text in texts if (at := time_in(text, time.time()))), 0.0)
        ends = accumulate((len(line) + 1 for line in whole), initial=self._at - len(self._rest) - sum(len(line) + 1 for line in whole))
        return list(self._timed(zip(texts, islice(ends, 1, None), strict=True)))

    def _timed(self, texts: Iterable[tuple[str, int]]) -> Iterable[Line]:
        now = time.time()
        for text, end in texts:
            self._last = max(self._last, time_in(text, now) or 0.0)  # two processes write one log: its own order stays
            yield Line(self._last, self.model, text, f"{self.path.name}:{end}")


def _next(files: Sequence[Path], reader: _Reader | None) -> Path:
    """The launch after the one that was read to its end; the newest where none was, or it is gone."""
    at = files.index(reader.path) if reader is not None and reader.path in files else 1
    return files[at - 1]


def time_in(text: str, now: float) -> float | None:
    """Seconds since the epoch that a log line says, in local time; of a date without a year the last one before tomorrow."""
    try:
        if match := DATED.search(text[:HEAD]):
            return time.mktime(time.strptime(f"{match[1]} {match[2]}", "%Y-%m-%d %H:%M:%S"))
        if match := OF_THE_YEAR.search(text[:HEAD]):
            year = time.localtime(now).tm_year
            for each in (year, year - 1):  # a log of December is read in January
                at = time.mktime(time.strptime(f"{each}-{match[1]}", "%Y-%m-%d %H:%M:%S"))
                if at <= now + DAY_S:
                    return at
    except (ValueError, OverflowError):  # 02-30; 29 February in another year
        pass
    return None
