"""A file that is hashed and cannot be read is one error that names it, of a source or a model."""

import shutil

import pytest
from support import string_pairs, write_jsonl

from refscale.config import Source
from refscale.corpus.encoding import EncoderSettings, tokenizer_fingerprint
from refscale.corpus.sources import contents, locate
from refscale.errors import CorpusError, ModelError, StorageError
from refscale.storage.fingerprints import file_sha256, model_fingerprint

# A file that is there and that even root cannot read: nothing is mapped at its start.
UNREADABLE = "/proc/self/mem"


@pytest.fixture
def model(tmp_path, tiny_model):
    """A copy of the tiny model."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_a_file_that_is_not_there_or_not_to_be_read_is_named(tmp_path):
    for path in (tmp_path / "missing", UNREADABLE):
        with pytest.raises(StorageError, match=f"^{path} cannot be read: .*; check that it is"):
            file_sha256(path)


@pytest.mark.parametrize("broken", ["missing", UNREADABLE], ids=["missing", "unreadable"])
def test_a_file_of_a_source(tmp_path, broken):
    path = write_jsonl(tmp_path / "rows.jsonl", string_pairs(3))
    found = locate(Source(path=str(tmp_path)), 0)
    path.unlink()
    path.symlink_to(broken)
    with pytest.raises(CorpusError, match=rf"^corpus\.sources\.0: {path} cannot be read: "):
        contents(found)


@pytest.mark.parametrize("broken", ["missing", UNREADABLE], ids=["missing", "unreadable"])
def test_the_weights_of_a_model(model, broken):
    (model / "more.safetensors").symlink_to(broken)
    with pytest.raises(StorageError, match=f"^{model}/more.safetensors cannot be read: "):
        model_fingerprint(str(model), None)


def test_a_file_of_a_tokenizer(model):
    (model / "vocab.json").symlink_to(UNREADABLE)
    settings = EncoderSettings(str(model), None, False, None, 64, "keep_start")
    with pytest.raises(ModelError, match=f"^{model}/vocab.json cannot be read: "):
        tokenizer_fingerprint(settings)
