"""deploy/monitoring: every name and label that it asks for is one that the service gives, and its parts agree.

The figures are taken from a server that has answered, been refused and run into an error.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from alpaca_lora.server.errors import ApiError
from tests.deploy.deploy_files import CONFIG, DEPLOY, changed, documents, serve_config
from tests.package_files import read_files
from tests.server.open_server import BASE, KEY, open_server, until

FOLDER = DEPLOY / "monitoring"
COMPOSE = documents(DEPLOY / "compose.yml")[0]
PROMETHEUS = documents(FOLDER / "prometheus.yml")[0]
ALERTS = documents(FOLDER / "alerts.yml")[0]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((FOLDER / "grafana/alpaca-lora.json").read_text(encoding="utf-8"))
JOB = PROMETHEUS["scrape_configs"][0]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds
Figures = dict[str, set[str]]  # name of a series -> its labels


@pytest.fixture(scope="module")
def figures() -> Figures:
    """What /metrics has after a while, asked as Prometheus does."""
    with open_server() as server:
        for model in (BASE, "shop"):
            assert server.chat(model=model, max_tokens=5).status_code == 200
        assert server.post("/v1/chat/completions", {}, key=None).status_code == 401
        assert server.get(JOB["metrics_path"], key=None).status_code == 401
        until(lambda: server.is_idle)
        server.service.metrics.error(ApiError(503, "x", code="engine_failed"))
        text = server.get(JOB["metrics_path"], key=KEY).text
    found: Figures = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: labels | SCRAPED for name, labels in found.items()}


def dashboard_queries(dashboard: Any) -> Iterator[tuple[str, str]]:
    """(panel, query), with what Grafana puts in the place of its variables."""
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m")
            used = set(re.findall(r"\$\{?(\w+)", query))
            assert used <= known, f"{panel['title']}: {used - known}"
            yield panel["title"], re.sub(r"\$(\w+)", r"\1", query)


def parts(query: Any) -> Iterator[Any]:
    """Every expression inside of a query, itself first."""
    yield query
    names = ("lhs", "rhs", "expr", "param", "vector_selector")
    inner = [getattr(query, name, None) for name in names] + list(getattr(query, "args", None) or [])
    for part in inner:
        if isinstance(part, promql.Expr):
            yield from parts(part)


def problems(query: str, figures: Figures) -> list[str]:
    """Names and labels that the service does not have. ValueError for what is no PromQL."""
    found = []
    everything = list(parts(promql.parse(query)))
    selectors = [part for part in everything if isinstance(part, promql.VectorSelector)]
    if not selectors:
        found.append("no figure is asked for")
    of_all = set().union(*(figures.get(selector.name, set()) for selector in selectors))
    for selector in selectors:
        labels = figures.get(selector.name)
        if labels is None:
            found.append(f"no figure {selector.name}")
            continue
        matchers = selector.matchers.matchers
        found += [f"{selector.name} has no label {one.name}" for one in matchers if one.name not in labels]
        found += [f"no job {one.value}" for one in matchers if one.name == "job" and one.value != JOB["job_name"]]
        found += [f"no code {code}" for one in matchers if one.name == "code" for code in _unknown_codes(one.value)]
    for part in everything:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            found += [f"no label {label}" for label in part.modifier.labels if label not in of_all]
    return found


def _unknown_codes(pattern: str) -> list[str]:
    """Codes of errors that stand nowhere in the service's source."""
    source = "".join(file.text for file in read_files("alpaca_lora/server"))
    return [code for code in pattern.split("|") if f'"{code}"' not in source]


# ---- queries


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_there_is(rule: Any, figures: Figures) -> None:
    assert problems(rule["expr"], figures) == []


def test_the_dashboard_asks_for_what_there_is(figures: Figures) -> None:
    found = {title: found for title, query in dashboard_queries(DASHBOARD) if (found := problems(query, figures))}
    assert found == {}
    lists = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    for query in lists:
        inner = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert inner and problems(f"sum by ({inner[2]}) ({inner[1]})", figures) == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(vllm:num_request_running)",
        "vllm:num_requests_running{model='x'}",
        "sum by (status) (rate(vllm:request_success_total[5m]))",
        "rate(vllm:time_to_first_token_seconds[5m])",
        'up{job="alpaca"} == 0',
        'alpaca_lora:http_errors_total{code="queue_is_full"}',
        "1 + 1",
        "avg(vllm:kv_cache_usage_perc) or foo",
        "histogram_quantile(0.9, sum by (le) (rate(vllm:request_success_total[5m])))",
    ],
)
def test_a_wrong_query_is_noticed(query: str, figures: Figures) -> None:
    assert problems(query, figures) != []


