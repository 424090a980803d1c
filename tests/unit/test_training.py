"""The DPO worker: no reference model, the right loss, honest logs."""

import dataclasses
import functools
import inspect
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.dpo_trainer as trl_dpo
from training_support import (
    LN2,
    VOCAB,
    changed,
    make_trainer,
    model_dir,
    rows,
    run,
    settings,
    train_config,
    write_selection,
)
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOTrainer

from refscale.errors import TrainingError
from refscale.scoring.flops import Flops, num_weights
from refscale.training.checks import DIVERGENCES, DIVERGENT_LOSSES, LOSS_TYPES
from refscale.training.data import REF_COLUMNS, load_selection
from refscale.training.dpo_trainer import PrecomputedDPOTrainer, training_flops, useful_work
from refscale.training.worker import WorkerSettings

__all__ = ["model_dir", "rows", "settings"]  # fixtures, which pytest finds by their names here


class WithReference(DPOTrainer):
    """TRL's own trainer with the reference model in memory, on the same ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset.remove_columns(list(REF_COLUMNS))


# --- no reference model, and the stored sums are what the loss is made of


def test_no_reference_model_is_built(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a reference model was loaded")

    monkeypatch.setattr(trl_dpo, "create_model_from_path", refuse)
    monkeypatch.setattr(trl_dpo, "hash_module", refuse)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", refuse)
    trainer = make_trainer(settings)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.ref_model is None
    # The counterpart: TRL without stored sums does load one.
    with pytest.raises(AssertionError, match="a reference model was loaded"):
        make_trainer(settings, WithReference, precompute_ref_log_probs=False)


def test_the_first_loss_is_ln_2_and_the_start_check_is_recorded(settings: WorkerSettings) -> None:
    metrics, logs = run(settings)
    assert logs[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert logs[0]["start_check_loss"] == pytest.approx(LN2, abs=1e-5)
    assert logs[0]["start_check_pairs"] == metrics["start_check_pairs"] == 8
    assert metrics["start_check_max_difference"] < 1e-3


def test_wrong_stored_sums_change_the_loss_by_what_dpo_says(
    settings: WorkerSettings, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    wrong = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] - 10} for row in rows]
    files = [write_selection(tmp_path / "wrong.parquet", wrong)]
    shifted = dataclasses.replace(
        settings, selection_files=files, train=train_config(start_check_pairs=0)
    )
    _, logs = run(shifted)
    # The chosen log-ratio is 10 on every pair: -log sigmoid(0.1 * 10) = 0.31326
    assert logs[0]["loss"] == pytest.approx(0.31326, abs=1e-4)


def test_loss_curve_equals_trl_with_the_reference_in_memory(settings: WorkerSettings) -> None:
    settings = changed(settings, max_steps=20)
    packed = functools.partial(PrecomputedDPOTrainer, packed=True)
    curves = []
    for cls in (WithReference, PrecomputedDPOTrainer, packed):
        ours = cls is not WithReference
        trainer = make_trainer(settings, cls, precompute_ref_log_probs=ours)
        assert (trainer.ref_model is None) == ours
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(curves[0]) == 20
    assert np.ptp(curves[0]) > 0.1  # it learns, so that equality says something
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], atol=1e-4)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, rows: Any) -> list[DPOTrainer]:
    """Ours and TRL's trainer, whose equal policies have left the reference."""
    folder = tmp_path_factory.mktemp("moved")
    settings = WorkerSettings(
        train=train_config(),
        model_name_or_path=str(model_dir),
        selection_files=[write_selection(folder / "selection.parquet", rows)],
        output_dir=str(folder / "checkpoints"),
        policy_dir=str(folder / "policy"),
        max_length=64,
        cache_dir=str(folder / "cache"),
    )
    trainers = [
        make_trainer(settings),
        make_trainer(settings, WithReference, precompute_ref_log_probs=False),
    ]
    for trainer in trainers:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainers


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_and_its_gradients_with_stored_sums_equal_trls_with_the_reference(
    moved: list[DPOTrainer], loss_type: str
) -> None:
    losses, gradients = [], []
    for trainer in moved:
        trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
        trainer.label_smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(float(loss))
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(
            gradients[0][name], expected, atol=1e-4 * scale, rtol=1e-3, msg=name
        )


def test_losses_of_trl_are_all_known(settings: WorkerSettings) -> None:
    trainer = make_trainer(settings, loss_type=["none"])
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match="Should be one of") as raised:
        trainer.compute_loss(trainer.model, batch)
    listed = str(raised.value).partition("[")[2]
    assert sorted(listed.strip("]").replace("'", "").split(", ")) == sorted(LOSS_TYPES)


def test_divergences_of_trl_and_the_losses_that_take_them_are_all_known(
    settings: WorkerSettings,
) -> None:
    with pytest.raises(ValueError, match="only supported for the following loss types") as raised:
        make_trainer(settings, loss_type=["apo_zero"], f_divergence_type=DIVERGENCES[1])
    listed = str(raised.value).partition("[")[2].partition("]")[0]
    assert sorted(listed.replace("'", "").split(", ")) == sorted(DIVERGENT_LOSSES)
    trainer = make_trainer(settings)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    for name in DIVERGENCES:
        trainer.f_divergence_type = name
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(LN2, abs=1e-4)
    trainer.f_divergence_type = "js"
    with pytest.raises(ValueError, match="Unknown f_divergence_type"):
        trainer.compute_loss(trainer.model, batch)


