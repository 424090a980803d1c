"""One DPO worker: TRL's DPOTrainer on the selection, with the stored reference sums.

In: the selection's parquet files (token ids and `ref_*_logps`), the reference model's folder and
plain settings. Out: a policy folder that `AutoModelForCausalLM` loads, checkpoints, and one dict of
metrics a log. Runs alone or as one rank of an initialised `torch.distributed` group; no Ray here.

Cost per pair: one policy forward and backward. No reference model is in memory and none is run: TRL
reads the two stored sums instead. What that gives up: losses that need more of the reference than
its plain sums (`ld_alpha`, a reference that follows the policy) are refused.

Precision. Where the compute dtype is bfloat16 and DeepSpeed or LoRA is used, weights are loaded in
bfloat16: DeepSpeed's optimizer keeps its own float32 masters, LoRA's adapters are float32.
Otherwise weights are float32 (an AdamW step of 1e-6 vanishes in bfloat16's 8 bits) and bfloat16 is
autocast.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

if not torch.cuda.is_available():
    # DeepSpeed picks its accelerator when it is first imported, which trl's import may do.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets
import transformers
import trl
import trl.trainer.dpo_trainer as trl_dpo
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from refscale.errors import ConfigError, ModelError, TrainingError
from refscale.training_options import Device, dpo_arguments, peft_config

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# A checkpoint's optimizer state is a pickle: it is loaded only from folders that hold this file.
CHECKPOINT_FILE = "refscale_checkpoint.json"
CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class WorkerSettings:
    """All that one worker needs, as plain picklable data; equal on every rank.

    Attributes:
        train: `TrainConfig.model_dump()`.
        model_name_or_path: The reference model, from which the policy starts.
        selection_files: Parquet files in `schema.SELECTION`, readable on every rank, in order.
        output_dir: Folder of checkpoints; the same path on every rank.
        policy_dir: Folder that rank 0 writes the policy to.
        max_length: `encoding.max_length`: the longest prompt + completion in the selection.
        bf16: Compute in bfloat16, resolved; should equal what the scores were computed in.
        revision: Hub revision of the model.
        adapter: LoRA adapter merged into the reference model before training.
        attn_implementation: As `ModelConfig`.
        chat_template: Path of a template that replaces the tokenizer's, saved with the policy.
        trust_remote_code: As `ModelConfig`.
        quantization: Load the base quantised (QLoRA); needs `train.peft`.
        easiest: Which end of the selection key is the clearest, for `order: easy_to_hard`.
        merge_adapter: With LoRA, write the merged model to `policy_dir` and the adapter to
            `policy_dir/adapter`; else only the adapter, to `policy_dir`.
        cache_dir: Where the selection is mapped from; default: datasets' own cache.
        fingerprint: Written to checkpoints and compared on resume; any text.
    """

    train: dict[str, Any]
    model_name_or_path: str
    selection_files: list[str]
    output_dir: str
    policy_dir: str
    max_length: int
    bf16: bool = False
    revision: str | None = None
    adapter: str | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["8bit", "4bit"] | None = None
    easiest: Literal["largest", "smallest"] = "largest"
    merge_adapter: bool = True
    cache_dir: str | None = None
    fingerprint: str = ""


def load_selection(files: list[str], cache_dir: str | None = None) -> datasets.Dataset:
    """The selection as a memory-mapped dataset, in the order of `files`.

    Args:
        files: Parquet files in `schema.SELECTION`; local paths or URIs.
        cache_dir: Where datasets keeps the mapped copy, shared by the ranks of a node.

    Raises:
        TrainingError: There is no pair, a column is missing, a stored sum is not finite, or a
            completion is empty.
    """
    if not files:
        raise TrainingError("the selection has no files; run `refscale select` first")
    try:
        # datasets 5.2 fails on a file without rows, which a shard without kept pairs is.
        filled = [file for file in files if _num_rows(file)]
        if not filled:
            raise TrainingError(
                "the selection holds no pair; widen select.fraction or its threshold"
            )
        dataset = datasets.Dataset.from_parquet(filled, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise TrainingError(f"cannot read the selection {files[0]} …: {exc}") from exc
    check_columns(dataset)
    table = dataset.data.table
    for name in REF_COLUMNS:
        column = table.column(name)
        bad = pc.sum(pc.invert(pc.fill_null(pc.is_finite(column), False))).as_py()
        if bad:
            raise TrainingError(
                f"{name} of {bad} of {len(dataset)} selected pairs is null or not finite;"
                " run `refscale score` and `select` again"
            )
    for name in ("chosen_ids", "rejected_ids"):
        if pc.min(pc.list_value_length(table.column(name))).as_py() < 1:
            raise TrainingError(f"the selection holds a pair with empty {name}")
    return dataset


def _num_rows(file: str) -> int:
    with fsspec.open(file, "rb") as handle:
        return pq.read_metadata(handle).num_rows


def check_columns(dataset: datasets.Dataset) -> None:
    """Refuse a dataset without ids or stored sums.

    Raises:
        TrainingError: A column is missing.
    """
    missing = [c for c in (*ID_COLUMNS, *REF_COLUMNS) if c not in dataset.column_names]
    if missing:
        raise TrainingError(
            f"the selection lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)};"
            " training reuses stored reference sums and never computes them"
        )


class PrecomputedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on encoded pairs with stored reference sums; builds no reference model.

    Overrides three private methods of TRL 1.16 (`_prepare_dataset`, `_precompute_ref_logps`,
    `_send_telemetry`), which the contract tests in tests/unit/test_training.py hold to account.

    Args:
        *args: As `DPOTrainer`.
        sequential: Take pairs in the dataset's order instead of shuffled.
        **kwargs: As `DPOTrainer`; `ref_model` must be absent.

    Raises:
        TrainingError: A reference model was passed, or the dataset lacks stored sums.
    """

    def __init__(self, *args: Any, sequential: bool = False, **kwargs: Any) -> None:
        if kwargs.get("ref_model") is not None:
            raise TrainingError("a reference model was passed; the stored sums replace it")
        self.sequential = sequential
        with _without_model_hash():
            super().__init__(*args, **kwargs)

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

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor to the device as it is.

        Under DeepSpeed, transformers 5.23 casts every floating input to the compute dtype; in
        bfloat16 a stored sum near -300 nats would move by up to 1.
        """
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sequential:
            return SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, refused where it is not finite.

        Raises:
            TrainingError: The loss is NaN or infinite; names the step.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss.detach()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} on rank"
                f" {self.args.process_index}; lower train.learning_rate (now"
                f" {self.args.learning_rate:g}) or train.max_grad_norm, or set train.bf16: false"
            )
        return result


@contextlib.contextmanager
def _without_model_hash() -> Iterator[None]:
    """Keep TRL from hashing all weights for a cache that is not used: 32 GB for an 8B model."""
    original = trl_dpo.hash_module
    trl_dpo.hash_module = lambda module: ""
    try:
        yield
    finally:
        trl_dpo.hash_module = original


def logps_budget(logps: np.ndarray, num_tokens: np.ndarray, *, bf16: bool) -> np.ndarray:
    """How far a policy's sum may lie from the stored one at step 0, in nats, per sequence.

    float32: two correct implementations differ by rounding of about 1e-6 relative a token, which
    adds up like a random walk; 1e-2 leaves a factor of ten over what was seen at 1,000 tokens, and
    1e-5 of the sum covers longer ones.

    bfloat16: 8 bits of mantissa put about 0.05 nats of noise on a token's log-prob, 0.05 sqrt(n) on
    a sum of n, of which four standard deviations are allowed, plus 1 % of the sum for the bias that
    differently rounded weights (autocast against bfloat16 weights) leave.

    Args:
        logps: Stored sums, nats.
        num_tokens: Completion tokens of each.
        bf16: Whether either side was computed in bfloat16.
    """
    if bf16:
        return 0.2 * np.sqrt(num_tokens) + 0.01 * np.abs(logps) + 0.1
    return 1e-2 + 1e-5 * np.abs(logps)


def start_check(trainer: DPOTrainer, model: Any, num_pairs: int) -> dict[str, float]:
    """Compare the policy's sums with the stored ones before the first step.

    Every rank forwards the same pairs, spread evenly over the dataset, through the wrapped model,
    so that partitioned (ZeRO-3) weights are gathered as in training.

    Args:
        trainer: The trainer, whose `train_dataset` holds the pairs.
        model: The wrapped model.
        num_pairs: Pairs compared; 0 skips the check.

    Returns:
        start_check_pairs, start_check_max_difference (nats), start_check_loss (sigmoid DPO loss;
        ln 2 = 0.6931 where policy and reference agree). Empty when skipped.

    Raises:
        TrainingError: A sum is out of budget: names the pair, both values and the likely cause.
    """
    dataset = trainer.train_dataset
    num_pairs = min(num_pairs, len(dataset))
    if num_pairs == 0:
        return {}
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_pairs).astype(int)).tolist()
    step = trainer.args.per_device_train_batch_size
    stored, policy, tokens = [], [], []
    training = model.training
    model.eval()
    for begin in range(0, len(rows), step):
        examples = [dataset[row] for row in rows[begin : begin + step]]
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kwargs = {k: v for k, v in batch.items() if k not in ("completion_mask", *REF_COLUMNS)}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            outputs = model(**kwargs, labels=labels, fused_lm_head=True, use_cache=False)
        sums = outputs.log_probs.float().sum(dim=1)
        policy.append(torch.stack(sums.chunk(2), dim=1).cpu().numpy())
        counts = batch["completion_mask"][:, 1:].sum(dim=1)
        tokens.append(torch.stack(counts.chunk(2), dim=1).cpu().numpy())
        stored.append(torch.stack([batch[c] for c in REF_COLUMNS], dim=1).cpu().numpy())
    model.train(training)
    stored_P2, policy_P2 = np.concatenate(stored), np.concatenate(policy)
    difference = np.abs(policy_P2 - stored_P2)
    budget = logps_budget(stored_P2, np.concatenate(tokens), bf16=trainer.args.bf16)
    outside = ~(difference <= budget)
    if outside.any():
        worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference - budget)))
        i, side = divmod(worst, 2)
        row = dataset[rows[i]]
        pair_id = row.get("pair_id")
        name = pair_id.hex() if isinstance(pair_id, bytes) else f"in row {rows[i]}"
        raise TrainingError(
            f"the policy does not start at the reference: pair {name} has stored"
            f" {REF_COLUMNS[side]} {stored_P2[i, side]:.4f} but the policy gives"
            f" {policy_P2[i, side]:.4f} (allowed difference {budget[i, side]:.4f};"
            f" {int(outside.sum())} of {outside.size} sums are off). {_likely_cause(trainer)}"
        )
    gap = (policy_P2 - stored_P2) @ np.array([1.0, -1.0])
    loss = float(np.mean(np.log1p(np.exp(-trainer.beta * gap))))
    return {
        "start_check_pairs": float(len(rows)),
        "start_check_max_difference": float(difference.max()),
        "start_check_loss": loss,
    }


def _likely_cause(trainer: DPOTrainer) -> str:
    dtype = "bfloat16" if trainer.args.bf16 else "float32"
    return (
        "Likely: training starts from another checkpoint, revision or adapter than the one that"
        f" scored, or computes in {dtype} and the scores did not; with those equal, score again"
    )


class _AlreadyTrained(Exception):
    """The checkpoint resumed from is the last one; transformers 5.23 would train a step more."""


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Start check, logs and checkpoints, as the trainer's events."""

    def __init__(
        self,
        settings: WorkerSettings,
        on_log: Callable[[dict[str, Any]], None],
        on_save: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.settings = settings
        self.report, self.saved = on_log, on_save
        self.trainer: PrecomputedDPOTrainer | None = None
        self.start: dict[str, float] = {}
        self.latest: dict[str, Any] = {}
        self.since = (0.0, 0, 0.0)  # time, steps and tokens at the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "the trainer is attached before train()"
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained
        if state.global_step == 0:  # a resumed policy has left the reference
            self.start = start_check(
                self.trainer, self.trainer.model_wrapped, self.settings.train["start_check_pairs"]
            )
        self.since = (time.perf_counter(), state.global_step, self.trainer._total_train_tokens)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        now, steps, tokens = time.perf_counter(), state.global_step, logs.get("num_tokens", 0)
        seconds = max(now - self.since[0], 1e-9)
        pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.latest = {
            **logs,
            "step": steps,
            "max_steps": state.max_steps,
            "pairs_per_s": (steps - self.since[1]) * pairs / seconds,
            "tokens_per_s": (tokens - self.since[2]) / seconds,
            "peak_memory_gib": peak_memory_gib(),
            **(self.start if steps <= 1 else {}),
        }
        self.since = (now, steps, tokens)
        self.report(dict(self.latest))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "the trainer is attached before train()"
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (folder / CHECKPOINT_FILE).write_text(json.dumps(_checkpoint_record(self.settings)))
        self.trainer.accelerator.wait_for_everyone()
        self.saved(str(folder), dict(self.latest))
        self.since = (time.perf_counter(), state.global_step, self.trainer._total_train_tokens)


def run_worker(
    settings: WorkerSettings,
    *,
    on_log: Callable[[dict[str, Any]], None],
    on_save: Callable[[str, dict[str, Any]], None],
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Train the policy: what each rank runs.

    Args:
        settings: The same on every rank.
        on_log: Called on rank 0 with each log's metrics.
        on_save: Called on every rank with the folder of a checkpoint that all ranks have finished
            writing on this node, and the latest metrics (empty off rank 0). TRL keeps
            `save_total_limit` folders on rank 0's node; other nodes' are the callee's to remove.
        resume_from: A checkpoint folder that `on_save` got, with the files of all ranks.

    Returns:
        The final metrics; those of the last log are in rank 0's only.

    Raises:
        ConfigError: The training options are wrong.
        ModelError: The model or tokenizer cannot be loaded.
        TrainingError: The start check fails, the loss is not finite, memory runs out, or
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
    sequential = settings.train["order"] == "easy_to_hard"
    if sequential:
        dataset = easy_to_hard(dataset, settings.easiest)
    reporter = _Reporter(settings, on_log, on_save)
    trainer: PrecomputedDPOTrainer | None = None
    try:
        # Before the model: transformers partitions weights while loading once it knows of ZeRO-3.
        args = DPOConfig(**arguments, **_prepare_distributed(arguments, device))
        model, tokenizer = load_policy(settings, device)
        trainer = PrecomputedDPOTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config(settings.train["peft"]),
            callbacks=[reporter],
            sequential=sequential,
        )
        trainer.remove_callback(PrinterCallback)
        reporter.trainer = trainer
        metrics = _train(trainer, resume_from)
        metrics = {
            **{k: v for k, v in reporter.latest.items() if isinstance(v, (int, float))},
            **reporter.start,
            **metrics,
            "num_pairs": len(dataset),
            "peak_memory_gib": peak_memory_gib(),
        }
        save_policy(trainer, tokenizer, settings, model_card(settings, metrics))
    except (torch.OutOfMemoryError, RuntimeError) as exc:
        if not _is_out_of_memory(exc):
            raise
        raise TrainingError(_out_of_memory(settings, trainer, exc)) from exc
    return metrics


def _train(trainer: DPOTrainer, resume_from: str | None) -> dict[str, Any]:
    try:
        output = trainer.train(resume_from_checkpoint=resume_from)
    except _AlreadyTrained:
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return {"steps": trainer.state.global_step, "train_loss": float(np.mean(losses))}
    return {
        "steps": output.global_step,
        "train_loss": output.training_loss,
        "train_runtime_s": output.metrics["train_runtime"],
        "pairs_per_s": output.metrics["train_samples_per_second"],
    }


def _prepare_distributed(arguments: dict[str, Any], device: Device) -> dict[str, Any]:
    """Join the ranks where DeepSpeed needs it; more DPOConfig arguments.

    Accelerate 1.15 ignores DeepSpeed where `use_cpu` is set and takes several ranks for one where
    it is not, so on the CPU the state is made here and handed over.
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


def easy_to_hard(
    dataset: datasets.Dataset, easiest: Literal["largest", "smallest"]
) -> datasets.Dataset:
    """`dataset` ordered by selection key, the clearest pairs first; ties keep their order."""
    keys = np.asarray(dataset.with_format("numpy")["selection_key"][:], dtype=np.float32)
    order = np.argsort(-keys if easiest == "largest" else keys, kind="stable")
    return dataset.select(order)


def load_policy(settings: WorkerSettings, device: Device) -> tuple[Any, Any]:
    """The model to train and its tokenizer.

    Raises:
        ConfigError: A quantised base without LoRA.
        ModelError: They cannot be loaded.
    """
    train = settings.train
    if settings.quantization and not train["peft"]:
        raise ConfigError(
            f"score.quantization is {settings.quantization} but train.peft is not set: quantised"
            " weights cannot be trained; add e.g. train.peft: {r: 16}, or score unquantised"
        )
    half = settings.bf16 and bool(train["deepspeed"] or train["peft"])
    hub = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    kwargs: dict[str, Any] = {**hub, "dtype": torch.bfloat16 if half else torch.float32}
    if settings.attn_implementation:
        kwargs["attn_implementation"] = settings.attn_implementation
    if settings.quantization:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=settings.quantization == "4bit",
            load_in_8bit=settings.quantization == "8bit",
            bnb_4bit_compute_dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        )
        kwargs["device_map"] = {"": torch.cuda.current_device()} if device == "cuda" else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path, **hub)
        with _whole_weights(when=settings.adapter is not None):
            model = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, **kwargs)
            if settings.adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, settings.adapter).merge_and_unload()
    except (OSError, ValueError, ImportError, KeyError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load {settings.model_name_or_path} for training: {first}"
        ) from exc
    if settings.chat_template:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return model, tokenizer


@contextlib.contextmanager
def _whole_weights(*, when: bool) -> Iterator[None]:
    """Load unpartitioned under ZeRO-3: an adapter can be merged into whole weights only.

    DeepSpeed partitions them when the engine starts; until then each rank holds the whole model.
    """
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    if when:
        hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def save_policy(trainer: DPOTrainer, tokenizer: Any, settings: WorkerSettings, card: str) -> None:
    """Write the policy as safetensors, with its tokenizer and card; collective, rank 0 writes.

    With LoRA and `merge_adapter`, rank 0 loads the base once more on the CPU, unquantised, and
    merges the adapter into it.
    """
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model_wrapped)
        # DeepSpeed's copy of a tied head no longer shares memory and would be saved a second time.
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in every - {name for name, _ in model.named_parameters()}:
            state.pop(name, None)
        folder = Path(settings.policy_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lora = bool(settings.train["peft"])
        target = folder / "adapter" if lora and settings.merge_adapter else folder
        model.save_pretrained(target, state_dict=state)
        if lora and settings.merge_adapter:
            from peft import PeftModel

            plain = dataclasses.replace(settings, quantization=None)
            with _whole_weights(when=True):
                base, _ = load_policy(plain, "cpu")
                merged = PeftModel.from_pretrained(base, str(target)).merge_and_unload()
            merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    del state
    accelerator.wait_for_everyone()


def model_card(settings: WorkerSettings, metrics: dict[str, Any]) -> str:
    """The policy's README.md: what it was made from, with what, and the numbers of its training."""
    train = settings.train
    base = settings.model_name_or_path
    hub_id = "" if os.path.isdir(base) else f"base_model: {base}\n"
    shown = {
        "pairs": metrics["num_pairs"],
        "optimizer steps": metrics["steps"],
        "loss": f"{train['loss_type']}, beta {train['beta']:g}",
        "learning rate": f"{train['learning_rate']:g}, {train['lr_scheduler_type']}",
        "pairs a step": train["per_device_train_batch_size"]
        * train["gradient_accumulation_steps"]
        * train["num_workers"],
        "order": train["order"],
        "LoRA": json.dumps(train["peft"]) if train["peft"] else "no",
        "compute": "bfloat16" if settings.bf16 else "float32",
        "seed": train["seed"],
        "training fingerprint": settings.fingerprint or "none",
    }
    names = ("train_loss", "rewards/accuracies", "rewards/margins", "start_check_loss")
    shown.update({name: f"{metrics[name]:.4f}" for name in names if name in metrics})
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, trl))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{hub_id}"
        "tags: [dpo, preference, refscale]\n---\n\n"
        f"# DPO policy from {Path(base).name if not hub_id else base}\n\n"
        "Trained on a selection of preference pairs, with the reference log-probabilities that made"
        " the selection. `rewards/…` are of the last logged step.\n\n"
        f"| | |\n|---|---|\n{rows}\n\nMade with {versions}.\n"
    )


