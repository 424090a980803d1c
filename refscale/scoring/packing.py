"""Encoded pairs -> token-budget packs with shared prefixes. Pure numpy.

In: pairs as int32 id arrays. Out: packs, each one flat row of ids in which every token that pairs
share is there once:

    [ shared | leaf 1 | leaf 2 | … ][ shared | leaf 1 | … ]
      prompt and the completions' common prefix, then what is left of each distinct completion

No padding and no mask: attention.py runs each segment against its own keys, given by `segments`.
The last token of a leaf is left out, because nothing asks for its hidden state. What it gives up:
only the prefix common to all completions of a prompt is shared, not deeper trees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Segment:
    """A run of rows of a pack; its queries see `prefix` rows, then themselves causally.

    Attributes:
        start: First row.
        length: Number of rows, may be 0.
        prefix_start: First row of what comes before it, its shared segment.
        prefix_length: Rows of that; 0 for a shared segment itself.
    """

    start: int
    length: int
    prefix_start: int
    prefix_length: int


@dataclass(frozen=True)
class Pack:
    """One forward pass over T rows that scores S sequences.

    Attributes:
        ids: int64 (T,) token ids.
        positions: int64 (T,) position ids; a leaf continues its shared segment.
        segments: The runs of rows, in row order, without empty ones.
        rows: int64 (R,) rows whose hidden state predicts a completion token; one that ends a shared
            segment is there once for each leaf.
        targets: int64 (R,) the token that each of `rows` predicts.
        terms: int64 (M,) indices into `rows`; with `owners` they say which predictions each
            sequence sums. M >= R, since shared completion tokens count for every sequence.
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
        useful_tokens: Prompt tokens once per prompt plus tokens of the distinct completions.
        groups: What goes into each pack.
    """

    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]
    chosen: np.ndarray
    rejected: np.ndarray
    num_scored: np.ndarray
    useful_tokens: int
    groups: tuple[tuple["_Tree", ...], ...] = field(repr=False)

    def iter_packs(self) -> Iterator[Pack]:
        """The packs, each laid out when it is asked for; every sequence is in exactly one."""
        return map(_lay_out, self.groups)

    @cached_property
    def packs(self) -> tuple[Pack, ...]:
        """All packs."""
        return tuple(self.iter_packs())

    @property
    def num_sequences(self) -> int:
        """Distinct (prompt, completion) sequences."""
        return len(self.num_scored)


@dataclass(frozen=True)
class _Tree:
    """A prompt and some of its distinct completions."""

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    sequences: tuple[int, ...]
    common: int  # leading tokens that all completions have in common

    @property
    def num_tokens(self) -> int:
        leaves = sum(max(len(c) - self.common - 1, 0) for c in self.completions)
        return len(self.prompt) + self.common + leaves


def plan_packs(
    prompts: Sequence[np.ndarray],
    chosen: Sequence[np.ndarray],
    rejected: Sequence[np.ndarray],
    token_budget: int,
    *,
    switch: int | None = None,
) -> Plan:
    """Plan the packs for N pairs.

    Args:
        prompts: Token ids of each prompt; may be empty.
        chosen: Token ids of each chosen completion, at least one.
        rejected: Likewise.
        token_budget: Most tokens of a pack. A single sequence that is longer gets its own pack.
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
            for group in _group(arrays, members, token_budget)
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
    arrays: Sequence[tuple[np.ndarray, np.ndarray]], numbers: Iterable[int], token_budget: int
) -> tuple[Pack, ...]:
    """Packs of the sequences `numbers` of `arrays`, which are (prompt, completion) ids."""
    return tuple(map(_lay_out, _group(arrays, numbers, token_budget)))


def _group(
    arrays: Sequence[tuple[np.ndarray, np.ndarray]], numbers: Iterable[int], token_budget: int
) -> tuple[tuple[_Tree, ...], ...]:
    """The trees of each pack."""
    prompts: dict[bytes, list[int]] = {}
    for number in numbers:
        prompts.setdefault(arrays[number][0].tobytes(), []).append(number)
    trees = [tree for group in prompts.values() for tree in _grow(group, arrays, token_budget)]
    # Long first: then the short ones fill the packs up evenly, and memory peaks at the start.
    trees.sort(key=lambda tree: (-tree.num_tokens, tree.sequences))
    return tuple(map(tuple, _fill(trees, token_budget)))


def _grow(
    sequences: list[int], arrays: Sequence[tuple[np.ndarray, np.ndarray]], token_budget: int
) -> list[_Tree]:
    """The trees of one prompt: one, or several where its completions exceed the budget."""
    prompt = arrays[sequences[0]][0]
    parts: list[list[int]] = [[]]
    held = len(prompt)
    for number in sequences:
        size = len(arrays[number][1])
        if parts[-1] and held + size > token_budget:
            parts.append([])
            held = len(prompt)
        parts[-1].append(number)
        held += size
    trees = []
    for part in parts:
        completions = tuple(arrays[number][1] for number in part)
        common = _common_prefix(completions) if len(completions) > 1 else 0
        trees.append(_Tree(prompt, completions, tuple(part), common))
    return trees


