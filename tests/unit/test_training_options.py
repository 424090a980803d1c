"""From the config to DPOConfig, DeepSpeed and LoRA: presets, and refusals with the reason."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState
from transformers import LlamaConfig, SchedulerType
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from refscale import pipeline
from refscale.config import Config, TrainConfig
from refscale.errors import ConfigError
from refscale.run import Run
from refscale.storage.store import Store
from refscale.training import checks
from refscale.training.options import deciding_options, dpo_arguments
from refscale.training.presets import deepspeed_config, peft_config, steps_on_cpus, zero_stage


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
        ({"trl": {"accelerator_config": "a.json"}}, "mapping of its fields, got 'a.json'"),
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
        ({"train": {"trl": {"f_divergence_type": "js_divergance"}}}, "did you mean js_divergence"),
        (
            {"train": {"loss_type": "apo_zero", "trl": {"f_divergence_type": "forward_kl"}}},
            "which train.loss_type apo_zero does not take; take one of sigmoid",
        ),
        (
            {"train": {"loss_type": "sigmoid,aot", "trl": {"use_weighting": True}}},
            "train.loss_type sigmoid,aot sorts them",
        ),
        ({"train": {"trl": {"optim": "adamw_foo"}}}, "cannot be used: adamw_foo is not a valid"),
        (
            {"train": {"trl": {"accelerator_config": {"split_batch": True}}}},
            "unexpected keyword argument 'split_batch'",
        ),
        (
            {
                "train": {
                    "eval_steps": 100,
                    "load_best_model_at_end": True,
                    "trl": {"eval_delay": 250},
                }
            },
            "eval_delay leaves checkpoints unmeasured",
        ),
        ({"train": {"deepspeed": {"fp16": {"enabled": True}}}}, "fp16.enabled is true"),
        ({"train": {"deepspeed": {"fp16": True}}}, "fp16 is True, which must be a mapping"),
        ({"train": {"deepspeed": {"bf16": True}}}, "bf16 is True, which must be a mapping"),
        ({"train": {"deepspeed": {"zero_optimization": 2}}}, "zero_optimization is 2, which must"),
        (
            {"train": {"deepspeed": {"zero_optimization": {"offload_optimizer": "cpu"}}}},
            "zero_optimization.offload_optimizer is 'cpu', which must",
        ),
        (
            {"train": {"deepspeed": {"zero_optimization": {"stage": "auto"}}}},
            "stage must be 0, 1, 2 or 3, got 'auto'",
        ),
        ({"train": {"deepspeed": {"optimizer": "AdamW"}}}, "optimizer is 'AdamW', which must"),
        (
            {"train": {"deepspeed": {"gradient_clipping": 2.0, "gradient_accumulation_steps": 4}}},
            "contradicts the section train: gradient_accumulation_steps=4 vs"
            " gradient_accumulation_steps=1, gradient_clipping=2.0 vs max_grad_norm=1.0; set",
        ),
        (
            {"train": {"deepspeed": {"train_micro_batch_size_per_gpu": 4}}},
            "train_micro_batch_size_per_gpu=4 vs per_device_train_batch_size=8",
        ),
        (
            {"train": {"num_workers": 2, "deepspeed": {"train_batch_size": 8}}},
            r"train_batch_size=8 vs train_batch_size \(calculated\)=16",
        ),
        (
            {"train": {"bf16": False, "deepspeed": {"bf16": {"enabled": True}}}},
            "bf16.enabled is True but training computes in float32",
        ),
        (
            {
                "train": {
                    "deepspeed": {
                        "zero_optimization": {
                            "stage": 3,
                            "stage3_gather_16bit_weights_on_model_save": False,
                        }
                    }
                }
            },
            "could not be saved after its training; set it to true",
        ),
        ({"train": {"peft": {"rank": 4}}}, "unknown key train.peft.rank"),
        ({"train": {"peft": {"lora_dropout": 0.1}}}, "lora_dropout is 0.1: the stored sums"),
        (
            {"train": {"peft": {"target_modules": "*proj"}}},
            r"target_modules: '\*proj' is not a regular expression: nothing to repeat",
        ),
        (
            {"train": {"peft": {"exclude_modules": "("}}},
            r"exclude_modules: '\(' is not a regular expression: missing \)",
        ),
        ({"train": {"peft": {"init_lora_weights": "pissa_niter_4"}}}, "drawn anew .* use pissa"),
        ({"train": {"peft": {"ensure_weight_tying": True}}}, "not trained or not saved"),
        (
            {"score": {"quantization": "4bit"}, "train": {"peft": {"r": 4}, "deepspeed": "zero3"}},
            "is ZeRO-3, which does not partition quantised weights; set train.deepspeed: zero2",
        ),
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


ADAPTED = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": r".*\.(q_proj|embed_tokens)"},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
]


@pytest.mark.parametrize("peft", ADAPTED, ids=["list", "pattern", "tokens"])
def test_an_adapter_on_tied_embeddings_is_refused_where_the_models_config_can_be_read(
    tmp_path: Path, peft: dict[str, Any]
) -> None:
    def config(folder: Path, peft: dict[str, Any]) -> Config:
        return Config.model_validate(
            {
                "model": {"model_name_or_path": str(folder)},
                "corpus": {"sources": [{"path": "absent.jsonl"}]},
                "train": {"peft": peft},
            }
        )

    for tied in (True, False):
        LlamaConfig(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
    with pytest.raises(ConfigError, match="whose weight this model's output head shares"):
        checks.check_training(config(tmp_path / "True", peft))
    checks.check_training(config(tmp_path / "False", peft))
    checks.check_training(config(tmp_path / "absent", peft))  # a worker may have it
    checks.check_training(config(tmp_path / "True", {"modules_to_save": ["embed_tokens"]}))
    # A pattern that names the layer to leave it out.
    checks.check_training(config(tmp_path / "True", {"target_modules": r"(?!.*embed_tokens).*"}))


OWN_ZERO3 = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1,
}


@pytest.mark.parametrize("deepspeed", ["zero3", OWN_ZERO3], ids=["preset", "own"])
def test_values_are_checked_without_touching_this_process(deepspeed: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    environment = dict(os.environ)
    train = TrainConfig.model_validate(
        {
            "num_workers": 2,
            "deepspeed": deepspeed,
            "report_to": ["wandb"],
            "trl": {"tf32": True, "optim": "sgd"},
        }
    )
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "corpus": {"sources": [{"path": "absent.jsonl"}]},
            "train": train.model_dump(),
        }
    )
    checks.check_training(config)
    assert dict(os.environ) == environment and not PartialState._shared_state
    assert not is_deepspeed_zero3_enabled()


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


@pytest.mark.parametrize("bf16", [True, False])
def test_the_usual_template_of_deepspeed_takes_the_trainings_precision(bf16: bool) -> None:
    template = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"},
    }
    config = deepspeed_config(template, device="cpu", bf16=bf16)
    assert config is not None
    assert config["fp16"] == {"enabled": False, "loss_scale": 0}
    assert config["bf16"] == {"enabled": bf16}
    # accelerate would make "auto" false.
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_zero_stages_of_presets_and_own_configs() -> None:
    assert zero_stage(None) == zero_stage({}) == zero_stage({"zero_optimization": {}}) == 0
    assert zero_stage("zero2_offload") == 2
    assert zero_stage("zero3") == zero_stage({"zero_optimization": {"stage": 3}}) == 3


def test_optimizers_that_step_on_cpus() -> None:
    assert steps_on_cpus("zero2_offload") and steps_on_cpus("zero3_offload")
    own = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert steps_on_cpus({"zero_optimization": own})
    for none in (None, "zero3", {}, {"zero_optimization": None}):
        assert not steps_on_cpus(none)
    for target in (None, {}, {"device": "none"}):
        assert not steps_on_cpus({"zero_optimization": {**own, "offload_optimizer": target}})


def test_lora_options() -> None:
    assert peft_config(None) is None
    assert peft_config({"r": 16}).r == 16
    with pytest.raises(ConfigError, match=r"train.peft.lora_alfa; did you mean lora_alpha"):
        peft_config({"lora_alfa": 3})
    with pytest.raises(ConfigError, match=r"train\.peft: .*layers_pattern"):
        peft_config({"layers_pattern": "layers"})
    with pytest.raises(ConfigError, match="holds lm_head"):
        peft_config({"target_modules": ["q_proj", "lm_head"]})


@pytest.mark.parametrize(
    ("changes", "decide"),
    [
        ({}, set()),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"eval_steps"}),
        ({"load_best_model_at_end": True}, {"eval_steps", "save_steps"}),
    ],
)
def test_when_is_saved_and_measured_decides_only_what_goes_by_it(
    changes: dict[str, Any], decide: set[str]
) -> None:
    measured = {"eval_steps": 50, "save_steps": 100, **changes}
    kept = deciding_options(TrainConfig.model_validate(measured).model_dump())
    for name, value in {"eval_steps": 25, "save_steps": 1000, "start_check_pairs": 2}.items():
        other = TrainConfig.model_validate({**measured, name: value}).model_dump()
        assert (deciding_options(other) != kept) == (name in decide), name
