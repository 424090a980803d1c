"""The policy: what is saved is what was trained, and the best checkpoint where asked."""

import contextlib
import dataclasses
import json
import math
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import DistributedType
from training_support import (
    LN2,
    VOCAB,
    changed,
    make_trainer,
    model_dir,
    rows,
    run,
    save_tiny_llama,
    selection_rows,
    settings,
    sums,
    train_config,
    write_selection,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from trl import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from refscale import schema
from refscale.errors import ConfigError, ModelError, TrainingError
from refscale.training import worker
from refscale.training.data import load_selection
from refscale.training.policy import gathers_weights, load_policy, save_policy
from refscale.training.worker import WorkerSettings, run_worker

__all__ = ["model_dir", "rows", "settings"]  # fixtures, which pytest finds by their names here


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


# --- dropout

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
DROPPING = {
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0,
            bos_token_id=2, eos_token_id=1,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **SIZES, ffn_dim=48, word_embed_proj_dim=32, attention_dropout=0.1, layerdrop=0.5
        )
    ),
    "seed_oss": lambda: SeedOssForCausalLM(
        SeedOssConfig(
            **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, attention_dropout=0.1,
            residual_dropout=0.1,
        )
    ),
    "starcoder2": lambda: Starcoder2ForCausalLM(
        Starcoder2Config(
            **SIZES, intermediate_size=48, num_key_value_heads=2, attention_dropout=0.1,
            residual_dropout=0.1, embedding_dropout=0.1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, attention_dropout=0.1)
    ),
}  # fmt: skip


def dropping(settings: WorkerSettings, tmp_path: Path, model: Any) -> WorkerSettings:
    """To train this model, which is saved with tokenizer and a selection that it scored."""
    folder = tmp_path / "dropping"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model_name_or_path).save_pretrained(folder)
    rows = selection_rows(model.eval(), 8)
    return dataclasses.replace(
        settings,
        model_name_or_path=str(folder),
        selection_files=[write_selection(tmp_path / "dropping.parquet", rows)],
    )


@pytest.mark.parametrize("name", DROPPING)
def test_a_policy_in_training_computes_what_scored(
    settings: WorkerSettings, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(0)
    asked = dropping(changed(settings, max_steps=2), tmp_path, DROPPING[name]())
    model, _ = load_policy(asked, "cpu")
    disable_dropout_in_model(model)  # as TRL does after us
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        model.train()
        assert model(ids).logits.equal(expected) and model(ids).logits.equal(expected)
    metrics, logs = run(asked)
    assert metrics["train_path"] == "packed"
    assert logs[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    saved, reference = (
        json.loads((Path(folder) / "config.json").read_text())
        for folder in (asked.policy_dir, asked.model_name_or_path)
    )
    rates = {key: value for key, value in reference.items() if "drop" in key}
    assert any(rates.values()) and rates.items() <= saved.items()


@pytest.mark.parametrize("rate", ["attention_dropout", "hidden_dropout"])
def test_dropout_that_layers_read_from_the_config_is_refused(
    settings: WorkerSettings, tmp_path: Path, rate: str
) -> None:
    def falcon(**rates: float) -> WorkerSettings:
        sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
        model = FalconForCausalLM(FalconConfig(**sizes, **rates))
        return dropping(settings, tmp_path, model)

    load_policy(falcon(), "cpu")
    with pytest.raises(ModelError, match=rf"would train with {rate} 0.1, .*set it to 0 there"):
        load_policy(falcon(**{rate: 0.1}), "cpu")


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


@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj"]}])
def test_sampling_flags_without_do_sample_are_saved_as_they_came(
    settings: WorkerSettings, tmp_path: Path, peft: Any
) -> None:
    folder = tmp_path / "sampling"
    shutil.copytree(settings.model_name_or_path, folder)
    # No pad token: the trainer puts in the tokenizer's, after which transformers is strict.
    flags = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(flags))
    asked = changed(settings, max_steps=2, save_steps=1, peft=peft)
    run(dataclasses.replace(asked, model_name_or_path=str(folder)))
    saved = json.loads((Path(settings.policy_dir) / "generation_config.json").read_text())
    assert saved.items() >= flags.items() and "do_sample" not in saved


class Accelerator:
    """accelerate's, of a rank that writes nothing."""

    is_main_process = False

    def __init__(self, stage: int | None) -> None:
        self.distributed_type = DistributedType.MULTI_GPU
        if stage is not None:
            self.distributed_type = DistributedType.DEEPSPEED
            self.deepspeed_config = {"zero_optimization": {"stage": stage}}
        self.copied = 0

    def get_state_dict(self, model: Any) -> dict[str, Any]:
        self.copied += 1
        return {}

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""


@pytest.mark.parametrize(("stage", "copies"), [(None, 0), (1, 0), (2, 0), (3, 1)])
def test_ranks_that_write_nothing_take_the_weights_only_where_they_are_gathered(
    settings: WorkerSettings, stage: int | None, copies: int
) -> None:
    accelerator: Any = Accelerator(stage)
    trainer: Any = types.SimpleNamespace(accelerator=accelerator, model_wrapped=None)
    save_policy(trainer, None, settings, "")
    assert accelerator.copied == copies == gathers_weights(accelerator)


@pytest.mark.parametrize(("stage", "copies"), [(2, 0), (3, 1)])
def test_checkpoints_copy_the_weights_on_the_writing_rank_unless_they_are_gathered(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, stage: int, copies: int
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(DPOTrainer, "save_model", lambda self, *args: saved.append(args))
    trainer = make_trainer(settings)
    trainer.is_deepspeed_enabled, trainer.accelerator = True, Accelerator(stage)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model("checkpoint")
    assert len(saved) == copies
    monkeypatch.setattr(type(trainer.args), "should_save", True)
    trainer.save_model("checkpoint")
    assert len(saved) == copies + 1


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
