"""Models for the scoring benchmark: a folder, or random weights of a known model's shape."""

import contextlib
import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError

from refscale.scoring.cpu_products import use_onednn

_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-shape": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b-shape": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b-shape": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny-shape": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
NAMES = tuple(_SHAPES)
# Dense bf16 of the data sheet, FLOP/s, as TRL has it too.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def build(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A causal LM in eval mode, on the device.

    Raises:
        BenchmarkError: It is neither a folder nor a known shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in _SHAPES:
        shape = {"max_position_embeddings": 4096, **_SHAPES[name]}
        config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=0, pad_token_id=0)
        torch.manual_seed(seed)
        with device:
            # In float32 and then rounded, so that all dtypes have one model's weights.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    elif Path(name).is_dir():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    else:
        raise BenchmarkError(f"{name!r} is neither a model folder nor one of {', '.join(NAMES)}")
    return model.eval()


def tokenizer_of(name: str) -> Any:
    """The folder's tokenizer; None for a shape."""
    if name in _SHAPES:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def stand_in_tokenizer(model: Any) -> Any:
    """A tokenizer of as many entries as the model has, for peers that insist on one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(model.config.get_text_config().vocab_size)}
    core = Tokenizer(WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w0", eos_token="w0", pad_token="w0", unk_token="w1"
    )


@contextlib.contextmanager
def as_folder(model: Any, tokenizer: Any) -> Iterator[str]:
    """The model saved to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def products_of(model: Any, dtype: torch.dtype, device: torch.device) -> "Gemm":
    """The products of one of the model's layers, as they come in a pack of its usual size."""
    config = model.config.get_text_config()
    rows = 16384 if device.type == "cuda" else 2048
    return Gemm(rows, config.hidden_size, config.intermediate_size, dtype, device)


class Gemm:
    """The ceiling: the layer's largest products alone, in the same dtype, again and again."""

    def __init__(
        self, rows: int, size: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = torch.nn.Sequential(
            torch.nn.Linear(size, width, bias=False), torch.nn.Linear(width, size, bias=False)
        ).to(device, dtype)
        if device.type == "cpu":
            use_onednn(self._layers)  # the faster of torch's two libraries
        self._x = torch.randn(rows, size, device=device).to(dtype)
        each = 2 * 2 * rows * size * width
        # About half a second at 150 GFLOP/s on a CPU, at 700 TFLOP/s on a GPU.
        target = 350e12 if device.type == "cuda" else 75e9
        self._times = max(1, round(target / each))
        self.flops = each * self._times

    @torch.inference_mode()
    def __call__(self) -> None:
        """Do `flops` operations."""
        for _ in range(self._times):
            self._layers(self._x)
        wait(self._x.device)


def wait(device: torch.device) -> None:
    """Until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Of the GPU's data sheet, dense bf16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


class CountedTokens:
    """Tokens that the backbones of models take in during blocks, padding included.

    Attributes:
        count: Of all blocks so far; 0 for scorers that compute elsewhere.
    """

    def __init__(self, *models: Any) -> None:
        self._backbones = {model.base_model for model in models}
        self._hooks: list[Any] = []
        self.count = 0

    def __enter__(self) -> "CountedTokens":
        self._hooks = [
            backbone.register_forward_pre_hook(self._add, with_kwargs=True)
            for backbone in self._backbones
        ]
        return self

    def __exit__(self, *_exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, _module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else given[0]
        self.count += ids.numel()


class PeakMemory:
    """Bytes that a block needs beyond what was there before, at most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be reused unseen
        self._before = _status("VmRSS")
        # 5 resets the peak; needs Linux.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.bytes = _status("VmHWM") - self._before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {name}; memory is measured on Linux")
