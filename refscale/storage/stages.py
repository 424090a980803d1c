"""A stage's folder in a run: fingerprint, shards with their records, the manifest.

    scores/STAGE.json             written first: the fingerprint that all work in here belongs to
    scores/shard-00007.parquet    a unit of work, published whole or not at all
    scores/shard-00007.json       its record: rows, bytes, sha256, counts; written after the data
    scores/MANIFEST.json          written last: a folder without it is unfinished

So a kill at any moment costs the units in flight: the same command verifies what is there and goes
on. STAGE.json also holds the claim of the driver at work here, and a shard is committed only under
the claim it was begun with: workers that outlive a killed driver cannot mix their results into its
successor's. What it costs: each file is hashed when it is written and when a later run takes it
over; a commit reads STAGE.json; a table's pages carry a CRC that every reading checks.
"""

import hashlib
import io
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refscale.errors import FingerprintError, StorageError
from refscale.storage.fingerprints import digest, first_difference, library_versions
from refscale.storage.store import Store

MANIFEST = "MANIFEST.json"
STAGE_FILE = "STAGE.json"
FORMAT_VERSION = 1
# Which command writes a folder; training writes two.
STAGE_COMMANDS = {
    "corpus": "prepare",
    "scores": "score",
    "selection": "select",
    "training": "train",
    "policy": "train",
    "evaluation": "evaluate",
}
# The folders that a stage is made from: their identities are in its fingerprint, by these names.
STAGE_PARENTS = {
    "scores": ("corpus",),
    "selection": ("scores",),
    "policy": ("selection",),
    "evaluation": ("policy", "scores"),
}
# The commands of folders that are no stages of `refscale run`, by the first part of their name.
_OTHER_COMMANDS = {
    "quarantine": "prepare",
    "compare": "compare",
    "completions": "compare",
    "reference_completions": "compare",
    "mtbench": "mtbench",
    "data": "export",
}


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
        # Seconds that earlier commands worked on the unfinished stage; known after `begin`.
        self.spent_s = 0.0
        self._claim: tuple[str, str] | None = None  # path of the STAGE.json, token

    def part(self, name: str) -> "StageFolder":
        """A folder inside this one that is written under the same claim."""
        part = StageFolder(self.store, f"{self.stage}/{name}")
        part._claim = self._claim
        return part

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
        return self.publish_bytes(name, _parquet(table), rows=table.num_rows, counts=counts)

    def commit_shard(
        self, shard: str, table: pa.Table, *, counts: Mapping[str, Any] | None = None
    ) -> FileRecord:
        """Publish a shard's table, then its record: from then on the shard is done.

        Raises:
            StorageError: Another driver has begun to work on the stage since.
        """
        return self.commit_bytes(
            shard, ".parquet", _parquet(table), rows=table.num_rows, counts=counts
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
        self._require_claim()
        record = self.publish_bytes(f"{shard}{suffix}", data, rows=rows, counts=counts)
        self.store.write_json(self.file(f"{shard}.json"), asdict(record))
        return record

    def _require_claim(self) -> None:
        if self._claim is None:
            return
        path, token = self._claim
        if not self.store.exists(path) or self.store.read_json(path).get("claim") != token:
            raise StorageError(
                f"another driver has taken over {self.stage}/ in {self.store.uri}; this one stops"
            )

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
        path = self.file(name)

        def read() -> pa.Table:
            with self.store.open_input(path) as file:
                return pq.read_table(
                    file, columns=columns, partitioning=None, page_checksum_verification=True
                )

        try:
            return self.store.attempt(f"read {path}", read)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
            raise StorageError(
                f"{path} in {self.store.uri} is damaged: {exc}; `refscale run` finds and redoes it"
            ) from exc

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
            StorageError: The folder holds files that are not of this stage, or one of its files is
                there and cannot be read.
        """
        stage_file = self.file(STAGE_FILE)
        self.spent_s = 0.0
        if self.store.exists(stage_file):
            if restart:
                self._clear()
            else:
                stored = self.store.read_json(stage_file)
                self._compare(stored, fingerprint)
                self.spent_s = stored.get("spent_s", 0.0) + self._worked_s()
        else:
            strangers = self.store.list_files(self.stage, recursive=True)
            if strangers:
                raise StorageError(
                    f"{self.stage}/ in {self.store.uri} holds files that no stage of refscale"
                    f" wrote, such as {strangers[0]}; choose another {self._place}"
                )
        if self._is_done():
            return True
        self.store.sweep(self.stage)
        self._claim = (stage_file, uuid.uuid4().hex)
        self.store.write_json(
            stage_file,
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": fingerprint,
                "claim": self._claim[1],
                "spent_s": round(self.spent_s, 3),
            },
        )
        return False

    def _worked_s(self) -> float:
        """Seconds from the last claim to the last file under it, by the store's own clock."""
        files = self.store.listing(self.stage, recursive=True)
        claimed = files.get(self.file(STAGE_FILE))
        if claimed is None or claimed.mtime_ns is None:  # a store without a clock
            return 0.0
        return (max(info.mtime_ns for info in files.values()) - claimed.mtime_ns) / 1e9

    def _clear(self) -> None:
        """Delete all but STAGE.json, which keeps the folder ours if this is broken off."""
        self.store.delete(self.file(MANIFEST))
        names = self.store.list_files(self.stage, recursive=True)
        self.store.delete_files([name for name in names if name != self.file(STAGE_FILE)])

    def _is_done(self) -> bool:
        if not self.store.exists(self.file(MANIFEST)):
            return False
        try:
            manifest = json.loads(self.store.read_bytes(self.file(MANIFEST)))
            self._refuse_outside(manifest["files"])
            intact = manifest["identity"] == _identity(manifest["fingerprint"], manifest["files"])
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            self.store.delete(self.file(MANIFEST))  # the shards' own records are still there
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
                f" writes {FORMAT_VERSION}; {self._way_out()}"
            )
        name, old, new = first_difference(
            stored["fingerprint"], json.loads(json.dumps(fingerprint))
        )
        if name:
            raise FingerprintError(
                f"{self.stage}/ in {self.store.uri} was made with {name} = {old}, now it is {new};"
                f" {self._way_out()}"
            )

    @property
    def _command(self) -> str | None:
        """The command that writes the folder, if it is one of refscale's."""
        first = self.stage.partition("/")[0]
        return STAGE_COMMANDS.get(first) or _OTHER_COMMANDS.get(first)

    @property
    def _place(self) -> str:
        """The option that names the store."""
        return "--out" if self._command == "export" else "--run-dir"

    def _way_out(self) -> str:
        if self._command == "export":  # which has no --restart
            return f"use another {self._place}, or delete {self.store.uri}"
        if self._command is None:
            return f"use another {self._place}, or delete {self.stage}/"
        return f"use another {self._place}, or redo it with `refscale {self._command} --restart`"

    def recorded_shards(self) -> list[str]:
        """Paths of the records of shards, whether their files are still undamaged or not."""
        return [
            name
            for name in self.store.list_files(self.stage)
            if name.endswith(".json") and PurePosixPath(name).name not in (MANIFEST, STAGE_FILE)
        ]

    def finished_shards(self) -> dict[str, FileRecord]:
        """Records of the shards that are done and undamaged, by shard name.

        Raises:
            StorageError: A file is there and cannot be read: it may be whole.
        """

        def verified(name: str) -> tuple[str, FileRecord] | None:
            text = self.store.read_bytes(name)
            try:
                record = FileRecord.from_dict(json.loads(text))
            except (ValueError, StorageError):
                return None
            return None if self._is_damaged(record) else (PurePosixPath(name).stem, record)

        with ThreadPoolExecutor(8) as pool:
            return dict(pair for pair in pool.map(verified, self.recorded_shards()) if pair)

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

        Args:
            fingerprint: As for `begin`.
            files: All that the stage consists of.
            counts: JSON values.
            seconds: That all commands together worked on it.
            details: JSON values.

        Returns:
            The manifest. Its `identity` is a digest of fingerprint and contents, which the next
            stages put into their own fingerprints.
        """
        records = sorted((asdict(record) for record in files), key=lambda r: r["name"])
        manifest = {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "fingerprint": fingerprint,
            "identity": _identity(fingerprint, records),
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
        self._refuse_outside(manifest.get("files", []))
        return manifest

    def _refuse_outside(self, files: Iterable[Mapping[str, Any]]) -> None:
        for record in files:
            if ".." in PurePosixPath(record["name"]).parts or record["name"].startswith("/"):
                raise StorageError(
                    f"{self.file(MANIFEST)} names {record['name']!r}, outside its folder; the"
                    " manifest was tampered with"
                )

    def require(self) -> dict[str, Any]:
        """The manifest of a stage that must be done.

        Raises:
            StorageError: It is not.
        """
        manifest = self.manifest()
        if manifest is None:
            ways = [f"`refscale {self._command}`"] if self._command else []
            if self.stage in STAGE_COMMANDS:
                ways.append("`refscale run`")
            advice = f"; run {' or '.join(ways)} first" if ways else ""
            raise StorageError(f"{self.stage}/ in {self.store.uri} is not finished{advice}")
        return manifest

    def lost(self, manifest: Mapping[str, Any]) -> list[str]:
        """Names of the manifest's files that are missing or of another size; reads none of them."""
        found = self.store.listing(self.stage, recursive=True)
        return [
            record["name"]
            for record in manifest["files"]
            if (info := found.get(self.file(record["name"]))) is None
            or info.size != record["bytes"]
        ]

    def damaged(self, manifest: Mapping[str, Any]) -> list[str]:
        """Names of the manifest's files that are missing or differ from their record.

        Raises:
            StorageError: One is there and cannot be read: it may be whole.
        """
        records = [FileRecord.from_dict(record) for record in manifest["files"]]
        with ThreadPoolExecutor(8) as pool:
            flags = pool.map(self._is_damaged, records)
            return [record.name for record, bad in zip(records, flags, strict=True) if bad]

    def _is_damaged(self, record: FileRecord) -> bool:
        """Whether it is missing or differs; a store that cannot be read says nothing of it."""
        if self.store.size(self.file(record.name)) != record.bytes:
            return True
        try:
            return self._sha256(record.name) != record.sha256
        except StorageError as exc:
            raise StorageError(
                f"{exc}; nothing was deleted: run the same command again, and if it cannot be read"
                " then either, delete that file to have it redone"
            ) from exc

    def _sha256(self, name: str) -> str:
        path = self.file(name)

        def read() -> str:
            hasher = hashlib.sha256()
            with self.store.open_input(path) as file:
                while block := file.read(1 << 24):
                    hasher.update(block)
            return hasher.hexdigest()

        return self.store.attempt(f"read {path}", read)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _identity(fingerprint: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    return digest([fingerprint, [[file["name"], file["sha256"]] for file in files]])
