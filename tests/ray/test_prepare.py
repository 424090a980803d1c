"""The prepare stage on Ray: the same bytes whatever the parallelism, resumed where it stopped."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import string_pairs, write_jsonl

from refscale import pipeline, schema
from refscale.config import parse_config
from refscale.corpus import fragments, sources
from refscale.errors import FingerprintError, TooManyRefusedError
from refscale.run import Run
from refscale.storage.store import Store

pytestmark = pytest.mark.ray


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Three files in at least three units, with duplicates across units and two refused rows."""
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 8000)
    rows = string_pairs(400, prompts=130)
    write_jsonl(tmp_path / "data/a.jsonl", rows[:250])
    write_jsonl(
        tmp_path / "data/b.jsonl", [*rows[200:], {"prompt": "x"}, {**rows[0], "chosen": ""}]
    )
    text = "".join(json.dumps(row) + "\n" for row in rows[:60])
    (tmp_path / "data/c.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path / "data"


def settings(model, corpus, **options):
    return parse_config(
        {
            "model": {"model_name_or_path": str(model)},
            "corpus": {"sources": [{"path": str(corpus)}], "shard_pairs": 150, **options},
        }
    )


def refusals(folder):
    return pa.concat_tables(map(pq.read_table, sorted((folder / "quarantine").glob("*.parquet"))))


def shards(folder):
    return {path.name: path.read_bytes() for path in (folder / "corpus").glob("*.parquet")}


def test_shards_are_the_same_bytes_in_any_order_and_duplicates_across_units_are_dropped(
    tiny_model, corpus, tmp_path, ray_session, monkeypatch
):
    cfg = settings(tiny_model, corpus)
    manifest = pipeline.prepare(Run(Store(tmp_path / "run"), cfg))
    counts = manifest["counts"]
    assert counts["read"] == 512
    assert counts["quarantined"] == {"empty_chosen": 1, "missing_field": 1}
    assert counts["duplicates"] == 110
    assert counts["kept"] == manifest["rows"] == 400
    tables = [pq.read_table(path) for path in sorted((tmp_path / "run/corpus").glob("*.parquet"))]
    assert all(table.schema.equals(schema.CORPUS) for table in tables)
    ids = [pair for table in tables for pair in table["pair_id"].to_pylist()]
    assert len(set(ids)) == len(ids) == 400
    prompts = [set(table["prompt"].to_pylist()) for table in tables]
    assert sum(map(len, prompts)) == len(set().union(*prompts))  # a prompt is in one shard
    refused = refusals(tmp_path / "run")
    assert sorted(refused["source_row"].to_pylist()) == [200, 201]
    assert all(name.endswith("b.jsonl") for name in refused["file"].to_pylist())
    assert not (tmp_path / "run/corpus/fragments").exists()

    # The same work in the opposite order.
    run_graph = pipeline.run_graph
    monkeypatch.setattr(
        pipeline,
        "run_graph",
        lambda items, steps, **options: run_graph(items[::-1], steps, **options),
    )
    again = pipeline.prepare(Run(Store(tmp_path / "again"), cfg))
    assert shards(tmp_path / "again") == shards(tmp_path / "run")
    assert again["identity"] == manifest["identity"]


def test_a_stopped_run_goes_on_and_another_corpus_is_refused(
    tiny_model, corpus, tmp_path, ray_session, monkeypatch
):
    cfg = settings(tiny_model, corpus)
    run = Run(Store(tmp_path / "run"), cfg)
    with monkeypatch.context() as patch:

        def stopped(*_args):
            raise KeyboardInterrupt

        patch.setattr(fragments, "plan_buckets", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline.prepare(run)
    done = list((tmp_path / "run/corpus/fragments").glob("unit-*.arrow"))
    assert len(done) >= 3
    done[0].write_bytes(done[0].read_bytes()[:-20])  # and one fragment is damaged
    manifest = pipeline.prepare(run)
    whole = pipeline.prepare(Run(Store(tmp_path / "whole"), cfg))
    assert manifest["identity"] == whole["identity"]
    assert manifest["counts"] == whole["counts"]
    write_jsonl(corpus / "a.jsonl", string_pairs(10))
    with pytest.raises(FingerprintError, match=r"a\.jsonl"):
        pipeline.prepare(run)


def test_too_many_refused_rows_end_the_run_and_leave_the_quarantine(
    tiny_model, corpus, tmp_path, ray_session
):
    cfg = settings(tiny_model, corpus, max_bad_fraction=0.001)
    with pytest.raises(TooManyRefusedError, match=r"2 of 512 rows .*quarantine"):
        pipeline.prepare(Run(Store(tmp_path / "run"), cfg))
    assert refusals(tmp_path / "run").num_rows == 2
