"""Hugging Face datasets as sources: folders written by save_to_disk, and ids on the hub.

`datasets` decodes the features, is imported when one is used, and is kept open per process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from refscale.corpus.pairs import shorten
from refscale.errors import CorpusError
from refscale.storage.fingerprints import digest


@dataclass(frozen=True)
class DatasetRef:
    """A Hugging Face dataset: on disk (save_to_disk) or on the hub."""

    kind: str  # disk | hub
    root: str
    subset: str | None
    revision: str | None
    split: str | None


@lru_cache(maxsize=4)
def _load_dataset(ref: DatasetRef) -> Any:
    import datasets

    try:
        if ref.kind == "disk":
            loaded = datasets.load_from_disk(ref.root)
            return loaded if ref.split is None else loaded[ref.split]
        return datasets.load_dataset(
            ref.root, ref.subset, split=ref.split, revision=ref.revision
        ).with_format(None)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        source = "hub dataset" if ref.kind == "hub" else "saved dataset"
        raise CorpusError(
            f"the {source} {ref.root} cannot be loaded: {shorten(str(exc), 200)}"
        ) from exc


def dataset_splits(ref: DatasetRef, where: str) -> list[str] | None:
    """Names of the splits; None where the dataset has none.

    Raises:
        CorpusError: It cannot be found or loaded.
    """
    if ref.kind == "hub":
        import datasets

        try:
            return list(
                datasets.get_dataset_split_names(ref.root, ref.subset, revision=ref.revision)
            )
        except (OSError, ValueError, RuntimeError) as exc:
            raise CorpusError(
                f"{where}: the hub dataset {ref.root} cannot be reached: {shorten(str(exc), 200)}"
            ) from exc
    loaded = _load_dataset(ref)
    return list(loaded) if isinstance(loaded, dict) else None


def dataset_rows(ref: DatasetRef) -> int:
    """Rows of the split."""
    return len(_load_dataset(ref))


def dataset_fingerprint(ref: DatasetRef) -> str:
    """What identifies a hub dataset's contents on this machine and others."""
    loaded = _load_dataset(ref)
    checksums = getattr(loaded.info, "download_checksums", None) or {}
    return f"{len(loaded)} rows of {digest(sorted(checksums))[:16]}"


def dataset_slice(
    ref: DatasetRef, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, Any]]:
    """Rows [start, stop) as (row number, dict), read in batches."""
    loaded = _load_dataset(ref).with_format(None)
    end = len(loaded) if stop is None else stop
    for low in range(start, end, batch_rows):
        columns = loaded[low : min(low + batch_rows, end)]
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            yield low + i, dict(zip(columns, values, strict=True))
