"""Operation counts of a forward pass, from the model's weights and config. No tensors are computed.

The formula that TRL's MFU uses too, with the output head apart, because only rows that predict a
completion token go through it.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flops:
    """Floating point operations, a multiplication and an addition counted apart.

    Attributes:
        per_token: 2 per backbone weight; of a mixture's experts, as many as are used.
        per_head_row: 2 V D.
        per_context: 4 x layers x heads x head size, for each pair of a query and a key it sees.
    """

    per_token: float
    per_head_row: float
    per_context: float

    @classmethod
    def of(cls, model: Any) -> "Flops":
        """Of a transformers causal LM; its weights may be on the meta device."""
        config = model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        used = getattr(config, "num_experts_per_tok", None)
        share = used / experts if experts and used else 1.0
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
        head = model.get_output_embeddings()
        embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
        weights = sum(
            num_weights(p) * (share if _is_experts(name, p, experts) else 1.0)
            for name, p in model.named_parameters()
            if id(p) not in embeddings and len(_shape(p)) > 1
        )
        heads = getattr(config, "num_attention_heads", None) or 0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        return cls(
            per_token=2.0 * weights,
            per_head_row=2.0 * config.vocab_size * config.hidden_size,
            per_context=4.0 * config.num_hidden_layers * heads * head_dim,
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


def _is_experts(name: str, parameter: Any, experts: int | None) -> bool:
    """Whether these weights are of experts of which a token takes some; shared ones are not."""
    shape = _shape(parameter)
    return ".experts." in name or (len(shape) == 3 and shape[0] == experts)
