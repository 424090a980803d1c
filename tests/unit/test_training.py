"""The DPO worker: no reference model, the right loss, honest refusals, exact resume."""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import trl.trainer.dpo_trainer as trl_dpo
from scoring_support import LONGROPE, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from refscale import schema
from refscale.config import TrainConfig
from refscale.errors import ConfigError, ModelError, TrainingError
from refscale.scoring.flops import num_weights
from refscale.training import worker
from refscale.training.checkpoints import CHECKPOINT_FILE, check_checkpoint, checkpoint_record
from refscale.training.checks import DIVERGENCES, DIVERGENT_LOSSES, LOSS_TYPES
from refscale.training.data import REF_COLUMNS, load_selection
from refscale.training.dpo_trainer import PrecomputedDPOTrainer, training_flops, useful_tokens
from refscale.training.options import dpo_arguments
from refscale.training.start_check import logps_budget, positions_check
from refscale.training.worker import WorkerSettings, run_worker

torch.set_num_threads(1)  # more only wait for each other on such small tensors

VOCAB = 64
LN2 = math.log(2)


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> None:
    """Two layers, grouped-query attention; weights large enough that log-probs are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **changes,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t3"
    ).save_pretrained(folder)


def sums(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Sum of completion log-probs by a plain forward of one unpadded sequence."""
    ids = torch.tensor(prompt + completion)
    with torch.no_grad():
        logps = model(ids[None]).logits[0].float().log_softmax(-1)
    first = max(len(prompt), 1)
    return sum(float(logps[t - 1, ids[t]]) for t in range(first, len(ids)))


def selection_rows(model: Any, n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt, chosen, rejected = (
            rng.integers(3, VOCAB, size=int(rng.integers(low, high))).tolist()
            for low, high in ((1, 12), (1, 10), (1, 14))
        )
        ref = sums(model, prompt, chosen), sums(model, prompt, rejected)
        rows.append(
            {
                "pair_id": i.to_bytes(16, "big"),
                "source": "s",
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": ref[0],
                "ref_rejected_logps": ref[1],
                "selection_key": ref[0] - ref[1],
            }
        )
    return rows


def write_selection(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.SELECTION), path)
    return str(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def rows(model_dir: Path) -> list[dict[str, Any]]:
    return selection_rows(AutoModelForCausalLM.from_pretrained(model_dir), 24)


def train_config(**changes: Any) -> dict[str, Any]:
    fields = {
        "deepspeed": None,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 1000,
        "max_steps": 3,
        "packed": "auto",
    }
    return TrainConfig.model_validate({**fields, **changes}).model_dump()


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path, rows: list[dict[str, Any]]) -> WorkerSettings:
    return WorkerSettings(
        train=train_config(),
        model_name_or_path=str(model_dir),
        selection_files=[write_selection(tmp_path / "selection.parquet", rows)],
        output_dir=str(tmp_path / "checkpoints"),
        policy_dir=str(tmp_path / "policy"),
        max_length=64,
        cache_dir=str(tmp_path / "cache"),
    )


def run(settings: WorkerSettings, **kwargs: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    logs: list[dict[str, Any]] = []
    saved = kwargs.pop("on_save", lambda folder, metrics: None)
    return run_worker(settings, on_log=logs.append, on_save=saved, **kwargs), logs


def changed(settings: WorkerSettings, **changes: Any) -> WorkerSettings:
    return dataclasses.replace(settings, train=train_config(**changes))


def make_trainer(
    settings: WorkerSettings, cls: Callable[..., DPOTrainer] = PrecomputedDPOTrainer, **changes: Any
) -> DPOTrainer:
    """A trainer on the selection without `run_worker`'s callbacks."""
    arguments = dpo_arguments(
        settings.train, output_dir=settings.output_dir, device="cpu", bf16=False, max_length=64
    )
    return cls(
        model=AutoModelForCausalLM.from_pretrained(settings.model_name_or_path),
        args=DPOConfig(**{**arguments, **changes}),
        train_dataset=load_selection(settings.selection_files, settings.cache_dir),
        processing_class=AutoTokenizer.from_pretrained(settings.model_name_or_path),
    )


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


# --- the policy


def test_the_policy_loads_and_differs_from_the_reference(settings: WorkerSettings) -> None:
    run(settings)
    assert (Path(settings.policy_dir) / "model.safetensors").is_file()
    assert not list(Path(settings.policy_dir).glob("*.bin"))
    card = (Path(settings.policy_dir) / "README.md").read_text()
    assert "| pairs | 24 |" in card
    assert "| start_check_loss | 0.6931 |" in card
    assert settings.model_name_or_path not in card  # a path of this machine means nothing elsewhere
    policy = AutoModelForCausalLM.from_pretrained(settings.policy_dir)
    reference = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path)
    moved = [
        (a - b).abs().max()
        for a, b in zip(policy.parameters(), reference.parameters(), strict=True)
    ]
    assert max(moved) > 1e-4
    assert len(AutoTokenizer.from_pretrained(settings.policy_dir)) == VOCAB


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policys_config_is_the_references(
    settings: WorkerSettings, checkpointing: bool
) -> None:
    run(changed(settings, max_steps=1, gradient_checkpointing=checkpointing))
    policy, reference = (
        json.loads((Path(folder) / "config.json").read_text())
        for folder in (settings.policy_dir, settings.model_name_or_path)
    )
    assert reference["use_cache"] is True
    assert policy == reference


