"""Selection keys, and the exact global top-k over them, in mergeable pieces.

In: the scores of a shard at a time. Out: a Decision, a few numbers that say for any pair whether it
is kept. Each pair has the key

    (order-preserving bits of its float32 strategy value, pair_id)

which is a total order: ties are broken by content, so the kept set depends neither on shards, nor
on row order, retries or cluster size. The boundaries are found by radix selection: a fixed-size
histogram of the next 16 bits per shard, summed, in at most ten passes (usually two or three) over
one column. Memory is one shard and one histogram, whatever the number of pairs.

The paper behind refscale (arXiv 2501.15109) does not publish its exact formula; readable copies
say only that the reference model's own probabilities tell the clear pairs. `mean_margin` is our
reading of it: where ratings are known, the per-token margin grows with the annotators' rating gap,
while the summed margin mostly follows length (docs/selection.md).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from refscale.errors import SelectionError

STRATEGIES: dict[str, str] = {
    "mean_margin": "ref_chosen_logps / num_chosen_tokens - ref_rejected_logps / num_rejected_tokens"
    " (the likelihood of SimPO, arXiv 2405.14734, under the reference model)",
    "margin": "ref_chosen_logps - ref_rejected_logps (minus the RMLR of arXiv 2405.19534)",
    "abs_mean_margin": "|mean_margin|",
    "abs_margin": "|margin|",
    "length_adjusted_margin": "residual of margin after a least-squares fit on"
    " num_chosen_tokens - num_rejected_tokens",
    "ppl_gap": "exp(-ref_chosen_logps / num_chosen_tokens)"
    " - exp(-ref_rejected_logps / num_rejected_tokens): positive where chosen is the less likely",
    "required_loss": "log(1 + exp(beta * margin)): the DPO loss at which the pair is ranked right"
    " (arXiv 2405.19534, theorem 4.1); larger is easier",
    "random": "seeded hash of pair_id: the control",
}

# Words of the order, most significant first, as (bits, source): the key, then pair_id.
_DIGIT_BITS = 16
_NUM_DIGITS = (32 + 128) // _DIGIT_BITS
_RADIX = 1 << _DIGIT_BITS


@dataclass(frozen=True)
class Keys:
    """The order of one shard's selectable pairs.

    Attributes:
        values: float32 (N,) strategy values, finite.
        pair_ids: uint64 (N, 2), big-endian words of pair_id.
        sources: Name of each pair's source, (N,) objects.
    """

    values: np.ndarray
    pair_ids: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


# -- keys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums of a least-squares fit y = intercept + slope * x, exact and so free of order.

    x is an integer and y a float32, so every product is a dyadic rational: Fractions hold the sums
    without rounding, and any split into shards gives the same fit to the last bit.
    """

    n: int = 0
    x: int = 0
    xx: int = 0
    y: Fraction = Fraction(0)
    xy: Fraction = Fraction(0)

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Moments":
        """Moments of integers x (N,) and finite float32 or float64 y (N,)."""
        x = x.astype(np.int64)
        sum_y, sum_xy = _exact_sum(y), Fraction(0)
        for value in np.unique(x).tolist():
            sum_xy += value * _exact_sum(y[x == value])
        return cls(len(x), int(x.sum()), int((x * x).sum()), sum_y, sum_xy)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.n + other.n,
            self.x + other.x,
            self.xx + other.xx,
            self.y + other.y,
            self.xy + other.xy,
        )

    def fit(self) -> tuple[float, float]:
        """(intercept, slope); slope 0 where x does not vary."""
        if not self.n:
            return 0.0, 0.0
        variance = self.n * self.xx - self.x * self.x
        slope = (self.n * self.xy - self.x * self.y) / variance if variance else Fraction(0)
        return float((self.y - slope * self.x) / self.n), float(slope)


def _exact_sum(values: np.ndarray) -> Fraction:
    """Sum without rounding, by adding integer mantissas within each binary exponent."""
    if not len(values):
        return Fraction(0)
    mantissas, exponents = np.frexp(values.astype(np.float64))
    # 53-bit mantissas: halves of 27 bits cannot overflow an int64 below 2**36 rows.
    whole = (mantissas * 2.0**53).astype(np.int64)
    high, low = whole >> 26, whole & ((1 << 26) - 1)
    total = Fraction(0)
    for exponent in np.unique(exponents).tolist():
        rows = exponents == exponent
        integer = (int(high[rows].sum()) << 26) + int(low[rows].sum())
        total += Fraction(integer) * Fraction(2) ** (exponent - 53)
    return total


