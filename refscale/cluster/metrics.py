"""Prometheus metrics of a run, through Ray's own exporter.

In: counts that actors and tasks have anyway. Out: `ray_refscale_*` series on every node's metrics
port, which cluster/monitoring/grafana-dashboard.json shows. Metrics are created in the process that
reports them, on first use; where Ray is not initialised a call costs one look-up, no more.
"""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

# Name -> (kind, description, tags). Ray puts `ray_` in front; a counter's name ends in `_total`.
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "refscale_pairs_scored_total": ("counter", "Pairs scored.", ("stage",)),
    "refscale_tokens_total": (
        "counter",
        "Tokens scored: a prompt once for all its completions.",
        ("stage",),
    ),
    "refscale_flops_total": (
        "counter",
        "Operations of scoring, multiply and add apart.",
        ("stage",),
    ),
    "refscale_pairs_quarantined_total": ("counter", "Rows refused, by reason.", ("reason",)),
    "refscale_pairs_unscorable_total": (
        "counter",
        "Pairs without a score, by reason.",
        ("reason",),
    ),
    "refscale_token_budget": ("gauge", "Tokens of a forward pass.", ("replica",)),
    "refscale_busy_share": (
        "gauge",
        "Share of the last shard's time that a replica spent on scoring, not waiting.",
        ("replica",),
    ),
    "refscale_tokens_per_second": ("gauge", "Of the last shard, by replica.", ("replica",)),
}


def report_shard(counts: Mapping[str, Any], *, stage: str = "score") -> None:
    """Report a scored shard.

    Args:
        counts: As `scoring.ShardScorer` puts them into a shard's record.
        stage: score or evaluate.
    """
    if not _active():
        return
    stats, replica = counts["stats"], {"replica": str(counts["replica"])}
    seconds, waited = counts["seconds"], counts["wait_s"]
    _count("refscale_pairs_scored_total", counts["pairs"] - len(counts["unscorable"]), stage=stage)
    _count("refscale_tokens_total", stats["useful_tokens"], stage=stage)
    _count("refscale_flops_total", stats["flops"], stage=stage)
    for _, reason in counts["unscorable"]:
        _count("refscale_pairs_unscorable_total", 1, reason=reason)
    _metric("refscale_token_budget").set(stats["token_budget"], replica)
    _metric("refscale_busy_share").set(seconds / max(seconds + waited, 1e-9), replica)
    _metric("refscale_tokens_per_second").set(stats["useful_tokens"] / max(seconds, 1e-9), replica)


def report_refusals(counts: Mapping[str, int]) -> None:
    """Report refused rows.

    Args:
        counts: Rows by reason, as `preparation.Counts.quarantined`.
    """
    if not _active():
        return
    for reason, rows in counts.items():
        _count("refscale_pairs_quarantined_total", rows, reason=reason)


def _active() -> bool:
    # A process that has not imported Ray has not initialised it either.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _count(name: str, value: float, **tags: str) -> None:
    if value > 0:  # Ray refuses an increment of 0
        _metric(name).inc(value, tags)


@cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    kind, description, tags = METRICS[name]
    return (Counter if kind == "counter" else Gauge)(name, description=description, tag_keys=tags)
