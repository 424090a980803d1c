"""Sequences -> right-padded batches of about equal length. Pure numpy.

The layout for models that cannot run packs. Right padding under a causal mask changes nothing
before it, so no mask is needed; what it costs is the spread of lengths within a batch, a few
percent after sorting, and every prompt once per completion.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Sequences = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PaddedBatch:
    """B sequences in rows of T; `rows` and the rest as in `packing.Pack`, over the B * T rows.

    Attributes:
        ids: int64 (B, T), 0 where padded.
        rows: int64 (R,) rows whose hidden state predicts a completion token.
        targets: int64 (R,) what they predict.
        terms: int64 (R,) their indices.
        owners: int64 (R,) the index in `sequences` that each counts for.
        sequences: int64 (B,) numbers of the sequences.
    """

    ids: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    terms: np.ndarray
    owners: np.ndarray
    sequences: np.ndarray

    @property
    def num_tokens(self) -> int:
        """B * T, the rows that the model computes, padding included."""
        return self.ids.size

    @property
    def context(self) -> float:
        """Pairs of a query and a key it sees."""
        count, width = self.ids.shape
        return count * width * (width + 1) / 2


def padded_batches(
    sequences: Sequences, numbers: Iterable[int], token_budget: int
) -> Iterator[PaddedBatch]:
    """Batches of at most `token_budget` rows, or of one sequence; longest first.

    Args:
        sequences: (prompt ids, completion ids) of every sequence.
        numbers: Which of them.
        token_budget: 1 gives batches of one sequence each.
    """
    wanted = np.fromiter(numbers, dtype=np.int64)
    lengths = np.array([sum(map(len, sequences[n])) for n in wanted], dtype=np.int64)
    batch: list[int] = []
    width = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        if batch and width * (len(batch) + 1) > token_budget:
            yield _pad(sequences, batch)
            batch = []
        if not batch:
            width = int(lengths[place])
        batch.append(int(wanted[place]))
    if batch:
        yield _pad(sequences, batch)


def _pad(sequences: Sequences, numbers: Sequence[int]) -> PaddedBatch:
    """One batch; the last token of a sequence predicts nothing and is left out."""
    whole = [np.concatenate(sequences[number]) for number in numbers]
    width = max(1, max(len(ids) - 1 for ids in whole))
    padded = np.zeros((len(whole), width), dtype=np.int64)
    rows, targets, owners = [], [], []
    for i, (number, ids) in enumerate(zip(numbers, whole, strict=True)):
        padded[i, : len(ids) - 1] = ids[:-1]
        first = max(len(sequences[number][0]), 1)
        rows.append(i * width + np.arange(first - 1, len(ids) - 1))
        targets.append(ids[first:])
        owners.append(np.full(len(ids) - first, i))
    return PaddedBatch(
        ids=padded,
        rows=np.concatenate(rows).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        terms=np.arange(sum(map(len, rows))),
        owners=np.concatenate(owners).astype(np.int64),
        sequences=np.array(numbers, dtype=np.int64),
    )
