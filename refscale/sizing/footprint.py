"""Memory that a scoring replica and a training worker take, from a model's config alone.

In: the config, the model's config.json (the model is built on torch's meta device, without
weights) and a GPU. Out: GiB of each GPU by purpose. Activations are estimates: what the layers keep
at the token budget or for the longest batch; the rest is counted.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refscale.config import Config
from refscale.config_file import explain_model_name
from refscale.errors import ConfigError, ModelError

GIB = 2**30
STAGES = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# DeepSpeed's defaults, in elements, which the presets leave: of stages 1 and 2 reduce_bucket_size,
# of stage 3 stage3_max_live_parameters and sub_group_size.
_BUCKET, _LIVE_PARAMETERS, _SUB_GROUP = 5e8, 1e9, 1e9
# As logps.py tiles the logits, devices.py sizes a forward pass, and TRL's head tiles in training.
_TILE_ROWS, _TILE_VOCAB = 4096, 65536
_BUDGETS = (2048, 65536)
_HEAD_ROWS, _HEAD_VOCAB = 4096, 32768
# Of training: whatever it computes a second, padding and recomputation included, over the peak.
COMPUTED_MFU = 0.35


@dataclass(frozen=True)
class Gpu:
    """A GPU model: usable memory as the driver reports it, peak rates of dense products."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


# Peaks: NVIDIA's data sheets, without sparsity, fp32 without TF32; bf16 as in trl.trainer.utils.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 79.1, 989.0, 67.0),
        Gpu("H200", 139.8, 989.0, 67.0),
        Gpu("A100-80", 79.2, 312.0, 19.5),
        Gpu("L40S", 44.5, 362.0, 91.6),
        Gpu("L4", 22.5, 121.0, 30.3),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What is assumed; pass others where they are known from a measured run.

    Attributes:
        scoring_mfu: Useful operations of scoring a second, over the GPU's peak.
        training_mfu: The same of training, as a run's model_flops_per_s counts them: forward and
            backward, each prompt once. So padding and recomputation lower it. None: 0.35 of what
            the GPU computes, less the config's share of padding and recomputation.
        context_gib: CUDA context, libraries and fragmentation, each process.
        price_per_gpu_hour: None for no costs.
    """

    scoring_mfu: float = 0.45
    training_mfu: float | None = None
    context_gib: float = 2.0
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its cost.

    Attributes:
        parameters: All of them, tied ones once.
        trainable: Those that training updates.
        quantizable: Those that score.quantization keeps in 8 or 4 bits.
        flops_per_token: Of the backbone, forward.
        flops_per_head_row: Of the output head, forward.
        flops_per_context: Per attended key, forward.
        hidden_size: D.
        intermediate_size: Of the widest layer's MLP.
        num_layers: L.
        attention_width: Elements of queries, keys, values and attention output of a token, in the
            widest layer.
        vocab_size: V.
    """

    parameters: int
    trainable: int
    quantizable: int
    flops_per_token: float
    flops_per_head_row: float
    flops_per_context: float
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_width: int
    vocab_size: int

    def flops(self, tokens: float, head_rows: float, context: float) -> float:
        """Operations of one forward pass, multiply and add apart."""
        return (
            self.flops_per_token * tokens
            + self.flops_per_head_row * head_rows
            + self.flops_per_context * context
        )


