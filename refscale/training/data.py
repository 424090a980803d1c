"""The selection as the trainer reads it: checked, memory-mapped, in the order asked for.

In: the selection's parquet files. Out: a `datasets.Dataset` of token ids and stored reference sums.
Costs one pass over two columns and the lengths, and a copy of the selection in the cache folder
that is mapped instead of held in memory.
"""

from typing import Literal

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refscale.errors import TrainingError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def load_selection(files: list[str], cache_dir: str | None = None) -> datasets.Dataset:
    """The selection as a memory-mapped dataset, in the order of `files`.

    Args:
        files: Parquet files in `schema.SELECTION`; local paths or URIs.
        cache_dir: Where datasets keeps the mapped copy; each rank has one of its own.

    Raises:
        TrainingError: There is no pair, a column is missing, a stored sum is not finite, or a
            completion is empty.
    """
    if not files:
        raise TrainingError("the selection has no files; run `refscale select` first")
    try:
        # datasets 5.2 fails on a file without rows, which a shard without kept pairs is.
        filled = [file for file in files if _num_rows(file)]
        if not filled:
            raise TrainingError(
                "the selection holds no pair; widen select.fraction or its threshold"
            )
        dataset = datasets.Dataset.from_parquet(filled, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise TrainingError(f"cannot read the selection {files[0]} …: {exc}") from exc
    check_columns(dataset)
    table = dataset.data.table
    for name in REF_COLUMNS:
        column = table.column(name)
        bad = pc.sum(pc.invert(pc.fill_null(pc.is_finite(column), False))).as_py()
        if bad:
            raise TrainingError(
                f"{name} of {bad} of {len(dataset)} selected pairs is null or not finite;"
                " run `refscale score` and `select` again"
            )
    for name in ("chosen_ids", "rejected_ids"):
        if pc.min(pc.list_value_length(table.column(name))).as_py() < 1:
            raise TrainingError(f"the selection holds a pair with empty {name}")
    return dataset


def _num_rows(file: str) -> int:
    with fsspec.open(file, "rb") as handle:
        return pq.read_metadata(handle).num_rows


def check_columns(dataset: datasets.Dataset) -> None:
    """Refuse a dataset without ids or stored sums.

    Raises:
        TrainingError: A column is missing.
    """
    missing = [c for c in (*ID_COLUMNS, *REF_COLUMNS) if c not in dataset.column_names]
    if missing:
        raise TrainingError(
            f"the selection lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)};"
            " training reuses stored reference sums and never computes them"
        )


def easy_to_hard(
    dataset: datasets.Dataset, easiest: Literal["largest", "smallest"]
) -> datasets.Dataset:
    """`dataset` ordered by selection key, the clearest pairs first; ties keep their order.

    Source: the curriculum of Selective DPO, arXiv:2502.09650, with the selection key for its
    validation loss.
    """
    keys = np.asarray(dataset.with_format("numpy")["selection_key"][:], dtype=np.float32)
    order = np.argsort(-keys if easiest == "largest" else keys, kind="stable")
    return dataset.select(order)


def pair_tokens(dataset: datasets.Dataset, *, padded: bool = False) -> np.ndarray:
    """Tokens that a step computes for each pair, int64 (N,), in the dataset's order.

    Args:
        dataset: Holds the ids.
        padded: Two rows of the longer side, prompt included; else prompt, chosen and rejected once.
    """
    table = dataset.data.table
    prompt, chosen, rejected = (
        pc.list_value_length(table.column(name)).to_numpy().astype(np.int64) for name in ID_COLUMNS
    )
    longest = 2 * (prompt + np.maximum(chosen, rejected))
    tokens = longest if padded else prompt + chosen + rejected
    # `select` reorders by an index beside the table.
    rows = dataset._indices
    return tokens if rows is None else tokens[rows.column(0).to_numpy()]
