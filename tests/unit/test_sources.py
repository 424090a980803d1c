"""Every file format gives the same rows; ranges of a file give each row once, with its number."""

import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import zstandard
from fake_hub import cache_dataset, commit, fake_hub
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import given, settings
from hypothesis import strategies as st
from support import string_pairs, write_jsonl

from refscale.config import Source
from refscale.corpus import hf_datasets, reading, sources
from refscale.corpus.pairs import Refusal
from refscale.corpus.sources import contents, locate, plan_units
from refscale.errors import CorpusError

ROWS = string_pairs(250)


def read(path, *, unit_bytes=1 << 20, max_rows=None, max_row_bytes=1 << 20, **options):
    """(row number, row) of everything, and the number of units."""
    found = locate(Source(path=str(path), **options), 0)
    units = plan_units(found, unit_bytes, max_rows)
    rows = [
        (number, row)
        for unit in units
        for part in unit.parts
        for number, row, _ in reading.read_rows(part, max_row_bytes)
    ]
    return rows, len(units)


def write(folder, kind):
    """ROWS as one of the formats; the path to read."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_bytes(text)
    elif kind == "jsonl.gz":
        # Two members, as concatenated gzip files have.
        path.write_bytes(
            gzip.compress(text[: len(text) // 2]) + gzip.compress(text[len(text) // 2 :])
        )
    elif kind == "jsonl.zst":
        half = len(text) // 2
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(text[:half]) + compress(text[half:]))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=60)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    elif kind == "feather":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved_dict":
        import datasets

        halves = {"train": ROWS, "test": ROWS[:10]}
        loaded = {name: datasets.Dataset.from_list(rows) for name, rows in halves.items()}
        datasets.DatasetDict(loaded).save_to_disk(path)
    return path


KINDS = (
    "jsonl jsonl.gz jsonl.zst json parquet arrow feather saved saved_dict".split()
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows_whole_and_in_pieces(kind, tmp_path, monkeypatch):
    path = write(tmp_path, kind)
    expected = list(enumerate(ROWS))
    assert read(path)[0] == expected
    monkeypatch.setattr(sources, "_UNIT_ROWS", 37)
    monkeypatch.setattr(reading, "_BLOCK", 1000)
    rows, units = read(path, unit_bytes=3000)
    assert rows == expected
    assert units > 3 or kind == "json"
    assert read(path, unit_bytes=3000, max_rows=101)[0] == expected[:101]
    assert read(path, max_rows=10_000)[0] == expected


def test_a_split_is_named_or_train(tmp_path):
    path = write(tmp_path, "saved_dict")
    assert len(read(path, split="test")[0]) == 10
    with pytest.raises(CorpusError, match="no split dev; set split to one of train, test"):
        read(path, split="dev")
    with pytest.raises(CorpusError, match="plain files"):
        read(write(tmp_path, "jsonl"), split="train")


@pytest.mark.parametrize("kind", ["hub", "disk"])
@pytest.mark.parametrize(("rows", "chars", "units"), [(100, 100_000, 2), (25_000, 4, 3)])
def test_a_dataset_is_read_in_several_units(tmp_path, monkeypatch, kind, rows, chars, units):
    import datasets

    loaded = datasets.Dataset.from_dict({"text": ["x" * chars] * rows})
    halves = datasets.DatasetDict({"train": loaded, "test": loaded.select(range(3))})
    hf_datasets._load_dataset.cache_clear()
    if kind == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: halves[split])
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(halves))
        monkeypatch.setattr(hf_datasets.DatasetRef, "pinned", lambda self: self)
        found = locate(Source(dataset="org/d"), 0)
    else:
        halves.save_to_disk(tmp_path / "saved")
        found = locate(Source(path=str(tmp_path / "saved")), 0)
    # Texts, and 4 or 8 bytes of offset each; the other split is not counted.
    assert rows * chars <= found.num_bytes <= rows * (chars + 8) + 8
    planned = plan_units(found, sources.unit_bytes(found.num_bytes), None)
    assert len(planned) == units
    parts = [part for unit in planned for part in unit.parts]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == rows
    assert sum(part.num_bytes for part in parts) == pytest.approx(found.num_bytes, abs=len(parts))
    for unit in planned:
        assert sum(part.stop - part.start for part in unit.parts) <= 10_000
        assert sum(part.num_bytes for part in unit.parts) <= 2 * sources.MIN_UNIT_BYTES
    # Fewer rows are no larger.
    few = plan_units(found, sources.MIN_UNIT_BYTES, 10)
    assert [(part.start, part.stop) for unit in few for part in unit.parts] == [(0, 10)]
    assert few[0].parts[0].num_bytes == found.num_bytes * 10 // rows
    hf_datasets._load_dataset.cache_clear()


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`, and nothing kept open."""
    import datasets

    folder = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    hf_datasets._load_dataset.cache_clear()
    yield folder
    hf_datasets._load_dataset.cache_clear()