def strategy_values(
    scores: Mapping[str, np.ndarray],
    pair_ids: np.ndarray,
    strategy: str,
    *,
    beta: float = 0.1,
    seed: int = 0,
    fit: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """The strategy's value of each pair, computed in float64 and rounded once.

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
    margin = chosen - rejected
    with np.errstate(all="ignore"):
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
    bad = ~np.isfinite(values)
    if bad.any():
        first = pair_id_hex(pair_ids[np.flatnonzero(bad)[0]])
        raise SelectionError(
            f"{int(bad.sum())} values of {strategy} are not finite, the first of pair {first};"
            " such pairs cannot be ordered: choose another strategy"
        )
    return values


def _random_values(pair_ids: np.ndarray, seed: int) -> np.ndarray:
    """Uniform in [0, 1), a function of seed and pair_id alone (splitmix64 finaliser)."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        state = pair_ids[:, 0] ^ np.uint64(start)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    # 24 bits: exactly what a float32 in [0, 1) can hold.
    return ((state >> np.uint64(40)).astype(np.float64) / (1 << 24)).astype(np.float32)


# -- the total order -----------------------------------------------------------------------------


def sortable_bits(values: np.ndarray) -> np.ndarray:
    """uint32 (N,) whose order is that of the finite float32 values (N,); -0.0 equals 0.0."""
    bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


def bits_to_value(bits: int) -> float:
    """The float32 value behind sortable bits."""
    raw = bits & 0x7FFFFFFF if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array([raw], np.uint32).view(np.float32)[0])


