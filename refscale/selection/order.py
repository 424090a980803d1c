"""What is kept, as a total order over pairs and a few numbers that cut it.

In: what the config asks for, and the keys of a shard. Out: for any pair, whether it is kept. Each
pair has the key

    (order-preserving bits of its float32 strategy value, pair_id)

which is a total order: ties are broken by content, so the kept set depends neither on shards, nor
on row order, retries or cluster size. Where the spec says so, each source, and each class of length
differences, is an order of its own. radix.py finds the cuts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale.errors import ConfigError, SelectionError
from refscale.schema import TRAIN
from refscale.selection.strategies import (
    STRATEGIES,
    length_difference,
    pair_id_words,
    score_columns,
    strategy_values,
)

KEEPS = ("largest", "smallest", "middle", "band")

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Keys:
    """The order of one shard's selectable pairs.

    Attributes:
        values: float32 (N,) strategy values, finite.
        pair_ids: uint64 (N, 2), words of pair_id, of any byte order; see `pair_id_words`.
        sources: Name of each pair's source, (N,) objects.
        length_differences: num_chosen_tokens - num_rejected_tokens, int64 (N,).
    """

    values: np.ndarray
    pair_ids: np.ndarray
    sources: np.ndarray
    length_differences: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: slice | np.ndarray) -> "Keys":
        """The keys of these rows."""
        return Keys(*(column[rows] for column in vars(self).values()))


class Group(NamedTuple):
    """Pairs that are ordered and cut on their own.

    Attributes:
        source: Their source with `per_source`, else "all".
        length_class: Of `length_classes` with `match_lengths`, else None.
    """

    source: str
    length_class: int | None = None

    @property
    def name(self) -> str:
        """For people: "all", or "all, chosen 4 to 7 tokens longer"."""
        if self.length_class is None:
            return self.source
        if not self.length_class:
            return f"{self.source}, of equal length"
        high = (1 << abs(self.length_class)) - 1
        low = (high + 1) // 2
        tokens = f"{low:,} to {high:,} tokens" if high > 1 else "1 token"
        return f"{self.source}, chosen {tokens} {'longer' if self.length_class > 0 else 'shorter'}"


@dataclass(frozen=True)
class SelectionSpec:
    """What to keep; the fields of the config's `select` section, with exactly one size.

    Attributes:
        strategy: A key of STRATEGIES.
        keep: largest and smallest keep that end of the order; middle keeps the `fraction` or
            `count` whose ranks are centred; band keeps ranks between two quantiles, or values
            between two thresholds.
        fraction: Share of the pairs, in (0, 1].
        count: Number of pairs, of each source with `per_source`.
        threshold: Keeps values >= it (largest) or <= it (smallest); with band, (low, high) keeps
            low <= value <= high. Rounded to float32, as values are.
        band: Quantiles (low, high) in [0, 1], counted from the smallest value.
        per_source: Select within each source on its own.
        match_lengths: Select within each of `length_classes` on its own, of each what it has of the
            whole: so the kept pairs have about the length differences of all, and a wrong label
            that comes with a length is not found by it. Not with `threshold`.
        beta: DPO's beta, for required_loss.
        seed: For random.
    """

    strategy: str = "mean_margin"
    keep: Literal["largest", "smallest", "middle", "band"] = "largest"
    fraction: float | None = None
    count: int | None = None
    threshold: float | tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    per_source: bool = False
    match_lengths: bool = False
    beta: float = 0.1
    seed: int = 0

    @property
    def descending(self) -> bool:
        """Whether rank 0 is the largest value; middle and band count from the smallest."""
        return self.keep == "largest"

    def validate(self) -> None:
        """Check the fields against each other.

        Raises:
            ConfigError: A field is out of range, or there is not exactly one size.
        """
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"select.strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if self.keep not in KEEPS:
            raise ConfigError(f"select.keep must be one of {', '.join(KEEPS)}, got {self.keep!r}")
        names = ("fraction", "count", "threshold", "band")
        sizes = [name for name in names if getattr(self, name) is not None]
        if len(sizes) != 1:
            raise ConfigError(
                f"select takes exactly one of {', '.join(names)},"
                f" got {' and '.join(sizes) or 'none'}"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(
                f"select.fraction must be in (0, 1], got {self.fraction};"
                " use 1.0 to keep every pair"
            )
        if self.count is not None and self.count < 1:
            raise ConfigError(f"select.count must be at least 1, got {self.count}")
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(f"select.band must be 0 <= low < high <= 1, got {list(self.band)}")
        pair = isinstance(self.threshold, tuple)
        if (self.keep == "band") != (self.band is not None or pair):
            raise ConfigError(
                f"select.keep {self.keep} does not go with {sizes[0]}: band takes two quantiles"
                " (band) or two thresholds, and only band does"
            )
        if self.threshold is not None:
            if self.keep == "middle":
                raise ConfigError("select.threshold goes with keep largest, smallest or band")
            if self.match_lengths:
                raise ConfigError("select.match_lengths goes with fraction, count or band")
            ends = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
            if not all(abs(end) <= _FLOAT32_MAX for end in ends) or ends[0] > ends[-1]:
                raise ConfigError(
                    f"select.threshold must be a finite float32, or low <= high, got"
                    f" {self.threshold}"
                )
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"select.beta must be above 0, got {self.beta}")

    def inside(self, values: np.ndarray) -> np.ndarray:
        """Whether `threshold` keeps each float32 value; bool (N,)."""
        assert self.threshold is not None, "the size is a threshold"
        if isinstance(self.threshold, tuple):
            low, high = (np.float32(end) for end in self.threshold)
            return (values >= low) & (values <= high)
        limit = np.float32(self.threshold)
        return values >= limit if self.descending else values <= limit

    def ranks(self, totals: Mapping[Group, int]) -> dict[Group, tuple[int, int]]:
        """Ranks [start, stop) that are kept of each group.

        `fraction` of N keeps floor(fraction * N + 0.5) pairs (halves up, in float64), at least one
        and at most N; a band's ends are rounded alike. With `match_lengths`, N counts the pairs of
        all classes. What is kept of them is dealt out by the classes' sizes, rounded where each
        ends in the order of classes, so that the whole is kept to the pair.

        Args:
            totals: Pairs of each group.

        Raises:
            SelectionError: `count` exceeds what there is.
        """
        found: dict[Group, tuple[int, int]] = {}
        for source, members in groupby(sorted(totals), key=lambda group: group.source):
            groups = list(members)
            total = sum(totals[group] for group in groups)
            size = self._size(total, source)
            seen = dealt = 0
            for group in groups:
                pairs = totals[group]
                seen += pairs
                share = (2 * size * seen + total) // (2 * total) - dealt if total else 0
                dealt += share
                start = self._start(pairs, share)
                found[group] = (start, start + share)
        return found

    def _size(self, total: int, source: str) -> int:
        """How many of `total` pairs are kept."""
        if self.band is not None:
            start, stop = (min(total, math.floor(q * total + 0.5)) for q in self.band)
            return stop - start
        if self.count is not None:
            where = f" of source {source}" if self.per_source else ""
            if self.count > total:
                raise SelectionError(
                    f"select.count is {self.count}, but there are only {total} scored training"
                    f" pairs{where}; lower it, or use select.fraction: 1.0"
                )
            return self.count
        assert self.fraction is not None, "a spec has one size"
        return min(total, max(1, math.floor(self.fraction * total + 0.5)))

    def _start(self, pairs: int, size: int) -> int:
        """The first rank that is kept of so many pairs, where `size` are."""
        if self.band is not None:
            return min(pairs - size, math.floor(self.band[0] * pairs + 0.5))
        return (pairs - size) // 2 if self.keep == "middle" else 0


def keys_of(table: pa.Table, spec: SelectionSpec, fit: tuple[float, float] = (0.0, 0.0)) -> Keys:
    """The keys of a scores table of training pairs (see `train_rows`).

    Raises:
        SelectionError: A value is not finite.
    """
    pair_ids, columns = pair_id_words(table["pair_id"]), score_columns(table)
    values = strategy_values(
        columns, pair_ids, spec.strategy, beta=spec.beta, seed=spec.seed, fit=fit
    )
    return Keys(values, pair_ids, table["source"].to_numpy(), length_difference(columns))


def train_rows(table: pa.Table) -> pa.Table:
    """The rows of a corpus or scores table that may be selected: those of the training split."""
    return table.filter(pc.equal(table["split"], TRAIN))


# -- the total order -----------------------------------------------------------------------------


def sortable_bits(values: np.ndarray) -> np.ndarray:
    """uint32 (N,) whose order is that of the finite float32 values (N,); -0.0 equals 0.0."""
    bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    # Negative: all bits flip; else only the sign's.
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000))


def bits_to_value(bits: int) -> float:
    """The float32 value behind sortable bits."""
    raw = bits & 0x7FFFFFFF if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array([raw], np.uint32).view(np.float32)[0])


def rank_bits(values: np.ndarray, descending: bool) -> np.ndarray:
    """Smaller means kept earlier; uint32 (N,)."""
    bits = sortable_bits(values)
    return ~bits if descending else bits


@dataclass(frozen=True)
class Cut:
    """A position in the order: that of the pair with this float32 value and pair_id (hex)."""

    value: float
    pair_id: str

    def before_or_at(self, keys: Keys, descending: bool) -> np.ndarray:
        """Whether each pair's rank is at most this cut's; bool (N,)."""
        bits = rank_bits(keys.values, descending)
        limit = rank_bits(np.array([self.value], np.float32), descending)[0]
        result = bits < limit
        ties = np.flatnonzero(bits == limit)
        high, low = (np.uint64(int(part, 16)) for part in (self.pair_id[:16], self.pair_id[16:]))
        ids = keys.pair_ids[ties]
        result[ties] = (ids[:, 0] < high) | ((ids[:, 0] == high) & (ids[:, 1] <= low))
        return result


@dataclass(frozen=True)
class Interval:
    """The kept part of one group's order.

    Attributes:
        pairs: Pairs in the group.
        kept: Of them, kept.
        lower: Pairs up to and including this one come too early; None where none does.
        upper: The last pair that is kept; None with `threshold`, and where none is kept.
        threshold: Strategy value of `upper`, or the spec's `threshold`, if it is one number.
    """

    pairs: int
    kept: int
    lower: Cut | None
    upper: Cut | None
    threshold: float | None


def length_classes(differences: np.ndarray) -> np.ndarray:
    """0, 1, 2 to 3, 4 to 7 ... tokens, with the sign of the difference; int64 (N,) both.

    Fixed bounds rather than quantiles: a pair's class depends on nothing but the pair.
    """
    return np.sign(differences) * np.frexp(np.abs(differences).astype(np.float64))[1]


def rows_by_source(keys: Keys) -> Iterator[tuple[str, slice | np.ndarray]]:
    """A shard's rows by source, as (name, rows)."""
    encoded = pa.array(keys.sources, pa.string()).dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    if len(names) == 1:
        yield names[0], slice(None)
        return
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    yield from zip(names, np.split(order, ends[:-1]) if names else [], strict=True)