def model_shape(config: Config) -> ModelShape:
    """The shape of the config's model, from its config.json alone.

    Raises:
        ModelError: The model's config cannot be read or is of no causal LM.
        ConfigError: train.peft is none that the model takes.
    """
    import torch

    if not torch.cuda.is_available():
        # transformers imports DeepSpeed, which warns where it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoConfig, AutoModelForCausalLM

    from refscale.scoring.flops import Flops
    from refscale.scoring.sizes import layer_sizes, widest
    from refscale.training.presets import peft_config

    name = config.model.model_name_or_path
    trust = {"trust_remote_code": config.model.trust_remote_code}
    try:
        loaded = AutoConfig.from_pretrained(name, revision=config.model.revision, **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded, **trust)
    except (OSError, ValueError, KeyError) as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        error = f"cannot read the config of {name}: {' '.join(lines)[:300]}"
        raise ModelError(explain_model_name(name, error)) from exc
    flops = Flops.of(model)
    parameters = sum(p.numel() for p in model.parameters())
    trainable, quantizable = parameters, _quantizable(model)
    adapter = peft_config(config.train.peft)
    if adapter is not None:
        from peft import get_peft_model

        # There are no weights to start it from, and how it starts does not change its size.
        adapter.init_lora_weights = True
        try:
            adapted = get_peft_model(model, adapter)
        except (
            ValueError,
            TypeError,
            LookupError,
            ImportError,
            NotImplementedError,
            re.error,
        ) as exc:
            raise ConfigError(
                f"train.peft does not go with {name}: {' '.join(str(exc).split())[:300]}"
            ) from exc
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    text = loaded.get_text_config()
    layers = layer_sizes(text)
    hidden, intermediate = widest(text)
    return ModelShape(
        parameters=parameters,
        trainable=trainable,
        quantizable=quantizable,
        flops_per_token=flops.per_token,
        flops_per_head_row=flops.per_head_row,
        flops_per_context=flops.per_context,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=len(layers),
        attention_width=max(s.attention_width for s in layers),
        vocab_size=text.vocab_size,
    )


def _quantizable(model: Any) -> int:
    """Weights that transformers hands to bitsandbytes: not the head, embeddings, fused experts."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and should_convert_module(name, kept)
    )


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU, and what they are for."""

    parts: Mapping[str, float]
    capacity: float

    @property
    def total(self) -> float:
        """GiB in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has them."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Replica:
    """A replica of a model that scores.

    Attributes:
        gpus: That hold it.
        share: Of GPUs that Ray gives it: less than 1 where several replicas share one.
        token_budget: Tokens of a forward pass.
        memory: Of each GPU, or of its share.
    """

    gpus: int
    share: float
    token_budget: int
    memory: Memory


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Number and GPU of `8xH100`, or of `H100` alone.

    Raises:
        ConfigError: The GPU is not in the table, or the number is not a positive one.
    """
    count, times, name = text.rpartition("x")
    if not times:
        count, name = "1", text
    gpu = {known.upper(): value for known, value in GPUS.items()}.get(name.strip().upper())
    if gpu is None or not count.strip().isdigit() or int(count) < 1:
        raise ConfigError(
            f"--gpus must be NUMBERxGPU with one of {', '.join(GPUS)}, got {text!r}; e.g. 8xH100"
        )
    return int(count), gpu


def _weight_bytes(shape: ModelShape, itemsize: int, quantization: str | None) -> float:
    """Of all weights, those that are not quantised in `itemsize` bytes."""
    # bitsandbytes keeps a scale for every 64 weights of 4 bits.
    quantized = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}.get(quantization or "", itemsize)
    return shape.quantizable * quantized + (shape.parameters - shape.quantizable) * itemsize


def size_replica(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    count: int,
    assumed: Assumptions,
    *,
    half: bool,
    quantization: str | None,
    asked: float | None,
) -> Replica:
    """A replica on the GPUs asked for, else on the fewest that it fits on; it may fit on none."""
    itemsize = 2 if half else 4
    weights = _weight_bytes(shape, itemsize, quantization) / GIB
    # Logits and their log-softmax in fp32, beside the products where those are not.
    tile = _TILE_ROWS * min(shape.vocab_size, _TILE_VOCAB) * (8 + (itemsize if half else 0)) / GIB
    width = (12 * shape.hidden_size + 3 * shape.intermediate_size) * itemsize / GIB

    def on(share: float) -> Replica:
        gpus, capacity = math.ceil(share), gpu.memory_gib * min(share, 1)
        free = capacity - weights / gpus - assumed.context_gib
        budget = config.score.token_budget or max(
            _BUDGETS[0], min(_BUDGETS[1], int(0.5 * free / width))
        )
        parts = {
            "weights": weights / gpus,
            "activations": budget * width,
            "logits": tile,
            "context": assumed.context_gib,
        }
        return Replica(gpus, share, budget, Memory(parts, capacity))

    if asked is not None:
        return on(asked)
    replicas = map(on, range(1, count + 1))
    return next((replica for replica in replicas if replica.memory.fits), on(count))


