"""Which training a run goes on with: the one that its folders hold, or another.

In: the fingerprint that the config asks for, and what training/ and policy/ were begun with. Out:
the fingerprint to work under, and whether what is there may go. Needs neither torch nor Ray.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from refscale.progress import say
from refscale.storage.fingerprints import first_difference
from refscale.storage.stages import MANIFEST, STAGE_FILE, StageFolder
from refscale.training.options import measuring_decides


def as_begun(
    asked: Mapping[str, Any], options: Mapping[str, Any], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`asked`, with what `before` holds of options that decide nothing.

    Earlier refscales stored more of them, and checkpoints are found by the digest of all.

    Args:
        asked: The fingerprint; `train` holds `deciding_options(options)`.
        options: `TrainConfig.model_dump()`.
        before: The fingerprint that the work in the folder has; None where there is none.
    """
    if before is None:
        return dict(asked)
    stored = before.get("train", {})
    left_out = options.keys() - asked["train"].keys()
    undeciding = {key: stored[key] for key in stored if key in left_out}
    begun = {**asked, "train": {**asked["train"], **undeciding}}
    if "holdout_pairs" in asked and not measuring_decides(dict(options)):
        begun["holdout_pairs"] = before.get("holdout_pairs")
    return begun


def begins_anew(
    asked: Mapping[str, Any],
    before: Iterable[Mapping[str, Any] | None],
    training: StageFolder,
    policy: StageFolder,
) -> bool:
    """Whether the training of other settings that was begun has left nothing to lose; says so.

    Args:
        asked: The fingerprint to work under.
        before: The fingerprints that were worked under, one a folder; None where there was none.
        training: Folder of the checkpoints.
        policy: Folder of the policy.
    """
    now = json.loads(json.dumps(asked))
    differences = [first_difference(old, now) for old in before if old is not None]
    name, old, new = next((found for found in differences if found[0]), ("", None, None))
    if not name or _has_made(training, policy):
        return False
    say(f"train     begins anew with {name} = {new}: with {old} it did not reach a checkpoint")
    return True


def _has_made(training: StageFolder, policy: StageFolder) -> bool:
    """Whether there is a checkpoint, if only a part of one, or anything of a policy."""
    store = training.store
    written = store.list_files(policy.stage, recursive=True)
    saved = store.list_files(training.file("checkpoints"), recursive=True)
    return (
        store.exists(training.file(MANIFEST))
        or any(name != policy.file(STAGE_FILE) for name in written)
        or any("/checkpoint-" in name for name in saved)
    )