def groups_of(keys: Keys, spec: SelectionSpec) -> Iterator[tuple[Group, slice | np.ndarray]]:
    """A shard's rows by the groups that `spec` cuts on their own."""
    everything: list[tuple[str, slice | np.ndarray]] = [("all", slice(None))]
    for source, rows in rows_by_source(keys) if spec.per_source else everything:
        if not spec.match_lengths:
            yield Group(source), rows
            continue
        classes = length_classes(keys.length_differences[rows])
        for length_class in np.unique(classes).tolist():
            members = np.flatnonzero(classes == length_class)
            yield (
                Group(source, length_class),
                members if isinstance(rows, slice) else rows[members],
            )


# -- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """For any pair, whether it is kept. Plain data: travels to workers and into selection.json.

    Attributes:
        spec: What was asked for.
        fit: (intercept, slope) of length_adjusted_margin.
        groups: The kept part of each group; without `per_source` and `match_lengths` one, "all".
        span: Values between which nearly all lie, for histograms.
    """

    spec: SelectionSpec
    fit: tuple[float, float]
    groups: Mapping[Group, Interval]
    span: tuple[float, float]

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
        """Whether each pair is kept; bool (N,). A group that was never seen keeps none."""
        kept = np.zeros(len(keys), dtype=bool)
        for group, rows in groups_of(keys, self.spec):
            interval = self.groups.get(group)
            if interval is None or not interval.kept:
                continue
            part = keys.take(rows)
            if interval.upper is None:
                kept[rows] = self.spec.inside(part.values)
                continue
            inside = interval.upper.before_or_at(part, self.spec.descending)
            if interval.lower is not None:
                inside &= ~interval.lower.before_or_at(part, self.spec.descending)
            kept[rows] = inside
        return kept

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` restores the decision."""
        groups = {
            group.name: {**group._asdict(), **asdict(found)} for group, found in self.groups.items()
        }
        return {"spec": asdict(self.spec), "fit": self.fit, "groups": groups, "span": self.span}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Decision":
        """The decision that `to_json` wrote."""

        def plain(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

        def cut(value: Mapping[str, Any] | None) -> Cut | None:
            return None if value is None else Cut(**value)

        spec = SelectionSpec(**{name: plain(value) for name, value in data["spec"].items()})
        groups = {}
        for name, stored in data["groups"].items():
            values = {**stored, "lower": cut(stored["lower"]), "upper": cut(stored["upper"])}
            # A run from before match_lengths has the name alone.
            group = Group(values.pop("source", name), values.pop("length_class", None))
            groups[group] = Interval(**values)
        return cls(spec, tuple(data["fit"]), groups, tuple(data["span"]))
