"""Encoded pairs -> token-budget packs with shared prefixes. Pure numpy.

In: pairs as int32 id arrays. Out: packs, each one flat row of ids. Sequences lie in it in
dictionary order, and each adds only what it does not have in common with the one before:

    [ system prompt, prompt A, completion 1 ][ rest of completion 2 ][ prompt B, completion 1 ][ …

So a prompt is computed once for all its completions, and once a pack whatever prompts have in
common: a chat template's system prompt, tools, examples.

No padding and no mask: attention.py runs each segment against its own keys, given by `segments`.
The last token of a sequence is left out, because nothing asks for its hidden state.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# A pack may end early, to cut where less is shared: it leaves so many keys at most to the next one
# for each token that is then not computed twice. A judgement: starting a pack has its cost too.
_KEYS_PUT_OFF = 16


@dataclass(frozen=True)
class Segment:
    """The rows that a sequence adds to a pack; they see `prefix`, then themselves causally.

    Attributes:
        start: First row.
        length: Number of rows, at least 1.
        prefix: Runs of earlier rows, (first row, rows), in the order of the sequence.
    """

    start: int
    length: int
    prefix: tuple[tuple[int, int], ...]

    @property
    def prefix_length(self) -> int:
        """Rows of the prefix."""
        return sum(length for _, length in self.prefix)


@dataclass(frozen=True)
class Pack:
    """One forward pass over T rows that scores S sequences.

    Attributes:
        ids: int64 (T,) token ids.
        positions: int64 (T,) position ids: each row's place in its sequence.
        segments: The runs of rows, in row order.
        rows: int64 (R,) rows whose hidden state predicts a completion token, ascending; a row that
            different tokens follow is there once for each.
        targets: int64 (R,) the token that each of `rows` predicts.
        terms: int64 (M,) indices into `rows`; with `owners` they say which predictions each
            sequence sums, in the order of its tokens. M >= R, since shared completion tokens count
            for every sequence.
        owners: int64 (M,) index of the sequence that each term belongs to, in `sequences`.
        sequences: int64 (S,) numbers of the sequences that this pack scores.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]
    rows: np.ndarray
    targets: np.ndarray
    terms: np.ndarray
    owners: np.ndarray
    sequences: np.ndarray

    @property
    def num_tokens(self) -> int:
        """T, the rows that the model computes."""
        return len(self.ids)

    @property
    def num_keys(self) -> int:
        """Keys that attention gathers: each segment's prefix and its own rows."""
        return sum(s.prefix_length + s.length for s in self.segments)

    @property
    def context(self) -> float:
        """Pairs of a query and a key it sees."""
        return sum(
            s.length * s.prefix_length + s.length * (s.length + 1) / 2 for s in self.segments
        )


@dataclass(frozen=True)
class Plan:
    """Packs, and which sequence each side of each pair is.

    Attributes:
        sequences: (prompt ids, completion ids) of each sequence.
        chosen: int64 (N,) sequence of each pair's chosen side.
        rejected: int64 (N,) sequence of each pair's rejected side.
        num_scored: int64 (num_sequences,) completion tokens that carry a log-prob: all of them, but
            for the first where the prompt is empty.
        useful_tokens: Prompt tokens once per prompt plus tokens of the distinct completions. Where
            prompts start alike, fewer are computed.
        groups: What goes into each pack.
    """

    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]
    chosen: np.ndarray
    rejected: np.ndarray
    num_scored: np.ndarray
    useful_tokens: int
    groups: tuple["_Group", ...] = field(repr=False)

    def iter_packs(self) -> Iterator[Pack]:
        """The packs, each laid out when it is asked for; every sequence is in exactly one."""
        return (_lay_out(self.sequences, group) for group in self.groups)

    @cached_property
    def packs(self) -> tuple[Pack, ...]:
        """All packs."""
        return tuple(self.iter_packs())

    @property
    def num_sequences(self) -> int:
        """Distinct (prompt, completion) sequences."""
        return len(self.num_scored)


