"""Fingerprints: digests, differences, hashes of models."""

import pytest

from refscale.errors import StorageError
from refscale.storage.fingerprints import digest, file_sha256, first_difference, model_fingerprint


def test_first_difference_names_the_nested_field():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == ("c", "absent", 2)
    assert first_difference({"a": 1}, {"a": 1})[0] == ""
    sources = [{"name": "x", "contents": {"a.jsonl": "1"}}, {"name": "y"}]
    changed = [{"name": "x", "contents": {"a.jsonl": "2"}}, {"name": "y"}]
    found = first_difference({"sources": sources}, {"sources": changed})
    assert found == ("sources.0.contents.a.jsonl", "1", "2")
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_model_fingerprint_follows_the_weights_and_not_their_place(model):
    before = model_fingerprint(str(model), None)
    # sha256 of b"weights"
    assert before["model.safetensors"].startswith("9a129038")
    moved = model.rename(model.with_name("moved"))
    assert model_fingerprint(str(moved), None) == before
    (moved / "model.safetensors").write_bytes(b"Weights")
    assert first_difference(before, model_fingerprint(str(moved), None))[0] == "model.safetensors"


def test_hash_is_remembered_until_the_file_changes(model, monkeypatch):
    path = model / "model.safetensors"
    first = file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
        assert file_sha256(path) == first
    path.write_bytes(b"other weights")
    assert file_sha256(path) != first


def test_folder_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="holds no"):
        model_fingerprint(str(model), None)
