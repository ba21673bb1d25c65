"""The running daemon as Prometheus reads it, over TCP and not as root: what was done is counted, and a hung engine holds up nothing."""

import urllib.request
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import Daemon, eventually
from tests.e2e.test_serving import plain, streamed

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(daemon: Daemon, path: str = "/metrics") -> Samples:
    with urllib.request.urlopen(daemon.url.removesuffix("/v1") + path, timeout=20) as answer:
        text = answer.read().decode()
    return {(s.name, frozenset(s.labels.items())): s.value for family in parsed(text) for s in family.samples}


def value(found: Samples, name: str, /, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


@pytest.mark.timeout(240)
def test_prometheus_reads_what_was_done_and_a_hung_engine_holds_up_nothing(fresh: Fresh, client: Client) -> None:
    daemon = fresh(ORCH_METRICS__LOCAL="true").start()
    name = daemon.name("a")
    daemon.add(name)
    for ask in (plain, streamed):
        ask(client(daemon), name)

    def counted() -> Samples | None:
        found = scrape(daemon)
        return found if value(found, "orchestrator_requests_total", model=name, code="200") == 2 else None

    found = eventually(counted, "both requests are counted")
    assert found is not None
    assert value(found, "orchestrator_request_seconds_count", model=name) == 2
    assert value(found, "orchestrator_time_to_first_token_seconds_count", model=name) == 1
    assert value(found, "orchestrator_model_start_seconds_count", model=name) == 1
    assert value(found, "orchestrator_model_state", model=name, state="ready") == 1
    assert value(found, "orchestrator_kv_limit_bytes", model=name, gpu="0") > 0
    assert value(found, "orchestrator_loop_errors_total") == 0
    assert value(found, "process_resident_memory_bytes") > 0
    parts = sum(size for (metric, _), size in found.items() if metric == "orchestrator_gpu_memory_bytes")
    assert parts == value(found, "orchestrator_gpu_size_bytes", gpu="0")

    engines = scrape(daemon, "/metrics/engines")
    assert value(engines, "vllm:generation_tokens_total", model=name, engine="0", model_name=name) >= 40
    assert value(engines, "orchestrator_engine_scraped", model=name) == 1
    with daemon.engines_held():
        assert value(scrape(daemon), "orchestrator_model_state", model=name, state="ready") == 1
        assert scrape(daemon, "/metrics/engines") == {("orchestrator_engine_scraped", frozenset({("model", name)})): 0.0}
    daemon.tell(name, "sleep")
    daemon.until_state(name, "asleep")
    assert scrape(daemon, "/metrics/engines") == {}
    assert value(scrape(daemon), "orchestrator_model_sleep_seconds_count", model=name) == 1
