"""Files of a run folder, local or on an object store, published whole or not at all.

A run is one directory: a local path, or a URI that pyarrow knows (s3://, gs://, abfs://) or fsspec.
Every file that refscale reads or writes in it goes through `Store`, so that the stages know nothing
of where a run lives. Credentials come from the environment as usual, never from the URI. A server
that is not the cloud's own, such as MinIO, is named by AWS_ENDPOINT_URL or in the URI:

    s3://bucket/run?endpoint_override=minio.example:9000&scheme=http&region=us-east-1

What it costs: a local file is synced before it is renamed; on S3 a file below 4 MiB is one PUT.
"""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from refscale.errors import ConfigError, StorageError
from refscale.storage.filesystems import open_filesystem

# Pauses in seconds before an operation is tried again that a remote store failed for a passing
# reason. Arrow's S3 client by itself retries for 6 s only.
RETRY_PAUSES_S = (1.0, 4.0, 16.0)
_PASSING = (
    "INTERNAL_FAILURE",
    "SLOW_DOWN",
    "NETWORK_CONNECTION",
    "SERVICE_UNAVAILABLE",
    "REQUEST_TIMEOUT",
    "THROTTLING",
    "HTTP status 429",
    "HTTP status 5",
    # Google's client
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
_TEMPORARY = ".tmp-"
_SMALL_BYTES = 4 << 20  # Arrow's parts are larger

_T = TypeVar("_T")


class Store:
    """Files below one root, local or remote. Picklable: it travels to Ray workers.

    Paths are relative, with forward slashes, and may not leave the root.

    Args:
        uri: A local path, or a URI that pyarrow or fsspec knows.

    Raises:
        ConfigError: The URI holds a password: URIs are shown in logs and reports.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        self.is_local = "://" not in text or text.startswith("file://")
        self.uri = os.path.abspath(text.removeprefix("file://")) if self.is_local else text
        if not self.is_local and ":" in urlsplit(text).netloc.rpartition("@")[0]:
            raise ConfigError(
                f"the URI of {text.rpartition('@')[2]} holds a password, which logs and reports"
                " would show; set it in the environment, such as AWS_SECRET_ACCESS_KEY"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri,)

    @cached_property
    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        filesystem, root = open_filesystem(self.uri)
        return filesystem, root.rstrip("/")

    @cached_property
    def _for_small_files(self) -> pafs.FileSystem:
        """As `_filesystem`; on S3, writes a file of less than one part with one PUT, not three.

        Not for larger ones: where the multipart upload cannot be begun, pyarrow 26 then publishes
        an empty file when the stream is closed.
        """
        if not self.uri.startswith("s3://") or not hasattr(pafs, "S3FileSystem"):
            return self._filesystem[0]
        mark = "&" if "?" in self.uri else "?"
        return pafs.FileSystem.from_uri(f"{self.uri}{mark}allow_delayed_open=true")[0]

    def path(self, relative: str) -> str:
        """`relative` as a path of the underlying filesystem.

        Raises:
            StorageError: It is absolute or climbs out of the root.
        """
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts:
            raise StorageError(
                f"{relative!r} leaves the run folder {self.uri}; it must be relative"
            )
        return f"{self._filesystem[1]}/{relative}" if relative else self._filesystem[1]

    def filesystem(self, relative: str) -> tuple[pafs.FileSystem, str]:
        """The filesystem and `relative` as a path of it, for a library that writes there itself."""
        return self._filesystem[0], self.path(relative)

    def uri_of(self, relative: str) -> str:
        """`relative` as a path or URI that another process can open."""
        self.path(relative)
        base, mark, query = self.uri.partition("?") if not self.is_local else (self.uri, "", "")
        return f"{base.rstrip('/')}/{relative}{mark}{query}"

    def attempt(self, action: str, operation: Callable[[], _T]) -> _T:
        """`operation()`, tried again where a remote store fails for a passing reason.

        Args:
            action: What it does, for the message: "read scores/shard-00001.parquet".
            operation: May be called several times.

        Raises:
            StorageError: It fails; says what to do where the disk is full.
        """
        for pause in (*RETRY_PAUSES_S, None):
            try:
                return operation()
            except OSError as exc:
                if pause is not None and not self.is_local and _is_passing(exc):
                    time.sleep(pause)
                    continue
                if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StorageError(
                        f"no space left to {action} in {self.uri}; what is finished is kept: free"
                        " some space and run the same command again"
                    ) from exc
                raise StorageError(f"cannot {action} in {self.uri}: {exc}") from exc
        raise AssertionError("the last attempt returns or raises")

    # -- looking -----------------------------------------------------------------------------

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return self._info(relative).type != pafs.FileType.NotFound

    def size(self, relative: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        info = self._info(relative)
        return info.size if info.type == pafs.FileType.File else None

    def _info(self, relative: str) -> pafs.FileInfo:
        path = self.path(relative)
        return self.attempt(
            f"look at {relative or 'the run folder'}",
            lambda: self._filesystem[0].get_file_info(path),
        )

    def list_files(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Relative paths of the files in `folder`, sorted; hidden and temporary ones left out."""
        return sorted(self.listing(folder, recursive=recursive))

    def listing(self, folder: str, *, recursive: bool = False) -> dict[str, pafs.FileInfo]:
        """As `list_files`, with what the filesystem knows of each file, in any order."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        infos = self.attempt(f"list {folder}", lambda: self._filesystem[0].get_file_info(selector))
        root = len(self.path("")) + 1
        return {
            info.path[root:]: info
            for info in infos
            if info.type == pafs.FileType.File and not PurePosixPath(info.path).name.startswith(".")
        }

    # -- reading -----------------------------------------------------------------------------

    def read_bytes(self, relative: str) -> bytes:
        """A whole file.

        Raises:
            StorageError: It is missing or unreadable.
        """
        path = self.path(relative)

        def read() -> bytes:
            with self._filesystem[0].open_input_stream(path) as stream:
                return stream.read()

        return self.attempt(f"read {relative}", read)

    def open_input(self, relative: str) -> pa.NativeFile:
        """A random-access file for reading."""
        path = self.path(relative)
        return self.attempt(f"read {relative}", lambda: self._filesystem[0].open_input_file(path))

    def read_json(self, relative: str) -> Any:
        """A JSON file.

        Raises:
            StorageError: It is missing or damaged.
        """
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as exc:
            raise StorageError(f"{relative} in {self.uri} is not JSON: {exc}") from exc

    def fetch(self, relative: str, destination: str) -> str:
        """A local path of the file: itself if the store is local, else a copy in `destination`."""
        if self.is_local:
            return self.path(relative)
        source, target = self.path(relative), os.path.join(destination, relative)

        def copy() -> None:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            pafs.copy_files(source, target, self._filesystem[0], pafs.LocalFileSystem())

        self.attempt(f"fetch {relative}", copy)
        return target

    # -- writing -----------------------------------------------------------------------------

    def write_bytes(self, relative: str, data: bytes | pa.Buffer) -> None:
        """Publish a file whole: a reader sees the old one, the new one, or none; never a part.

        Local: a temporary file in the same folder, fsync, one rename. Object stores: one upload,
        which becomes visible when it is complete.

        Raises:
            StorageError: Disk full, no permission, network; nothing is left behind.
        """
        path = self.path(relative)

        def write() -> None:
            if self.is_local:
                _publish_locally(path, lambda file: file.write(data))
            else:
                small = memoryview(data).nbytes < _SMALL_BYTES
                filesystem = self._for_small_files if small else self._filesystem[0]
                with filesystem.open_output_stream(path) as stream:
                    stream.write(data)

        self.attempt(f"write {relative}", write)

    def write_json(self, relative: str, value: Any) -> None:
        """Publish strict JSON: a NaN is a bug of the caller."""
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
        self.write_bytes(relative, text.encode())

    def upload_folder(self, source: str, relative: str) -> None:
        """Copy a local folder's files below `relative`, each published whole."""
        base = Path(source)
        for file in sorted(p for p in base.rglob("*") if p.is_file()):
            self._upload(file, f"{relative}/{file.relative_to(base).as_posix()}")

    def _upload(self, file: Path, relative: str) -> None:
        target = self.path(relative)

        def upload() -> None:
            if self.is_local:
                with open(file, "rb") as content:
                    _publish_locally(target, lambda out: shutil.copyfileobj(content, out, 1 << 24))
            else:
                pafs.copy_files(str(file), target, pafs.LocalFileSystem(), self._filesystem[0])

        self.attempt(f"write {relative}", upload)

    def create_exclusively(self, relative: str, data: bytes) -> bool:
        """Write a file only if none is there; False if one is.

        Atomic on a local disk. On an object store it is look-then-write: two writers within the
        same second may both succeed, so the caller reads back what it wrote.
        """
        if not self.is_local:
            if self.exists(relative):
                return False
            self.write_bytes(relative, data)
            return True
        path = self.path(relative)

        def create() -> bool:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return True

        return self.attempt(f"create {relative}", create)

    # -- deleting ----------------------------------------------------------------------------

    def delete(self, relative: str) -> None:
        """Delete a file or a whole folder of ours; missing is fine."""
        info, path = self._info(relative), self.path(relative)
        filesystem = self._filesystem[0]
        if info.type == pafs.FileType.Directory:
            self.attempt(f"delete {relative}", lambda: filesystem.delete_dir(path))
        elif info.type == pafs.FileType.File:
            self.attempt(f"delete {relative}", lambda: filesystem.delete_file(path))

    def delete_files(self, names: list[str]) -> None:
        """Delete many files."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.delete, names))

    def sweep(self, folder: str) -> None:
        """Delete the temporary files that a killed writer left in `folder`.

        An upload to an object store leaves no file; its parts are for the bucket's lifecycle rules.
        """
        if self.is_local:
            for leftover in Path(self.path(folder)).rglob(f"{_TEMPORARY}*"):
                leftover.unlink(missing_ok=True)


def _publish_locally(path: str, write: Callable[[Any], Any]) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_passing(exc: OSError) -> bool:
    if isinstance(exc, ConnectionError | TimeoutError):
        return True
    return exc.errno is None and any(sign in str(exc) for sign in _PASSING)
