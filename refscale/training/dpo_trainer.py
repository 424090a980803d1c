"""TRL's DPOTrainer on encoded pairs with stored reference sums; no reference model exists.

In: a dataset in `schema.SELECTION`. Out: TRL's own loss and metrics, with speed and memory beside
them. Costs per pair one policy forward and backward, over a packed or a padded micro-batch. What it
gives up: losses that need more of the reference than its plain sums (`ld_alpha`, a reference that
follows the policy).
"""

import contextlib
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import torch
import trl.trainer.dpo_trainer as trl_dpo
from accelerate.utils import is_peft_model
from torch.utils.data import Sampler, SequentialSampler
from trl import DPOTrainer

from refscale.errors import TrainingError
from refscale.scoring.flops import Flops
from refscale.training import packed_dpo
from refscale.training.checkpoints import HOW_TO_GO_ON
from refscale.training.data import check_columns, pair_tokens
from refscale.training.policy import gathers_weights
from refscale.training.token_batches import TokenBudgetSampler


class PrecomputedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on encoded pairs with stored reference sums; builds no reference model.

    Overrides private methods of TRL 1.16 and transformers 5.23, which the contract tests in
    tests/unit/test_training.py hold to account.

    Args:
        model: The policy, loaded.
        sequential: Take pairs in the dataset's order instead of shuffled.
        packed: Take packed steps (see `packed_dpo`).
        token_budget: Fill micro-batches up to this many tokens (see `token_batches`), instead of
            with `per_device_train_batch_size` pairs.
        **kwargs: As `DPOTrainer`; `ref_model` must be absent.

    Raises:
        TrainingError: A reference model was passed, or the dataset lacks stored sums.
    """

    def __init__(
        self,
        *,
        model: Any,
        sequential: bool = False,
        packed: bool = False,
        token_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("ref_model") is not None:
            raise TrainingError("a reference model was passed; the stored sums replace it")
        self.sequential, self.token_budget = sequential, token_budget
        self.pairs_seen = 0  # of all ranks, since this process began
        self._since = (time.perf_counter(), 0, 0)  # seconds, pairs and tokens at the last log
        self._useful: list[torch.Tensor] = []  # this rank's useful_work since the last log
        self._micro_batches: list[int] = []  # pairs of each in the current optimizer step
        tokenizer = kwargs["processing_class"]
        pad = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
        if packed or pad is None:
            # Padding is masked. Without any id for it TRL refuses to make its own collator.
            kwargs["data_collator"] = packed_dpo.PackedCollator(
                pad_token_id=0 if pad is None else pad, packed=packed
            )
        use_cache = getattr(model.config, "use_cache", None)
        with _without_model_hash():
            super().__init__(model=model, **kwargs)
        # Every step says use_cache=False itself; transformers says it in the config too, with which
        # the policy is saved.
        if use_cache is not None:
            model.config.use_cache = use_cache
        if packed:  # after TRL has put its fused head on the model
            base = self.model.get_base_model() if is_peft_model(self.model) else self.model
            packed_dpo.install(base)
        self._flops = training_flops(self.model)

    # -- no reference --------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        check_columns(dataset)
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        check_columns(dataset)
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine unless its user asks for it."""

    # -- batches -------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.token_budget is not None:
            packed = getattr(self.data_collator, "packed", False)
            return TokenBudgetSampler(
                pair_tokens(dataset, padded=not packed),
                budget=self.token_budget,
                padded=not packed,
                ranks=self.args.world_size,
                rank=self.args.process_index,
                shuffle=not self.sequential,
                seed=self.args.seed,
                epoch=self._epoch,
            )
        if self.sequential:
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _epoch(self) -> int:
        """The epoch that the next step belongs to, after a resume too."""
        batches = len(self.callback_handler.train_dataloader)
        steps = -(-batches // self.args.gradient_accumulation_steps)
        return self.state.global_step // steps

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor to the device as it is.

        Under DeepSpeed, transformers 5.23 casts every floating input to the compute dtype; in
        bfloat16 a stored sum near -300 nats would move by up to 1.
        """
        if isinstance(data, (torch.Tensor, packed_dpo.PairPack)):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of an optimizer step, whose sizes weigh their losses."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = [len(batch["ref_chosen_logps"]) for batch in batches]
        self.pairs_seen += sum(self._micro_batches) * self.args.world_size
        return batches, items

    # -- steps ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's step, within which a pack's layout is kept for the recomputation in backward."""
        with packed_dpo.step():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, refused where it is not finite.

        With a token budget each micro-batch weighs as many as its pairs, so that an optimizer step
        is the mean over its pairs, not over micro-batches of unequal size.

        Raises:
            TrainingError: The loss is NaN or infinite; names the step.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss.detach()):
            raise self._not_finite(f"the loss is {loss.item()}")
        if not torch.is_grad_enabled():  # the holdout is measured
            return result
        self._useful.append(useful_work(inputs))
        if self.token_budget is not None and self._micro_batches:
            pairs = len(inputs["ref_chosen_logps"])
            loss = loss * (pairs * len(self._micro_batches) / sum(self._micro_batches))
        return (loss, result[1]) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of a step's gradients.

        A finite loss may have gradients that are not, and after the last step no loss would show
        what they made of the weights.

        Raises:
            TrainingError: The norm is not finite; names the step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed says -1 where a norm is not finite.
        if norm is not None and not 0 <= float(norm) < math.inf:
            raise self._not_finite("the norm of the gradients is not finite")
        return norm

    def _not_finite(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.state.global_step + 1} on rank {self.args.process_index}; lower"
            f" train.learning_rate (now {self.args.learning_rate:g}) or train.max_grad_norm, or set"
            f" train.bf16: false, {HOW_TO_GO_ON}"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights; under DeepSpeed transformers copies them on ranks that write none."""
        if (
            self.is_deepspeed_enabled
            and not self.args.should_save
            and not gathers_weights(self.accelerator)
        ):
            return
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics, with the speed since the last log and the peak memory."""
        if "loss" in logs:
            seconds, pairs, tokens = self._since
            useful = [counts.tolist() for counts in self._useful]
            self.restart_clock()
            elapsed = max(self._since[0] - seconds, 1e-9)
            logs["pairs_per_s"] = (self.pairs_seen - pairs) / elapsed
            logs["tokens_per_s"] = (self._total_train_tokens - tokens) / elapsed
            done = sum(self._flops.total(*counts) for counts in useful)
            logs["model_flops_per_s"] = done / elapsed
            logs["peak_memory_gib"] = peak_memory_gib()
        super().log(logs, start_time)

    def restart_clock(self) -> None:
        """Leave what has passed until now, such as saving, out of the next log's speed."""
        self._since = (time.perf_counter(), self.pairs_seen, self._total_train_tokens)
        self._useful.clear()


