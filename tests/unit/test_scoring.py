"""The three steps of scoring a shard, called one after the other as the graph does."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from refscale import pipeline, schema
from refscale.cluster.runtime import ClusterInfo
from refscale.config_file import parse_config
from refscale.errors import ModelError, ScoringError
from refscale.run import Run
from refscale.scoring import devices, shard_scoring
from refscale.scoring.reference import EncodedPairs
from refscale.scoring.shard_scoring import (
    ScorerSettings,
    ShardScorer,
    publish_scores,
    read_pairs,
    table_from_bytes,
    table_to_bytes,
)
from refscale.storage.copies import local_folder
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

PAIRS = 12
SIDES = ("chosen", "rejected")


def pair_id(i):
    return bytes([i] * 16)


def corpus_table(rng=None):
    rng = rng or np.random.default_rng(0)
    rows = []
    for i in range(PAIRS):
        ids = [rng.integers(97, 122, size).tolist() for size in (5 + i, 4, 7)]
        rows.append(
            {
                "pair_id": pair_id(i),
                "source": "a",
                "source_row": i,
                "split": schema.HOLDOUT if i % 4 == 0 else schema.TRAIN,
                "prompt_ids": ids[0],
                "chosen_ids": ids[1],
                "rejected_ids": ids[2],
                "chosen_truncated": False,
                "rejected_truncated": i == 1,
                "conversational": False,
                "prompt": "",
                "chosen": "",
                "rejected": "",
                "passthrough": "{}",
            }
        )
    return schema.conform(pa.Table.from_pylist(rows), schema.CORPUS, "corpus")


@pytest.fixture
def run(tmp_path):
    store = Store(tmp_path / "run")
    folders = {name: StageFolder(store, name) for name in ("corpus", "scores")}
    for folder in folders.values():
        folder.begin({})
    folders["corpus"].commit_shard("shard-0", corpus_table())
    return folders


@pytest.fixture(scope="module")
def settings(tiny_model):
    return ScorerSettings(
        model_name_or_path=str(tiny_model),
        revision=None,
        dtype="float32",
        dtype_reason="asked for",
        path="auto",
        token_budget=None,
        compilation="auto",
        trust_remote_code=False,
        attn_implementation=None,
        adapter=None,
        quantization=None,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def scorer(settings):
    return ShardScorer(settings)


def test_a_copy_of_a_model_is_removed_once_it_is_loaded(settings, tmp_path, monkeypatch):
    local, remote = settings.model_name_or_path, "memory://models/tiny"
    Store("memory://models").upload_folder(local, "tiny")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (local, f"file://{local}"):
        with local_folder(name) as folder:
            assert folder == local
    with local_folder(remote) as folder:
        assert Path(folder).parent == tmp_path and Path(folder, "config.json").is_file()
    assert not list(tmp_path.iterdir())
    named = replace(settings, model_name_or_path=remote)
    table = table_from_bytes(table_to_bytes(corpus_table()))
    scores = ShardScorer(named)._model.score(EncodedPairs.from_table(table))
    assert np.isfinite(scores.chosen_logps).all()
    assert not list(tmp_path.iterdir())


def test_bfloat16_that_another_machine_chose_is_refused_where_it_is_slow(settings, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", set)
    chosen = replace(settings, dtype="bfloat16", dtype_reason="a GPU is fast", dtype_asked="auto")
    with pytest.raises(ModelError, match=r"a GPU is fast.*set model\.dtype: float32"):
        ShardScorer(chosen)
    ShardScorer(replace(chosen, dtype_asked="bfloat16"))


def test_tables_survive_the_way_between_processes():
    table = corpus_table()
    assert table_from_bytes(table_to_bytes(table)).equals(table)


def test_shard_is_read_scored_and_published(run, scorer):
    item = scorer(read_pairs(run["corpus"])({"shard": "shard-0"}))
    assert set(item) == {"shard", "scores", "counts"}
    record = json.loads(publish_scores(run["scores"])(item)["record"])
    assert (record["name"], record["rows"], record["counts"]["pairs"]) == (
        "shard-0.parquet",
        PAIRS,
        PAIRS,
    )
    assert record["counts"]["unscorable"] == []
    assert list(run["scores"].finished_shards()) == ["shard-0"]
    table = run["scores"].read_table("shard-0.parquet")
    assert table.schema.equals(schema.SCORES)
    assert table["pair_id"].to_pylist() == [pair_id(i) for i in range(PAIRS)]
    assert table["num_chosen_tokens"].to_pylist() == [4] * PAIRS
    assert table["rejected_truncated"].to_pylist() == [i == 1 for i in range(PAIRS)]


def test_scores_are_those_of_a_plain_forward(run, scorer, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    item = scorer(read_pairs(run["corpus"])({"shard": "shard-0"}))
    scores = table_from_bytes(item["scores"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for row, found in zip(corpus_table().to_pylist(), scores.to_pylist(), strict=True):
        for side in SIDES:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            start = len(row["prompt_ids"])
            expected = logps[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
            # float32 sums of up to 7 terms near -6 nats
            assert found[f"ref_{side}_logps"] == pytest.approx(float(expected), abs=1e-4)


def test_holdout_is_read_alone_and_up_to_an_id(run):
    def ids(**options):
        item = read_pairs(run["corpus"], **options)({"shard": "shard-0"})
        return table_from_bytes(item["pairs"])["pair_id"].to_pylist()

    assert len(ids()) == PAIRS
    assert ids(holdout_up_to=b"\xff" * 16) == [pair_id(i) for i in (0, 4, 8)]
    assert ids(holdout_up_to=pair_id(4)) == [pair_id(i) for i in (0, 4)]


def test_shard_without_pairs_is_scored(run, scorer):
    item = read_pairs(run["corpus"], holdout_up_to=b"\x00")({"shard": "shard-0"})
    scored = scorer(item)
    assert table_from_bytes(scored["scores"]).num_rows == 0
    assert json.loads(scored["counts"])["pairs"] == 0


def test_pair_that_cannot_be_scored_is_listed_with_its_reason_and_left_out(
    run, settings, tiny_model, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = corpus_table()
    bad_id = table["rejected_ids"][3][0].as_py()
    affected = [
        i
        for i, row in enumerate(table.to_pylist())
        if any(bad_id in row["prompt_ids"] + row[f"{side}_ids"][:-1] for side in SIDES)
    ]
    assert 0 < len(affected) < PAIRS
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.get_input_embeddings().weight.data[bad_id] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    scorer = ShardScorer(replace(settings, model_name_or_path=str(tmp_path / "model")))
    item = scorer(read_pairs(run["corpus"])({"shard": "shard-0"}))
    counts = json.loads(item["counts"])
    listed = dict(counts["unscorable"])
    assert set(listed) == {pair_id(i).hex() for i in affected}
    assert set(listed.values()) == {"nonfinite_logp"}
    kept = table_from_bytes(item["scores"])["pair_id"].to_pylist()
    assert kept == [pair_id(i) for i in range(PAIRS) if i not in affected]
    assert counts["pairs"] == PAIRS == len(kept) + len(listed)


def test_a_score_that_is_not_finite_is_never_published(run, scorer):
    item = scorer(read_pairs(run["corpus"])({"shard": "shard-0"}))
    table = table_from_bytes(item["scores"])
    values = table["ref_chosen_logps"].to_numpy().copy()
    values[5] = np.inf
    place = table.column_names.index("ref_chosen_logps")
    bad = table.set_column(place, table.schema.field(place), pa.array(values))
    with pytest.raises(ScoringError, match=pair_id(5).hex()):
        publish_scores(run["scores"])({**item, "scores": table_to_bytes(bad)})
    assert run["scores"].finished_shards() == {}


@pytest.mark.parametrize(("done", "threads"), [(0, 2), (3, 4), (4, 8)])
def test_the_cores_are_shared_among_the_replicas_that_have_a_shard(
    tmp_path, settings, monkeypatch, done, threads
):
    config = parse_config(
        {
            "model": {"model_name_or_path": "m"},
            "corpus": {"sources": [{"path": "a.jsonl"}]},
            "ray": {"replicas": 4, "gpus_per_replica": 0},
        }
    )
    run = Run(Store(tmp_path), config)
    cluster = ClusterInfo(embedded=True, cpus=8, gpus=0, nodes=1, physical_cores=8)
    monkeypatch.setattr(Run, "cluster", cluster)
    shards = {f"shard-{i}": 1 for i in range(5)}
    folder = run.folder("scores")
    folder.begin({})
    counts = {"pairs": 1}
    for name in list(shards)[:done]:
        folder.commit_shard(name, pa.table({"x": [1]}), counts=counts)
    found = []

    def on_ray(_run, todo, steps):
        found.append((len(todo), steps[1].options["settings"].num_threads))
        return []

    monkeypatch.setattr(pipeline, "_on_ray", on_ray)
    pipeline._score_shards(run, "score", settings, shards, folder, None, None)
    # 8 cores, and at most 4 replicas.
    assert found == [(5 - done, threads)]


def test_policy_is_a_plain_model_of_its_own(settings):
    policy = settings.for_policy("s3://bucket/run/policy")
    assert policy.model_name_or_path == "s3://bucket/run/policy"
    assert (policy.revision, policy.adapter, policy.quantization) == (None, None, None)
    assert policy.dtype == settings.dtype


def test_dtype_is_resolved_to_a_plain_name():
    assert shard_scoring.resolve_dtype("float32", cuda=False) == ("float32", "asked for")
    dtype, reason = shard_scoring.resolve_dtype("auto", cuda=False)
    assert dtype in ("float32", "bfloat16") and "this CPU has" in reason
