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


def until(said: list[str], lines: int) -> None:
    """Wait until so many lines are said."""
    deadline = time.monotonic() + 20
    while len(said) < lines and time.monotonic() < deadline:
        time.sleep(0.01)


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
    folder = StageFolder(Store(str(tmp_path)), "training")
    log = TrainingLog(folder, resumed=False)
    row = {"step": 2, "max_steps": 3, "loss": 0.5}
    with TrainingProgress(folder):
        log.add(row)
        until(said, 1)
        log.add({**row, "eval_loss": 0.25})
        log.publish()
        until(said, 2)
    assert said == [
        "train     step 2 of 3, loss 0.5000",
        "train     step 2 of 3, loss 0.5000, holdout loss 0.2500",
    ]


def test_the_progress_goes_on_after_a_read_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training_log, "say", said.append)
    monkeypatch.setattr(training_log, "_LOOKED_AT_EVERY_S", 0.01)
    folder = StageFolder(Store(str(tmp_path)), "training")
    TrainingLog(folder, resumed=False).add({"step": 2, "max_steps": 3})

    def failing(*_: Any) -> None:
        raise StorageError("cannot look at training/log.jsonl: SLOW_DOWN")

    with TrainingProgress(folder):
        until(said, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_info", failing)
            until(said, 2)
            time.sleep(0.1)  # the same failure is not said again
        until(said, 3)
    reason = "cannot look at training/log.jsonl: SLOW_DOWN"
    assert said == [
        "train     step 2 of 3",
        f"train     progress cannot be read now: {reason}",
        "train     step 2 of 3",
    ]


def test_the_progress_reads_the_end_of_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "_LAST_ROW_WITHIN_BYTES", 40)
    folder = StageFolder(Store(str(tmp_path)), "training")
    assert training_log.last_row(folder) == {}
    folder.store.write_bytes("training/log.jsonl", b"")
    assert training_log.last_row(folder) == {}
    # What is before it would be damage to read_log.
    folder.store.write_bytes("training/log.jsonl", b"\xff" * 100 + b'\n{"step": 7}\n')
    assert training_log.last_row(folder) == {"step": 7}
    folder.store.write_bytes("training/log.jsonl", b'{"step": 7}\n{"st')
    with pytest.raises(ValueError):
        training_log.last_row(folder)


class Clock:
    """Seconds that pass only where a test lets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("takes_s", "pause_s"),
    # A hundred times as long, within 5 s and 5 min.
    [(0.01, 5.0), (0.5, 50.0), (20.0, 300.0)],
)
def test_the_log_is_published_the_more_seldom_the_longer_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes_s: float, pause_s: float, fails: bool
) -> None:
    clock = Clock()
    published: list[float] = []

    def slow(*_: Any) -> None:
        published.append(clock.now)
        clock.now += takes_s
        if fails:
            raise StorageError("cannot write training/log.jsonl: SLOW_DOWN")

    monkeypatch.setattr(training_log, "time", clock)
    monkeypatch.setattr(Store, "write_bytes", slow)
    log = TrainingLog(StageFolder(Store(str(tmp_path)), "training"), resumed=False)
    log.add({"step": 1})
    clock.now = published[0] + takes_s + pause_s - 0.1
    log.add({"step": 2})
    assert len(published) == 1
    clock.now += 0.2
    log.add({"step": 3})
    assert len(published) == 2


def test_a_row_is_encoded_once_however_often_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StageFolder(Store(str(tmp_path)), "training")
    log = TrainingLog(folder, resumed=False)
    for step in range(3):
        log.add({"step": step})
    encoded: list[Any] = []
    monkeypatch.setattr(training_log.json, "dumps", encoded.append)
    log.publish()
    log.publish()
    assert encoded == []
    assert [row["step"] for row in read_log(folder)] == [0, 1, 2]


def test_the_log_is_read_without_torch_or_ray() -> None:
    code = "import sys, refscale.training.log; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
