"""What a scoring pass gives back: the pairs' scores, and what they took.

Sums stay on the device until all batches are launched: on a GPU, where launching does not wait, the
host lays out the next batch meanwhile.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refscale.scoring.encoded_pairs import EncodedPairs
from refscale.scoring.packing import Plan


@dataclass
class ScoringStats:
    """What a call of `score` did.

    Attributes:
        pairs: Pairs asked for.
        useful_tokens: Prompt tokens once per distinct prompt, plus distinct completions' tokens.
        computed_tokens: Rows that went through the model, padding included.
        head_rows: Rows that went through the output head.
        flops: Floating point operations of backbone, head and attention, multiply and add apart.
        seconds: Wall time.
        token_budget: Tokens of a forward pass at the end.
        oom_retries: Batches that did not fit and were split.
        peak_memory_bytes: Of the devices together; on a CPU of the process since its start.
    """

    pairs: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    head_rows: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    token_budget: int = 0
    oom_retries: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class PairScores:
    """Scores of N pairs, in input order.

    Attributes:
        chosen_logps: float32 (N,), nats; not finite where `reason` is set.
        rejected_logps: Likewise.
        num_prompt_tokens: int32 (N,).
        num_chosen_tokens: int32 (N,), tokens that carry a log-prob: where the prompt is empty the
            first one does not.
        num_rejected_tokens: Likewise.
        reason: Why a pair could not be scored, or None.
        stats: What it took.
        chosen_log_sum_squares: float32 (N,) mean over tokens of log sum_v p(v)^2 (WPO), if asked.
        rejected_log_sum_squares: Likewise.
    """

    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    num_prompt_tokens: np.ndarray
    num_chosen_tokens: np.ndarray
    num_rejected_tokens: np.ndarray
    reason: list[str | None]
    stats: ScoringStats
    chosen_log_sum_squares: np.ndarray | None = None
    rejected_log_sum_squares: np.ndarray | None = None


class Sums:
    """Accumulates sums over the S sequences of a plan; a later one of a sequence replaces its own.

    Attributes:
        squares: Whether sums of log sum_v p(v)^2 are wanted too.
        failed: Why a sequence has no sum.
    """

    def __init__(self, num_sequences: int, *, squares: bool = False) -> None:
        self.squares = squares
        self.failed: dict[int, str] = {}
        self._sums = np.full((2, num_sequences), np.nan)
        self._pending: list[tuple[np.ndarray, Tensor]] = []

    def add(self, sequences: np.ndarray, logps: Tensor, squares: Tensor | None = None) -> None:
        """Float64 (n,) sums of n sequences, on any device."""
        rows = logps[None] if squares is None else torch.stack([logps, squares])
        self._pending.append((sequences, rows))

    def _collect(self) -> np.ndarray:
        for sequences, rows in self._pending:
            self._sums[: len(rows), sequences] = rows.cpu().numpy()
        self._pending.clear()
        return self._sums

    def logps(self) -> np.ndarray:
        """float64 (S,), NaN where there is none; waits for the device."""
        return self._collect()[0]

    def log_sum_squares(self) -> np.ndarray | None:
        """float64 (S,) sums over tokens, or None if they were not wanted."""
        return self._collect()[1] if self.squares else None


def pair_scores(pairs: EncodedPairs, plan: Plan, sums: Sums, stats: ScoringStats) -> PairScores:
    """The sums of the sequences put back to the sides of the pairs."""
    reason: list[str | None] = [
        sums.failed.get(c) or sums.failed.get(r)
        for c, r in zip(plan.chosen.tolist(), plan.rejected.tolist(), strict=True)
    ]

    def side(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return values[numbers].astype(np.float32)

    logps, squares = sums.logps(), sums.log_sum_squares()
    means = None if squares is None else squares / np.maximum(plan.num_scored, 1)
    return PairScores(
        chosen_logps=side(logps, plan.chosen),
        rejected_logps=side(logps, plan.rejected),
        num_prompt_tokens=np.array([len(p) for p in pairs.prompt_ids], dtype=np.int32),
        num_chosen_tokens=plan.num_scored[plan.chosen].astype(np.int32),
        num_rejected_tokens=plan.num_scored[plan.rejected].astype(np.int32),
        reason=reason,
        stats=stats,
        chosen_log_sum_squares=None if means is None else side(means, plan.chosen),
        rejected_log_sum_squares=None if means is None else side(means, plan.rejected),
    )