def useful_work(inputs: dict[str, Any]) -> torch.Tensor:
    """What a micro-batch has to compute, each prompt once and no padding; int64 (3,).

    Tokens, tokens of completions, and keys attended, summed over the tokens.
    """
    pairs = len(inputs["ref_chosen_logps"])
    lengths, completions = (inputs[n].sum(dim=1) for n in ("attention_mask", "completion_mask"))
    again = (lengths - completions)[pairs:]  # prompts of the rejected rows
    keys = (lengths * (lengths + 1)).sum() - (again * (again + 1)).sum()
    return torch.stack([lengths.sum() - again.sum(), completions.sum(), keys // 2])


def training_flops(model: Any) -> Flops:
    """Operations of training, counted as `refscale plan` counts them.

    The forward's, counted as for scoring, and twice that backward; with LoRA once, since the base
    has no weight gradients. Recomputation is left out, as MFU has it.
    """
    lora = is_peft_model(model)
    forward = Flops.of(model.get_base_model() if lora else model)
    passes = 2.0 if lora else 3.0
    return Flops(*(passes * value for value in astuple(forward)))


def peak_memory_gib() -> float:
    """Peak memory of this rank in GiB: allocated on its GPU, else resident in its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


@contextlib.contextmanager
def _without_model_hash() -> Iterator[None]:
    """Keep TRL from hashing all weights for a cache that is not used: 32 GB for an 8B model."""
    original = trl_dpo.hash_module
    trl_dpo.hash_module = lambda module: ""
    try:
        yield
    finally:
        trl_dpo.hash_module = original
