"""What identifies a result: hashes of models and values, and the first difference between two.

A fingerprint is a dict of JSON values that holds everything that changes a result. Hashing a
model's files takes about a second a gigabyte, once: it is remembered. What is on the hub goes by
its commit, which costs a request or two.
"""

import contextlib
import hashlib
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from refscale import __version__
from refscale.errors import StorageError
from refscale.progress import say
from refscale.storage.store import Store

_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "ray",
    "deepspeed",
    "datasets",
    "pyarrow",
    "numpy",
)
_HUB_TIMEOUT_S = 30.0
# By kind, hub id and revision: a push in the middle of a run does not change what it loads.
_commits: dict[tuple[str, str, str | None], str] = {}


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """Dotted name, old and new value of the first field that differs; an empty name if none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            if key not in old or key not in new:
                return name, old.get(key, "absent"), new.get(key, "absent")
            found = first_difference(old[key], new[key], name)
            if found[0]:
                return found
        return "", None, None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return first_difference(dict(enumerate(old)), dict(enumerate(new)), prefix)
    return (prefix, old, new) if old != new else ("", None, None)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a local file, remembered by path, size and modification time.

    The memory is a small JSON file in the user's cache folder: hashing the 16 GB of an 8B model
    takes a minute, and every run needs it.

    Raises:
        StorageError: It is not there, as behind a broken link, or cannot be read.
    """
    try:
        return _remembered_sha256(os.path.realpath(path))
    except OSError as exc:
        raise StorageError(
            f"{path} cannot be read: {exc.strerror or exc}; check that it is there and may be read"
        ) from exc


def _remembered_sha256(real: str) -> str:
    stat = os.stat(real)
    key = f"{real}:{stat.st_size}:{stat.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refscale/sha256.json"
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        with open(real, "rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            Store(cache.parent).write_bytes(cache.name, json.dumps(known).encode())
        except StorageError:
            pass  # no writable home: hash again the next time
    return known[key]


def model_fingerprint(model_name_or_path: str, revision: str | None) -> dict[str, str]:
    """What identifies a model: hashes of a folder's files, or a hub commit.

    Args:
        model_name_or_path: Folder, hub id, or `id@revision`.
        revision: Of a hub id without its own.

    Returns:
        {file name: sha256} of config, weights and code of a local folder, or {"commit": …} of a hub
        id.

    Raises:
        StorageError: Neither a folder with weights that can be read nor a resolvable hub id.
    """
    folder = Path(model_name_or_path)
    if folder.is_dir():
        names = [
            file.name
            for pattern in ("*.safetensors", "config.json", "adapter_config.json", "*.py")
            for file in folder.glob(pattern)
        ]
        if not any(name.endswith(".safetensors") for name in names):
            raise StorageError(
                f"{folder} holds no *.safetensors; model.model_name_or_path must be a folder"
                " written by save_pretrained or a hub id"
            )
        return {name: file_sha256(folder / name) for name in sorted(set(names))}
    name, own = split_revision(model_name_or_path)
    wanted = own or revision
    if is_commit(wanted):
        return {"commit": str(wanted)}  # not asked for: whoever pinned it has seen to that
    return {"commit": hub_commit(name, wanted)}


def split_revision(name: str) -> tuple[str, str | None]:
    """A folder or hub id, and the revision where it is written `id@revision`, which no id holds."""
    if os.path.isdir(name):
        return name, None
    repo, _, revision = name.partition("@")
    return repo, revision or None


def pinned_revision(name: str, revision: str | None) -> str | None:
    """The revision at which all processes load the same: a hub id's commit; a folder's stays.

    Raises:
        StorageError: As `hub_commit`.
    """
    return revision if os.path.isdir(name) else hub_commit(name, revision)


def hub_commit(repo: str, revision: str | None, kind: str = "model") -> str:
    """The commit that a revision of a hub repository is; one answer for the life of a process.

    The hub is asked first: what a machine's cache takes for `main` is what it was when something
    was last downloaded there. The cache is asked where the hub cannot be reached. Processes that
    are to load the same files are handed the commit.

    Args:
        repo: Hub id.
        revision: Branch, tag or commit; None for main.
        kind: model or dataset.

    Raises:
        StorageError: The hub does not have it, or cannot be reached and the cache lacks it.
    """
    if (kind, repo, revision) not in _commits:
        commit = _resolve(repo, revision, kind)
        _commits[kind, repo, revision] = _commits[kind, repo, commit] = commit
    return _commits[kind, repo, revision]


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which names the same files for ever."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def _resolve(repo: str, revision: str | None, kind: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RevisionResolutionError,
    )

    hub, asked = HfApi(), revision or "main"
    ask = hub.model_info if kind == "model" else hub.dataset_info
    try:
        commit = str(ask(repo, revision=revision, timeout=_HUB_TIMEOUT_S).sha)
    except (HTTPError, OSError, HFValidationError) as exc:
        answered = isinstance(exc, HfHubHTTPError) and exc.response.status_code < 500
        unreachable = not answered and not isinstance(exc, HFValidationError)
        found = _cached_commit(repo, revision, kind) if unreachable else None
        if found is None:
            at = f" at revision {revision!r}" if revision else ""
            raise StorageError(
                f"{kind} {repo!r} is neither a folder nor a hub {kind} that can be"
                f" reached{at} ({type(exc).__name__})"
            ) from exc
        if not is_commit(revision):
            say(
                f"hub       {repo}: {asked} is commit {found} in this machine's cache; the hub"
                f" cannot be reached ({type(exc).__name__})"
            )
        return found
    if not is_commit(revision):
        say(f"hub       {repo}: {asked} is commit {commit}")
        # Files that are loaded by commit do not tell the cache what main is, and without the hub it
        # will be asked. Best effort: the cache may be read-only.
        with contextlib.suppress(HTTPError, OSError, RevisionResolutionError):
            hub.resolve_revision(repo, repo_type=kind, revision=revision)
    return commit


def _cached_commit(repo: str, revision: str | None, kind: str) -> str | None:
    """The commit by the local cache, if it holds a file of it that all such repositories have."""
    from huggingface_hub import try_to_load_from_cache

    known_by = ("config.json", "adapter_config.json") if kind == "model" else ("README.md",)
    for name in known_by:
        cached = try_to_load_from_cache(repo, name, revision=revision, repo_type=kind)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result may depend on."""
    versions = {"refscale": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
