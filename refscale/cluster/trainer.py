"""DPO on Ray Train: a TorchTrainer whose workers each run `run_worker`.

Resume is by name: the same fingerprint gives the same run name, and Ray Train then hands the latest
checkpoint to the workers, after the death of a worker as after that of the driver. Checkpoints go
to the run folder once per node (its local rank 0 uploads for it), in the background. What a
checkpoint costs: one write to the node's own disk while training waits, and its upload beside the
next steps; training waits for that where the next one is due first, so that a node holds two at
most. A worker killed before the upload is done resumes from the checkpoint before. From an object
store a node fetches what its ranks read of a checkpoint, and deletes it before the first step.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

import refscale.errors
from refscale.cluster.room import Room, attempts_within
from refscale.cluster.snapshot import KEPT_BY, checkpoint_metrics, mend_snapshot
from refscale.errors import RefscaleError, StorageError, TrainingError
from refscale.storage.fingerprints import digest
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store
from refscale.training.checkpoints import files_to_load
from refscale.training.log import TrainingLog, plain
from refscale.training.options import WorkerSettings

__all__ = ["train_on_ray", "work_folder"]

logger = logging.getLogger(__name__)

_FAILED = "FAILED.json"
_TENSORBOARD = "tensorboard"
_FETCHED = "fetched"  # a checkpoint, in the work folder
_UPLOAD_LOOKED_AT_EVERY_S = 0.5
# Where the workers fit and yet do not start, for example because the system kills them.
_STARTS_WITHIN_S = 600.0


def train_on_ray(
    settings: WorkerSettings,
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
    wait_for_room_s: float,
) -> dict[str, Any]:
    """Train and put the policy into `policy`.

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
        checkpoints_kept: Checkpoints kept in the run folder: the latest ones; where the holdout is
            measured (`eval_steps`), those with the lowest loss on it, and the latest.
        wait_for_room_s: Seconds, in all, of waiting for nodes with room for the workers; 0 where
            the cluster never grows.

    Returns:
        Rank 0's final metrics, as JSON can hold them; `resumed` says whether a checkpoint was used.

    Raises:
        ConfigError: The workers do not fit on a cluster that never grows.
        RefscaleError: That a worker raised, as it was raised.
        TrainingError: Workers died more often than `max_failures`, or room for them did not come.
    """
    store = folder.store
    store.delete(folder.file(_FAILED))
    resources = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    room, grows = Room(resources, num_workers), wait_for_room_s > 0
    if not grows:
        room.require()
    mend_snapshot(store, folder.file(f"checkpoints/{name}"))
    filesystem, checkpoints = store.filesystem(folder.file("checkpoints"))
    score = {"checkpoint_score_attribute": KEPT_BY, "checkpoint_score_order": "min"}
    trainer = _Trainer(
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
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            # Not its URI: Ray opens those of pyarrow alone.
            storage_path=checkpoints,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=attempts_within(
                    wait_for_room_s if grows else _STARTS_WITHIN_S
                ),
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=checkpoints_kept, **(score if settings.train["eval_steps"] else {})
            ),
            worker_runtime_env=worker_env(gpus_per_worker, ray.cluster_resources().get("GPU", 0)),
        ),
    )
    try:
        with room:
            result = trainer.fit()
    except Exception as exc:
        # A worker that said what failed is the cause, whatever room is left since.
        if not store.exists(folder.file(_FAILED)):
            lacking = room.missing() or (room.held() if _is_unplaced(exc) else None)
            if lacking:
                raise TrainingError(
                    f"{lacking}; ray.wait_for_room_s bounds the wait; the same command resumes from"
                    " the last checkpoint"
                ) from exc
        raise _worker_error(store, folder, exc) from exc
    if result.error is not None or store.exists(folder.file(_FAILED)):
        raise _worker_error(store, folder, result.error) from result.error
    # `result.metrics` are those of the last checkpoint, which is older than the end.
    return dict(result.return_value)


def worker_env(gpus_per_worker: float, gpus: float) -> dict[str, Any]:
    """The runtime environment of workers that are given so many of the cluster's GPUs.

    Ray hides none from a worker without any, and torch would compute on what it sees.
    """
    hidden = gpus > 0 and not gpus_per_worker
    return {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if hidden else {}


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to Python.

    Ray's own handler ends the process with exit code 0, and stays after the training, where it
    swallows the first two.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        """Registers none."""


def _is_unplaced(exc: Exception) -> bool:
    """Whether Ray Train gave up on placing the workers."""
    failure = exc.controller_failure if isinstance(exc, ControllerError) else None
    return isinstance(failure, WorkerGroupStartupTimeoutError)


def _worker_error(store: Store, folder: StageFolder, exc: BaseException | None) -> RefscaleError:
    if store.exists(folder.file(_FAILED)):
        failed = store.read_json(folder.file(_FAILED))
        kind = getattr(refscale.errors, failed["type"], TrainingError)
        return kind(failed["message"])
    return TrainingError(
        f"a training worker failed: {_said(exc)[:300]}; the same command resumes from the last"
        " checkpoint"
    )


def _said(exc: BaseException | None) -> str:
    """What an exception says, in one line; of failed workers, the likeliest to be the cause."""
    failures: dict[int, Exception] = getattr(exc, "worker_failures", {})
    raised = [failures[rank] for rank in sorted(failures)]
    # Ray's own are of a worker that died; what another raises then is of its missing peer.
    died = [failure for failure in raised if type(failure).__module__.startswith("ray.")]
    if raised and not died:
        return " ".join(f"{type(raised[0]).__name__}: {raised[0]}".split())
    # Their last line says why.
    text = str(died[0] if died else exc)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    folder: StageFolder = config["folder"]
    # A refusal repeats itself, so the restart that Ray Train grants to a failure ends here. It was
    # raised all the same: ranks that wait for this one in a collective must be torn down. What a
    # store could not do now it may do then.
    if folder.store.exists(folder.file(_FAILED)):
        return {}
    try:
        return _run(config, ray.train.get_context())
    except StorageError:
        raise
    except RefscaleError as exc:
        failed = {"type": type(exc).__name__, "message": str(exc)}
        folder.store.write_json(folder.file(_FAILED), failed)
        raise


def _run(config: Mapping[str, Any], context: Any) -> dict[str, Any]:
    import torch

    from refscale.training.worker import run_worker

    folder: StageFolder = config["folder"]
    policy: StageFolder = config["policy"]
    store, first_of_node = folder.store, context.get_local_rank() == 0
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    work = work_folder(folder, config["name"])
    leftovers = [work / name for name in ("upload", "checkpoints", "policy", _FETCHED)]
    if first_of_node:
        _remove(*leftovers)  # of a killed attempt
        # Of trainings with other options that failed: the run's lock excludes one at the same time.
        others = work.parent.glob(work_folder(folder, "*").name)
        _remove(*(other for other in others if other != work))
    checkpoint = ray.train.get_checkpoint()
    settings = _settings(config["settings"], folder, work, context.get_world_rank())
    log = TrainingLog(folder, resumed=checkpoint is not None)

    def publish() -> None:
        if context.get_world_rank() == 0:
            log.publish()
            if not store.is_local and settings.tensorboard_dir is not None:
                store.upload_folder(settings.tensorboard_dir, folder.file(_TENSORBOARD))

    uploading = ""

    def on_save(saved: str, metrics: dict[str, Any]) -> None:
        nonlocal uploading
        step = int(saved.rpartition("-")[2])
        name = f"checkpoint-{step:08d}"
        report: dict[str, Any] = {"metrics": checkpoint_metrics(metrics, step)}
        if first_of_node:
            _await_upload(uploading)
            uploading = name
            # Out of the trainer's way, which deletes its old folders, also half-uploaded ones.
            upload = work / "upload" / Path(saved).name
            upload.parent.mkdir(exist_ok=True)
            os.replace(saved, upload)
            report.update(
                checkpoint=Checkpoint.from_directory(upload),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=True,
            )
        ray.train.report(checkpoint_dir_name=name, **report)
        try:
            publish()
        except StorageError as exc:
            logger.warning("the log is not published now: %s", exc)  # the next time has all of it

    def drop_fetched() -> None:
        if first_of_node:
            _remove(work / _FETCHED)

    @contextmanager
    def best_checkpoint() -> Iterator[str]:
        yield _fetch(_best_checkpoint(), store, work, settings, context, best=True)
        ray.train.collective.barrier()  # the other ranks of this node have read it too
        drop_fetched()

    try:
        metrics = run_worker(
            settings,
            on_log=log.add,
            on_save=on_save,
            resume_from=_fetch(checkpoint, store, work, settings, context) if checkpoint else None,
            on_loaded=drop_fetched,
            best_checkpoint=best_checkpoint,
        )
    finally:
        drop_fetched()
    publish()
    if context.get_world_rank() == 0:
        store.upload_folder(settings.policy_dir, policy.stage)
    _remove(work / f"rank-{context.get_world_rank()}")
    if first_of_node:
        _remove(work / "checkpoints", work / "policy", work / _TENSORBOARD)
        for left in (work / "upload", work):  # what is still being uploaded stays
            with suppress(OSError):
                left.rmdir()
    return plain({**metrics, "resumed": checkpoint is not None})


def work_folder(folder: StageFolder, name: str) -> Path:
    """Where the workers of this node write for a training of a run, whatever else runs here.

    Equal on all ranks of a node: DeepSpeed writes one checkpoint folder together.
    """
    whose = f"{os.getuid()}-{digest(folder.store.uri)[:8]}"
    return Path(tempfile.gettempdir()) / f"refscale-{whose}-{name}"


def _fetch(
    checkpoint: Checkpoint,
    store: Store,
    work: Path,
    settings: WorkerSettings,
    context: Any,
    *,
    best: bool = False,
) -> str:
    """Folder of a checkpoint; a copy of what this node's ranks read where the store is not local.

    Collective.

    Args:
        checkpoint: One that is in the run folder.
        store: The run folder.
        work: This node's work folder.
        settings: Of this worker.
        context: Ray Train's.
        best: As for `files_to_load`.
    """
    if store.is_local:
        return str(checkpoint.path)
    first_of_node, target = context.get_local_rank() == 0, work / _FETCHED
    if first_of_node:
        _remove(target)
    ray.train.collective.barrier()
    source = PurePosixPath(checkpoint.path).relative_to(store.path("")).as_posix()
    names = [name.removeprefix(f"{source}/") for name in store.list_files(source, recursive=True)]
    own, shared = files_to_load(names, settings.train, context.get_world_rank(), best=best)
    wanted = [*own, *(shared if first_of_node else ())]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.fetch(f"{source}/{name}", str(target)), wanted))
    ray.train.collective.barrier()
    return str(target / source)


def _await_upload(name: str) -> None:
    """Wait until this worker's checkpoint is in the run folder; an empty name is none.

    A failed upload ends the attempt, and this wait with it.
    """
    started = time.monotonic()
    while name and not _is_uploaded(name):
        time.sleep(_UPLOAD_LOOKED_AT_EVERY_S)
    if time.monotonic() - started > _UPLOAD_LOOKED_AT_EVERY_S:
        logger.warning(
            "the upload of %s took longer than train.save_steps: training waited %.0f s for it",
            name,
            time.monotonic() - started,
        )


def _is_uploaded(name: str) -> bool:
    latest = ray.train.get_checkpoint()
    return latest is not None and PurePosixPath(latest.path).name >= name


def _best_checkpoint() -> Checkpoint:
    """The checkpoint with the lowest loss on the holdout; waits until all are uploaded.

    Raises:
        TrainingError: None was measured.
    """
    measured = [
        (reported.metrics["eval_loss"], reported.checkpoint)
        for reported in ray.train.get_all_reported_checkpoints()
        if "eval_loss" in reported.metrics
    ]
    if not measured:
        raise TrainingError("no checkpoint was measured on the holdout; its loss is not finite")
    _, best = min(measured, key=lambda loss_and_checkpoint: loss_and_checkpoint[0])
    return best


def _settings(given: WorkerSettings, folder: StageFolder, work: Path, rank: int) -> WorkerSettings:
    """`given` with this worker's own folders, and with selection files that it can open."""
    store, own = folder.store, work / f"rank-{rank}"
    tensorboard = None
    if "tensorboard" in given.train["report_to"]:
        local = store.path(folder.file(_TENSORBOARD)) if store.is_local else work / _TENSORBOARD
        tensorboard = str(local)
    return replace(
        given,
        selection_files=[store.fetch(file, str(own)) for file in given.selection_files],
        holdout_files=[store.fetch(file, str(own)) for file in given.holdout_files],
        output_dir=str(work / "checkpoints"),
        policy_dir=str(work / "policy"),
        cache_dir=str(own / "datasets"),
        tensorboard_dir=tensorboard,
    )


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