def relabelled(rows):
    """The same prompts and as many rows; what was chosen of the last one was rejected."""
    return [*rows[:-1], {**rows[-1], "chosen": rows[-1]["rejected"], "rejected": "other"}]


@pytest.mark.parametrize("revision", [None, commit("a")], ids=["no_revision", "revision"])
@pytest.mark.parametrize("in_memory", [0, 1 << 30], ids=["mapped", "in_memory"])
def test_a_clone_of_a_hub_dataset_is_another_when_it_is_relabelled(
    tmp_path, datasets_cache, monkeypatch, in_memory, revision
):
    import datasets

    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", in_memory)

    def identity(rows):
        hf_datasets._load_dataset.cache_clear()  # as the next command does
        write_jsonl(tmp_path / "clone/train.jsonl", rows)
        found = locate(Source(dataset=str(tmp_path / "clone"), revision=revision), 0)
        assert hf_datasets.dataset_rows(found.dataset) == len(rows)
        assert str(found.dataset) == "split train"
        return contents(found)

    before = identity(ROWS[:5])
    after = identity(relabelled(ROWS[:5]))
    assert before["dataset"].startswith("5 rows of ") and after["dataset"].startswith("5 rows of ")
    assert before != after and before == identity(ROWS[:5])


def test_a_hub_dataset_of_no_known_commit_goes_by_its_rows(tmp_path, datasets_cache, monkeypatch):
    hub = fake_hub(monkeypatch, tmp_path / "hub")
    hub.failing = lambda: OfflineModeIsEnabled("offline")
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS[:5]]

    def identity(letter, rows):
        hf_datasets._load_dataset.cache_clear()
        cache_dataset(datasets_cache, letter, rows)
        found = contents(locate(Source(dataset="org/d"), 0))
        (datasets_cache / "org___d").rename(tmp_path / f"before-{letter}")
        return found

    before, same = identity("a", rows), identity("b", rows)
    assert before == same != identity("c", relabelled(rows))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"a.jsonl": '{"x": 1}\n', "b.jsonl": '{"x": 1, "y": 2}\n'},
            "generating .*column names don't match",
        ),
        ({"a.jsonl": '{"x": 1}\n{"x"\n'}, "generating the dataset: JSON parse error"),
        ({"a.parquet": "PAR1junk"}, "split names could not be parsed .*[Pp]arquet"),
        ({"rows.unknown": "x"}, "data files"),
        ({"a.jsonl": '{"x": 1}\n', "README.md": "---\na: [b\n---\n"}, "expected ',' or"),
    ],
    ids=["columns", "json", "parquet", "empty", "card"],
)
def test_a_clone_that_cannot_be_loaded_is_one_error_that_says_why(
    tmp_path, datasets_cache, files, said
):
    (tmp_path / "clone").mkdir()
    for name, text in files.items():
        (tmp_path / "clone" / name).write_text(text)
    with pytest.raises(
        CorpusError, match=f"the dataset {tmp_path}/clone cannot be loaded: .*{said}"
    ):
        _ = locate(Source(dataset=str(tmp_path / "clone")), 0).num_bytes


def test_rows_of_a_dataset_that_cannot_be_decoded_are_one_error(tmp_path):
    import datasets

    values = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "{bad"]))
    datasets.Dataset(pa.table({"x": values})).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError, match=f"rows of the dataset {tmp_path}/saved cannot be decod"):
        read(tmp_path / "saved")


LINES = st.lists(
    st.one_of(
        st.just(b""),
        st.just(b"   "),
        st.just(b"\r"),
        st.just(b"\xff\xfe"),
        st.just(b"{not json"),
        st.integers(0, 60).map(lambda n: json.dumps({"x": "y" * n}).encode()),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(lines=LINES, end=st.booleans(), size=st.integers(1, 300), block=st.integers(1, 64))
def test_byte_ranges_yield_each_line_once_with_its_number(
    tmp_path_factory, lines, end, size, block
):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if end else b""))
    expected = [i for i, line in enumerate(lines) if line.strip()]
    patch = pytest.MonkeyPatch()
    patch.setattr(reading, "_BLOCK", block)
    try:
        if path.stat().st_size:
            whole, _ = read(path)
            rows, _ = read(path, unit_bytes=size)
            few, _ = read(path, unit_bytes=size, max_rows=5)
            short, _ = read(path, unit_bytes=size, max_row_bytes=20)
            assert [number for number, _ in rows] == expected
            assert rows == whole
            assert few == whole[:5]
            for (number, row), (_, full) in zip(short, whole, strict=True):
                if len(lines[number]) > 20:
                    assert isinstance(row, Refusal)
                    assert row.reason == "row_too_large"
                else:
                    assert row == full
    finally:
        patch.undo()


