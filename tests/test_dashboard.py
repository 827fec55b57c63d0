"""Prometheus and Grafana in ``deploy/``: they look at the nodes of the compose file, and ask for what a real node serves.

Where ``promtool`` is installed it reads the Prometheus file and every query of the dashboard.
"""

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.server import Server
from tests.test_deploy import DEPLOY, LIMIT_S, NODES, compose, read_yaml, run

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "ayder.json"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def test_prometheus_scrapes_the_nodes_of_compose() -> None:
    (job,) = read_yaml(DEPLOY / "prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert [entry["targets"] for entry in job["static_configs"]] == [[f"{name}:1109"] for name in NODES]
    mounts = compose()["services"]["prometheus"]["volumes"]
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in mounts


@needs_promtool
def test_prometheus_accepts_its_file() -> None:
    done = run("promtool", "check", "config", str(DEPLOY / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str, str]]:
    """Panel title, query and legend of everything the dashboard shows."""
    return [(panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]]


def test_the_dashboard_is_provisioned() -> None:
    (source,) = read_yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    (provider,) = read_yaml(DEPLOY / "grafana" / "provisioning" / "dashboards" / "ayder.yml")["providers"]
    services = compose()["services"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].endswith(f"/{DASHBOARD.name}")
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert host in services and any(entry.endswith(f":{port}") for entry in services[host]["ports"])
    used = {panel["datasource"]["uid"] for panel in panels()}
    assert used == {source["uid"]}


def test_the_dashboard_is_laid_out() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    titles = {title for title, _, _ in queries()}
    assert {
        "Role",
        "Term",
        "Lag behind the newest commit",
        "Commit latency",
        "Write and sync of one append",
        "Group lag",
    } <= titles


METRIC = re.compile(r"\b(?:ayder|process|ramforge|python)_[a-z0-9_]+")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Every sample a node in use serves, with the names of its labels."""
    with Server(tmp_path_factory.mktemp("metrics")) as server:
        url = server.start()

        def call(path: str, body: bytes | None = None) -> bytes:
            request = urllib.request.Request(url + path, body, {"Authorization": "Bearer dev"})
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return bytes(answer.read())

        call("/broker/topics", b'{"name":"orders","partitions":1}')
        call("/broker/topics/orders/produce?partition=0", b"one")
        call("/broker/consume/orders/billing/0?from=earliest")
        call("/broker/commit", b'{"topic":"orders","group":"billing","partition":0,"offset":0}')
        samples: dict[str, set[str]] = {}
        for path in ("/metrics", "/metrics"):  # the second knows how long the first took
            for family in text_string_to_metric_families(call(path).decode()):
                for sample in family.samples:
                    samples.setdefault(sample.name, set()).update(sample.labels)
        yield samples


@pytest.mark.parametrize(("title", "query", "legend"), queries(), ids=lambda text: text if len(text) < 40 else "")
def test_a_node_serves_what_the_dashboard_asks_for(served: dict[str, set[str]], title: str, query: str, legend: str) -> None:
    names = METRIC.findall(query)
    assert names, query
    assert set(names) <= set(served), f"{title}: {sorted(set(names) - set(served))} is not served"
    known = {"instance", "job"}.union(*(served[name] for name in names))
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
    matched = set(re.findall(r"[{,]\s*(\w+)=~?\"", query))
    assert grouped | matched <= known, f"{title}: no such label"
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert shown <= (grouped or known), f"{title}: the legend names a label that the query drops"


def test_the_variables_of_the_dashboard_are_served(served: dict[str, set[str]]) -> None:
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    for variable in variables:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        assert metric in served and label in served[metric] | {"instance"}
    used = {name for _, query, _ in queries() for name in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert used == {variable["name"] for variable in variables}


@needs_promtool
def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    rules = [
        {
            "record": f"panel:{number}",
            "expr": query.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$topic", ".*"),
        }
        for number, (_, query, _) in enumerate(queries())
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    done = run("promtool", "check", "rules", str(tmp_path / "rules.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