def _common_prefix(arrays: Sequence[np.ndarray]) -> int:
    length = min(len(array) for array in arrays)
    first = arrays[0][:length]
    for array in arrays[1:]:
        different = np.flatnonzero(first[:length] != array[:length])
        if len(different):
            length = int(different[0])
    return length


def _fill(trees: list[_Tree], token_budget: int) -> list[list[_Tree]]:
    """Next-fit from both ends: the longest tree left, then as many short ones as fit."""
    packs = []
    low, high = 0, len(trees)
    while low < high:
        pack, held = [trees[low]], trees[low].num_tokens
        low += 1
        while low < high and held + trees[low].num_tokens <= token_budget:
            held += trees[low].num_tokens
            pack.append(trees[low])
            low += 1
        while low < high and held + trees[high - 1].num_tokens <= token_budget:
            high -= 1
            held += trees[high].num_tokens
            pack.append(trees[high])
        packs.append(pack)
    return packs


def _lay_out(trees: Sequence[_Tree]) -> Pack:
    ids: list[np.ndarray] = []
    offsets: list[int] = []  # position of each segment's first row
    segments: list[Segment] = []
    predicting = _Runs()  # rows, in the order of `targets`
    targets: list[np.ndarray] = []
    summed = _Runs()  # terms, in the order of `owners`
    owners: list[int] = []  # of each run of terms
    sequences: list[int] = []
    row = 0
    for tree in trees:
        prompt_length, common = len(tree.prompt), tree.common
        shared = np.concatenate([tree.prompt, tree.completions[0][:common]])
        shared_start, shared_length = row, len(shared)
        if shared_length:
            ids.append(shared)
            offsets.append(0)
            segments.append(Segment(row, shared_length, row, 0))
            row += shared_length
        # Predictions inside the shared segment; an empty prompt leaves its first token unscored.
        first = min(max(prompt_length, 1), shared_length)
        shared_term = predicting.total
        predicting.add(shared_start + first - 1, shared_length - first)
        targets.append(shared[first:])
        for completion, number in zip(tree.completions, tree.sequences, strict=True):
            summed.add(shared_term, shared_length - first)
            owners.append(len(sequences))
            leaf = completion[common:]
            if len(leaf):
                # Row before the leaf predicts its first token, each of its rows the next one.
                term = predicting.total
                predicting.add(shared_start + shared_length - 1, int(shared_length > 0))
                predicting.add(row, len(leaf) - 1)
                targets.append(leaf if shared_length else leaf[1:])
                summed.add(term, predicting.total - term)
                owners.append(len(sequences))
            if len(leaf) > 1:
                ids.append(leaf[:-1])
                offsets.append(shared_length)
                segments.append(Segment(row, len(leaf) - 1, shared_start, shared_length))
                row += len(leaf) - 1
            sequences.append(number)
    return Pack(
        ids=_join(ids),
        positions=_ranges(offsets, [s.length for s in segments]),
        segments=tuple(segments),
        rows=predicting.join(),
        targets=_join(targets),
        terms=summed.join(),
        owners=np.repeat(np.array(owners, dtype=np.int64), summed.lengths),
        sequences=np.array(sequences, dtype=np.int64),
    )


class _Runs:
    """Runs of successive integers, collected one by one and written out at once."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.total = 0

    def add(self, start: int, length: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.total += length

    def join(self) -> np.ndarray:
        return _ranges(self.starts, self.lengths)


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """int64: the integers from each start, as many as its length says, one run after the other."""
    counts = np.array(lengths, dtype=np.int64)
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(np.array(starts, dtype=np.int64) - before, counts)


_NONE = np.empty(0, dtype=np.int64)


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else _NONE


def key_index(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one varlen attention call over all segments needs.

    Returns:
        gather: int64 (K,) rows of keys and values in the order [prefix, own] of each segment.
        cu_q: int32 (n + 1,) cumulative query lengths of the segments.
        cu_k: int32 (n + 1,) cumulative key lengths.
    """
    starts = [start for s in segments for start in (s.prefix_start, s.start)]
    lengths = [length for s in segments for length in (s.prefix_length, s.length)]
    cu_q = np.cumsum([0, *(s.length for s in segments)]).astype(np.int32)
    cu_k = np.cumsum([0, *(s.prefix_length + s.length for s in segments)]).astype(np.int32)
    return _ranges(starts, lengths), cu_q, cu_k
