"""Whether what a stage made is still what the config says, for the stages that build on it.

In: the config and a manifest. Out: what the stages are to share, or a FingerprintError that names
what differs. A stage compares its own folder with its own settings; this is for the settings that
it shares with others, such as the commit of a model on the hub.
"""

import os
from collections.abc import Mapping
from typing import Any

from refscale.config import Config, ModelConfig
from refscale.corpus.encoding import EncoderSettings, tokenizer_fingerprint
from refscale.errors import FingerprintError, StorageError
from refscale.progress import say
from refscale.storage.fingerprints import (
    first_difference,
    hub_commit,
    model_fingerprint,
    pinned_revision,
    split_revision,
)
from refscale.storage.stages import STAGE_COMMANDS, STAGE_FILE, STAGE_PARENTS, StageFolder

# training/ is written together with policy/, out of the same.
_PARENTS = {**STAGE_PARENTS, "training": STAGE_PARENTS["policy"]}


def fingerprint_before(folder: StageFolder) -> dict[str, Any] | None:
    """That of the work that is in a stage's folder, finished or not; None where there is none."""
    name = folder.file(STAGE_FILE)
    return folder.store.read_json(name).get("fingerprint") if folder.store.exists(name) else None


def finished_before(folder: StageFolder) -> dict[str, Any] | None:
    """The manifest of a finished stage; None also where it is damaged, which `begin` settles."""
    try:
        return folder.manifest()
    except StorageError:
        return None


def weights_of(model: ModelConfig) -> dict[str, Any]:
    """What identifies the reference model."""
    return {
        "model": model_fingerprint(model.model_name_or_path, model.revision),
        "adapter": model.adapter and model_fingerprint(model.adapter, None),
    }


def pinned_model(model: ModelConfig, before: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model with its hub ids at commits, so that all who load it load the same weights.

    Args:
        model: Of the config. Folders stay as they are.
        before: `weights_of` the model as an earlier stage used it. What the config does not pin
            stays at that commit, whatever its owner has pushed since.

    Returns:
        With `revision` a commit, and `adapter` as `id@commit`.

    Raises:
        StorageError: A hub id cannot be resolved.
    """
    before, name = before or {}, model.model_name_or_path
    pins: dict[str, Any] = {"revision": pinned(name, model.revision, before.get("model"))}
    if model.adapter is not None:
        adapter, revision = split_revision(model.adapter)
        commit = pinned(adapter, revision, before.get("adapter"))
        pins["adapter"] = adapter if commit is None else f"{adapter}@{commit}"
    return model.model_copy(update=pins)


def pinned(name: str, revision: str | None, before: Mapping[str, str] | None) -> str | None:
    """The revision that all load: what `before` has, unless the config names another.

    Args:
        name: Folder or hub id of a model.
        revision: As the config has it; None for none.
        before: Fingerprint of the model, or of its tokenizer, in an earlier stage or command.

    Raises:
        StorageError: A hub id cannot be resolved.
    """
    commit = (before or {}).get("commit")
    if commit is not None and revision in (None, commit) and not os.path.isdir(name):
        try:
            return hub_commit(name, commit)
        except StorageError as exc:
            if not _is_not_there(exc):
                say(f"hub       {name} stays at commit {commit}: {exc}")
                return commit
        # It was another model, and who compares the two will say so.
    return pinned_revision(name, revision)


def _is_not_there(error: StorageError) -> bool:
    """Whether the hub answered that it has no such model or commit, and not that it is down."""
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    absent = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)
    return isinstance(error.__cause__, absent)


def stale_stages(
    manifests: Mapping[str, Mapping[str, Any]],
    begun: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, str]:
    """Why, by stage, it is not of the stages that are there, such as "made from another scores/".

    Args:
        manifests: Of finished stages, by folder. A stage that is not there is compared with none.
        begun: Fingerprints of unfinished ones: what was made from these before is stale, too.

    Returns:
        In the order of the stages; without `begun`, the first was made from another parent.
    """
    begun = begun or {}
    made = {**{stage: manifest["fingerprint"] for stage, manifest in manifests.items()}, **begun}
    reasons: dict[str, str] = {}
    for stage in (stage for stage in STAGE_COMMANDS if stage in made):
        for parent in _PARENTS.get(stage, ()):
            before = manifests.get(parent)
            if before and made[stage].get(parent) != before["identity"]:
                reasons.setdefault(stage, f"made from another {parent}/")
            elif parent in reasons:
                reasons.setdefault(stage, f"made from {parent}/, which is stale")
            elif parent in begun:
                reasons.setdefault(stage, f"made from {parent}/, which is not finished now")
    return reasons


def require_lineage(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse stages of which one was made from another version of an earlier one than is there.

    Pair ids and shard names do not depend on the split or the model, so joining such stages would
    succeed: a policy could be measured on pairs that it was trained on.

    Args:
        manifests: By folder.

    Raises:
        FingerprintError: Names both folders, and the command that redoes the later one.
    """
    stale = stale_stages(manifests)
    if stale:
        stage, reason = next(iter(stale.items()))  # the others may be stale because of it
        raise FingerprintError(
            f"{stage}/ was {reason} than the one that is there; redo it with"
            f" `refscale {STAGE_COMMANDS[stage]} --restart`"
        )


def require_encoding(config: Config, prepared: dict[str, Any]) -> None:
    """Refuse a corpus of other token ids than the config's: by length, tokenizer or template.

    Raises:
        FingerprintError: Names the field, or the file or commit of the tokenizer.
        ModelError: The config's tokenizer is not there.
    """
    _require(prepared, {"encoding": config.encoding.model_dump()})
    require_tokenizer(config, prepared)


def require_tokenizer(config: Config, prepared: dict[str, Any]) -> None:
    """Refuse a corpus of another tokenizer or chat template than the config's.

    Raises:
        FingerprintError: Names the file or commit, or the template.
        ModelError: The config's tokenizer is not there.
    """
    model, before = config.model, prepared["fingerprint"]["tokenizer"]
    revision = pinned(model.model_name_or_path, model.revision, before)
    settings = EncoderSettings.of(config, revision)
    _require(prepared, {"tokenizer": tokenizer_fingerprint(settings)})


def _require(prepared: dict[str, Any], asked: dict[str, Any]) -> None:
    stored = {name: prepared["fingerprint"][name] for name in asked}
    name, old, new = first_difference(stored, asked)
    if name:
        raise FingerprintError(
            f"corpus/ was made with {name} = {old}, now it is {new}; set it back, or redo all from"
            " `refscale prepare --restart` on"
        )


def require_reference(config: Config, scored: dict[str, Any]) -> ModelConfig:
    """The model that DPO starts from: the one that scored. Where the config has another, a refusal.

    Raises:
        FingerprintError: Names the file or commit that differs.
    """
    model = pinned_model(config.model, scored["fingerprint"])
    weights = weights_of(model)
    stored = {name: scored["fingerprint"][name] for name in weights}
    name, old, new = first_difference(stored, weights)
    if name:
        raise FingerprintError(
            f"scores/ are those of another model: {name} was {old}, now it is {new}; set the"
            " section model back, or redo all from `refscale score --restart` on"
        )
    return model
