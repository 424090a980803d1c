"""The pairs whose label the reference model doubts most, for a person to look at.

In: the scores and the corpus of a run. Out: the `limit` pairs with the smallest mean_margin (the
reference finds the rejected completion likelier a token than the chosen one), as rows, as
audit/pairs.parquet and audit/pairs.jsonl, and as a table for the terminal. No GPU, no training: a
pass over one small table, then the texts of the listed pairs alone. Memory: one shard and the list.

A doubt is no proof: an unusual but right answer is doubted too. Where a passthrough column says
which labels are wrong, `quality` says how far the doubts can be trusted there.
"""

import heapq
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from refscale.errors import ConfigError
from refscale.evaluation.holdout import auc, known_labels, wilson
from refscale.lineage import require_lineage
from refscale.progress import console, literal, say
from refscale.schema import HOLDOUT, TRAIN
from refscale.selection.strategies import (
    SCORE_COLUMNS,
    pair_id_words,
    score_columns,
    strategy_values,
)
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

STRATEGY = "mean_margin"
PRECISION_AT = (10, 25, 50, 100, 250, 500, 1000)

AUDIT = pa.schema(
    [
        pa.field("rank", pa.int64(), nullable=False),  # 1 is doubted most
        pa.field("pair_id", pa.string(), nullable=False),  # 32 hex digits
        pa.field("mean_margin", pa.float32(), nullable=False),  # nats a token
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("num_chosen_tokens", pa.int32(), nullable=False),
        pa.field("num_rejected_tokens", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("passthrough", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Audit:
    """The doubted pairs.

    Attributes:
        pairs: Rows in AUDIT, most doubted first.
        num_pairs: Scored pairs that were looked at.
        num_doubted: Of those, with a mean_margin below 0: the reference prefers the rejected side.
        quality: `doubt_quality` where labels are known to be wrong; else None.
    """

    pairs: pa.Table
    num_pairs: int
    num_doubted: int
    quality: dict[str, Any] | None

    def summary(self) -> dict[str, Any]:
        """Counts and quality as JSON values."""
        return {
            "strategy": STRATEGY,
            "num_pairs": self.num_pairs,
            "num_doubted": self.num_doubted,
            "num_listed": self.pairs.num_rows,
            "quality": self.quality,
        }


def audit(
    store: Store, limit: int = 50, *, flipped_column: str | None = None, split: str | None = None
) -> Audit:
    """Rank the pairs by doubt and write audit/ into the run.

    Args:
        store: A run whose scores are finished.
        limit: Pairs that are listed.
        flipped_column: Passthrough column that says where the label is known to be wrong, as
            `known_labels` reads it.
        split: Look at this split alone, "train" or "holdout"; None looks at both.

    Raises:
        ConfigError: limit is below 1, there is no such split, or the column does not say which
            labels are wrong, or is in no pair.
        FingerprintError: The scores are of another corpus than the one that is there.
        StorageError: The scores are not finished.
    """
    if limit < 1:
        raise ConfigError(f"the number of pairs to list must be at least 1, got {limit}")
    if split not in (None, TRAIN, HOLDOUT):
        raise ConfigError(
            f"the split to audit must be {TRAIN} or {HOLDOUT}, got {split!r}; leave it out to look"
            " at both"
        )
    corpus, scores = StageFolder(store, "corpus"), StageFolder(store, "scores")
    prepared, scored = corpus.require(), scores.require()
    require_lineage({"corpus": prepared, "scores": scored})
    worst: list[tuple[float, bytes, str]] = []
    num_pairs = num_doubted = 0
    flags: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    for record in scored["files"]:
        table = scores.read_table(record["name"], columns=["pair_id", "split", *SCORE_COLUMNS])
        if split is not None:
            table = table.filter(pc.equal(table["split"], split))
        ids = table["pair_id"].to_pylist()
        values = strategy_values(score_columns(table), pair_id_words(table["pair_id"]), STRATEGY)
        num_pairs += len(values)
        num_doubted += int((values < 0).sum())
        few = np.argsort(values, kind="stable")[:limit]
        # The id breaks ties, so that the list does not depend on the shards.
        last = values[few[-1]] if len(few) else 0.0
        mine = [(float(values[i]), ids[i], record["name"]) for i in np.flatnonzero(values <= last)]
        worst = heapq.nsmallest(limit, worst + mine)
        if flipped_column is not None:
            labelled, flag = _flags(corpus, record["name"], ids, flipped_column)
            flags.append(flag)
            margins.append(values[labelled])
    quality = None
    if flipped_column is not None:
        if not sum(map(len, flags)):
            raise ConfigError(f"no pair of the corpus has a value in the column {flipped_column!r}")
        quality = doubt_quality(np.concatenate(flags), np.concatenate(margins))
    result = Audit(_texts(corpus, scores, worst), num_pairs, num_doubted, quality)
    _write(store, result)
    return result


def doubt_quality(flipped: np.ndarray, mean_margins: np.ndarray) -> dict[str, Any]:
    """How well doubt finds the labels that are known to be wrong.

    Args:
        flipped: (n,) bool.
        mean_margins: (n,) the smaller, the more doubted.

    Returns:
        n and n_flipped; auc: probability that a pair with a wrong label is doubted more than one
        with a right label (None where all are right or all wrong); precision: by k, the share of
        wrong labels among the k most doubted, as an estimate with Wilson's interval, for the round
        numbers up to n and for k = n_flipped; base_rate: that of a list in random order.
    """
    flipped = np.asarray(flipped, dtype=bool)
    order = np.argsort(mean_margins, kind="stable")
    found = np.cumsum(flipped[order])
    n, wrong = len(flipped), int(flipped.sum())
    sizes = sorted({k for k in (*PRECISION_AT, wrong) if 1 <= k <= n})
    return {
        "n": n,
        "n_flipped": wrong,
        "base_rate": wrong / n,
        "auc": auc(np.asarray(mean_margins, dtype=np.float64), ~flipped),
        "precision": {str(k): wilson(int(found[k - 1]), k) for k in sizes},
    }


def _flags(
    corpus: StageFolder, name: str, ids: Sequence[bytes], column: str
) -> tuple[np.ndarray, np.ndarray]:
    """`known_labels` of the pairs."""
    table = corpus.read_table(name, columns=["pair_id", "passthrough"])
    texts = dict(zip(table["pair_id"].to_pylist(), table["passthrough"].to_pylist(), strict=True))
    return known_labels([json.loads(texts[pair_id]) for pair_id in ids], column)


def _texts(
    corpus: StageFolder, scores: StageFolder, worst: Sequence[tuple[float, bytes, str]]
) -> pa.Table:
    """The listed pairs with their texts, a shard at a time."""
    found: dict[bytes, dict[str, Any]] = {}
    for name in dict.fromkeys(shard for *_, shard in worst):
        wanted = pa.array([pair for _, pair, shard in worst if shard == name], pa.binary(16))
        counts = ["num_chosen_tokens", "num_rejected_tokens"]
        fields = ["source", "source_row", "split", "prompt", "chosen", "rejected", "passthrough"]
        for folder, columns in ((corpus, fields), (scores, counts)):
            table = folder.read_table(name, columns=["pair_id", *columns])
            listed = pc.is_in(table["pair_id"].cast(pa.binary()), wanted.cast(pa.binary()))
            for row in table.filter(listed).to_pylist():
                found.setdefault(row["pair_id"], {}).update(row)
    rows = [
        {**found[pair_id], "rank": rank, "mean_margin": value, "pair_id": pair_id.hex()}
        for rank, (value, pair_id, _) in enumerate(worst, 1)
    ]
    return pa.Table.from_pylist(rows, schema=AUDIT)


def _write(store: Store, result: Audit) -> None:
    sink = io.BytesIO()
    pq.write_table(result.pairs, sink, compression="zstd")
    store.write_bytes("audit/pairs.parquet", sink.getvalue())
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in result.pairs.to_pylist())
    store.write_bytes("audit/pairs.jsonl", "".join(lines).encode())
    store.write_json("audit/summary.json", result.summary())


# -- for people ------------------------------------------------------------------------------------


def print_audit(result: Audit, *, rows: int = 20, characters: int = 160) -> None:
    """The most doubted pairs and the summary, to stderr.

    Args:
        result: Of `audit`.
        rows: Pairs shown.
        characters: Of each text.
    """
    table = Table(title="labels that the reference model doubts most", title_justify="left")
    for name in ("", "nats/token", "source:row", "prompt", "chosen", "rejected"):
        table.add_column(name, overflow="fold")
    for row in result.pairs.slice(0, rows).to_pylist():
        texts = [_shown(row[name], characters) for name in ("prompt", "chosen", "rejected")]
        place = f"{row['source']}:{row['source_row']}"
        cells = (str(row["rank"]), f"{row['mean_margin']:+.3f}", place, *texts)
        table.add_row(*map(literal, cells))
    console.print(table)
    for line in audit_lines(result):
        say(line)


def audit_lines(result: Audit) -> list[str]:
    """The summary in words."""
    share = result.num_doubted / max(result.num_pairs, 1)
    lines = [
        f"the reference model prefers the rejected completion in {result.num_doubted:,} of"
        f" {result.num_pairs:,} pairs ({share:.1%})"
    ]
    if result.quality is not None:
        quality: Mapping[str, Any] = result.quality
        known = "undefined" if quality["auc"] is None else f"{quality['auc']:.3f}"
        lines.append(
            f"known wrong labels: {quality['n_flipped']:,} of {quality['n']:,}"
            f" ({quality['base_rate']:.1%}); AUC {known}"
        )
        lines += [
            f"wrong among the {int(k):,} most doubted: {at['value']:.1%}"
            f" ({at['low']:.1%} to {at['high']:.1%})"
            for k, at in quality["precision"].items()
        ]
    return lines


def _shown(text: str, characters: int) -> str:
    """One line of a text; of chat messages the last content."""
    try:
        messages = json.loads(text)
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            text = str(messages[-1].get("content", text))
    except ValueError:
        pass  # plain text
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
