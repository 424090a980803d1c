"""One DPO worker: TRL's DPOTrainer on the selection, with the stored reference sums.

In: the selection's parquet files (token ids and `ref_*_logps`), with `eval_steps` held-out pairs
too, the reference model's folder and plain settings. Out: a policy folder that
`AutoModelForCausalLM` loads, checkpoints, and one dict of metrics a log. Runs alone or as one rank
of an initialised `torch.distributed` group; no Ray here.

Cost per pair: one policy forward and backward. No reference model is in memory and none is run: TRL
reads the two stored sums instead. The parts, in the order in which they are used:

    options        what a worker is told; DPOConfig, DeepSpeed and LoRA arguments
    data           the selection as a dataset
    policy         the model to train, and how it is saved
    dpo_trainer    TRL's trainer without a reference model
    packed_dpo     its packed steps; token_batches its micro-batches by tokens
    start_check    does the policy start where the reference was scored?
    checkpoints    what may be resumed from
    log            one dict of metrics a step
"""

import json
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    # DeepSpeed picks its accelerator when it is first imported, which trl's import may do.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig

from refscale.errors import ConfigError, TrainingError
from refscale.training import packed_dpo
from refscale.training.checkpoints import (
    CHECKPOINT_FILE,
    HOW_TO_GO_ON,
    check_checkpoint,
    checkpoint_record,
)
from refscale.training.data import easy_to_hard, load_selection, pair_tokens
from refscale.training.dpo_trainer import PrecomputedDPOTrainer, peak_memory_gib
from refscale.training.options import WorkerSettings, dpo_arguments
from refscale.training.policy import (
    check_adapter,
    keep_generation_config,
    load_policy,
    model_card,
    save_policy,
)
from refscale.training.presets import Device, peft_config
from refscale.training.start_check import packed_check, positions_check, start_check

__all__ = ["WorkerSettings", "join_ranks", "run_worker"]

logger = logging.getLogger(__name__)


