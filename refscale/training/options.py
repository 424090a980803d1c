"""What a training worker is told: its settings, and the arguments of TRL's DPOConfig.

In: plain values of the config. Out: plain values again. Wrong options are refused by name, by
`checks` before anything is scored and once more here, before a model is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from refscale.training.checks import (
    MEASURED_SCHEDULES,
    check_options,
    check_report_to,
    loss_types,
)
from refscale.training.presets import Device, deepspeed_config


@dataclass(frozen=True)
class WorkerSettings:
    """All that one worker needs, as plain picklable data; equal on every rank.

    Attributes:
        train: `TrainConfig.model_dump()`.
        model_name_or_path: The reference model, from which the policy starts.
        selection_files: Parquet files in `schema.SELECTION`, readable on every rank, in order.
        holdout_files: The same in `schema.HELD_OUT`, for `eval_steps`.
        output_dir: Folder of checkpoints; the same path on every rank.
        policy_dir: Folder that rank 0 writes the policy to; with LoRA the merged model, and the
            adapter to `adapter/` in it.
        max_length: `encoding.max_length`: the longest prompt + completion in the selection.
        bf16: Compute in bfloat16, resolved; should equal what the scores were computed in.
        scored_in_bf16: The scores were computed in bfloat16, so that they are only so exact.
        revision: Hub revision of the model.
        adapter: LoRA adapter merged into the reference model before training.
        attn_implementation: As `ModelConfig`.
        chat_template: Path of a template that replaces the tokenizer's, saved with the policy.
        trust_remote_code: As `ModelConfig`.
        quantization: Load the base quantised (QLoRA); needs `train.peft`.
        easiest: Which end of the selection key is the clearest, for `order: easy_to_hard`.
        cache_dir: Where the selection is mapped from; default: datasets' own cache.
        tensorboard_dir: Where `report_to: tensorboard` writes; default: in `output_dir`.
        fingerprint: Written to checkpoints and compared on resume; any text.
    """

    train: dict[str, Any]
    model_name_or_path: str
    selection_files: list[str]
    output_dir: str
    policy_dir: str
    max_length: int
    holdout_files: list[str] = field(default_factory=list)
    bf16: bool = False
    scored_in_bf16: bool = False
    revision: str | None = None
    adapter: str | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["8bit", "4bit"] | None = None
    easiest: Literal["largest", "smallest"] = "largest"
    cache_dir: str | None = None
    tensorboard_dir: str | None = None
    fingerprint: str = ""


_DECIDE_NOTHING = (
    "max_failures",
    "logging_steps",
    "save_total_limit",
    "report_to",
    "start_check_pairs",
)


def deciding_options(train: dict[str, Any]) -> dict[str, Any]:
    """The options of `TrainConfig.model_dump()` that the policy may depend on: its fingerprint."""
    left_out = set(_DECIDE_NOTHING)
    if not measuring_decides(train):
        left_out.add("eval_steps")
    if not train["load_best_model_at_end"]:  # whose candidates are the checkpoints
        left_out.add("save_steps")
    return {key: value for key, value in train.items() if key not in left_out}


def measuring_decides(train: dict[str, Any]) -> bool:
    """Whether the policy depends on what training measures on the holdout, and so on when."""
    return train["load_best_model_at_end"] or train["lr_scheduler_type"] in MEASURED_SCHEDULES


def dpo_arguments(
    train: dict[str, Any], *, output_dir: str, device: Device, bf16: bool, max_length: int
) -> dict[str, Any]:
    """Keyword arguments of `trl.DPOConfig` for a `TrainConfig`.

    Args:
        train: `TrainConfig.model_dump()`.
        output_dir: Folder of checkpoints.
        device: Where the model computes.
        bf16: Compute in bfloat16.
        max_length: `encoding.max_length`; stored ids are within it already.

    Raises:
        ConfigError: `train.trl` holds a key that DPOConfig does not have (the nearest is named),
            one that has its own place in the config, or one that stored reference sums rule out;
            `train.loss_type` is not one of TRL's; the schedule is unknown; or a reporter is unknown
            or not installed.
    """
    check_options(train)
    check_report_to(train["report_to"])
    arguments: dict[str, Any] = {
        "output_dir": output_dir,
        "beta": train["beta"],
        "loss_type": loss_types(train),
        "label_smoothing": train["label_smoothing"],
        "learning_rate": train["learning_rate"],
        "lr_scheduler_type": train["lr_scheduler_type"],
        # Transformers 5 reads a warmup below 1 as a share of the steps.
        "warmup_steps": train["warmup_ratio"],
        "weight_decay": train["weight_decay"],
        "max_grad_norm": train["max_grad_norm"],
        "num_train_epochs": train["num_train_epochs"],
        "max_steps": train["max_steps"],
        "per_device_train_batch_size": train["per_device_train_batch_size"],
        "gradient_accumulation_steps": train["gradient_accumulation_steps"],
        "gradient_checkpointing": train["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "deepspeed": deepspeed_config(train["deepspeed"], device=device, bf16=bf16),
        "max_length": max_length,
        "truncation_mode": "keep_start",
        "precompute_ref_log_probs": True,
        "disable_dropout": True,
        "remove_unused_columns": True,
        "seed": train["seed"],
        "logging_steps": train["logging_steps"],
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": train["save_steps"],
        "save_total_limit": train["save_total_limit"],
        "eval_strategy": "steps" if train["eval_steps"] else "no",
        "eval_steps": train["eval_steps"],
        "per_device_eval_batch_size": train["per_device_train_batch_size"],
        "prediction_loss_only": True,
        "report_to": list(train["report_to"]) or "none",
        "disable_tqdm": True,
    }
    arguments.update(train["trl"])
    return arguments
