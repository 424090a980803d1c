"""Sizes of a model's layers, read off its config whatever the architecture. No torch.

In: a transformers text config. Out: the sizes of each layer, for counts and estimates of memory: so
nothing raises, and what is not known is what most models have, or 0. In transformers 5.23 a size
that differs between layers cannot be read off the config itself (Gemma 4: head_dim), is a list
(Gemma 3n: intermediate_size), or is in the configs of the model's parts alone (BLT).
"""

from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_local_experts", "num_experts")
_EXPERTS_USED = ("num_experts_per_tok", "top_k_experts")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer.

    Attributes:
        hidden: Of the residual stream; 0 where unknown.
        intermediate: Of the MLP; where unknown four times the residual stream.
        heads: Of the queries; 0 where there are none.
        kv_heads: Of keys and values.
        head_dim: Of a head; 0 where unknown.
        experts: Of a mixture, from which a token is routed; 0 in a dense model.
        experts_used: Of those, as many as a token takes.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_used: int

    @property
    def attention_width(self) -> int:
        """Elements of queries, keys, values and attention output of a token."""
        return 2 * self.head_dim * (max(self.heads, 1) + max(self.kv_heads, 1))

    @classmethod
    def of(cls, config: Any, index: int = 0) -> "LayerSizes":
        """Of the layer at `index`, whose own config this is."""

        def known(*names: str) -> int:
            return next((n for n in (_number(config, name, index) for name in names) if n), 0)

        hidden, heads = known("hidden_size"), known("num_attention_heads")
        return cls(
            hidden=hidden,
            intermediate=known("intermediate_size") or 4 * hidden,
            heads=heads,
            kv_heads=known("num_key_value_heads") or heads,
            head_dim=known("head_dim") or hidden // max(heads, 1),
            experts=known(*_EXPERTS),
            experts_used=known(*_EXPERTS_USED),
        )


def layer_sizes(config: Any) -> list[LayerSizes]:
    """Of each layer; of a model in parts, the layers of all of them; one where none is counted."""
    return _layers(config) or [LayerSizes.of(config)]


def widest(config: Any) -> tuple[int, int]:
    """The largest hidden and intermediate size of a layer."""
    layers = layer_sizes(config)
    return max(layer.hidden for layer in layers), max(layer.intermediate for layer in layers)


def _layers(config: Any) -> list[LayerSizes]:
    count = _number(config, "num_hidden_layers", 0)
    if not count:
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
        return [layer for part in parts if part is not None for layer in _layers(part)]
    if not getattr(config, "is_heterogeneous", False):
        return [LayerSizes.of(config, i) for i in range(count)]
    return [LayerSizes.of(layer, i) for i, layer in enumerate(config.per_layer_config)]


def _number(config: Any, name: str, index: int) -> int | None:
    """An attribute, or the layer's entry where it is a list; None where it is not to be had."""
    try:
        value = getattr(config, name)
    except (AttributeError, RuntimeError):  # AmbiguousGlobalPerLayerAttributeError is of the latter
        return None
    if isinstance(value, list | tuple):
        value = value[index] if index < len(value) else None
    return value if isinstance(value, int) else None
