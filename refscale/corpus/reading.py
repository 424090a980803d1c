"""Rows of the parts of a source, one after the other, with their row numbers.

In: a `Part` that sources.py planned. Out: (row number, row, raw bytes) where the row is a dict as
the source holds it, or a `Refusal` when this one row cannot be read. Row numbers are 0-based lines
of jsonl, elements of a json array, rows of a table. A file that cannot be read on is a CorpusError.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from refscale.corpus.hf_datasets import dataset_slice
from refscale.corpus.pairs import Refusal, shorten
from refscale.corpus.parts import Part, arrow_input, explained, opened
from refscale.errors import CorpusError

_BLOCK = 1 << 20
_BATCH_ROWS = 1000
_BOM = b"\xef\xbb\xbf"

Row = tuple[int, Any, bytes | None]


def read_rows(part: Part, max_row_bytes: int) -> Iterator[Row]:
    """The rows of a part in order.

    Args:
        part: From sources.plan_units.
        max_row_bytes: Larger rows are refused.

    Yields:
        Row number in the file; the row, or a Refusal; the line's bytes for jsonl, else None.

    Raises:
        CorpusError: The file is damaged.
    """
    with explained(part):
        if part.kind == "jsonl":
            yield from _jsonl_rows(part, max_row_bytes)
            return
        rows = {
            "json": _json_rows,
            "parquet": _parquet_rows,
            "arrow": _arrow_rows,
            "dataset": _dataset_rows,
        }[part.kind](part)
        for number, row in rows:
            size = _text_bytes(row)
            if size > max_row_bytes:
                yield number, _too_large(size, max_row_bytes), None
            else:
                yield number, row, None


def _too_large(size: int, limit: int) -> Refusal:
    return Refusal("row_too_large", f"{size} bytes, corpus.max_row_bytes is {limit}")


def _text_bytes(value: Any) -> int:
    """Characters of all the strings and bytes in a row: a lower bound of its bytes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_text_bytes, value))
    return 8


# -- json lines ----------------------------------------------------------------------------------


def scan_lines(
    part: Part, wanted: int, max_rows: int | None
) -> tuple[list[tuple[int, int, int]], int]:
    """Cut a jsonl file at line ends, into ranges of about `wanted` bytes.

    Returns:
        (start, stop, number of the first line) of each range, and the rows in all of them;
        0 where `max_rows` is None and nobody needs to know.
    """
    cuts: list[tuple[int, int, int]] = []
    start = line = rows = 0
    with opened(part) as file:
        if max_rows is not None:
            at = number = 0
            for text, size in _lines(file, None, 1 << 62):
                at += size + 1
                number += 1
                rows += bool(text and not text.isspace())
                if at - start >= wanted or rows == max_rows:
                    cuts.append((start, at, line))
                    start, line = at, number
                if rows == max_rows:
                    return cuts, rows
            if at > start:
                cuts.append((start, at, line))
            return cuts, rows
        at = lines = 0
        while block := file.read(_BLOCK):
            if at + len(block) - start >= wanted and (end := block.rfind(b"\n")) >= 0:
                lines += block.count(b"\n", 0, end + 1)
                cuts.append((start, at + end + 1, line))
                start, line = at + end + 1, lines
                lines += block.count(b"\n", end + 1)
            else:
                lines += block.count(b"\n")
            at += len(block)
        if at > start:
            cuts.append((start, at, line))
    return cuts, 0


def _skip(file: BinaryIO, count: int) -> None:
    while count > 0:
        block = file.read(min(count, _BLOCK))
        if not block:
            return
        count -= len(block)


