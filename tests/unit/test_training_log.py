"""The log of a training: written by rank 0, read while and after it runs."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from refscale.errors import StorageError
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store
from refscale.training import log as training_log
from refscale.training.log import TrainingLog, TrainingProgress, read_log


def test_the_log_is_whole_lines_and_repeated_steps_replace_the_earlier(tmp_path: Path) -> None:
    folder = StageFolder(Store(str(tmp_path)), "training")
    log = TrainingLog(folder, resumed=False)
    assert read_log(folder) == []
    for step in (1, 2, 3):
        log.add({"step": step, "loss": float(step), "odd": float("nan"), "list": [1]})
    log.publish()
    resumed = TrainingLog(folder, resumed=True)
    resumed.add({"step": 2, "loss": 20.0})
    resumed.publish()
    assert read_log(folder) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 20.0}]
    TrainingLog(folder, resumed=False).publish()
    assert read_log(folder) == []


def test_a_damaged_log_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = StageFolder(Store(str(tmp_path)), "training")
    folder.store.write_bytes("training/log.jsonl", b'{"step": 1}\n{"st')
    log = TrainingLog(folder, resumed=True)
    assert "training/log.jsonl is damaged and begins anew" in caplog.text
    log.add({"step": 2})
    log.publish()
    assert read_log(folder) == [{"step": 2}]


def test_a_log_that_cannot_be_written_now_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StageFolder(Store(tmp_path), "training")
    log = TrainingLog(folder, resumed=False)

    def failing(*_: Any) -> None:
        raise StorageError("cannot write training/log.jsonl: SLOW_DOWN")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", failing)
        log.add({"step": 1, "loss": 0.7})
        with pytest.raises(StorageError):  # the end does not pass it over
            log.publish()
    log.add({"step": 2, "loss": 0.6})
    log.publish()
    assert [row["step"] for row in read_log(folder)] == [1, 2]


def test_the_progress_shows_a_step_again_when_the_holdout_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training_log, "say", said.append)
    monkeypatch.setattr(training_log, "_LOOKED_AT_EVERY_S", 0.01)
    monkeypatch.setattr(training_log, "_PUBLISHED_EVERY_S", 0.0)
    folder = StageFolder(Store(str(tmp_path)), "training")
    log = TrainingLog(folder, resumed=False)
    row = {"step": 2, "max_steps": 3, "loss": 0.5}

    def until(lines: int) -> None:
        deadline = time.monotonic() + 20
        while len(said) < lines and time.monotonic() < deadline:
            time.sleep(0.01)

    with TrainingProgress(folder):
        log.add(row)
        until(1)
        log.add({**row, "eval_loss": 0.25})
        until(2)
    assert said == [
        "train     step 2 of 3, loss 0.5000",
        "train     step 2 of 3, loss 0.5000, holdout loss 0.2500",
    ]


def test_the_log_is_read_without_torch_or_ray() -> None:
    code = "import sys, refscale.training.log; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
