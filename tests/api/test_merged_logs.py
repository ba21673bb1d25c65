"""The logs of several engines as one stream: in the order of time, each line whole and once, whatever is written meanwhile."""

import asyncio
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from orchestrator.api.merged_logs import LogsApi, time_in
from tests.api.house import house

FILE = {"name": "a", "source": "org/a"}
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def api(folder: Path) -> LogsApi:
    def log_files(model: str) -> list[Path]:
        return sorted(folder.glob(f"{model}.*.log"), reverse=True)

    return LogsApi(lambda: ["a", "b"], lambda name: name, log_files)


def request(*models: str, after: Iterable[str] = ()) -> Request:
    words = [*(f"model={name}" for name in models), *(f"after={end}" for end in after)]
    return Request({"type": "http", "query_string": "&".join(words).encode(), "headers": []})


def pieces(answer: StreamingResponse) -> Any:
    return aiter(answer.body_iterator)


async def lines(at: LogsApi, *models: str, **query: Any) -> list[tuple[str, str]]:
    answer = await at.logs(request(*models), **{"tail": 100, **query})
    return [told(line) async for piece in pieces(answer) for line in piece.splitlines()]


def append(path: Path, text: str) -> None:
    with open(path, "a") as log:
        log.write(text)


def told(line: bytes) -> tuple[str, str]:
    found = json.loads(line)
    return found["model"], found["line"]


@pytest.mark.asyncio
async def test_lines_are_merged_by_their_time_and_those_without_stay_with_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.1.log").write_text(
        "begins\n(APIServer pid=1) INFO 01-02 10:00:00 [x] one\nTraceback\n  deep\nINFO 01-02 10:00:05 [x] five\n"
    )
    (tmp_path / "b.1.log").write_text("[kvcached][INFO][2026-01-02 10:00:03][y] three\n2026-01-02 10:00:09,123 INFO nine\n")
    assert await lines(api(tmp_path)) == [
        ("a", "begins"),
        ("a", "(APIServer pid=1) INFO 01-02 10:00:00 [x] one"),
        ("a", "Traceback"),
        ("a", "  deep"),
        ("b", "[kvcached][INFO][2026-01-02 10:00:03][y] three"),
        ("a", "INFO 01-02 10:00:05 [x] five"),
        ("b", "2026-01-02 10:00:09,123 INFO nine"),
    ]
    assert await lines(api(tmp_path), tail=2) == [("a", "INFO 01-02 10:00:05 [x] five"), ("b", "2026-01-02 10:00:09,123 INFO nine")]
    assert await lines(api(tmp_path), "b", tail=1) == [("b", "2026-01-02 10:00:09,123 INFO nine")]
    assert await lines(api(tmp_path), since="1s") == []


@pytest.mark.asyncio
async def test_since_leaves_out_what_is_older(tmp_path: Path) -> None:
    old, new = (time.strftime("%m-%d %H:%M:%S", time.localtime(time.time() - ago)) for ago in (7200, 60))
    (tmp_path / "a.1.log").write_text(f"INFO {old} old\nmore of it\nINFO {new} new\nmore of that\n")
    assert [text for _, text in await lines(api(tmp_path), since="1h")] == [f"INFO {new} new", "more of that"]


@pytest.mark.asyncio
async def test_previous_is_the_launch_before(tmp_path: Path) -> None:
    (tmp_path / "a.1.log").write_text("before\n")
    (tmp_path / "a.2.log").write_text("now\n")
    (tmp_path / "b.1.log").write_text("only\n")
    assert await lines(api(tmp_path), previous=True) == [("a", "before")]


@pytest.mark.asyncio
async def test_following_tells_each_whole_line_once_and_goes_on_with_the_next_launch(tmp_path: Path) -> None:
    (tmp_path / "a.1.log").write_text("one\nhal")
    stream = pieces(await api(tmp_path).logs(request(), tail=100, follow=True))
    found: list[tuple[str, str]] = []

    async def until(line: tuple[str, str]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while line not in found:
                found.extend(told(each) for each in (await anext(stream)).splitlines() if each)

    await until(("a", "one"))
    append(tmp_path / "a.1.log", "f\n")
    (tmp_path / "b.1.log").write_text("first\n")
    await until(("a", "half"))
    await until(("b", "first"))
    (tmp_path / "a.2.log").write_text("a new launch\n")
    await until(("a", "a new launch"))
    os.truncate(tmp_path / "b.1.log", 0)
    append(tmp_path / "b.1.log", "on\n")  # it began anew: shorter than it was
    await until(("b", "on"))
    assert len(found) == len(set(found)) == 5
    await stream.aclose()


@pytest.mark.asyncio
async def test_who_was_cut_off_goes_on_after_the_last_line_of_each_model_and_over_launches(tmp_path: Path) -> None:
    append(tmp_path / "a.1.log", "one\nt\u00f6o\nhal")
    append(tmp_path / "b.1.log", "first\n")
    answer = await api(tmp_path).logs(request(), tail=100, follow=False)
    ends = {(line := json.loads(each))["model"]: line["after"] async for piece in pieces(answer) for each in piece.splitlines()}
    assert ends == {"a": "a.1.log:9", "b": "b.1.log:6"}
    append(tmp_path / "a.1.log", "f\n" + "x" * 70_000 + "\nlast\n")  # more than is read at once
    append(tmp_path / "a.2.log", "a new launch\n")
    (tmp_path / "b.1.log").unlink()
    append(tmp_path / "b.2.log", "another\n")
    stream = pieces(await api(tmp_path).logs(request(after=ends.values()), tail=100, follow=True))
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(DEADLINE_S):
        while ("a", "a new launch") not in found:
            found.extend(told(each) for each in (await anext(stream)).splitlines() if each)
    await stream.aclose()
    assert [text for model, text in found if model == "a"] == ["half", "x" * 70_000, "last", "a new launch"]
    assert ("b", "another") in found


@pytest.mark.asyncio
async def test_refusals(folder: Path) -> None:
    async with house(folder, FILE) as at:
        assert (await at.operate("GET", "/logs?model=none")).status == 404
        assert (await at.operate("GET", "/logs?model=a&previous=1")).json["error"]["code"] == "no_log"
        for wrong in ("since=soon", "previous=1&follow=1", "tail=-1"):
            assert (await at.operate("GET", f"/logs?{wrong}")).status == 400


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("INFO 01-02 10:00:00 x", 1767348000.0),
        ("(EngineCore_DP0 pid=77) WARNING 12-31 23:59:59 [x]", 1767225599.0),  # of last year
        ("2026-01-02T10:00:00.5Z x", 1767348000.0),
        ("INFO 02-30 10:00:00 x", None),
        ("9999-99-99 10:00:00", None),
        ("nothing", None),
    ],
)
def test_the_time_of_a_line(text: str, at: float | None) -> None:
    assert time_in(text, 1767400000.0) == at  # 3 January 2026, 0:26
