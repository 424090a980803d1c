"""Micro-batches by token budget: as many pairs as fit, the same number on every rank.

In: the tokens of each pair. Out: for each rank the same number of micro-batches, whose tokens stay
within the budget. A budget keeps the memory and time of a step level where the number of pairs does
not: the longest pairs then no longer decide how many short ones fit.

Every rank takes equally many pairs in a step, because TRL gathers per-pair metrics and ranks
average their gradients with equal weight. What it gives up: the number of pairs varies from step to
step, so losses that compare the pairs of a batch (`aot`) see a varying batch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler

logger = logging.getLogger(__name__)


def plan_batches(
    tokens: Sequence[int] | np.ndarray,
    order: Sequence[int] | np.ndarray,
    budget: int,
    ranks: int,
    *,
    padded: bool = False,
) -> list[list[list[int]]]:
    """Deal the pairs out, in `order`, into micro-batches of every rank.

    Of the next `ranks` pairs the longest goes to the rank that has the fewest tokens. The last
    micro-batch is filled up from the start of the order, so that each rank has a pair of it. A pair
    longer than the budget is a micro-batch of its own.

    Example: tokens [5, 3, 4, 4, 9, 1] in their order, budget 9, two ranks, gives

        [[[0, 3], [1, 2]],      5 + 4 and 3 + 4 tokens
         [[4],    [5]]]

    Args:
        tokens: Tokens of each pair.
        order: Indices of the pairs.
        budget: Most tokens of a rank's micro-batch.
        ranks: Number of ranks.
        padded: A micro-batch costs its longest pair for each of its pairs, not the sum of all.

    Returns:
        [micro-batch][rank] -> indices of its pairs.
    """
    order = [int(index) for index in order]
    missing = -len(order) % ranks
    order += (order * -(-missing // max(len(order), 1)))[:missing]
    batches: list[list[list[int]]] = []
    load = [0] * ranks  # tokens of each rank's micro-batch; its longest pair where padded
    for begin in range(0, len(order), ranks):
        group = sorted(order[begin : begin + ranks], key=lambda index: -int(tokens[index]))
        taken = [int(tokens[index]) for index in group]
        lightest = sorted(range(ranks), key=load.__getitem__)
        size = len(batches[-1][0]) + 1 if batches else 1
        if padded:
            grown = [max(load[r], t) for r, t in zip(lightest, taken, strict=True)]
            largest = size * max(grown)
        else:
            grown = [load[r] + t for r, t in zip(lightest, taken, strict=True)]
            largest = max(grown)
        if not batches or largest > budget:
            batches.append([[] for _ in range(ranks)])
            lightest, grown = list(range(ranks)), taken
        for rank, index, tokens_now in zip(lightest, group, grown, strict=True):
            batches[-1][rank].append(index)
            load[rank] = tokens_now
    return batches


class TokenBudgetSampler(BatchRebalanceSampler):  # type: ignore[misc]
    """One rank's micro-batches; the same number in every epoch, which exact resume needs.

    Shuffled, the pairs are dealt out once from a permutation of all of them, and each epoch takes
    the micro-batches in an order of its own. Its base class is what transformers 5.23 passes to a
    dataloader as a batch sampler that knows of ranks; nothing else of it is used.

    Args:
        tokens: Tokens of each pair.
        budget: Most tokens of a micro-batch.
        padded: As `plan_batches`.
        ranks: Number of ranks.
        rank: This one.
        shuffle: Permute pairs and micro-batches; else both keep the dataset's order.
        seed: Of the permutations.
        epoch: The current epoch, asked for when one begins. transformers' `set_epoch` does not
            reach a sampler whose first batches are skipped on resume.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        budget: int,
        padded: bool,
        ranks: int,
        rank: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self._shuffle, self._seed, self._epoch = shuffle, seed, epoch
        self.drop_last = True  # ranks are even already
        pairs = len(tokens)
        order = np.random.default_rng(seed).permutation(pairs) if shuffle else np.arange(pairs)
        plan = plan_batches(tokens, order, budget, ranks, padded=padded)
        self._batches = [batch[rank] for batch in plan]
        over = int((np.asarray(tokens) > budget).sum())
        if over and rank == 0:
            logger.warning(
                "%d of %d pairs are longer than train.token_budget %d and go one by one",
                over,
                pairs,
                budget,
            )

    def set_epoch(self, epoch: int) -> None:
        """Nothing: see `epoch`."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self._batches))
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch()]).permutation(order)
        for number in order:
            yield self._batches[number]
