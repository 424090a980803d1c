"""Folders that save_to_disk wrote, read from an S3-compatible server."""

import os
import tempfile

import datasets
import pytest
from support import string_pairs

from refscale.config import Source
from refscale.corpus import hf_datasets
from refscale.corpus.reading import read_rows
from refscale.corpus.sources import contents, locate, plan_units
from refscale.errors import CorpusError
from refscale.storage.store import Store

ROWS = string_pairs(250)


@pytest.fixture
def saved(s3, tmp_path, monkeypatch):
    """Puts a folder that save_to_disk writes on the server; the URI. Copies go to tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    hf_datasets._load_dataset.cache_clear()

    def save(dataset, name):
        dataset.save_to_disk(tmp_path / name)
        Store(s3.uri("corpora")).upload_folder(str(tmp_path / name), name)
        s3.requests.clear()
        return s3.uri(f"corpora/{name}")

    yield save
    hf_datasets._load_dataset.cache_clear()


def read(uri, **options):
    """The rows, in small units."""
    found = locate(Source(path=uri, **options), 0)
    units = plan_units(found, 500, None)
    assert len(units) > 1
    return [row for u in units for part in u.parts for _, row, _ in read_rows(part, 1 << 20)]


def test_a_saved_dataset_is_read_as_it_is_from_a_disk(saved, s3, tmp_path):
    uri = saved(datasets.Dataset.from_list(ROWS), "one")
    assert read(uri) == ROWS
    # Once a process, and nothing of it is left behind.
    [_] = [path for method, path in s3.requests if method == "GET" and path.endswith(".arrow")]
    assert os.listdir(tmp_path / "tmp") == []
    assert set(contents(locate(Source(path=uri), 0))) > {"state.json", "dataset_info.json"}


def test_of_a_saved_dict_the_split_alone_is_fetched(saved, s3):
    halves = {"train": ROWS, "test": ROWS[:20]}
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in halves.items()}
    uri = saved(datasets.DatasetDict(parts), "dict")
    assert read(uri, split="test") == ROWS[:20]
    fetched = [path for method, path in s3.requests if method == "GET" and path.endswith(".arrow")]
    assert ["/test/" in path for path in fetched] == [True]
    assert read(uri) == ROWS
    with pytest.raises(CorpusError, match="no split dev; set split to one of train, test"):
        read(uri, split="dev")


def test_a_saved_dataset_without_its_rows_is_one_error_that_names_it(saved, s3):
    uri = saved(datasets.Dataset.from_list(ROWS), "damaged")
    store = Store(uri)
    store.delete("dataset_info.json")
    with pytest.raises(CorpusError, match=r"the dataset s3://.*damaged.* cannot be loaded: "):
        read(uri)
