"""Files of a run folder on a local disk."""

import errno
import os
import pickle
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from refscale.errors import StorageError
from refscale.storage import store as storage
from refscale.storage.filesystems import open_filesystem
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x"])
def test_paths_may_not_leave_the_run(tmp_path, path):
    with pytest.raises(StorageError):
        Store(tmp_path).read_bytes(path)


def test_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left.*same command"):
        store.write_bytes("a/b", b"x")
    assert os.listdir(tmp_path / "a") == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write_bytes("a", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes("a", b"new")
    assert store.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_documented_way_to_read_a_table_takes_the_manifests_files_alone(tmp_path):
    folder = StageFolder(Store(tmp_path), "scores")
    folder.begin({})
    records = [folder.commit_shard(f"shard-{i}", pa.table({"x": [i]})) for i in range(2)]
    records.append(folder.publish_bytes("selection.json", b"{}"))
    folder.finish({}, records, counts={}, seconds=1.0)
    shutil.copy(tmp_path / "scores/shard-0.parquet", tmp_path / "scores/shard-9.parquet")
    page = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    found = {}
    exec(example.replace("runs/first", str(tmp_path)), found)
    assert found["scores"]["x"].to_pylist() == [0, 1]


def test_only_one_creates_a_file_exclusively(tmp_path):
    store = Store(tmp_path)
    assert store.create_exclusively("lock", b"1")
    assert not store.create_exclusively("lock", b"2")
    assert store.read_bytes("lock") == b"1"


def test_temporary_and_hidden_files_are_not_listed(tmp_path):
    store = Store(tmp_path)
    store.write_bytes("a/x", b"")
    store.write_bytes("a/.tmp-1", b"")
    assert store.list_files("", recursive=True) == ["a/x"]
    assert store.list_files("nothing") == []


def test_folder_is_uploaded_whole(tmp_path):
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/sub/weights").write_bytes(b"w")
    store = Store(tmp_path / "run")
    store.upload_folder(str(tmp_path / "model"), "policy")
    assert store.read_bytes("policy/sub/weights") == b"w"
    assert store.fetch("policy/sub/weights", "unused") == f"{tmp_path}/run/policy/sub/weights"
    assert os.listdir(tmp_path / "run/policy/sub") == ["weights"]


def test_store_travels_and_names_its_parts(tmp_path):
    store = pickle.loads(pickle.dumps(Store(f"file://{tmp_path}/run")))
    assert store.uri_of("policy") == f"{tmp_path}/run/policy"
    store.write_bytes("policy/x", b"x")
    assert Store(store.uri_of("policy")).read_bytes("x") == b"x"


@pytest.mark.parametrize(
    ("failure", "calls"),
    [
        (OSError("AWS Error SLOW_DOWN during PutObject operation: m"), 3),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation"), 3),
        (ConnectionResetError(104, "reset by peer"), 3),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: m"), 1),
        (FileNotFoundError(2, "no HTTP status 503 here"), 1),
    ],
)
def test_passing_failures_of_a_remote_store_are_tried_again(monkeypatch, failure, calls):
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", (0.0, 0.0))
    seen = []

    def fails():
        seen.append(1)
        raise failure

    with pytest.raises(StorageError, match="cannot read x"):
        Store("s3://bucket/run").attempt("read x", fails)
    assert len(seen) == calls


def test_a_store_that_cannot_be_opened_says_so_in_pyarrows_words():
    with pytest.raises(
        StorageError, match=r"cannot open s3://b/run\?x=1: Unexpected query"
    ) as caught:
        Store("s3://b/run?x=1").exists("config.yaml")
    assert "s3fs" not in str(caught.value)


def test_a_scheme_that_pyarrow_does_not_know_is_opened_by_fsspec():
    store = Store("memory://test-storage/run")
    store.write_bytes("a", b"x")
    assert store.read_bytes("a") == b"x"
    with pytest.raises(StorageError, match="cannot open nonsense://x: Protocol not known"):
        Store("nonsense://x").exists("a")


@pytest.mark.parametrize(
    ("uri", "seconds"),
    [
        ("gs://b/run", 60),
        ("gcs://b/run?scheme=http", 60),
        ("gs://b/run?retry_limit_seconds=5", 5),
    ],
)
def test_google_is_not_waited_for_without_end(uri, seconds):
    filesystem, path = open_filesystem(uri)
    assert path == "b/run"
    assert filesystem.__reduce__()[1][0]["retry_time_limit"] == timedelta(seconds=seconds)


def test_failures_of_a_local_disk_are_not_tried_again(tmp_path):
    seen = []

    def fails():
        seen.append(1)
        raise TimeoutError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(StorageError):
        Store(tmp_path).attempt("read x", fails)
    assert len(seen) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_keeps_what_is_finished_and_can_be_resumed(small_disk):
    folder = StageFolder(Store(small_disk / "run"), "scores")
    folder.begin({})
    table = pa.table({"x": [os.urandom(100) for _ in range(3000)]})  # about 300 kB
    with pytest.raises(StorageError, match=r"no space left to write scores/shard-\d\.parquet"):
        for i in range(9):
            folder.commit_shard(f"shard-{i}", table)
    done = sorted(folder.finished_shards())
    assert done == [f"shard-{i}" for i in range(len(done))] and 1 <= len(done) <= 3
    files = os.listdir(small_disk / "run/scores")
    assert not [name for name in files if name.startswith(".tmp-")]
    # Making room lets the same work go on.
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    folder.begin({})
    folder.commit_shard(f"shard-{len(done)}", table)
    assert sorted(folder.finished_shards()) == [*done, f"shard-{len(done)}"]
