"""Micro-batches by token budget: within the budget, every pair once, alike on all ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training_support import changed, make_trainer, model_dir, rows, run, settings
from transformers import AutoModelForCausalLM

from refscale import schema
from refscale.errors import TrainingError
from refscale.training import worker
from refscale.training.data import easy_to_hard, pair_tokens
from refscale.training.dpo_trainer import PrecomputedDPOTrainer
from refscale.training.token_batches import TokenBudgetSampler, plan_batches

# Fixtures of training_support, which pytest finds by their names here.
__all__ = ["model_dir", "rows", "settings"]


def budgeted(settings: Any, budget: int, **changes: Any) -> Any:
    settings = changed(settings, **changes)
    settings.train["token_budget"] = budget
    return settings


def test_the_plan_is_that_of_the_docstring() -> None:
    assert plan_batches([5, 3, 4, 4, 9, 1], range(6), 9, 2) == [[[0, 3], [1, 2]], [[4], [5]]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_batches_hold_every_pair_once_within_the_budget(ranks: int, padded: bool) -> None:
    rng = np.random.default_rng(ranks)
    tokens, budget = rng.integers(1, 100, size=501), 300
    order = rng.permutation(len(tokens))
    batches = plan_batches(tokens, order, budget, ranks, padded=padded)
    for batch in batches:
        assert len({len(pairs) for pairs in batch}) == 1, "ranks have unequal numbers of pairs"
        for pairs in batch:
            taken = tokens[pairs]
            assert (len(pairs) * taken.max() if padded else taken.sum()) <= budget
    dealt = [pair for batch in batches for pairs in batch for pair in pairs]
    filled = -len(tokens) % ranks
    # The last group is filled up from the start of the order, as torch's DistributedSampler does.
    assert sorted(dealt) == sorted([*range(len(tokens)), *order[:filled]])
    # Greedy: the next pairs of the ranks did not fit, so batches are nearly full.
    if not padded:
        loads = [tokens[pairs].sum() for batch in batches[:-1] for pairs in batch]
        assert np.mean(loads) > budget - 100


def test_a_pair_longer_than_the_budget_goes_alone() -> None:
    assert plan_batches([2, 50, 2, 2], range(4), 10, 1) == [[[0]], [[1]], [[2, 3]]]


def test_fewer_pairs_than_ranks_give_each_rank_one() -> None:
    assert plan_batches([1, 1], range(2), 10, 5) == [[[0], [1], [0], [1], [0]]]


def sampler(epoch: int, *, shuffle: bool = True, seed: int = 1) -> TokenBudgetSampler:
    return TokenBudgetSampler(
        np.arange(1, 41),
        budget=60,
        padded=False,
        ranks=1,
        rank=0,
        shuffle=shuffle,
        seed=seed,
        epoch=lambda: epoch,
    )


def test_each_epoch_has_an_order_of_its_own_and_the_same_length() -> None:
    first, again, second = list(sampler(0)), list(sampler(0)), list(sampler(1))
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second)
    assert list(sampler(0, seed=2)) != first
    in_order = [pair for pairs in sampler(3, shuffle=False) for pair in pairs]
    assert in_order == list(range(40))


def test_pair_tokens_follow_the_datasets_order(settings: Any, rows: list[dict[str, Any]]) -> None:
    dataset = make_trainer(settings).train_dataset
    once = [
        sum(len(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")) for row in rows
    ]
    assert pair_tokens(dataset).tolist() == once
    twice = [
        2 * max(len(row["prompt_ids"] + row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        for row in rows
    ]
    assert pair_tokens(dataset, padded=True).tolist() == twice
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["selection_key"])
    assert pair_tokens(easy_to_hard(dataset, "largest")).tolist() == [once[i] for i in order]


class RecordBatches(PrecomputedDPOTrainer):
    seen: list[tuple[int, int]]

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self.seen.append((len(inputs["ref_chosen_logps"]), inputs["pack"].input_ids.shape[1]))
        return super()._compute_loss(model, inputs, return_outputs)


def test_training_takes_every_pair_in_packs_within_the_budget(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    RecordBatches.seen = []
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", RecordBatches)
    metrics, logs = run(budgeted(settings, 80, max_steps=-1, num_train_epochs=1, packed="on"))
    assert sum(pairs for pairs, _ in RecordBatches.seen) == 24
    assert len({pairs for pairs, _ in RecordBatches.seen}) > 1
    assert max(tokens for _, tokens in RecordBatches.seen) <= 80
    assert metrics["steps"] == len(RecordBatches.seen) == logs[-1]["step"]


def test_steps_that_fall_back_to_padding_are_planned_for_it(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RecordPadded(PrecomputedDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            assert "pack" not in inputs
            sizes.append(inputs["input_ids"].shape)
            return super()._compute_loss(model, inputs, return_outputs)

    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", RecordPadded)
    monkeypatch.setattr(worker, "packed_check", lambda *_: "packs are wrong today")
    metrics, _ = run(budgeted(settings, 80, max_steps=-1, num_train_epochs=1))
    assert metrics["train_path"] == "padded: packs are wrong today"
    assert sum(rows for rows, _ in sizes) == 2 * 24
    assert max(rows * width for rows, width in sizes) <= 80


def test_a_fallback_that_is_known_too_late_is_refused(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(worker, "packed_check", lambda *_: "packs are wrong today")
    with pytest.raises(TrainingError, match=r"packs are wrong today; set train\.packed: off"):
        run(budgeted(settings, 80))


def test_checks_and_the_holdout_stay_within_the_budget(
    settings: Any, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RecordForwards(PrecomputedDPOTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            shapes.append(tuple(inputs["input_ids"].shape))
            return super()._prepare_inputs(inputs)

    shapes: list[tuple[int, int]] = []
    holdout = tmp_path / "holdout.parquet"
    pq.write_table(pa.Table.from_pylist(rows[16:], schema=schema.HELD_OUT), holdout)
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", RecordForwards)
    changes = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "per_device_train_batch_size": 24}
    longest = 2 * max(
        len(row["prompt_ids"] + row[f"{side}_ids"])
        for row in rows[16:]
        for side in ("chosen", "rejected")
    )
    asked = dataclasses.replace(
        budgeted(settings, 2 * longest, **changes), holdout_files=[str(holdout)]
    )
    run(asked)
    # Packed and padded sums of 8 pairs, and the start check's, one by one; a step; the holdout.
    checked, held = shapes[:24], shapes[-4:]
    assert {rows for rows, _ in checked} == {2}
    assert [rows for rows, _ in held] == [4] * 4
    assert len(shapes) == 24 + 1 + 4
    assert max(rows * width for rows, width in held) <= 2 * longest
    # Who asks for a size gets it.
    asked.train["trl"] = {"per_device_eval_batch_size": 8}
    shapes.clear()
    run(asked)
    assert shapes[-1][0] == 16


def test_an_optimizer_step_is_the_mean_over_its_pairs(settings: Any) -> None:
    """Two uneven micro-batches give the gradients of one batch with all their pairs."""
    trainer = make_trainer(settings)
    rows = [trainer.train_dataset[i] for i in range(7)]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def gradients(parts: list[list[dict[str, Any]]]) -> list[torch.Tensor]:
        trainer.model.zero_grad()
        batches = [trainer.data_collator(part) for part in parts]
        trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        for batch in batches:
            (trainer.compute_loss(trainer.model, batch) / len(batches)).backward()
        return [p.grad.clone() for p in trainer.model.parameters()]

    whole = gradients([rows])
    trainer.token_budget = 80
    uneven = gradients([rows[:2], rows[2:]])
    for a, b in zip(uneven, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-3)
    trainer.token_budget = None
    assert any(
        (a - b).abs().max() > 1e-3 * b.abs().max()
        for a, b in zip(gradients([rows[:2], rows[2:]]), whole, strict=True)
    )


@pytest.mark.parametrize("order", ["shuffled", "easy_to_hard"])
def test_resume_in_a_later_epoch_ends_with_the_same_weights(
    settings: Any, tmp_path: Path, order: str
) -> None:
    whole = budgeted(settings, 150, max_steps=9, save_steps=5, save_total_limit=3, order=order)
    folders: list[str] = []
    _, logs = run(whole, on_save=lambda folder, metrics: folders.append(folder))
    assert logs[4]["epoch"] % 1 != 0
    assert logs[4]["epoch"] > 1
    resumed = dataclasses.replace(whole, policy_dir=str(tmp_path / "resumed"))
    _, resumed_logs = run(resumed, resume_from=folders[0])
    np.testing.assert_allclose(
        [log["loss"] for log in resumed_logs], [log["loss"] for log in logs[5:]], atol=1e-6
    )
    first = AutoModelForCausalLM.from_pretrained(whole.policy_dir)
    second = AutoModelForCausalLM.from_pretrained(resumed.policy_dir)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
