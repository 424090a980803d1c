"""What Ray costs: one replica in the scoring stage's graph against the same model in this process.

The stage is the product's own: shards of parquet, the graph of reading, scoring and publishing, the
replica as an actor. Both score the same shards with the same threads, the process before and after
the replica, so that a machine that slows down slows both. The first shard of each turn warms up.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scoring_models as models
import torch
from common import Row, spread

from refscale import pipeline, schema
from refscale.cluster.runtime import disconnect
from refscale.config import Config, parse_config
from refscale.corpus.encoding import EncoderSettings, tokenizer_fingerprint
from refscale.progress import say
from refscale.run import Run
from refscale.scoring.encoded_pairs import EncodedPairs
from refscale.scoring.reference import ReferenceModel
from refscale.storage.stages import FileRecord, StageFolder
from refscale.storage.store import Store


def ray_rows(
    arguments: argparse.Namespace, dtype: torch.dtype, corpus: str, pairs: EncodedPairs
) -> list[Row]:
    """Two rows: through Ray, and in this process."""
    label = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work:
        name = _model_folder(arguments, Path(work) / "model")
        # Both with one budget, which on a GPU follows the memory that the other one leaves.
        reference = ReferenceModel.load(
            name,
            dtype=label,
            device=arguments.device,
            token_budget=arguments.token_budget,
            compilation="off",
        )
        config = parse_config(
            {
                "model": {"model_name_or_path": name, "dtype": label},
                "corpus": {"sources": [{"path": "made here"}]},
                "score": {"token_budget": reference.token_budget, "compile": "off"},
                "ray": {"replicas": 1, "cpus_per_replica": threads},
            }
        )
        run = Run(Store(str(Path(work) / "run")), config)
        tables = _write_corpus(run.folder("corpus"), config, pairs, arguments.repeats + 1)
        bare = _seconds(reference, tables)
        say(f"{corpus}, {dtype}: {len(tables)} shards of {len(pairs)} pairs through Ray")
        try:
            pipeline.score(run)
        finally:
            disconnect()
        bare = np.concatenate([bare, _seconds(reference, tables)])
        counts = [record.counts for record in _records(run.folder("scores"))][1:]
        busy = np.array([c["seconds"] for c in counts])
        waited = np.array([c["wait_s"] for c in counts])
    common = {"corpus": corpus, "dtype": label}
    return [
        {
            **common,
            "scorer": "refscale packed, bare process",
            "pairs_per_s": spread(len(pairs) / bare),
        },
        {
            **common,
            "scorer": "refscale packed, one replica through Ray",
            "pairs_per_s": spread(len(pairs) / (busy + waited)),
            "of_bare_process": float(np.median(bare) / np.median(busy + waited)),
            "replica_waits": float(waited.sum() / (busy + waited).sum()),
        },
    ]


def _seconds(reference: ReferenceModel, tables: list[Any]) -> np.ndarray:
    """Of each table but the first."""
    seconds = []
    for table in tables:
        started = time.perf_counter()
        reference.score(EncodedPairs.from_table(table))
        models.wait(reference.device)
        seconds.append(time.perf_counter() - started)
    return np.array(seconds[1:])


def _model_folder(arguments: argparse.Namespace, folder: Path) -> str:
    if arguments.model not in models.NAMES:
        return arguments.model
    model = models.build(arguments.model, torch.float32, torch.device("cpu"), arguments.seed)
    model.save_pretrained(folder)
    models.stand_in_tokenizer(model).save_pretrained(folder)
    return str(folder)


def _write_corpus(
    folder: StageFolder, config: Config, pairs: EncodedPairs, num_shards: int
) -> list[Any]:
    """A finished corpus stage whose shards all hold the same ids; the shards' tables."""
    fingerprint = {
        "encoding": config.encoding.model_dump(),
        "tokenizer": tokenizer_fingerprint(EncoderSettings.of(config, None)),
    }
    folder.begin(fingerprint)
    count = len(pairs)
    records, tables = [], []
    for shard in range(num_shards):
        table = pa.table(
            {
                "pair_id": pa.array(
                    [(shard * count + i).to_bytes(16, "big") for i in range(count)], pa.binary(16)
                ),
                "source": ["bench"] * count,
                "source_row": list(range(count)),
                "split": [schema.TRAIN] * count,
                "prompt_ids": pa.array(pairs.prompt_ids, pa.list_(pa.int32())),
                "chosen_ids": pa.array(pairs.chosen_ids, pa.list_(pa.int32())),
                "rejected_ids": pa.array(pairs.rejected_ids, pa.list_(pa.int32())),
                "chosen_truncated": [False] * count,
                "rejected_truncated": [False] * count,
                "conversational": [False] * count,
                "prompt": [""] * count,
                "chosen": [""] * count,
                "rejected": [""] * count,
                "passthrough": ["{}"] * count,
            }
        )
        tables.append(schema.conform(table, schema.CORPUS, "corpus"))
        records.append(folder.commit_shard(f"shard-{shard:06d}", tables[-1]))
    folder.finish(fingerprint, records, counts={"train": count * num_shards}, seconds=0.0)
    return tables


def _records(folder: StageFolder) -> list[FileRecord]:
    return [record for _, record in sorted(folder.finished_shards().items())]
