"""The training log: one JSON line for each logged step, in `training/log.jsonl` of the run.

In: the metrics of a step. Out: rows that the progress line, the report and a reader's own tools
read back, also while training runs. Costs one file, about 500 bytes a row, rewritten every few
seconds, and more seldom where that takes long; the progress line reads its end alone. Needs neither
torch nor Ray.

A row holds step, max_steps, epoch, loss, learning_rate, grad_norm, TRL's rewards/chosen,
rewards/rejected, rewards/margins, rewards/accuracies, logps/…, logits/…, entropy and num_tokens,
and ours: pairs_per_s and tokens_per_s of all ranks since the last row (tokens as num_tokens counts
them: a prompt for each of its completions); rank 0's model_flops_per_s, whose share of the device's
peak is MFU (useful operations alone: a prompt once, no padding, no recomputation), and
peak_memory_gib. The first row also has start_check_…; the row of a step after which the holdout was
measured also has TRL's metrics of it: eval_loss, eval_rewards/margins, … (means over batches,
whatever their size).
"""

import json
import logging
import math
import threading
import time
from typing import Any

from refscale.errors import StorageError
from refscale.progress import say
from refscale.storage.stages import StageFolder
from refscale.summary import training_line

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
_PUBLISHED_EVERY_S = 5.0
# Training waits while the log is published: for 1 % of its time, but once in 5 minutes at least.
_PUBLISHED_SHARE = 0.01
_PUBLISHED_WITHIN_S = 300.0
_LOOKED_AT_EVERY_S = 3.0
_LAST_ROW_WITHIN_BYTES = 1 << 16  # a row has about 500


class TrainingLog:
    """Rank 0's log, published whole each time, so that a reader never sees half a line.

    Args:
        folder: The training stage's folder.
        resumed: Keep what the folder holds; the steps that are repeated are replaced. A damaged
            log is begun anew.
    """

    def __init__(self, folder: StageFolder, *, resumed: bool) -> None:
        self._folder, self._due = folder, -math.inf
        self._steps: list[int] = []
        self._lines: list[bytes] = []
        if resumed:
            try:
                rows = read_log(folder)
            except ValueError:
                logger.warning("%s is damaged and begins anew", folder.file(LOG_FILE))
            else:
                self._steps = [row.get("step", 0) for row in rows]
                self._lines = [_line(row) for row in rows]

    def add(self, row: dict[str, Any]) -> None:
        """Append a step's metrics; values that strict JSON cannot hold are left out."""
        step = row.get("step", 0)
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._lines.pop()
        self._steps.append(step)
        self._lines.append(_line(plain(row)))
        if time.monotonic() >= self._due:
            # The rows are kept: the next publication has all of them.
            try:
                self.publish()
            except StorageError as exc:
                logger.warning("the training log cannot be written now: %s", exc)

    def publish(self) -> None:
        """Write all rows."""
        began = time.monotonic()
        try:
            self._folder.store.write_bytes(self._folder.file(LOG_FILE), b"".join(self._lines))
        finally:
            ended = time.monotonic()
            pause = max(_PUBLISHED_EVERY_S, (ended - began) / _PUBLISHED_SHARE)
            self._due = ended + min(pause, _PUBLISHED_WITHIN_S)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read_log(folder: StageFolder) -> list[dict[str, Any]]:
    """The rows of a training, in the order of their steps; none where it has not logged yet.

    Raises:
        ValueError: The log is damaged.
    """
    path = folder.file(LOG_FILE)
    if not folder.store.exists(path):
        return []
    return [json.loads(line) for line in folder.store.read_bytes(path).decode().splitlines()]


def last_row(folder: StageFolder) -> dict[str, Any]:
    """The log's last row, without reading the others; empty where there is none yet.

    Raises:
        ValueError: It is damaged.
        StorageError: The log cannot be read now.
    """
    path = folder.file(LOG_FILE)
    if not folder.store.size(path):
        return {}
    filesystem, place = folder.store.filesystem(path)

    def end() -> bytes:
        with filesystem.open_input_file(place) as file:
            file.seek(max(0, file.size() - _LAST_ROW_WITHIN_BYTES))
            return file.read()

    lines = folder.store.attempt(f"read {path}", end).splitlines()
    return json.loads(lines[-1]) if lines else {}


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that strict JSON can hold: text, whole numbers and finite ones."""
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
    }


class TrainingProgress:
    """Shows the log's last row as it comes, while something else blocks this thread."""

    def __init__(self, folder: StageFolder) -> None:
        self._folder, self._stop = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="training-progress", daemon=True)

    def __enter__(self) -> "TrainingProgress":
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        shown = ""
        while not self._stop.wait(_LOOKED_AT_EVERY_S):
            try:
                row = last_row(self._folder)
            except StorageError as exc:
                line = f"progress cannot be read now: {exc}"
            except ValueError:
                continue  # the training begins it anew
            else:
                line = training_line(row) if row else ""
            # A step's line grows when the holdout is measured after it.
            if line and line != shown:
                shown = line
                say(f"train     {line}")
