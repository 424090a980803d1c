"""What identifies a result: hashes of models and values, and the first difference between two.

A fingerprint is a dict of JSON values that holds everything that changes a result. Hashing a
model's files takes about a second a gigabyte, once: it is remembered.
"""

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from refscale import __version__
from refscale.errors import StorageError
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
    """
    real = os.path.realpath(path)
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
    """What identifies the weights: hashes of a folder's files, or a hub commit.

    Returns:
        {file name: sha256} of config and weights of a local folder, or {"commit": …} of a hub id.

    Raises:
        StorageError: Neither a folder with weights nor a resolvable hub id.
    """
    folder = Path(model_name_or_path)
    if folder.is_dir():
        names = [
            file.name
            for pattern in ("*.safetensors", "config.json", "adapter_config.json")
            for file in folder.glob(pattern)
        ]
        if not any(name.endswith(".safetensors") for name in names):
            raise StorageError(
                f"{folder} holds no *.safetensors; model.model_name_or_path must be a folder"
                " written by save_pretrained or a hub id"
            )
        return {name: file_sha256(folder / name) for name in sorted(set(names))}
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    try:
        cached = try_to_load_from_cache(model_name_or_path, "config.json", revision=revision)
        if isinstance(cached, str):
            return {"commit": Path(cached).parent.name}
        return {"commit": str(HfApi().model_info(model_name_or_path, revision=revision).sha)}
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as exc:
        raise StorageError(
            f"model {model_name_or_path!r} is neither a folder nor a hub model that can be"
            f" reached ({type(exc).__name__})"
        ) from exc


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result may depend on."""
    versions = {"refscale": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
