"""DPO on Ray Train: a TorchTrainer whose workers each run `training.run_worker`.

Resume is by name: the same fingerprint gives the same run name, and Ray Train then hands the latest
checkpoint to the workers, after the death of a worker as after that of the driver. Checkpoints go
to the run folder once per node (its local rank 0 uploads for it), in the background.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, FailureConfig

import refscale.errors
from refscale.errors import RefscaleError, TrainingError
from refscale.storage import StageFolder, Store

if TYPE_CHECKING:
    from refscale.training import WorkerSettings

LOG_FILE = "log.jsonl"
_FAILED = "FAILED.json"
_LOG_PUBLISHED_EVERY_S = 5.0


def train_on_ray(
    settings: "WorkerSettings",
    folder: StageFolder,
    policy: StageFolder,
    *,
    name: str,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    threads: int | None,
    max_failures: int,
    checkpoints_kept: int,
) -> dict[str, Any]:
    """Train and put the policy into `policy`; the final metrics.

    Args:
        settings: Of one worker; its selection files are relative to the run, its output folders
            are set here.
        folder: The training stage's folder: checkpoints and the log go there.
        policy: Where rank 0 puts the policy.
        name: Of the training; the same name resumes.
        num_workers: Data-parallel ranks.
        cpus_per_worker: Logical CPUs of each.
        gpus_per_worker: GPUs of each.
        threads: torch threads of each; None leaves torch's own number.
        max_failures: Failures of workers that are survived.
        checkpoints_kept: Checkpoints kept in the run folder.

    Raises:
        RefscaleError: That a worker raised, as it was raised.
        TrainingError: Workers died more often than `max_failures`.
    """
    store = folder.store
    store.delete(folder.file(_FAILED))
    storage = f"{store.uri.rstrip('/')}/{folder.stage}/checkpoints"
    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={
            "settings": settings,
            "folder": folder,
            "policy": policy,
            "name": name,
            "threads": threads,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={
                "CPU": cpus_per_worker,
                **({"GPU": gpus_per_worker} if gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints_kept),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as exc:
        raise _worker_error(store, folder, exc) from exc
    if result.error is not None:
        raise _worker_error(store, folder, result.error) from result.error
    return {key: value for key, value in (result.metrics or {}).items() if _is_plain(value)}


def _worker_error(store: Store, folder: StageFolder, exc: BaseException) -> RefscaleError:
    if store.exists(folder.file(_FAILED)):
        failed = store.read_json(folder.file(_FAILED))
        kind = getattr(refscale.errors, failed["type"], TrainingError)
        return kind(failed["message"])
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return TrainingError(
        f"a training worker failed: {lines[-1][:300] if lines else type(exc).__name__}; the same"
        " command resumes from the last checkpoint"
    )


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    folder: StageFolder = config["folder"]
    context = ray.train.get_context()
    # A refusal repeats itself: the restarts that Ray Train grants to failures must not try again.
    if folder.store.exists(folder.file(_FAILED)):
        raise TrainingError("refused in an earlier attempt")
    try:
        _run(config, context)
    except RefscaleError as exc:
        failed = {"type": type(exc).__name__, "message": str(exc)}
        folder.store.write_json(folder.file(_FAILED), failed)
        raise


def _run(config: Mapping[str, Any], context: Any) -> None:
    import torch

    from refscale.training import run_worker

    folder: StageFolder = config["folder"]
    policy: StageFolder = config["policy"]
    store = folder.store
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    # Equal on all ranks of a node: DeepSpeed writes one checkpoint folder together.
    work = os.path.join(tempfile.gettempdir(), f"refscale-{config['name']}")
    settings = replace(
        config["settings"],
        selection_files=[store.fetch(f, work) for f in config["settings"].selection_files],
        output_dir=os.path.join(work, "checkpoints"),
        policy_dir=os.path.join(work, "policy"),
        cache_dir=os.path.join(work, f"datasets-{context.get_world_rank()}"),
    )
    log = _Log(folder, resumed=ray.train.get_checkpoint() is not None)

    def on_save(checkpoint: str, metrics: dict[str, Any]) -> None:
        step = int(checkpoint.rstrip("/").rpartition("-")[2])
        report: dict[str, Any] = {"metrics": {**metrics, "step": step}}
        if context.get_local_rank() == 0:
            # Hard links: the trainer may delete its folder while this one is still uploading.
            clone = tempfile.mkdtemp(prefix="upload-", dir=work)
            shutil.copytree(checkpoint, clone, copy_function=os.link, dirs_exist_ok=True)
            report.update(
                checkpoint=Checkpoint.from_directory(clone),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=True,
            )
        ray.train.report(checkpoint_dir_name=f"checkpoint-{step:08d}", **report)

    with ExitStack() as stack:
        checkpoint = ray.train.get_checkpoint()
        resume = stack.enter_context(checkpoint.as_directory()) if checkpoint else None
        metrics = run_worker(settings, on_log=log.add, on_save=on_save, resume_from=resume)
    if context.get_world_rank() == 0:
        log.publish()
        store.upload_folder(settings.policy_dir, policy.stage)
    metrics["resumed"] = resume is not None
    ray.train.report({**metrics, "step": metrics["steps"]})
    if context.get_local_rank() == 0:
        shutil.rmtree(settings.policy_dir, ignore_errors=True)
        shutil.rmtree(settings.output_dir, ignore_errors=True)


class _Log:
    """Rank 0's metrics as JSON lines in the run folder, whole after each publishing."""

    def __init__(self, folder: StageFolder, *, resumed: bool) -> None:
        self._folder, self._published = folder, 0.0
        path = folder.file(LOG_FILE)
        self._rows: list[dict[str, Any]] = []
        if resumed and folder.store.exists(path):
            self._rows = read_log(folder)

    def add(self, row: dict[str, Any]) -> None:
        """One log; a step that is repeated after a resume replaces the earlier ones."""
        step = row.get("step", 0)
        self._rows = [old for old in self._rows if old.get("step", 0) < step]
        self._rows.append({key: value for key, value in row.items() if _is_plain(value)})
        if time.monotonic() - self._published > _LOG_PUBLISHED_EVERY_S:
            self.publish()

    def publish(self) -> None:
        """Write all rows."""
        self._published = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._folder.store.write_bytes(self._folder.file(LOG_FILE), text.encode())


def read_log(folder: StageFolder) -> list[dict[str, Any]]:
    """The training log, one dict a logged step."""
    path = folder.file(LOG_FILE)
    if not folder.store.exists(path):
        return []
    return [json.loads(line) for line in folder.store.read_bytes(path).decode().splitlines()]


def _is_plain(value: Any) -> bool:
    """A value that strict JSON can hold."""
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return isinstance(value, (int, str, bool))
