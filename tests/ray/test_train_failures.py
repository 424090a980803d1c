"""DPO on Ray Train: killed workers and drivers cost steps but change nothing; refusals end it."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_training_zero import Trained, assert_same_policy, settings_of, trained

from refscale.cluster import trainer
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


def work_of(run: Path) -> Path:
    """Where the workers of this node write."""
    return work_folder(StageFolder(Store(str(run)), "training"), name_of(run))


def train(
    run: Path, settings: WorkerSettings, *, max_failures: int = 0, num_workers: int = 2
) -> dict[str, Any]:
    store = Store(str(run))
    return train_on_ray(
        settings,
        StageFolder(store, "training"),
        StageFolder(store, "policy"),
        name=name_of(run),
        num_workers=num_workers,
        cpus_per_worker=1,
        gpus_per_worker=0,
        threads=1,
        max_failures=max_failures,
        checkpoints_kept=2,
        wait_for_room_s=0,
    )


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
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError, match=r"^score.quantization is 4bit but train.peft"):
        train(tmp_path, settings, max_failures=3, num_workers=1)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c  # Ray would have left its own there


def test_workers_that_never_fit_are_refused_at_once(
    ray_session: None, trained: Trained, tmp_path: Path
) -> None:
    settings = worker_settings(trained.inputs, tmp_path)
    with pytest.raises(ConfigError, match=r"num_workers is 9, of 1 CPU each, .* room for 8"):
        train(tmp_path, settings, num_workers=9)


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
