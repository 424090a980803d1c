"""What a decision kept, of what: sums and a histogram, exact whatever the order of the shards.

In: a shard's keys, scores and mask. Out: Statistics that add up over shards, and their JSON values.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from refscale.selection.order import Decision, Keys, rows_by_source
from refscale.selection.strategies import SCORE_COLUMNS, Moments, exact_sum, length_difference

_BINS = 60
# Of a usual length difference, above which a selection is said to lean (docs/selection.md).
LARGE_LEAN = 0.4


@dataclass(frozen=True)
class Part:
    """Sums over some pairs; exact, so that their order and split do not show in the result."""

    moments: Moments = field(default_factory=Moments)  # of the key over the length difference
    abs_key: Fraction = Fraction(0)
    abs_difference: int = 0
    negative_margins: int = 0
    negative_mean_margins: int = 0

    @classmethod
    def of(cls, values: np.ndarray, scores: Mapping[str, np.ndarray]) -> "Part":
        """The sums over pairs with these strategy values and scores."""
        difference = length_difference(scores)
        chosen, rejected = (
            scores[name].astype(np.float64) for name in ("ref_chosen_logps", "ref_rejected_logps")
        )
        mean_margin = (
            chosen / scores["num_chosen_tokens"] - rejected / scores["num_rejected_tokens"]
        )
        return cls(
            Moments.of(difference, values),
            exact_sum(np.abs(values.astype(np.float64))),
            int(np.abs(difference).sum()),
            int((chosen < rejected).sum()),
            int((mean_margin < 0).sum()),
        )

    def __add__(self, other: "Part") -> "Part":
        return Part(*map(operator.add, vars(self).values(), vars(other).values()))

    def to_json(self) -> dict[str, Any]:
        """Means and shares; lengths in tokens, chosen minus rejected. None of no pairs."""
        sums = self.moments
        if not sums.n:
            return {"pairs": 0}
        return {
            "pairs": sums.n,
            "mean_key": float(sums.y / sums.n),
            "mean_abs_key": float(self.abs_key / sums.n),
            "mean_length_difference": sums.x / sums.n,
            "mean_abs_length_difference": self.abs_difference / sums.n,
            "key_length_correlation": sums.correlation(),
            "negative_margin_share": self.negative_margins / sums.n,
            "negative_mean_margin_share": self.negative_mean_margins / sums.n,
        }


@dataclass(frozen=True)
class Statistics:
    """What a decision kept, of what; add the shards' up in any order.

    Attributes:
        span: Ends of the histogram; its first and last bins also hold what lies beyond.
        all: Of all selectable pairs.
        kept: Of the kept ones.
        bins: int64 (2, 60): counts of values of all and of the kept pairs.
        sources: By source, (pairs, kept).
    """

    span: tuple[float, float]
    all: Part
    kept: Part
    bins: np.ndarray
    sources: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls, keys: Keys, scores: Mapping[str, np.ndarray], kept: np.ndarray, decision: Decision
    ) -> "Statistics":
        """Of one shard: its keys, its score columns and `Decision.mask` of it."""
        low, high = decision.span
        place = (keys.values.astype(np.float64) - low) / (high - low) * _BINS
        place = np.clip(place, 0, _BINS - 1).astype(np.int64)
        bins = [np.bincount(rows, minlength=_BINS) for rows in (place, place[kept])]
        sources = {
            name: (len(kept[rows]), int(kept[rows].sum())) for name, rows in rows_by_source(keys)
        }
        kept_scores = {name: scores[name][kept] for name in SCORE_COLUMNS}
        return cls(
            decision.span,
            Part.of(keys.values, scores),
            Part.of(keys.values[kept], kept_scores),
            np.array(bins),
            sources,
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        assert self.span == other.span, "statistics of one decision"
        sources = dict(self.sources)
        for name, (pairs, kept) in other.sources.items():
            before = sources.get(name, (0, 0))
            sources[name] = (before[0] + pairs, before[1] + kept)
        return Statistics(
            self.span, self.all + other.all, self.kept + other.kept, self.bins + other.bins, sources
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values for selection.json and the report."""
        return {
            "num_pairs": self.all.moments.n,
            "num_kept": self.kept.moments.n,
            "all": self.all.to_json(),
            "kept": self.kept.to_json(),
            "sources": {
                name: {"pairs": pairs, "kept": kept}
                for name, (pairs, kept) in sorted(self.sources.items())
            },
            "histogram": {
                "low": self.span[0],
                "high": self.span[1],
                "all": self.bins[0].tolist(),
                "kept": self.bins[1].tolist(),
            },
        }


def length_lean(everything: Mapping[str, Any], kept: Mapping[str, Any]) -> float | None:
    """How far the kept pairs' mean length difference is from that of all, in mean differences.

    Args:
        everything: `Part.to_json` of all pairs.
        kept: The same of the kept ones.

    Returns:
        Negative where chosen is shorter than in all pairs; None where nothing was kept.
    """
    if not everything.get("pairs") or not kept.get("pairs"):
        return None
    moved = kept["mean_length_difference"] - everything["mean_length_difference"]
    return float(moved / max(everything["mean_abs_length_difference"], 1e-9))
