"""Refuses what training would refuse, before anything is scored.

In: the config, or plain values of its section train. Out: nothing, or a ConfigError that names the
option and what to change. Seconds, on any machine; imports trl where `train.trl` is set or
`train.deepspeed` is a config, and reads the model's config where an adapter on its embedding may
not fit it.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refscale.errors import ConfigError
from refscale.training.presets import (
    check_sections,
    deepspeed_config,
    nearest,
    peft_config,
    zero_stage,
)

if TYPE_CHECKING:
    from refscale.config import Config

# TRL 1.16's losses. All of them read the reference through the two plain sums alone; ipo and
# sigmoid_norm divide by the completion's tokens themselves, sft reads no reference.
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# Those of them that read train.label_smoothing; TRL's sigmoid ignores it.
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# Those that take another train.trl.f_divergence_type than its default, the first of them.
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DIVERGENT_LOSSES = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
)
# Those that sort the pairs of a batch, so that no weight could follow its pair.
_SORTING = ("aot", "aot_unpaired")

# What input embeddings are called in transformers.
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
TIED_EMBEDDING = (
    "train.peft trains an adapter on the input embedding, whose weight this model's output head"
    " shares: merged, it would change the head too, and the policy would not be the trained one;"
    " leave it out, or train the embedding whole with train.peft.modules_to_save"
)

NO_HOLDOUT = (
    "train.eval_steps measures held-out pairs and there are none: set corpus.holdout_fraction or"
    " mark a source holdout: true"
)

# transformers' names; those that need arguments get them in train.trl.lr_scheduler_kwargs.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
# Those that go by the loss on the holdout.
MEASURED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_NEED_ARGUMENTS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")

# DPOConfig fields with their home elsewhere in the config, for the message.
_OWNED = {
    "beta": "train.beta",
    "loss_type": "train.loss_type",
    "label_smoothing": "train.label_smoothing",
    "label_smoothing_factor": "train.label_smoothing",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "warmup_steps": "train.warmup_ratio",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.bf16",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "train_sampling_strategy": "train.order",
    "logging_steps": "train.logging_steps",
    "logging_strategy": "train.logging_steps",
    "save_steps": "train.save_steps",
    "save_strategy": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "eval_steps": "train.eval_steps",
    "eval_strategy": "train.eval_steps",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "report_to": "train.report_to",
    "deepspeed": "train.deepspeed",
    "max_length": "encoding.max_length",
    "output_dir": "the run folder",
    "use_cpu": "ray.gpus_per_worker",
    "model_init_kwargs": "the section model",
    "trust_remote_code": "model.trust_remote_code",
}
# DPOConfig fields that cannot be honoured with stored sums and stored ids.
_REFUSED = {
    "ld_alpha": "it needs reference sums weighted by alpha, and the stored ones are plain sums",
    "sync_ref_model": "a reference that follows the policy makes the stored sums stale",
    "ref_model_sync_steps": "a reference that follows the policy makes the stored sums stale",
    "ref_model_mixup_alpha": "a reference that follows the policy makes the stored sums stale",
    "precompute_ref_log_probs": "the reference sums are always the stored ones",
    "precompute_ref_batch_size": "no reference pass is made in training",
    "use_liger_kernel": "its kernels round otherwise than those that scored; TRL drops it in 2.0",
    "liger_kernel_config": "its kernels round otherwise than those that scored",
    "padding_free": "TRL 1.16 accepts and ignores it; train.packed is the working equivalent",
    "truncation_mode": "pairs are cut once, when they are encoded; see encoding.truncation",
    "pad_token": "the tokenizer's own padding token is used",
    "dataset_num_proc": "the selection is tokenised already",
    "disable_dropout": "the stored sums are without dropout, so step 0 would not match them",
    "fp16": "float16 gradients under- and overflow; use train.bf16 or float32",
    "fsdp": "FSDP makes TRL load a reference model; use train.deepspeed: zero3",
    "fsdp_config": "FSDP makes TRL load a reference model; use train.deepspeed: zero3",
    "logging_nan_inf_filter": "it would hide losses that are not finite",
    "metric_for_best_model": "the best checkpoint is the one with the lowest loss on the holdout",
    "greater_is_better": "the best checkpoint is the one with the lowest loss on the holdout",
    "remove_unused_columns": "the trainer reads exactly the columns of the selection",
    "auto_find_batch_size": "it would change the batch silently; lower"
    " train.per_device_train_batch_size",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed from",
    "ignore_data_skip": "a resumed training would take pairs twice and leave others out",
    "resume_from_checkpoint": "the same command resumes",
    "parallelism_config": "ranks are data-parallel: each takes pairs of its own",
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "label_names"),
        "the holdout's metrics are TRL's own, made without labels and logits",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "the holdout is measured within training, in its precision",
    ),
    **dict.fromkeys(
        ("average_tokens_across_devices", "length_column_name", "local_rank", "use_cache"),
        "nothing in a DPO step reads it",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "the stages of the run decide what is done"
    ),
    "push_to_hub": "it would push checkpoints, not the policy; push policy/ when it is done",
}


def check_training(config: "Config") -> None:
    """Refuse before hours of scoring what training would refuse after them.

    Raises:
        ConfigError: Says what to change.
    """
    train = config.train.model_dump()
    check_options(train)
    if train["trl"] or isinstance(train["deepspeed"], dict):
        _check_values(train)
    if config.model.dtype == "float16":
        raise ConfigError(
            "model.dtype is float16, which is for scoring alone: training computes in bfloat16 or"
            " float32, and the stored sums would not be the policy's; set one of those"
        )
    check_quantization(config.score.quantization, train)
    _check_embedding(config)
    if config.train.eval_steps and not (
        config.corpus.holdout_fraction or any(source.holdout for source in config.corpus.sources)
    ):
        raise ConfigError(NO_HOLDOUT)


def check_quantization(quantization: str | None, train: dict[str, Any]) -> None:
    """Refuse a quantised base without LoRA, or under ZeRO-3.

    Args:
        quantization: `score.quantization`.
        train: `TrainConfig.model_dump()`.

    Raises:
        ConfigError: Says what to change.
    """
    if quantization and not train["peft"]:
        raise ConfigError(
            f"score.quantization is {quantization} but train.peft is not set: quantised weights"
            " cannot be trained; add e.g. train.peft: {r: 16}, or score unquantised"
        )
    if quantization and zero_stage(train["deepspeed"]) == 3:
        raise ConfigError(
            f"score.quantization is {quantization} and train.deepspeed is ZeRO-3, which does not"
            " partition quantised weights; set train.deepspeed: zero2, or score unquantised"
        )


def _check_embedding(config: "Config") -> None:
    """Refuse an adapter on tied embeddings, where the model's config can be read from here.

    The worker looks at the model itself, whatever its layers are called.
    """
    peft = config.train.peft or {}
    targets = peft.get("target_modules") or ()
    if isinstance(targets, str):
        adapted = re.fullmatch(targets, f"model.{_EMBEDDINGS[0]}") is not None
    else:
        adapted = any(target.rpartition(".")[2] in _EMBEDDINGS for target in targets)
    if not adapted and not peft.get("trainable_token_indices"):
        return
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(
            config.model.model_name_or_path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError):
        return
    if all(getattr(c, "tie_word_embeddings", False) for c in (model, model.get_text_config())):
        raise ConfigError(TIED_EMBEDDING)


def check_options(train: dict[str, Any]) -> None:
    """Refuse training options that no worker would take; seconds, on any machine.

    Args:
        train: `TrainConfig.model_dump()`.

    Raises:
        ConfigError: As `dpo_arguments` and `peft_config`, but for what depends on the worker's
            machine: what is installed there, and its device.
    """
    _check_loss(train)
    _check_schedule(train)
    if train["max_steps"] != -1 and train["max_steps"] < 1:
        raise ConfigError(
            f"train.max_steps must be at least 1, or -1 for train.num_train_epochs, got"
            f" {train['max_steps']}"
        )
    check_report_to(train["report_to"], installed=False)
    peft_config(train["peft"])
    _check_deepspeed(train)
    if train["trl"]:
        _check_trl(train)


def _check_deepspeed(train: dict[str, Any]) -> None:
    """Refuse a preset or a DeepSpeed config that could not hold, whatever scored."""
    if isinstance(train["deepspeed"], dict):
        check_sections(train["deepspeed"])
    deepspeed_config(train["deepspeed"], device="cpu", bf16=_in_bf16(train))


def _in_bf16(train: dict[str, Any]) -> bool:
    """Whether training computes in bfloat16; what a DeepSpeed config asks where scores decide."""
    deepspeed, bf16 = train["deepspeed"], train["bf16"]
    if bf16 is None and isinstance(deepspeed, dict):
        bf16 = (deepspeed.get("bf16") or {}).get("enabled") is True
    return bool(bf16)


def _check_loss(train: dict[str, Any]) -> None:
    """Refuse a loss that TRL does not have, and options that it would not read."""
    names = loss_types(train)
    for name in names:
        if name not in LOSS_TYPES:
            raise ConfigError(
                f"train.loss_type: {name!r} is not a loss of TRL's DPOTrainer"
                f"{nearest(name, LOSS_TYPES)}"
            )
    smoothing = train["label_smoothing"]
    if "exo_pair" in names and not smoothing:
        raise ConfigError(
            "train.loss_type exo_pair takes the logarithm of train.label_smoothing, got 0;"
            " its paper uses 0.001"
        )
    if smoothing and not set(names) & set(_SMOOTHED):
        raise ConfigError(
            f"train.label_smoothing is {smoothing:g}, which train.loss_type {train['loss_type']}"
            f" ignores; take one of {', '.join(_SMOOTHED)}"
        )
    weights = train["trl"].get("loss_weights")
    if isinstance(weights, list) and len(weights) != len(names):
        raise ConfigError(
            f"train.trl.loss_weights has {len(weights)} values and train.loss_type {len(names)};"
            " give one each"
        )
    divergence = train["trl"].get("f_divergence_type", DIVERGENCES[0])
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"train.trl.f_divergence_type: {divergence!r} is not a divergence of TRL's DPOTrainer"
            f"{nearest(str(divergence), DIVERGENCES)}"
        )
    if divergence != DIVERGENCES[0] and not set(names) <= set(DIVERGENT_LOSSES):
        raise ConfigError(
            f"train.trl.f_divergence_type is {divergence}, which train.loss_type"
            f" {train['loss_type']} does not take; take one of {', '.join(DIVERGENT_LOSSES)}"
        )
    if train["trl"].get("use_weighting") and set(names) & set(_SORTING):
        raise ConfigError(
            f"train.trl.use_weighting weighs each pair, and train.loss_type {train['loss_type']}"
            " sorts them; take another loss"
        )


def _check_trl(train: dict[str, Any]) -> None:
    """Refuse a field of `train.trl` that DPOConfig lacks or that would not do what it says."""
    from trl import DPOConfig

    known = {f.name for f in dataclasses.fields(DPOConfig) if f.init}
    for key, value in train["trl"].items():
        if key in _OWNED:
            raise ConfigError(f"train.trl.{key} belongs to {_OWNED[key]}; set it there")
        if key in _REFUSED:
            raise ConfigError(f"train.trl.{key}={value!r} is refused: {_REFUSED[key]}")
        if key not in known:
            raise ConfigError(f"unknown key train.trl.{key}{nearest(key, sorted(known))}")
    if train["trl"].get("neftune_noise_alpha") and train["packed"] != "off":
        raise ConfigError(
            "train.trl.neftune_noise_alpha scales its noise by the length of a padded row; set"
            " train.packed: off"
        )
    if train["trl"].get("eval_on_start") and not train["eval_steps"]:
        raise ConfigError("train.trl.eval_on_start measures the holdout; set train.eval_steps")
    if train["trl"].get("eval_delay") and train["load_best_model_at_end"]:
        raise ConfigError(
            "train.trl.eval_delay leaves checkpoints unmeasured, and"
            " train.load_best_model_at_end takes the best of all; leave one of the two out"
        )
    accelerator = train["trl"].get("accelerator_config")
    if accelerator is not None and not isinstance(accelerator, dict):
        raise ConfigError(
            f"train.trl.accelerator_config must be a mapping of its fields, got {accelerator!r};"
            " write what the file holds, which a worker may lack"
        )


def _check_values(train: dict[str, Any]) -> None:
    """Refuse values of `train.trl` and of a DeepSpeed config that no training would take."""
    import torch
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from trl import DPOConfig

    from refscale.training.options import dpo_arguments  # which imports this module

    class Arguments(DPOConfig):  # type: ignore[misc]
        # Else accelerate's state of this process would be made anew.
        _setup_devices = torch.device("cpu")
        world_size = train["num_workers"]

    known = {**train, "report_to": []}
    arguments = dpo_arguments(
        known, output_dir=".", device="cpu", bf16=_in_bf16(train), max_length=1
    )
    deepspeed = arguments.pop("deepspeed")  # which DPOConfig would make known to this process
    try:
        args = Arguments(**{**arguments, "tf32": None})  # which the worker's device has or has not
    except (ValueError, TypeError, NotImplementedError) as exc:
        raise ConfigError(f"train.trl cannot be used: {' '.join(str(exc).split())[:300]}") from exc
    if not isinstance(train["deepspeed"], dict):
        return
    # transformers says it when the model is loaded: some values depend on the model.
    filled = HfTrainerDeepSpeedConfig(deepspeed)
    filled.trainer_config_process(args)
    if filled.mismatches:
        differing = [text.removeprefix("- ds ").replace(" hf ", " ") for text in filled.mismatches]
        raise ConfigError(
            f"train.deepspeed contradicts the section train: {', '.join(differing)}; set such"
            " values of train.deepspeed to 'auto'"
        )


def _check_schedule(train: dict[str, Any]) -> None:
    """Refuse a schedule that could not be made, or would have nothing to follow."""
    schedule = train["lr_scheduler_type"]
    if schedule not in SCHEDULERS:
        raise ConfigError(
            f"train.lr_scheduler_type: {schedule!r} is not a schedule of transformers"
            f"{nearest(schedule, SCHEDULERS)}"
        )
    if schedule in MEASURED_SCHEDULES and not train["eval_steps"]:
        raise ConfigError(
            f"train.lr_scheduler_type: {schedule} follows the loss on the holdout; set"
            " train.eval_steps"
        )
    options = train["trl"].get("lr_scheduler_kwargs")
    if not options and schedule not in _NEED_ARGUMENTS:
        return
    import torch
    from transformers import get_scheduler

    try:
        get_scheduler(
            schedule,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train["learning_rate"]),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"train.lr_scheduler_type: {schedule} with train.trl.lr_scheduler_kwargs {options}:"
            f" {exc}"
        ) from exc


def check_report_to(names: Sequence[str], *, installed: bool = True) -> None:
    """Refuse a reporter that transformers does not know or that is not installed here.

    Args:
        names: Of `train.report_to`.
        installed: False looks at the names alone.

    Raises:
        ConfigError: The nearest known name, or what to install.
    """
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to: unknown reporter {name!r}"
                f"{nearest(name, sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if installed and name not in available:
            raise ConfigError(
                f"train.report_to: {name} is not installed where the workers run; install it there,"
                " or leave it out (training/log.jsonl and the report have the same curves)"
            )


def loss_types(train: dict[str, Any]) -> list[str]:
    """The losses that `train.loss_type` names, for DPOConfig."""
    return [name.strip() for name in train["loss_type"].split(",")]
