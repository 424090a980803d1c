"""Encoded pairs as the scoring engine takes them: id arrays over an Arrow table's own memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class EncodedPairs:
    """N pairs as token ids, truncated as they are to be scored.

    Attributes:
        prompt_ids: int32 arrays, possibly empty.
        chosen_ids: int32 arrays of at least one token.
        rejected_ids: Likewise.
    """

    prompt_ids: Sequence[np.ndarray]
    chosen_ids: Sequence[np.ndarray]
    rejected_ids: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @classmethod
    def from_table(cls, table: pa.Table) -> "EncodedPairs":
        """Of a table with the three list<int32> columns, without copying the ids."""
        return cls(*(_arrays(table[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")))

    def take(self, rows: Sequence[int]) -> "EncodedPairs":
        """The pairs at `rows`."""
        return EncodedPairs(
            [self.prompt_ids[i] for i in rows],
            [self.chosen_ids[i] for i in rows],
            [self.rejected_ids[i] for i in rows],
        )


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy().tolist()
        arrays.extend(values[start:stop] for start, stop in pairwise(offsets))
    return arrays
