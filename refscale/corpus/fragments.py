"""The exchange inside `prepare`: rows read anywhere meet by prompt, without passing the driver.

    read_unit      a read unit -> one fragment: its pairs sorted by prompt hash, in slices of that
                   hash's range, as an Arrow file whose slices can be read one by one   (task)
    plan_buckets   slice sizes of all fragments -> contiguous ranges of about one shard  (driver)
    merge_bucket   one range of every fragment -> duplicates settled, shards committed   (task)

Equal pairs and shared prompts have equal prompt hashes, so they meet in one bucket: duplicates are
found exactly, and memory is bounded by a unit or a bucket, whatever the corpus holds. Everything is
a function of the corpus' contents alone; redoing a part gives the same bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from refscale import schema
from refscale.cluster import metrics
from refscale.corpus import preparation
from refscale.corpus.encoding import Encoder, EncoderSettings
from refscale.storage.stages import FileRecord, StageFolder

# The top ten bits of the prompt hash: finer than the shards of any corpus below a few million
# pairs, and beyond that a bucket of one slice is cut into several shards.
_SLICE_BITS = 10
# A bucket is cut into several shards beyond this many times the wanted size.
_OVERSIZE = 1.5

Item = dict[str, Any]


@dataclass(frozen=True)
class Bucket:
    """A contiguous range of slices, [first, last]."""

    bucket: str
    first: int
    last: int


def names(num_units: int) -> list[str]:
    """Names of the fragments of the read units."""
    return [f"unit-{i:05d}" for i in range(num_units)]


@lru_cache(maxsize=2)
def _encoder(settings: EncoderSettings) -> Encoder:
    """Loaded once per worker process: Ray keeps those for the next task."""
    # A task has its CPUs, and its neighbours theirs: the tokenizer must not take all cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return settings.load()


def read_unit(
    plan: preparation.Plan, parts: StageFolder, refused: StageFolder
) -> Callable[[Item], Item]:
    """The map step: read, validate and encode a unit, publish its fragment and its refusals."""

    def read(item: Item) -> Item:
        prepared = preparation.prepare_unit(plan, item["unit"], _encoder(plan.encoder))
        table = prepared.pairs
        slices = slice_of(table["prompt_hash"])
        table = table.take(pa.array(np.argsort(slices, kind="stable")))
        sizes = np.bincount(slices, minlength=1 << _SLICE_BITS)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            start = 0
            for size in sizes[sizes > 0].tolist():
                # One batch a slice, empty slices left out.
                writer.write_table(table.slice(start, size).combine_chunks())
                start += size
        quarantine = refused.publish_table(f"{item['fragment']}.parquet", prepared.refused)
        counts = {
            "counts": prepared.counts.as_dict(),
            "quarantine": asdict(quarantine),
            "slices": {str(i): int(sizes[i]) for i in np.flatnonzero(sizes)},
        }
        record = parts.commit_bytes(
            item["fragment"], ".arrow", sink.getvalue(), rows=table.num_rows, counts=counts
        )
        metrics.report_refusals(prepared.counts.quarantined)
        return {"record": json.dumps(asdict(record))}

    return read


def slice_of(prompt_hash: pa.ChunkedArray) -> np.ndarray:
    """Slice of each row: the top bits of its prompt hash.

    Args:
        prompt_hash: binary(n >= 2) column of N rows.

    Returns:
        int64 array (N,).
    """
    array = prompt_hash.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty column combines to no chunk
        array = array.chunk(0) if array.num_chunks else pa.array([], prompt_hash.type)
    width = array.type.byte_width
    raw = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    raw = raw[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
    top = raw[:, 0].astype(np.int64) << 8 | raw[:, 1]
    return top >> (16 - _SLICE_BITS)


def plan_buckets(fragments: Sequence[FileRecord], shard_pairs: int) -> list[Bucket]:
    """Contiguous ranges of slices that hold about `shard_pairs` pairs each."""
    sizes = np.zeros(1 << _SLICE_BITS, dtype=np.int64)
    for record in fragments:
        for index, size in record.counts["slices"].items():
            sizes[int(index)] += size
    buckets: list[Bucket] = []
    first = held = 0
    for index, size in enumerate(sizes.tolist()):
        if held and held + size / 2 > shard_pairs:
            buckets.append(Bucket(f"shard-{len(buckets):05d}", first, index - 1))
            first, held = index, 0
        held += size
    if held:
        buckets.append(Bucket(f"shard-{len(buckets):05d}", first, len(sizes) - 1))
    return buckets


def complete_buckets(finished: Mapping[str, FileRecord]) -> dict[str, list[FileRecord]]:
    """The shards of the buckets all of whose shards are done, by bucket."""
    found: dict[str, list[FileRecord]] = {}
    for record in finished.values():
        found.setdefault(record.counts["bucket"], []).append(record)
    return {
        bucket: records
        for bucket, records in found.items()
        if len(records) == records[0].counts["shards"]
    }


def merge_bucket(
    plan: preparation.Plan, parts: StageFolder, corpus: StageFolder, fragments: Sequence[FileRecord]
) -> Callable[[Item], Item]:
    """The reduce step: settle a bucket's duplicates and commit its shards."""
    held = [(r.name, sorted(int(i) for i in r.counts["slices"])) for r in fragments]

    def merge(item: Item) -> Item:
        bucket = Bucket(**item)
        table = _read_slices(parts, held, bucket)
        settled, counts = preparation.settle_bucket(
            table, duplicates=plan.duplicates, contradictions=plan.contradictions
        )
        cuts = _cuts(settled["prompt_hash"], plan.shard_pairs)
        records = []
        for j, (start, stop) in enumerate(cuts):
            shard = schema.conform(settled.slice(start, stop - start), schema.CORPUS, "corpus")
            name = bucket.bucket if len(cuts) == 1 else f"{bucket.bucket}-{j:03d}"
            held_out = shard["split"].to_pylist().count(schema.HOLDOUT)
            record = corpus.commit_shard(
                name,
                shard,
                counts={
                    "bucket": bucket.bucket,
                    "shards": len(cuts),
                    "holdout": held_out,
                    "counts": counts.as_dict() if j == 0 else {},
                },
            )
            records.append(asdict(record))
        return {"bucket": bucket.bucket, "records": json.dumps(records)}

    return merge


def _read_slices(
    parts: StageFolder, held: Iterable[tuple[str, list[int]]], bucket: Bucket
) -> pa.Table:
    batches, table_schema = [], None
    for name, slices in held:
        with parts.store.open_input(parts.file(name)) as file:
            reader = pa.ipc.open_file(file)
            table_schema = reader.schema
            for position, index in enumerate(slices):
                if bucket.first <= index <= bucket.last:
                    batches.append(reader.get_batch(position))
    assert table_schema is not None, "a bucket is planned from at least one fragment"
    return pa.Table.from_batches(batches, table_schema)


def _cuts(prompt_hash: pa.ChunkedArray, shard_pairs: int) -> list[tuple[int, int]]:
    """Row ranges of the shards of a bucket; one range unless it is oversized."""
    rows = len(prompt_hash)
    count = max(1, round(rows / shard_pairs)) if rows > _OVERSIZE * shard_pairs else 1
    edges = np.linspace(0, rows, count + 1).astype(int).tolist()
    return list(pairwise(edges))