def test_a_bad_line_is_one_refused_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    deep = b"[" * 100_000
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"\n\n" + b"\xff\n" + b"{,}\n" + deep + b"\n" + good + b"\r\n"
    )
    rows, _ = read(path)
    assert [number for number, _ in rows] == [0, 2, 3, 4, 5]
    assert rows[0][1] == rows[4][1] == ROWS[0]
    assert [row.reason for _, row in rows[1:4]] == ["bad_encoding", "bad_json", "bad_json"]


def test_large_rows_of_tables_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"x": "a" * 10}, {"x": "a" * 100}]), path)
    rows, _ = read(path, max_row_bytes=50)
    assert rows[0] == (0, {"x": "a" * 10})
    assert rows[1][1].reason == "row_too_large"


def test_json_lines_may_be_called_json(tmp_path):
    path = write_jsonl(tmp_path / "rows.json", ROWS)
    assert read(path)[0] == list(enumerate(ROWS))


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    for i, name in enumerate(["b/2.jsonl", "a.jsonl", "b/1.jsonl.gz", "c.parquet"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([{"i": i}]), path)
        else:
            line = json.dumps({"i": i}).encode()
            path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("junk")
    order = [row["i"] for _, row in read(tmp_path)[0]]
    assert order == [1, 2, 0, 3]
    assert [row["i"] for _, row in read(tmp_path / "*.jsonl")[0]] == [1]
    assert [row["i"] for _, row in read(tmp_path / "**/*.jsonl*")[0]] == [1, 2, 0]
    assert [row["i"] for _, row in read(tmp_path / "b/[1]*")[0]] == [2]
    # Small files share a unit; each row still knows its file.
    assert read(tmp_path)[1] == 1


class Shallow:
    """A file system in which looking into folders fails, as it does in a lost+found."""

    def __init__(self):
        self._real = pafs.LocalFileSystem()

    def get_file_info(self, asked):
        if isinstance(asked, pafs.FileSelector) and asked.recursive:
            raise PermissionError("lost+found: Permission denied")
        return self._real.get_file_info(asked)


def test_a_glob_looks_into_folders_only_if_it_may_match_there(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "lost+found/b.jsonl", ROWS[:2])
    fs = Shallow()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "filesystem", lambda root: (fs, root))
        found = locate(Source(path=str(tmp_path / "*.jsonl")), 0)
        assert [file.name for file in found.files] == ["a.jsonl"]
        for glob in ("**", "**.jsonl", "*/*.jsonl"):
            with pytest.raises(CorpusError, match="cannot be opened: lost"):
                locate(Source(path=str(tmp_path / glob)), 0)
    for glob, names in {
        "**.jsonl": ["a.jsonl", "lost+found/b.jsonl"],
        "*/*.jsonl": ["lost+found/b.jsonl"],
    }.items():
        found = locate(Source(path=str(tmp_path / glob)), 0)
        assert [file.name for file in found.files] == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(
            (
                {"path": "a.jsonl", "format": shape, "columns": {"prompt": "question"}},
                f"columns goes with format auto, trl or columns, got {shape}.*leave columns or",
            )
            for shape in ("hh", "ultrafeedback", "helpsteer3")
        ),
        ({"path": "a.jsonl", "subset": "hard"}, "subset goes with dataset.*leave subset out"),
        ({"path": "a.jsonl", "revision": "v1"}, "revision goes with dataset, got 'v1'"),
    ],
)
def test_an_option_that_a_source_would_not_read_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Source(**options)


def test_options_that_a_source_reads_are_accepted():
    for shape in ("auto", "trl", "columns"):
        assert Source(path="a.jsonl", format=shape, columns={"prompt": "question"}).columns
    assert Source(path="a.jsonl", format="hh", columns={}).format == "hh"
    assert Source(dataset="org/d", subset="hard", revision="v1").subset == "hard"


def test_object_store_uris_are_read_like_local_files():
    import fsspec

    fs = fsspec.filesystem("memory")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    fs.pipe("/corpus/a.jsonl", text.encode())
    fs.pipe("/corpus/b.jsonl.gz", gzip.compress(text.encode()))
    expected = list(enumerate(ROWS))
    assert read("memory://corpus/a.jsonl", unit_bytes=3000)[0] == expected
    assert read("memory://corpus/*.jsonl*")[0] == expected * 2
    found = locate(Source(path="memory://corpus"), 0)
    assert set(contents(found)) == {"a.jsonl", "b.jsonl.gz"}
    with pytest.raises(CorpusError, match="does not exist"):
        read("memory://corpus/missing.jsonl")