def run_worker(
    settings: WorkerSettings,
    *,
    on_log: Callable[[dict[str, Any]], None],
    on_save: Callable[[str, dict[str, Any]], None],
    resume_from: str | None = None,
    on_loaded: Callable[[], None] | None = None,
    best_checkpoint: Callable[[], AbstractContextManager[str]] | None = None,
) -> dict[str, Any]:
    """Train the policy: what each rank runs.

    Args:
        settings: The same on every rank.
        on_log: Called on rank 0 with each log's metrics; a second time for a step at which the
            holdout is measured, with its metrics beside the others.
        on_save: Called on every rank with the folder of a checkpoint that all ranks have finished
            writing on this node, and the latest metrics (empty off rank 0). It may move the folder
            away; else `save_total_limit` of them stay on rank 0's node, and all on others.
        resume_from: A checkpoint folder that `on_save` got, with what `files_to_load` names for the
            ranks of this node.
        on_loaded: Called on every rank when all have read what they need of `resume_from`.
        best_checkpoint: Called on every rank after the last step where `load_best_model_at_end` is
            set; gives the folder of the checkpoint with the lowest `eval_loss`.

    Returns:
        The final metrics; those of the last log are in rank 0's only. `policy_step` is the step
        whose weights the policy has. `train_loss` is absent where a resumed training logged none.

    Raises:
        ConfigError: The training options are wrong.
        ModelError: The model or tokenizer cannot be loaded.
        TrainingError: The start check fails, loss or gradients are not finite, memory runs out, or
            `resume_from` is not a checkpoint of this training.
    """
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    _quieten()
    arguments = dpo_arguments(
        settings.train,
        output_dir=settings.output_dir,
        device=device,
        bf16=settings.bf16,
        max_length=settings.max_length,
    )
    if resume_from is not None:
        check_checkpoint(resume_from, settings)
    dataset = load_selection(settings.selection_files, settings.cache_dir)
    holdout = (
        load_selection(settings.holdout_files, settings.cache_dir)
        if settings.train["eval_steps"]
        else None
    )
    sequential = settings.train["order"] == "easy_to_hard"
    if sequential:
        dataset = easy_to_hard(dataset, settings.easiest)
    budget = settings.train["token_budget"]
    if holdout is not None and budget and "per_device_eval_batch_size" not in settings.train["trl"]:
        longest = int(pair_tokens(holdout, padded=True).max())
        arguments["per_device_eval_batch_size"] = max(1, budget // longest)
    reporter = _Reporter(settings, on_log, on_save, on_loaded if resume_from else None)
    trainer: PrecomputedDPOTrainer | None = None
    try:
        # Before the model: transformers partitions weights while loading once it knows of ZeRO-3.
        joined = join_ranks(arguments, device)
        with _trl_refuses():
            args = DPOConfig(**{**arguments, **joined})
        if settings.tensorboard_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = settings.tensorboard_dir
        model, tokenizer = load_policy(settings, device)
        positions_check(model, int(pair_tokens(dataset, padded=True).max()) // 2)
        reporter.path_reason = (
            "train.packed is off"
            if settings.train["packed"] == "off"
            else packed_dpo.refusal(
                model, torch.device(device), settings.train["trl"].get("router_aux_loss_coef")
            )
        )
        with _trl_refuses():
            trainer = PrecomputedDPOTrainer(
                model=model,
                args=args,
                train_dataset=dataset,
                eval_dataset=holdout,
                processing_class=tokenizer,
                peft_config=peft_config(settings.train["peft"]),
                callbacks=[reporter],
                sequential=sequential,
                packed=reporter.path_reason is None,
                token_budget=budget,
            )
        trainer.remove_callback(PrinterCallback)
        if settings.train["peft"]:
            check_adapter(trainer.model)
        reporter.trainer = trainer
        if budget:
            reporter.choose_path_early()
        metrics = _train(trainer, resume_from)
        metrics["policy_step"] = metrics["steps"]
        if settings.train["load_best_model_at_end"]:
            assert best_checkpoint is not None, "who starts the worker knows its checkpoints"
            with best_checkpoint() as folder:
                metrics["policy_step"] = _load_best(trainer, folder, settings)
        metrics = {
            **{k: v for k, v in reporter.latest.items() if isinstance(v, (int, float))},
            **reporter.start,
            **metrics,
            "train_path": reporter.path(),
            "num_pairs": len(dataset),
            "peak_memory_gib": peak_memory_gib(),
        }
        save_policy(trainer, tokenizer, settings, model_card(settings, metrics))
    except (torch.OutOfMemoryError, RuntimeError) as exc:
        if not _is_out_of_memory(exc):
            raise
        raise TrainingError(_out_of_memory(settings, trainer, exc)) from exc
    return metrics


@contextmanager
def _trl_refuses() -> Iterator[None]:
    """Options whose values TRL, transformers or peft refuse are the user's to change."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError, re.error) as exc:
        what = " ".join(str(exc).split())[:300]
        raise ConfigError(f"the options of the section train cannot be used: {what}") from exc


def _train(trainer: PrecomputedDPOTrainer, resume_from: str | None) -> dict[str, Any]:
    try:
        output = trainer.train(resume_from_checkpoint=resume_from)
    except _AlreadyTrained:
        return {"steps": trainer.state.global_step, **_logged_loss(trainer)}
    # That of transformers begins at the checkpoint.
    loss = {"train_loss": output.training_loss} if resume_from is None else _logged_loss(trainer)
    return {
        "steps": output.global_step,
        **loss,
        "train_runtime_s": output.metrics["train_runtime"],
        "pairs_per_s": trainer.pairs_seen / output.metrics["train_runtime"],
    }


def _logged_loss(trainer: PrecomputedDPOTrainer) -> dict[str, float]:
    """`train_loss`: the mean loss of all steps, from the logs; none where none was logged."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if not logs:
        return {}
    # Each is the mean since the one before.
    weights = np.diff([log["step"] for log in logs], prepend=0)
    return {"train_loss": float(np.average([log["loss"] for log in logs], weights=weights))}


def _load_best(trainer: PrecomputedDPOTrainer, folder: str, settings: WorkerSettings) -> int:
    """Give the trainer the weights of a checkpoint; the step they are of."""
    check_checkpoint(folder, settings)  # before its pickles are read
    step = int(json.loads((Path(folder) / "trainer_state.json").read_text())["global_step"])
    if step != trainer.state.global_step:
        trainer.state.best_model_checkpoint = folder
        trainer._load_best_model()
    return step


class _AlreadyTrained(Exception):
    """The checkpoint resumed from is the last one; transformers 5.23 would train a step more."""


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Start check, logs and checkpoints, as the trainer's events."""

    def __init__(
        self,
        settings: WorkerSettings,
        on_log: Callable[[dict[str, Any]], None],
        on_save: Callable[[str, dict[str, Any]], None],
        on_loaded: Callable[[], None] | None,
    ) -> None:
        self.settings = settings
        self.report, self.saved, self.loaded = on_log, on_save, on_loaded
        self.trainer: PrecomputedDPOTrainer | None = None
        self.start: dict[str, float] = {}
        self.latest: dict[str, Any] = {}
        self.path_reason: str | None = None  # why steps are padded; None while they are packed
        self.path_chosen = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "the trainer is attached before train()"
        keep_generation_config(self.trainer.model)
        # A checkpoint's state comes with the steps at which it was logged, measured and saved.
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained
        if not self.path_chosen:
            self._choose_path()
            if self.settings.train["token_budget"] and self.path_reason:
                raise TrainingError(
                    f"train.token_budget has planned packed micro-batches, but {self.path_reason};"
                    " set train.packed: off"
                )
        if state.global_step == 0:  # a resumed policy has left the reference
            self.start = start_check(
                self.trainer,
                self.trainer.model_wrapped,
                self.settings.train["start_check_pairs"],
                scored_in_bf16=self.settings.scored_in_bf16,
            )
        self.trainer.restart_clock()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.loaded is None:
            return
        assert self.trainer is not None, "the trainer is attached before train()"
        # Random states are read last, just before the first step.
        self.trainer.accelerator.wait_for_everyone()
        self.loaded()
        self.loaded = None

    def choose_path_early(self) -> None:
        """Choose the path before train(), which plans a token budget's micro-batches by it.

        Not where the model has no whole weights before that: ZeRO-3 gathers them in its engine.
        """
        assert self.trainer is not None, "the trainer is attached before train()"
        if self.path_reason is None:
            if is_deepspeed_zero3_enabled():
                return
            if self.trainer.is_deepspeed_enabled and not self.settings.quantization:
                # Its engine would place the model in a moment.
                self.trainer.model.to(self.trainer.args.device)
        with self.trainer.accelerator.autocast():  # which train() puts into the model
            self._choose_path()

    def _choose_path(self) -> None:
        """Keep packed steps where they are exact for this model, and say which are taken."""
        assert self.trainer is not None, "the trainer is attached before train()"
        self.path_chosen = True
        collator = self.trainer.data_collator
        if self.path_reason is None and isinstance(collator, packed_dpo.PackedCollator):
            pairs = max(self.settings.train["start_check_pairs"], 2)
            self.path_reason = packed_check(self.trainer, self.trainer.model_wrapped, pairs)
            collator.packed = self.path_reason is None
        if self.path_reason and self.settings.train["packed"] == "on":
            raise TrainingError(
                f"train.packed is on, but {self.path_reason}; set train.packed: auto"
            )
        if self.trainer.is_world_process_zero():
            logger.info("training steps are %s", self.path())

    def path(self) -> str:
        """packed, or padded with the reason."""
        return f"padded: {self.path_reason}" if self.path_reason else "packed"

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not {"loss", "eval_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        # The holdout is measured after a step is logged, and belongs to the same row.
        same_step = self.latest.get("step") == state.global_step
        self.latest = {
            **(self.latest if same_step else {}),
            **logs,
            "step": state.global_step,
            "max_steps": state.max_steps,
            **(self.start if state.global_step <= 1 else {}),
        }
        self.report(dict(self.latest))

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "the trainer is attached before train()"
        self.trainer.restart_clock()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "the trainer is attached before train()"
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (folder / CHECKPOINT_FILE).write_text(json.dumps(checkpoint_record(self.settings)))
        self.trainer.accelerator.wait_for_everyone()
        self.saved(str(folder), dict(self.latest))
        self.trainer.restart_clock()


def join_ranks(arguments: dict[str, Any], device: Device) -> dict[str, Any]:
    """Join the ranks where DeepSpeed needs it; more DPOConfig arguments.

    Accelerate 1.15 ignores DeepSpeed where `use_cpu` is set and takes several ranks for one where
    it is not, so on the CPU the state is made here and handed over.

    Args:
        arguments: `dpo_arguments`, for DPOConfig.
        device: Where the model computes.
    """
    if arguments["deepspeed"] is None:
        return {}
    if "LOCAL_RANK" not in os.environ:  # no launcher: DeepSpeed wants a group of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    if device == "cuda":
        return {}
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    # Its shared-memory all-reduce serves tensor-parallel inference only and would be compiled here:
    # half a minute, and a failure on a machine without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type = DistributedType.DEEPSPEED
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = dict(arguments.get("accelerator_config") or {})
    return {"accelerator_config": {**config, "use_configured_state": True}}


def _is_out_of_memory(exc: BaseException) -> bool:
    text = str(exc)
    return isinstance(exc, torch.OutOfMemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def _out_of_memory(
    settings: WorkerSettings, trainer: PrecomputedDPOTrainer | None, exc: BaseException
) -> str:
    train = settings.train
    step = trainer.state.global_step + 1 if trainer is not None else 0
    advice = []
    twice = f"train.gradient_accumulation_steps: {train['gradient_accumulation_steps'] * 2}"
    if train["token_budget"]:
        advice.append(f"train.token_budget: {train['token_budget'] // 2} with {twice} (same batch)")
    elif train["per_device_train_batch_size"] > 1:
        half = train["per_device_train_batch_size"] // 2
        advice.append(f"train.per_device_train_batch_size: {half} with {twice} (same batch)")
    if not train["gradient_checkpointing"]:
        advice.append("train.gradient_checkpointing: true")
    if train["deepspeed"] not in ("zero3", "zero3_offload"):
        advice.append("train.deepspeed: zero3")
    elif train["deepspeed"] == "zero3":
        advice.append("train.deepspeed: zero3_offload")
    advice.append(f"a smaller encoding.max_length (now {settings.max_length})")
    what = str(exc).strip().splitlines()[0][:160]
    return f"out of memory at step {step} ({what}); set {', or '.join(advice)}, {HOW_TO_GO_ON}"


def _quieten() -> None:
    """Leave what a user can act on; DeepSpeed and transformers say each start what they do."""
    disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "deepspeed", "transformers", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.WARNING)
