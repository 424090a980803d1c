"""What a checkpoint belongs to: a record in its folder, compared before it is resumed from.

In: the settings of a training. Out: `refscale_checkpoint.json`, or a refusal that names the field.
A checkpoint's optimizer state is a pickle, so it is loaded only from folders that hold this record.
"""

import json
import os
from pathlib import Path
from typing import Any

from refscale.errors import TrainingError
from refscale.training.options import WorkerSettings

CHECKPOINT_FILE = "refscale_checkpoint.json"
CHECKPOINT_FORMAT = 1


def checkpoint_record(settings: WorkerSettings) -> dict[str, Any]:
    """What must be equal for a checkpoint to be resumed from."""
    train = settings.train
    return {
        "format": CHECKPOINT_FORMAT,
        "fingerprint": settings.fingerprint,
        # Optimizer shards are one a rank, and the sampler deals out by rank.
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "deepspeed": train["deepspeed"],
        "model": settings.model_name_or_path,
        "max_length": settings.max_length,
        "bf16": settings.bf16,
        "peft": train["peft"],
        "per_device_train_batch_size": train["per_device_train_batch_size"],
        "token_budget": train["token_budget"],
        "gradient_accumulation_steps": train["gradient_accumulation_steps"],
        "order": train["order"],
        "seed": train["seed"],
    }


def check_checkpoint(folder: str, settings: WorkerSettings) -> None:
    """Refuse to resume from a folder that is not a checkpoint of this very training.

    Raises:
        TrainingError: Our record is missing or differs; the field and both values are named.
    """
    path = Path(folder) / CHECKPOINT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TrainingError(
            f"{folder} is not a checkpoint of refscale: {CHECKPOINT_FILE} cannot be read"
            f" ({exc.__class__.__name__}); its optimizer state is a pickle and is not loaded"
        ) from exc
    expected = json.loads(json.dumps(checkpoint_record(settings)))
    for key, value in expected.items():
        if found.get(key) != value:
            raise TrainingError(
                f"cannot resume from {folder}: {key} was {found.get(key)!r} and is now {value!r};"
                " set it back, or train anew with --restart"
            )
