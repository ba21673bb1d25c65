"""/metrics: what Prometheus reads there is what is and what happened; who may read it; and what engines say beside, merged."""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from orchestrator.api import engine_metrics
from orchestrator.api.engine_metrics import EngineMetrics
from orchestrator.api.metric_list import METRICS
from orchestrator.api.metrics import Metrics
from orchestrator.api.upstream import Upstreams
from orchestrator.control.counts import LEFT
from orchestrator.control.keys import Keys
from orchestrator.policy.instance import State
from orchestrator.policy.key import KeySpec, StoredKey
from orchestrator.policy.units import GIB
from tests.api.house import House, house
from tests.api.rawclient import Answer, connected
from tests.control.fakes import spec
from tests.control.world import world

QWEN = {"name": "org/qwen", "aliases": ["q"], "source": "org/qwen"}
OTHER = {"name": "other", "source": "org/other", "preload": False}
ASK = b'{"model": "q", "prompt": "x"}'
STREAM = b'{"model": "q", "prompt": "x", "stream": true}'
WAITS = b'{"model": "other", "prompt": "x"}'

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


async def ask(at: House, path: str, *headers: str, over_tcp: bool = False) -> Answer:
    async with connected(at.users if over_tcp else at.operators) as client:
        await client.request(path, b"", *headers, method="GET")
        return await client.answer()


