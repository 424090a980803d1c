"""Store, stage folders and the lock on an S3-compatible server with injected errors."""

import os
import pickle
import time

import pyarrow as pa
import pytest

from refscale.errors import ConfigError, RunLockedError, StorageError
from refscale.storage import locks
from refscale.storage import store as storage
from refscale.storage.locks import LOCK, RunLock
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

TABLE = pa.table({"x": list(range(1000))})


@pytest.fixture
def store(s3, request):
    return Store(s3.uri(f"runs/{request.node.originalname}"))


def test_files_are_written_listed_read_and_deleted(store):
    store.write_bytes("a/one", b"1")
    store.write_bytes("a/b/two", b"22")
    store.write_json("a/.hidden", {})
    assert store.list_files("a") == ["a/one"]
    assert store.list_files("a", recursive=True) == ["a/b/two", "a/one"]
    assert store.read_bytes("a/b/two") == b"22"
    assert (store.size("a/b/two"), store.size("a/b"), store.size("none")) == (2, None, None)
    assert store.exists("a/b") and store.exists("a/one") and not store.exists("c")
    store.delete("a/b")
    store.delete("none")
    assert store.list_files("a", recursive=True) == ["a/one"]


def test_small_file_is_one_put(store, s3):
    s3.requests.clear()
    store.write_bytes("file", b"x" * 100_000)
    assert [method for method, _ in s3.requests] == ["PUT"]


def test_large_file_appears_only_when_it_is_complete(store, s3):
    data = os.urandom(12 << 20)  # more than one part of a multipart upload
    s3.fail(1000, "403 Forbidden", "AccessDenied", when=lambda method, path: method == "POST")
    with pytest.raises(StorageError, match="write big"):
        store.write_bytes("big", data)
    assert not store.exists("big")
    s3.heal()
    store.write_bytes("big", data)
    assert store.read_bytes("big") == data


def test_environment_names_the_server_too(store, s3, monkeypatch):
    store.write_bytes("file", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert Store(store.uri.partition("?")[0]).read_bytes("file") == b"x"


def test_uri_of_a_file_opens_it_elsewhere(store):
    store.write_bytes("policy/config.json", b"{}")
    assert Store(store.uri_of("policy")).read_bytes("config.json") == b"{}"


def test_password_in_the_uri_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        Store("s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_folder_is_uploaded_and_fetched(store, tmp_path):
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/sub/weights").write_bytes(b"w" * 1000)
    store.upload_folder(str(tmp_path / "model"), "policy")
    assert store.list_files("policy", recursive=True) == [
        "policy/config.json",
        "policy/sub/weights",
    ]
    copy = store.fetch("policy/sub/weights", str(tmp_path / "copy"))
    assert open(copy, "rb").read() == b"w" * 1000


def test_stage_is_done_found_damaged_and_redone_alone(store, s3):
    folder = StageFolder(store, "scores")
    folder.begin({"model": "a"})
    worker = pickle.loads(pickle.dumps(folder))
    records = [worker.commit_shard(f"shard-{i}", TABLE) for i in range(3)]
    folder.finish({"model": "a"}, records, counts={}, seconds=1.0)
    assert StageFolder(store, "scores").begin({"model": "a"})
    store.write_bytes("scores/shard-1.parquet", b"damaged")
    again = StageFolder(store, "scores")
    assert not again.begin({"model": "a"})
    assert sorted(again.finished_shards()) == ["shard-0", "shard-2"]


@pytest.mark.parametrize(
    "status", ["500 Internal Server Error", "503 Slow Down", "502 Bad Gateway"]
)
def test_passing_errors_are_survived(store, s3, status):
    s3.fail(2, status, "InternalError")
    store.write_bytes("file", b"x")
    s3.fail(2, status, "InternalError")
    assert store.read_bytes("file") == b"x"


def test_errors_longer_than_the_clients_own_retries_are_survived(store, s3, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", (0.1,))
    # Arrow gives up after 31 requests, 6 s.
    s3.fail(33)
    started = time.monotonic()
    store.write_bytes("file", b"x")
    assert time.monotonic() - started > 5
    assert store.read_bytes("file") == b"x"


def test_refusals_are_not_retried(store, s3):
    s3.fail(100, "403 Forbidden", "AccessDenied")
    s3.requests.clear()
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        store.write_bytes("file", b"x")
    assert len(s3.requests) == 1


def test_missing_bucket_is_one_line(s3):
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET"):
        Store(s3.uri("x").replace("bucket", "nobucket")).write_bytes("file", b"x")


@pytest.fixture
def quick_lock(monkeypatch):
    monkeypatch.setattr(locks, "LOCK_SETTLED_S", 0.3)
    monkeypatch.setattr(locks, "LOCK_RENEWED_S", 0.1)
    monkeypatch.setattr(locks, "LOCK_WATCHED_S", 0.6)


def test_second_driver_is_refused(store, quick_lock):
    with RunLock(store):
        with pytest.raises(RunLockedError, match=str(os.getpid())), RunLock(store):
            pass
    assert not store.exists(LOCK)


def test_two_drivers_that_start_together_do_not_both_run(store, quick_lock, monkeypatch):
    # Both look before either writes: the second one's name stands.
    monkeypatch.setattr(Store, "exists", lambda self, name: False)
    first = RunLock(store)
    monkeypatch.setattr(time, "sleep", lambda seconds: store.write_bytes(LOCK, other))
    other = RunLock(store)._content()
    monkeypatch.setattr(RunLock, "_holder", lambda self: store.read_json(LOCK))
    with pytest.raises(RunLockedError, match="just taken"):
        first.__enter__()
