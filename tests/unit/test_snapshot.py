"""A mended list of checkpoints, as Ray's own manager reads it."""

import asyncio
import json
import shutil

import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from refscale.cluster.snapshot import KEPT_BY, SNAPSHOT, checkpoint_metrics, mend_snapshot
from refscale.storage.store import Store

FOLDER = "training/checkpoints/dpo-0123456789ab"
SCORED = {"checkpoint_score_attribute": KEPT_BY, "checkpoint_score_order": "min"}


def manager(root, **config):
    """Ray's, of the training in a run folder; reads the list where there is one."""
    storage = StorageContext(str(root / "training/checkpoints"), FOLDER.rpartition("/")[2])
    return CheckpointManager(CheckpointConfig(**config), storage)


def write_checkpoint(root, step, losses):
    folder = root / FOLDER / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    logs = [{"step": at, "eval_loss": loss} for at, loss in losses.items() if at <= step]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    return folder


def train(root, losses, **config):
    """Checkpoints as a training reports them: of each step a loss on the holdout, or None."""
    measured = {step: loss for step, loss in losses.items() if loss is not None}

    async def report():
        ray_manager = manager(root, **config)
        for step in losses:
            folder = write_checkpoint(root, step, measured)
            metrics = checkpoint_metrics({"eval_loss": losses[step]}, step)
            ray_manager.register_checkpoint(
                _TrainingReport(Checkpoint(str(folder)), metrics, validation=False)
            )
            await asyncio.sleep(0)

    asyncio.run(report())
    return root / FOLDER / SNAPSHOT


def steps(results):
    return [int(result.checkpoint.path.rpartition("-")[2]) for result in results]


def known(ray_manager):
    """Steps of the checkpoints as Ray orders them, the worst first, and of the latest."""
    latest = ray_manager.latest_checkpoint_result
    return steps(ray_manager._checkpoint_results), steps([latest] if latest else [])


def indices(ray_manager):
    return [
        ray_manager._checkpoint_to_report_index[result.checkpoint]
        for result in ray_manager._checkpoint_results
    ]


LOSSES = {2: 0.5, 4: 0.3, 6: 0.4}


@pytest.mark.parametrize(
    ("config", "deleted", "left"),
    [
        ({}, [2], ([4, 6], [6])),
        ({}, [6], ([2, 4], [4])),
        (SCORED, [4], ([2, 6], [6])),
        (SCORED, [6], ([2, 4], [4])),
        (SCORED, [2, 4, 6], ([], [])),
    ],
    ids=["oldest", "latest", "best", "latest of measured ones", "all"],
)
def test_a_checkpoint_that_is_gone_is_dropped(tmp_path, capsys, config, deleted, left):
    train(tmp_path, LOSSES, **config)
    before = manager(tmp_path, **config)
    known_before = dict(zip(known(before)[0], indices(before), strict=True))
    for step in deleted:
        shutil.rmtree(tmp_path / FOLDER / f"checkpoint-{step:08d}")
    with pytest.raises(CheckpointManagerInitializationError):
        manager(tmp_path, **config)
    mend_snapshot(Store(tmp_path), FOLDER)
    mended = manager(tmp_path, **config)
    assert known(mended) == left
    assert indices(mended) == [known_before[step] for step in left[0]]
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"checkpoint-{step:08d}" in said for step in deleted)
    assert f"goes on from checkpoint-{left[1][0]:08d}" in said if left[1] else "anew" in said


@pytest.mark.parametrize("kept_bytes", [0, 200])
@pytest.mark.parametrize(
    ("config", "losses", "left"),
    [
        # The newest may be half uploaded.
        ({}, dict.fromkeys((2, 4, 6)), ([2, 4], [4])),
        (SCORED, {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.1}, ([4, 6, 2], [6])),
        (SCORED, {2: 0.3, 4: None, 6: float("nan"), 8: 0.1}, ([4, 6, 2], [6])),
        ({}, {2: None}, ([2], [2])),
    ],
    ids=["by step", "by loss", "not all measured", "only one"],
)
def test_a_torn_list_is_made_anew_of_the_checkpoints_that_are_there(
    tmp_path, capsys, config, losses, left, kept_bytes
):
    snapshot = train(tmp_path, losses, **config)
    snapshot.write_bytes(snapshot.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointManagerInitializationError):
        manager(tmp_path, **config)
    mend_snapshot(Store(tmp_path), FOLDER)
    mended = manager(tmp_path, **config)
    assert known(mended) == left
    # In the order in which Ray would have them had it been there.
    mended._checkpoint_results.sort(
        key=lambda result: (mended._get_checkpoint_score(result), result.metrics["step"])
    )
    assert known(mended) == left
    said = " ".join(capsys.readouterr().err.split())
    assert SNAPSHOT in said and f"goes on from checkpoint-{left[1][0]:08d}" in said


def test_a_checkpoint_that_was_not_measured_or_diverged_is_kept_for_no_measured_one(tmp_path):
    losses = {2: None, 4: float("nan"), 6: 0.6, 8: 0.5, 10: 0.55, 12: 0.7}
    train(tmp_path, losses, num_to_keep=2, **SCORED)
    kept, latest = known(manager(tmp_path, num_to_keep=2, **SCORED))
    assert latest == [12] and {8, 12} <= set(kept) <= {8, 10, 12}


def test_a_true_list_and_none_are_left_as_they_are(tmp_path, capsys):
    mend_snapshot(Store(tmp_path), FOLDER)
    assert not list(tmp_path.iterdir())
    snapshot = train(tmp_path, LOSSES, num_to_keep=2)
    before = snapshot.read_bytes()
    mend_snapshot(Store(tmp_path), FOLDER)
    assert snapshot.read_bytes() == before
    assert known(manager(tmp_path)) == ([4, 6], [6])
    assert capsys.readouterr().err == ""


def test_a_list_of_another_ray_is_left_to_ray(tmp_path):
    snapshot = train(tmp_path, LOSSES)
    other = json.dumps({"ray_version": "9.0.0", "checkpoints": []})
    snapshot.write_text(other)
    mend_snapshot(Store(tmp_path), FOLDER)
    assert snapshot.read_text() == other