def worker_memory(
    config: Config,
    shape: ModelShape,
    longest: int,
    gpu: Gpu,
    workers: int,
    stage: str,
    itemsize: int,
    assumed: Assumptions,
) -> Memory:
    """Memory of each training worker's GPU at a ZeRO stage: the peak, for the longest batch.

    It is in backward, unless the optimizer's step, which copies its gradients to fp32, needs more
    than backward has released: `step` is what it needs beyond that.
    """
    mixed = itemsize == 2 and (stage != "ddp" or config.train.peft is not None)
    weight = 2 if mixed else 4
    zero = int(stage[4]) if stage != "ddp" else 0
    offload = stage.endswith("_offload")
    # Two moments and masters in fp32; fp32 weights are their own, but stages 1 and 2 copy them.
    optimizer = 12 if mixed or zero in (1, 2) else 8
    # Quantised weights are trained under an adapter alone; without one training is refused.
    quantization = config.score.quantization if config.train.peft else None
    weights = _weight_bytes(shape, weight, quantization) / (workers if zero == 3 else 1)
    grads = shape.trainable * weight / (workers if zero >= 2 else 1)
    states = shape.trainable * optimizer / (workers if zero >= 1 else 1)
    owned = shape.trainable / workers
    upcast = 4 * (min(owned, _SUB_GROUP) if zero == 3 else owned) if mixed and zero else 0
    buckets = _bucket_elements(shape, workers, zero, offload) * weight
    if offload:
        states = grads = upcast = 0
        weights = 0 if zero == 3 else weights
    live = min(_LIVE_PARAMETERS, shape.parameters) * weight if zero == 3 else 0
    # One layer's residuals, norms in fp32, projections, gate, up, activation and product.
    layer = 8 * shape.hidden_size + shape.attention_width + 4 * shape.intermediate_size
    per_token = shape.num_layers * layer
    if config.train.gradient_checkpointing:
        per_token = shape.num_layers * shape.hidden_size + layer
    pair = 2 * config.encoding.max_length if config.train.packed == "off" else longest
    # A pair longer than the budget is a micro-batch of its own.
    budget = config.train.token_budget
    tokens = max(budget, pair) if budget else config.train.per_device_train_batch_size * pair
    # A tile of logits, and the head's gradient in fp32 and as it is handed on; LoRA has none.
    head = _HEAD_ROWS * min(shape.vocab_size, _HEAD_VOCAB) * itemsize
    if shape.trainable == shape.parameters:
        head += shape.vocab_size * shape.hidden_size * (4 + weight)
    backward = {
        "buckets": buckets,
        "gathered": live,
        "activations": tokens * per_token * itemsize,
        "logits": head,
    }
    parts = {"weights": weights, "gradients": grads, "optimizer": states, **backward}
    parts["step"] = max(0.0, upcast - sum(backward.values()))
    return Memory(
        {name: size / GIB for name, size in parts.items()} | {"context": assumed.context_gib},
        gpu.memory_gib,
    )


def _bucket_elements(shape: ModelShape, workers: int, zero: int, offload: bool) -> float:
    """Elements of the buffers that gradients are reduced in."""
    if zero == 0:
        # DDP's buckets hold all gradients once more.
        return shape.trainable if workers > 1 else 0
    if zero == 3:
        # "auto": transformers puts in the square of the hidden size.
        return shape.hidden_size**2
    # Two for stage 2, whose preset overlaps; on its way to the CPU a gradient has one of its own.
    largest = shape.vocab_size * shape.hidden_size if offload else 0
    return zero * _BUCKET + largest
