"""Operation counts of a forward pass, from the model's weights and config. No tensors are computed.

The formula that TRL's MFU uses too, with the output head apart, because only rows that predict a
completion token go through it. An estimate where a config does not say all: a count stops nothing.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from refscale.scoring.sizes import layer_sizes


@dataclass(frozen=True)
class Flops:
    """Floating point operations, a multiplication and an addition counted apart.

    Attributes:
        per_token: 2 per backbone weight that is no embedding; of a mixture's experts, as many as
            are used.
        per_head_row: 2 V D.
        per_context: 4 x heads x head size of all layers, for each pair of a query and a key it
            sees.
    """

    per_token: float
    per_head_row: float
    per_context: float

    @classmethod
    def of(cls, model: Any) -> "Flops":
        """Of a transformers causal LM; its weights may be on the meta device."""
        config = model.config.get_text_config()
        layers = layer_sizes(config)
        experts = {layer.experts for layer in layers} - {0}
        routed = [layer for layer in layers if layer.experts and layer.experts_used]
        share = 1.0
        if routed:
            share = sum(x.experts_used for x in routed) / sum(x.experts for x in routed)
        # Tables are looked up, not multiplied: Gemma 3n and 4 have one for each layer.
        tables = [m for m in model.modules() if hasattr(m, "num_embeddings")]
        apart = {model.get_input_embeddings(), model.get_output_embeddings(), *tables} - {None}
        uncounted = {id(p) for module in apart for p in module.parameters()}
        weights = sum(
            num_weights(p) * (share if _is_experts(name, p, experts) else 1.0)
            for name, p in model.named_parameters()
            if id(p) not in uncounted and len(_shape(p)) > 1
        )
        return cls(
            per_token=2.0 * weights,
            per_head_row=2.0 * config.vocab_size * max(layer.hidden for layer in layers),
            per_context=4.0 * sum(layer.heads * layer.head_dim for layer in layers),
        )

    def total(self, tokens: int, head_rows: int, context: float) -> float:
        """Of `tokens` rows, of which `head_rows` meet the head, with `context` pairs seen."""
        return self.per_token * tokens + self.per_head_row * head_rows + self.per_context * context


def num_weights(parameter: Any) -> int:
    """Weights of a parameter, also where ZeRO-3 keeps a part here, or a byte holds two (4bit)."""
    return math.prod(_shape(parameter))


def _shape(parameter: Any) -> tuple[int, ...]:
    """What bitsandbytes' 4-bit and ZeRO-3's parameters were before they were cut."""
    packed = getattr(parameter, "quant_state", None)
    whole = getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape
    return tuple(whole)


def _is_experts(name: str, parameter: Any, experts: Collection[int]) -> bool:
    """Whether these weights are of experts of which a token takes some; shared ones are not."""
    shape = _shape(parameter)
    return ".experts." in name or (len(shape) == 3 and shape[0] in experts)
