"""Stage folders: fingerprints, shards, manifests, the claim."""

import io
import os
import pickle
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pytest
import typer

from refscale import cli
from refscale.errors import FingerprintError, StorageError
from refscale.storage import store as storage
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

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


@pytest.mark.parametrize(
    ("stage", "way_out"),
    [
        ("scores", "redo it with `refscale score --restart`"),
        ("policy", "redo it with `refscale train --restart`"),
        ("quarantine", "redo it with `refscale prepare --restart`"),
        ("mtbench/policy", "redo it with `refscale mtbench --restart`"),
        ("compare", "redo it with `refscale compare --restart`"),
        ("completions", "redo it with `refscale compare --restart`"),
        ("reference_completions", "redo it with `refscale compare --restart`"),
        ("data", "use another --out, or delete /"),
        ("elsewhere", "use another --run-dir, or delete elsewhere/"),
    ],
)
def test_the_way_out_of_another_fingerprint_is_a_command_that_exists(tmp_path, stage, way_out):
    folder = StageFolder(Store(tmp_path), stage)
    finished(folder, {"model": "a"})
    with pytest.raises(FingerprintError) as caught:
        folder.begin({"model": "b"})
    assert way_out in str(caught.value)
    command = re.search(r"`refscale (\w+) --restart`", str(caught.value))
    if command:
        parameters = typer.main.get_command(cli.app).commands[command[1]].params
        assert "--restart" in [option for parameter in parameters for option in parameter.opts]
    folder.store.delete(f"{stage}/STAGE.json")
    with pytest.raises(StorageError, match="another --out" if stage == "data" else "--run-dir"):
        folder.begin({"model": "b"})


