"""Finding the exact boundaries of a selection over all shards, by radix selection.

In: the keys of a shard at a time. Out: a Decision. A fixed-size histogram of the next 11 bits of
the order per shard, summed, until so few pairs are left that they are sorted. For ten million pairs
that is three passes over one column, five where nine in ten tie. Memory is one shard and 16 KiB for
each boundary, plus at most 65,536 gathered pairs (or 64 for each boundary, if that is more),
whatever the number of pairs.

    search = RadixSelect(spec)
    while not search.done:                                           # on a cluster: map `tally`
        search.advance(sum(map(search.tally, shards()), Tally()))    # over the shards and add
    kept = search.decision().mask(keys)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from refscale.errors import SelectionError
from refscale.selection.order import (
    Cut,
    Decision,
    Group,
    Interval,
    Keys,
    SelectionSpec,
    bits_to_value,
    groups_of,
    rank_bits,
)
from refscale.selection.strategies import pair_id_hex, require_finite

_WORD_BITS = (32, 64, 64)  # of the order, most significant first: the value, then pair_id
_DIGIT_BITS = 11
_RADIX = 1 << _DIGIT_BITS
# Once this few pairs can still be the one at the boundary, they are sorted: saves the last passes.
_GATHERED_PAIRS = 1 << 16  # over all boundaries,
_GATHERED_AT_LEAST = 64  # and of each


@dataclass(frozen=True)
class Tally:
    """What one pass learns from some shards; add them up in any order.

    Attributes:
        counts: int64 arrays of fixed size, by (group, what is counted).
        rows: uint64 (M, 3) words of the order, by (group, boundary); few.
    """

    counts: Mapping[tuple[Group, str], np.ndarray] = field(default_factory=dict)
    rows: Mapping[tuple[Group, str], np.ndarray] = field(default_factory=dict)

    def __add__(self, other: "Tally") -> "Tally":
        counts, rows = dict(self.counts), dict(self.rows)
        for key, more in other.counts.items():
            counts[key] = counts[key] + more if key in counts else more
        for key, more in other.rows.items():
            rows[key] = np.concatenate([rows[key], more]) if key in rows else more
        return Tally(counts, rows)


@dataclass
class _Boundary:
    """Search for the pair of one rank in one group: the leading bits of its words found so far."""

    rank: int  # 0-based, among the pairs under the prefix
    pairs: int  # under the prefix
    prefix: list[int] = field(default_factory=lambda: [0, 0, 0])
    known: list[int] = field(default_factory=lambda: [0, 0, 0])  # bits of each word
    word: int = 0  # that the next digit is of

    def under_prefix(self, bits: np.ndarray, pair_ids: np.ndarray) -> slice | np.ndarray:
        """Rows that share the prefix."""
        rows: slice | np.ndarray = slice(None)
        for word, (value, known) in enumerate(zip(self.prefix, self.known, strict=True)):
            if not known:
                break
            column = _word(bits, pair_ids, word, rows)
            same = (column >> column.dtype.type(_WORD_BITS[word] - known)) == value
            rows = np.flatnonzero(same) if isinstance(rows, slice) else rows[same]
        return rows

    def histogram(self, bits: np.ndarray, pair_ids: np.ndarray) -> np.ndarray:
        """Counts of the next digit among the pairs under the prefix; int64 (2048,)."""
        column = _word(bits, pair_ids, self.word, self.under_prefix(bits, pair_ids))
        left = _WORD_BITS[self.word] - self.known[self.word]
        width = min(_DIGIT_BITS, left)
        digits = (column >> column.dtype.type(left - width)) & column.dtype.type((1 << width) - 1)
        return np.bincount(digits.astype(np.int64), minlength=_RADIX)

    def rows(self, bits: np.ndarray, pair_ids: np.ndarray) -> np.ndarray:
        """The words of the pairs under the prefix; uint64 (M, 3)."""
        rows = self.under_prefix(bits, pair_ids)
        return np.column_stack([bits[rows].astype(np.uint64), pair_ids[rows].astype(np.uint64)])

    def narrow(self, histogram: np.ndarray) -> None:
        """Take one more digit from the summed histogram."""
        cumulative = np.cumsum(histogram)
        digit = int(np.searchsorted(cumulative, self.rank, side="right"))
        assert digit < _RADIX, "the rank lies within the group"
        self.rank -= int(cumulative[digit - 1]) if digit else 0
        self.pairs = int(histogram[digit])
        width = min(_DIGIT_BITS, _WORD_BITS[self.word] - self.known[self.word])
        self.prefix[self.word] = self.prefix[self.word] << width | digit
        self.known[self.word] += width
        if self.known[self.word] == _WORD_BITS[self.word]:
            self.word += 1
            if self.word == len(_WORD_BITS) and self.pairs > 1:
                raise _duplicate(self.prefix[1:], self.pairs)

    def pick(self, rows: np.ndarray, descending: bool) -> Cut:
        """The pair at the rank, from all pairs under the prefix."""
        rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
        found = rows[self.rank]
        same = int((rows == found).all(axis=1).sum())
        if same > 1:
            raise _duplicate(found[1:].tolist(), same)
        bits = int(found[0]) ^ (0xFFFFFFFF if descending else 0)
        return Cut(bits_to_value(bits), pair_id_hex(found[1:]))


def _word(
    bits: np.ndarray, pair_ids: np.ndarray, word: int, rows: slice | np.ndarray
) -> np.ndarray:
    column = bits[rows] if word == 0 else pair_ids[rows, word - 1]
    return column.astype(column.dtype.newbyteorder("="), copy=False)


def _duplicate(words: list[int], times: int) -> SelectionError:
    return SelectionError(
        f"pair {words[0]:016x}{words[1]:016x} occurs {times} times among the scores, where each"
        " pair may occur once; redo the corpus with `refscale prepare --restart`"
    )


class RadixSelect:
    """The exact decision over all shards, a pass at a time.

    A pass sums `tally` over all shards and hands the sum to `advance`. Plain and small (16 KiB a
    boundary at most): it travels to the tasks that tally.
    """

    def __init__(self, spec: SelectionSpec, fit: tuple[float, float] = (0.0, 0.0)) -> None:
        """Start a search.

        Args:
            spec: What to keep.
            fit: Of length_adjusted_margin; recorded in the decision.

        Raises:
            ConfigError: The spec is not valid.
        """
        spec.validate()
        self._spec, self._fit = spec, fit
        self._totals: dict[Group, int] | None = None
        self._kept: dict[Group, int] = {}
        self._span = (0.0, 0.0)
        self._open: dict[tuple[Group, str], _Boundary] = {}
        self._cuts: dict[tuple[Group, str], Cut] = {}
        self._gather_limit = _GATHERED_PAIRS

    @property
    def done(self) -> bool:
        """Whether `decision` can be had."""
        return self._totals is not None and not self._open

    def tally(self, keys: Keys) -> Tally:
        """What this pass wants to know of one shard.

        Raises:
            SelectionError: A key is not finite.
        """
        counts: dict[tuple[Group, str], np.ndarray] = {}
        rows: dict[tuple[Group, str], np.ndarray] = {}
        first = self._totals is None
        if first:
            require_finite(keys.values, keys.pair_ids, "the selection key")
        all_bits = rank_bits(keys.values, self._spec.descending)
        for group, members in groups_of(keys, self._spec):
            bits, pair_ids = all_bits[members], keys.pair_ids[members]
            if first:
                counts[group, "digit"] = _Boundary(0, 0).histogram(bits, pair_ids)
                if self._spec.threshold is not None:
                    inside = self._spec.inside(keys.values[members])
                    counts[group, "inside"] = np.array([inside.sum()], np.int64)
            for end in ("lower", "upper"):
                if (boundary := self._open.get((group, end))) is None:
                    continue
                if boundary.pairs <= self._gather_limit:
                    rows[group, end] = boundary.rows(bits, pair_ids)
                else:
                    counts[group, end] = boundary.histogram(bits, pair_ids)
        return Tally(counts, rows)

    def advance(self, tally: Tally) -> None:
        """Take in the sum of all shards' tallies of one pass.

        Raises:
            SelectionError: There are no pairs, fewer than `count`, none that is kept, or one
                twice.
        """
        if self._totals is None:
            self._start(tally)
            return
        for key, boundary in list(self._open.items()):
            if key in tally.rows:
                self._cuts[key] = boundary.pick(tally.rows[key], self._spec.descending)
                del self._open[key]
            else:
                boundary.narrow(tally.counts[key])

    def _start(self, tally: Tally) -> None:
        """Totals, hence ranks, hence the boundaries to search for."""
        spec = self._spec
        histograms = {
            group: counts for (group, what), counts in tally.counts.items() if what == "digit"
        }
        totals = {group: int(histogram.sum()) for group, histogram in histograms.items()}
        if not sum(totals.values()):
            raise SelectionError(
                "there is no scored training pair to select from; lower corpus.holdout_fraction or"
                " check the quarantine"
            )
        self._totals = totals
        self._span = _span(np.sum([*histograms.values()], axis=0), spec.descending)
        if spec.threshold is not None:
            self._kept = {group: int(tally.counts[group, "inside"][0]) for group in totals}
        else:
            for group, (start, stop) in spec.ranks(totals).items():
                self._kept[group] = stop - start
                if start < stop:
                    self._open[group, "upper"] = _Boundary(stop - 1, totals[group])
                    if start:
                        self._open[group, "lower"] = _Boundary(start - 1, totals[group])
        if not sum(self._kept.values()):
            size = "band" if spec.band is not None else "threshold"
            raise SelectionError(
                f"select.{size} {getattr(spec, size)} keeps none of {sum(totals.values())} pairs;"
                f" most values of {spec.strategy} lie from {self._span[0]:.4g} to"
                f" {self._span[1]:.4g}: widen it, or use select.fraction"
            )
        for (group, _), boundary in self._open.items():
            boundary.narrow(histograms[group])
        self._gather_limit = max(_GATHERED_AT_LEAST, _GATHERED_PAIRS // max(1, len(self._open)))

    def decision(self) -> "Decision":
        """The decision, once `done`."""
        assert self.done and self._totals is not None, "every pass has been taken in"
        number = self._spec.threshold if isinstance(self._spec.threshold, float | int) else None
        groups = {}
        for group, total in sorted(self._totals.items()):
            lower, upper = (self._cuts.get((group, end)) for end in ("lower", "upper"))
            threshold = number if upper is None else upper.value
            groups[group] = Interval(total, self._kept[group], lower, upper, threshold)
        return Decision(self._spec, self._fit, groups, self._span)


def _span(histogram: np.ndarray, descending: bool) -> tuple[float, float]:
    """Values between which 99.8 % lie, or a little more: the ends of first-digit bins."""
    cumulative = np.cumsum(histogram)
    total = int(cumulative[-1])
    first, last = (
        int(np.searchsorted(cumulative, rank, side="right"))
        for rank in (total // 1000, total - 1 - total // 1000)
    )
    shift = _WORD_BITS[0] - _DIGIT_BITS
    flip = 0xFFFFFFFF if descending else 0
    ends = [bits_to_value(bits ^ flip) for bits in (first << shift, ((last + 1) << shift) - 1)]
    return min(ends), max(ends)


def decide(
    shards: Callable[[], Iterable[Keys]], spec: SelectionSpec, fit: tuple[float, float] = (0.0, 0.0)
) -> Decision:
    """The exact decision over all shards, in a few passes over them, in this process.

    Args:
        shards: Called once a pass; yields the keys of each shard. Order and split do not matter.
        spec: What to keep.
        fit: Of length_adjusted_margin.

    Raises:
        ConfigError: The spec is not valid.
        SelectionError: There are no pairs, fewer than `count`, none that is kept, or one twice.
    """
    search = RadixSelect(spec, fit)
    while not search.done:
        total = Tally()
        for keys in shards():
            total += search.tally(keys)
        search.advance(total)
    return search.decision()