def _lines(
    file: BinaryIO, budget: int | None, max_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    """(line without its end, bytes of it); None for a line of more than `max_bytes`.

    Memory holds one block and one line of at most `max_bytes`.
    """
    held: list[bytes] = []
    size = 0
    while budget is None or budget > 0:
        block = file.read(_BLOCK if budget is None else min(_BLOCK, budget))
        if not block:
            break
        if budget is not None:
            budget -= len(block)
        *lines, rest = block.split(b"\n")
        for line in lines:
            total = size + len(line)
            yield (None if total > max_bytes else b"".join((*held, line)) if held else line), total
            if size:
                held, size = [], 0
        size += len(rest)
        if size > max_bytes:
            held = []
        elif rest:
            held.append(rest)
    if size:
        yield (None if size > max_bytes else b"".join(held)), size


def _jsonl_rows(part: Part, max_row_bytes: int) -> Iterator[Row]:
    budget = None if part.stop is None else part.stop - part.start
    with opened(part) as file:
        if part.start:
            if part.compression:
                _skip(file, part.start)
            else:
                file.seek(part.start)
        number = part.first_row
        for line, size in _lines(file, budget, max_row_bytes):
            if line is None:
                yield number, _too_large(size, max_row_bytes), None
            else:
                if number == 0:
                    line = line.removeprefix(_BOM)
                if line and not line.isspace():
                    yield number, _parsed(line), line
            number += 1


def _parsed(line: bytes) -> Any:
    try:
        return _loads(line)
    except UnicodeDecodeError as exc:
        return Refusal("bad_encoding", f"byte {exc.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as exc:
        return Refusal("bad_json", shorten(str(exc)))


def _loads(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"), object_pairs_hook=_object)


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        # Which of two values is meant, nobody can tell; json would take the last.
        twice = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return found


# -- json array ----------------------------------------------------------------------------------


def is_json_array(part: Part) -> bool:
    """Whether the file's first character opens an array; else it is read as json lines."""
    with opened(part) as file:
        while block := file.read(4096):
            text = block.removeprefix(_BOM).lstrip()
            if text:
                return text.startswith(b"[")
    return False


def _json_values(part: Part) -> list[Any]:
    with opened(part) as file:
        data = file.read()
    try:
        values = _loads(data.removeprefix(_BOM))
    except (ValueError, RecursionError) as exc:
        raise CorpusError(
            f"{part.shown} cannot be read as a JSON array: {shorten(str(exc))}; as json lines"
            " (.jsonl) the other rows could be used"
        ) from exc
    return cast(list[Any], values)


def count_json(part: Part) -> int:
    """Elements of a json array."""
    return len(_json_values(part))


def _json_rows(part: Part) -> Iterator[tuple[int, Any]]:
    yield from enumerate(_json_values(part)[: part.stop])


# -- tables --------------------------------------------------------------------------------------


def parquet_groups(part: Part) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes) of each row group."""
    with arrow_input(part) as file:
        parquet = pq.ParquetFile(file)
        _refuse_twins(part, parquet.schema_arrow)
        meta = parquet.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _parquet_rows(part: Part) -> Iterator[tuple[int, Any]]:
    with arrow_input(part) as file:
        parquet = pq.ParquetFile(file)
        meta = parquet.metadata
        groups: list[int] = []
        first = at = 0
        stop = meta.num_rows if part.stop is None else part.stop
        for i in range(meta.num_row_groups):
            rows = meta.row_group(i).num_rows
            if at + rows > part.start and at < stop:
                if not groups:
                    first = at
                groups.append(i)
            at += rows
        batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
        yield from _batch_rows(batches, first, part.start, stop)


def arrow_batches(part: Part) -> list[tuple[int, int]]:
    """(rows, bytes) of each record batch."""
    with arrow_input(part) as file:
        found = []
        for batch in _record_batches(file):
            _refuse_twins(part, batch.schema)
            found.append((batch.num_rows, batch.nbytes))
        return found


def _record_batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from pa.ipc.open_stream(file)


def _arrow_rows(part: Part) -> Iterator[tuple[int, Any]]:
    stop = 1 << 62 if part.stop is None else part.stop
    with arrow_input(part) as file:
        yield from _batch_rows(_record_batches(file), 0, part.start, stop)


def _batch_rows(
    batches: Iterator[pa.RecordBatch], at: int, start: int, stop: int
) -> Iterator[tuple[int, Any]]:
    """Rows [start, stop) of batches of which the first one starts at row `at`."""
    for batch in batches:
        if at >= stop:
            return
        low, high = max(start - at, 0), min(stop - at, batch.num_rows)
        for piece in range(low, high, _BATCH_ROWS):
            rows = batch.slice(piece, min(_BATCH_ROWS, high - piece))
            try:
                values = rows.to_pylist()
            except (ValueError, OverflowError):
                values = list(_rows_one_by_one(rows))
            yield from enumerate(values, at + piece)
        at += batch.num_rows


def _rows_one_by_one(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a batch of which some hold what Python has no value for."""
    for i in range(batch.num_rows):
        row: dict[str, Any] = {}
        refusal = None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[i].as_py()
            except UnicodeDecodeError as exc:
                refusal = Refusal("bad_encoding", f"byte {exc.start} of {name} is not UTF-8")
            except (ValueError, OverflowError) as exc:
                refusal = Refusal("wrong_type", f"{name} is a {column.type}: {shorten(str(exc))}")
        yield refusal or row


def _refuse_twins(part: Part, table: pa.Schema) -> None:
    """Refuse a table of which two columns have one name: a row would hold the last one alone."""
    twice = sorted({name for name in table.names if table.names.count(name) > 1})
    if twice:
        raise CorpusError(
            f"{part.shown} has several columns named {', '.join(twice)}; rename all but one"
        )


def _dataset_rows(part: Part) -> Iterator[tuple[int, Any]]:
    assert part.dataset is not None, "a dataset part names its dataset"
    return dataset_slice(part.dataset, part.start, part.stop, _BATCH_ROWS)