def pair_id_words(pair_ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Uint64 (N, 2) of a fixed-size binary(16) column, comparable as big-endian numbers."""
    chunks = pair_ids.chunks if isinstance(pair_ids, pa.ChunkedArray) else [pair_ids]
    parts = []
    for chunk in chunks:
        raw = np.frombuffer(chunk.buffers()[1] or b"", dtype=">u8")
        parts.append(raw[2 * chunk.offset : 2 * (chunk.offset + len(chunk))].reshape(-1, 2))
    return np.concatenate(parts or [np.empty((0, 2), ">u8")]).astype(np.uint64)


def pair_id_hex(words: np.ndarray) -> str:
    """32 hex digits of one pair_id's two words."""
    return f"{int(words[0]):016x}{int(words[1]):016x}"


def _digit(keys: Keys, index: int, descending: bool) -> np.ndarray:
    """Digit `index` of each pair's rank order: smaller means kept earlier."""
    if index < 2:
        bits = sortable_bits(keys.values)
        if descending:
            bits = ~bits
        return ((bits >> np.uint32(16 * (1 - index))) & np.uint32(0xFFFF)).astype(np.int64)
    word, shift = divmod(index - 2, 4)
    words = keys.pair_ids[:, word]
    return ((words >> np.uint64(16 * (3 - shift))) & np.uint64(0xFFFF)).astype(np.int64)


@dataclass(frozen=True)
class Cut:
    """A position in the order: the digits of the pair at one rank. None is before the first."""

    digits: tuple[int, ...]

    def before_or_at(self, keys: Keys, descending: bool) -> np.ndarray:
        """Whether each pair's rank is at most this cut's; bool (N,)."""
        less = np.zeros(len(keys), dtype=bool)
        equal = np.ones(len(keys), dtype=bool)
        for index, digit in enumerate(self.digits):
            found = _digit(keys, index, descending)
            less |= equal & (found < digit)
            equal &= found == digit
        return less | equal


@dataclass
class RadixSelect:
    """Finds the pair of a given rank in one group, one digit a pass.

    Each pass sums `histogram` over all shards and hands the sum to `narrow`.
    """

    rank: int  # 0-based, within the pairs that share `digits`
    descending: bool
    digits: list[int] = field(default_factory=list)
    done: bool = False

    def histogram(self, keys: Keys) -> np.ndarray:
        """Counts by next digit of the pairs that share the digits found so far; int64 (65536,)."""
        rows = np.ones(len(keys), dtype=bool)
        for index, digit in enumerate(self.digits):
            rows &= _digit(keys, index, self.descending) == digit
        found = _digit(keys, len(self.digits), self.descending)[rows]
        return np.bincount(found, minlength=_RADIX)

    def narrow(self, histogram: np.ndarray) -> None:
        """Take one more digit from the summed histogram."""
        cumulative = np.cumsum(histogram)
        digit = int(np.searchsorted(cumulative, self.rank, side="right"))
        assert digit < _RADIX, "the rank lies within the group"
        self.rank -= int(cumulative[digit - 1]) if digit else 0
        self.digits.append(digit)
        # All pairs that share these digits lie at or before the cut: further digits say nothing.
        last = self.rank == int(histogram[digit]) - 1
        self.done = last or len(self.digits) == _NUM_DIGITS


# -- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelectionSpec:
    """What to keep; the fields of the config's `select` section, with exactly one size."""

    strategy: str = "mean_margin"
    keep: Literal["largest", "smallest", "middle", "band"] = "largest"
    fraction: float | None = None
    count: int | None = None
    threshold: float | None = None
    band: tuple[float, float] | None = None
    per_source: bool = False
    beta: float = 0.1
    seed: int = 0

    @property
    def descending(self) -> bool:
        """Whether rank 0 is the largest value; middle and band count from the smallest."""
        return self.keep == "largest"

    def ranks(self, total: int, group: str) -> tuple[int, int]:
        """Ranks [start, stop) that are kept of a group of `total` pairs.

        `fraction` of N keeps floor(fraction * N + 0.5) pairs, at least one.

        Raises:
            SelectionError: `count` exceeds the group.
        """
        if self.band is not None:
            start, stop = (int(np.floor(q * total + 0.5)) for q in self.band)
            return start, max(stop, start)
        if self.count is not None:
            where = f" of source {group}" if self.per_source else ""
            if self.count > total:
                raise SelectionError(
                    f"select.count is {self.count}, but there are only {total} scored training"
                    f" pairs{where}; lower it, or use select.fraction: 1.0"
                )
            size = self.count
        else:
            assert self.fraction is not None, "a spec has one size"
            size = min(total, max(1, int(np.floor(self.fraction * total + 0.5))))
        start = (total - size) // 2 if self.keep == "middle" else 0
        return start, start + size


@dataclass(frozen=True)
class Interval:
    """The kept part of one group's order: after `lower`, up to and including `upper`.

    Cuts are digits of the order, most significant first; None is unbounded.
    """

    pairs: int
    kept: int
    lower: tuple[int, ...] | None
    upper: tuple[int, ...] | None
    threshold: float | None  # value at the inner end of the kept part, for people


@dataclass(frozen=True)
class Decision:
    """For any pair, whether it is kept. Plain data: travels to workers and into selection.json."""

    spec: SelectionSpec
    fit: tuple[float, float]
    groups: Mapping[str, Interval]

    @property
    def kept(self) -> int:
        """Pairs kept over all groups."""
        return sum(group.kept for group in self.groups.values())

    def values(self, scores: Mapping[str, np.ndarray], pair_ids: np.ndarray) -> np.ndarray:
        """`strategy_values` of this decision."""
        spec = self.spec
        return strategy_values(
            scores, pair_ids, spec.strategy, beta=spec.beta, seed=spec.seed, fit=self.fit
        )

    def mask(self, keys: Keys) -> np.ndarray:
        """Whether each pair is kept; bool (N,)."""
        kept = np.zeros(len(keys), dtype=bool)
        for group, interval in self.groups.items():
            if not interval.kept:
                continue
            rows = keys.sources == group if self.spec.per_source else np.ones(len(keys), dtype=bool)
            if self.spec.threshold is not None:
                limit = np.float32(self.spec.threshold)
                above = keys.values >= limit
                rows &= above if self.spec.descending else keys.values <= limit
            if interval.upper is not None:
                rows &= Cut(interval.upper).before_or_at(keys, self.spec.descending)
            if interval.lower is not None:
                rows &= ~Cut(interval.lower).before_or_at(keys, self.spec.descending)
            kept |= rows
        return kept

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` restores the decision."""
        return {
            "spec": asdict(self.spec),
            "fit": list(self.fit),
            "groups": {name: asdict(group) for name, group in self.groups.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Decision":
        """The decision that `to_json` wrote."""

        def cut(digits: list[int] | None) -> tuple[int, ...] | None:
            return None if digits is None else tuple(digits)

        spec = dict(data["spec"])
        spec["band"] = None if spec["band"] is None else tuple(spec["band"])
        groups = {
            name: Interval(**{**g, "lower": cut(g["lower"]), "upper": cut(g["upper"])})
            for name, g in data["groups"].items()
        }
        return cls(SelectionSpec(**spec), tuple(data["fit"]), groups)


def decide(
    shards: Callable[[], Iterable[Keys]], spec: SelectionSpec, fit: tuple[float, float] = (0.0, 0.0)
) -> Decision:
    """The exact decision over all shards, in a few passes over them.

    Args:
        shards: Called once a pass; yields the keys of each shard. Order and split do not matter.
        spec: What to keep.
        fit: Of length_adjusted_margin.

    Raises:
        SelectionError: There are no pairs, or fewer than `count`.
    """
    totals: dict[str, int] = {}
    beyond: dict[str, int] = {}
    for keys in shards():
        for name, part in _groups(keys, spec):
            totals[name] = totals.get(name, 0) + len(part)
            if spec.threshold is not None:
                limit = np.float32(spec.threshold)
                inside = part.values >= limit if spec.descending else part.values <= limit
                beyond[name] = beyond.get(name, 0) + int(inside.sum())
    if not sum(totals.values()):
        raise SelectionError(
            "there is no scored training pair to select from; lower corpus.holdout_fraction or"
            " check the quarantine"
        )
    if spec.threshold is not None:
        groups = {
            name: Interval(total, beyond[name], None, None, float(spec.threshold))
            for name, total in totals.items()
        }
        return Decision(spec, fit, dict(sorted(groups.items())))
    ranges = {name: spec.ranks(total, name) for name, total in totals.items()}
    searches: dict[tuple[str, str], RadixSelect] = {}
    for name, (start, stop) in ranges.items():
        if start > 0:
            searches[name, "lower"] = RadixSelect(start - 1, spec.descending)
        if start < stop < totals[name]:
            searches[name, "upper"] = RadixSelect(stop - 1, spec.descending)
    while active := {key: search for key, search in searches.items() if not search.done}:
        sums = {key: np.zeros(_RADIX, dtype=np.int64) for key in active}
        for keys in shards():
            for name, part in _groups(keys, spec):
                for end in ("lower", "upper"):
                    if (name, end) in active:
                        sums[name, end] += active[name, end].histogram(part)
        for key, search in active.items():
            search.narrow(sums[key])
    groups = {}
    for name, total in totals.items():
        start, stop = ranges[name]
        lower, upper = (
            tuple(searches[name, end].digits) if (name, end) in searches else None
            for end in ("lower", "upper")
        )
        groups[name] = Interval(
            total, stop - start, lower, upper, _value_at(upper or lower, spec.descending)
        )
    return Decision(spec, fit, dict(sorted(groups.items())))


def _groups(keys: Keys, spec: SelectionSpec) -> Iterator[tuple[str, Keys]]:
    """A shard's pairs by group: by source, or all in the group "all"."""
    if not spec.per_source:
        yield "all", keys
        return
    for name in np.unique(keys.sources).tolist():
        rows = keys.sources == name
        yield name, Keys(keys.values[rows], keys.pair_ids[rows], keys.sources[rows])


def _value_at(digits: tuple[int, ...] | None, descending: bool) -> float | None:
    """The strategy value that a cut lies at; to 16 bits where one digit was enough."""
    if digits is None:
        return None
    fill = 0xFFFF  # of a cut at one digit, the last value that shares it
    bits = digits[0] << 16 | (digits[1] if len(digits) > 1 else fill)
    value = bits_to_value(~bits & 0xFFFFFFFF if descending else bits)
    return value if np.isfinite(value) else None