def test_what_is_unfinished_names_the_command_that_writes_it(tmp_path):
    def said(stage):
        with pytest.raises(StorageError, match="is not finished") as caught:
            StageFolder(Store(tmp_path), stage).require()
        return str(caught.value)

    assert said("policy").endswith("; run `refscale train` or `refscale run` first")
    assert said("mtbench/policy").endswith("; run `refscale mtbench` first")
    assert said("elsewhere").endswith("is not finished")


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


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A finished stage on a store that is not local, and how to make its files fail when read."""
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", (0.0, 0.0))
    folder = StageFolder(Store(f"memory://{tmp_path.name}/run"), "scores")
    finished(folder)
    failures = []

    def open_input(store, relative):
        stream = io.BytesIO(store.read_bytes(relative))

        def read(size):
            if failures:
                raise OSError(failures.pop())
            return stream.read(size)

        return nullcontext(SimpleNamespace(read=read))

    monkeypatch.setattr(Store, "open_input", open_input)
    return folder, failures


def test_a_passing_failure_to_read_back_a_finished_stage_costs_nothing(remote):
    folder, failures = remote
    whole = folder.manifest()["files"][1]["sha256"]
    for look in (
        lambda: folder.begin({"model": "a"}),
        lambda: len(folder.finished_shards()) == 3,
        lambda: folder.adopt(["shard-1.parquet"])[0].sha256 == whole,
    ):
        failures[:] = ["AWS Error SLOW_DOWN during GetObject operation: m"] * 2
        assert look() and not failures


@pytest.mark.parametrize("message", ["AWS Error ACCESS_DENIED", "AWS Error SLOW_DOWN"])
def test_what_cannot_be_read_back_is_not_taken_for_damaged(remote, message):
    folder, failures = remote
    failures[:] = [message] * 1000
    for look in (
        lambda: folder.begin({"model": "a"}),
        folder.finished_shards,
        lambda: folder.damaged(folder.manifest()),
    ):
        with pytest.raises(StorageError, match=r"shard-\d\.parquet.*nothing was deleted"):
            look()
    with pytest.raises(StorageError, match=r"cannot read scores/shard-1\.parquet"):
        folder.adopt(["shard-1.parquet"])
    failures.clear()
    assert folder.begin({"model": "a"}) and len(folder.finished_shards()) == 3


def test_a_record_that_cannot_be_read_is_not_taken_for_damaged(remote, monkeypatch):
    folder, _failures = remote
    folder.store.write_bytes("scores/shard-2.json", b"{")
    assert sorted(folder.finished_shards()) == ["shard-0", "shard-1"]
    read = Store.read_bytes

    def denied(store, relative):
        if relative == "scores/shard-1.json":
            raise StorageError("cannot read it: AWS Error ACCESS_DENIED")
        return read(store, relative)

    monkeypatch.setattr(Store, "read_bytes", denied)
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        folder.finished_shards()


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


def test_restart_leaves_a_folder_of_somebody_else_alone(folder):
    folder.store.write_bytes("scores/thesis.txt", b"precious")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        folder.begin({}, restart=True)
    assert folder.store.read_bytes("scores/thesis.txt") == b"precious"


def test_restart_that_was_broken_off_can_be_repeated(folder, monkeypatch):
    finished(folder)

    def dies(_store, names):
        os.unlink(folder.store.path(names[0]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete_files", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.begin({"model": "b"}, restart=True)
    assert not folder.begin({"model": "b"}, restart=True)
    assert folder.finished_shards() == {}


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"files": [], "fingerprint": {}}', "identity"])
def test_damaged_manifest_is_withdrawn_and_the_shards_are_kept(folder, damage):
    manifest = finished(folder)
    if damage == "identity":
        manifest["files"][0]["sha256"] = manifest["files"][1]["sha256"][::-1]
        folder.store.write_json("scores/MANIFEST.json", manifest)
    else:
        folder.store.write_bytes("scores/MANIFEST.json", damage)
    assert not folder.begin({"model": "a"})
    assert len(folder.finished_shards()) == 3
    again = folder.finish({"model": "a"}, folder.finished_shards().values(), counts={}, seconds=2.0)
    assert again["identity"] == StageFolder(folder.store, "scores").require()["identity"]
    assert folder.begin({"model": "a"})


def test_worker_of_a_killed_driver_commits_nothing_once_the_next_one_has_begun(folder):
    folder.begin({"model": "a"})
    orphan = pickle.loads(pickle.dumps(folder))
    part = pickle.loads(pickle.dumps(folder.part("fragments")))
    orphan.commit_shard("shard-0", TABLE)
    part.commit_bytes("unit-0", ".arrow", b"x", rows=1)
    successor = StageFolder(folder.store, "scores")
    successor.begin({"model": "b"}, restart=True)
    for late, write in (
        (orphan, lambda: orphan.commit_shard("shard-1", TABLE)),
        (part, lambda: part.commit_bytes("unit-1", ".arrow", b"x", rows=1)),
    ):
        with pytest.raises(StorageError, match="taken over"):
            write()
        assert late.finished_shards() == {}
    successor.commit_shard("shard-1", TABLE)
    assert list(successor.finished_shards()) == ["shard-1"]


def test_flipped_byte_in_a_table_is_found_when_it_is_read(folder):
    folder.begin({})
    table = pa.table({"x": list(range(5000))})
    folder.commit_shard("shard-0", table)
    path = folder.store.path("scores/shard-0.parquet")
    data = bytearray(open(path, "rb").read())
    found = 0
    for position in range(100, 2000, 100):
        flipped = data.copy()
        flipped[position] ^= 0x10
        open(path, "wb").write(flipped)
        with pytest.raises(StorageError, match=r"shard-0\.parquet"):
            folder.read_table("shard-0.parquet")
        found += 1
    assert found == 19


def test_leftovers_of_a_killed_writer_are_swept(folder):
    folder.begin({})
    leftover = folder.store.path("scores/.tmp-0123")
    open(leftover, "wb").write(b"half a shard")
    folder.begin({})
    assert not os.path.exists(leftover)


def claimed_at(folder, age_s):
    """Make the last claim that old."""
    path = folder.store.path(folder.file("STAGE.json"))
    at = os.stat(path).st_mtime - age_s
    os.utime(path, (at, at))


def test_the_seconds_of_commands_that_broke_off_are_known_to_the_next(folder):
    folder.begin({"model": "a"})
    assert folder.spent_s == 0
    folder.commit_shard("shard-0", TABLE)
    claimed_at(folder, 100)
    second = StageFolder(folder.store, "scores")
    second.begin({"model": "a"})
    assert second.spent_s == pytest.approx(100, abs=5)
    claimed_at(folder, 50)  # and died before its first file
    third = StageFolder(folder.store, "scores")
    third.begin({"model": "a"})
    assert third.spent_s == pytest.approx(150, abs=10)
    third.begin({"model": "b"}, restart=True)
    assert third.spent_s == 0


def test_lost_files_are_found_by_their_size_without_being_read(folder):
    manifest = finished(folder)
    assert folder.lost(manifest) == []
    os.unlink(folder.store.path("scores/shard-1.parquet"))
    folder.store.write_bytes("scores/shard-2.parquet", b"cut")
    assert folder.lost(manifest) == ["shard-1.parquet", "shard-2.parquet"]