@dataclass(frozen=True)
class _Group:
    """The sequences of a pack, in dictionary order.

    Attributes:
        numbers: Which they are.
        shared: Tokens that each has in common with the one before it; 0 for the first.
        num_tokens: Rows of the pack.
    """

    numbers: Sequence[int]
    shared: Sequence[int]
    num_tokens: int


def plan_packs(
    prompts: Sequence[np.ndarray],
    chosen: Sequence[np.ndarray],
    rejected: Sequence[np.ndarray],
    token_budget: int | None = None,
    *,
    key_budget: int | None = None,
    switch: int | None = None,
) -> Plan:
    """Plan the packs for N pairs.

    Args:
        prompts: Token ids of each prompt; may be empty.
        chosen: Token ids of each chosen completion, at least one.
        rejected: Likewise.
        token_budget: Most tokens of a pack; None puts all into one. A single sequence that is
            longer gets its own pack.
        key_budget: Most keys of a pack. Those of a long system prompt count for every sequence.
        switch: As in `length_classes`: no pack holds sequences of both classes.
    """
    numbers: dict[tuple[bytes, bytes], int] = {}
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    sides: list[list[int]] = [[], []]
    for prompt, *completions in zip(prompts, chosen, rejected, strict=True):
        prompt_key = prompt.tobytes()
        for side, completion in zip(sides, completions, strict=True):
            key = (prompt_key, completion.tobytes())
            if key not in numbers:
                numbers[key] = len(arrays)
                arrays.append((prompt, completion))
            side.append(numbers[key])
    distinct = {prompt.tobytes(): len(prompt) for prompt in prompts}
    return Plan(
        sequences=tuple(arrays),
        chosen=np.array(sides[0], dtype=np.int64),
        rejected=np.array(sides[1], dtype=np.int64),
        num_scored=np.array([len(c) - (len(p) == 0) for p, c in arrays], dtype=np.int64),
        useful_tokens=sum(distinct.values()) + sum(len(c) for _, c in arrays),
        groups=tuple(
            group
            for members in length_classes(arrays, switch)
            for group in _group(arrays, members, token_budget, key_budget)
        ),
    )


def length_classes(
    arrays: Sequence[tuple[np.ndarray, np.ndarray]], switch: int | None
) -> list[list[int]]:
    """Which sequences may share a forward pass: up to `switch` tokens without the last, and longer.

    For models that change their positions once a forward pass is longer than that.
    """
    if switch is None:
        return [list(range(len(arrays)))]
    classes: list[list[int]] = [[], []]
    for number, (prompt, completion) in enumerate(arrays):
        classes[len(prompt) + len(completion) - 1 > switch].append(number)
    return classes


def make_packs(
    arrays: Sequence[tuple[np.ndarray, np.ndarray]],
    numbers: Iterable[int],
    token_budget: int | None = None,
    key_budget: int | None = None,
) -> tuple[Pack, ...]:
    """Packs of the sequences `numbers` of `arrays`, which are (prompt, completion) ids."""
    groups = _group(arrays, numbers, token_budget, key_budget)
    return tuple(_lay_out(arrays, group) for group in groups)


