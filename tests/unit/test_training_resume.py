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
from refscale.training.checkpoints import (
    CHECKPOINT_FILE,
    check_checkpoint,
    checkpoint_record,
    files_to_load,
)
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


def test_a_resumed_training_that_logged_no_loss_still_writes_its_policy(
    settings: WorkerSettings,
) -> None:
    folders: list[str] = []
    silent = changed(
        settings,
        save_steps=2,
        save_total_limit=5,
        logging_steps=1000,
        trl={"logging_first_step": False},
    )
    whole, logs = run(silent, on_save=lambda folder, metrics: folders.append(folder))
    assert "train_loss" in whole and logs == []
    for folder in folders:  # in the middle, and after the last step
        (Path(settings.policy_dir) / "model.safetensors").unlink()
        metrics, _ = run(silent, resume_from=folder)
        assert metrics["steps"] == 3 and "train_loss" not in metrics
        assert (Path(settings.policy_dir) / "model.safetensors").exists()
    assert [Path(folder).name for folder in folders] == ["checkpoint-2", "checkpoint-3"]


def test_when_is_logged_measured_and_saved_may_change_at_a_resume(
    settings: WorkerSettings,
) -> None:
    folders: list[str] = []
    begun = changed(settings, max_steps=6, save_steps=2, save_total_limit=5)
    run(begun, on_save=lambda folder, metrics: folders.append(folder))
    other = changed(
        settings, max_steps=6, save_steps=3, logging_steps=3, eval_steps=3, save_total_limit=5
    )
    other = dataclasses.replace(other, holdout_files=settings.selection_files)
    saved: list[str] = []
    _, logs = run(
        other,
        resume_from=folders[0],
        on_save=lambda folder, metrics: saved.append(Path(folder).name),
    )
    assert saved == ["checkpoint-3", "checkpoint-6"]
    measured = [(log["step"], "eval_loss" in log) for log in logs]
    assert measured == [(3, False), (3, True), (6, False), (6, True)]


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


def test_a_checkpoint_is_let_go_when_all_of_it_is_read(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Reading(PrecomputedDPOTrainer):
        def _load_rng_state(self, checkpoint: Any) -> None:
            read.append("random states")
            super()._load_rng_state(checkpoint)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            read.append(f"step {self.state.global_step + 1}")
            return super().training_step(*args, **kwargs)

    folders: list[str] = []
    saving = changed(settings, save_steps=1, save_total_limit=5)
    run(saving, on_save=lambda folder, metrics: folders.append(folder))
    monkeypatch.setattr(worker, "PrecomputedDPOTrainer", Reading)
    run(saving, resume_from=folders[0], on_loaded=lambda: read.append("let go"))
    assert read == ["random states", "let go", "step 2", "step 3"]
    read.clear()
    run(saving, on_loaded=lambda: read.append("let go"))
    assert read == ["step 1", "step 2", "step 3"]


SHARED = ["trainer_state.json", "scheduler.pt", "refscale_checkpoint.json", "latest"]
ZERO2 = [f"g/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1, 11)]
ZERO3 = [f"g/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1, 11)]
RANDOM = [f"rng_state_{rank}.pth" for rank in (0, 1, 11)]


@pytest.mark.parametrize(
    ("deepspeed", "own", "shared", "unread"),
    [
        ("zero2", ZERO2, ["g/mp_rank_00_model_states.pt"], ["model.safetensors"]),
        ("zero3", [*ZERO2, *ZERO3], [], ["model-00001-of-00002.safetensors"]),
        (None, [], ["model.safetensors", "optimizer.pt", "adapter_model.safetensors"], []),
    ],
)
def test_a_rank_reads_its_own_files_of_a_checkpoint_and_what_all_read(
    deepspeed: Any, own: list[str], shared: list[str], unread: list[str]
) -> None:
    names = [*SHARED, *RANDOM, *own, *shared, *unread]
    mine, ours = files_to_load(names, {"deepspeed": deepspeed}, 1)
    assert mine == [name for name in names if "rank_1_" in name or name == "rng_state_1.pth"]
    assert ours == [*SHARED, *shared]
    _, best = files_to_load(names, {"deepspeed": deepspeed}, 1, best=True)
    assert best == [name for name in ours if name != "optimizer.pt"]
    # A DeepSpeed config of one's own may load by other rules.
    assert files_to_load(names, {"deepspeed": {"stage": 2}}, 1) == ([], names)
