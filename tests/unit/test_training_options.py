"""From the config to DPOConfig, DeepSpeed and LoRA: presets, and refusals with the reason."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import SchedulerType
from trl import DPOConfig

from refscale import pipeline
from refscale.config import Config, TrainConfig
from refscale.errors import ConfigError
from refscale.run import Run
from refscale.storage.store import Store
from refscale.training import checks
from refscale.training.options import dpo_arguments
from refscale.training.presets import deepspeed_config, peft_config


def arguments(**changes: Any) -> dict[str, Any]:
    return dpo_arguments(
        TrainConfig.model_validate({"deepspeed": None, **changes}).model_dump(),
        output_dir="out",
        device="cpu",
        bf16=False,
        max_length=64,
    )


def test_arguments_make_a_dpo_config_that_reads_stored_sums() -> None:
    config = DPOConfig(**arguments(loss_type="sigmoid,sft", trl={"loss_weights": [1.0, 0.1]}))
    assert config.precompute_ref_log_probs
    assert not config.logging_nan_inf_filter
    assert config.loss_type == ["sigmoid", "sft"]
    assert config.loss_weights == [1.0, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trl": {"dataloader_num_worker": 2}}, "did you mean dataloader_num_workers"),
        ({"trl": {"beta": 0.2}}, "train.trl.beta belongs to train.beta"),
        ({"trl": {"ld_alpha": 0.5}}, "weighted by alpha"),
        ({"trl": {"sync_ref_model": True}}, "makes the stored sums stale"),
        ({"trl": {"fsdp": "full_shard"}}, "makes TRL load a reference model"),
        ({"trl": {"label_smoothing_factor": 0.1}}, "belongs to train.label_smoothing"),
        ({"trl": {"activation_checkpointing": True}}, "belongs to train.gradient_checkpointing"),
        ({"trl": {"data_seed": 3}}, "belongs to train.seed"),
        ({"trl": {"train_sampling_strategy": "sequential"}}, "belongs to train.order"),
        ({"trl": {"save_strategy": "epoch"}}, "belongs to train.save_steps"),
        ({"trl": {"save_only_model": True}}, "cannot be resumed from"),
        ({"trl": {"ignore_data_skip": True}}, "take pairs twice"),
        ({"trl": {"push_to_hub": True}}, "would push checkpoints"),
        ({"trl": {"neftune_noise_alpha": 5.0}}, "set train.packed: off"),
        ({"trl": {"eval_on_start": True}}, "set train.eval_steps"),
        ({"trl": {"loss_weights": [1.0, 0.1]}}, "has 2 values and train.loss_type 1"),
        ({"loss_type": "sigmod"}, "'sigmod' is not a loss .* did you mean sigmoid"),
        ({"loss_type": "exo_pair"}, "logarithm of train.label_smoothing"),
        ({"label_smoothing": 0.1}, "which train.loss_type sigmoid ignores; take one of robust"),
        ({"report_to": ["tensorbord"]}, "unknown reporter 'tensorbord'; did you mean tensorboard"),
        ({"report_to": ["wandb"]}, "wandb is not installed where the workers run"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16.enabled is true"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "computes in float32"),
    ],
)
def test_options_that_cannot_hold_are_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"loss_type": "sigmod"}}, "did you mean sigmoid"),
        ({"train": {"lr_scheduler_type": "cosin"}}, "'cosin' is not a schedule"),
        ({"train": {"lr_scheduler_type": "warmup_stable_decay"}}, "num_decay_steps"),
        ({"train": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr or min_lr_rate"),
        ({"train": {"lr_scheduler_type": "greedy"}}, "set train.eval_steps"),
        ({"train": {"trl": {"lr_scheduler_kwargs": {"cycles": 2}}}}, "argument 'cycles'"),
        ({"train": {"max_steps": 0}}, "must be at least 1, or -1"),
        ({"train": {"trl": {"lerning_rate": 1}}}, "unknown key train.trl.lerning_rate"),
        ({"train": {"peft": {"rank": 4}}}, "unknown key train.peft.rank"),
        ({"train": {"report_to": ["wandbb"]}}, "did you mean wandb"),
        ({"model": {"dtype": "float16"}}, "model.dtype is float16"),
        ({"score": {"quantization": "4bit"}}, "quantised weights cannot be trained"),
        ({"train": {"eval_steps": 5}, "corpus": {"holdout_fraction": 0}}, "there are none"),
    ],
)
def test_what_no_training_would_take_is_known_before_anything_is_scored(
    tmp_path: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    sections = {
        "model": {"model_name_or_path": "m", **changes.get("model", {})},
        "corpus": {"sources": [{"path": "absent.jsonl"}], **changes.get("corpus", {})},
        **{section: changes.get(section, {}) for section in ("score", "train")},
    }
    config = Config.model_validate(sections)
    with pytest.raises(ConfigError, match=message):
        pipeline.run_stages(Run(Store(tmp_path / "run"), config))
    assert not (tmp_path / "run").exists()


def test_schedules_are_those_of_transformers() -> None:
    assert set(checks.SCHEDULERS) == {kind.value for kind in SchedulerType}


def test_schedules_take_their_arguments() -> None:
    stable = {"lr_scheduler_kwargs": {"num_decay_steps": 3}}
    made = arguments(lr_scheduler_type="warmup_stable_decay", trl=stable)
    assert made["lr_scheduler_kwargs"] == {"num_decay_steps": 3}
    assert arguments(trl={"neftune_noise_alpha": 5.0}, packed="off")["neftune_noise_alpha"] == 5.0


def test_refused_and_owned_options_are_real_fields_of_dpo_config() -> None:
    known = {f.name for f in dataclasses.fields(DPOConfig)} | {"warmup_ratio"}
    assert set(checks._REFUSED) | set(checks._OWNED) <= known


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("preset", "stage", "offloaded"),
    [
        ("zero1", 1, set()),
        ("zero2", 2, set()),
        ("zero3", 3, set()),
        ("zero2_offload", 2, {"offload_optimizer"}),
        ("zero3_offload", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_presets(device: Any, preset: str, stage: int, offloaded: set[str]) -> None:
    config = deepspeed_config(preset, device=device, bf16=True)
    assert config is not None
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert {key for key in zero if key.startswith("offload_")} == offloaded
    assert all(zero[key]["pin_memory"] == (device == "cuda") for key in offloaded)
    assert config["bf16"]["enabled"]
    assert ("stage3_gather_16bit_weights_on_model_save" in zero) == (stage == 3)


def test_presets_and_own_configs() -> None:
    assert deepspeed_config(None, device="cpu", bf16=False) is None
    with pytest.raises(ConfigError, match="did you mean zero3"):
        deepspeed_config("zero4", device="cpu", bf16=False)
    with pytest.raises(ConfigError, match="zero1_offload"):
        deepspeed_config("zero1_offload", device="cpu", bf16=False)
    own = {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0}
    config = deepspeed_config(own, device="cpu", bf16=False)
    assert config is not None
    assert config["gradient_clipping"] == 2.0
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert own == {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0}


def test_lora_options() -> None:
    assert peft_config(None) is None
    assert peft_config({"r": 16}).r == 16
    with pytest.raises(ConfigError, match=r"train.peft.lora_alfa; did you mean lora_alpha"):
        peft_config({"lora_alfa": 3})
    with pytest.raises(ConfigError, match=r"train\.peft: .*layers_pattern"):
        peft_config({"layers_pattern": "layers"})
    with pytest.raises(ConfigError, match="holds lm_head"):
        peft_config({"target_modules": ["q_proj", "lm_head"]})
