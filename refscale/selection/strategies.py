"""What a pair's selection key is: the strategies, from four numbers that scoring stored.

In: the score columns of a shard. Out: one float32 value a pair. Nothing here depends on other pairs
but `length_adjusted_margin`, whose fit comes from exactly summed moments.

The paper behind refscale (arXiv 2501.15109) does not publish its exact formula; readable copies
say only that the reference model's own probabilities tell the clear pairs: neither sum nor mean,
signed nor absolute. `mean_margin`, largest first, is our reading of it and no reproduction. For it:
on UltraFeedback, for three SFT models of 7-8B, the per-token margin grows with the annotators'
rating gap (+0.015, +0.027, +0.165 nats from the hard to the easy third) while the summed margin is
about -20 nats on average, because chosen is the longer side; and ranking accuracy by the sum hardly
moves from GPT-2 to 7B (arXiv 2405.19534, tables 2 and 4). Against it: DPO's own log-probs are sums.
"""

import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa

from refscale.errors import SelectionError

STRATEGIES: dict[str, str] = {
    "mean_margin": "ref_chosen_logps / num_chosen_tokens - ref_rejected_logps / num_rejected_tokens"
    " (the likelihood of SimPO, arXiv 2405.14734, under the reference model;"
    " minus the ANG of arXiv 2609.05899, which keeps the smallest)",
    "margin": "ref_chosen_logps - ref_rejected_logps (minus the RMLR of arXiv 2405.19534)",
    "abs_mean_margin": "|mean_margin| (arXiv 2503.01864 keeps the smallest)",
    "abs_margin": "|margin|",
    "length_adjusted_margin": "residual of margin after a least-squares fit on"
    " num_chosen_tokens - num_rejected_tokens (ours, from no paper)",
    "ppl_gap": "exp(-ref_chosen_logps / num_chosen_tokens)"
    " - exp(-ref_rejected_logps / num_rejected_tokens): positive where chosen is the less likely"
    " (a baseline in the code of arXiv 2609.05899)",
    "required_loss": "log(1 + exp(beta * margin)): the DPO loss at which the pair is ranked right"
    " (arXiv 2405.19534, theorem 4.1); larger is easier",
    "random": "seeded hash of pair_id: the control",
}
# What the strategies and statistics read of schema.SCORES, beside pair_id and source.
SCORE_COLUMNS = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "num_chosen_tokens",
    "num_rejected_tokens",
)

_EXACT_ROWS = 1 << 24  # halves of 27 bits: a float64 holds the sum of 2**26 of them exactly
_LENGTH_DIFFERENCE_LIMIT = 1 << 24  # tokens: x * x and x * float32 stay exact in a float64


@dataclass(frozen=True)
class Moments:
    """Sums over pairs of an integer x and a float32 y, exact and so free of order.

    Both are dyadic rationals: Fractions hold the sums without rounding, and any split into shards
    gives the same fit and correlation to the last bit.
    """

    n: int = 0
    x: int = 0
    xx: int = 0
    y: Fraction = Fraction(0)
    xy: Fraction = Fraction(0)
    yy: Fraction = Fraction(0)

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Moments":
        """Moments of integers x (N,) below 2**24 and finite y (N,), which is rounded to float32."""
        assert not len(x) or int(np.abs(x).max()) < _LENGTH_DIFFERENCE_LIMIT, "x is below 2**24"
        x, y = x.astype(np.float64), y.astype(np.float32).astype(np.float64)
        # 24 bits times 24 bits: each product is exact in a float64.
        sums = [exact_sum(values) for values in (x, x * x, y, x * y, y * y)]
        return cls(len(x), int(sums[0]), int(sums[1]), *sums[2:])

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*map(operator.add, vars(self).values(), vars(other).values()))

    def fit(self) -> tuple[float, float]:
        """(intercept, slope) of the least-squares y over x; slope 0 where x does not vary."""
        if not self.n:
            return 0.0, 0.0
        variance = self.n * self.xx - self.x * self.x
        slope = (self.n * self.xy - self.x * self.y) / variance if variance else Fraction(0)
        return float((self.y - slope * self.x) / self.n), float(slope)

    def correlation(self) -> float | None:
        """Pearson's, of x and y; None where either does not vary."""
        x = self.n * self.xx - self.x * self.x
        y = self.n * self.yy - self.y * self.y
        if not x or not y:
            return None
        return float(self.n * self.xy - self.x * self.y) / math.sqrt(x) / math.sqrt(y)


def exact_sum(values: np.ndarray) -> Fraction:
    """Sum of finite float64 values (N,) without rounding: integer mantissas by binary exponent."""
    if len(values) > _EXACT_ROWS:
        parts = (exact_sum(values[i : i + _EXACT_ROWS]) for i in range(0, len(values), _EXACT_ROWS))
        return sum(parts, Fraction(0))
    if not len(values):
        return Fraction(0)
    mantissas, exponents = np.frexp(values)
    whole = (mantissas * 2.0**53).astype(np.int64)
    lowest = int(exponents.min())
    slots = exponents - lowest
    high = np.bincount(slots, weights=whole >> 26)
    low = np.bincount(slots, weights=whole & ((1 << 26) - 1))
    total = 0
    for slot in np.flatnonzero((high != 0) | (low != 0)).tolist():
        total += ((int(high[slot]) << 26) + int(low[slot])) << slot
    return Fraction(total) * Fraction(2) ** (lowest - 53)


