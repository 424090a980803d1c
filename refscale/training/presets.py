"""Configs of DeepSpeed and LoRA, from what the section train says of them.

In: plain values of the config. Out: what transformers and peft take. Costs the import of peft where
an adapter is trained; no model, no device.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from refscale.errors import ConfigError

Device = Literal["cpu", "cuda"]

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
# Of a DeepSpeed config; those within others after them.
_SECTIONS = (
    "fp16",
    "bf16",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
)


def deepspeed_config(
    preset: str | dict[str, Any] | None, *, device: Device, bf16: bool
) -> dict[str, Any] | None:
    """A DeepSpeed config for a preset, or the user's own with what must hold filled in.

    `"auto"` values are filled in from the training arguments by transformers. No optimizer is
    named: torch's fused AdamW of the trainer is used in every stage, on CUDA, on CPU and offloaded,
    because DeepSpeed's own ones are compiled on first use and need a toolchain on every node.

    Args:
        preset: zero1, zero2, zero3, zero2_offload, zero3_offload, a DeepSpeed config that
            `check_sections` takes, or None.
        device: Where the model computes.
        bf16: Compute in bfloat16.

    Raises:
        ConfigError: The preset is unknown, or the dict asks for float16, for another precision than
            `bf16`, or to leave partitioned weights ungathered.
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
                f"train.deepspeed: {preset!r} is not a preset{nearest(preset, known)}"
            )
        zero = dict(_ZERO_PRESETS[name])
        if offload:
            target = {"device": "cpu", "pin_memory": device == "cuda"}
            zero["offload_optimizer"] = dict(target)
            if name == "zero3":
                zero["offload_param"] = dict(target)
        return {**base, "zero_optimization": zero}
    fp16 = dict(preset.get("fp16") or {})
    if fp16.get("enabled") not in (None, False, "auto"):
        raise ConfigError("train.deepspeed.fp16.enabled is true; use train.bf16 or float32")
    asked = dict(preset.get("bf16") or {}).get("enabled", bf16)
    if asked != "auto" and bool(asked) != bf16:
        raise ConfigError(
            f"train.deepspeed.bf16.enabled is {asked} but training computes in"
            f" {'bfloat16' if bf16 else 'float32'}; set train.bf16, or the value to 'auto'"
        )
    config: dict[str, Any] = json.loads(json.dumps({**base, **preset}))
    config["bf16"] = {**dict(preset.get("bf16") or {}), "enabled": bf16}
    if fp16:
        config["fp16"]["enabled"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero_stage(preset) == 3:
        gather = "stage3_gather_16bit_weights_on_model_save"
        if not zero.get(gather, True):
            raise ConfigError(
                f"train.deepspeed.zero_optimization.{gather} is {zero[gather]}: the policy could"
                " not be saved after its training; set it to true"
            )
        zero[gather] = True
    return config


def check_sections(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed config whose sections are none.

    Raises:
        ConfigError: A section that is read before DeepSpeed reads it is not a mapping, or there is
            no such ZeRO stage.
    """
    for path in _SECTIONS:
        found: Any = config
        for name in path.split("."):
            found = (found or {}).get(name)
        if found is not None and not isinstance(found, dict):
            raise ConfigError(
                f"train.deepspeed.{path} is {found!r}, which must be a mapping of its fields"
            )
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"train.deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}"
        )


def zero_stage(preset: str | dict[str, Any] | None) -> int:
    """The ZeRO stage of a known preset or a DeepSpeed config; 0 where nothing is partitioned."""
    if isinstance(preset, str):
        return int(_ZERO_PRESETS[preset.removesuffix("_offload")]["stage"])
    return int(((preset or {}).get("zero_optimization") or {}).get("stage", 0))


def steps_on_cpus(preset: str | dict[str, Any] | None) -> bool:
    """Whether a known preset or a DeepSpeed config has CPUs do the optimizer's step."""
    if isinstance(preset, str):
        return preset.endswith("_offload")
    zero = (preset or {}).get("zero_optimization") or {}
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def peft_config(fields: dict[str, Any] | None) -> Any:
    """A `peft.LoraConfig` for `train.peft`; None where there is none.

    Raises:
        ConfigError: A field that LoraConfig does not have (the nearest is named), a value that it
            refuses, an adapter on the output head, which TRL's fused head would not train, or what
            would train another model than the one that is saved.
    """
    if not fields:
        return None
    from peft import LoraConfig

    known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
    for key in fields:
        if key not in known:
            raise ConfigError(f"unknown key train.peft.{key}{nearest(key, sorted(known))}")
    if fields.get("lora_dropout"):
        raise ConfigError(
            f"train.peft.lora_dropout is {fields['lora_dropout']}: the stored sums are without"
            " dropout, so step 0 would not match them; leave it out"
        )
    init = fields.get("init_lora_weights")
    if str(init).startswith("pissa_niter_"):
        # peft 0.21 subtracts a randomised SVD from the base, and another one when it loads it.
        raise ConfigError(
            f"train.peft.init_lora_weights is {init}, whose random start is drawn anew when the"
            " adapter is merged, so the policy would not be the trained one; use pissa"
        )
    if fields.get("ensure_weight_tying"):
        raise ConfigError(
            "train.peft.ensure_weight_tying ties the output head to what is trained of the input"
            " embedding: such a head is either not trained or not saved; leave it out"
        )
    for name in ("target_modules", "exclude_modules"):
        if not isinstance(pattern := fields.get(name), str):
            continue
        try:
            re.compile(pattern)
        except re.error as exc:
            raise ConfigError(
                f"train.peft.{name}: {pattern!r} is not a regular expression: {exc}; any text is .*"
                " in one, and a list takes plain names"
            ) from exc
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


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: what it may have meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""