def _checkpoint_record(settings: WorkerSettings) -> dict[str, Any]:
    """What must be equal for a checkpoint to be resumed from."""
    train = settings.train
    return {
        "format": CHECKPOINT_FORMAT,
        "fingerprint": settings.fingerprint,
        # Optimizer shards are one a rank, and the sampler deals out by rank.
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "deepspeed": train["deepspeed"],
        "model": settings.model_name_or_path,
        "max_length": settings.max_length,
        "bf16": settings.bf16,
        "peft": train["peft"],
        "per_device_train_batch_size": train["per_device_train_batch_size"],
        "gradient_accumulation_steps": train["gradient_accumulation_steps"],
        "order": train["order"],
        "seed": train["seed"],
    }


def check_checkpoint(folder: str, settings: WorkerSettings) -> None:
    """Refuse to resume from a folder that is not a checkpoint of this very training.

    Raises:
        TrainingError: Our record is missing or differs; the field and both values are named.
    """
    path = Path(folder) / CHECKPOINT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TrainingError(
            f"{folder} is not a checkpoint of refscale: {CHECKPOINT_FILE} cannot be read"
            f" ({exc.__class__.__name__}); its optimizer state is a pickle and is not loaded"
        ) from exc
    expected = json.loads(json.dumps(_checkpoint_record(settings)))
    for key, value in expected.items():
        if found.get(key) != value:
            raise TrainingError(
                f"cannot resume from {folder}: {key} was {found.get(key)!r} and is now {value!r};"
                " set it back, or train anew with --restart"
            )


def peak_memory_gib() -> float:
    """Peak memory of this rank in GiB: allocated on its GPU, else resident in its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


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
    if train["per_device_train_batch_size"] > 1:
        half = train["per_device_train_batch_size"] // 2
        advice.append(
            f"train.per_device_train_batch_size: {half} with train.gradient_accumulation_steps:"
            f" {math.ceil(train['gradient_accumulation_steps'] * 2)} (same batch)"
        )
    if not train["gradient_checkpointing"]:
        advice.append("train.gradient_checkpointing: true")
    if train["deepspeed"] not in ("zero3", "zero3_offload"):
        advice.append("train.deepspeed: zero3")
    elif train["deepspeed"] == "zero3":
        advice.append("train.deepspeed: zero3_offload")
    advice.append(f"a smaller encoding.max_length (now {settings.max_length})")
    what = str(exc).strip().splitlines()[0][:160]
    return f"out of memory at step {step} ({what}); set {', or '.join(advice)}"


def _quieten() -> None:
    """Leave what a user can act on; DeepSpeed and transformers say each start what they do."""
    disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "deepspeed", "transformers", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.WARNING)
