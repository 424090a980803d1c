"""Selecting over the shards of a run folder: the kept pairs, the facts, the known labels."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from refscale import schema
from refscale.config import SelectConfig
from refscale.errors import ConfigError, SchemaError, SelectionError
from refscale.selection import passes
from refscale.selection.order import Group, keys_of, train_rows
from refscale.selection.radix import decide
from refscale.storage.stages import FileRecord, StageFolder
from refscale.storage.store import Store


def make_run(root, num_pairs=200, shard_pairs=30, *, seed=0, flipped=True):
    """A run folder with corpus/ and scores/; every fifth pair is held out."""
    rng = np.random.default_rng(seed)
    store = Store(root)
    corpus, scores = StageFolder(store, "corpus"), StageFolder(store, "scores")
    rows = []
    for i in range(num_pairs):
        chosen, rejected = rng.integers(3, 40, 2)
        wrong = bool(rng.random() < 0.3)
        rows.append(
            {
                "pair_id": hashlib.blake2b(f"{i}".encode(), digest_size=16).digest(),
                "source": "even" if i % 2 == 0 else "odd",
                "source_row": i,
                "split": schema.HOLDOUT if i % 5 == 0 else schema.TRAIN,
                "prompt_ids": [1, i],
                "chosen_ids": [i] * int(chosen),
                "rejected_ids": [i, 7] * int(rejected),
                "chosen_truncated": False,
                "rejected_truncated": False,
                "conversational": False,
                "prompt": f"prompt {i}",
                "chosen": f"chosen {i}",
                "rejected": f"rejected {i}",
                "passthrough": json.dumps({"wrong": wrong} if flipped else {}),
                "ref_chosen_logps": np.float32(-2.0 * chosen - (3.0 * chosen if wrong else 0)),
                "ref_rejected_logps": np.float32(-4.0 * rejected + rng.normal()),
                "num_prompt_tokens": 2,
                "num_chosen_tokens": int(chosen),
                "num_rejected_tokens": 2 * int(rejected),
            }
        )
    names = []
    for start in range(0, num_pairs, shard_pairs):
        some = rows[start : start + shard_pairs]
        name = f"shard-{len(names):05d}"
        names.append(name)
        for folder, table_schema in ((corpus, schema.CORPUS), (scores, schema.SCORES)):
            columns = [{key: row[key] for key in table_schema.names} for row in some]
            folder.commit_shard(name, pa.Table.from_pylist(columns, schema=table_schema))
    return corpus, scores, names, rows


def decide_here(scores, names, config):
    """What the pipeline does, in one process."""
    spec = passes.spec_of(config)
    fit = (0.0, 0.0)
    if spec.strategy == "length_adjusted_margin":
        fit = passes.moments(scores)(names).fit()

    def shards():
        for name in names:
            yield keys_of(passes._train_scores(scores, name), spec, fit)

    return decide(shards, spec, fit)


def kept_ids(selection, records):
    tables = [selection.read_table(record.name) for record in records]
    return {pair_id for table in tables for pair_id in table["pair_id"].to_pylist()}


def run_keep(root, corpus, scores, names, decision):
    selection = StageFolder(Store(root), "selection")
    keep = passes.keep_pairs(corpus, scores, selection, decision)
    records = [FileRecord.from_dict(json.loads(keep({"shard": n})["record"])) for n in names]
    return selection, records


def test_the_kept_set_is_that_of_a_numpy_sort_and_holds_only_training_pairs(tmp_path):
    corpus, scores, names, rows = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(strategy="mean_margin", fraction=0.3))
    selection, records = run_keep(tmp_path, corpus, scores, names, decision)

    training = [row for row in rows if row["split"] == schema.TRAIN]
    key = [
        np.float32(
            np.float64(row["ref_chosen_logps"]) / row["num_chosen_tokens"]
            - np.float64(row["ref_rejected_logps"]) / row["num_rejected_tokens"]
        )
        for row in training
    ]
    order = sorted(range(len(training)), key=lambda i: (-key[i], training[i]["pair_id"]))
    expected = {training[i]["pair_id"] for i in order[:48]}  # 0.3 * 160
    assert kept_ids(selection, records) == expected
    passes.check(records, decision)


def test_kept_pairs_carry_the_ids_and_sums_of_their_own_row(tmp_path):
    corpus, scores, names, rows = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    selection, records = run_keep(tmp_path, corpus, scores, names, decision)
    by_id = {row["pair_id"]: row for row in rows}
    for record in records:
        for pair in selection.read_table(record.name).to_pylist():
            row = by_id[pair["pair_id"]]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps"):
                assert pair[name] == row[name], name


def test_decision_and_facts_do_not_depend_on_the_shards(tmp_path):
    results = []
    for shard_pairs in (7, 200):
        corpus, scores, names, _ = make_run(tmp_path / str(shard_pairs), shard_pairs=shard_pairs)
        config = SelectConfig(strategy="length_adjusted_margin", fraction=0.4)
        decision = decide_here(scores, names, config)
        found = passes.Facts()
        for group in (names[::2], names[1::2]):
            found += passes.facts(scores, decision)(group)
        results.append((decision, passes.describe(corpus, scores, decision, found)))
    assert results[0] == results[1]


def test_examples_come_from_both_ends_and_the_cut(tmp_path):
    corpus, scores, names, rows = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    found = passes.facts(scores, decision)(names)
    examples = passes.describe(corpus, scores, decision, found)["examples"]
    threshold = decision.groups[Group("all")].threshold
    assert all(example["kept"] for example in examples["top"])
    assert not any(example["kept"] for example in examples["bottom"])
    assert {example["kept"] for example in examples["cut"]} == {True, False}
    assert min(example["selection_key"] for example in examples["top"]) > threshold
    # The kept pair nearest to the cut is the cut itself.
    assert examples["cut"][0]["selection_key"] == threshold
    by_id = {row["pair_id"].hex(): row for row in rows}
    for place in examples.values():
        for example in place:
            assert example["chosen"] == by_id[example["pair_id"]]["chosen"]


def test_per_source_keeps_the_share_of_each_source(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5, per_source=True))
    found = passes.facts(scores, decision)(names)
    facts = passes.describe(corpus, scores, decision, found)
    assert facts["sources"] == {"even": {"pairs": 80, "kept": 40}, "odd": {"pairs": 80, "kept": 40}}


def test_examples_do_not_depend_on_the_order_of_the_rows(tmp_path):
    found = []
    for name, order in (("a", 1), ("b", -1)):
        _, scores, names, _ = make_run(tmp_path / name, 4000, 4000)
        table = scores.read_table(f"{names[0]}.parquet")
        turned = table.take(np.arange(table.num_rows)[::order])
        config = SelectConfig(fraction=0.5, match_lengths=True, per_source=True)
        decision = decide_here(scores, names, config)
        # Every class has a kept pair right at its cut: more ties than there are examples.
        assert len(decision.groups) > 16
        facts = passes._shard_facts(train_rows(turned), names[0], decision)
        found.append(facts.examples)
    assert found[0] == found[1]


def test_matched_lengths_keep_what_the_corpus_has_of_each(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    config = SelectConfig(fraction=0.25, match_lengths=True)
    decision = decide_here(scores, names, config)
    found = passes.facts(scores, decision)(names)
    facts = passes.describe(corpus, scores, decision, found)
    assert facts["match_lengths"] and facts["num_kept"] == 40
    groups = facts["groups"]
    assert len(groups) > 3 and sum(group["pairs"] for group in groups.values()) == 160
    assert all(abs(group["kept"] - 0.25 * group["pairs"]) < 1 for group in groups.values())
    # Each example at a cut is measured from the cut of its own length differences.
    cuts = [group.threshold for group in decision.groups.values()]
    kept = [example for example in facts["examples"]["cut"] if example["kept"]]
    assert kept and all(example["selection_key"] in cuts for example in kept)


def test_purity_counts_the_right_labels_of_training_pairs(tmp_path):
    corpus, scores, names, rows = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    result = passes.purity(corpus, scores, names, decision, "wrong")
    training = [row for row in rows if row["split"] == schema.TRAIN]
    right = [not json.loads(row["passthrough"])["wrong"] for row in training]
    assert result["n"] == 160 and result["n_kept"] == 80
    assert result["corpus"]["value"] == pytest.approx(np.mean(right))
    # Flipped pairs got 3 nats a token less, so the kept half is all right.
    assert result["kept"]["value"] > 0.95


def test_a_flipped_column_that_no_pair_has_is_refused_with_the_columns_there_are(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    with pytest.raises(ConfigError, match=r"'flip'.*carries wrong"):
        passes.purity(corpus, scores, names, decision, "flip")


def relabel(corpus, names, label):
    """Give each pair the label that `label` makes of its row; ... gives it none."""
    for name in names:
        table = corpus.read_table(f"{name}.parquet")
        labels = [label(row) for row in table.to_pylist()]
        texts = [json.dumps({"x": 1} if one is ... else {"x": 1, "wrong": one}) for one in labels]
        place = table.schema.get_field_index("passthrough")
        table = table.set_column(place, table.schema.field(place), pa.array(texts))
        corpus.commit_shard(name, table)


def finish(scores, names):
    scores.finish({}, scores.adopt([f"{name}.parquet" for name in names]), counts={}, seconds=0.0)


def test_a_label_that_is_null_is_as_one_that_is_absent_and_text_is_refused(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    finish(scores, names)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    results = []
    for unknown in (None, ...):
        relabel(
            corpus, names, lambda row, unknown=unknown: [0, 1.0, unknown][row["source_row"] % 3]
        )
        passes.check_labels(corpus, scores, "wrong")
        results.append(passes.purity(corpus, scores, names, decision, "wrong"))
    assert results[0] == results[1]
    # Two of three of the 160 training pairs, which are those of 200 that 5 does not divide.
    assert results[0]["n"] == sum(i % 5 != 0 and i % 3 != 2 for i in range(200))
    for label, said in (
        (lambda row: "false" if row["source_row"] == 199 else False, "'wrong', .* got 'false'"),
        (lambda row: None, "in which no training pair has a value; the corpus carries wrong, x"),
        # Only what is trained on counts.
        (lambda row: 1 if row["split"] == schema.HOLDOUT else ..., "the corpus carries x"),
    ):
        relabel(corpus, names, label)
        with pytest.raises(ConfigError, match=said):
            passes.purity(corpus, scores, names, decision, "wrong")
        with pytest.raises(ConfigError, match=said):
            passes.check_labels(corpus, scores, "wrong")


def test_where_no_kept_pair_has_a_label_the_purity_of_the_rest_is_left(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    selection, records = run_keep(tmp_path, corpus, scores, names, decision)
    kept = kept_ids(selection, records)
    relabel(corpus, names, lambda row: ... if row["pair_id"] in kept else row["source_row"] % 2)
    result = passes.purity(corpus, scores, names, decision, "wrong")
    assert (result["n"], result["n_kept"], result["kept"]) == (80, 0, None)
    assert 0 < result["corpus"]["value"] < 1


def test_scores_of_another_corpus_are_refused(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    table = corpus.read_table(f"{names[0]}.parquet")
    corpus.commit_shard(names[0], table.slice(5))
    decision = decide_here(scores, names, SelectConfig(fraction=1.0))
    with pytest.raises(SchemaError, match="not in the corpus"):
        run_keep(tmp_path, corpus, scores, names[:1], decision)


def test_shards_that_do_not_hold_what_was_decided_are_refused(tmp_path):
    corpus, scores, names, _ = make_run(tmp_path)
    decision = decide_here(scores, names, SelectConfig(fraction=0.5))
    _, records = run_keep(tmp_path, corpus, scores, names[1:], decision)
    with pytest.raises(SelectionError, match="80 were decided on"):
        passes.check(records, decision)
