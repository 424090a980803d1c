"""Ray Train's list of a training's checkpoints, mended before Ray reads it.

Ray 2.60 writes the list over in place after each checkpoint, so that a driver that dies then, or a
full disk, leaves a part of it; and it trains no more where a checkpoint of the list is gone. Either
would fail every later resume.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import ray

from refscale.progress import say
from refscale.storage.store import Store
from refscale.training.log import plain

SNAPSHOT = "checkpoint_manager_snapshot.json"
KEPT_BY = "kept_by"  # the metric of which Ray keeps the checkpoints with the least


def checkpoint_metrics(metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What Ray is told of a checkpoint after this step, with the last metrics that were logged.

    Where none was measured on the holdout or its loss is not finite, it is the worst: Ray would
    take one without the metric for the best.
    """
    known = plain(dict(metrics))
    return {**known, "step": step, KEPT_BY: known.get("eval_loss", sys.float_info.max)}


def mend_snapshot(store: Store, folder: str) -> None:
    """Make the list name the checkpoints that are there; a whole and true one is left as it is.

    Args:
        store: The run folder.
        folder: Of the training's checkpoints, relative to it.
    """
    file = f"{folder}/{SNAPSHOT}"
    if not store.exists(file):
        return
    there = _checkpoints(store, folder)
    try:
        state = json.loads(store.read_bytes(file))
    except ValueError:
        state = _rebuilt(store, folder, there)
        _write(store, file, state, "is torn and made anew")
        return
    if not {"checkpoint_results", "checkpoint_report_indices"} <= state.keys():
        return  # of another Ray, which says so
    listed = list(zip(state["checkpoint_results"], state["checkpoint_report_indices"], strict=True))
    kept = [entry for entry in listed if entry[0]["checkpoint_dir_name"] in there]
    if len(kept) == len(listed):
        return
    gone = {result["checkpoint_dir_name"] for result, _ in listed} - set(there)
    state["checkpoint_results"] = [result for result, _ in kept]
    state["checkpoint_report_indices"] = [index for _, index in kept]
    latest = max(kept, key=lambda entry: entry[1])[0] if kept else None
    state["latest_checkpoint_result"] = latest
    _write(store, file, state, f"names what is gone, {', '.join(sorted(gone))}")


def _checkpoints(store: Store, folder: str) -> list[str]:
    """Names of the folders of checkpoints that hold anything, by step."""
    files = (PurePosixPath(name) for name in store.list_files(folder, recursive=True))
    names = {file.relative_to(folder).parts[0] for file in files}
    return sorted(name for name in names if name.startswith("checkpoint-"))


def _rebuilt(store: Store, folder: str, there: list[str]) -> dict[str, Any]:
    # The newest may be half uploaded, which was begun while the list was written. Not the only one:
    # the list is first written when that is whole.
    results = [_result(store, folder, name) for name in there[:-1] or there]
    indices = {result["checkpoint_dir_name"]: index for index, result in enumerate(results)}
    latest = results[-1] if results else None
    # As Ray 2.60 orders them: the best last, equal ones by step.
    results.sort(key=lambda result: -result["metrics"][KEPT_BY])
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": [indices[one["checkpoint_dir_name"]] for one in results],
        "latest_checkpoint_result": latest,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _result(store: Store, folder: str, name: str) -> dict[str, Any]:
    """A checkpoint with what decides which ones are kept: its step, and its loss on the holdout."""
    step = int(name.rpartition("-")[2])
    logs = store.read_json(f"{folder}/{name}/trainer_state.json")["log_history"]
    measured = [log for log in logs if log["step"] == step and "eval_loss" in log]
    metrics = checkpoint_metrics(measured[-1] if measured else {}, step)
    return {"version": 0, "checkpoint_dir_name": name, "metrics": metrics}


def _write(store: Store, file: str, state: dict[str, Any], why: str) -> None:
    latest = state["latest_checkpoint_result"]
    then = f"goes on from {latest['checkpoint_dir_name']}" if latest else "begins anew"
    say(f"train     {file} {why}; training {then}")
    store.write_bytes(file, json.dumps(state).encode())  # Ray's metrics may be no strict JSON