def test_training_raises_the_margin_on_its_pairs(
    settings: WorkerSettings, rows: list[dict[str, Any]]
) -> None:
    run(changed(settings, max_steps=12))
    policy = AutoModelForCausalLM.from_pretrained(settings.policy_dir)
    gains = [
        sums(policy, row["prompt_ids"], row["chosen_ids"])
        - sums(policy, row["prompt_ids"], row["rejected_ids"])
        - (row["ref_chosen_logps"] - row["ref_rejected_logps"])
        for row in rows
    ]
    assert np.mean(gains) > 1


def test_lora_starts_at_the_reference_and_merges_to_the_trained_policy(
    settings: WorkerSettings, rows: list[dict[str, Any]]
) -> None:
    from peft import PeftModel

    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    _, logs = run(changed(settings, peft=lora, max_steps=6))
    assert logs[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path)
    merged = AutoModelForCausalLM.from_pretrained(settings.policy_dir)
    row = rows[0]
    start = sums(base, row["prompt_ids"], row["chosen_ids"])
    adapter = PeftModel.from_pretrained(base, str(Path(settings.policy_dir) / "adapter")).eval()
    adapted = sums(adapter, row["prompt_ids"], row["chosen_ids"])
    assert abs(adapted - start) > 1e-2
    assert sums(merged, row["prompt_ids"], row["chosen_ids"]) == pytest.approx(adapted, abs=1e-3)


@pytest.fixture
def tied(settings: WorkerSettings, tmp_path: Path) -> WorkerSettings:
    """Of a model whose output head is its input embedding."""
    folder = tmp_path / "tied"
    save_tiny_llama(folder, tie_word_embeddings=True)
    rows = selection_rows(AutoModelForCausalLM.from_pretrained(folder), 12)
    return dataclasses.replace(
        settings,
        model_name_or_path=str(folder),
        selection_files=[write_selection(tmp_path / "tied.parquet", rows)],
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
    ],
    ids=str,
)
def test_the_merged_policy_is_the_model_that_was_trained(
    tied: WorkerSettings, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    trained: list[float] = []
    save = worker.save_policy

    def measure_and_save(trainer: DPOTrainer, *args: Any) -> None:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            outputs = trainer.model(**ids, labels=labels, fused_lm_head=True, use_cache=False)
        trained.extend(outputs.log_probs.sum(dim=1)[:12].tolist())
        save(trainer, *args)

    monkeypatch.setattr(worker, "save_policy", measure_and_save)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], **more}
    run(dataclasses.replace(tied, train=train_config(peft=lora, max_steps=6, learning_rate=1e-2)))
    merged = AutoModelForCausalLM.from_pretrained(tied.policy_dir)
    base = AutoModelForCausalLM.from_pretrained(tied.model_name_or_path)
    pairs = load_selection(tied.selection_files, tied.cache_dir)
    found, before = (
        [sums(model, pair["prompt_ids"], pair["chosen_ids"]) for pair in pairs]
        for model in (merged, base)
    )
    assert np.abs(np.subtract(found, before)).max() > 0.5
    np.testing.assert_allclose(found, trained, atol=1e-3)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "output head shares"),
        ({"target_modules": r".*\.(q_proj|embed_tokens)"}, "output head shares"),
        ({"trainable_token_indices": [5, 6]}, "output head shares"),
        ({"lora_bias": True}, r"gives model\.layers\.0\.self_attn\.q_proj a bias"),
    ],
)
def test_an_adapter_that_would_merge_to_another_policy_is_refused_before_the_first_step(
    tied: WorkerSettings, lora: dict[str, Any], message: str
) -> None:
    logs: list[dict[str, Any]] = []
    asked = dataclasses.replace(tied, train=train_config(peft={"r": 4, **lora}))
    with pytest.raises(ConfigError, match=message):
        run_worker(asked, on_log=logs.append, on_save=lambda folder, metrics: None)
    assert not logs


# --- the holdout, measured while training


@pytest.fixture
def measured(
    settings: WorkerSettings, tmp_path: Path, rows: list[dict[str, Any]]
) -> WorkerSettings:
    """Trains on the first 16 pairs and measures the other 8 after steps 2, 4, 6 and 7."""
    holdout = tmp_path / "holdout.parquet"
    pq.write_table(pa.Table.from_pylist(rows[16:], schema=schema.HELD_OUT), holdout)
    return dataclasses.replace(
        changed(settings, max_steps=7, eval_steps=2, save_steps=2, save_total_limit=9),
        selection_files=[write_selection(tmp_path / "train.parquet", rows[:16])],
        holdout_files=[str(holdout)],
    )


