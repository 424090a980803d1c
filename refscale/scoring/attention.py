"""Attention over a pack: each segment's queries against its prefix and itself. Pure torch.

Registered with transformers' AttentionInterface as PACKED; models then call it in every layer in
place of their own kernel, and build no mask for it. Exact for causal models: the rows of a pack see
just the keys that they would see in their own sequences.

- CUDA, half precision or autocast to it: one varlen call a layer over gathered keys, causal from
  the lower right. Heads whose keys and values differ in size (DeepSeek's) are padded to one size
  with zeros.
- Elsewhere: SDPA over batches of blocks. A block is at most 64 queries of a segment; blocks of
  similar shape are gathered, padded to one shape and attended in one call under an additive bias,
  all of which is laid out once a pack and shared by all layers. With small models a call for each
  block costs more in starting than in arithmetic; what it gives up is the arithmetic on padding.
- Soft-capped scores (Gemma 2) are computed in the same batches without a fused kernel.

The layout of the pack in work is module state, set by `layout`: it has to reach every layer of
models that do not hand unknown arguments down, and the recomputation of checkpointed layers in
backward, which runs in another thread.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from refscale.scoring.devices import to_device
from refscale.scoring.packing import Segment, key_index

logger = logging.getLogger(__name__)

PACKED = "refscale_packed"
# Queries of a block. The CPU kernel's own blocks compute more of what causality hides: for prompts
# of 100 to 900 tokens on Zen 4, blocks of 64 took 5-20 % less time than whole segments.
_BLOCK = 64
# Shapes of blocks are rounded up to these: the coarser, the fewer calls and the more padding.
_QUERIES = (8, 16, 32, 48, 64)
_KEYS = 32
# Entries of a call's bias at most: a batch of long segments is cut so that it stays in the cache.
_BIAS = 1 << 20
# Tensors that models hand down and that say nothing about who sees whom.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings"})
# In transformers 5.23 these call the attention function without their window.
_WINDOW_IN_MASK = frozenset({"qwen2_moe", "phimoe", "doge"})


@dataclass(frozen=True)
class _Batch:
    """B blocks that are attended in one call, each padded to Q queries and K keys.

    Attributes:
        queries: int64 (B * Q,) rows of the pack.
        keys: int64 (B * K,) rows of the pack.
        size: B.
        bias: (B or 1, 1, Q, K) additive: 0 where a query may look, -inf elsewhere.
    """

    queries: Tensor
    keys: Tensor
    size: int
    bias: Tensor


class Layout:
    """The segments of a pack, and what is derived from them once for all layers of a device."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._batches: dict[tuple[Any, ...], tuple[list[_Batch], Tensor]] = {}
        self._varlen: dict[torch.device, tuple[Tensor, Tensor, Tensor, int, int]] = {}

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return key_index(self.segments)

    def batches(self, window: int | None, like: Tensor) -> tuple[list[_Batch], Tensor]:
        """The batches of blocks, and int64 (T,) where each row of the pack is in their output."""
        key = (window, like.dtype, like.device)
        if key not in self._batches:
            made, order = [], np.empty(sum(s.length for s in self.segments), dtype=np.int64)
            base = 0
            gather, _cu_q, cu_k = self._index
            blocks = _blocks(self.segments, cu_k, window)
            for queries, keys, hidden, real in _batch_blocks(blocks, gather, window):
                bias = like.new_zeros(hidden.shape)
                bias.masked_fill_(to_device(hidden, like.device), -math.inf)
                rows = [to_device(x.ravel(), like.device) for x in (queries, keys)]
                made.append(_Batch(rows[0], rows[1], len(queries), bias[:, None]))
                order[queries[real]] = base + np.flatnonzero(real)
                base += queries.size
            self._batches[key] = made, to_device(order, like.device)
        return self._batches[key]

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(gather, cu_q, cu_k, longest query, longest key) on the device."""
        if device not in self._varlen:
            gather, cu_q, cu_k = (to_device(x, device) for x in self._index)
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
    assert attention_mask is None and not dropout, "a pack has neither mask nor dropout"
    unknown = [n for n, x in others.items() if isinstance(x, Tensor) and n not in _HARMLESS]
    if unknown or is_causal is False:
        what = ", ".join(unknown) or "attention that is not causal"
        raise ValueError(f"{type(module).__name__} asks for {what}, which packs do not serve")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    attend = _attend_compiled if opaque else _attend_pack
    return attend(query, key, value, scaling, sliding_window, softcap), None


def _attend_pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """All segments of the pack in work; (1, T, H, D), contiguous."""
    assert _layout is not None, "packed attention runs within attention.layout"
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # As SDPA does: rotated queries and keys of float32 weights come in float32, values do not.
        half = torch.get_autocast_dtype(kind)
        query, key, value = query.to(half), key.to(half), value.to(half)
    why_not = _no_varlen(query, value, softcap)
    if why_not is None:
        return _varlen(query, key, value, scale, window, _layout).contiguous()
    if query.is_cuda:
        _say_slow(why_not)
    batches, order = _layout.batches(window, query)
    outputs = [_attend(batch, query, key, value, scale, softcap) for batch in batches]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, order).unsqueeze(0)


# One node of a compiled layer's graph, so that the layout is read when a pack runs and not when the
# layer is compiled. It has no gradients, which only scoring does without.
_attend_compiled = torch.library.custom_op(
    "refscale::packed_attention", _attend_pack, mutates_args=()
)


@_attend_compiled.register_fake
def _attend_compiled_shape(query: Tensor, _key: Tensor, value: Tensor, *_options: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _blocks(segments: Sequence[Segment], cu_k: np.ndarray, window: int | None) -> np.ndarray:
    """int64 (n, 4), a row a block: first query, queries, first key's place in `gather`, keys.

    A block's last queries line up with its last keys. Keys that no query of a block sees are left
    out.
    """
    blocks = []
    for segment, keys in zip(segments, cu_k.tolist(), strict=False):  # where its keys begin
        for offset in range(0, segment.length, _BLOCK):
            length = min(_BLOCK, segment.length - offset)
            stop = segment.prefix_length + offset
            before = stop if window is None else min(stop, window - 1)
            blocks.append((segment.start + offset, length, keys + stop - before, before + length))
    return np.array(blocks, dtype=np.int64).reshape(-1, 4)


def _batch_blocks(
    blocks: np.ndarray, gather: np.ndarray, window: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of blocks of one padded shape.

    Yields:
        queries: int64 (B, Q) rows of the pack; padding repeats the block's last query.
        keys: int64 (B, K) rows of the pack; padding repeats the block's last key.
        hidden: bool (B, Q, K), true where a query may not look; (1, Q, K) where that is the same
            for all.
        real: bool (B, Q), false where a query is padding.
    """
    num_keys = blocks[:, 3]
    wide = np.array(_QUERIES)[np.searchsorted(_QUERIES, blocks[:, 1])]
    deep = -(-num_keys // _KEYS) * _KEYS
    # Blocks that fill their shape all have one bias.
    full = (wide == blocks[:, 1]) & (deep == num_keys)
    for q, k, fills in sorted(set(zip(wide.tolist(), deep.tolist(), full.tolist(), strict=True))):
        chosen = np.flatnonzero((wide == q) & (deep == k) & (full == fills))
        step = max(1, _BIAS // (q * k))
        for i in range(0, len(chosen), step):
            first, length, place, total = blocks[chosen[i : i + step]].T[:, :, None]
            query = np.minimum(np.arange(q), length - 1)
            position = np.arange(k)
            keys = gather[place + np.minimum(position, total - 1)]
            last = (total - length + query)[:, :, None]  # the key that lines up with each query
            hidden = position > last
            if window is not None:
                hidden |= position <= last - window
            yield first + query, keys, hidden[:1] if fills else hidden, np.arange(q) < length


def _attend(
    batch: _Batch, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """A batch of blocks out of (1, H, T, D) queries and (1, H_kv, T, D) keys -> (B * Q, H, D_v)."""

    def gather(rows: Tensor, source: Tensor) -> Tensor:
        found = source[0].transpose(0, 1).index_select(0, rows)
        return found.view(batch.size, -1, *found.shape[1:]).transpose(1, 2)

    queries = gather(batch.queries, query)
    keys, values = gather(batch.keys, key), gather(batch.keys, value)
    if softcap is not None:
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = softcap * torch.tanh(queries @ keys.transpose(2, 3) * (scale / softcap))
        output = torch.softmax((scores + batch.bias).float(), dim=-1).to(query.dtype) @ values
    else:
        output = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=batch.bias,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2).flatten(0, 1)


def _no_varlen(query: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """Why FlashAttention, which is behind torch's varlen attention, does not take these."""
    if not query.is_cuda:
        return "not on CUDA"
    if softcap is not None:
        return "the kernel has no soft-capped scores"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel has no {str(query.dtype).removeprefix('torch.')}"
    size = _head_size(query, value)
    if size > 256:
        return f"heads have {size} entries, and the kernel takes 256"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the kernel needs compute capability 8.0"
    return None


@cache
def _say_slow(why_not: str) -> None:
    logger.warning("packed attention takes many calls a layer instead of one: %s", why_not)


def _head_size(query: Tensor, value: Tensor) -> int:
    """The kernel's: one for keys and values, a multiple of 8."""
    return -(-max(query.shape[-1], value.shape[-1]) // 8) * 8


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, layout: Layout
) -> Tensor:
    """All segments in one call; (1, T, H, D)."""
    gather, cu_q, cu_k, longest_q, longest_k = layout.varlen(query.device)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    size = _head_size(query, value)
    queries, keys, values = (
        x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in rows
    )
    output = varlen_attn(
        queries,
        keys.index_select(0, gather),
        values.index_select(0, gather),
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
    return output[..., : value.shape[-1]].unsqueeze(0)


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
    windowed = "sliding_attention" in kinds or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
    if windowed and config.model_type in _WINDOW_IN_MASK:
        return f"{config.model_type} passes its sliding window on in a mask alone"
    if "chunked_attention" in kinds:
        return "chunked attention is not served"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "ALiBi positions are not served"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not served"
    return None


AttentionInterface.register(PACKED, packed_attention)
