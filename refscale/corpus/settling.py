"""All pairs of some prompts -> without duplicates, contradictions marked or dropped, ordered.

Runs where equal pairs meet: on a bucket of prompts in the pipeline, on the whole corpus in
`refscale validate`. Costs a sort; memory is the table's.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.corpus.counts import Counts
from refscale.corpus.pairs import content_hash

# A fragment's columns: those of the corpus, and what settling needs.
PREPARED = pa.schema(
    [
        *schema.CORPUS,
        pa.field("prompt_hash", pa.binary(16), nullable=False),
        pa.field("swapped_id", pa.binary(16), nullable=False),
        # Place in the corpus: unit, then row in the unit. Sources are in the config's order.
        pa.field("place", pa.int64(), nullable=False),
        pa.field("boundary_shifted", pa.bool_(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
# What settling reads; validation keeps these columns alone.
SETTLED_BY = (
    "pair_id",
    "swapped_id",
    "prompt_hash",
    "place",
    "split",
    "chosen_truncated",
    "rejected_truncated",
    "boundary_shifted",
    "tokens",
)


def settle_bucket(
    table: pa.Table, *, duplicates: str, contradictions: str
) -> tuple[pa.Table, Counts]:
    """Drop duplicates and, if asked, contradictions; order by prompt.

    All pairs of a prompt must be in the table. The first of equal pairs in corpus order is kept. A
    prompt that is held out anywhere, by its hash or by a source with holdout: true, is held out
    everywhere: no prompt is on both sides.

    Args:
        table: Columns of SETTLED_BY, and any others.
        duplicates: drop | keep. A kept one gets an id of its own, made of the pair's and how often
            it came before: selection cuts by id, and an id is a pair's alone.
        contradictions: drop | keep.

    Returns:
        The pairs that stay, those of a prompt together and in corpus order; what was counted.
    """
    order = pc.sort_indices(table, [("prompt_hash", "ascending"), ("place", "ascending")])
    keys = table.select(SETTLED_BY).take(order)
    prompts, ids, swapped = (_codes(keys, ("prompt_hash",)), *_pair_codes(keys))
    num = len(ids)
    stays = np.ones(num, dtype=bool)
    if duplicates == "drop" and num:
        _, first = np.unique(ids, return_index=True)  # the first: rows are in corpus order
        stays[:] = False
        stays[first] = True
    num_duplicates = num - int(stays.sum())
    contradicted = stays & np.isin(swapped, ids)
    num_contradictions = int(contradicted.sum())
    if contradictions == "drop":
        stays &= ~contradicted
    held = keys["split"].to_numpy() == schema.HOLDOUT if num else np.zeros(0, dtype=bool)
    held = np.isin(prompts, np.unique(prompts[held]))
    kept = table.take(order.filter(pa.array(stays)))
    if duplicates == "keep":
        kept = _with_own_ids(kept, _times_before(ids[stays]))
    split = pa.array(np.where(held[stays], schema.HOLDOUT, schema.TRAIN).tolist(), pa.string())
    index = kept.schema.get_field_index("split")
    kept = kept.set_column(index, table.schema.field("split"), split)
    cut = pc.or_(kept["chosen_truncated"], kept["rejected_truncated"])
    return kept, Counts(
        duplicates=num_duplicates,
        contradictions=num_contradictions,
        contradictions_dropped=num_contradictions if contradictions == "drop" else 0,
        kept=kept.num_rows,
        holdout=int(held[stays].sum()),
        truncated=_sum(cut),
        boundary_shifted=_sum(kept["boundary_shifted"]),
        tokens=_sum(kept["tokens"]),
    )


def _times_before(codes: np.ndarray) -> np.ndarray:
    """int64: how often each code came before its place."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]] if len(codes) else np.zeros(0, dtype=bool)
    places = np.arange(len(codes))
    before = np.empty(len(codes), dtype=np.int64)
    before[order] = places - np.maximum.accumulate(np.where(new, places, 0))
    return before


def _with_own_ids(table: pa.Table, before: np.ndarray) -> pa.Table:
    """The table with other pair_ids where a pair came before."""
    index = table.schema.get_field_index("pair_id")
    own = [
        content_hash(pair_id, b"%d" % times) if times else pair_id
        for pair_id, times in zip(table["pair_id"].to_pylist(), before.tolist(), strict=True)
    ]
    column = pa.array(own, table.schema.field("pair_id").type)
    return table.set_column(index, table.schema.field("pair_id"), column)


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _codes(table: pa.Table, names: tuple[str, ...]) -> np.ndarray:
    """A small number for each different value, over all the named columns together."""
    chunks = [chunk for name in names for chunk in table[name].chunks]
    if not chunks:
        return np.zeros(0, dtype=np.int64)
    joined = pa.chunked_array(chunks).combine_chunks()
    encoded = pc.dictionary_encode(joined)
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy()


def _pair_codes(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    codes = _codes(table, ("pair_id", "swapped_id"))
    return codes[: table.num_rows], codes[table.num_rows :]