def test_overridden_private_methods_are_still_trls() -> None:
    for name, parameters in {
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_send_telemetry": ["self"],
        "_prepare_input": ["self", "data"],
        "_get_train_sampler": ["self", "train_dataset"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "save_model": ["self", "output_dir", "_internal_call"],
    }.items():
        assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == parameters
    assert callable(trl_dpo.hash_module)


def test_stored_sums_keep_their_precision_under_deepspeed_bf16(settings: WorkerSettings) -> None:
    trainer = make_trainer(settings)
    trainer.is_deepspeed_enabled = True  # transformers would cast floating inputs to bfloat16
    moved = trainer._prepare_input({"ref_chosen_logps": torch.tensor([-300.7])})
    assert moved["ref_chosen_logps"].dtype == torch.float32


def test_a_reference_model_or_missing_sums_are_refused(
    settings: WorkerSettings, rows: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path)
    with pytest.raises(TrainingError, match="the stored sums replace it"):
        PrecomputedDPOTrainer(model=model, ref_model=model)
    dataset = load_selection(settings.selection_files, settings.cache_dir)
    trainer = make_trainer(settings)
    for method, arguments in (
        ("_prepare_dataset", (None, None, "train")),
        ("_precompute_ref_logps", ("train", 4)),
    ):
        with pytest.raises(TrainingError, match="lacks ref_chosen_logps"):
            getattr(trainer, method)(dataset.remove_columns("ref_chosen_logps"), *arguments)


# --- logs


def test_each_log_holds_curves_speed_and_memory_also_for_tensorboard(
    settings: WorkerSettings, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = changed(settings, report_to=["tensorboard"])
    _, logs = run(dataclasses.replace(logged, tensorboard_dir=str(tmp_path / "tensorboard")))
    names = {
        "loss",
        "learning_rate",
        "grad_norm",
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        "logps/chosen",
        "num_tokens",
        "pairs_per_s",
        "tokens_per_s",
        "model_flops_per_s",
        "peak_memory_gib",
    }
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        assert names <= set(log)
        assert log["pairs_per_s"] > 0 < log["tokens_per_s"]
        assert 0.05 < log["peak_memory_gib"] < 64
    # Both are counted over the same seconds: 12 pairs of the tokens that TRL counted.
    ratio = sum(log["tokens_per_s"] / log["pairs_per_s"] for log in logs) / 3
    assert ratio == pytest.approx(logs[-1]["num_tokens"] / 12, rel=0.5)
    # 2 layers of (q and o: 32 x 32, k and v: 32 x 16, three of 32 x 48).
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    # A key that a token attends: 4 operations an element of 4 heads of 8.
    flops = training_flops(AutoModelForCausalLM.from_pretrained(settings.model_name_or_path))
    assert flops == Flops(6 * layers, 6 * 32 * VOCAB, 3 * 4 * 2 * 32)
    # Of one step: its useful tokens are at most those that TRL counts, which has prompts twice.
    step = logs[1]["model_flops_per_s"] / logs[1]["pairs_per_s"] * 4
    counted = logs[1]["num_tokens"] - logs[0]["num_tokens"]
    assert 0.5 * counted * 6 * layers < step < counted * 6 * (layers + 32 * VOCAB)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in names:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        np.testing.assert_allclose(values, [log[name] for log in logs], rtol=1e-5)


def test_operations_are_of_the_experts_that_a_token_takes_and_once_backward_with_lora() -> None:
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **sizes, **heads, **experts))
    # A layer: q, k, v and o, the router of 8 experts, two experts of three matrices.
    layers = 2 * (4 * 32 * 32 + 8 * 32 + 2 * 3 * 32 * 48)
    assert training_flops(model) == Flops(6 * layers, 6 * 32 * VOCAB, 3 * 4 * 2 * 32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    added = 2 * 2 * 4 * 32
    assert training_flops(adapted) == Flops(4 * (layers + added), 4 * 32 * VOCAB, 2 * 4 * 2 * 32)


def test_weights_are_counted_whole_where_a_rank_or_a_byte_holds_parts_of_them() -> None:
    plain = torch.nn.Parameter(torch.empty(6, 4))
    assert num_weights(plain) == 24
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([6, 4])
    assert num_weights(partitioned) == 24
    packed = torch.nn.Parameter(torch.empty(12, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = types.SimpleNamespace(shape=torch.Size([6, 4]))  # as bitsandbytes
    assert num_weights(packed) == 24


def test_useful_work_counts_a_prompt_once(settings: WorkerSettings) -> None:
    trainer = make_trainer(settings)
    rows = [trainer.train_dataset[i] for i in range(5)]
    ids = {side: sum(len(row[f"{side}_ids"]) for row in rows) for side in ("prompt", "chosen")}
    rejected = sum(len(row["rejected_ids"]) for row in rows)
    # A token attends all before it and itself.
    keys = 0
    for row in rows:
        prompt, *sides = (len(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected"))
        keys += sum(range(1, prompt + 1))
        keys += sum(sum(range(prompt + 1, prompt + side + 1)) for side in sides)
    counts = useful_work(trainer.data_collator(rows)).tolist()
    assert counts == [sum(ids.values()) + rejected, ids["chosen"] + rejected, keys]
