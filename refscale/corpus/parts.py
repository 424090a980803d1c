"""A part of a source: which range of which file, on which filesystem; and how it is opened.

Local paths, file://, and every URI that pyarrow or fsspec knows; json lines also as gzip or zstd.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs

from refscale.corpus.hf_datasets import DatasetRef
from refscale.corpus.pairs import shorten
from refscale.errors import CorpusError, StorageError
from refscale.storage.filesystems import open_filesystem


@dataclass(frozen=True)
class Part:
    """A range of a file: bytes (of the uncompressed text) of jsonl, rows of anything else."""

    root: str  # what the source names; tells the filesystem
    path: str  # inside that filesystem
    name: str  # for people
    kind: str  # jsonl | json | parquet | arrow | dataset
    compression: str | None
    start: int
    stop: int | None  # None: to the end
    first_row: int  # number of the row that `start` is at
    num_bytes: int  # about what reading it costs
    dataset: DatasetRef | None = None

    def part(self, start: int, stop: int, first_row: int, num_bytes: int) -> "Part":
        """A range of this part."""
        return replace(self, start=start, stop=stop, first_row=first_row, num_bytes=num_bytes)

    def as_kind(self, kind: str) -> "Part":
        """The same range, read as another format."""
        return replace(self, kind=kind)

    @property
    def shown(self) -> str:
        """The file as messages and the quarantine name it."""
        return self.path if "://" not in self.root else f"{self.root.split('://')[0]}://{self.path}"


@contextmanager
def explained(part: Part) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as exc:
        raise CorpusError(
            f"{part.shown} cannot be read as {part.kind}: {shorten(str(exc), 200)}; is it complete?"
        ) from exc


def local_path(uri: str) -> str:
    """A file:// URI as a path; anything else as it is."""
    return uri.removeprefix("file://")


@lru_cache(maxsize=16)
def filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it.

    Raises:
        CorpusError: It cannot be opened, or neither pyarrow nor fsspec knows the scheme.
    """
    if "://" not in root:
        return pafs.LocalFileSystem(), root
    try:
        return open_filesystem(root)
    except StorageError as exc:
        raise CorpusError(str(exc)) from exc


def _open(part: Part) -> BinaryIO:
    if "://" in part.root:
        raw = cast(BinaryIO, filesystem(part.root)[0].open_input_file(part.path))
    else:
        raw = open(part.path, "rb")
    if part.compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if part.compression == "zstd":
        # Unlike zstandard's stream reader, Arrow's refuses a file that ends within a frame.
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
    return raw


@contextmanager
def opened(part: Part) -> Iterator[BinaryIO]:
    """The part's file from its beginning, uncompressed; closed afterwards."""
    file = _open(part)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def arrow_input(part: Part) -> Iterator[pa.NativeFile]:
    """The part's file for random access: mapped if local."""
    if "://" in part.root:
        file = filesystem(part.root)[0].open_input_file(part.path)
    else:
        file = pa.memory_map(part.path)
    with file:
        yield file
