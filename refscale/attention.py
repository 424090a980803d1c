"""Attention over a pack: each segment's queries against its prefix and itself. Pure torch.

Registered with transformers' AttentionInterface as PACKED; models then call it in every layer in
place of their own kernel, and build no mask for it. Exact for causal models: the rows of a pack see
just the keys that they would see in their own sequences.

- CUDA, half precision: one varlen call a layer over gathered keys, causal from the lower right.
- Elsewhere: SDPA calls of at most 64 queries. What does not start its sequence needs a lower-right
  causal bias of its shape; each is made once a pack and shared by all layers. On two Zen 4 cores
  such a call costs 0.23 ms at 40 queries and 157 keys, against 0.33 ms for two mask-free calls
  merged by log-sum-exp and 0.80 ms for recomputing the prefix.
- Soft-capped scores (Gemma 2) are computed in the same blocks without a fused kernel.

The layout of the pack in work is module state, set by `layout`: it has to reach every layer of
models that do not hand unknown arguments down, and the recomputation of checkpointed layers in
backward, which runs in another thread.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from refscale.packing import Segment, key_index

PACKED = "refscale_packed"
# Queries of one SDPA call. The CPU kernel's own blocks compute more of what causality hides: for
# prompts of 100 to 900 tokens on Zen 4, calls of 64 took 5-20 % less time than one call.
_BLOCK = 64
# Tensors that models hand down and that say nothing about who sees whom.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings"})


class Layout:
    """The segments of a pack, and what is derived from them once for all layers of a device."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._biases: dict[tuple[Any, ...], Tensor] = {}
        self._varlen: dict[torch.device, tuple[Tensor, Tensor, Tensor, int, int]] = {}

    def bias(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
        """(num_queries, num_keys) additive: 0 where a query may look, -inf elsewhere.

        Causal from the lower right: the queries are the last of the keys.
        """
        key = (num_queries, num_keys, window, like.dtype, like.device)
        if key not in self._biases:
            query = torch.arange(num_keys - num_queries, num_keys, device=like.device)[:, None]
            position = torch.arange(num_keys, device=like.device)
            hidden = position > query
            if window is not None:
                hidden |= position <= query - window
            zeros = torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device)
            self._biases[key] = zeros.masked_fill_(hidden, -math.inf)
        return self._biases[key]

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(gather, cu_q, cu_k, longest query, longest key) on the device."""
        if device not in self._varlen:
            gather, cu_q, cu_k = (torch.from_numpy(x).to(device) for x in key_index(self.segments))
            longest_q = max(s.length for s in self.segments)
            longest_k = max(s.prefix_length + s.length for s in self.segments)
            self._varlen[device] = gather, cu_q, cu_k, longest_q, longest_k
        return self._varlen[device]


_layout: Layout | None = None


@contextmanager
def layout(current: Layout) -> Iterator[Layout]:
    """Within, PACKED attention follows `current`. Keep it on until backward has run."""
    global _layout
    before, _layout = _layout, current
    try:
        yield current
    finally:
        _layout = before


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in the calling convention of transformers' AttentionInterface.

    Args:
        module: The calling layer.
        query: (1, H, T, D).
        key: (1, H_kv, T, D); H is a multiple of H_kv.
        value: As key.
        attention_mask: Must be None: the pack's layout says who sees whom.
        scaling: Of the scores; None is D ** -0.5.
        dropout: Must be 0.
        sliding_window: A query sees this many last keys, itself included; None is all.
        softcap: Scores become softcap * tanh(scores / softcap).
        is_causal: Must not be False.
        others: What else the layer hands down; tensors that could change the scores are refused.

    Returns:
        (1, T, H, D) and None, the attention weights that nobody computes.

    Raises:
        ValueError: The layer asks for what a pack does not have, such as attention sinks.
    """
    assert _layout is not None, "packed attention runs within attention.layout"
    assert attention_mask is None and not dropout, "a pack has neither mask nor dropout"
    unknown = [n for n, x in others.items() if isinstance(x, Tensor) and n not in _HARMLESS]
    if unknown or is_causal is False:
        what = ", ".join(unknown) or "attention that is not causal"
        raise ValueError(f"{type(module).__name__} asks for {what}, which packs do not serve")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and _can_varlen(query, value):
        return _varlen(query, key, value, scale, sliding_window, _layout), None
    outputs = []
    for segment in _layout.segments:
        rows = slice(segment.start, segment.start + segment.length)
        keys, values = key[:, :, rows], value[:, :, rows]
        if segment.prefix_length:
            prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
            keys = torch.cat([key[:, :, prefix], keys], dim=2)
            values = torch.cat([value[:, :, prefix], values], dim=2)
        queries = torch.split(query[:, :, rows], _BLOCK, dim=2)
        stop = segment.prefix_length
        for block in queries:
            stop += block.shape[2]
            # A block's queries see `before` keys that none of them is, and causally themselves.
            before = stop - block.shape[2]
            if sliding_window is not None:
                before = min(before, sliding_window - 1)
            seen = slice(stop - block.shape[2] - before, stop)
            output = _attend(
                block, keys[:, :, seen], values[:, :, seen], scale, sliding_window, softcap, _layout
            )
            outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: Layout,
) -> Tensor:
    """A block: (1, H, n, D) queries against (1, H_kv, p + n, D) keys -> (1, H, n, D_v)."""
    if window is not None and window >= keys.shape[2]:
        window = None
    if softcap is not None:
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = softcap * torch.tanh(query @ keys.transpose(2, 3) * (scale / softcap))
        scores = scores + layout.bias(query.shape[2], keys.shape[2], window, query)
        return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ values
    causal = query.shape[2] == keys.shape[2] and window is None
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if causal else layout.bias(query.shape[2], keys.shape[2], window, query),
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _can_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention, which is behind torch's varlen attention, takes these."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, layout: Layout
) -> Tensor:
    """All segments in one call; (1, T, H, D)."""
    gather, cu_q, cu_k, longest_q, longest_k = layout.varlen(query.device)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, gather),
        value[0].transpose(0, 1).index_select(0, gather),
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        scale=scale,
        # Causal from the lower right where queries are fewer than keys, as FlashAttention has it.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "asked for the output alone"
    return output.unsqueeze(0)


def unserved(config: Any, device: torch.device) -> str | None:
    """Why models of a text config cannot take the packed path; None if they may.

    The self-check of reference.py has the last word: this only names what is known beforehand.
    """
    if device.type not in ("cpu", "cuda"):
        return f"packs run on CPUs and on CUDA, not on {device.type}"
    kinds = set(getattr(config, "layer_types", None) or [])
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if other:
        return f"layers of kind {', '.join(sorted(other))} carry state from token to token"
    if "chunked_attention" in kinds:
        return "chunked attention is not served"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "ALiBi positions are not served"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not served"
    return None


AttentionInterface.register(PACKED, packed_attention)
