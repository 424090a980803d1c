"""Sources of the config -> read units: what one task reads, validates and encodes.

A unit is one or several parts of one source; a part is a file, or a range of it that can be read on
its own: bytes of jsonl, rows of parquet, arrow or a Hugging Face dataset. Units hold a few MiB, so
that they fill a task and a task's memory stays small, and are planned from the files' contents
alone: the same corpus gives the same units on every machine.

What planning costs: jsonl files larger than a unit are read once, to find line starts and to count
lines, and compressed ones to the end; of other formats the footers. A hub dataset is downloaded.
reading.py reads the rows.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from refscale.config import Source
from refscale.corpus import hf_datasets, reading
from refscale.corpus.hf_datasets import DatasetRef
from refscale.corpus.parts import Part, explained, filesystem, local_path
from refscale.errors import CorpusError, StorageError
from refscale.storage.fingerprints import digest, file_sha256

# A unit's size: at least 4 MiB of file, and at most about 200 units until they are 32 MiB.
MIN_UNIT_BYTES = 4 << 20
MAX_UNIT_BYTES = 32 << 20
_UNITS_WANTED = 200
_UNIT_ROWS = 10_000

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Unit:
    """What one task reads; `source` is the index of its source."""

    source: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is relative to what the source names."""

    path: str
    name: str
    size: int
    mtime_ns: int | None


@dataclass(frozen=True)
class LocatedSource:
    """A source that was found: its files, or the Hugging Face dataset it is."""

    index: int
    name: str
    root: str
    files: tuple[SourceFile, ...]
    dataset: DatasetRef | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its files, or of the rows of a dataset's split."""
        if self.dataset is not None:
            return hf_datasets.dataset_bytes(self.dataset)
        return sum(file.size for file in self.files)


