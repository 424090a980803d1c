"""The self-check: is a path right for this model? Answered on a few pairs before any is scored.

Truth is the model's own forward with its own attention, one sequence at a time and with full
logits. A path passes if every sum is within the error budget of the dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from refscale.scoring.encoded_pairs import EncodedPairs

# Whatever a foreign architecture does with packs, there is another path.
BREAKS_OFF = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
)
_CHECKED_PAIRS = 4
# Of a pair, tokens: the truth's logits take this many rows of the whole vocabulary.
_LONGEST_CHECKED = 2048


@dataclass(frozen=True)
class SelfCheck:
    """A few pairs on each path against the model's own logits.

    Attributes:
        largest_error: Largest |difference| of a sum, nats, by path; infinite where it broke off.
        budget: What that may be for the sequence that is allowed least.
        path: The path taken.
        reason: Why.
    """

    largest_error: dict[str, float]
    budget: float
    path: str
    reason: str


def checked_pairs(pairs: EncodedPairs) -> EncodedPairs:
    """A few pairs from the shortest to the longest, so that sliding windows are met too.

    Pairs over 2,048 tokens are left out where there are others.
    """
    lengths = np.array(
        [
            len(p) + max(len(c), len(r))
            for p, c, r in zip(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, strict=True)
        ]
    )
    order = np.argsort(lengths, kind="stable")
    usable = order[: max(int((lengths <= _LONGEST_CHECKED).sum()), 1)]
    places = np.unique(np.linspace(0, len(usable) - 1, _CHECKED_PAIRS).round().astype(int))
    return pairs.take(usable[places].tolist())


def error_budget(sums: np.ndarray, num_tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What two correct ways to a sum may differ by, in nats; float64, as `sums`.

    fp32: rounding grows with the sum. Half precision: a token's log-prob moves by about 0.05
    (measured on SmolLM2-135M in bf16: 0.77 nats at most over 47 tokens between two kernels), signs
    are random, so the bound grows with the root of the length; plus one rounding of the sum.
    """
    sums = np.abs(sums)
    if dtype == torch.float32:
        return 1e-3 + 2e-5 * sums
    if dtype == torch.float64:
        return 1e-8 + 1e-10 * sums
    return 0.25 * np.sqrt(np.maximum(num_tokens, 1)) + 0.01 * sums


def fault(
    compute: Callable[[], np.ndarray],
    truth: np.ndarray,
    budget: np.ndarray,
    *,
    of: str = "the model's own logits",
) -> tuple[str | None, float]:
    """What is wrong with a path's sums, None if they are within the budget; the largest error.

    `of` names the truth.

    Sequences whose truth is not finite say nothing; a path that raises has failed, with an infinite
    error, unless it ran out of memory.
    """
    try:
        sums = compute()
    except torch.OutOfMemoryError:
        raise
    except BREAKS_OFF as exc:
        return f"breaks off: {exc}", float("inf")
    known = np.isfinite(truth)
    difference = np.abs(sums - truth)[known]
    difference[np.isnan(difference)] = np.inf
    largest = float(difference.max(initial=0.0))
    if (difference <= budget[known]).all():
        return None, largest
    return f"is off by {largest:.3g} nats from {of}", largest
