"""Does training start where scoring ended? Checks on a sample of pairs before the first step.

In: the trainer, its wrapped model, and the stored sums in its dataset. Out: the largest difference,
or a refusal that names the pair, both values and the likely cause. Costs a forward of a few
micro-batches on every rank. What it gives up: pairs outside the sample are not looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer

from refscale.errors import TrainingError
from refscale.scoring.limits import Limits
from refscale.scoring.self_check import BREAKS_OFF
from refscale.training.data import REF_COLUMNS


def logps_budget(logps: np.ndarray, num_tokens: np.ndarray, *, bf16: bool) -> np.ndarray:
    """How far a policy's sum may lie from the stored one at step 0, in nats, per sequence.

    float32: two correct implementations differ by rounding of about 1e-6 relative a token, which
    adds up like a random walk; 1e-2 leaves a factor of ten over what was seen at 1,000 tokens, and
    1e-5 of the sum covers longer ones.

    bfloat16: 8 bits of mantissa put about 0.05 nats of noise on a token's log-prob, 0.05 sqrt(n) on
    a sum of n, of which four standard deviations are allowed, plus 1 % of the sum for the bias that
    differently rounded weights (autocast against bfloat16 weights) leave.

    Args:
        logps: Stored sums, nats.
        num_tokens: Completion tokens of each.
        bf16: Whether either side was computed in bfloat16.
    """
    if bf16:
        return 0.2 * np.sqrt(num_tokens) + 0.01 * np.abs(logps) + 0.1
    return 1e-2 + 1e-5 * np.abs(logps)


def positions_check(model: Any, longest: int) -> None:
    """Refuse pairs whose positions would depend on what else is in their micro-batch.

    Args:
        model: The policy.
        longest: Tokens of the longest sequence.

    Raises:
        TrainingError: Longrope switches below `longest`: the stored sums are those of each sequence
            by itself, a step's are those of its longest one.
    """
    switch = Limits.of(model).rope_switch
    if switch is not None and longest > switch:
        raise TrainingError(
            f"the selection holds a sequence of {longest} tokens, and beyond {switch} this model"
            f" (longrope) changes the positions of a whole batch; set encoding.max_length: {switch}"
        )


@dataclass(frozen=True)
class _Sums:
    """Log-prob sums of n sampled pairs, [chosen, rejected], (n, 2) each."""

    rows: list[int]
    stored: np.ndarray
    policy: np.ndarray
    budget: np.ndarray


def _sample_sums(
    trainer: DPOTrainer, model: Any, num_pairs: int, *, packed: bool, bf16: bool
) -> _Sums:
    """Forward pairs spread evenly over the dataset, the same on every rank.

    Through the wrapped model, so that partitioned (ZeRO-3) weights are gathered as in training, and
    in micro-batches of training or, with a token budget, pair by pair, so that memory suffices
    where training's does.
    """
    dataset = trainer.train_dataset
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_pairs).astype(int)).tolist()
    budgeted = getattr(trainer, "token_budget", None) is not None
    step = 1 if budgeted else trainer.args.per_device_train_batch_size
    stored, policy, tokens = [], [], []
    with _evaluating(model):
        for begin in range(0, len(rows), step):
            examples = [dataset[row] for row in rows[begin : begin + step]]
            batch = trainer._prepare_inputs(trainer.data_collator(examples))
            if not packed:
                batch.pop("pack", None)
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            kwargs = {k: v for k, v in batch.items() if k not in ("completion_mask", *REF_COLUMNS)}
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = model(**kwargs, labels=labels, fused_lm_head=True, use_cache=False)
            counts = batch["completion_mask"][:, 1:].sum(dim=1)
            sums = outputs.log_probs.float().sum(dim=1)
            policy.append(torch.stack(sums.chunk(2), dim=1).cpu().numpy())
            tokens.append(torch.stack(counts.chunk(2), dim=1).cpu().numpy())
            stored.append(torch.stack([batch[c] for c in REF_COLUMNS], dim=1).cpu().numpy())
    stored_P2 = np.concatenate(stored)
    budget = logps_budget(stored_P2, np.concatenate(tokens), bf16=bf16)
    return _Sums(rows, stored_P2, np.concatenate(policy), budget)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Within, in eval mode; back to what it was also where a forward is refused."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def start_check(
    trainer: DPOTrainer, model: Any, num_pairs: int, *, scored_in_bf16: bool = False
) -> dict[str, float]:
    """Compare the policy's sums with the stored ones before the first step.

    Args:
        trainer: The trainer, whose `train_dataset` holds the pairs.
        model: The wrapped model.
        num_pairs: Pairs compared; 0 skips the check.
        scored_in_bf16: The stored sums were computed in bfloat16.

    Returns:
        start_check_pairs, start_check_max_difference (nats), start_check_loss (sigmoid DPO loss;
        ln 2 = 0.6931 where policy and reference agree). Empty when skipped.

    Raises:
        TrainingError: A sum is out of budget: names the pair, both values and the likely cause.
    """
    if num_pairs == 0:
        return {}
    packed = getattr(trainer.data_collator, "packed", False)
    bf16 = trainer.args.bf16 or scored_in_bf16
    sums = _sample_sums(trainer, model, num_pairs, packed=packed, bf16=bf16)
    difference = np.abs(sums.policy - sums.stored)
    outside = ~(difference <= sums.budget)
    if outside.any():
        excess = np.where(np.isnan(difference), np.inf, difference - sums.budget)
        i, side = divmod(int(np.argmax(excess)), 2)
        pair_id = trainer.train_dataset[sums.rows[i]].get("pair_id")
        name = pair_id.hex() if isinstance(pair_id, bytes) else f"in row {sums.rows[i]}"
        raise TrainingError(
            f"the policy does not start at the reference: pair {name} has stored"
            f" {REF_COLUMNS[side]} {sums.stored[i, side]:.4f} but the policy gives"
            f" {sums.policy[i, side]:.4f} (allowed difference {sums.budget[i, side]:.4f};"
            f" {int(outside.sum())} of {outside.size} sums are off). {_likely_cause(trainer)}"
        )
    gap = (sums.policy - sums.stored) @ np.array([1.0, -1.0])
    return {
        "start_check_pairs": float(len(sums.rows)),
        "start_check_max_difference": float(difference.max()),
        "start_check_loss": float(np.mean(np.log1p(np.exp(-trainer.beta * gap)))),
    }


def packed_check(trainer: DPOTrainer, model: Any, num_pairs: int) -> str | None:
    """Why packed steps are not exact for this model on real pairs; None where they are.

    A handful of pairs go through the packed and the padded path; every sum must agree within the
    dtype's budget. Collective, with the same answer on every rank.
    """
    bf16 = trainer.args.bf16
    try:
        packed = _sample_sums(trainer, model, num_pairs, packed=True, bf16=bf16)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except BREAKS_OFF as exc:
        return f"a packed step breaks off: {' '.join(str(exc).split()) or type(exc).__name__}"
    padded = _sample_sums(trainer, model, num_pairs, packed=False, bf16=bf16)
    difference = np.abs(packed.policy - padded.policy)
    if (difference <= packed.budget).all():
        return None
    worst = np.unravel_index(np.argmax(difference - packed.budget), difference.shape)
    return (
        f"packed and padded sums differ by {difference[worst]:.4f} nats, more than"
        f" {packed.budget[worst]:.4f}"
    )


def _likely_cause(trainer: DPOTrainer) -> str:
    dtype = "bfloat16" if trainer.args.bf16 else "float32"
    return (
        "Likely: training starts from another checkpoint, revision or adapter than the one that"
        f" scored, or computes in {dtype} and the scores did not; with those equal, score again"
    )