def length_difference(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """num_chosen_tokens - num_rejected_tokens; int64 (N,)."""
    return scores["num_chosen_tokens"].astype(np.int64) - scores["num_rejected_tokens"]


def moments_of(scores: Mapping[str, np.ndarray]) -> Moments:
    """The moments whose `fit` length_adjusted_margin needs: of margin over length difference."""
    margin = scores["ref_chosen_logps"].astype(np.float64) - scores["ref_rejected_logps"]
    return Moments.of(length_difference(scores), margin)


def strategy_values(
    scores: Mapping[str, np.ndarray],
    pair_ids: np.ndarray,
    strategy: str,
    *,
    beta: float = 0.1,
    seed: int = 0,
    fit: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """The strategy's value of each pair (STRATEGIES), computed in float64 and rounded once.

    Args:
        scores: ref_chosen_logps, ref_rejected_logps (nats), num_chosen_tokens,
            num_rejected_tokens; each (N,).
        pair_ids: uint64 (N, 2).
        strategy: A key of STRATEGIES.
        beta: DPO's beta, for required_loss.
        seed: For random.
        fit: (intercept, slope) of `Moments.fit`, for length_adjusted_margin.

    Returns:
        float32 (N,).

    Raises:
        SelectionError: Unknown strategy, or a value is not finite.
    """
    if strategy == "random":
        return _random_values(pair_ids, seed)
    chosen = scores["ref_chosen_logps"].astype(np.float64)
    rejected = scores["ref_rejected_logps"].astype(np.float64)
    num_chosen = scores["num_chosen_tokens"].astype(np.float64)
    num_rejected = scores["num_rejected_tokens"].astype(np.float64)
    with np.errstate(all="ignore"):
        margin = chosen - rejected
        mean_chosen, mean_rejected = chosen / num_chosen, rejected / num_rejected
        if strategy in ("margin", "abs_margin"):
            values = margin
        elif strategy in ("mean_margin", "abs_mean_margin"):
            values = mean_chosen - mean_rejected
        elif strategy == "length_adjusted_margin":
            values = margin - (fit[0] + fit[1] * (num_chosen - num_rejected))
        elif strategy == "ppl_gap":
            values = np.exp(-mean_chosen) - np.exp(-mean_rejected)
        elif strategy == "required_loss":
            values = np.logaddexp(0.0, beta * margin)
        else:
            raise SelectionError(f"unknown strategy {strategy!r}; one of {', '.join(STRATEGIES)}")
        if strategy.startswith("abs_"):
            values = np.abs(values)
        values = values.astype(np.float32)
    require_finite(values, pair_ids, strategy)
    return values


def score_columns(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of a scores table that strategies and statistics read."""
    return {name: table[name].to_numpy() for name in SCORE_COLUMNS}


def require_finite(values: np.ndarray, pair_ids: np.ndarray, what: str) -> None:
    """Refuse values that cannot be ordered.

    Raises:
        SelectionError: A value is not finite; names the first pair.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        first = pair_id_hex(pair_ids[np.flatnonzero(bad)[0]])
        raise SelectionError(
            f"{int(bad.sum())} values of {what} are not finite, the first of pair {first};"
            " such pairs cannot be ordered: choose another strategy"
        )


def _random_values(pair_ids: np.ndarray, seed: int) -> np.ndarray:
    """Uniform in [0, 1), a function of seed and pair_id alone (splitmix64 finaliser)."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        state = pair_ids[:, 0].astype(np.uint64) ^ np.uint64(start)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    # 24 bits: exactly what a float32 in [0, 1) can hold.
    return ((state >> np.uint64(40)).astype(np.float64) / (1 << 24)).astype(np.float32)


# -- pair ids ------------------------------------------------------------------------------------


def pair_id_words(pair_ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The two big-endian words of each 16-byte id: uint64 (N, 2), whose order is the bytes'.

    A view of the Arrow buffer where there is one chunk.
    """
    assert pair_ids.type == pa.binary(16), f"pair_id is binary(16), not {pair_ids.type}"
    chunks = pair_ids.chunks if isinstance(pair_ids, pa.ChunkedArray) else [pair_ids]
    parts = []
    for chunk in chunks:
        if len(chunk):
            raw = np.frombuffer(chunk.buffers()[1], ">u8").reshape(-1, 2)
            parts.append(raw[chunk.offset : chunk.offset + len(chunk)])
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, 2), ">u8")


def pair_id_hex(words: np.ndarray) -> str:
    """32 hex digits of one pair_id's two words."""
    return f"{int(words[0]):016x}{int(words[1]):016x}"
