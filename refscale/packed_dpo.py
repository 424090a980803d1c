"""The packed DPO step: each prompt once, no padding, the head on completion rows only.

In: TRL's micro-batch of B pairs. Out: the same `FusedCausalLMOutput` that TRL's padded step gets,
so that its losses and metrics are untouched. The pairs lie in one row of ids

    [P1 C1 R1 P2 C2 R2 ...]      position ids of C and R both go on after P

and attention is causal within P, of C over [P C] and of R over [P R]: exactly what the two padded
rows [P C] and [P R] compute, so loss and gradients are equal up to float rounding.

Cost: a forward and backward over P + C + R tokens a pair instead of 2 (longest of the batch). What
it gives up: models whose layers mix tokens outside attention (recurrent, convolutional), or whose
attention is more than softmax(QK)V over a causal window of everything (sliding windows, soft-capped
scores, sinks, position biases). `refusal` names them; `check` proves the rest on real pairs.
"""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.dpo_trainer import DataCollatorForPreference

ATTENTION = "refscale_packed"
# Attention arguments that change what a score or a weight is; None or absent is plain attention.
_UNSERVED_ARGUMENTS = ("softcap", "s_aux", "sliding_window", "position_bias")


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in the row: begin of the prompt, and three lengths."""

    begin: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Pack:
    """B pairs in one row of N tokens, with M scored completion tokens.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64.
        predictors: (M,) row positions whose hidden states predict the targets.
        targets: (M,) ids.
        slots: (M,) flat positions in TRL's (2B, T - 1) outputs.
        shape: (2B, T - 1).
        segments: The pairs, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    slots: Tensor
    shape: tuple[int, int]
    segments: tuple[Segment, ...]

    def to(self, device: Any, **kwargs: Any) -> "Pack":
        """The same pack with its tensors on `device`."""
        names = ("input_ids", "position_ids", "predictors", "targets", "slots")
        return replace(self, **{n: getattr(self, n).to(device, **kwargs) for n in names})


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
) -> Pack:
    """Lay pairs of (prompt, chosen, rejected) ids into one row.

    A sequence's first token has no prediction, so with an empty prompt a completion's first token
    is not scored, as in TRL.

    Example: `[([7, 8], [9], [4, 5])]` gives

        row         0  1  2  3  4        input_ids    7 8 9 4 5
        position    0  1  2  2  3        predictors   1 1 3      (8 predicts both 9 and 4)
                                         targets      9 4 5
    """
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    segments = []
    width = max(len(p) + max(len(c), len(r)) for p, c, r in pairs) - 1
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        begin, length = len(ids), len(prompt)
        segments.append(Segment(begin, length, len(chosen), len(rejected)))
        ids.extend(prompt)
        positions.extend(range(length))
        for row, completion in ((i, chosen), (i + len(pairs), rejected)):
            start = len(ids)
            ids.extend(completion)
            positions.extend(range(length, length + len(completion)))
            for j, target in enumerate(completion):
                if j == 0 and length == 0:
                    continue
                predictors.append(start + j - 1 if j else begin + length - 1)
                targets.append(target)
                slots.append(row * width + length + j - 1)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        slots=torch.tensor(slots, dtype=torch.long),
        shape=(2 * len(pairs), width),
        segments=tuple(segments),
    )


class PackedCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, with the micro-batch's `Pack` beside the padded tensors.

    The padded ids stay because TRL's losses and metrics count tokens by their masks; they cost
    bytes, not compute.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded tensors as TRL makes them, and `pack`."""
        output: dict[str, Any] = super().torch_call(examples)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        output["pack"] = pack_pairs([tuple(e[name] for name in names) for e in examples])
        return output


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row where a pack is given, else transformers' SDPA.

    Args:
        module: The attention layer.
        query: (1, heads, N, head_dim).
        key: (1, kv_heads, N, head_dim).
        value: As key.
        attention_mask: None for a pack.
        pack: Of this row.
        scaling: Of the scores.
        **kwargs: Others of the layer; those that change the scores are refused.

    Returns:
        (1, N, heads, head_dim), and None for the weights.
    """
    if pack is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    for name in _UNSERVED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not serve {name}")
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    outputs = []
    for segment in pack.segments:
        lengths = (segment.prompt, segment.chosen, segment.rejected)
        prompt, *completions = (
            slice(begin, begin + length)
            for begin, length in zip(
                (
                    segment.begin,
                    segment.begin + segment.prompt,
                    segment.begin + segment.prompt + segment.chosen,
                ),
                lengths,
                strict=True,
            )
        )
        key_p, value_p = key[:, :, prompt], value[:, :, prompt]
        if segment.prompt:
            outputs.append(attend(query[:, :, prompt], key_p, value_p, is_causal=True))
        for own, length in zip(completions, lengths[1:], strict=True):
            if not length:
                continue
            # Query i sees the prompt and the completion up to i.
            seen = torch.ones(
                length, segment.prompt + length, dtype=torch.bool, device=query.device
            ).tril(segment.prompt)
            outputs.append(
                attend(
                    query[:, :, own],
                    torch.cat([key_p, key[:, :, own]], dim=2),
                    torch.cat([value_p, value[:, :, own]], dim=2),
                    attn_mask=seen,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def refusal(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take the packed step; None where it may."""
    config = model.config.get_text_config()
    kind = config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} does not take its attention function from transformers"
    if getattr(config, "sliding_window", None) and _has_layers(config, "sliding"):
        return f"{kind} has sliding-window attention"
    for layer in ("linear", "conv", "mamba", "recurrent"):
        if _has_layers(config, layer, default=False):
            return f"{kind} has {layer} layers, which mix tokens outside attention"
    for name in ("attn_logit_softcapping", "alibi", "position_bias"):
        if getattr(config, name, None):
            return f"{kind} has {name}"
    if getattr(config, "output_router_logits", False):
        return f"{kind} has a router loss that counts tokens of padded rows"
    return None


def _has_layers(config: Any, kind: str, default: bool = True) -> bool:
    """Whether any layer is of `kind`; `default` where the config does not list its layers."""
    layers = getattr(config, "layer_types", None)
    return any(kind in str(layer) for layer in layers) if layers else default


def install(model: PreTrainedModel) -> None:
    """Make `model(pack=..., fused_lm_head=True)` take the packed path.

    `model` must have TRL's fused head (`add_fused_lm_head`) already, which does the projection, so
    that scaling, soft-capping, bias and ZeRO-3's gathering of the head are TRL's in both paths.
    Without a pack nothing changes but the name of the SDPA attention.
    """
    model.set_attn_implementation(ATTENTION)
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, pack: Pack | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if pack is None or not fused_lm_head:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        outputs = fused_forward(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            pack=pack,
            shift_labels=pack.targets[None],
            fused_lm_head=True,
            use_cache=False,
        )
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            scored = getattr(outputs, name)
            if scored is not None:
                flat = scored.new_zeros(pack.shape[0] * pack.shape[1])
                setattr(outputs, name, flat.index_put((pack.slots,), scored[0]).view(pack.shape))
        return outputs

    model.forward = types.MethodType(forward, model)
    model.base_model.register_forward_hook(_keep_predictors, with_kwargs=True)


def _keep_predictors(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Hand on the hidden states that predict a completion token, in the order of the targets."""
    pack = kwargs.get("pack")
    if pack is not None:
        output.last_hidden_state = output.last_hidden_state[:, pack.predictors]
    return output
