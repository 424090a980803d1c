"""The packed DPO step: what pairs share once, no padding, the head on completion rows only.

In: TRL's micro-batch of B pairs. Out: the same per-token outputs that TRL's padded step computes,
so that its losses and metrics stay as they are. The pairs lie in one row of ids, as `packing` lays
them out for scoring, and `attention` runs over it: exactly what the 2B padded rows compute, so loss
and gradients are equal up to float rounding.

Cost: a forward and backward over about prompt + chosen + rejected tokens a pair instead of twice
the longest sequence of the batch. The vocabulary is projected by TRL's own tiled head, which
recomputes its tiles in backward. What it gives up: models that `attention.unserved` names.
"""

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from refscale.scoring import attention
from refscale.scoring.packing import Segment, plan_packs

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class PairPack:
    """B pairs in one row of N tokens, with R predictions.

    Attributes:
        input_ids: int64 (1, N).
        position_ids: int64 (1, N).
        rows: int64 (R,) rows whose hidden state predicts a completion token.
        targets: int64 (R,) what they predict.
        terms: int64 (M,) indices into `rows`, one for each scored token of TRL's padded rows;
            M >= R, since tokens that completions share count for each of them.
        slots: int64 (M,) where each belongs in TRL's (2B, T - 1) outputs, flattened.
        shape: (2B, T - 1).
        segments: Who sees whom.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    targets: Tensor
    terms: Tensor
    slots: Tensor
    shape: tuple[int, int]
    segments: tuple[Segment, ...]

    def to(self, device: Any, **kwargs: Any) -> "PairPack":
        """The same pack with its tensors on `device`."""
        names = ("input_ids", "position_ids", "rows", "targets", "terms", "slots")
        return replace(self, **{n: getattr(self, n).to(device, **kwargs) for n in names})


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
) -> PairPack:
    """Lay pairs of (prompt, chosen, rejected) ids into one row.

    A sequence's first token has no prediction: with an empty prompt a completion's first token is
    not scored, as in TRL.

    Example: `[([7, 8], [9], [4, 5])]`, whose padded rows are `7 8 9 _` and `7 8 4 5`, gives

        input_ids  7 8 4     each completion's last token predicts nothing and is left out
        positions  0 1 2
        rows       1 1 2     8 predicts both 4 and 9
        targets    4 9 5
        terms      1 0 2     of chosen 9, of rejected 4 and 5
        slots      1 4 5     of two rows of T - 1 = 3 outputs
    """
    prompts, chosen, rejected = (
        [np.asarray(pair[side], dtype=np.int32) for pair in pairs] for side in range(3)
    )
    plan = plan_packs(prompts, chosen, rejected)
    (pack,) = plan.packs
    width = max(len(p) + max(len(c), len(r)) for p, c, r in pairs) - 1
    place = {int(number): i for i, number in enumerate(pack.sequences)}
    own_terms = [pack.terms[pack.owners == i] for i in range(len(pack.sequences))]
    terms, slots = [], []
    for side, numbers in enumerate((plan.chosen, plan.rejected)):
        for i, number in enumerate(numbers):
            mine = own_terms[place[int(number)]]
            # Output column t scores token t + 1; the first scored one follows the prompt.
            first = max(len(prompts[i]), 1) - 1
            terms.append(mine)
            slots.append((side * len(pairs) + i) * width + first + np.arange(len(mine)))
    return PairPack(
        input_ids=torch.from_numpy(pack.ids)[None],
        position_ids=torch.from_numpy(pack.positions)[None],
        rows=torch.from_numpy(pack.rows),
        targets=torch.from_numpy(pack.targets),
        terms=torch.from_numpy(np.concatenate(terms)),
        slots=torch.from_numpy(np.concatenate(slots)),
        shape=(2 * len(pairs), width),
        segments=pack.segments,
    )


@dataclass
class PackedCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, with the micro-batch's `PairPack` beside the padded tensors.

    The padded ids stay because TRL's losses and metrics count tokens by their masks; they cost
    bytes, not compute.

    Attributes:
        packed: Whether `pack` is added; clearing it falls back to padded steps.
    """

    packed: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded tensors as TRL makes them, and `pack`."""
        output: dict[str, Any] = super().torch_call(examples)
        if self.packed:
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            output["pack"] = pack_pairs([tuple(e[name] for name in names) for e in examples])
        return output


def refusal(
    model: PreTrainedModel, device: torch.device, router_aux_loss_coef: float | None = None
) -> str | None:
    """Why `model` cannot take the packed step; None where it may.

    Args:
        model: The policy, without dropout (`policy.disable_dropout`).
        device: Where it computes.
        router_aux_loss_coef: As TRL's; None takes the one of the model's config.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} does not take its attention from transformers"
    if router_aux_loss_coef is None:
        router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
    # TRL adds the router's loss to DPO's whether or not the config asks for router logits.
    if hasattr(config, "output_router_logits") and router_aux_loss_coef:
        return (
            f"{config.model_type} has a router loss over the tokens of padded rows"
            " (train.trl.router_aux_loss_coef: 0 leaves it out)"
        )
    return attention.unserved(config, device)


def install(model: PreTrainedModel) -> None:
    """Make `model(pack=..., fused_lm_head=True)` take the packed path.

    `model` must have TRL's fused head (`add_fused_lm_head`) already. It does the projection, so
    that scaling, soft-capping, bias and ZeRO-3's gathering of the head are TRL's in both paths.
    Without a pack nothing changes.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        pack: PairPack | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if pack is None:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        with _in_work(self.config.get_text_config(), pack):
            outputs = fused_forward(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                attention_mask=None,
                shift_labels=pack.targets[None],
                fused_lm_head=True,
                use_cache=False,
            )
        for name in _PER_TOKEN:
            scored = getattr(outputs, name)
            if scored is not None:
                flat = scored.new_zeros(pack.shape[0] * pack.shape[1])
                values = scored[0].index_select(0, pack.terms)
                setattr(outputs, name, flat.index_put((pack.slots,), values).view(pack.shape))
        return outputs

    model.forward = types.MethodType(forward, model)
    model.base_model.register_forward_hook(_keep_rows)


_step: ExitStack | None = None  # open while a training step runs
_rows: Tensor | None = None  # of the pack whose forward runs


@contextmanager
def step() -> Iterator[None]:
    """Around forward and backward of a micro-batch: checkpointed layers run again in backward."""
    global _step
    with ExitStack() as _step:
        try:
            yield
        finally:
            _step = None


@contextmanager
def _in_work(config: Any, pack: PairPack) -> Iterator[None]:
    """Packed attention for this forward, and until the end of the step where one is open."""
    global _rows
    with ExitStack() as forward_only:
        lasting = _step or forward_only
        lasting.enter_context(_attention_of(config))
        layout = attention.Layout(pack.segments)
        lasting.enter_context(attention.layout(layout))
        _rows = pack.rows
        try:
            yield
        finally:
            _rows = None


@contextmanager
def _attention_of(config: Any) -> Iterator[None]:
    """Layers look their attention up in the config at each call."""
    before = config._attn_implementation
    config._attn_implementation = attention.PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def _keep_rows(module: Any, args: Any, output: Any) -> Any:
    """Hand on the hidden states that predict a completion token, in the order of the targets."""
    if _rows is not None:
        output.last_hidden_state = output.last_hidden_state[:, _rows]
    return output
