"""The run folder: one storage interface, atomic publishing, manifests, fingerprints, the lock.

A run is one directory, local or on an object store (s3://, gs://, abfs://). Each stage owns one
folder in it:

    scores/STAGE.json             written first: the fingerprint that all work in here belongs to
    scores/shard-00007.parquet    a unit of work, published whole or not at all
    scores/shard-00007.json       its record: rows, bytes, sha256, counts; written after the data
    scores/MANIFEST.json          written last: a folder without it is unfinished

So a kill at any moment costs the units in flight: the same command verifies what is there and goes
on. What it costs: each file is hashed when it is written and when a later run takes it over.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from refscale import __version__
from refscale.errors import FingerprintError, RunLockedError, StorageError

MANIFEST = "MANIFEST.json"
STAGE_FILE = "STAGE.json"
LOCK = "LOCK.json"
FORMAT_VERSION = 1
# A driver renews its lock this often, and one that has not for LOCK_EXPIRES_S is taken for dead.
LOCK_RENEWED_S = 15.0
LOCK_EXPIRES_S = 120.0
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


class Store:
    """Files below one root, local or remote. Picklable: it travels to Ray workers.

    Paths are relative, with forward slashes, and may not leave the root.

    Args:
        uri: A local path, or a URI that pyarrow or fsspec knows.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        self.is_local = "://" not in text or text.startswith("file://")
        self.uri = os.path.abspath(text.removeprefix("file://")) if self.is_local else text

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri,)

    @cached_property
    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        try:
            filesystem, root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError, NotImplementedError):
            try:
                import fsspec

                handler, root = fsspec.core.url_to_fs(self.uri)
            except (ImportError, ValueError, OSError) as exc:
                raise StorageError(f"cannot open {self.uri}: {exc}") from exc
            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(handler))
        return filesystem, root.rstrip("/")

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

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return self._info(relative).type != pafs.FileType.NotFound

    def size(self, relative: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        info = self._info(relative)
        return info.size if info.type == pafs.FileType.File else None

    def _info(self, relative: str) -> pafs.FileInfo:
        path = self.path(relative)
        with _explained(f"look at {relative or 'the run folder'}", self.uri):
            return self._filesystem[0].get_file_info(path)

    def list_files(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Relative paths of the files in `folder`, sorted; hidden and temporary ones left out."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        with _explained(f"list {folder}", self.uri):
            infos = self._filesystem[0].get_file_info(selector)
        root = len(self.path("")) + 1
        names = [info.path[root:] for info in infos if info.type == pafs.FileType.File]
        return sorted(name for name in names if not PurePosixPath(name).name.startswith("."))

    def read_bytes(self, relative: str) -> bytes:
        """A whole file.

        Raises:
            StorageError: It is missing or unreadable.
        """
        path = self.path(relative)
        with _explained(f"read {relative}", self.uri):
            with self._filesystem[0].open_input_stream(path) as stream:
                return stream.read()

    def open_input(self, relative: str) -> pa.NativeFile:
        """A random-access file for reading."""
        path = self.path(relative)
        with _explained(f"read {relative}", self.uri):
            return self._filesystem[0].open_input_file(path)

    def write_bytes(self, relative: str, data: bytes | pa.Buffer) -> None:
        """Publish a file whole: a reader sees the old one, the new one, or none; never a part.

        Local: a temporary file in the same folder, fsync, one rename. Object stores: one upload,
        which becomes visible when it is complete.

        Raises:
            StorageError: Disk full, no permission, network; nothing is left behind.
        """
        path = self.path(relative)
        with _explained(f"write {relative}", self.uri):
            if not self.is_local:
                with self._filesystem[0].open_output_stream(path) as stream:
                    stream.write(data)
                return
            folder = os.path.dirname(path)
            os.makedirs(folder, exist_ok=True)
            temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise

    def read_json(self, relative: str) -> Any:
        """A JSON file.

        Raises:
            StorageError: It is missing or damaged.
        """
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as exc:
            raise StorageError(f"{relative} in {self.uri} is not JSON: {exc}") from exc

    def write_json(self, relative: str, value: Any) -> None:
        """Publish strict JSON: a NaN is a bug of the caller."""
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
        self.write_bytes(relative, text.encode())

    def delete(self, relative: str) -> None:
        """Delete a file or a whole folder of ours; missing is fine."""
        info = self._info(relative)
        with _explained(f"delete {relative}", self.uri):
            if info.type == pafs.FileType.Directory:
                self._filesystem[0].delete_dir(self.path(relative))
            elif info.type == pafs.FileType.File:
                self._filesystem[0].delete_file(self.path(relative))

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
        with _explained(f"create {relative}", self.uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return True

    def fetch(self, relative: str, destination: str) -> str:
        """A local path of the file: itself if the store is local, else a copy in `destination`."""
        if self.is_local:
            return self.path(relative)
        target = os.path.join(destination, relative)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _explained(f"fetch {relative}", self.uri):
            pafs.copy_files(
                self.path(relative), target, self._filesystem[0], pafs.LocalFileSystem()
            )
        return target

    def upload_folder(self, source: str, relative: str) -> None:
        """Copy a local folder's files below `relative`, each published whole."""
        base = Path(source)
        for file in sorted(p for p in base.rglob("*") if p.is_file()):
            target = f"{relative}/{file.relative_to(base).as_posix()}"
            with _explained(f"write {target}", self.uri):
                if self.is_local:
                    os.makedirs(os.path.dirname(self.path(target)), exist_ok=True)
                    temporary = f"{self.path(target)}.tmp-{uuid.uuid4().hex}"
                    shutil.copyfile(file, temporary)
                    os.replace(temporary, self.path(target))
                else:
                    pafs.copy_files(
                        str(file), self.path(target), pafs.LocalFileSystem(), self._filesystem[0]
                    )


class _explained:
    """Turn an OSError of a filesystem into one line that says what to do."""

    def __init__(self, action: str, uri: str) -> None:
        self._action, self._uri = action, uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, exc: BaseException | None, _traceback: Any) -> None:
        if isinstance(exc, OSError):
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"no space left to {self._action} in {self._uri}; what is finished is kept:"
                    " free some space and run the same command again"
                ) from exc
            raise StorageError(f"cannot {self._action} in {self._uri}: {exc}") from exc


@dataclass(frozen=True)
class FileRecord:
    """A published file: `name` is relative to its stage folder, `rows` counts table rows."""

    name: str
    rows: int
    bytes: int
    sha256: str
    counts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FileRecord":
        """The record as JSON holds it."""
        names = ("name", "rows", "bytes", "sha256", "counts")
        try:
            return cls(**{name: data[name] for name in names})
        except (KeyError, TypeError) as exc:
            raise StorageError(f"a file record is damaged: {exc!r}") from exc


class StageFolder:
    """One stage's folder in a run. Picklable: Ray workers publish their shards through it."""

    def __init__(self, store: Store, stage: str) -> None:
        self.store, self.stage = store, stage

    def file(self, name: str) -> str:
        """Path of one of the stage's files, relative to the run."""
        return f"{self.stage}/{name}"

    # -- publishing --------------------------------------------------------------------------

    def publish_bytes(
        self,
        name: str,
        data: bytes | pa.Buffer,
        *,
        rows: int = 0,
        counts: Mapping[str, Any] | None = None,
    ) -> FileRecord:
        """Publish a file and return its record."""
        view = memoryview(data)
        digest = hashlib.sha256(view).hexdigest()
        self.store.write_bytes(self.file(name), data)
        return FileRecord(name, rows, view.nbytes, digest, dict(counts or {}))

    def publish_table(
        self, name: str, table: pa.Table, *, counts: Mapping[str, Any] | None = None
    ) -> FileRecord:
        """Publish a table as parquet with zstd and return its record."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return self.publish_bytes(name, sink.getvalue(), rows=table.num_rows, counts=counts)

    def commit_shard(
        self, shard: str, table: pa.Table, *, counts: Mapping[str, Any] | None = None
    ) -> FileRecord:
        """Publish a shard's table, then its record: from then on the shard is done."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return self.commit_bytes(
            shard, ".parquet", sink.getvalue(), rows=table.num_rows, counts=counts
        )

    def commit_bytes(
        self,
        shard: str,
        suffix: str,
        data: bytes | pa.Buffer,
        *,
        rows: int,
        counts: Mapping[str, Any] | None = None,
    ) -> FileRecord:
        """As `commit_shard`, for a file that is no parquet table."""
        record = self.publish_bytes(f"{shard}{suffix}", data, rows=rows, counts=counts)
        self.store.write_json(self.file(f"{shard}.json"), asdict(record))
        return record

    def adopt(self, names: list[str] | None = None) -> list[FileRecord]:
        """Records of files that something else wrote into the folder, such as a saved model.

        Args:
            names: Which ones, relative to the folder; None for all but our own bookkeeping.
        """
        if names is None:
            found = self.store.list_files(self.stage, recursive=True)
            names = [name.removeprefix(f"{self.stage}/") for name in found]
            names = [name for name in names if name not in (STAGE_FILE, MANIFEST)]
        records = []
        for name in names:
            size = self.store.size(self.file(name))
            if size is not None:
                records.append(FileRecord(name, 0, size, self._sha256(name)))
        return records

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A published table, or some of its columns.

        Raises:
            StorageError: Missing or damaged.
        """
        try:
            with self.store.open_input(self.file(name)) as file:
                return pq.read_table(file, columns=columns, partitioning=None)
        except (pa.ArrowInvalid, OSError) as exc:
            raise StorageError(f"{self.file(name)} in {self.store.uri} is damaged: {exc}") from exc

    # -- beginning and finishing --------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], *, restart: bool = False) -> bool:
        """Claim the folder for work with `fingerprint`; True if the stage is already done.

        A finished stage is verified: where a file of it is missing or damaged, the manifest is
        withdrawn, so that the stage counts as unfinished and only the damaged part is redone.

        Args:
            fingerprint: Everything that changes the stage's result, by name; JSON values.
            restart: Delete what the stage left and begin anew.

        Raises:
            FingerprintError: The folder holds work with another fingerprint; names the field.
            StorageError: The folder holds files that are not of this stage.
        """
        if restart:
            self.store.delete(self.stage)
        if self.store.exists(self.file(STAGE_FILE)):
            self._compare(self.store.read_json(self.file(STAGE_FILE)), fingerprint)
        else:
            strangers = self.store.list_files(self.stage, recursive=True)
            if strangers:
                raise StorageError(
                    f"{self.stage}/ in {self.store.uri} holds files that no stage of refscale"
                    f" wrote, such as {strangers[0]}; choose another --run-dir"
                )
            self.store.write_json(
                self.file(STAGE_FILE),
                {"format_version": FORMAT_VERSION, "fingerprint": fingerprint},
            )
        manifest = self.manifest()
        if manifest is None:
            return False
        damaged = self.damaged(manifest)
        if damaged:
            self.store.delete(self.file(MANIFEST))
            for name in damaged:
                self.store.delete(self.file(f"{PurePosixPath(name).stem}.json"))
        return not damaged

    def _compare(self, stored: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        if stored.get("format_version") != FORMAT_VERSION:
            raise FingerprintError(
                f"{self.stage}/ has format version {stored.get('format_version')}, this refscale"
                f" writes {FORMAT_VERSION}; use another --run-dir or --restart"
            )
        name, old, new = first_difference(
            stored["fingerprint"], json.loads(json.dumps(fingerprint))
        )
        if name:
            command = STAGE_COMMANDS.get(self.stage, self.stage)
            raise FingerprintError(
                f"{self.stage}/ in {self.store.uri} was made with {name} = {old}, now it is {new};"
                f" use another --run-dir, or redo it with `refscale {command} --restart`"
            )

    def finished_shards(self) -> dict[str, FileRecord]:
        """Records of the shards that are done and undamaged, by shard name."""
        names = [
            name
            for name in self.store.list_files(self.stage)
            if name.endswith(".json") and PurePosixPath(name).name not in (MANIFEST, STAGE_FILE)
        ]

        def verified(name: str) -> tuple[str, FileRecord] | None:
            try:
                record = FileRecord.from_dict(self.store.read_json(name))
            except StorageError:
                return None
            return None if self._is_damaged(record) else (PurePosixPath(name).stem, record)

        with ThreadPoolExecutor(8) as pool:
            return dict(pair for pair in pool.map(verified, names) if pair)

    def finish(
        self,
        fingerprint: Mapping[str, Any],
        files: Iterable[FileRecord],
        *,
        counts: Mapping[str, Any],
        seconds: float,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write the manifest: the stage is done.

        Returns:
            The manifest. Its `identity` is a digest of fingerprint and contents, which the next
            stages put into their own fingerprints.
        """
        records = sorted((asdict(record) for record in files), key=lambda r: r["name"])
        manifest = {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "fingerprint": fingerprint,
            "identity": digest([fingerprint, [[r["name"], r["sha256"]] for r in records]]),
            "rows": sum(record["rows"] for record in records),
            "files": records,
            "counts": counts,
            "details": details or {},
            "seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": library_versions(),
        }
        self.store.write_json(self.file(MANIFEST), manifest)
        return manifest

    def manifest(self) -> dict[str, Any] | None:
        """The manifest; None while the stage is unfinished.

        Raises:
            StorageError: The manifest is damaged or names files outside its folder.
        """
        if not self.store.exists(self.file(MANIFEST)):
            return None
        manifest = self.store.read_json(self.file(MANIFEST))
        for record in manifest.get("files", []):
            parts = PurePosixPath(record["name"]).parts
            if ".." in parts or record["name"].startswith("/"):
                raise StorageError(
                    f"{self.file(MANIFEST)} names {record['name']!r}, outside its folder; the"
                    " manifest was tampered with"
                )
        return manifest

    def require(self) -> dict[str, Any]:
        """The manifest of a stage that must be done.

        Raises:
            StorageError: It is not.
        """
        manifest = self.manifest()
        if manifest is None:
            command = STAGE_COMMANDS.get(self.stage, self.stage)
            raise StorageError(
                f"{self.stage}/ in {self.store.uri} is not finished; run `refscale {command}` or"
                " `refscale run` first"
            )
        return manifest

    def damaged(self, manifest: Mapping[str, Any]) -> list[str]:
        """Names of the manifest's files that are missing or differ from their record."""
        records = [FileRecord.from_dict(record) for record in manifest["files"]]
        with ThreadPoolExecutor(8) as pool:
            flags = pool.map(self._is_damaged, records)
            return [record.name for record, bad in zip(records, flags, strict=True) if bad]

    def _is_damaged(self, record: FileRecord) -> bool:
        if self.store.size(self.file(record.name)) != record.bytes:
            return True
        try:
            return self._sha256(record.name) != record.sha256
        except (StorageError, OSError):
            return True

    def _sha256(self, name: str) -> str:
        hasher = hashlib.sha256()
        with self.store.open_input(self.file(name)) as file:
            while block := file.read(1 << 24):
                hasher.update(block)
        return hasher.hexdigest()


