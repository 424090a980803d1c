"""Column names and Arrow schemas of the hand-overs between stages.

Each stage writes parquet tables in exactly one of these schemas, and reads only those of the stages
before it. Column names that TRL knows are TRL's, verbatim.

`pair_id` is 16 raw bytes: a content hash of the canonical pair, never a row number. It is shown to
people as 32 hex digits. Log-probabilities are sums over completion tokens in nats, float32: a bf16
sum near -300 nats could only move in steps of 2.
"""

import pyarrow as pa
import pyarrow.compute as pc

from refscale.errors import SchemaError

TRAIN = "train"
HOLDOUT = "holdout"

_IDS = pa.list_(pa.int32())

CORPUS = pa.schema(
    [
        pa.field("pair_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),  # 0-based row (line) in its file
        pa.field("split", pa.string(), nullable=False),  # TRAIN or HOLDOUT
        # Already truncated: what is stored is what is scored and trained on.
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("chosen_ids", _IDS, nullable=False),
        pa.field("rejected_ids", _IDS, nullable=False),
        pa.field("chosen_truncated", pa.bool_(), nullable=False),
        pa.field("rejected_truncated", pa.bool_(), nullable=False),
        # The text, for reports and exports: scoring and training project it away. Chat messages
        # are JSON when `conversational`.
        pa.field("conversational", pa.bool_(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        # JSON object of the row's other columns. One column, so that sources may differ in theirs.
        pa.field("passthrough", pa.string(), nullable=False),
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # a code of corpus.REASONS
        pa.field("detail", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),  # the row as read, cut to a bounded length
    ]
)

SCORES = pa.schema(
    [
        pa.field("pair_id", pa.binary(16), nullable=False),
        # Copied from the corpus so that a selection reads this one small table and nothing else.
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("ref_chosen_logps", pa.float32(), nullable=False),
        pa.field("ref_rejected_logps", pa.float32(), nullable=False),
        # Tokens that carry a log-prob: a sequence's first token never does.
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_chosen_tokens", pa.int32(), nullable=False),
        pa.field("num_rejected_tokens", pa.int32(), nullable=False),
        pa.field("chosen_truncated", pa.bool_(), nullable=False),
        pa.field("rejected_truncated", pa.bool_(), nullable=False),
    ]
)

SELECTION = pa.schema(
    [
        pa.field("pair_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("chosen_ids", _IDS, nullable=False),
        pa.field("rejected_ids", _IDS, nullable=False),
        pa.field("ref_chosen_logps", pa.float32(), nullable=False),
        pa.field("ref_rejected_logps", pa.float32(), nullable=False),
        pa.field("selection_key", pa.float32(), nullable=False),
    ]
)

# Held-out pairs as training measures itself on them.
HELD_OUT = pa.schema([field for field in SELECTION if field.name != "selection_key"])

EVALUATION = pa.schema(
    [
        pa.field("pair_id", pa.binary(16), nullable=False),
        # Equal where the prompt is: such pairs are no independent evidence.
        pa.field("prompt_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("ref_chosen_logps", pa.float32(), nullable=False),
        pa.field("ref_rejected_logps", pa.float32(), nullable=False),
        pa.field("policy_chosen_logps", pa.float32(), nullable=False),
        pa.field("policy_rejected_logps", pa.float32(), nullable=False),
        pa.field("num_chosen_tokens", pa.int32(), nullable=False),
        pa.field("num_rejected_tokens", pa.int32(), nullable=False),
    ]
)


def conform(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """`table` with exactly the columns, order and types of `schema`.

    Args:
        table: Any table that holds at least the columns of `schema`; others are dropped.
        schema: One of this module's schemas.
        what: Name of the table, for the message.

    Raises:
        SchemaError: A column is missing, cannot be cast, or holds nulls where none may be.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SchemaError(
            f"{what} lacks the column(s) {', '.join(missing)};"
            f" it has {', '.join(table.column_names)}"
        )
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as exc:
        raise SchemaError(f"{what} does not fit its schema: {exc}") from exc
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise SchemaError(f"{what}.{field.name} holds nulls, which its schema forbids")
    return table


def held_out(table: pa.Table, up_to: bytes) -> pa.Table:
    """The rows of the holdout with a pair_id up to `up_to`.

    Args:
        table: Any table with the columns pair_id and split.
        up_to: 16 bytes; ids are hashes, so the smallest ones are a sample.
    """
    ids = table["pair_id"].cast(pa.binary())
    return table.filter(pc.and_(pc.equal(table["split"], HOLDOUT), pc.less_equal(ids, up_to)))


def matching_rows(table: pa.Table, pair_ids: pa.ChunkedArray, what: str) -> pa.Table:
    """The rows of `table` that have these ids, in the order of the ids.

    Args:
        table: Any table with a pair_id column, each id once.
        pair_ids: binary(16) (N,).
        what: Which pairs and which table, for the message.

    Returns:
        N rows.

    Raises:
        SchemaError: An id is not there.
    """
    rows = pc.index_in(pair_ids, value_set=table["pair_id"])
    if rows.null_count:
        raise SchemaError(
            f"{rows.null_count} {what}; the run folder mixes two corpora: redo the scores with"
            " `refscale score --restart`"
        )
    return table.take(rows)
