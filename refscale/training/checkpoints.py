"""What a checkpoint belongs to: a record in its folder, compared before it is resumed from.

In: the settings of a training. Out: `refscale_checkpoint.json`, or a refusal that names the field.
A checkpoint's optimizer state is a pickle, so it is loaded only from folders that hold this record.
Where checkpoints are fetched, also which files of one a rank reads.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from refscale.errors import TrainingError
from refscale.training.options import WorkerSettings

CHECKPOINT_FILE = "refscale_checkpoint.json"
CHECKPOINT_FORMAT = 1
# The end of a refusal that asks for other options, whose training is another one.
HOW_TO_GO_ON = (
    "and run the same command again; where it finds a checkpoint of the old settings, `refscale"
    " train --restart` begins without it"
)
# As transformers 5.23 and DeepSpeed 0.19 name them.
_OF_A_RANK = re.compile(
    r"rng_state_(\d+)\.pth|(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_(?:optim|model)_states\.pt"
)
_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


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


def files_to_load(
    names: Iterable[str], train: dict[str, Any], rank: int, *, best: bool = False
) -> tuple[list[str], list[str]]:
    """The files of a checkpoint that `rank` alone reads, and those that all ranks read.

    Args:
        names: All files, relative to the checkpoint.
        train: `TrainConfig.model_dump()`. A DeepSpeed config of the user's own may shard by more
            than ranks or load by other rules; then all ranks read all.
        rank: Of all ranks.
        best: Load the weights alone, not to go on; DeepSpeed has them in the optimizer's shards.
    """
    if isinstance(train["deepspeed"], dict):
        return [], list(names)
    own, shared = [], []
    for name in names:
        file = PurePosixPath(name).name
        if match := _OF_A_RANK.fullmatch(file):
            if int(match[1] or match[2]) == rank:
                own.append(name)
        elif train["deepspeed"] and _WEIGHTS.fullmatch(file):
            continue  # DeepSpeed reads its own model states
        elif not best or file != "optimizer.pt":
            shared.append(name)
    return own, shared