def test_what_is_no_promql_is_noticed(figures: Figures) -> None:
    for query in ("sum(rate(vllm:num_requests_running))", "sum(", "rate(vllm:prompt_tokens_total)"):
        with pytest.raises(ValueError):
            problems(query, figures)


# ---- files


def test_rules_are_whole() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) > 5
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == set(rule["annotations"])
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s"))


def test_the_queue_alert_comes_before_the_queue_is_full() -> None:
    config = serve_config(["serve", "--config", CONFIG], DEPLOY / "serve.yml")
    expression = next(rule["expr"] for rule in RULES if rule["alert"] == "AlpacaLoraQueueLong")
    assert 0 < float(expression.rpartition(">")[2]) < config.max_queue


def wiring(compose: Any, prometheus: Any) -> list[str]:
    """Where Prometheus and Grafana, as compose.yml runs them, do not find each other's files and addresses."""
    services = compose["services"]
    mounted = {name: {one["target"] for one in services[name]["configs"]} for name in ("prometheus", "grafana")}
    job = prometheus["scrape_configs"][0]
    source = documents(FOLDER / "grafana/datasources.yml")[0]["datasources"][0]
    provider = documents(FOLDER / "grafana/dashboards.yml")[0]["providers"][0]
    config = serve_config(["serve", "--config", CONFIG], DEPLOY / "serve.yml")
    alias, port = services["server"]["networks"]["default"]["aliases"][0], config.port
    key = job["authorization"]["credentials_file"]
    password = services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    wanted = [
        ("rules", all(f"/etc/prometheus/{name}" in mounted["prometheus"] for name in prometheus["rule_files"])),
        ("configuration", "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]),
        ("key", key in [f"/run/secrets/{name}" for name in services["prometheus"]["secrets"]]),
        ("password", password in [f"/run/secrets/{name}" for name in services["grafana"]["secrets"]]),
        ("target", job["static_configs"] == [{"targets": [f"{alias}:{port}"]}]),
        ("source", source["url"] == "http://prometheus:9090" and source["uid"] == "prometheus"),
        ("dashboard", f"{provider['options']['path']}/alpaca-lora.json" in mounted["grafana"]),
        ("home", services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted["grafana"]),
    ]
    return [what for what, holds in wanted if not holds]


def test_prometheus_and_grafana_find_each_other() -> None:
    assert wiring(COMPOSE, PROMETHEUS) == []
    assert set(PROMETHEUS) == {"global", "rule_files", "scrape_configs"}
    assert set(JOB) == {"job_name", "metrics_path", "authorization", "static_configs"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("rule_files",), ["alarms.yml"]),
        (("scrape_configs", 0, "authorization", "credentials_file"), "/run/secrets/key"),
        (("scrape_configs", 0, "static_configs", 0, "targets"), ["alpaca-lora:8080"]),
    ],
)
def test_a_broken_copy_is_noticed(path: tuple[str | int, ...], value: Any) -> None:
    assert wiring(COMPOSE, changed(PROMETHEUS, path, value)) != []


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    sources = {json.dumps(panel["datasource"]) for panel in DASHBOARD["panels"]}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of the Debian package prometheus")
def test_alerts_do_what_they_are_for(tmp_path: Path) -> None:
    tests = Path(__file__).with_name("alerts.test.yml")
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    text = tests.read_text().replace("AlpacaLoraCacheFull", "AlpacaLoraCacheEmpty")
    broken = tmp_path / "alerts.test.yml"
    broken.write_text(text.replace("../../deploy", str(DEPLOY)))
    done = subprocess.run(["promtool", "test", "rules", str(broken)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0


def test_every_alert_has_a_case() -> None:
    text = Path(__file__).with_name("alerts.test.yml").read_text()
    assert [rule["alert"] for rule in RULES if f'alertname="{rule["alert"]}"' not in text] == []
