"""The training log: one JSON line for each logged step, in `training/log.jsonl` of the run.

In: the metrics of a step. Out: rows that the progress line, the report and a reader's own tools
read back, also while training runs. Costs one small file rewritten every few seconds; needs neither
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
_LOOKED_AT_EVERY_S = 3.0


class TrainingLog:
    """Rank 0's log, published whole each time, so that a reader never sees half a line.

    Args:
        folder: The training stage's folder.
        resumed: Keep what the folder holds; the steps that are repeated are replaced. A damaged
            log is begun anew.
    """

    def __init__(self, folder: StageFolder, *, resumed: bool) -> None:
        self._folder, self._published = folder, -math.inf
        self._rows: list[dict[str, Any]] = []
        if resumed:
            try:
                self._rows = read_log(folder)
            except ValueError:
                logger.warning("%s is damaged and begins anew", folder.file(LOG_FILE))

    def add(self, row: dict[str, Any]) -> None:
        """Append a step's metrics; values that strict JSON cannot hold are left out."""
        step = row.get("step", 0)
        self._rows = [old for old in self._rows if old.get("step", 0) < step]
        self._rows.append(plain(row))
        if time.monotonic() - self._published > _PUBLISHED_EVERY_S:
            # The rows are kept: the next one publishes all of them.
            try:
                self.publish()
            except StorageError as exc:
                logger.warning("the training log cannot be written now: %s", exc)

    def publish(self) -> None:
        """Write all rows."""
        self._published = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._folder.store.write_bytes(self._folder.file(LOG_FILE), text.encode())


def read_log(folder: StageFolder) -> list[dict[str, Any]]:
    """The rows of a training, in the order of their steps; none where it has not logged yet.

    Raises:
        ValueError: The log is damaged.
    """
    path = folder.file(LOG_FILE)
    if not folder.store.exists(path):
        return []
    return [json.loads(line) for line in folder.store.read_bytes(path).decode().splitlines()]


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
                rows = read_log(self._folder)
            except ValueError:
                continue  # the training begins it anew
            # A step's line grows when the holdout is measured after it.
            if rows and (line := training_line(rows[-1])) != shown:
                shown = line
                say(f"train     {line}")
