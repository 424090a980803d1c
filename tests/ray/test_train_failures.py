"""DPO on Ray Train: killed workers and drivers cost steps but change nothing; refusals end it."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
import ray.train.collective
from ray.train import Checkpoint
from test_training_zero import Trained, assert_same_policy, settings_of, trained

from refscale.cluster import room, trainer
from refscale.cluster.snapshot import SNAPSHOT
from refscale.cluster.trainer import train_on_ray, work_folder
from refscale.config import TrainConfig
from refscale.errors import ConfigError, StorageError, TrainingError
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store
from refscale.training.log import read_log
from refscale.training.options import WorkerSettings

__all__ = ["trained"]  # a fixture, which pytest finds by its name here

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 6


def worker_settings(inputs: Path, run: Path, **train: Any) -> WorkerSettings:
    """Settings whose selection lies in the run, as the pipeline's do."""
    (run / "selection").mkdir(parents=True)
    (run / "selection" / "shard.parquet").symlink_to(inputs / "selection.parquet")
    fields = settings_of(inputs, run, deepspeed="zero2", max_steps=STEPS, save_steps=2, **train)
    fields["train"] = TrainConfig.model_validate(fields["train"]).model_dump()
    fields["selection_files"] = ["selection/shard.parquet"]
    return WorkerSettings(**fields)


def name_of(run: Path) -> str:
    return f"test-{run.parent.name}-{run.name}"


def copied_by_ray() -> set[Path]:
    """Ray's own copies of checkpoints on this node."""
    return set(Path(tempfile.gettempdir()).glob("checkpoint_tmp_*"))


def work_of(run: Path) -> Path:
    """Where the workers of this node write."""
    return work_folder(StageFolder(Store(str(run)), "training"), name_of(run))


def train(
    run: Path, settings: WorkerSettings, store: Store | None = None, **changes: Any
) -> dict[str, Any]:
    """Of a run in its folder, or in `store`."""
    store = store or Store(str(run))
    options: dict[str, Any] = {
        "num_workers": 2,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "threads": 1,
        "max_failures": 0,
        "checkpoints_kept": 2,
        "wait_for_room_s": 0,
    }
    folders = StageFolder(store, "training"), StageFolder(store, "policy")
    return train_on_ray(settings, *folders, name=name_of(run), **{**options, **changes})


def dying(loop: Callable, kills: dict[int, Path]) -> Callable:
    """`loop`, but rank 1 is killed in each of the steps of `kills`, once: a file remembers."""

    def dying_loop(config: dict[str, Any]) -> Any:
        from refscale.training.dpo_trainer import PrecomputedDPOTrainer

        training_step = PrecomputedDPOTrainer.training_step

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = training_step(self, *args, **kwargs)  # after backward, before the update
            mark = kills.get(self.state.global_step + 1)
            if mark is not None and self.args.process_index == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        PrecomputedDPOTrainer.training_step = step
        return loop(config)

    return dying_loop


