"""Hugging Face datasets as sources: folders written by save_to_disk, and ids on the hub.

`datasets` decodes the features, is imported when one is used, and is kept open per process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from refscale.corpus.pairs import shorten
from refscale.errors import CorpusError, StorageError
from refscale.progress import say
from refscale.storage.fingerprints import digest, hub_commit, is_commit


@dataclass(frozen=True)
class DatasetRef:
    """A Hugging Face dataset: on disk (save_to_disk) or on the hub."""

    kind: str  # disk | hub
    root: str
    subset: str | None
    revision: str | None
    split: str | None

    def __str__(self) -> str:
        """The split, and the commit of one on the hub, for people."""
        at = f" of commit {self.revision}" if is_commit(self.revision) else ""
        return f"split {self.split or '(only one)'}{at}"

    def pinned(self) -> "DatasetRef":
        """A hub dataset at the commit that its revision is now, so that all processes read that.

        Without the hub `datasets` reads what a machine has cached last, and so does this. A commit
        is not asked for: it is read, or nothing is.
        """
        if self.kind != "hub" or Path(self.root).is_dir() or is_commit(self.revision):
            return self
        try:
            return replace(self, revision=hub_commit(self.root, self.revision, "dataset"))
        except StorageError as exc:
            say(f"hub       {exc}: each machine reads the version in its own cache")
            return self


@lru_cache(maxsize=4)
def _load_dataset(ref: DatasetRef) -> Any:
    import datasets

    try:
        if ref.kind == "disk":
            loaded = datasets.load_from_disk(ref.root)
            return loaded if ref.split is None else loaded[ref.split]
        loaded = datasets.load_dataset(
            ref.root, ref.subset, split=ref.split, revision=ref.revision
        ).with_format(None)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        source = "hub dataset" if ref.kind == "hub" else "saved dataset"
        raise CorpusError(
            f"the {source} {ref.root} cannot be loaded: {shorten(str(exc), 200)}"
        ) from exc
    _check_commit(ref, loaded)
    return loaded


def _check_commit(ref: DatasetRef, loaded: Any) -> None:
    """Refuse what `datasets` 5.2 falls back on, saying so in its log: the version cached last."""
    for file in loaded.cache_files:
        commit = Path(file["filename"]).parent.name  # the folder of a hub dataset is its commit
        if is_commit(ref.revision) and is_commit(commit) and commit != ref.revision:
            raise CorpusError(
                f"the hub dataset {ref.root} cannot be loaded at commit {ref.revision}, and this"
                f" machine's cache has commit {commit}; is the hub reached from here?"
            )


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


def dataset_bytes(ref: DatasetRef) -> int:
    """Bytes of the split's Arrow table, about those of its texts; the table is mapped, not read."""
    return int(_load_dataset(ref).data.nbytes)


def dataset_fingerprint(ref: DatasetRef) -> dict[str, str]:
    """What identifies a hub dataset's contents: commit and subset; without a commit, the rows."""
    subset = {} if ref.subset is None else {"subset": ref.subset}
    if ref.revision is not None and is_commit(ref.revision):
        return {"commit": ref.revision, **subset}
    loaded = _load_dataset(ref)
    checksums = getattr(loaded.info, "download_checksums", None) or {}
    return {"dataset": f"{len(loaded)} rows of {digest(sorted(checksums))[:16]}", **subset}


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
