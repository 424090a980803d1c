"""From `TrainConfig` to the arguments of TRL's DPOConfig, DeepSpeed and LoRA.

In: plain values of the config. Out: what a worker is told, and plain dicts. Wrong options are
refused here, by name: `check_options` before anything is scored, all of them before a model is
loaded. Costs the import of trl, on first use only; no model, no device.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from refscale.errors import ConfigError

if TYPE_CHECKING:
    from refscale.config import Config

Device = Literal["cpu", "cuda"]


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
    holdout_files: list[str] = dataclasses.field(default_factory=list)
    bf16: bool = False
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

_ZERO_PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


_DECIDE_NOTHING = ("max_failures", "logging_steps", "save_total_limit", "report_to")


def deciding_options(train: dict[str, Any]) -> dict[str, Any]:
    """The options of `TrainConfig.model_dump()` that the policy may depend on: its fingerprint."""
    return {key: value for key, value in train.items() if key not in _DECIDE_NOTHING}


def deepspeed_config(
    preset: str | dict[str, Any] | None, *, device: Device, bf16: bool
) -> dict[str, Any] | None:
    """A DeepSpeed config for a preset, or the user's own with what must hold filled in.

    `"auto"` values are filled in from the training arguments by transformers. No optimizer is
    named: torch's fused AdamW of the trainer is used in every stage, on CUDA, on CPU and offloaded,
    because DeepSpeed's own ones are compiled on first use and need a toolchain on every node.

    Args:
        preset: zero1, zero2, zero3, zero2_offload, zero3_offload, a DeepSpeed config, or None.
        device: Where the model computes.
        bf16: Compute in bfloat16.

    Raises:
        ConfigError: The preset is unknown, or the dict asks for float16 or another precision than
            `bf16`.
    """
    if preset is None:
        return None
    base: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": bf16},
        # Torch's AdamW has both a CPU and a CUDA kernel, so it also runs offloaded.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if isinstance(preset, str):
        name, offload = preset.removesuffix("_offload"), preset.endswith("_offload")
        if name not in _ZERO_PRESETS or preset == "zero1_offload":
            known = [*_ZERO_PRESETS, "zero2_offload", "zero3_offload"]
            raise ConfigError(
                f"train.deepspeed: {preset!r} is not a preset{_nearest(preset, known)}"
            )
        zero = dict(_ZERO_PRESETS[name])
        if offload:
            target = {"device": "cpu", "pin_memory": device == "cuda"}
            zero["offload_optimizer"] = dict(target)
            if name == "zero3":
                zero["offload_param"] = dict(target)
        return {**base, "zero_optimization": zero}
    if dict(preset.get("fp16") or {}).get("enabled"):
        raise ConfigError("train.deepspeed.fp16.enabled is true; use train.bf16 or float32")
    asked = dict(preset.get("bf16") or {}).get("enabled", bf16)
    if asked != "auto" and bool(asked) != bf16:
        raise ConfigError(
            f"train.deepspeed.bf16.enabled is {asked} but training computes in"
            f" {'bfloat16' if bf16 else 'float32'}; set train.bf16, or the value to 'auto'"
        )
    config: dict[str, Any] = json.loads(json.dumps({**base, **preset}))
    config["bf16"] = {**dict(preset.get("bf16") or {}), "enabled": bf16}
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage") == 3:  # else the policy could not be saved
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


def check_training(config: "Config") -> None:
    """Refuse before hours of scoring what training would refuse after them.

    Raises:
        ConfigError: Says what to change.
    """
    check_options(config.train.model_dump())
    if config.model.dtype == "float16":
        raise ConfigError(
            "model.dtype is float16, which is for scoring alone: training computes in bfloat16 or"
            " float32, and the stored sums would not be the policy's; set one of those"
        )
    if config.train.eval_steps and not (
        config.corpus.holdout_fraction or any(source.holdout for source in config.corpus.sources)
    ):
        raise ConfigError(NO_HOLDOUT)


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
    if isinstance(train["deepspeed"], str):
        deepspeed_config(train["deepspeed"], device="cpu", bf16=False)
    if train["trl"]:
        _check_trl(train)


def _check_loss(train: dict[str, Any]) -> None:
    """Refuse a loss that TRL does not have, and options that it would not read."""
    names = _loss_types(train)
    for name in names:
        if name not in LOSS_TYPES:
            raise ConfigError(
                f"train.loss_type: {name!r} is not a loss of TRL's DPOTrainer"
                f"{_nearest(name, LOSS_TYPES)}"
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
            raise ConfigError(f"unknown key train.trl.{key}{_nearest(key, sorted(known))}")
    if train["trl"].get("neftune_noise_alpha") and train["packed"] != "off":
        raise ConfigError(
            "train.trl.neftune_noise_alpha scales its noise by the length of a padded row; set"
            " train.packed: off"
        )
    if train["trl"].get("eval_on_start") and not train["eval_steps"]:
        raise ConfigError("train.trl.eval_on_start measures the holdout; set train.eval_steps")


def _check_schedule(train: dict[str, Any]) -> None:
    """Refuse a schedule that could not be made, or would have nothing to follow."""
    schedule = train["lr_scheduler_type"]
    if schedule not in SCHEDULERS:
        raise ConfigError(
            f"train.lr_scheduler_type: {schedule!r} is not a schedule of transformers"
            f"{_nearest(schedule, SCHEDULERS)}"
        )
    if schedule in ("reduce_lr_on_plateau", "greedy") and not train["eval_steps"]:
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
        "loss_type": _loss_types(train),
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
                f"{_nearest(name, sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if installed and name not in available:
            raise ConfigError(
                f"train.report_to: {name} is not installed where the workers run; install it there,"
                " or leave it out (training/log.jsonl and the report have the same curves)"
            )


def peft_config(fields: dict[str, Any] | None) -> Any:
    """A `peft.LoraConfig` for `train.peft`; None where there is none.

    Raises:
        ConfigError: A field that LoraConfig does not have (the nearest is named), a value that it
            refuses, or an adapter on the output head, which TRL's fused head would not train.
    """
    if not fields:
        return None
    from peft import LoraConfig

    known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
    for key in fields:
        if key not in known:
            raise ConfigError(f"unknown key train.peft.{key}{_nearest(key, sorted(known))}")
    targets = fields.get("target_modules") or ()
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ConfigError(
            "train.peft.target_modules holds lm_head: log-probs are computed from its weight"
            " directly, so an adapter on it would not be trained; leave it out"
        )
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except (ValueError, TypeError, ImportError) as exc:
        raise ConfigError(f"train.peft: {' '.join(str(exc).split())}") from exc


def _loss_types(train: dict[str, Any]) -> list[str]:
    return [name.strip() for name in train["loss_type"].split(",")]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""