def test_killed_workers_and_a_new_driver_end_with_the_weights_of_an_undisturbed_run(
    ray_session: None, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One death is survived; the second ends the command, and the next command goes on.
    settings = worker_settings(trained.inputs, tmp_path, report_to=["tensorboard"])
    kills = {5: tmp_path / "first", 6: tmp_path / "second"}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_loop", dying(trainer._train_loop, kills))
        with pytest.raises(TrainingError, match="the same command resumes from the last"):
            train(tmp_path, settings, max_failures=1)
    assert all(mark.exists() for mark in kills.values())
    assert not (tmp_path / "policy").exists()
    # Of a list with one that was deleted to free space, before those that are there.
    (snapshot,) = (tmp_path / "training" / "checkpoints").glob(f"*/{SNAPSHOT}")
    listed = json.loads(snapshot.read_bytes())
    gone = {**listed["checkpoint_results"][0], "checkpoint_dir_name": "checkpoint-00000001"}
    listed["checkpoint_results"].insert(0, gone)
    listed["checkpoint_report_indices"].insert(0, -1)
    snapshot.write_text(json.dumps(listed))
    metrics = train(tmp_path, settings)
    assert metrics["resumed"] is True
    assert metrics["steps"] == STEPS
    assert metrics["train_path"] == "packed"
    assert_log_and_checkpoints(tmp_path)
    # float32 and fixed seeds: repeated steps equal the undisturbed ones to the last bits.
    assert_same_policy(tmp_path / "policy", trained.out / "zero2" / "policy", 1e-6)
    events = b"".join(f.read_bytes() for f in (tmp_path / "training/tensorboard").glob("events.*"))
    assert b"train/rewards/margins" in events
    assert b"train/tokens_per_s" in events
    assert not work_of(tmp_path).exists()


def assert_log_and_checkpoints(run: Path) -> None:
    rows = read_log(StageFolder(Store(str(run)), "training"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in (
        "loss",
        "rewards/chosen",
        "rewards/margins",
        "rewards/accuracies",
        "grad_norm",
        "learning_rate",
        "pairs_per_s",
        "tokens_per_s",
        "peak_memory_gib",
    ):
        assert all(isinstance(row[name], float) for row in rows), name
    (name,) = {path.parent for path in (run / "training" / "checkpoints").rglob("checkpoint-*")}
    kept = sorted(path.name for path in name.iterdir() if path.is_dir())
    assert kept == ["checkpoint-00000004", "checkpoint-00000006"]
    # Both ranks' optimizer shards and random states, once each.
    files = [path.name for path in (name / kept[-1]).rglob("*") if path.is_file()]
    assert len(files) == len(set(files))
    assert {"rng_state_0.pth", "rng_state_1.pth", "refscale_checkpoint.json"} <= set(files)
    assert sum(name.endswith("optim_states.pt") for name in files) == 2


def test_a_refusal_is_not_tried_again_and_reads_as_it_was_raised(
    ray_session: None, trained: Trained, tmp_path: Path
) -> None:
    settings = replace(worker_settings(trained.inputs, tmp_path), quantization="4bit")
    # What failed trainings left: this run's with other options, and another run's.
    mine, another = (
        work_folder(StageFolder(Store(str(tmp_path / run)), "training"), "dpo-0123456789ab")
        for run in (".", "another")
    )
    for left in (mine, another):
        (left / "rank-0").mkdir(parents=True)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError, match=r"^score.quantization is 4bit but train.peft"):
        train(tmp_path, settings, max_failures=3, num_workers=1)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c  # Ray would have left its own there
    assert not mine.exists() and another.exists() and work_of(tmp_path).exists()
    shutil.rmtree(another)


def test_workers_that_never_fit_are_refused_at_once(
    ray_session: None, trained: Trained, tmp_path: Path
) -> None:
    settings = worker_settings(trained.inputs, tmp_path)
    with pytest.raises(ConfigError, match=r"num_workers is 9, of 1 CPU each, .* room for 8"):
        train(tmp_path, settings, num_workers=9)


def test_room_that_others_hold_is_waited_for_and_named(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    monkeypatch.setattr(room, "_LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(room, "_SAY_EVERY_S", 2.0)
    others = ray.util.placement_group([{"CPU": 7}])
    try:
        ray.get(others.ready(), timeout=60)
        held = "train.num_workers is 2, of 1 CPU each, and other work on the cluster holds the room"
        with pytest.raises(TrainingError, match=f"^{held}.* ray.wait_for_room_s bounds the wait"):
            train(tmp_path, SimpleNamespace(train={"eval_steps": None}), wait_for_room_s=3)
    finally:
        ray.util.remove_placement_group(others)
    # Of 6 s or more of waiting, it is said every 2 s.
    assert " ".join(capsys.readouterr().err.split()).count(f"waiting for room: {held}") >= 2


def test_a_store_that_fails_for_a_while_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StageFolder(Store(str(tmp_path)), "training")

    def failing(*_: Any) -> None:
        raise StorageError("cannot write training/log.jsonl: SLOW_DOWN")

    class Context:
        """Ray Train's, outside of a worker."""

    monkeypatch.setattr(trainer.ray.train, "get_context", Context)
    monkeypatch.setattr(trainer, "_run", failing)
    with pytest.raises(StorageError):
        trainer._train_loop({"folder": folder})
    monkeypatch.setattr(trainer, "_run", lambda *_: {"steps": 6})
    assert trainer._train_loop({"folder": folder}) == {"steps": 6}


def test_trainings_of_two_runs_never_share_a_work_folder(tmp_path: Path) -> None:
    folders = {
        work_folder(StageFolder(Store(str(tmp_path / run)), "training"), "dpo-0123456789ab")
        for run in ("a", "b")
    }
    assert len(folders) == 2


def test_a_training_on_an_object_store_resumes_from_a_copy_that_is_gone_before_its_first_step(
    ray_session: None, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    best = {"eval_steps": 2, "load_best_model_at_end": True}
    settings = worker_settings(trained.inputs, tmp_path, **best)
    store = Store(s3.uri(f"trained-{tmp_path.name}"))
    store.upload_folder(str(tmp_path / "selection"), "selection")
    settings = replace(settings, holdout_files=settings.selection_files)
    work = work_folder(StageFolder(store, "training"), name_of(tmp_path))
    loop, seen = dying(trainer._train_loop, {5: tmp_path / "killed"}), tmp_path / "seen"

    def watching(config: dict[str, Any]) -> Any:
        from refscale.training import worker

        check = worker.check_checkpoint

        def step_begins(self: Any, *args: Any, **kwargs: Any) -> None:
            begun(self, *args, **kwargs)
            if self.trainer.args.process_index == 0:  # which deletes it
                with seen.open("a") as file:
                    file.write(f"step {(work / 'fetched').exists()}\n")

        def check_checkpoint(checkpoint: str, settings: Any) -> None:
            files = [path.name for path in Path(checkpoint).rglob("*") if path.is_file()]
            with seen.open("a") as file:
                file.write(f"read {Path(checkpoint).is_relative_to(work)} {sorted(files)}\n")
            check(checkpoint, settings)

        begun = worker._Reporter.on_step_begin
        worker._Reporter.on_step_begin = step_begins
        worker.check_checkpoint = check_checkpoint
        try:
            return loop(config)
        finally:
            worker._Reporter.on_step_begin, worker.check_checkpoint = begun, check

    monkeypatch.setattr(trainer, "_train_loop", watching)
    copies = copied_by_ray()
    metrics = train(tmp_path, settings, store, max_failures=1)
    assert metrics["resumed"] is True and metrics["steps"] == STEPS
    lines = seen.read_text().splitlines()
    assert {line for line in lines if line.startswith("step")} == {"step False"}
    read = {line for line in lines if line.startswith("read")}
    # Both ranks are of this node; the weights of safetensors are not what DeepSpeed reads.
    assert all(line.startswith("read True") and "model.safetensors" not in line for line in read)
    assert all("rank_0_mp" in line and "rank_1_mp" in line for line in read)
    assert store.exists("policy/model.safetensors")
    assert copied_by_ray() == copies and not (work / "fetched").exists()


class Context:
    """Ray Train's, of one rank."""

    def __init__(self, rank: int, local_rank: int) -> None:
        self.get_world_rank, self.get_local_rank = lambda: rank, lambda: local_rank


def test_a_node_fetches_what_its_ranks_read_and_nothing_of_a_killed_attempt(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    store = Store(s3.uri("fetched"))
    at = "training/checkpoints/dpo-0/checkpoint-00000004"
    store.upload_folder(str(trained.out / "zero2" / "checkpoints" / "checkpoint-4"), at)
    filesystem, path = store.filesystem(at)
    monkeypatch.setattr(ray.train.collective, "barrier", lambda: None)
    (tmp_path / "fetched" / "of" / "another").mkdir(parents=True)
    settings = WorkerSettings(**settings_of(trained.inputs, tmp_path, deepspeed="zero2"))
    folders = {
        trainer._fetch(
            Checkpoint(path, filesystem), store, tmp_path, settings, Context(rank, local_rank)
        )
        for rank, local_rank in ((2, 0), (1, 1))  # there is no shard 2
    }
    (folder,) = folders
    names = {file.name for file in Path(folder).rglob("*") if file.is_file()}
    assert {"mp_rank_00_model_states.pt", "rng_state_1.pth", "trainer_state.json"} <= names
    assert "model.safetensors" not in names and "rng_state_0.pth" not in names
    assert sum(name.endswith("optim_states.pt") for name in names) == 1
    assert not (tmp_path / "fetched" / "of").exists()
    # A local store is read in place.
    local = Checkpoint(str(trained.out), pafs.LocalFileSystem())
    here = Store(str(trained.out))
    assert trainer._fetch(local, here, tmp_path, settings, Context(0, 0)) == str(trained.out)


def test_a_checkpoint_waits_for_the_upload_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uploaded: list[Any] = [None]
    monkeypatch.setattr(trainer.ray.train, "get_checkpoint", lambda: uploaded[-1])
    monkeypatch.setattr(trainer, "_UPLOAD_LOOKED_AT_EVERY_S", 0.01)
    trainer._await_upload("")  # the first one
    waiting = threading.Thread(target=trainer._await_upload, args=("checkpoint-00000004",))
    waiting.start()
    for step, waits in ((2, True), (4, False)):
        uploaded.append(SimpleNamespace(path=f"bucket/run/checkpoint-{step:08d}"))
        waiting.join(0.2)
        assert waiting.is_alive() == waits
    assert "the upload of checkpoint-00000004 took longer than train.save_steps" in caplog.text


def test_a_failed_worker_is_named_by_what_it_raised_and_a_dead_one_by_why(tmp_path: Path) -> None:
    folder = StageFolder(Store(str(tmp_path)), "training")

    class Failed(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            super().__init__(
                "Training failed due to worker errors:\nTraceback\n\nFix these issues."
            )
            self.worker_failures = failures

    lines = ValueError("GenerationConfig is invalid: \n- `top_p`: unset it\n\nFix these issues.")
    lost = RuntimeError("Connection closed by peer")
    dead = ray.exceptions.RayActorError(error_msg="A worker died.\nIt was killed: SIGKILL")
    for failures, said in (
        ({1: lines}, "ValueError: GenerationConfig is invalid: - `top_p`: unset it Fix these"),
        ({0: lost, 1: dead}, "It was killed: SIGKILL; the same"),
    ):
        message = str(trainer._worker_error(folder.store, folder, Failed(failures)))
        assert message.startswith(f"a training worker failed: {said}"), message


@pytest.mark.parametrize("said", [True, False])
def test_what_a_worker_said_is_the_cause_whatever_room_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    store = Store(str(tmp_path))

    class Room:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

        def missing(self) -> str:
            return "the cluster has room for 1 of 2 workers"

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            if said:
                failed = {"type": "TrainingError", "message": "out of memory at step 3"}
                store.write_json("training/FAILED.json", failed)
            raise RuntimeError("the workers are gone")

    monkeypatch.setattr(trainer, "Room", Room)
    monkeypatch.setattr(trainer, "_Trainer", Trainer)
    monkeypatch.setattr(trainer.ray, "cluster_resources", dict)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, SimpleNamespace(train={"eval_steps": None}), wait_for_room_s=60)
    assert ("out of memory at step 3" in str(caught.value)) == said
    assert ("room for 1 of 2" in str(caught.value)) != said
