"""Completion log-probs from hidden states, tiled over rows and vocabulary. Pure torch.

In: hidden states of just the rows that predict a completion token. Out: one fp32 log-prob a row.
Never holds more than a tile of logits, so memory does not grow with the vocabulary or the pack. No
gradients: training has TRL's tiled head.

Shapes: R rows, D hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from refscale.scoring.devices import is_out_of_memory

logger = logging.getLogger(__name__)

LogSumExp = Callable[..., list[Tensor]]

_NO_KERNEL = "log-probs take several passes over each tile instead of one: %s"

# Rows and vocabulary entries of a tile. CPU: 4 MiB in fp32, so that the tile is still in the cache
# for its log-sum-exp. CUDA: large enough to fill the device, 1 GiB in fp32.
_TILE_CPU = (512, 2048)
_TILE_CUDA = (4096, 65536)
# Rows of given logits, which are there already: just their fp32 copies are bounded.
_OWN_ROWS = 256


@dataclass(frozen=True)
class Head:
    """The map from last hidden states to logits, as the model's config says.

    logits = softcap(multiplier * (hidden @ weight.T + bias)), softcap(x) = c * tanh(x / c).
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    multiplier: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers causal LM."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        # Cohere; Muse Glimmer; Falcon-H1. Granite and MiniCPM3 divide, HyperCLOVA X does not.
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        given = (getattr(config, name, None) for name in names)
        multiplier = next((value for value in given if value is not None), None)
        scaling = getattr(config, "logits_scaling", None)
        if multiplier is None and scaling is not None:
            multiplier = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(
            weight=head.weight,
            bias=getattr(head, "bias", None),
            multiplier=1.0 if multiplier is None else float(multiplier),
            softcap=getattr(config, "logits_soft_cap", softcap),  # RecurrentGemma's name
        )

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """fp32 logits (R,) of one entry a row, accumulated in fp32 whatever the weights' dtype."""
        logits = (hidden.float() * self.weight[targets].float()).sum(dim=-1)
        if self.bias is not None:
            logits = logits + self.bias[targets].float()
        return self.finish_(logits)

    def finish_(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap products, in place."""
        if self.multiplier != 1.0:
            logits.mul_(self.multiplier)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class _Tiles:
    """Logits tile by tile, in buffers that are used again and again.

    On a CPU fresh memory costs more than the arithmetic on it: with two 4 MiB buffers the log-sum-
    exp of 49,152 entries adds 5 % to the product's time, with new tensors for each tile 120 %.
    """

    def __init__(self, head: Head, num_rows: int, like: Tensor) -> None:
        self._head = head
        rows, width = _TILE_CUDA if like.is_cuda else _TILE_CPU
        self.rows = max(1, min(rows, num_rows))
        self.width = min(width, len(head.weight))
        size = self.rows * self.width
        self._products = like.new_empty(size)
        self._fused = _fused_log_sum_exp(like.device, like.dtype)
        if self._fused is None:
            single = like.dtype == torch.float32
            self._logits = self._products if single else like.new_empty(size, dtype=torch.float32)
            self._scratch = torch.empty_like(self._logits)

    def normalisers(
        self, hidden: Tensor, start: int, targets: Tensor, exact: Tensor, *, sum_squares: bool
    ) -> list[Tensor]:
        """fp32 (n,) log-sum-exp over the entries from `start`, and of twice the logits if asked.

        Args:
            hidden: (n, D).
            start: First entry of the vocabulary.
            targets: int64 (n,).
            exact: fp32 (n,) the targets' own logits, which replace the products where they are in
                this tile.
            sum_squares: Whether the second is wanted.
        """
        products, at = self._multiply(hidden, start), targets - start
        if self._fused is not None:
            head = self._head
            return self._fused(
                products,
                at,
                exact,
                multiplier=head.multiplier,
                softcap=head.softcap,
                sum_squares=sum_squares,
            )
        logits = self._put_exact(products, at, exact)
        found = [self._log_sum_exp(logits)]
        if sum_squares:
            found.append(self._log_sum_exp(logits.mul_(2)))
        return found

    def _multiply(self, hidden: Tensor, start: int) -> Tensor:
        """(n, width) products, valid until the next call."""
        weight = self._head.weight[start : start + self.width]
        shape = (len(hidden), len(weight))
        products = self._products[: shape[0] * shape[1]].view(shape)
        if self._head.bias is None:
            return torch.mm(hidden, weight.T, out=products)
        bias = self._head.bias[start : start + self.width]
        return torch.addmm(bias, hidden, weight.T, out=products)

    def _put_exact(self, products: Tensor, at: Tensor, exact: Tensor) -> Tensor:
        """fp32 (n, width) logits."""
        logits = products
        if self._logits is not self._products:
            logits = self._logits[: products.numel()].view(products.shape).copy_(products)
        self._head.finish_(logits)
        # Without a branch on values, which would wait for the device.
        inside = (at >= 0) & (at < products.shape[1])
        at = at.clamp(0, products.shape[1] - 1)[:, None]
        value = torch.where(inside[:, None], exact[:, None], logits.gather(1, at))
        return logits.scatter_(1, at, value)

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        """(n, width) -> (n,).

        By way of log_softmax, one fused pass: torch.logsumexp takes several.
        """
        scratch = self._scratch[: logits.numel()].view(logits.shape)
        torch.log_softmax(logits, dim=-1, out=scratch)
        return logits[:, 0] - scratch[:, 0]


@cache
def _fused_log_sum_exp(device: torch.device, dtype: torch.dtype) -> LogSumExp | None:
    """The kernel that does the steps of `_Tiles` in one, where it can be built."""
    if device.type != "cuda":
        return None
    try:
        from refscale.scoring import fused_head  # triton comes with torch on CUDA alone
    except ImportError as exc:
        logger.warning(_NO_KERNEL, exc)
        return None
    products = torch.zeros(2, 3, device=device, dtype=dtype)
    at, exact = torch.tensor([0, 1], device=device), torch.zeros(2, device=device)
    try:
        fused_head.log_sum_exp(products, at, exact, multiplier=1.0, softcap=None, sum_squares=False)
    except fused_head.BUILD_FAILS as exc:
        if is_out_of_memory(exc):
            raise
        logger.warning(_NO_KERNEL, exc)
        return None
    return fused_head.log_sum_exp


@torch.no_grad()
def token_logps(
    hidden: Tensor, targets: Tensor, head: Head, *, sum_squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each row's target given its prefix, in nats.

    The log-sum-exp is taken in fp32 over products of the model's dtype. The target's own logit is
    computed in fp32, and is the same in both terms: where the model is sure of its target the two
    nearly cancel, and a rounding in one of them alone would be the whole log-prob.

    Args:
        hidden: (R, D), of the weights' dtype.
        targets: int64 (R,).
        head: The output head.
        sum_squares: Also return log sum_v p(v)^2 (the alignment term of WPO, arXiv 2406.11827).

    Returns:
        fp32 (R,) log-probs, and fp32 (R,) log of the summed squares or None.
    """
    tiles = _Tiles(head, len(hidden), hidden)
    logps = hidden.new_empty(len(hidden), dtype=torch.float32)
    squares = torch.empty_like(logps) if sum_squares else None
    for first in range(0, len(hidden), tiles.rows):
        rows = slice(first, first + tiles.rows)
        exact = head.target_logits(hidden[rows], targets[rows])
        parts = [
            torch.stack(
                tiles.normalisers(
                    hidden[rows], start, targets[rows], exact, sum_squares=sum_squares
                )
            )
            for start in range(0, len(head.weight), tiles.width)
        ]
        normaliser, *doubled = torch.logsumexp(torch.stack(parts), dim=0)
        logps[rows] = exact - normaliser
        if squares is not None:
            squares[rows] = doubled[0] - 2 * normaliser
    return logps, squares


def logps_of_logits(
    logits: Tensor, targets: Tensor, *, sum_squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `token_logps`, from the (R, V) logits of a model whose head `Head` does not describe."""
    logps = logits.new_empty(len(logits), dtype=torch.float32)
    squares = torch.empty_like(logps) if sum_squares else None
    for start in range(0, len(logits), _OWN_ROWS):
        rows = slice(start, start + _OWN_ROWS)
        tile = logits[rows].float()
        # Not by log_softmax: on CPUs its fp32 sum over a whole vocabulary loses what is added late,
        # so that log-probs are too large by 1e-6 with 49,152 entries, by 1e-5 with 256,000 (torch
        # 2.13).
        normaliser = torch.logsumexp(tile, dim=-1)
        logps[rows] = tile.gather(1, targets[rows, None])[:, 0] - normaliser
        if squares is not None:
            squares[rows] = torch.logsumexp(2 * tile, dim=-1) - 2 * normaliser
    return logps, squares


def sequence_logps(logps: Tensor, terms: Tensor, owners: Tensor, num_sequences: int) -> Tensor:
    """Sums of token log-probs per sequence, in float64.

    Args:
        logps: fp32 (R,).
        terms: int64 (M,) indices into `logps`.
        owners: int64 (M,) the sequence of each term.
        num_sequences: S.

    Returns:
        float64 (S,); a sequence without terms is 0.
    """
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, owners, logps[terms].double())