def samples(text: str) -> Samples:
    found = {}
    for family in parsed(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


async def read(at: House) -> Samples:
    answer = await ask(at, "/metrics")
    assert (answer.status, answer.header(b"content-type")) == (200, b"text/plain; version=0.0.4; charset=utf-8")
    return samples(answer.body.decode())


def value(found: Samples, name: str, /, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


async def counted(at: House, model: str, ended: int) -> None:
    """The end of a request is counted after its last byte was sent."""

    def all_ended() -> bool:
        one = at.counts.models.get(model)
        return one is not None and sum(one.statuses.values()) == ended

    await at.until(all_ended, f"{ended} requests of {model!r} are counted; {at.counts.models}")


# ---- what is ----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_each_metric_of_the_list_is_there_and_no_other_of_ours(folder: Path) -> None:
    async with house(folder, QWEN, OTHER, key="sesame") as at:
        at.engines.slow.add("other")
        text = (await ask(at, "/metrics")).body.decode()
        told = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE orchestrator_")}
        assert told == {name: metric.kind for name, metric in METRICS.items()}
        assert [name for name in METRICS if f"# HELP {name} {METRICS[name].help}\n" not in text] == []
        assert "process_resident_memory_bytes " in text
        assert "process_open_fds " in text


@pytest.mark.asyncio
async def test_a_cards_parts_add_up_to_its_size(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        found = await read(at)
        parts = [size for (name, _), size in found.items() if name == "orchestrator_gpu_memory_bytes"]
        assert len(parts) == 6
        assert sum(parts) == value(found, "orchestrator_gpu_size_bytes", gpu="0") == 80 * GIB
        assert value(found, "orchestrator_gpu_info", gpu="0", uuid="GPU-0", name="Card") == 1
        assert 0 <= value(found, "orchestrator_gpu_reading_age_seconds", gpu="0") < 20


@pytest.mark.asyncio
async def test_a_pools_figures_are_those_of_the_loops_look(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        await at.until(lambda: next(iter(at.engines.seen.values())).acked_limit_bytes, "a limit was written")
        found = await read(at)
        assert at.loop.view is not None
        (pool,) = at.loop.view.plan.pools.values()
        here = {"model": "org/qwen", "gpu": "0"}
        assert value(found, "orchestrator_kv_floor_bytes", **here) == pool.floor_bytes
        assert value(found, "orchestrator_kv_ceiling_bytes", **here) == pool.ceiling_bytes
        assert value(found, "orchestrator_kv_used_bytes", **here) == 96 << 20
        assert value(found, "orchestrator_kv_limit_bytes", **here) > 0
        assert value(found, "orchestrator_kv_limit_effective_bytes", **here) > 0
        assert value(found, "orchestrator_kv_floor_short", **here) == 0


@pytest.mark.asyncio
async def test_states_and_moves(folder: Path) -> None:
    async with house(folder, QWEN, OTHER) as at:
        found = await read(at)
        assert value(found, "orchestrator_model_state", model="org/qwen", state="ready") == 1
        assert value(found, "orchestrator_model_state", model="other", state="stopped") == 1
        assert [value(found, "orchestrator_models", state=state) for state in State] == [state in ("stopped", "ready") for state in State]
        assert value(found, "orchestrator_model_start_seconds_count", model="org/qwen") == 1
        await at.operate("POST", "/models/q/sleep")
        await at.until_state("org/qwen", "asleep")
        await at.operate("POST", "/models/q/wake")
        await at.until_state("org/qwen", "ready")
        found = await read(at)
        assert value(found, "orchestrator_model_sleep_seconds_count", model="org/qwen") == 1
        assert value(found, "orchestrator_model_wake_seconds_count", model="org/qwen") == 1
        assert value(found, "orchestrator_model_transitions_total", model="org/qwen", state="ready") == 2
        at.engines.die("org/qwen", "it was killed")
        await at.until(lambda: at.counts.models["org/qwen"].failures, "its end is noticed")
        assert value(await read(at), "orchestrator_engine_failures_total", model="org/qwen") == 1


@pytest.mark.asyncio
async def test_of_many_models_each_family_is_told_once_and_whole() -> None:
    names = [f"m{number}" for number in range(230)]
    async with world(*(spec(name) for name in names)) as there:
        counts = there.loop._counts
        for name in names:
            counts.answered(name, 200, 0.1, 0.05)
        metrics = Metrics(there.registry, there.loop, counts, EngineMetrics(Upstreams(str), lambda: there.loop.view), "nvml")
        text = bytes((await metrics.show()).body).decode()
        heads = [line for line in text.splitlines() if line.startswith("# ")]
        assert len(heads) == len(set(heads))
        found = samples(text)
        for name in names:
            assert value(found, "orchestrator_model_state", model=name, state="stopped") == 1
            assert value(found, "orchestrator_request_seconds_bucket", model=name, le="0.1") == 1
            assert value(found, "orchestrator_request_seconds_count", model=name) == 1


# ---- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_plain_answer(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request("/v1/completions", ASK)
        await (await at.upstream.request()).answer(200, b"{}")
        await client.answer()
        await client.request("/v1/completions", ASK)
        await (await at.upstream.request()).answer(400, b"{}")
        await client.answer()
        await counted(at, "org/qwen", 2)
        found = await read(at)
        assert value(found, "orchestrator_requests_total", model="org/qwen", code="200") == 1
        assert value(found, "orchestrator_requests_total", model="org/qwen", code="400") == 1
        assert value(found, "orchestrator_request_seconds_count", model="org/qwen") == 1
        assert not [key for key in found if key[0].startswith(("orchestrator_time_to_first", "orchestrator_errors"))]


@pytest.mark.asyncio
async def test_the_first_event_of_a_stream_is_timed_not_its_head(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request("/v1/completions", STREAM)
        exchange = await at.upstream.request()
        await exchange.stream()
        await client.head()
        for part in (b"data: 1\n\n", b"data: 2\n\n"):
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
            await exchange.chunk(part)
            assert await client.chunk() == part
        await exchange.end()
        assert await client.chunk() == b""
        await counted(at, "org/qwen", 1)
        one = at.counts.models["org/qwen"]
        assert sum(one.firsts.counts) == sum(one.answers.counts) == 1
        assert 0 < one.firsts.sum < one.answers.sum


@pytest.mark.asyncio
async def test_one_that_waits_is_counted_with_its_wait_and_its_stream_is_timed_too(folder: Path) -> None:
    async with house(folder, OTHER) as at, at.client() as client:
        await client.request("/v1/completions", WAITS[:-1] + b', "stream": true}')
        exchange = await at.upstream.request()
        await exchange.stream()
        await client.head()
        await exchange.chunk(b"data: 1\n\n")
        assert await client.chunk() == b"data: 1\n\n"
        await exchange.chunk(b"data: 2\n\n")
        assert await client.chunk() == b"data: 2\n\n"
        await exchange.end()
        assert await client.chunk() == b""
        await counted(at, "other", 1)
        found = await read(at)
        assert value(found, "orchestrator_queue_wait_seconds_count", model="other") == 1
        waited = value(found, "orchestrator_queue_wait_seconds_sum", model="other")
        first = value(found, "orchestrator_time_to_first_token_seconds_sum", model="other")
        assert 0 < waited <= first <= value(found, "orchestrator_request_seconds_sum", model="other")


@pytest.mark.asyncio
@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_leaves_is_counted_as_one(folder: Path, streams: bool) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request("/v1/completions", STREAM if streams else ASK)
        exchange = await at.upstream.request()
        if streams:
            await exchange.stream()
            await client.head()
        client.leave()
        await exchange.left()
        await counted(at, "org/qwen", 1)
        assert at.counts.models["org/qwen"].statuses == {LEFT: 1}


@pytest.mark.asyncio
@pytest.mark.parametrize("streams", [False, True])
async def test_an_engine_that_breaks_off_is_an_error_also_in_a_stream_that_had_begun(folder: Path, streams: bool) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request("/v1/completions", STREAM if streams else ASK)
        exchange = await at.upstream.request()
        if streams:
            await exchange.stream()
            await client.head()
            await exchange.chunk(b"data: 1\n\n")
            await client.chunk()
        exchange.die()
        await counted(at, "org/qwen", 1)
        found = await read(at)
        assert value(found, "orchestrator_requests_total", model="org/qwen", code="502") == 1
        assert value(found, "orchestrator_errors_total", model="org/qwen", code="engine_error") == 1


@pytest.mark.asyncio
async def test_what_a_client_makes_up_is_no_label(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        for number in range(30):
            await at.post("/v1/completions", b'{"model": "made-up-%d"}' % number)
        await at.post("/v1/completions", b"made-up")
        text = (await ask(at, "/metrics")).body.decode()
        assert "made-up" not in text
        found = samples(text)
        assert value(found, "orchestrator_errors_total", model="", code="model_not_found") == 30
        assert value(found, "orchestrator_errors_total", model="", code="invalid_request_error") == 1
        assert value(found, "orchestrator_requests_total", model="", code="404") == 30


@pytest.mark.asyncio
async def test_the_tokens_of_a_key(folder: Path) -> None:
    keys = Keys("always")
    keys.admit(StoredKey(KeySpec(name="a"), sha256(b"sk-a").digest(), "sk-a", 0.0, None, None), 0)
    async with house(folder, QWEN, keys=keys) as at, at.client() as client:
        await client.request("/v1/completions", ASK, "Authorization: Bearer sk-a")
        await (await at.upstream.request()).answer(200, b'{"usage":{"prompt_tokens":7,"completion_tokens":9}}')
        await client.answer()
        await counted(at, "org/qwen", 1)
        found = await read(at)
        assert value(found, "orchestrator_tokens_total", model="org/qwen", kind="prompt") == 7
        assert value(found, "orchestrator_tokens_total", model="org/qwen", kind="completion") == 9


@pytest.mark.asyncio
async def test_without_a_key_the_tokens_that_an_answer_tells_are_counted(folder: Path, way: str) -> None:
    """A stream that is not asked for its usage does not tell it, and is passed on as it is."""
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request("/v1/completions", ASK)
        await (await at.upstream.request()).answer(200, b'{"usage":{"prompt_tokens":7,"completion_tokens":9}}')
        await client.answer()
        for options, told in ((b'"stream_options": {"include_usage": true}', True), (b'"n": 1', False)):
            body = STREAM[:-1] + b", " + options + b"}"
            await client.request("/v1/completions", body)
            there = await at.upstream.request()
            assert there.body == body
            await there.stream()
            last = b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":20}}\n\n' if told else b"data: {}\n\n"
            await there.chunk(last)
            await there.end()
            assert (await client.answer()).body == last
        await counted(at, "org/qwen", 3)
        found = await read(at)
        assert value(found, "orchestrator_tokens_total", model="org/qwen", kind="prompt") == 107
        assert value(found, "orchestrator_tokens_total", model="org/qwen", kind="completion") == 29


@pytest.mark.asyncio
async def test_an_error_has_no_tokens(folder: Path, way: str) -> None:
    keys = Keys("always")
    keys.admit(StoredKey(KeySpec(name="a"), sha256(b"sk-a").digest(), "sk-a", 0.0, None, None), 0)
    async with house(folder, QWEN, keys=keys) as at, at.client() as client:
        await client.request("/v1/completions", STREAM, "Authorization: Bearer sk-a")
        await (await at.upstream.request()).answer(400, b'{"error":{"message":"too long"}}')
        await client.answer()
        await counted(at, "org/qwen", 1)
        assert at.counts.of("org/qwen").completion_tokens == 0


@pytest.mark.asyncio
async def test_a_histograms_buckets_only_rise_and_end_with_all(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        found = await read(at)
        buckets = sorted(
            (float(dict(labels)["le"].replace("+Inf", "inf")), count)
            for (name, labels), count in found.items()
            if name == "orchestrator_loop_seconds_bucket"
        )
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1] == (math.inf, value(found, "orchestrator_loop_seconds_count"))


# ---- who may read it --------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines"])
async def test_without_the_setting_it_is_not_on_the_users_port(folder: Path, path: str) -> None:
    async with house(folder, QWEN) as at:
        assert (await ask(at, path, over_tcp=True)).status == 404


@pytest.mark.asyncio
async def test_over_tcp_it_needs_the_admins_key(folder: Path) -> None:
    async with house(folder, QWEN, key="sesame") as at:
        assert (await ask(at, "/metrics", over_tcp=True)).status == 401
        assert (await ask(at, "/metrics/engines", over_tcp=True)).status == 401
        assert (await ask(at, "/metrics", "Authorization: Bearer sesame", over_tcp=True)).status == 200


@pytest.mark.asyncio
async def test_with_the_setting_it_is_for_this_machine_and_for_who_has_the_key(folder: Path) -> None:
    elsewhere = "X-Forwarded-For: 10.0.0.9"
    async with house(folder, QWEN, key="sesame", local_metrics=True) as at:
        assert (await ask(at, "/metrics", over_tcp=True)).status == 200
        refused = await ask(at, "/metrics", elsewhere, over_tcp=True)
        assert (refused.status, refused.error["code"]) == (403, "not_permitted")
        assert "admin.tcp" in refused.error["message"]
        assert (await ask(at, "/metrics", elsewhere, "Authorization: Bearer sesame", over_tcp=True)).status == 200


# ---- engines' own -----------------------------------------------------------------------------------------------------

SAID = b"""# HELP vllm:num_requests_running Number.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="q"} 2.0
# HELP python_info Python.
# TYPE python_info gauge
python_info{version="3"} 1.0
# TYPE vllm:bare gauge
vllm:bare 1e+06
vllm:own{model="theirs"} NaN
this is no sample
"""


@pytest.mark.asyncio
async def test_engines_are_merged_with_their_models_name(folder: Path) -> None:
    async with house(folder, QWEN, OTHER) as at, connected(at.operators) as client:
        await client.request("/metrics/engines", method="GET")
        exchange = await at.upstream.request()
        assert exchange.target == b"/metrics"
        await exchange.answer(200, SAID)
        text = (await client.answer()).body.decode()
        found = samples(text)
        assert value(found, "vllm:num_requests_running", model="org/qwen", engine="0", model_name="q") == 2
        assert value(found, "vllm:bare", model="org/qwen") == 1e6
        assert math.isnan(value(found, "vllm:own", model="org/qwen", exported_model="theirs"))
        assert value(found, "orchestrator_engine_scraped", model="org/qwen") == 1
        assert "python_info" not in text
        assert "no sample" not in text
        assert at.seen("org/qwen").in_flight == 0


def test_a_family_is_told_once_and_its_lines_are_together() -> None:
    families: dict[bytes, engine_metrics._Family] = {}
    for name in (b"a", b"b"):
        assert engine_metrics.add(families, SAID, b'model="%b"' % name)
    one = families[b"vllm:num_requests_running"]
    assert (len(one.told), len(one.lines)) == (2, 2)


@pytest.mark.parametrize("said", [b"", b"<html>", b"\xff\xfe 1.0\n", b'a{b="c" 1\n', b'a{b="c"d="e"} 1\n', b"a 1.2.3\n", b"a 1 2 3\n"])
def test_what_prometheus_could_not_read_is_left_out(said: bytes) -> None:
    families: dict[bytes, engine_metrics._Family] = {}
    assert not engine_metrics.add(families, said, b'model="a"')
    assert not [one for one in families.values() if one.lines]


@pytest.mark.asyncio
async def test_an_engine_that_hangs_fails_or_says_too_much_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_metrics, "MOST_BYTES", 1000)
    async with house(folder, QWEN) as at:
        for status, body in ((500, SAID), (200, b"a 1.0\n" * 1000)):
            async with connected(at.operators) as client:
                await client.request("/metrics/engines", method="GET")
                exchange = await at.upstream.request()
                with contextlib.suppress(ConnectionError):  # it may hang up before it was told all
                    await exchange.answer(status, body)
                assert samples((await client.answer()).body.decode()) == {
                    ("orchestrator_engine_scraped", frozenset({("model", "org/qwen")})): 0.0
                }
        monkeypatch.setattr(engine_metrics, "SCRAPE_S", 0.01)
        async with connected(at.operators) as client:
            await client.request("/metrics/engines", method="GET")
            hung = await at.upstream.request()
            assert b"} 0" in (await client.answer()).body
            await hung.left()


@pytest.mark.asyncio
async def test_a_sleeping_engine_is_not_asked_and_nobody_is_asked_for_the_daemons_own(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        await read(at)
        await at.operate("POST", "/models/q/sleep")
        await at.until_state("org/qwen", "asleep")
        answer = await ask(at, "/metrics/engines")
        assert (answer.status, samples(answer.body.decode())) == (200, {})
        assert at.upstream.untouched()


@pytest.mark.asyncio
async def test_who_asks_at_the_same_time_gets_the_same_answer(folder: Path) -> None:
    async with house(folder, QWEN) as at, connected(at.operators) as one, connected(at.operators) as other:
        await one.request("/metrics/engines", method="GET")
        exchange = await at.upstream.request()
        await other.request("/metrics/engines", method="GET")
        await at.operate("GET", "/status")  # on the same server, behind it
        await exchange.answer(200, SAID)
        assert (await one.answer()).body == (await other.answer()).body
        assert at.upstream.connections == 1
