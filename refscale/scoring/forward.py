"""A causal LM as a function from batches to sums of completion log-probs. torch and transformers.

In: packs or padded batches. Out: per sequence the sum of its completion's log-probs, left on the
device. Hidden states come from the model's backbone, log-probs from `logps`, so that no more logits
exist at a time than one tile.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from refscale.scoring import attention
from refscale.scoring.compilation import CompiledLayers
from refscale.scoring.devices import to_device
from refscale.scoring.flops import Flops
from refscale.scoring.logps import Head, logps_of_logits, sequence_logps, token_logps
from refscale.scoring.packing import Pack
from refscale.scoring.padding import PaddedBatch
from refscale.scoring.results import ScoringStats, Sums

Batch = Pack | PaddedBatch


class Forward:
    """Runs batches through a model.

    Attributes:
        model: The causal LM, in eval mode.
        device: Where ids go in.
        dtype: Of the weights.
        config: The model's text config.
        head_served: Whether `logps.Head` describes the model's head; where it does not, log-probs
            are taken from the model's own logits, padded batches only.
        compiled: The layers as packs take them; None takes them as they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.config = model.config.get_text_config()
        self.flops = Flops.of(model)
        self.head_served = model.get_output_embeddings() is not None
        self.compiled: CompiledLayers | None = None
        self._own_attention = model.config._attn_implementation
        # Llama 4's text model names no backbone of its own kind, and is then its own base_model.
        own = model.base_model is model
        self._backbone = getattr(model, "model", model) if own else model.base_model

    @contextmanager
    def attending(self, path: str) -> Iterator[None]:
        """Within, the model's layers attend as `path` needs: packed, padded or float32."""
        wanted = attention.PACKED if path == "packed" else self._own_attention
        if path == "float32" and str(wanted).startswith("flash"):
            wanted = "sdpa"  # FlashAttention has no float32
        before = self.model.config._attn_implementation
        with ExitStack() as stack:
            if path == "packed" and self.compiled is not None:
                stack.enter_context(self.compiled.in_use())
            if wanted != before:
                self.model.set_attn_implementation(wanted)
                stack.callback(self.model.set_attn_implementation, before)
            yield

    def score(self, batch: Batch, sums: Sums, stats: ScoringStats) -> None:
        """Add the sums of the batch's sequences to `sums`; run within `attending`."""
        if not len(batch.rows):
            # One-token completions of an empty prompt: nothing predicts them.
            nothing = torch.zeros(len(batch.sequences), dtype=torch.float64)
            sums.add(batch.sequences, nothing, nothing if sums.squares else None)
            return
        if isinstance(batch, PaddedBatch) and not self.head_served:
            self.score_own_logits(batch, sums)
            head_rows = batch.num_tokens
        else:
            head = Head.of(self.model)
            # With layers spread over devices, the last may end elsewhere than the head.
            hidden = self._hidden(batch).to(head.weight.device)
            hidden = hidden.index_select(0, to_device(batch.rows, hidden.device))
            targets = to_device(batch.targets, hidden.device)
            logps, squares = token_logps(hidden, targets, head, sum_squares=sums.squares)
            _add(batch, sums, logps, squares)
            head_rows = len(batch.rows)
        stats.computed_tokens += batch.num_tokens
        stats.head_rows += head_rows
        stats.flops += self.flops.total(batch.num_tokens, head_rows, batch.context)

    def score_own_logits(self, batch: PaddedBatch, sums: Sums) -> None:
        """As `score`, with the logits that the model itself computes: of every row, in full."""
        ids = to_device(batch.ids, self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        logits = logits.index_select(0, to_device(batch.rows, logits.device))
        targets = to_device(batch.targets, logits.device)
        _add(batch, sums, *logps_of_logits(logits, targets, sum_squares=sums.squares))

    def _hidden(self, batch: Batch) -> Tensor:
        """(num_tokens, D) last hidden states."""
        ids = to_device(batch.ids, self.device)
        if isinstance(batch, PaddedBatch):
            output = self._backbone(input_ids=ids, use_cache=False)
        else:
            positions = to_device(batch.positions, self.device)
            with attention.layout(attention.Layout(batch.segments)):
                output = self._backbone(
                    input_ids=ids[None], position_ids=positions[None], use_cache=False
                )
        return output.last_hidden_state.flatten(0, 1)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within, half-precision weights are float32; exact both ways, at twice the memory."""
        half = [
            t
            for t in [*self.model.parameters(), *self.model.buffers()]
            if t.dtype in (torch.bfloat16, torch.float16)
        ]
        before = [t.dtype for t in half]
        # Tensors made in inference mode could not be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            try:
                for tensor in half:
                    tensor.data = tensor.data.float()
                yield
            finally:
                for tensor, dtype in zip(half, before, strict=True):
                    tensor.data = tensor.data.to(dtype)


def _add(batch: Batch, sums: Sums, logps: Tensor, squares: Tensor | None) -> None:
    terms, owners = (to_device(x, logps.device) for x in (batch.terms, batch.owners))
    count = len(batch.sequences)
    sums.add(
        batch.sequences,
        sequence_logps(logps, terms, owners, count),
        None if squares is None else sequence_logps(squares, terms, owners, count),
    )
