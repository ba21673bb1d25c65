"""The operators' API on its socket: what is added, refused, watched and read there, each refusal with every field that is wrong."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.house import House, house
from tests.api.rawclient import Answer, Client, connected

FILE = {"name": "org/file", "aliases": ["f"], "source": "org/file"}
DEADLINE_S = 20.0

pytestmark = pytest.mark.asyncio


def spec(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


async def add(at: House, query: str = "", **fields: Any) -> Answer:
    return await at.operate("POST", f"/models{query}", spec(**fields))


async def names(at: House) -> list[str]:
    return [model["name"] for model in (await at.operate("GET", "/models")).json["models"]]


async def test_adding_a_model_starts_it_and_shows_it(folder: Path) -> None:
    async with house(folder) as at:
        answer = await add(at, name="qwen", source="org/qwen", kv_floor="2GiB", aliases=["q"])
        assert (answer.status, answer.json["name"], answer.json["owner"]) == (201, "qwen", "api")
        await at.until_state("qwen", "ready")
        model = (await at.operate("GET", "/models/q")).json
        assert (model["state"], model["held"], model["spec"]["kv_floor"]) == ("ready", False, 2 << 30)
        assert (model["engine"]["phase"], model["engine"]["gpu_indexes"]) == ("ready", [0])
        assert model["pool"]["limit_bytes"] >= 2 << 30
        assert [event["kind"] for event in model["events"]][-1] == "ready"


async def test_adding_without_starting_leaves_it_stopped(folder: Path) -> None:
    async with house(folder) as at:
        assert (await add(at, "?start=false", name="qwen", source="org/qwen")).status == 201
        await at.until_state("qwen", "stopped")
        assert not at.engines.launches


async def test_a_model_that_was_added_serves_at_once(folder: Path) -> None:
    """201 is a promise: a request right behind it waits for the model, and is not told that there is none."""
    async with house(folder) as at, at.client() as client:
        for n in range(5):
            assert (await add(at, "?start=false", name=f"m{n}", source="org/qwen")).status == 201
            await client.request("/v1/completions", b'{"model":"m%d"}' % n)
            exchange = await at.upstream.request()
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200


@pytest.mark.parametrize("name", ["org/file", "f", "taken", "t"])
async def test_a_name_that_is_taken_is_a_409(folder: Path, name: str) -> None:
    async with house(folder, FILE) as at:
        assert (await add(at, "?start=false", name="taken", aliases=["t"], source="a/b")).status == 201
        for fields in ({"name": name}, {"name": "new", "aliases": ["fresh", name]}):
            answer = await add(at, **fields, source="a/b")
            assert (answer.status, answer.error["code"], answer.error["param"]) == (409, "conflict", "name")
            assert f"{name!r} is a" in answer.error["message"]
        assert await names(at) == ["org/file", "taken"]


async def test_every_field_that_is_wrong_is_named_at_once(folder: Path) -> None:
    async with house(folder) as at:
        sizes: dict[str, Any] = {"kv_floor": "2GB", "kv_weight": -1, "priority": 9}
        answer = await add(at, name="no spaces", sorce="a", **sizes, gpus=[], args=["--port", "1"], env={"KVCACHED_IPC_NAME": "x"})
        assert (answer.status, answer.error["type"], answer.error["code"]) == (422, "invalid_request_error", "invalid_spec")
        wrong = {error["field"]: error["message"] for error in answer.error["errors"]}
        assert set(wrong) == {"name", "source", "kv_floor", "kv_weight", "priority", "gpus", "args", "env", "sorce"}
        assert "write 2GiB" in wrong["kv_floor"]
        assert wrong["source"] == "is missing"
        assert "unknown field" in wrong["sorce"]
        assert "source" in wrong["sorce"]  # what there is
        assert "--port belongs to the daemon" in wrong["args"]
        assert "KVCACHED_IPC_NAME belongs to the daemon" in wrong["env"]
        assert await names(at) == []


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"kv_floor": "2GiB", "kv_ceiling": "1GiB"}, "kv_floor", "above kv_ceiling"),
        ({"aliases": ["qwen"]}, "aliases", "already the name"),
        ({"gpus": [0], "tensor_parallel_size": 2}, "gpus", "1 named"),
        ({"engine": "nope"}, "engine", "known: default"),
        ({"gpus": [7]}, "gpus", "no GPU here is 7; there are: 0 (GPU-0)"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", "2 GPUs wanted, 1 here"),
        ({"source": "/nowhere"}, "source", "there is no folder '/nowhere'"),
        ({"source": "./here"}, "source", "relative path"),
    ],
)
async def test_what_does_not_fit_together_or_here_is_a_422(folder: Path, fields: dict[str, Any], field: str, says: str) -> None:
    async with house(folder) as at:
        answer = await add(at, **{"name": "qwen", "source": "org/qwen", **fields})
        assert answer.status == 422
        (error,) = answer.error["errors"]
        assert error["field"] == field
        assert says in error["message"]
        assert await names(at) == []


async def test_what_is_no_spec_at_all_is_a_400(folder: Path) -> None:
    async with house(folder) as at:
        for body in (b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000):
            answer = await at.operate("POST", "/models", body)
            assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), body[:10]
        answer = await at.operate("POST", "/models?start=perhaps", spec(name="a", source="a/b"))
        assert (answer.status, answer.error["param"]) == (400, "start")


async def test_a_model_of_the_config_file_is_not_removed_here(folder: Path) -> None:
    async with house(folder, FILE) as at:
        for name in ("org/file", "org%2Ffile", "f"):
            answer = await at.operate("DELETE", f"/models/{name}")
            assert (answer.status, answer.error["code"]) == (409, "conflict")
            assert "config file" in answer.error["message"]
        assert await names(at) == ["org/file"]


async def test_an_unknown_model_is_a_404_on_every_route(folder: Path) -> None:
    async with house(folder, FILE) as at:
        for method, verb in (("GET", ""), ("GET", "/watch"), ("GET", "/logs"), ("POST", "/start"), ("POST", "/stop"), ("DELETE", "")):
            answer = await at.operate(method, f"/models/org%2Ffil{verb}")
            assert (answer.status, answer.error["code"]) == (404, "model_not_found"), verb
            assert "Did you mean 'org/file'?" in answer.error["message"]


async def test_stop_holds_a_model_down_until_start(folder: Path) -> None:
    async with house(folder, FILE) as at:
        assert (await at.operate("POST", "/models/org%2Ffile/stop")).json["held"] is True
        await at.until_state("org/file", "stopped")
        answer = await at.operate("POST", "/models/f/start")
        assert (answer.status, answer.json["held"]) == (202, False)
        await at.until_state("org/file", "ready")
        kinds = [event["kind"] for event in (await at.operate("GET", "/models/f")).json["events"]]
        assert kinds[kinds.index("stop") :] == ["stop", "draining", "stopping", "stopped", "start", "starting", "ready"]


async def test_events_of_all_models_newest_last(folder: Path) -> None:
    async with house(folder, FILE) as at:
        await add(at, "?start=false", name="other", source="a/b")
        events = (await at.operate("GET", "/events")).json["events"]
        assert {(event["model"], event["kind"]) for event in events} >= {("org/file", "ready"), ("other", "added")}
        assert [event["at"] for event in events] == sorted(event["at"] for event in events)
        assert len((await at.operate("GET", "/events?tail=1")).json["events"]) == 1
        assert {e["model"] for e in (await at.operate("GET", "/events?model=org/file")).json["events"]} == {"org/file"}
        assert (await at.operate("GET", "/events?tail=-1")).error["param"] == "tail"


async def test_status_tells_where_and_how_much(folder: Path) -> None:
    async with house(folder, FILE) as at:
        status = (await at.operate("GET", "/status")).json
        assert (status["models"], status["gpu_source"], status["state_dir"]) == ({"ready": 1}, "nvml", str(folder))
        (gpu,) = status["gpus"]
        parts = ("reserve_bytes", "foreign_bytes", "fixed_bytes", "claims_bytes", "pool_bytes")
        assert sum(gpu[part] for part in parts) == gpu["total_bytes"]
        assert gpu["kv_limit_bytes"] <= gpu["pool_bytes"]
        assert status["loop"]["errors"] == 0


async def test_watch_tells_each_change_once_and_ends_when_the_model_is_gone(folder: Path) -> None:
    async with house(folder) as at, connected(at.operators) as watcher:
        at.engines.slow.add("qwen")
        await add(at, name="qwen", source="org/qwen")
        await at.until_state("qwen", "starting")
        await watcher.request("/api/v1/models/qwen/watch", method="GET")
        head = await watcher.head()
        assert (head.status, head.header(b"content-type")) == (200, b"application/x-ndjson")
        first = await _line(watcher)
        assert first["state"] == "starting"
        ticks = at.loop.view.ticks if at.loop.view else 0
        await at.until(lambda: at.loop.view and at.loop.view.ticks > ticks + 2, "three more looks, which show nothing new")
        at.engines.ready("qwen")
        model = await _until(watcher, "ready", first)
        assert model["engine"]["phase"] == "ready"
        assert (await at.operate("DELETE", "/models/qwen")).status == 202
        assert await _until(watcher, "removed") == {"name": "qwen", "state": "removed"}
        assert await watcher.chunk() == b""
        assert await names(at) == []


async def test_watch_tells_a_failure_with_the_engines_last_words(folder: Path) -> None:
    async with house(folder) as at, connected(at.operators) as watcher:
        at.engines.slow.add("qwen")
        await add(at, name="qwen", source="org/qwen")
        await at.until_state("qwen", "starting")
        await watcher.request("/api/v1/models/qwen/watch", method="GET")
        await watcher.head()
        at.engines.die("qwen", "its process exited with code 1", "RuntimeError: boom")
        failure = (await _until(watcher, "backoff"))["failure"]
        assert "its process exited with code 1" in failure["reason"]
        assert (failure["log"], failure["count"]) == (["RuntimeError: boom"], 1)
        assert 0 < failure["retry_in_s"] <= 2


async def test_logs_tail_and_follow_over_a_restart(folder: Path) -> None:
    async with house(folder, FILE) as at, connected(at.operators) as reader:
        assert (await at.operate("GET", "/models/f/logs")).error["code"] == "no_log"
        first = folder / "org-file.0001.log"
        first.write_bytes(b"".join(b"line %d\n" % n for n in range(30_000)))
        whole = await at.operate("GET", "/models/f/logs?tail=100000")
        assert (whole.header(b"content-type"), whole.body) == (b"text/plain; charset=utf-8", first.read_bytes())
        assert (await at.operate("GET", "/models/org%2Ffile/logs?tail=2")).body == b"line 29998\nline 29999\n"
        assert len((await at.operate("GET", "/models/f/logs")).body.splitlines()) == 100
        assert (await at.operate("GET", "/models/f/logs?tail=0")).body == b""
        assert (await at.operate("GET", "/models/f/logs?tail=-1")).error["param"] == "tail"

        await reader.request("/api/v1/models/f/logs?tail=1&follow=true", method="GET")
        await reader.head()
        assert await reader.chunk() == b"line 29999\n"
        with first.open("ab") as file:
            file.write(b"one more, \xff cut")
        assert await reader.chunk() == b"one more, \xff cut"
        (folder / "org-file.0002.log").write_bytes(b"a new engine\n")
        assert await reader.chunk() == b"a new engine\n"


async def test_following_the_log_of_a_model_that_has_none_yet(folder: Path) -> None:
    async with house(folder, FILE) as at, connected(at.operators) as reader:
        await reader.request("/api/v1/models/f/logs?follow=true", method="GET")
        assert (await reader.head()).status == 200
        (folder / "org-file.0001.log").write_bytes(b"born\n")
        assert await reader.chunk() == b"born\n"


async def _line(watcher: Client) -> dict[str, Any]:
    line = await watcher.chunk()
    assert line.endswith(b"\n"), line
    found: dict[str, Any] = json.loads(line)
    return found


async def _until(watcher: Client, state: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        while (line := await _line(watcher))["state"] != state:
            assert before is None or _still(line) != _still(before), "told twice"
            before = line
        return line


def _still(model: dict[str, Any]) -> dict[str, Any]:
    """Without its clocks."""
    engine = {**(model["engine"] or {}), "up_s": 0}
    return {**model, "since_s": 0, "idle_s": 0, "engine": engine}
