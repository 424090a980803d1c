"""The reference model: load, check, score encoded pairs. torch and transformers; no ray.

In: pairs as id arrays. Out: summed log-probs of both completions in nats, float32, in input order.

Two paths give the same numbers within the dtype's error:

    packed  shared-prefix packs without padding (packing.py, attention.py): the fast one
    padded  length-sorted, right-padded batches (padding.py) through the model's own attention:
            for every model

Which one a model takes is decided by what is known of its architecture and proven on the first
pairs (self_check.py).
"""

import gc
import logging
import time
from collections.abc import Iterable
from typing import Any, Literal, cast

import numpy as np
import torch

from refscale.errors import ModelError
from refscale.scoring import attention
from refscale.scoring.compilation import CompiledLayers
from refscale.scoring.devices import (
    choose_dtype,
    compile_after,
    default_budget,
    device_name,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
)
from refscale.scoring.encoded_pairs import EncodedPairs
from refscale.scoring.flops import num_weights
from refscale.scoring.forward import Batch, Forward
from refscale.scoring.limits import Limits
from refscale.scoring.loading import load_model
from refscale.scoring.packing import Pack, Plan, length_classes, make_packs, plan_packs
from refscale.scoring.padding import padded_batches
from refscale.scoring.results import PairScores, ScoringStats, Sums, pair_scores
from refscale.scoring.self_check import SelfCheck, checked_pairs, error_budget, fault

__all__ = [
    "ENGINE_VERSION",
    "NONFINITE",
    "OUT_OF_MEMORY",
    "EncodedPairs",
    "PairScores",
    "ReferenceModel",
    "ScoringStats",
    "SelfCheck",
    "choose_dtype",
]

logger = logging.getLogger(__name__)

# Part of every score's fingerprint: raise it when a change moves a log-prob beyond rounding.
ENGINE_VERSION = 2

NONFINITE = "nonfinite_logp"
OUT_OF_MEMORY = "out_of_memory"
_SMALLEST_BUDGET = 64  # tokens
# Keys of a pack, a multiple of its tokens: pairs that share a prompt alone have 2 at most. Where a
# long system prompt is shared, more; a GPU gathers them all at once.
_KEYS_A_TOKEN = 8
_FEW_KEYS = 1 << 19

Path = Literal["packed", "padded"]
AskedPath = Literal["auto", "packed", "padded"]
Compilation = Literal["auto", "on", "off"]


