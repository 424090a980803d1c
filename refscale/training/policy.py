"""The policy: loaded at the reference, saved when trained, with a card that says what it is.

In: the settings of a worker and, at the end, its trainer. Out: a folder that
`AutoModelForCausalLM` loads. Costs on saving: one copy of the weights on rank 0's CPU; with LoRA
the base once more.

Precision. Where the compute dtype is bfloat16 and DeepSpeed or LoRA is used, weights are loaded in
bfloat16: DeepSpeed's optimizer keeps its own float32 masters, and without it LoRA's adapters are
float32, but for those of a quantised base, which TRL makes bfloat16. Otherwise weights are float32
(an AdamW step of 1e-6 vanishes in bfloat16's 8 bits) and bfloat16 is autocast.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from refscale.errors import ConfigError, ModelError
from refscale.scoring.loading import merge_adapter
from refscale.training.checks import TIED_EMBEDDING, check_quantization
from refscale.training.options import WorkerSettings
from refscale.training.presets import Device


def load_policy(settings: WorkerSettings, device: Device) -> tuple[Any, Any]:
    """The model to train, without dropout but for `torch.nn.Dropout`, and its tokenizer.

    Raises:
        ConfigError: A quantised base without LoRA, or under ZeRO-3.
        ModelError: They cannot be loaded, or the model's dropout cannot be disabled.
    """
    train = settings.train
    check_quantization(settings.quantization, train)
    half = settings.bf16 and bool(train["deepspeed"] or train["peft"])
    hub = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    kwargs: dict[str, Any] = {
        **hub,
        "dtype": torch.bfloat16 if half else torch.float32,
        "use_safetensors": True,
    }
    if settings.attn_implementation:
        kwargs["attn_implementation"] = settings.attn_implementation
    if settings.quantization:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=settings.quantization == "4bit",
            load_in_8bit=settings.quantization == "8bit",
            bnb_4bit_compute_dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        )
        kwargs["device_map"] = {"": torch.cuda.current_device()} if device == "cuda" else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path, **hub)
        with _whole_weights(when=settings.adapter is not None):
            model = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, **kwargs)
            if settings.adapter is not None:
                model = merge_adapter(model, settings.adapter)
    except (OSError, ValueError, ImportError, KeyError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load {settings.model_name_or_path} for training: {first}"
        ) from exc
    disable_dropout(model)
    if settings.chat_template:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return model, tokenizer


# Source of a forward that reads a rate from the config, as Falcon's and Persimmon's do.
_RATE_IN_CONFIG = re.compile(r"\bconfig\.(\w*drop\w*)")


def disable_dropout(model: Any) -> None:
    """Set the rates to 0 that layers keep as plain floats: attention's, residuals', whole layers'.

    TRL's `disable_dropout` does so with `torch.nn.Dropout`, and leaves these. The config, with
    which the policy is saved, stays as it is.

    Args:
        model: The policy, not wrapped yet.

    Raises:
        ModelError: A layer reads a rate above 0 from the config in every forward.
    """
    read = {kind: _rates_read(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
        for name in read[type(module)]:
            rate = getattr(getattr(module, "config", None), name, None)
            if isinstance(rate, float) and rate > 0:
                raise ModelError(
                    f"{type(module).__name__} would train with {name} {rate:g}, which it reads from"
                    " the model's config.json in every forward: the stored sums are without"
                    " dropout, so no step would match them; set it to 0 there"
                )


def _rates_read(kind: type) -> set[str]:
    """Names of dropout rates that a layer's methods read from the config, but to make the layer."""
    names: set[str] = set()
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name == "__init__" or method.__module__ != kind.__module__:
            continue
        with contextlib.suppress(OSError, TypeError):  # made without a source file
            names.update(_RATE_IN_CONFIG.findall(inspect.getsource(method)))
    return names