def test_a_bucket_that_cannot_be_opened_is_reported_in_pyarrows_words():
    with pytest.raises(CorpusError, match=r"cannot open s3://b/a\?x=1: Unexpected query") as caught:
        read("s3://b/a?x=1")
    assert "s3fs" not in str(caught.value)


def test_a_source_is_named_by_its_path(tmp_path):
    for name in ("plain.jsonl", "packed.v2.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    assert locate(Source(path=str(tmp_path / "plain.jsonl")), 0).name == "plain"
    assert locate(Source(path=str(tmp_path / "packed.v2.jsonl.gz")), 0).name == "packed.v2"
    assert locate(Source(path=str(tmp_path / "*.jsonl")), 0).name == tmp_path.name
    assert locate(Source(path=str(tmp_path), name="mine"), 0).name == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("none-*.jsonl", None, "no file matches"),
        ("rows.csv", b"a,b", "no known format"),
        ("bad.parquet", b"PAR1junk", "bad.parquet cannot be read as parquet"),
        ("bad.arrow", b"junk", "bad.arrow cannot be read as arrow"),
        ("bad.json", b"[1, 2", "cannot be read as a JSON array"),
        (
            "bad.jsonl.gz",
            # mtime, since the bytes are in the test's name, which all processes have to agree on
            gzip.compress(b'{"x": 1}\n' * 99, mtime=0)[:-9],
            "bad.jsonl.gz cannot be read",
        ),
        ("bad.jsonl.zst", b"junk", "bad.jsonl.zst cannot be read"),
        ("cut.jsonl.zst", zstandard.compress(b'{"x": 1}\n' * 99)[:-3], "zst .*is it complete"),
        ("ftp://host/x.jsonl", None, "cannot open|cannot be opened"),
    ],
)
def test_an_unreadable_source_is_one_error_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read(name if "://" in name else tmp_path / name)


@pytest.mark.parametrize("glob", ["shard-[9-0].jsonl", "[!]"])
def test_a_glob_that_is_none_is_an_error_that_names_it(tmp_path, glob):
    with pytest.raises(CorpusError) as caught:
        read(tmp_path / glob)
    assert f"corpus.sources.0: {tmp_path}/{glob} is no glob: " in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_an_error_that_names_it(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / os.fsdecode(b"caf\xe9.txt")):
        with pytest.raises(CorpusError, match=r"caf\\(xe9|udce9).txt' is not UTF-8; rename"):
            read(path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="holds no file that can be read"):
        read(tmp_path)


def test_contents_follow_the_files_bytes(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    before = contents(locate(Source(path=str(path)), 0))
    text = path.read_text()
    path.write_text(text[:-2] + " }"[::-1] if random.Random(0).random() > 1 else text + "\n")
    assert contents(locate(Source(path=str(path)), 0)) != before


def test_a_zstd_file_cut_off_between_two_lines_is_no_shorter_corpus(tmp_path):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    compressor = zstandard.ZstdCompressor().compressobj()
    head = compressor.compress(b"".join(lines[:100]))
    head += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # all lines so far, no end of frame
    (tmp_path / "rows.jsonl.zst").write_bytes(head)
    with pytest.raises(CorpusError, match="is it complete"):
        read(tmp_path / "rows.jsonl.zst")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, suffix):
    table = pa.table([["p"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    path = tmp_path / f"twins.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(CorpusError, match="several columns named chosen; rename all but one"):
        read(path)


def test_values_that_python_does_not_have_refuse_their_row_alone(tmp_path):
    offsets, data = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfeb")
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    when = pa.array([0, 0, 1 << 62], pa.timestamp("us"))  # of the year 148,000
    pq.write_table(pa.table({"text": text, "when": when}), tmp_path / "odd.parquet")
    rows = [row for _, row in read(tmp_path / "odd.parquet")[0]]
    assert rows[0]["text"] == "a"
    assert rows[1] == Refusal("bad_encoding", "byte 0 of text is not UTF-8")
    assert rows[2].reason == "wrong_type" and "when is a timestamp[us]" in rows[2].detail


@pytest.mark.parametrize(
    "line", ['{"chosen": "a", "chosen": "b"}', '{"prompt": [{"role": "user", "role": "system"}]}']
)
def test_a_key_that_occurs_twice_refuses_the_row(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line + '\n{"x": {"chosen": 1}, "chosen": 2}\n')
    (_, refused), (_, row) = read(tmp_path / "rows.jsonl")[0]
    assert refused.reason == "bad_json" and "occurs twice" in refused.detail
    assert row == {"x": {"chosen": 1}, "chosen": 2}
