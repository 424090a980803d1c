"""What training refuses at the start and on the way, in one line."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scoring_support import LONGROPE, build
from training_support import (
    changed,
    make_trainer,
    model_dir,
    rows,
    run,
    save_tiny_llama,
    settings,
    write_selection,
)

from refscale import schema
from refscale.errors import ConfigError, ModelError, TrainingError
from refscale.training import worker
from refscale.training.data import load_selection
from refscale.training.dpo_trainer import PrecomputedDPOTrainer
from refscale.training.start_check import logps_budget, positions_check
from refscale.training.worker import WorkerSettings

__all__ = ["model_dir", "rows", "settings"]  # fixtures, which pytest finds by their names here


# --- refusals at the start and on the way


def test_another_checkpoint_than_the_one_that_scored_is_refused(
    settings: WorkerSettings, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path / "other", seed=1)
    other = dataclasses.replace(settings, model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(TrainingError, match="does not start at the reference") as raised:
        run(other)
    message = str(raised.value)
    assert "pair 000000000000000000000000000000" in message
    assert "has stored ref_" in message
    assert "the policy gives -" in message
    assert "Likely: training starts from another checkpoint" in message
    assert "\n" not in message
    assert not Path(settings.policy_dir).exists()


def test_the_start_check_names_the_pair_that_is_off(
    settings: WorkerSettings, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    wrong = [dict(row) for row in rows]
    wrong[0]["ref_rejected_logps"] += 0.5
    files = [write_selection(tmp_path / "wrong.parquet", wrong)]
    with pytest.raises(TrainingError, match=r"pair 0{32} has stored ref_rejected_logps"):
        run(dataclasses.replace(settings, selection_files=files))


def test_scores_of_bfloat16_may_be_so_far_off_also_where_training_is_in_float32(
    settings: WorkerSettings, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # At most 13 tokens: 0.2 nats are out of float32's budget and within bfloat16's.
    coarse = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] + 0.2} for row in rows]
    files = [write_selection(tmp_path / "coarse.parquet", coarse)]
    asked = dataclasses.replace(settings, selection_files=files)
    with pytest.raises(TrainingError, match="does not start at the reference"):
        run(asked)
    metrics, _ = run(dataclasses.replace(asked, scored_in_bf16=True))
    assert metrics["start_check_max_difference"] == pytest.approx(0.2, abs=1e-3)


def test_positions_that_a_long_neighbour_changes_are_refused() -> None:
    model = build(*LONGROPE)
    positions_check(model, 32)
    with pytest.raises(TrainingError, match=r"33 tokens.*encoding\.max_length: 32"):
        positions_check(model, 33)


def test_budget_grows_with_length_and_is_wide_for_bfloat16_only() -> None:
    logps, tokens = np.array([-300.0]), np.array([100])
    assert logps_budget(logps, tokens, bf16=False)[0] == pytest.approx(0.013)
    # 0.2 * sqrt(100) + 0.01 * 300 + 0.1
    assert logps_budget(logps, tokens, bf16=True)[0] == pytest.approx(5.1)


def test_a_loss_that_is_not_finite_names_its_step(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(PrecomputedDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", Broken)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 2 on rank 0; lower"
    ) as raised:
        run(settings)
    assert "or set train.bf16: false, and run the same command again" in str(raised.value)


def test_gradients_that_are_not_finite_end_it_before_a_policy_is_saved(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(PrecomputedDPOTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 2:  # the last one: no loss follows
                next(model.parameters()).grad[0, 0] = float("nan")
            return loss

    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", Broken)
    with pytest.raises(TrainingError, match=r"norm of the gradients is not finite at step 3"):
        run(settings)
    assert not Path(settings.policy_dir).exists()


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_norms_that_are_not_finite_are_refused_also_in_deepspeeds_words(
    settings: WorkerSettings, norm: float
) -> None:
    trainer = make_trainer(settings)
    assert trainer._get_grad_norm(trainer.model, 0.5) == 0.5
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer._get_grad_norm(trainer.model, norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trl": {"optim": "adamx"}}, "adamx is not a valid"),
        ({"peft": {"r": 0}}, "should be a positive integer"),
        ({"peft": {"r": 4, "rank_pattern": {"*proj": 2}}}, "nothing to repeat"),
    ],
)
def test_values_that_trl_or_peft_refuse_are_errors_of_the_config(
    settings: WorkerSettings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(changed(settings, **changes))


def test_out_of_memory_says_what_to_change(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(PrecomputedDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", Full)
    with pytest.raises(TrainingError, match="out of memory at step 1") as raised:
        run(settings)
    message = str(raised.value)
    assert (
        "train.per_device_train_batch_size: 2 with train.gradient_accumulation_steps: 2" in message
    )
    assert "train.gradient_checkpointing: true" in message
    assert "encoding.max_length (now 64), and run the same command again; where it" in message
    assert "`refscale train --restart` begins without it" in message
    assert "\n" not in message
    budgeted = changed(settings)
    budgeted.train["token_budget"] = 400
    with pytest.raises(TrainingError, match="out of memory at step 1") as raised:
        run(budgeted)
    assert "train.token_budget: 200 with train.gradient_accumulation_steps: 2" in str(raised.value)


def test_other_runtime_errors_are_not_taken_for_memory(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(PrecomputedDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            raise RuntimeError("shapes differ")

    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", Odd)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(settings)


def test_a_missing_model_is_one_line(settings: WorkerSettings, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load") as raised:
        run(dataclasses.replace(settings, model_name_or_path=str(tmp_path / "none")))
    assert "\n" not in str(raised.value)


def test_quantised_weights_need_lora(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match=r"score.quantization is 4bit but train.peft"):
        run(dataclasses.replace(settings, quantization="4bit"))


def test_bad_selections_are_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(TrainingError, match="no files"):
        load_selection([], cache)
    with pytest.raises(TrainingError, match="holds no pair"):
        load_selection([write_selection(tmp_path / "empty.parquet", [])], cache)
    mixed = [
        write_selection(tmp_path / "empty.parquet", []),
        write_selection(tmp_path / "one.parquet", rows[:1]),
    ]
    assert len(load_selection(mixed, cache)) == 1
    nan = [{**rows[0], "ref_chosen_logps": float("nan")}, rows[1]]
    with pytest.raises(TrainingError, match="ref_chosen_logps of 1 of 2 selected pairs"):
        load_selection([write_selection(tmp_path / "nan.parquet", nan)], cache)
    empty = [{**rows[0], "rejected_ids": []}]
    with pytest.raises(TrainingError, match="empty rejected_ids"):
        load_selection([write_selection(tmp_path / "e.parquet", empty)], cache)
    table = pa.Table.from_pylist(rows, schema=schema.SELECTION).drop_columns(["ref_chosen_logps"])
    pq.write_table(table, tmp_path / "lacks.parquet")
    with pytest.raises(TrainingError, match="lacks ref_chosen_logps"):
        load_selection([str(tmp_path / "lacks.parquet")], cache)