class ReferenceModel:
    """A causal LM that scores pairs. Build with `load` or `from_model`.

    Attributes:
        path: packed or padded.
        token_budget: Tokens of a forward pass; out of memory halves it.
        info: What was chosen and why, as plain values.
    """

    def __init__(
        self,
        model: Any,
        *,
        path: AskedPath = "auto",
        token_budget: int | None = None,
        compilation: Compilation = "auto",
        info: dict[str, Any] | None = None,
    ) -> None:
        self._forward = Forward(model)
        self._compilation: Compilation = compilation
        self._worked_s = 0.0
        self._limits = Limits.of(model)
        self._forced = path != "auto"
        self.path, reason = self._choose_path(path)
        forward = self._forward
        self.token_budget = token_budget or default_budget(
            forward.config, forward.dtype, forward.device
        )
        self._key_budget = max(_FEW_KEYS, _KEYS_A_TOKEN * self.token_budget)
        self.info: dict[str, Any] = {
            "device": device_name(forward.device),
            "dtype": str(forward.dtype).removeprefix("torch."),
            "path": self.path,
            "path_reason": reason,
            "token_budget": self.token_budget,
            "num_threads": torch.get_num_threads(),
            "num_parameters": sum(num_weights(p) for p in model.parameters()),
            "vocab_size": forward.config.vocab_size,
            **(info or {}),
        }

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        path: str = "auto",
        token_budget: int | None = None,
        compilation: str = "auto",
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        adapter: str | None = None,
        quantization: str | None = None,
        num_threads: int | None = None,
    ) -> "ReferenceModel":
        """Load a model from a folder or the hub.

        Args:
            model_name_or_path: Folder written by save_pretrained, or a hub id.
            revision: Hub revision.
            dtype: auto, float32, bfloat16 or float16.
            device: auto, cpu, cuda, cuda:1, …; several visible GPUs share the model by layers.
            path: auto, packed or padded.
            token_budget: Tokens of a forward pass.
            compilation: on compiles the packed path before the first pack, auto does so once it
                has worked for as long as `devices.compile_after` says, off never does.
            trust_remote_code: Run code that comes with the model.
            attn_implementation: Attention of the padded path.
            adapter: LoRA adapter to merge into the weights.
            quantization: 8bit or 4bit (bitsandbytes); changes the scores.
            num_threads: torch threads of this process; None leaves them.

        Raises:
            ModelError: It cannot be loaded; one line says why.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        model, dtype_reason = load_model(
            model_name_or_path,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            adapter=adapter,
            quantization=quantization,
        )
        info = {"dtype_reason": dtype_reason, "quantization": quantization}
        reference = cls(
            model,
            path=cast(AskedPath, path),
            token_budget=token_budget,
            compilation=cast(Compilation, compilation),
            info=info,
        )
        logger.info(
            "scoring in %s (%s) on %s, %d threads",
            reference.info["dtype"],
            dtype_reason,
            reference.info["device"],
            reference.info["num_threads"],
        )
        return reference

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        path: AskedPath = "auto",
        token_budget: int | None = None,
        compilation: Compilation = "auto",
    ) -> "ReferenceModel":
        """Score with an already loaded transformers causal LM; it is put into eval mode."""
        return cls(model, path=path, token_budget=token_budget, compilation=compilation)

    @property
    def model(self) -> Any:
        """The causal LM."""
        return self._forward.model

    @property
    def device(self) -> torch.device:
        """Where ids go in."""
        return self._forward.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._forward.dtype

    def _choose_path(self, asked: AskedPath) -> tuple[Path, str]:
        if asked == "padded":
            return "padded", "asked for"
        model = self._forward.model
        why_not = attention.unserved(self._forward.config, self.device)
        if why_not is None and not getattr(model, "_supports_attention_backend", False):
            why_not = f"{type(model).__name__} has no exchangeable attention"
        if why_not is None and getattr(model, "_is_stateful", False):
            why_not = f"{type(model).__name__} carries state from token to token"
        if why_not is None:
            return "packed", "asked for" if asked == "packed" else "the architecture is served"
        if asked == "packed":
            raise ModelError(f"score.path is packed, but {why_not}; use score.path: auto or padded")
        return "padded", why_not

    def release(self) -> None:
        """Drop the model and free its memory."""
        on_gpu = self.device.type == "cuda"
        del self._forward
        if on_gpu:
            gc.collect()  # compiled layers hold on to themselves
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(self, pairs: EncodedPairs, *, sum_squares: bool = False) -> PairScores:
        """Score all pairs; a pair that cannot be scored gets a reason instead of an error.

        A sequence whose log-prob is not finite is scored again alone, in fp32. Out of memory halves
        the token budget, for good; what does not fit alone gets the reason out_of_memory.

        Args:
            pairs: N pairs.
            sum_squares: Also return WPO's alignment terms.

        Raises:
            ModelError: A token id has no embedding, or a sequence is longer than the model's
                positions.
        """
        started = time.perf_counter()
        stats = ScoringStats(pairs=len(pairs))
        reset_peak_memory(self.device)
        plan = self._plan(pairs)
        stats.useful_tokens = plan.useful_tokens
        sums = Sums(plan.num_sequences, squares=sum_squares)
        if self._compile_is_due():
            self._compile_packs(plan)
        self._run(plan, sums, stats, self.path)
        self._retry_nonfinite(plan, sums, stats)
        scores = pair_scores(pairs, plan, sums, stats)
        stats.seconds = time.perf_counter() - started
        self._worked_s += stats.seconds
        stats.token_budget = self.token_budget
        stats.peak_memory_bytes = peak_memory(self.device)
        return scores

    def _plan(self, pairs: EncodedPairs) -> Plan:
        plan = plan_packs(
            pairs.prompt_ids,
            pairs.chosen_ids,
            pairs.rejected_ids,
            self.token_budget,
            key_budget=self._key_budget,
            switch=self._limits.rope_switch,
        )
        # The last token of a sequence is not put in.
        longest = max((len(p) + len(c) - 1 for p, c in plan.sequences), default=0)
        self._limits.check((ids for sequence in plan.sequences for ids in sequence), longest)
        return plan

    def _run(self, plan: Plan, sums: Sums, stats: ScoringStats, path: Path) -> None:
        """Score every sequence of the plan."""
        batches: Iterable[Batch]
        if path == "packed":
            batches = plan.iter_packs()
        else:
            batches = (
                batch
                for numbers in length_classes(plan.sequences, self._limits.rope_switch)
                for batch in padded_batches(plan.sequences, numbers, self.token_budget)
            )
        with self._forward.attending(path):
            for batch in batches:
                self._run_batch(batch, plan, sums, stats)

    def _run_batch(self, batch: Batch, plan: Plan, sums: Sums, stats: ScoringStats) -> None:
        """Score a batch, in pieces if it is over the budget or does not fit."""
        work = [batch]
        while work:
            piece = work.pop()
            if self._is_over(piece) and len(piece.sequences) > 1:
                # Laid out before the budget was halved, or a split that was not small enough.
                work.extend(self._split(piece, plan))
                continue
            try:
                self._forward.score(piece, sums, stats)
                continue
            except RuntimeError as exc:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(exc):
                    raise
            # Out of the handler, whose traceback keeps the tensors of the failed batch alive.
            stats.oom_retries += 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(piece.sequences) == 1:
                sums.failed[int(piece.sequences[0])] = OUT_OF_MEMORY
                continue
            if isinstance(piece, Pack) and piece.num_keys > _KEYS_A_TOKEN / 2 * piece.num_tokens:
                # Fewer tokens would first of all share less.
                self._key_budget = piece.num_keys // 2
                logger.warning("out of memory: packs now have %d keys at most", self._key_budget)
            else:
                smaller = min(self.token_budget, piece.num_tokens) // 2
                self.token_budget = max(_SMALLEST_BUDGET, smaller)
                logger.warning("out of memory: the token budget is now %d", self.token_budget)
            work.extend(self._split(piece, plan))

    def _is_over(self, batch: Batch) -> bool:
        keys = batch.num_keys if isinstance(batch, Pack) else 0
        return batch.num_tokens > self.token_budget or keys > self._key_budget

    def _split(self, batch: Batch, plan: Plan) -> list[Batch]:
        """The sequences of a batch in smaller batches, within the budgets where possible."""

        def lay_out(numbers: list[int]) -> list[Batch]:
            if isinstance(batch, Pack):
                return [*make_packs(plan.sequences, numbers, self.token_budget, self._key_budget)]
            return [*padded_batches(plan.sequences, numbers, self.token_budget)]

        numbers = batch.sequences.tolist()
        pieces = lay_out(numbers)
        if len(pieces) > 1:
            return pieces
        middle = len(numbers) // 2
        return [*lay_out(numbers[:middle]), *lay_out(numbers[middle:])]

    def _compile_is_due(self) -> bool:
        if self._compilation == "auto":
            after = compile_after(self.dtype, self.device)
            return self.path == "packed" and after is not None and self._worked_s >= after
        return self._compilation == "on"

    def _compile_packs(self, plan: Plan) -> None:
        """Compile the packed path, once, and keep that if the plan's first pack has its sums."""
        pack = next(plan.iter_packs(), None)
        if pack is None:
            return
        self._compilation = "off"
        why_not = "pairs are scored in padded batches" if self.path == "padded" else None
        why_not = why_not or CompiledLayers.unserved(self.model) or self._try_compiled(pack, plan)
        if why_not:
            logger.warning("the packed path is not compiled: %s", why_not)
        self.info["compiled"] = f"no: {why_not}" if why_not else "yes"

    def _try_compiled(self, pack: Pack, plan: Plan) -> str | None:
        """Compile for this pack; if that does not do, take it back and say why."""

        def compute() -> np.ndarray:
            # Not in pieces where memory ends: what compiling needs is not what the budget is for.
            sums = Sums(plan.num_sequences)
            with self._forward.attending("packed"):
                self._forward.score(pack, sums, ScoringStats())
            return sums.logps()[pack.sequences]

        started = time.perf_counter()
        try:
            plain = compute()
            self._forward.compiled = CompiledLayers(self.model)
            budget = error_budget(plain, plan.num_scored[pack.sequences], self.dtype)
            wrong, error = fault(compute, plain, budget, of="what it is as it is")
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            wrong = "does not fit into memory"
        if wrong:
            self._forward.compiled = None
            return f"compiled, it {wrong}"
        took = time.perf_counter() - started
        logger.info("compiled in %.0f s; sums differ by %.2g nats at most", took, error)
        return None

    def _retry_nonfinite(self, plan: Plan, sums: Sums, stats: ScoringStats) -> None:
        bad = [
            number
            for number in np.flatnonzero(~np.isfinite(sums.logps())).tolist()
            if number not in sums.failed
        ]
        if not bad:
            return
        logger.warning(
            "%d of %d sequences have log-probs in %s that are not finite; they are scored again in"
            " float32, one by one",
            *(len(bad), plan.num_sequences, self.info["dtype"]),
        )
        try:
            with self._forward.in_float32(), self._forward.attending("float32"):
                for batch in padded_batches(plan.sequences, bad, 1):
                    self._run_batch(batch, plan, sums, stats)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            logger.warning("no memory to score %d sequences again in float32", len(bad))
        found = sums.logps()
        for number in bad:
            if not np.isfinite(found[number]):
                sums.failed.setdefault(number, NONFINITE)

    @torch.inference_mode()
    def self_check(self, pairs: EncodedPairs) -> SelfCheck:
        """Compare the path with the model's own logits on a few of the pairs, and settle it.

        Args:
            pairs: At least one.

        Raises:
            ModelError: score.path is packed and the model fails it, or no path is right; memory
                does not do for the logits of a single pair; or as `score`.
        """
        plan, truth = self._checked_sums(checked_pairs(pairs))
        budget = error_budget(truth, plan.num_scored, self.dtype)
        errors: dict[str, float] = {}

        def wrong_with(path: Path) -> str | None:
            wrong, errors[path] = fault(lambda: self._sums(plan, path), truth, budget)
            return wrong

        if not np.isfinite(truth).any():
            logger.warning("nothing to check the path by: the model's own log-probs are not finite")
        path, reason = self.path, self.info["path_reason"]
        if path == "packed":
            wrong = wrong_with("packed")
            if wrong is not None and np.isfinite(errors["packed"]):
                budget = np.maximum(budget, self._own_noise(plan, truth))
                wrong = wrong_with("packed")
            if wrong is None:
                reason = f"self-check passed, largest error {errors['packed']:.2g} nats"
            elif self._forced:
                raise ModelError(
                    f"score.path is packed, but the packed path {wrong}; use score.path: auto"
                )
            else:
                path = "padded"
                reason = f"the packed path failed the self-check: it {wrong}"
                logger.warning("%s; pairs are scored in padded batches", reason)
        if path == "padded" and wrong_with("padded"):
            self._forward.head_served = False
            reason += "; log-probs are taken from the model's own logits"
            logger.warning("the model's head is not known: every row takes the whole vocabulary")
            # Nothing of ours is left in it: what is off now is the model's own rounding, or gross.
            budget = error_budget(truth, plan.num_scored, torch.bfloat16)
            if wrong := wrong_with("padded"):
                raise ModelError(
                    "no path gives the model's own log-probs, so it may not be a causal language"
                    f" model: in padded batches it {wrong}"
                )
        self.path = path
        self.info.update(path=path, path_reason=reason, self_check_error=errors.get(path))
        return SelfCheck(errors, float(budget.min(initial=np.inf)), path, reason)

    def _checked_sums(self, pairs: EncodedPairs) -> tuple[Plan, np.ndarray]:
        """The plan of the pairs whose own logits fit into memory, without the longest; the truth.

        Scoring never holds all logits of a sequence: what does not fit here may be scored well.
        """
        for count in range(len(pairs), 0, -1):
            plan = self._plan(pairs.take(range(count)))
            try:
                return plan, self._own_sums(plan)
            except RuntimeError as exc:
                if not is_out_of_memory(exc):
                    raise
            # Out of the handler, whose traceback keeps the tensors alive.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(len(p) + len(c) for p, c in plan.sequences)
            logger.warning("no memory to check the path with all logits of %d tokens", longest)
        raise ModelError(
            f"no memory for all logits of a pair of {longest} tokens, by which the path is checked;"
            " take a larger device, raise ray.gpus_per_replica, set score.quantization or lower"
            " encoding.max_length"
        )

    def _sums(self, plan: Plan, path: Path) -> np.ndarray:
        """Sums of all sequences by a path; float64 (num_sequences,)."""
        sums = Sums(plan.num_sequences)
        self._run(plan, sums, ScoringStats(), path)
        return sums.logps()

    def _own_noise(self, plan: Plan, truth: np.ndarray) -> np.ndarray:
        """What a sum may differ by because the model's own logits differ so between batch shapes.

        Three times the largest such difference, at most the budget of half precision: a model that
        looks ahead is off by more. float64 (num_sequences,).
        """
        most = error_budget(truth, plan.num_scored, torch.bfloat16)
        served, self._forward.head_served = self._forward.head_served, False
        try:
            _, difference = fault(lambda: self._sums(plan, "padded"), truth, most)
        finally:
            self._forward.head_served = served
        return np.minimum(3 * difference if np.isfinite(difference) else 0.0, most)

    def _own_sums(self, plan: Plan) -> np.ndarray:
        """Sums by the model's own forward, a sequence at a time; float64 (num_sequences,)."""
        sums = Sums(plan.num_sequences)
        with self._forward.attending("padded"):
            for batch in padded_batches(plan.sequences, range(plan.num_sequences), 1):
                self._forward.score_own_logits(batch, sums)
        return sums.logps()
