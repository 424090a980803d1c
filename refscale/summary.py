"""The figures of a stage out of its shards' records, and the terse table that the terminal shows.

In: FileRecords, metrics, facts. Out: JSON values for the manifests, and (name, value) lines.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.selection.statistics import LARGE_LEAN, length_lean
from refscale.storage.stages import FileRecord, StageFolder

Lines = list[tuple[str, str]]

# Between the shares of held-out pairs whose longer side is preferred and is chosen.
_LARGE_LENGTH_PREFERENCE = 0.2
# Above every 16-byte id.
_LAST_ID = b"\xff" * 16


# -- scores ----------------------------------------------------------------------------------------


def scoring_details(records: Sequence[FileRecord], wall_s: float) -> dict[str, Any]:
    """Throughput in all and by replica, and the engine's settings.

    Args:
        records: Of the score shards; `counts` as `scoring.ShardScorer` fills them.
        wall_s: Seconds that the stage took, with those of starting; rates are taken over the
            replicas' own seconds.

    Returns:
        JSON values. `useful_tokens` counts a prompt once for all its completions; `flops` are of
        multiply and add apart; `wait_share` is the share of a replica's time without work.
    """
    replicas: dict[str, dict[str, float]] = {}
    totals = dict.fromkeys(("useful_tokens", "computed_tokens", "head_rows", "flops"), 0.0)
    oom_retries, peak = 0, 0
    for record in records:
        counts, stats = record.counts, record.counts["stats"]
        for name in totals:
            totals[name] += stats[name]
        oom_retries += stats["oom_retries"]
        peak = max(peak, stats["peak_memory_bytes"])
        replica = replicas.setdefault(
            counts["replica"],
            dict.fromkeys(("shards", "pairs", "seconds", "wait_s", "useful_tokens", "flops"), 0.0),
        )
        replica["shards"] += 1
        replica["pairs"] += counts["pairs"]
        replica["seconds"] += counts["seconds"]
        # Before its first shard a replica waits for all of Ray to start.
        replica["wait_s"] += counts["wait_s"] if replica["shards"] > 1 else 0.0
        replica["useful_tokens"] += stats["useful_tokens"]
        replica["flops"] += stats["flops"]
    pairs = sum(replica["pairs"] for replica in replicas.values())
    seconds = sum(replica["seconds"] for replica in replicas.values())
    busy = max(seconds, 1e-9)
    waited = sum(replica["wait_s"] for replica in replicas.values())
    for replica in replicas.values():
        own = max(replica["seconds"], 1e-9)
        replica["tokens_per_s"] = replica["useful_tokens"] / own
        replica["flops_per_s"] = replica["flops"] / own
    return {
        "wall_s": wall_s,
        "replica_s": seconds,
        "pairs_per_s": pairs / busy,
        "useful_tokens": int(totals["useful_tokens"]),
        "useful_tokens_per_s": totals["useful_tokens"] / busy,
        "computed_tokens": int(totals["computed_tokens"]),
        # Padding adds to it; what prompts or completions have in common makes it less.
        "computed_per_useful_token": totals["computed_tokens"] / max(totals["useful_tokens"], 1),
        "flops": totals["flops"],
        "model_flops_per_s": totals["flops"] / busy,
        "wait_share": waited / max(waited + seconds, 1e-9),
        "oom_retries": oom_retries,
        "peak_memory_bytes": peak,
        "replicas": replicas,
        "engine": _engine(records),
    }


def _engine(records: Sequence[FileRecord]) -> dict[str, Any]:
    """What a replica chose for its shard, and in how many shards where that was not always so."""
    if not records:
        return {}
    engine = dict(records[-1].counts["engine"])
    for name in ("path", "compiled"):
        chosen = Counter(record.counts["engine"].get(name) or "no" for record in records)
        if len(chosen) > 1:
            engine[name] = ", ".join(f"{value}: {n:,} shards" for value, n in chosen.most_common())
    engine["token_budget"] = min(record.counts["stats"]["token_budget"] for record in records)
    return engine


def scoring_lines(counts: Mapping[str, Any], details: Mapping[str, Any]) -> Lines:
    """The scoring stage's table."""
    engine = details["engine"]
    lines = [
        ("scored", f"{counts['scored']:,} of {counts['pairs']:,} pairs"),
        (
            "speed",
            f"{details['pairs_per_s']:,.1f} pairs/s, {details['useful_tokens_per_s']:,.0f} useful"
            f" tokens/s a replica, {len(details['replicas'])} replica(s)",
        ),
        (
            "engine",
            f"{engine.get('path')} ({engine.get('path_reason')}), {engine.get('dtype')}"
            f" ({engine.get('dtype_reason')}), {engine.get('device')}",
        ),
    ]
    for reason, count in counts["unscorable"].items():
        lines.append((reason, f"{count:,} pairs not scored"))
    return lines


# -- selection -------------------------------------------------------------------------------------