def locate(source: Source, index: int) -> LocatedSource:
    """Find a source's files.

    Raises:
        CorpusError: Missing path, glob without a match, unknown suffix, empty folder, or a name in
            it that is not UTF-8.
    """
    where = f"corpus.sources.{index}"
    if source.dataset is not None:
        ref = DatasetRef("hub", source.dataset, source.subset, source.revision, None).pinned()
        ref = _with_split(ref, source.split, where)
        name = source.name or PurePosixPath(source.dataset).name
        return LocatedSource(index, name, source.dataset, (), ref)
    assert source.path is not None, "a source has a path or a dataset"
    root = local_path(source.path)
    name = source.name or _default_name(root)
    try:
        fs, path = filesystem(root)
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            _no_split(source, where)
            return LocatedSource(index, name, root, (_file(info, PurePosixPath(path).name),))
        if info.type == pafs.FileType.Directory:
            if _is_saved_dataset(fs, path):
                ref = _with_split(DatasetRef("disk", root, None, None, None), source.split, where)
                found = _listed(fs, path, lambda relative: relative.endswith((".arrow", ".json")))
                return LocatedSource(index, name, root, found, ref)
            _no_split(source, where)
            found = _listed(fs, path, lambda relative: _kind_of(relative) is not None)
            if not found:
                raise CorpusError(
                    f"{where}: the folder {root} holds no file that can be read; it needs"
                    f" {_known_suffixes()}"
                )
            return LocatedSource(index, name, root, found)
        if not _WILDCARDS.search(path):
            raise CorpusError(f"{where}: {root} does not exist; check corpus.sources.{index}.path")
        _no_split(source, where)
        base = path[: _WILDCARDS.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        rest = path[len(base) + 1 :]
        pattern = _glob_pattern(rest)
        # What lies below the base may be a whole home, or a lost+found that cannot be listed.
        deep = "/" in rest or "**" in rest
        found = _listed(fs, base, lambda name: pattern.fullmatch(name) is not None, deep=deep)
        if not found:
            raise CorpusError(f"{where}: no file matches {root}; check the glob")
        return LocatedSource(index, name, root, found)
    except OSError as exc:
        raise CorpusError(f"{where}: {root} cannot be opened: {exc}") from exc
    except (UnicodeDecodeError, UnicodeEncodeError) as exc:
        raise CorpusError(
            f"{where}: {root} cannot be listed: the file name {exc.object!r} is not UTF-8; rename"
            " the file"
        ) from exc
    except re.error as exc:
        raise CorpusError(f"{where}: {root} is no glob: {exc}; correct what is in [ ]") from exc


def plan_units(located: LocatedSource, unit_bytes: int, max_rows: int | None) -> list[Unit]:
    """The source's read units, in reading order.

    Args:
        located: From `locate`.
        unit_bytes: Size of a unit, about.
        max_rows: Stop after this many rows.

    Raises:
        CorpusError: A file is damaged or of an unknown format.
    """
    units: list[Unit] = []
    held: list[Part] = []
    size = rows = 0
    for part in _parts(located, unit_bytes, max_rows):
        more = _num_rows(part)
        if held and (size + part.num_bytes > unit_bytes or rows + more > _UNIT_ROWS):
            units.append(Unit(located.index, tuple(held)))
            held, size, rows = [], 0, 0
        held.append(part)
        size, rows = size + part.num_bytes, rows + more
    if held:
        units.append(Unit(located.index, tuple(held)))
    return units


def unit_bytes(total: int) -> int:
    """Size of a unit for a corpus of `total` bytes."""
    return max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, total // _UNITS_WANTED))


def contents(located: LocatedSource) -> dict[str, str]:
    """What identifies a source's contents: {file: sha256}, or size and time of remote files.

    More than 32 files are summed up in one digest. A hub dataset is its commit and subset, or the
    rows where no commit is known.

    Raises:
        CorpusError: A file cannot be read.
    """
    found: dict[str, str] = {}
    for file in located.files:
        if "://" in located.root:
            found[file.name] = f"{file.size} bytes, modified {file.mtime_ns}"
            continue
        try:
            found[file.name] = file_sha256(file.path)
        except StorageError as exc:
            raise CorpusError(f"corpus.sources.{located.index}: {exc}") from exc
    if located.dataset is not None and not found:
        return hf_datasets.dataset_fingerprint(located.dataset)
    return found if len(found) <= 32 else {f"{len(found)} files": digest(found)}


# -- files ---------------------------------------------------------------------------------------


def _file(info: pafs.FileInfo, name: str) -> SourceFile:
    return SourceFile(info.path, name, info.size or 0, info.mtime_ns)


def _listed(
    fs: pafs.FileSystem, base: str, wanted: Callable[[str], bool], *, deep: bool = True
) -> tuple[SourceFile, ...]:
    """Files whose path relative to `base` is wanted, sorted; hidden ones left out.

    Not deep: files in the folder itself alone.
    """
    infos = fs.get_file_info(pafs.FileSelector(base or "/", recursive=deep, allow_not_found=True))
    cut = len(base.rstrip("/")) + 1
    files = []
    for info in infos:
        relative = info.path[cut:]
        hidden = any(part.startswith((".", "_")) for part in PurePosixPath(relative).parts)
        if info.type == pafs.FileType.File and not hidden and wanted(relative):
            files.append(_file(info, relative))
    return tuple(sorted(files, key=lambda file: file.name))


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """A shell glob as a regular expression; ** crosses folders, * and ? do not."""
    out, i = "", 0
    while i < len(pattern):
        char = pattern[i]
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
            continue
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        close = pattern.find("]", i + 2)
        if char == "[" and close > 0:
            inner = pattern[i + 1 : close].replace("\\", "\\\\")
            out += f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
            i = close
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char))
        i += 1
    return re.compile(out)


def _kind_of(name: str) -> tuple[str, str | None] | None:
    """(format, compression) by suffix; None where it is unknown."""
    pure = PurePosixPath(name.lower())
    compression = _COMPRESSIONS.get(pure.suffix)
    if compression:
        pure = PurePosixPath(pure.stem)
    kind = _SUFFIXES.get(pure.suffix)
    if kind is None or (compression and kind not in ("jsonl", "json")):
        return None
    return kind, compression


def _known_suffixes() -> str:
    return ", ".join(_SUFFIXES) + " (json lines also as .gz or .zst)"


def _default_name(root: str) -> str:
    parts = [part for part in PurePosixPath(root).parts if not _WILDCARDS.search(part)]
    name = parts[-1] if parts else "source"
    while name != (stem := PurePosixPath(name).stem) and (
        PurePosixPath(name).suffix in (*_SUFFIXES, *_COMPRESSIONS)
    ):
        name = stem
    return name


def _no_split(source: Source, where: str) -> None:
    if source.split is not None:
        raise CorpusError(
            f"{where}.split is {source.split}, but {source.path} is plain files; split goes with"
            " dataset: or a folder written by save_to_disk"
        )


def _is_saved_dataset(fs: pafs.FileSystem, path: str) -> bool:
    marks = [f"{path.rstrip('/')}/{name}" for name in ("state.json", "dataset_dict.json")]
    return any(info.type == pafs.FileType.File for info in fs.get_file_info(marks))


