"""The order of pairs, and exact resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_support import (
    changed,
    model_dir,
    rows,
    run,
    settings,
)
from transformers import (
    AutoModelForCausalLM,
)

from refscale.errors import TrainingError
from refscale.training import worker
from refscale.training.checkpoints import CHECKPOINT_FILE, check_checkpoint, checkpoint_record
from refscale.training.dpo_trainer import PrecomputedDPOTrainer
from refscale.training.worker import WorkerSettings

__all__ = ["model_dir", "rows", "settings"]  # fixtures, which pytest finds by their names here


# --- order, resume


class RecordOrder(PrecomputedDPOTrainer):
    seen: list[list[float]]

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self.seen.append(inputs["ref_chosen_logps"].tolist())
        return super()._compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize(("easiest", "sign"), [("largest", -1), ("smallest", 1)])
def test_easy_to_hard_takes_pairs_by_selection_key(
    settings: WorkerSettings,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    easiest: Any,
    sign: int,
) -> None:
    RecordOrder.seen = []
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", RecordOrder)
    ordered = changed(settings, order="easy_to_hard", max_steps=6)
    run(dataclasses.replace(ordered, easiest=easiest))
    expected = sorted(rows, key=lambda row: sign * row["selection_key"])
    np.testing.assert_allclose(
        np.concatenate(RecordOrder.seen), [row["ref_chosen_logps"] for row in expected], rtol=1e-6
    )


def test_shuffling_depends_on_the_seed_alone(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", RecordOrder)
    orders = []
    for seed in (1, 1, 2):
        RecordOrder.seen = []
        run(changed(settings, seed=seed))
        orders.append(RecordOrder.seen)
    assert orders[0] == orders[1] != orders[2]


def test_resume_in_the_middle_of_an_epoch_ends_with_the_same_weights(
    settings: WorkerSettings, tmp_path: Path
) -> None:
    # 24 pairs in batches of 2 x 2: 6 steps an epoch, so step 4 of 9 is mid-epoch.
    undisturbed = changed(
        settings,
        max_steps=9,
        save_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_total_limit=5,
    )
    folders: list[str] = []
    whole, logs = run(undisturbed, on_save=lambda folder, metrics: folders.append(folder))
    assert [Path(folder).name for folder in folders] == [
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-9",
    ]
    resumed = dataclasses.replace(undisturbed, policy_dir=str(tmp_path / "resumed"))
    metrics, resumed_logs = run(resumed, resume_from=folders[0])
    assert metrics["steps"] == 9
    assert metrics["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6)
    assert [log["step"] for log in resumed_logs] == [5, 6, 7, 8, 9]
    np.testing.assert_allclose(
        [log["loss"] for log in resumed_logs], [log["loss"] for log in logs[4:]], atol=1e-6
    )
    first = AutoModelForCausalLM.from_pretrained(undisturbed.policy_dir)
    second = AutoModelForCausalLM.from_pretrained(resumed.policy_dir)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_resume_after_the_last_step_only_writes_the_policy(settings: WorkerSettings) -> None:
    folders: list[str] = []
    # Logged at steps 1, 2 and 4: the last row is the mean of two steps.
    saving = changed(settings, max_steps=4, save_steps=4, logging_steps=2)
    whole, _ = run(saving, on_save=lambda folder, metrics: folders.append(folder))
    written = (Path(settings.policy_dir) / "model.safetensors").read_bytes()
    (Path(settings.policy_dir) / "model.safetensors").unlink()
    metrics, _ = run(saving, resume_from=folders[-1])
    assert metrics["steps"] == 4
    assert metrics["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6)
    assert (Path(settings.policy_dir) / "model.safetensors").read_bytes() == written


def test_resume_is_refused_from_other_folders_and_settings(
    settings: WorkerSettings, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="is not a checkpoint of refscale"):
        run(settings, resume_from=str(tmp_path))
    record = tmp_path / CHECKPOINT_FILE
    record.write_text(json.dumps(checkpoint_record(settings)))
    check_checkpoint(str(tmp_path), settings)
    with pytest.raises(TrainingError, match="seed was 42 and is now 7"):
        check_checkpoint(str(tmp_path), changed(settings, seed=7))