def _group(
    arrays: Sequence[tuple[np.ndarray, np.ndarray]],
    numbers: Iterable[int],
    token_budget: int | None,
    key_budget: int | None,
) -> list[_Group]:
    """What goes into each pack; the longest first, so that memory peaks at the start."""
    # Four bytes a token: any order of bytes has what starts alike side by side.
    inputs = {
        number: np.concatenate(arrays[number])[:-1].astype(np.int32).tobytes() for number in numbers
    }
    order = sorted(inputs, key=inputs.__getitem__)
    lengths = [len(inputs[number]) // 4 for number in order]
    shared = [0, *(_common_prefix(inputs[a], inputs[b]) for a, b in itertools.pairwise(order))]
    most = [math.inf if budget is None else budget for budget in (token_budget, key_budget)]
    groups = []
    start = 0
    while start < len(order):
        stop, rows = _end(lengths, shared, start, *most)
        groups.append(_Group(order[start:stop], [0, *shared[start + 1 : stop]], rows))
        start = stop
    return sorted(groups, key=lambda group: -group.num_tokens)


def _common_prefix(one: bytes, other: bytes) -> int:
    """Tokens of four bytes in common."""
    length = min(len(one), len(other)) // 4
    one_ids, other_ids = (np.frombuffer(x, dtype=np.int32, count=length) for x in (one, other))
    different = np.flatnonzero(one_ids != other_ids)
    return int(different[0]) if len(different) else length


def _end(
    lengths: Sequence[int],
    shared: Sequence[int],
    start: int,
    token_budget: float,
    key_budget: float,
) -> tuple[int, int]:
    """Where the pack ends whose first sequence is `start`, and its rows.

    Near its budgets, where the least is shared across the cut and so computed again.
    """
    # Of the pack, if it ends after its first sequence, the second, …
    rows, keys = [lengths[start]], [lengths[start]]
    for i in range(start + 1, len(lengths)):
        new = lengths[i] - shared[i]
        rows_then, keys_then = rows[-1] + new, keys[-1] + (lengths[i] if new else 0)
        if rows_then > token_budget or keys_then > key_budget:
            break
        rows.append(rows_then)
        keys.append(keys_then)
    else:
        return len(lengths), rows[-1]

    def cost(count: int) -> float:
        return shared[start + count] + (keys[-1] - keys[count - 1]) / _KEYS_PUT_OFF

    count = min(range(len(rows), 0, -1), key=cost)
    return start + count, rows[count - 1]


def _lay_out(arrays: Sequence[tuple[np.ndarray, np.ndarray]], group: _Group) -> Pack:
    ids: list[np.ndarray] = []
    places: list[tuple[int, int]] = []  # positions of each segment's rows
    segments: list[Segment] = []
    predicting: list[tuple[int, int]] = []  # runs of rows, sequence by sequence
    targets: list[np.ndarray] = []
    counts: list[int] = []  # of each sequence's targets
    path: list[tuple[int, int]] = []  # rows of the sequence, in runs
    row = 0
    for number, shared in zip(group.numbers, group.shared, strict=True):
        prompt, completion = arrays[number]
        path, _ = _cut(path, shared)
        new = len(prompt) + len(completion) - 1 - shared
        if new:
            ids += prompt[shared:], completion[max(shared - len(prompt), 0) : -1]
            places.append((shared, new))
            segments.append(Segment(row, new, tuple(path)))
            path.append((row, new))
            row += new
        # Nothing predicts the first token of an empty prompt's completion.
        predicted = completion if len(prompt) else completion[1:]
        predicting += _cut(path, max(len(prompt) - 1, 0))[1]
        targets.append(predicted)
        counts.append(len(predicted))
    predictions, terms = np.unique(
        _ranges(predicting) << 32 | np.concatenate(targets), return_inverse=True
    )
    return Pack(
        ids=np.concatenate(ids).astype(np.int64) if ids else np.empty(0, dtype=np.int64),
        positions=_ranges(places),
        segments=tuple(segments),
        rows=predictions >> 32,
        targets=predictions & 0xFFFF_FFFF,
        terms=terms,
        owners=np.repeat(np.arange(len(counts)), counts),
        sequences=np.array(group.numbers, dtype=np.int64),
    )


def _cut(
    path: Sequence[tuple[int, int]], length: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first `length` rows of a path, and the others."""
    head, tail = [], []
    for first, count in path:
        taken = min(count, length)
        length -= taken
        if taken:
            head.append((first, taken))
        if taken < count:
            tail.append((first + taken, count - taken))
    return head, tail


def _ranges(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64: the integers of each run (first, count), one run after the other."""
    starts, counts = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def key_index(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one varlen attention call over all segments needs.

    Returns:
        gather: int64 (K,) rows of keys and values in the order [prefix, own] of each segment.
        cu_q: int32 (n + 1,) cumulative query lengths of the segments.
        cu_k: int32 (n + 1,) cumulative key lengths.
    """
    runs = [run for s in segments for run in (*s.prefix, (s.start, s.length))]
    cu_q = np.cumsum([0, *(s.length for s in segments)]).astype(np.int32)
    cu_k = np.cumsum([0, *(s.prefix_length + s.length for s in segments)]).astype(np.int32)
    return _ranges(runs), cu_q, cu_k