def selection_lines(facts: Mapping[str, Any]) -> Lines:
    """The selection stage's table."""
    everything, kept = facts["all"], facts["kept"]
    size = ", ".join(f"{name} {value}" for name, value in facts["size"].items())
    if facts["match_lengths"]:
        size += ", lengths matched"
    lines = [
        ("kept", f"{facts['num_kept']:,} of {facts['num_pairs']:,} training pairs"),
        ("by", f"{facts['strategy']}, {facts['keep']}, {size}"),
        ("mean key", f"{everything['mean_key']:.4f} of all, {kept['mean_key']:.4f} of the kept"),
        (
            "length",
            f"chosen is {everything['mean_length_difference']:+.1f} tokens longer on average,"
            f" {kept['mean_length_difference']:+.1f} among the kept",
        ),
    ]
    correlation = everything["key_length_correlation"]
    if correlation is not None:
        lines.append(("correlation", f"of key and length difference: {correlation:+.2f}"))
    lean = length_lean(everything, kept)
    if lean is not None and abs(lean) > LARGE_LEAN:
        lines.append(
            (
                "careful",
                f"the kept pairs lean to one length, by {abs(lean):.0%} of a usual difference:"
                " training may learn that instead; try select.match_lengths, compare with random",
            )
        )
    if len(facts["sources"]) > 1:
        for name, source in facts["sources"].items():
            lines.append((name, f"{source['kept']:,} of {source['pairs']:,} kept"))
    return lines


# -- training --------------------------------------------------------------------------------------


def training_line(row: Mapping[str, Any]) -> str:
    """One log row as a line."""
    parts = [f"step {row.get('step', 0)} of {row.get('max_steps', '?')}"]
    for name, shown in (
        ("loss", "loss {:.4f}"),
        ("rewards/accuracies", "accuracy {:.2f}"),
        ("rewards/margins", "margin {:.3f}"),
        ("eval_loss", "holdout loss {:.4f}"),
        ("pairs_per_s", "{:.2f} pairs/s"),
    ):
        if isinstance(row.get(name), (int, float)):
            parts.append(shown.format(row[name]))
    return ", ".join(parts)


def training_lines(metrics: Mapping[str, Any], seconds: float) -> Lines:
    """The training stage's table."""
    lines = [("steps", f"{metrics.get('steps', 0):,} in {seconds:,.0f} s")]
    for name, label in (
        ("start_check_loss", "loss at step 0"),
        ("train_loss", "mean loss"),
        ("rewards/accuracies", "last accuracy"),
        ("rewards/margins", "last margin"),
        ("eval_loss", "holdout loss"),
    ):
        if isinstance(metrics.get(name), (int, float)):
            lines.append((label, f"{metrics[name]:.4f}"))
    best = metrics.get("policy_step")
    if best is not None and best != metrics.get("steps"):
        lines.append(("policy", f"of step {best:,}, the best on the holdout"))
    if "train_path" in metrics:
        lines.append(("path", str(metrics["train_path"])))
    return lines


# -- evaluation ------------------------------------------------------------------------------------


def holdout_sample(
    scores: StageFolder, held: Mapping[str, int], max_pairs: int | None
) -> tuple[bytes, dict[str, int]]:
    """The largest pair_id to evaluate, so that at most `max_pairs` scored holdout pairs are.

    Ids are hashes: the smallest ones are a sample that no order or shard size changes.

    Args:
        scores: The scores stage.
        held: Held-out pairs of each shard that has any.
        max_pairs: Of the sample; None takes all.

    Returns:
        That id, and the pairs of each shard that has any of the sample.
    """
    if max_pairs is None:
        return _LAST_ID, dict(held)
    found: list[tuple[bytes, str]] = []
    for shard in held:
        table = scores.read_table(f"{shard}.parquet", columns=["pair_id", "split"])
        ids = table.filter(pc.equal(table["split"], schema.HOLDOUT))["pair_id"].to_pylist()
        found = sorted([*found, *((pair_id, shard) for pair_id in ids)])[:max_pairs]
    counts = Counter(shard for _, shard in found)
    return (found[-1][0] if found else _LAST_ID), dict(sorted(counts.items()))


def read_all(folder: StageFolder, records: Iterable[FileRecord], wanted: pa.Schema) -> pa.Table:
    """The tables of all records as one."""
    tables = [folder.read_table(record.name) for record in records if record.rows]
    return pa.concat_tables(tables) if tables else wanted.empty_table()


def evaluation_lines(facts: Mapping[str, Any]) -> Lines:
    """The evaluation stage's table."""
    lines: Lines = []
    if "overall" in facts:
        metrics = facts["overall"]
        lines.append(("holdout", f"{metrics['n']:,} pairs"))
        for name, label in (
            ("reward_accuracy", "reward accuracy"),
            ("reward_margin", "reward margin"),
            ("ranking_accuracy", "ranking accuracy"),
        ):
            before, after = metrics[name]["before"], metrics[name]["after"]
            lines.append((label, f"{_estimate(before)} before, {_estimate(after)} after"))
        longer = metrics.get("longer_side")  # an earlier refscale stored none
        if longer and abs(longer["preferred"] - longer["chosen"]) > _LARGE_LENGTH_PREFERENCE:
            lines.append(
                (
                    "careful",
                    f"the policy prefers the longer side in {longer['preferred']:.0%} of"
                    f" {longer['n']:,} pairs, chosen is it in {longer['chosen']:.0%}: it may have"
                    " learned length",
                )
            )
    for reason, count in facts["unscorable"].items():
        lines.append(("left out", f"{count:,} pairs that the policy cannot score: {reason}"))
    if "purity" in facts:
        purity = facts["purity"]
        for name, label in (
            ("corpus", "right labels, corpus"),
            ("random", "right labels, random"),
            ("kept", "right labels, kept"),
        ):
            if purity[name] is not None:  # where no kept pair has a known label
                lines.append((label, _estimate(purity[name])))
    return lines


def _estimate(estimate: Mapping[str, float]) -> str:
    if estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
