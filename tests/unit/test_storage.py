import json
import multiprocessing
import os
import pickle

import pyarrow as pa
import pytest

from refscale.errors import FingerprintError, RunLockedError, StorageError
from refscale.storage import LOCK, RunLock, StageFolder, Store, digest, first_difference

TABLE = pa.table({"x": [1, 2, 3]})


@pytest.fixture
def folder(tmp_path):
    return StageFolder(Store(tmp_path / "run"), "scores")


def finished(folder, fingerprint=None):
    fingerprint = fingerprint or {"model": "a"}
    folder.begin(fingerprint)
    records = [folder.commit_shard(f"shard-{i}", TABLE) for i in range(3)]
    return folder.finish(fingerprint, records, counts={}, seconds=1.0)


def test_finished_stage_with_the_same_fingerprint_is_done(folder):
    manifest = finished(folder)
    assert folder.begin({"model": "a"})
    assert manifest["rows"] == 9


def test_other_fingerprint_is_refused_and_names_the_field(folder):
    finished(folder, {"model": {"sha": "a"}, "dtype": "bf16"})
    with pytest.raises(FingerprintError, match=r"model\.sha = a, now it is b"):
        folder.begin({"model": {"sha": "b"}, "dtype": "bf16"})


def test_other_fingerprint_is_refused_while_unfinished_too(folder):
    folder.begin({"model": "a"})
    with pytest.raises(FingerprintError):
        folder.begin({"model": "b"})


def test_restart_begins_anew(folder):
    finished(folder)
    assert not folder.begin({"model": "b"}, restart=True)
    assert folder.finished_shards() == {}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_shard_is_found_and_alone_redone(folder, damage):
    finished(folder)
    path = folder.store.path("scores/shard-1.parquet")
    data = bytearray(open(path, "rb").read())
    data[20] ^= 1
    if damage == "delete":
        os.unlink(path)
    else:
        open(path, "wb").write(data if damage == "flip" else data[:-1])
    assert not folder.begin({"model": "a"})
    assert sorted(folder.finished_shards()) == ["shard-0", "shard-2"]


def test_data_without_its_record_is_not_a_finished_shard(folder):
    folder.begin({})
    folder.publish_table("shard-0.parquet", TABLE)
    assert folder.finished_shards() == {}


def test_folder_of_somebody_else_is_refused_and_left_alone(folder):
    folder.store.write_bytes("scores/thesis.txt", b"precious")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        folder.begin({})
    assert folder.store.read_bytes("scores/thesis.txt") == b"precious"


def test_tampered_manifest_cannot_name_files_outside(folder):
    finished(folder)
    manifest = folder.manifest()
    manifest["files"][0]["name"] = "../../etc/passwd"
    folder.store.write_json("scores/MANIFEST.json", manifest)
    with pytest.raises(StorageError, match="outside"):
        folder.begin({"model": "a"})


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


def test_identity_depends_on_contents_and_fingerprint_not_on_time(tmp_path):
    def identity(name, fingerprint, table=TABLE):
        folder = StageFolder(Store(tmp_path / name), "scores")
        folder.begin(fingerprint)
        record = folder.commit_shard("s", table)
        return folder.finish(fingerprint, [record], counts={}, seconds=hash(name))["identity"]

    assert identity("a", {"m": 1}) == identity("b", {"m": 1})
    assert identity("c", {"m": 2}) != identity("a2", {"m": 1})
    assert identity("d", {"m": 1}, TABLE.slice(1)) != identity("e", {"m": 1})


def test_store_and_folder_travel_to_workers(folder):
    finished(folder)
    assert pickle.loads(pickle.dumps(folder)).require()["rows"] == 9


def test_unfinished_stage_is_required_in_vain(folder):
    with pytest.raises(StorageError, match="refscale score"):
        folder.require()


def test_second_driver_is_refused(tmp_path):
    with RunLock(Store(tmp_path)):
        with pytest.raises(RunLockedError, match=str(os.getpid())), RunLock(Store(tmp_path)):
            pass
    with RunLock(Store(tmp_path)):
        pass


def _hold_and_die(path):
    RunLock(Store(path)).__enter__()
    os._exit(9)


def test_lock_of_a_dead_driver_is_taken_over(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / LOCK).exists()
    with RunLock(Store(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_lock_of_another_host_is_honoured_until_it_expires(tmp_path):
    import time

    other = {"token": "t", "host": "elsewhere", "pid": 1, "started": "1", "renewed": time.time()}
    (tmp_path / LOCK).write_text(json.dumps(other))
    with pytest.raises(RunLockedError, match="elsewhere"), RunLock(Store(tmp_path)):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**other, "renewed": time.time() - 1000}))
    with RunLock(Store(tmp_path)):
        pass


def test_first_difference_names_the_nested_field():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == ("c", "absent", 2)
    assert first_difference({"a": 1}, {"a": 1})[0] == ""


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