# Which command writes a folder; training writes two.
STAGE_COMMANDS = {
    "corpus": "prepare",
    "scores": "score",
    "selection": "select",
    "training": "train",
    "policy": "train",
    "evaluation": "evaluate",
}


class RunLock:
    """One driver a run folder. Use as a context manager around all work that writes.

    The lock names host and process and is renewed by a thread; it is taken over when its process
    is gone (same host) or it has not been renewed for LOCK_EXPIRES_S (another host).

    Raises:
        RunLockedError: Another driver holds the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def _content(self) -> bytes:
        me = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "renewed": time.time(),
        }
        return json.dumps(me).encode()

    def __enter__(self) -> "RunLock":
        if not self._store.create_exclusively(LOCK, self._content()):
            holder = self._holder()
            if holder and _is_alive(holder):
                raise RunLockedError(
                    f"{self._store.uri} is in use by process {holder['pid']} on {holder['host']};"
                    " wait for it or stop it, or choose another --run-dir"
                )
            self._store.write_bytes(LOCK, self._content())
        holder = self._holder()
        if not holder or holder["token"] != self._token:
            raise RunLockedError(f"another driver has just taken {self._store.uri}; wait for it")
        self._thread.start()
        return self

    def _holder(self) -> dict[str, Any] | None:
        try:
            return self._store.read_json(LOCK)
        except StorageError:
            return None

    def _renew(self) -> None:
        while not self._stop.wait(LOCK_RENEWED_S):
            try:
                self._store.write_bytes(LOCK, self._content())
            except StorageError:
                continue  # a full disk must not stop the renewal for good

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        holder = self._holder()
        if holder and holder["token"] == self._token:
            self._store.delete(LOCK)


def _is_alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        return _process_start(holder["pid"]) == holder["started"] is not None
    return time.time() - holder["renewed"] < LOCK_EXPIRES_S


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks, so that a reused pid is told apart; None if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if not Path("/proc").exists():  # macOS
            try:
                os.kill(pid, 0)
            except OSError:
                return None
            return "unknown"
        return None
    return None if fields[0] == "Z" else fields[19]


# -- fingerprints --------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """Dotted name, old and new value of the first field that differs; an empty name if none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            name = f"{prefix}.{key}" if prefix else key
            if key not in old or key not in new:
                return name, old.get(key, "absent"), new.get(key, "absent")
            found = first_difference(old[key], new[key], name)
            if found[0]:
                return found
        return "", None, None
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
            for pattern in (
                "*.safetensors",
                "*.bin",
                "config.json",
                "adapter_config.json",
            )
            for file in folder.glob(pattern)
        ]
        if not any(name.endswith((".safetensors", ".bin")) for name in names):
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
