"""Scoring a corpus shard by shard: the three steps of the graph, as plain callables.

    read_pairs  a shard's encoded pairs out of corpus/, as Arrow bytes      (task)
    ShardScorer their log-probs by the model this actor hosts                (actor)
    publish     scores/shard.parquet and its record                         (task)

No ray here: pipeline.py puts the steps on Ray Data, where reading and publishing run in their own
processes and so overlap with the model's work. The evaluation of a policy reads and scores by
the same steps.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from refscale import schema
from refscale.cluster import metrics
from refscale.errors import ModelError, ScoringError
from refscale.storage.copies import local_folder
from refscale.storage.stages import StageFolder

# What scoring needs of a corpus shard; the text stays on disk.
PAIR_COLUMNS = [
    "pair_id",
    "source",
    "split",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "chosen_truncated",
    "rejected_truncated",
]

Item = dict[str, Any]


@dataclass(frozen=True)
class ScorerSettings:
    """All that a scoring replica needs; plain data.

    Fields as `ReferenceModel.load`, but for dtype_reason, which its info shows, stage, under which
    its metrics run, and dtype_asked: of `auto`, a replica checks that it was resolved for its like.
    """

    model_name_or_path: str
    revision: str | None
    dtype: str
    dtype_reason: str
    path: str
    token_budget: int | None
    compilation: str
    trust_remote_code: bool
    attn_implementation: str | None
    adapter: str | None
    quantization: str | None
    num_threads: int | None
    # A replica without a GPU of its own still sees all of its machine's: Ray hides none from it.
    device: str = "auto"
    stage: str = "score"
    dtype_asked: str = ""

    def for_policy(self, folder: str) -> "ScorerSettings":
        """The same for the trained policy: a plain model in `folder`, a path or URI."""
        return replace(
            self,
            model_name_or_path=folder,
            revision=None,
            adapter=None,
            quantization=None,
            stage="evaluate",
        )


def engine_version() -> int:
    """Version of the code that computes log-probs: part of every score's fingerprint."""
    from refscale.scoring.reference import ENGINE_VERSION

    return ENGINE_VERSION


def resolve_dtype(requested: str, *, cuda: bool) -> tuple[str, str]:
    """`model.dtype` resolved for a device kind, for example "bfloat16", and why."""
    from refscale.scoring.reference import choose_dtype

    dtype, reason = choose_dtype(requested, "cuda" if cuda else "cpu")
    return str(dtype).removeprefix("torch."), reason


def _check_dtype(dtype: str, reason: str, device: str) -> None:
    """Refuse bfloat16 that was chosen for another machine than this replica's."""
    import torch

    own, why = resolve_dtype("auto", cuda=device != "cpu" and torch.cuda.is_available())
    if dtype == "bfloat16" and own != dtype:
        raise ModelError(
            f"model.dtype: auto chose bfloat16 where the run was started ({reason}), and a replica"
            f" runs where it is slow ({why}); set model.dtype: {own}"
        )


def table_to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes) -> pa.Table:
    """The table of an Arrow IPC stream, without copying the columns."""
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()


def read_pairs(
    corpus: StageFolder, *, holdout_up_to: bytes | None = None
) -> Callable[[Item], Item]:
    """The reading step.

    Args:
        corpus: The corpus stage.
        holdout_up_to: Read only holdout pairs with a pair_id up to this; None reads all pairs.
    """

    def read(item: Item) -> Item:
        table = corpus.read_table(f"{item['shard']}.parquet", columns=PAIR_COLUMNS)
        if holdout_up_to is not None:
            table = schema.held_out(table, holdout_up_to)
        return {"shard": item["shard"], "pairs": table_to_bytes(table)}

    return read


class ShardScorer:
    """The scoring step: hosts one replica of a model and scores shard after shard.

    The first pairs that a replica sees serve as its self-check.
    """

    def __init__(self, settings: ScorerSettings) -> None:
        from refscale.scoring.reference import ReferenceModel

        options = asdict(settings)
        name, reason = options.pop("model_name_or_path"), options.pop("dtype_reason")
        self._stage = options.pop("stage")
        if options.pop("dtype_asked") == "auto":
            _check_dtype(settings.dtype, reason, settings.device)
        with local_folder(name) as folder:
            self._model = ReferenceModel.load(folder, **options)
        self._model.info["dtype_reason"] = reason
        self._checked = False
        self._replica = f"{socket.gethostname()}:{os.getpid()}"
        self._idle_since = time.monotonic()

    def __call__(self, item: Item) -> Item:
        """Scores of one shard as SCORES bytes, with counts for its record."""
        from refscale.scoring.reference import EncodedPairs

        waited = time.monotonic() - self._idle_since
        table = table_from_bytes(item["pairs"])
        pairs = EncodedPairs.from_table(table)
        if not self._checked and table.num_rows:
            self._model.self_check(pairs)
            self._checked = True
        started = time.monotonic()
        scores = self._model.score(pairs)
        counts = {
            "pairs": table.num_rows,
            "unscorable": [
                [pair_id.hex(), reason]
                for pair_id, reason in zip(table["pair_id"].to_pylist(), scores.reason, strict=True)
                if reason is not None
            ],
            "replica": self._replica,
            "seconds": time.monotonic() - started,
            "wait_s": waited,
            "stats": _plain(asdict(scores.stats)),
            "engine": _plain(self._model.info),
        }
        metrics.report_shard(counts, stage=self._stage)
        columns = {
            "ref_chosen_logps": scores.chosen_logps,
            "ref_rejected_logps": scores.rejected_logps,
            "num_prompt_tokens": scores.num_prompt_tokens,
            "num_chosen_tokens": scores.num_chosen_tokens,
            "num_rejected_tokens": scores.num_rejected_tokens,
        }
        result = table.drop_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        for name, values in columns.items():
            result = result.append_column(name, pa.array(values))
        if counts["unscorable"]:
            result = result.filter(pa.array([reason is None for reason in scores.reason]))
        self._idle_since = time.monotonic()
        return {
            "shard": item["shard"],
            "scores": table_to_bytes(schema.conform(result, schema.SCORES, "scores")),
            "counts": json.dumps(counts),
        }


def publish_scores(scores: StageFolder) -> Callable[[Item], Item]:
    """The publishing step of the reference's scores."""

    def publish(item: Item) -> Item:
        table = table_from_bytes(item["scores"])
        require_finite(table, item["shard"])
        record = scores.commit_shard(item["shard"], table, counts=json.loads(item["counts"]))
        return {"record": json.dumps(asdict(record))}

    return publish


def require_finite(table: pa.Table, shard: str) -> None:
    """Refuse scores that are not finite.

    Raises:
        ScoringError: Names the pair.
    """
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        values = table[name].to_numpy()
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            pair_id = table["pair_id"][row].as_py().hex()
            raise ScoringError(f"{name} of pair {pair_id} in {shard} is {values[row]}")


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values of `data`; what is none is shown as text."""
    return json.loads(json.dumps(dict(data), default=str))