def check_adapter(model: Any) -> None:
    """Refuse an adapter that would be merged into another policy than the trained one, or not.

    Args:
        model: The policy with its adapter, a PeftModel.

    Raises:
        ConfigError: It is on an embedding that the output head shares, or has biases for layers
            without any.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import TrainableTokensWrapper

    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    first, last = ({id(p) for p in end.parameters()} for end in ends)
    # What modules_to_save names is a copy of its own, which leaves the other end as it was.
    if first & last and any(isinstance(end, (LoraLayer, TrainableTokensWrapper)) for end in ends):
        raise ConfigError(TIED_EMBEDDING)
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer) or not any(layer.lora_bias.values()):
            continue
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise ConfigError(
                f"train.peft.lora_bias gives {name} a bias, which its layer has no place for when"
                " the adapter is merged; leave it out"
            )


@contextlib.contextmanager
def _whole_weights(*, when: bool) -> Iterator[None]:
    """Load unpartitioned under ZeRO-3: an adapter can be merged into whole weights only.

    DeepSpeed partitions them when the engine starts; until then each rank holds the whole model.
    """
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    if when:
        hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def gathers_weights(accelerator: Any) -> bool:
    """Whether `get_state_dict` needs all ranks; else each copies the weights for itself.

    The condition is accelerate 1.15's.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    config = accelerator.deepspeed_config
    return config["zero_optimization"]["stage"] == 3 or "tensor_parallel" in config


def keep_generation_config(model: Any) -> None:
    """Let the model be saved with the generation config that it came with, as any untouched one.

    The trainer puts the tokenizer's special tokens into it. Transformers 5.23 then refuses to save
    what published ones hold and it only warns of else, such as a temperature without do_sample.
    """
    if (config := getattr(model, "generation_config", None)) is not None:
        config._original_object_hash = hash(config)


def save_policy(trainer: DPOTrainer, tokenizer: Any, settings: WorkerSettings, card: str) -> None:
    """Write the policy as safetensors, with its tokenizer and card; collective, rank 0 writes.

    With LoRA, rank 0 loads the base once more on the CPU, unquantised, and merges the adapter into
    it; the adapter itself goes to `adapter/`.
    """
    accelerator = trainer.accelerator
    state: Any = None
    if accelerator.is_main_process or gathers_weights(accelerator):
        state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model_wrapped)
        # DeepSpeed's copy of a tied head no longer shares memory and would be saved a second time.
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in every - {name for name, _ in model.named_parameters()}:
            state.pop(name, None)
        folder = Path(settings.policy_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.train["peft"]:
            from peft import PeftModel

            adapter = folder / "adapter"
            model.save_pretrained(adapter, state_dict=state)
            with _whole_weights(when=True):
                base, _ = load_policy(dataclasses.replace(settings, quantization=None), "cpu")
                merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
            merged.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    del state
    accelerator.wait_for_everyone()


def _batch(train: dict[str, Any]) -> str:
    micro_batches = train["gradient_accumulation_steps"] * train["num_workers"]
    if budget := train["token_budget"]:
        return f"{micro_batches} x at most {budget} tokens a step"
    return f"{train['per_device_train_batch_size'] * micro_batches} pairs a step"


def model_card(settings: WorkerSettings, metrics: dict[str, Any]) -> str:
    """The policy's README.md: what it was made from, with what, and the numbers of its training."""
    train = settings.train
    base = settings.model_name_or_path
    hub_id = "" if os.path.isdir(base) else f"base_model: {base}\n"
    shown = {
        "pairs": metrics["num_pairs"],
        "optimizer steps": metrics["steps"],
        "weights of step": metrics["policy_step"],
        "loss": f"{train['loss_type']}, beta {train['beta']:g}",
        "learning rate": f"{train['learning_rate']:g}, {train['lr_scheduler_type']}",
        "batch": _batch(train),
        "order": train["order"],
        "LoRA": json.dumps(train["peft"]) if train["peft"] else "no",
        "compute": "bfloat16" if settings.bf16 else "float32",
        "seed": train["seed"],
        "training fingerprint": settings.fingerprint or "none",
    }
    names = ("train_loss", "rewards/accuracies", "rewards/margins", "start_check_loss")
    shown.update({name: f"{metrics[name]:.4f}" for name in names if name in metrics})
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, trl))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{hub_id}"
        "tags: [dpo, preference, refscale]\n---\n\n"
        f"# DPO policy from {Path(base).name if not hub_id else base}\n\n"
        "Trained on a selection of preference pairs, with the reference log-probabilities that made"
        " the selection. `rewards/…` are of the last logged step.\n\n"
        f"| | |\n|---|---|\n{rows}\n\nMade with {versions}.\n"
    )
