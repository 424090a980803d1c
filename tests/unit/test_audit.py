"""The audit of a run folder that is written here, shard by shard."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refscale import schema
from refscale.errors import ConfigError, FingerprintError, StorageError
from refscale.experiments.audit import AUDIT, audit, audit_lines, doubt_quality, print_audit
from refscale.progress import console
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


def make_run(folder, margins, *, shards=3, flipped=None, prompt="p", held=(), source="s"):
    """A run whose pair i has mean_margin margins[i]: 2 nats a token against 2 + margin."""
    store = Store(folder)
    flipped = flipped.tolist() if isinstance(flipped, np.ndarray) else flipped
    corpus, scores = StageFolder(store, "corpus"), StageFolder(store, "scores")
    for stage in (corpus, scores):
        stage.begin({"made": "here"})
    records = {corpus: [], scores: []}
    for shard, rows in enumerate(np.array_split(np.arange(len(margins)), shards)):
        common = [
            {"pair_id": int(i).to_bytes(16, "big"), "source": source,
             "split": schema.HOLDOUT if i in held else schema.TRAIN,
             "chosen_truncated": False, "rejected_truncated": False}
            for i in rows
        ]  # fmt: skip
        texts = [
            {**row, "source_row": int(i), "prompt_ids": [1], "chosen_ids": [2],
             "rejected_ids": [3], "conversational": False, "prompt": prompt,
             "chosen": f"chosen {i}", "rejected": f"rejected {i}",
             "passthrough": json.dumps({} if flipped is None else {"wrong": flipped[i]})}
            for i, row in zip(rows, common, strict=True)
        ]  # fmt: skip
        numbers = [
            {**row, "ref_chosen_logps": -20.0 + 10 * margins[i], "ref_rejected_logps": -8.0,
             "num_prompt_tokens": 1, "num_chosen_tokens": 10, "num_rejected_tokens": 4}
            for i, row in zip(rows, common, strict=True)
        ]  # fmt: skip
        for stage, found, columns in (
            (corpus, texts, schema.CORPUS),
            (scores, numbers, schema.SCORES),
        ):
            table = pa.Table.from_pylist(found, schema=columns)
            records[stage].append(stage.commit_shard(f"shard-{shard:05d}", table))
    prepared = corpus.finish({"made": "here"}, records[corpus], counts={}, seconds=0.0)
    made_from = {"corpus": prepared["identity"]}
    scores.finish(made_from, records[scores], counts={}, seconds=0.0)
    return store


def test_the_most_doubted_pairs_come_first_with_their_texts(tmp_path):
    margins = np.random.default_rng(0).permutation(30) / 4 - 3  # different, exact in float32
    result = audit(make_run(tmp_path, margins), 5)
    expected = np.argsort(margins)[:5]
    rows = result.pairs.to_pylist()
    assert [row["source_row"] for row in rows] == expected.tolist()
    assert [row["chosen"] for row in rows] == [f"chosen {i}" for i in expected]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([row["mean_margin"] for row in rows], margins[expected])
    assert (result.num_pairs, result.num_doubted) == (30, int((margins < 0).sum()))
    assert (rows[0]["num_chosen_tokens"], rows[0]["num_rejected_tokens"]) == (10, 4)


def test_the_list_does_not_depend_on_the_shards_even_where_all_tie(tmp_path):
    lists = []
    for shards in (1, 4, 7):
        store = make_run(tmp_path / str(shards), np.zeros(28), shards=shards)
        lists.append(audit(store, 10).pairs["pair_id"].to_pylist())
    assert lists[0] == lists[1] == lists[2] == sorted(lists[0])
    assert int(lists[0][-1], 16) == 9


def test_the_files_hold_what_was_returned(tmp_path):
    store = make_run(tmp_path, np.linspace(-1, 1, 9), flipped=np.arange(9) < 3)
    result = audit(store, 4, flipped_column="wrong")
    assert pq.read_table(tmp_path / "audit/pairs.parquet", schema=AUDIT).equals(result.pairs)
    lines = (tmp_path / "audit/pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.pairs.to_pylist()
    assert store.read_json("audit/summary.json") == result.summary()


def test_known_wrong_labels_give_auc_and_precision(tmp_path):
    # Wrong are the pairs 0, 1 and 3 of 20 by doubt: of 3 x 17 comparisons one is lost.
    flipped = np.isin(np.arange(20), [0, 1, 3])
    result = audit(make_run(tmp_path, np.arange(20) / 8 - 1, flipped=flipped), 5,
                   flipped_column="wrong")  # fmt: skip
    assert result.quality["auc"] == pytest.approx(50 / 51)
    assert result.quality["base_rate"] == 3 / 20
    assert result.quality["precision"]["3"]["value"] == pytest.approx(2 / 3)
    assert result.quality["precision"]["10"]["value"] == pytest.approx(3 / 10)
    assert list(result.quality["precision"]) == ["3", "10"]
    assert "AUC 0.980" in audit_lines(result)[1]


def test_one_split_alone_can_be_audited(tmp_path):
    flipped = np.arange(12) < 6
    store = make_run(tmp_path, np.arange(12) / 4 - 2, flipped=flipped, held={0, 3})
    result = audit(store, 3, flipped_column="wrong", split="train")
    assert result.pairs["source_row"].to_pylist() == [1, 2, 4]
    assert (result.num_pairs, result.quality["n_flipped"]) == (10, 4)


def test_an_unknown_split_is_refused_with_those_that_there_are(tmp_path):
    store = make_run(tmp_path, np.arange(4) / 4)
    with pytest.raises(ConfigError, match="must be train or holdout, got 'test'; leave it out"):
        audit(store, 3, split="test")
    assert not store.exists("audit/summary.json")


def test_a_label_may_be_a_number_or_unknown_but_no_text(tmp_path):
    flipped = [True, 1, 1.0, False, 0, 0.0, None, None]
    store = make_run(tmp_path / "flags", np.arange(8) / 4 - 1, flipped=flipped)
    quality = audit(store, 3, flipped_column="wrong").quality
    assert (quality["n"], quality["n_flipped"], quality["auc"]) == (6, 3, 1.0)
    store = make_run(tmp_path / "text", np.arange(3) / 4, flipped=[True, False, "false"])
    with pytest.raises(ConfigError, match=r"the column 'wrong', .* got 'false'"):
        audit(store, 3, flipped_column="wrong")


def test_scores_of_another_corpus_are_not_audited(tmp_path):
    store = make_run(tmp_path / "run", np.arange(6) / 2)
    other = make_run(tmp_path / "other", np.arange(8) / 2, shards=2)
    shutil.rmtree(store.path("corpus"))
    shutil.copytree(other.path("corpus"), store.path("corpus"))
    said = "scores/ was made from another corpus/ than .*`refscale score --restart`"
    with pytest.raises(FingerprintError, match=said):
        audit(store, 8)
    assert not store.exists("audit")


def test_quality_without_a_wrong_label_has_no_auc():
    quality = doubt_quality(np.zeros(12, bool), np.arange(12))
    assert quality["auc"] is None and quality["precision"]["10"]["value"] == 0


def test_a_column_that_no_pair_has_and_a_list_of_nothing_are_errors(tmp_path):
    store = make_run(tmp_path, np.arange(6) / 2, flipped=np.zeros(6))
    with pytest.raises(ConfigError, match="no pair of the corpus has a value in the column 'flip'"):
        audit(store, 5, flipped_column="flip")
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        audit(store, 0)
    with pytest.raises(StorageError, match=r"corpus/ .* is not finished"):
        audit(Store(tmp_path / "empty"), 5)


def test_the_table_shows_texts_literally_and_the_last_message_of_a_chat(tmp_path):
    prompt = json.dumps([{"role": "user", "content": "[red]really[/red]\nwhat?"}])
    result = audit(make_run(tmp_path, np.arange(6) - 2.0, prompt=prompt), 3)
    with console.capture() as captured:
        print_audit(result)
    shown = captured.get()
    assert "[red]" in shown.replace("\n", "") and "role" not in shown
    assert "prefers the rejected completion in 2 of 6 pairs (33.3%)" in " ".join(shown.split())


def test_neither_text_nor_source_of_a_pair_can_drive_the_terminal(tmp_path):
    hostile = "\x1b]0;mine\x07\x1b[2J\x9b1m\u202e[/b]"
    chat = json.dumps([{"role": "user", "content": hostile}])
    for number, prompt in enumerate((hostile, chat)):
        store = make_run(tmp_path / str(number), np.arange(6) - 2.0, prompt=prompt, source=hostile)
        result = audit(store, 3)
        with console.capture() as captured:
            print_audit(result)
        shown = captured.get()
        assert not set("\x07\x1b\x9b\u202e") & set(shown)
        # Prompt and source of three pairs; cells are folded.
        assert "".join(shown.split()).count("\\x07") > 0
        assert hostile in result.pairs.to_pylist()[0]["source"]  # what is stored is what was given
