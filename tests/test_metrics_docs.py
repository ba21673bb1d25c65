"""docs/metrics.md, the dashboard and the alerts tell of the metrics that are served, of all of them, and of no other."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import errors
from orchestrator.api import engine_metrics
from orchestrator.api.metric_list import METRICS, Told
from orchestrator.policy import budgets
from orchestrator.policy.instance import State

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/metrics.md").read_text()
DASHBOARD = json.loads((ROOT / "config/grafana/dashboard.json").read_text())
RULES = yaml.safe_load((ROOT / "config/grafana/alerts.yaml").read_text())
ENGINES = {
    "orchestrator_engine_scraped": Told("gauge", "1 where the metrics of a ready engine are here, 0 where it did not give any.", ("model",))
}
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
# vLLM 0.24's, and prometheus_client's
THEIRS = {
    "vllm:generation_tokens_total": {"model", "model_name", "engine"},
    "vllm:num_requests_running": {"model", "model_name", "engine"},
    "vllm:num_requests_waiting": {"model", "model_name", "engine"},
    "vllm:kv_cache_usage_perc": {"model", "model_name", "engine"},
    "process_resident_memory_bytes": set[str](),
    "process_open_fds": set[str](),
}
NAME = re.compile(r"\b(?:orchestrator_\w+|vllm:\w+|process_\w+)")
SELECTED = re.compile(r"((?:orchestrator_|vllm:|process_)\w+)\{([^}]*)\}")
OF_PROMETHEUS = {"job", "instance", "le"}


def series() -> dict[str, set[str]]:
    """Name -> labels of all that can be asked for."""
    found = dict(THEIRS)
    for name, metric in (METRICS | ENGINES).items():
        for part in PARTS.get(metric.kind, ("",)):
            found[name + part] = set(metric.labels)
    return found


def panels(inside: Any) -> Iterator[dict[str, Any]]:
    for panel in inside["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


def dashboard_queries() -> list[str]:
    queries = [target["expr"] for panel in panels(DASHBOARD) for target in panel.get("targets", [])]
    return [*queries, *(var["definition"] for var in DASHBOARD["templating"]["list"] if "definition" in var)]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


QUERIES = [*dashboard_queries(), *(rule["expr"] for rule in alerts())]


def test_the_page_has_each_metric_as_it_is_served() -> None:
    rows = re.findall(r"^\| `(orchestrator_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", PAGE, re.MULTILINE)
    told = {name: Told(kind, text, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, text in rows}
    assert len(rows) == len(told)
    assert told == METRICS | ENGINES


def test_names_are_as_prometheus_has_them() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") is (metric.kind == "counter"), name
        if metric.kind in PARTS:
            assert name.endswith("_seconds"), name
        assert not re.search(r"_(ms|mib|gib|percent|milli\w*)(_|$)", name), name
        assert metric.help.endswith("."), name


def test_what_is_said_of_engines_is_what_they_are_served_with() -> None:
    for name, metric in ENGINES.items():
        assert engine_metrics.HELP.decode() == f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"


@pytest.mark.parametrize("query", QUERIES)
def test_queries_ask_for_what_there_is(query: str) -> None:
    known = series()
    names = NAME.findall(query)
    assert names, "a query that asks for nothing"
    assert [name for name in names if name not in known] == []
    for name, selectors in SELECTED.findall(query):
        asked = set(re.findall(r"(\w+)\s*[=!]", selectors))
        assert asked <= known[name] | OF_PROMETHEUS, name
    for by in re.findall(r"\bby \(([^)]*)\)", query):
        labels = set(re.split(r",\s*", by))
        assert labels <= set.union(*(known[name] for name in names)) | OF_PROMETHEUS
    assert query.count("(") == query.count(")")
    for states in re.findall(r'state=~?"([^"]*)"', query):
        assert set(states.split("|")) <= {state.value for state in State}
    for codes in re.findall(r'code=~?"([^"]*)"', query):
        ours = {error.code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.OrchestratorError)}
        assert set(codes.split("|")) <= ours


def test_rates_are_of_counters_and_nothing_else() -> None:
    rising = {name for name, metric in METRICS.items() if metric.kind == "counter"}
    rising |= {name + part for name, metric in METRICS.items() for part in PARTS.get(metric.kind, ())} | {"vllm:generation_tokens_total"}
    for query in QUERIES:
        for name in re.findall(r"(?:rate|increase)\(([\w:]+)", query):
            assert name in rising, query
        for name in set(NAME.findall(query)) & rising - {"orchestrator_build_info"}:
            assert re.search(rf"(rate|increase)\({name}\b", query), f"{name} only rises: {query}"


def test_each_metric_of_ours_is_on_the_dashboard_or_in_an_alert_or_is_an_addition() -> None:
    asked = {name for query in QUERIES for name in NAME.findall(query)}
    parts = {name: {name + part for part in PARTS.get(metric.kind, ("",))} for name, metric in METRICS.items()}
    left = {name for name, several in parts.items() if not several & asked}
    assert left == {  # for queries by hand
        "orchestrator_claim_bytes", "orchestrator_engine_gpu_bytes", "orchestrator_gpu_free_bytes", "orchestrator_gpu_pool_bytes",
        "orchestrator_gpu_kv_limit_bytes", "orchestrator_kv_target_bytes", "orchestrator_launch_server_up",
        "orchestrator_launch_server_forks_total", "orchestrator_model_expected_seconds",
    }  # fmt: skip


def test_alerts_say_what_to_do_and_name_labels_that_they_have() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        text = rule["annotations"]["summary"] + rule["annotations"]["mend"]
        labels = set.union(*(series()[name] for name in NAME.findall(rule["expr"])))
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels, rule["alert"]


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in panels(DASHBOARD)]
    assert len(ids) == len(set(ids))
    variables = {var["name"] for var in DASHBOARD["templating"]["list"]}
    for query in dashboard_queries():
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}
    places = [panel["gridPos"] for panel in panels(DASHBOARD)]
    for number, one in enumerate(places):
        assert one["x"] + one["w"] <= 24
        for other in places[:number]:
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for panel in panels(DASHBOARD):
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


def test_each_reason_of_a_limit_is_told() -> None:
    told = set(re.findall(r"^\| `([a-z ]+)` \| ", PAGE[PAGE.index("| `reason` |") :].split("\n\n")[0], re.MULTILINE)) - {"reason"}
    source = Path(budgets.__file__).read_text()
    code = source[source.index("def plan(") :]
    reasons = {text for line in code.splitlines() if re.search(r"return |reason = ", line) for text in re.findall(r'"([a-z ]{6,})"', line)}
    assert told == reasons