def _with_split(ref: DatasetRef, split: str | None, where: str) -> DatasetRef:
    """The dataset with its split decided: the one asked for, the only one, or train."""
    splits = hf_datasets.dataset_splits(ref, where)
    if splits is None:
        if split is not None:
            raise CorpusError(
                f"{where}.split is {split}, but {ref.root} has no splits; leave it out"
            )
        return ref
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    if split.partition("[")[0] not in splits:
        raise CorpusError(
            f"{where}: {ref.root} has no split {split}; set split to one of {', '.join(splits)}"
        )
    return replace(ref, split=split)


# -- parts ---------------------------------------------------------------------------------------


def _parts(located: LocatedSource, wanted: int, max_rows: int | None) -> Iterator[Part]:
    left = max_rows
    if located.dataset is not None:
        rows, size = hf_datasets.dataset_rows(located.dataset), located.num_bytes
        root = located.root
        whole = Part(root, root, "", "dataset", None, 0, None, 0, size, located.dataset)
        yield from _plan_rows(whole, [(rows, size)], wanted, left)[0]
        return
    for file in located.files:
        if left is not None and left <= 0:
            return
        kind = _kind_of(file.name)
        if kind is None:
            raise CorpusError(
                f"corpus.sources.{located.index}: {file.path} is of no known format; it needs"
                f" {_known_suffixes()}"
            )
        whole = Part(located.root, file.path, file.name, *kind, 0, None, 0, file.size)
        with explained(whole):
            if kind[0] == "json" and not reading.is_json_array(whole):
                whole = whole.as_kind("jsonl")
            parts, rows = _PLANNERS[whole.kind](whole, wanted, left)
        if left is not None:
            left -= rows
        yield from parts


def _num_rows(part: Part) -> int:
    """Rows of a dataset's part: its bytes are an estimate, and do not bound them alone. Else 0."""
    return part.stop - part.start if part.dataset is not None and part.stop is not None else 0


def _plan_jsonl(whole: Part, wanted: int, max_rows: int | None) -> tuple[list[Part], int]:
    if max_rows is None:
        # Compressed text is several times its file; a range of it costs reading what is before.
        if whole.num_bytes <= (wanted // 4 if whole.compression else wanted):
            return [whole], 0
        if whole.compression:
            wanted = max(wanted, whole.num_bytes // 8)
    cuts, rows = reading.scan_lines(whole, wanted, max_rows)
    parts = [whole.part(start, stop, line, stop - start) for start, stop, line in cuts]
    return parts, rows


def _plan_json(whole: Part, wanted: int, max_rows: int | None) -> tuple[list[Part], int]:
    if max_rows is None:
        return [whole], 0
    return [whole.part(0, max_rows, 0, whole.num_bytes)], reading.count_json(whole)


def _plan_parquet(whole: Part, wanted: int, max_rows: int | None) -> tuple[list[Part], int]:
    groups = reading.parquet_groups(whole)
    return _plan_rows(whole, groups, wanted, max_rows)


def _plan_arrow(whole: Part, wanted: int, max_rows: int | None) -> tuple[list[Part], int]:
    return _plan_rows(whole, reading.arrow_batches(whole), wanted, max_rows)


def _plan_rows(
    whole: Part, blocks: list[tuple[int, int]], wanted: int, max_rows: int | None
) -> tuple[list[Part], int]:
    """Parts of a table from (rows, bytes) of its blocks: whole blocks, or pieces of a big one."""
    total = sum(rows for rows, _ in blocks)
    end = total if max_rows is None else min(total, max_rows)
    size = sum(nbytes for _, nbytes in blocks)
    edges, at, held_rows, held_bytes = [0], 0, 0, 0
    for rows, nbytes in blocks:
        if held_rows and (held_rows + rows > _UNIT_ROWS or held_bytes + nbytes > wanted):
            edges.append(at)
            held_rows = held_bytes = 0
        pieces = max(-(-rows // _UNIT_ROWS), -(-nbytes // (2 * wanted)), 1)
        if pieces > 1:
            edges += [at + rows * i // pieces for i in range(1, pieces)]
        held_rows, held_bytes, at = held_rows + rows, held_bytes + nbytes, at + rows
    edges = [edge for edge in dict.fromkeys(edges) if edge < end] + [end]
    return [
        whole.part(start, stop, start, size * (stop - start) // max(total, 1))
        for start, stop in pairwise(edges)
        if stop > start
    ], end


_PLANNERS: dict[str, Callable[[Part, int, int | None], tuple[list[Part], int]]] = {
    "jsonl": _plan_jsonl,
    "json": _plan_json,
    "parquet": _plan_parquet,
    "arrow": _plan_arrow,
}