def loss_on(folder: str, rows: list[dict[str, Any]]) -> float:
    """DPO's sigmoid loss of a model in `folder` by plain forwards, beta 0.1."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for row in rows:
        chosen, rejected = (
            sums(model, row["prompt_ids"], row[f"{side}_ids"]) - row[f"ref_{side}_logps"]
            for side in ("chosen", "rejected")
        )
        total += math.log1p(math.exp(-0.1 * (chosen - rejected)))
    return total / len(rows)


@pytest.mark.parametrize("packed", ["on", "off"])
def test_the_holdout_is_measured_at_every_checkpoint_and_changes_nothing(
    measured: WorkerSettings, rows: list[dict[str, Any]], packed: str
) -> None:
    measured = dataclasses.replace(measured, train={**measured.train, "packed": packed})
    saved: dict[str, float] = {}
    _, logs = run(measured, on_save=lambda folder, row: saved.update({folder: row["eval_loss"]}))
    assert [Path(folder).name for folder in saved] == [f"checkpoint-{n}" for n in (2, 4, 6, 7)]
    for folder, loss in saved.items():
        assert loss == pytest.approx(loss_on(folder, rows[16:]), abs=1e-5)
    # The second row of a step has what the first had, and the holdout's metrics.
    steps = [log["step"] for log in logs]
    assert steps == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    for log in (logs[i] for i in (2, 5, 8, 10)):
        assert {"loss", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= set(log)
    assert all("eval_loss" not in logs[i] for i in (0, 1, 3, 6))
    plain = dataclasses.replace(
        measured, train={**measured.train, "eval_steps": None}, holdout_files=[]
    )
    _, undisturbed = run(plain)
    once = {log["step"]: log["loss"] for log in logs}
    assert list(once.values()) == [log["loss"] for log in undisturbed]


def test_the_policy_is_the_best_checkpoint_where_asked(measured: WorkerSettings) -> None:
    asked = {**measured.train, "load_best_model_at_end": True}
    folders: list[str] = []
    metrics, _ = run(
        dataclasses.replace(measured, train=asked),
        on_save=lambda folder, row: folders.append(folder),
        best_checkpoint=lambda: contextlib.nullcontext(folders[1]),
    )
    assert metrics["policy_step"] == 4 and metrics["steps"] == 7
    policy, best, last = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (measured.policy_dir, folders[1], folders[-1])
    )
    assert all(torch.equal(weight, best[name]) for name, weight in policy.items())
    assert not all(torch.equal(weight, last[name]) for name, weight in policy.items())
    card = (Path(measured.policy_dir) / "README.md").read_text()
    assert "| weights of step | 4 |" in card


def test_the_best_checkpoint_must_be_one_of_this_training(
    measured: WorkerSettings, tmp_path: Path
) -> None:
    asked = {**measured.train, "load_best_model_at_end": True}
    with pytest.raises(TrainingError, match="is not a checkpoint of refscale"):
        run(
            dataclasses.replace(measured, train=asked),
            best_checkpoint=lambda: contextlib.nullcontext(str(tmp_path)),
        )


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
    assert training_flops(AutoModelForCausalLM.from_pretrained(settings.model_name_or_path)) == (
        6 * layers,
        6 * 32 * VOCAB,
    )
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
    assert training_flops(model) == (6 * layers, 6 * 32 * VOCAB)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    added = 2 * 2 * 4 * 32
    assert training_flops(adapted) == (4 * (layers + added), 4 * 32 * VOCAB)


def test_weights_are_counted_whole_where_a_rank_or_a_byte_holds_parts_of_them() -> None:
    plain = torch.nn.Parameter(torch.empty(6, 4))
    assert num_weights(plain) == 24
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([6, 4])
    assert num_weights(partitioned) == 24
    packed = torch.nn.Parameter(torch.empty(12, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = types.SimpleNamespace(shape=torch.Size([6, 4]))  # as bitsandbytes
    assert num_weights(packed) == 24


def test_useful_tokens_count_a_prompt_once(settings: WorkerSettings) -> None:
    trainer = make_trainer(settings)
    rows = [trainer.train_dataset[i] for i in range(5)]
    ids = {side: sum(len(row[f"{side}_ids"]) for row in rows) for side in ("prompt", "chosen")}
    rejected = sum(len(row["rejected_ids"]) for row in rows)
    counts = useful_tokens(trainer.data_collator(rows)).tolist()
    assert counts == [sum(ids.values()) + rejected, ids["chosen"] + rejected]


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
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 on rank 0; lower"):
        run(settings)


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
