"""Metrics: what is reported, under which names, and that nothing happens without Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refscale.cluster import metrics

COUNTS = {
    "pairs": 10,
    "unscorable": [["00ff", "out_of_memory"], ["0100", "out_of_memory"]],
    "replica": "host:1",
    "seconds": 3.0,
    "wait_s": 1.0,
    "stats": {"useful_tokens": 600, "flops": 7e9, "token_budget": 2048},
}


@pytest.fixture
def recorded(monkeypatch):
    """Everything that is reported, as (name, operation, value, tags)."""
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def inc(self, value, tags):
            calls.append((self.name, "inc", value, tags))

        def set(self, value, tags):
            calls.append((self.name, "set", value, tags))

    monkeypatch.setattr(metrics, "_metric", Recorder)
    monkeypatch.setattr(metrics, "_active", lambda: True)
    return calls


def test_a_shard_reports_pairs_tokens_operations_budget_and_busy_share(recorded):
    metrics.report_shard(COUNTS)
    found = {(name, *tags.values()): value for name, _, value, tags in recorded[:3]}
    assert found == {
        ("refscale_pairs_scored_total", "score"): 8,
        ("refscale_tokens_total", "score"): 600,
        ("refscale_flops_total", "score"): 7e9,
    }
    assert (
        recorded[3:5]
        == [("refscale_pairs_unscorable_total", "inc", 1, {"reason": "out_of_memory"})] * 2
    )
    gauges = {name: value for name, operation, value, _ in recorded if operation == "set"}
    assert gauges == {
        "refscale_token_budget": 2048,
        "refscale_busy_share": 0.75,  # 3 of 4 seconds
        "refscale_tokens_per_second": 200,
    }


def test_refusals_are_counted_by_reason_and_zeros_left_out(recorded):
    metrics.report_refusals({"null_field": 3, "bad_json": 0})
    assert recorded == [("refscale_pairs_quarantined_total", "inc", 3, {"reason": "null_field"})]


def test_every_call_uses_the_declared_tags(recorded):
    metrics.report_shard(COUNTS)
    metrics.report_refusals({"null_field": 3})
    assert {name for name, *_ in recorded} == set(metrics.METRICS)
    for name, operation, _, tags in recorded:
        kind, _, declared = metrics.METRICS[name]
        assert tuple(tags) == declared
        assert operation == ("inc" if kind == "counter" else "set")
        assert (kind == "counter") == name.endswith("_total")


def test_without_ray_nothing_is_imported_and_nothing_happens():
    code = (
        "import json, sys; from refscale.cluster import metrics;"
        "metrics.report_shard(json.loads(sys.argv[1])); metrics.report_refusals({'x': 1});"
        "sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(COUNTS)], timeout=60)
    assert done.returncode == 0


def test_the_dashboard_asks_only_for_metrics_that_exist():
    path = Path(__file__).resolve().parents[2] / "cluster/monitoring/grafana-dashboard.json"
    dashboard = json.loads(path.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    asked = {
        word
        for query in queries
        for word in query.replace("(", " ")
        .replace("[", " ")
        .replace("{", " ")
        .replace(")", " ")
        .split()
        if word.startswith("ray_refscale")
    }
    assert asked == {f"ray_{name}" for name in metrics.METRICS}
