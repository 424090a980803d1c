"""Hugging Face datasets as sources: folders written by save_to_disk, and ids on the hub.

`datasets` decodes the features, is imported when one is used, and is kept open per process. A
folder on an object store costs each process a copy of the split, on disk until the process ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from refscale.corpus.pairs import shorten
from refscale.errors import CorpusError, StorageError
from refscale.progress import say
from refscale.storage.copies import local_folder
from refscale.storage.fingerprints import digest, file_sha256, hub_commit, is_commit
from refscale.storage.store import Store


@dataclass(frozen=True)
class DatasetRef:
    """A Hugging Face dataset: saved (save_to_disk), or on the hub or a clone of one from there."""

    kind: str  # disk | hub
    root: str
    subset: str | None
    revision: str | None
    split: str | None

    def __str__(self) -> str:
        """The split, and the commit of one on the hub, for people."""
        at = f" of commit {self.commit}" if self.commit else ""
        return f"split {self.split or '(only one)'}{at}"

    @property
    def commit(self) -> str | None:
        """The commit that is read, where it is known; a folder has none, whatever the revision."""
        known = self.kind == "hub" and is_commit(self.revision) and not os.path.isdir(self.root)
        return self.revision if known else None

    def pinned(self) -> "DatasetRef":
        """A hub dataset at the commit that its revision is now, so that all processes read that.

        Without the hub `datasets` reads what a machine has cached last, and so does this. A commit
        is not asked for: it is read, or nothing is.
        """
        if self.kind != "hub" or os.path.isdir(self.root) or is_commit(self.revision):
            return self
        try:
            return replace(self, revision=hub_commit(self.root, self.revision, "dataset"))
        except StorageError as exc:
            say(f"hub       {exc}: each machine reads the version in its own cache")
            return self


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Turn what `datasets` raises into one line that begins with `failure`."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (
        DatasetsError,
        StorageError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        yaml.YAMLError,  # of its README.md
    ) as exc:
        # "An error occurred while generating the dataset"; its cause says which.
        said, cause = str(exc), str(exc.__cause__ or "")
        if cause not in said:
            said = f"{said.rstrip('.')}: {cause}"
        raise CorpusError(f"{failure}: {shorten(said, 300)}") from exc


@lru_cache(maxsize=16)
def _load_dataset(ref: DatasetRef) -> Any:
    import datasets

    if ref.kind == "disk":
        with _explained(f"the dataset {ref.root} cannot be loaded"):
            # Not by the URI: for it `datasets` wants fsspec's own client of each store.
            named = ref.root if ref.split is None else Store(ref.root).uri_of(ref.split)
            with local_folder(named) as folder:
                return datasets.load_from_disk(folder)
    with _explained(f"the dataset {ref.root} cannot be loaded"):
        loaded = datasets.load_dataset(
            ref.root,
            ref.subset,
            split=ref.split,
            revision=ref.revision,
            keep_in_memory=False,  # whatever the environment says: its files identify it
        ).with_format(None)
    _check_commit(ref, loaded)
    return loaded


def _check_commit(ref: DatasetRef, loaded: Any) -> None:
    """Refuse what `datasets` 5.2 falls back on, saying so in its log: the version cached last."""
    for file in loaded.cache_files:
        commit = Path(file["filename"]).parent.name  # the folder of a hub dataset is its commit
        if ref.commit is not None and is_commit(commit) and commit != ref.commit:
            raise CorpusError(
                f"the hub dataset {ref.root} cannot be loaded at commit {ref.commit}, and this"
                f" machine's cache has commit {commit}; is the hub reached from here?"
            )


def dataset_splits(ref: DatasetRef, where: str) -> list[str] | None:
    """Names of the splits; None where the dataset has none.

    Raises:
        CorpusError: It cannot be found or loaded.
    """
    if ref.kind == "hub":
        import datasets

        with _explained(f"{where}: the dataset {ref.root} cannot be loaded"):
            return list(
                datasets.get_dataset_split_names(ref.root, ref.subset, revision=ref.revision)
            )
    store = Store(ref.root)
    with _explained(f"{where}: the dataset {ref.root} cannot be loaded"):
        if store.exists("state.json"):  # as `datasets` does where a dict lies beside it
            return None
        return list(store.read_json("dataset_dict.json")["splits"])


def dataset_rows(ref: DatasetRef) -> int:
    """Rows of the split."""
    return len(_load_dataset(ref))


def dataset_bytes(ref: DatasetRef) -> int:
    """Bytes of the split's Arrow table, about those of its texts; the table is mapped, not read."""
    return int(_load_dataset(ref).data.nbytes)


def dataset_fingerprint(ref: DatasetRef) -> dict[str, str]:
    """What identifies a hub dataset's contents: commit and subset; without a commit, the rows.

    Raises:
        CorpusError: It cannot be loaded.
    """
    subset = {} if ref.subset is None else {"subset": ref.subset}
    if ref.commit is not None:
        return {"commit": ref.commit, **subset}
    loaded = _load_dataset(ref)
    with _explained(f"the dataset {ref.root} cannot be read"):
        files = [file_sha256(file["filename"]) for file in loaded.cache_files]
    return {"dataset": f"{len(loaded)} rows of {digest(files)[:16]}", **subset}


def dataset_slice(
    ref: DatasetRef, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, Any]]:
    """Rows [start, stop) as (row number, dict), read in batches."""
    loaded = _load_dataset(ref).with_format(None)
    end = len(loaded) if stop is None else stop
    for low in range(start, end, batch_rows):
        with _explained(f"rows of the dataset {ref.root} cannot be decoded"):
            columns = loaded[low : min(low + batch_rows, end)]
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            yield low + i, dict(zip(columns, values, strict=True))
