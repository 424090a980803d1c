"""Loading a causal LM to score with: dtype, quantization, adapter, devices. No inference here."""

import os
import warnings
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from refscale.config_file import explain_model_name
from refscale.errors import ModelError
from refscale.scoring.cpu_products import use_onednn
from refscale.scoring.devices import choose_dtype, keep_freed_memory
from refscale.storage.fingerprints import split_revision

_LOADING_FAILS = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    AssertionError,  # torch without CUDA
    SafetensorError,
)


def load_model(
    model_name_or_path: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    attn_implementation: str | None,
    adapter: str | None,
    quantization: str | None,
) -> tuple[Any, str]:
    """The model, and why it has its dtype; arguments as `ReferenceModel.load`.

    Raises:
        ModelError: It cannot be loaded; one line says why.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    chosen, reason = choose_dtype(dtype, device)
    options: dict[str, Any] = {
        "revision": revision,
        "dtype": chosen,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    split = device == "cuda" and torch.cuda.device_count() > 1
    if quantization:
        options["quantization_config"] = _quantization(quantization, chosen)
    if split or (quantization and device != "cpu"):
        options["device_map"] = "auto" if split else {"": device}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, output_loading_info=True, **options
        )
        require_whole(model, found["missing_keys"])
        if adapter:
            model = merge_adapter(model, adapter)
        if "device_map" not in options:
            model = model.to(device)
        if device == "cpu":
            use_onednn(model)
    except _LOADING_FAILS as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        if isinstance(exc, LookupError | AttributeError | TypeError):  # do not speak for themselves
            lines.insert(0, f"{type(exc).__name__}:")
        what = f"{model_name_or_path} with adapter {adapter}" if adapter else model_name_or_path
        error = f"cannot load the model {what}: {' '.join(lines)[:300]}"
        raise ModelError(explain_model_name(model_name_or_path, error)) from exc
    return model, reason


def require_whole(model: Any, missing: set[str]) -> None:
    """Refuse what transformers fills up with random weights, and what it leaves off the GPUs."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"its weights lack {len(missing)} of {type(model).__name__}, such as {names}; it is the"
            " checkpoint of another kind of model (a reward model has no head), or damaged"
        )
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ValueError(
            f"it does not fit on {torch.cuda.device_count()} GPUs; raise ray.gpus_per_replica"
        )


def merge_adapter(model: Any, adapter: str) -> Any:
    """The model with an adapter's weights added to its own.

    Args:
        model: A causal LM; it is changed.
        adapter: Folder or hub id (`id@revision`) of a LoRA adapter in safetensors.

    Raises:
        OSError: It has no safetensors, or cannot be read.
        ValueError: It belongs to another model, lacks weights, or is of a kind without any to add.
    """
    from huggingface_hub import hf_hub_download
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    # Without them peft would unpickle adapter_model.bin.
    name, revision = split_revision(adapter)
    if not os.path.isdir(adapter):
        hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, revision=revision)
    elif not os.path.isfile(os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME)):
        raise OSError(f"the adapter {adapter} has no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        with warnings.catch_warnings():
            # peft only warns, and takes layers without weights as untrained ones.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            adapted = PeftModel.from_pretrained(model, name, revision=revision)
    except (UserWarning, RuntimeError, LookupError, AttributeError, TypeError) as exc:
        raise ValueError(f"the adapter {adapter} does not fit: {exc}") from exc
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ValueError(f"an adapter of type {kind} cannot be merged into the weights")
    return adapted.merge_and_unload()


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_compute_dtype=dtype
    )
