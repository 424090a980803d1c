"""Preparing: every defect at its row, counts that add up, duplicates settled, plans that repeat."""

import gzip
import json
import pickle
import random
import subprocess
import sys
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import string_pairs, write_jsonl

from refscale import schema
from refscale.config import parse_config
from refscale.corpus import planning, reading, sources
from refscale.corpus.counts import Counts
from refscale.corpus.pairs import REASONS
from refscale.corpus.preparation import (
    check_refused,
    plan,
    prepare_unit,
    settle_bucket,
    validate_sources,
)
from refscale.corpus.settling import PREPARED
from refscale.errors import CorpusError, ModelError, SchemaError, TooManyRefusedError

USER = {"role": "user", "content": "Which?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("This one.", "That one."))


def config(model, *paths, encoding=None, chat_template=None, **corpus):
    """A config of one source a path; a source may be a dict."""
    found = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
    return parse_config(
        {
            "model": {"model_name_or_path": str(model), "chat_template": chat_template},
            "corpus": {"sources": found, **corpus},
            "encoding": encoding or {},
        }
    )


def prepare(cfg, order=None):
    """(settled table, refused table, total counts) of a whole corpus, units in any order."""
    planned = pickle.loads(pickle.dumps(plan(cfg)))
    encoder = planned.encoder.load()
    indices = list(range(len(planned.units)))
    done = [prepare_unit(planned, i, encoder) for i in (order or (lambda x: x))(indices)]
    settled, counts = settle_bucket(
        pa.concat_tables([unit.pairs for unit in done]),
        duplicates=planned.duplicates,
        contradictions=planned.contradictions,
    )
    total = Counts.total([*(unit.counts.as_dict() for unit in done), counts.as_dict()])
    total.check()
    refused = pa.concat_tables([unit.refused for unit in done])
    return settled, refused, total


def planted_defects() -> dict[int, tuple[bytes, str]]:
    """Row -> (line, expected reason): every defect that a row can have, among 120 good rows."""
    good = {"prompt": "Which?", "chosen": " This.", "rejected": " That."}
    chat = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    rows = [
        (b'{"prompt": "\xff"}', "bad_encoding"),
        (b'{"prompt": "x", "chosen": "\\ud800", "rejected": "y"}', "bad_encoding"),
        (b'{"prompt": "cut', "bad_json"),
        (b"[1, 2]", "wrong_type"),
        ({**good, "chosen": "x" * 3000}, "row_too_large"),
        ({**good, "chosen": 7}, "wrong_type"),
        ({**good, "chosen": [YES]}, "wrong_type"),
        ({"prompt": "x", "rejected": "y"}, "missing_field"),
        ({**good, "rejected": None}, "null_field"),
        ({**chat, "chosen": []}, "empty_messages"),
        ({**chat, "chosen": [YES, USER]}, "bad_roles"),
        ({**chat, "prompt": [{"role": "narrator", "content": "x"}]}, "bad_roles"),
        ({**good, "chosen": ""}, "empty_chosen"),
        ({**chat, "rejected": [{"role": "assistant", "content": ""}]}, "empty_rejected"),
        ({**good, "rejected": " This."}, "identical_pair"),
        ({"chosen": "Q: hi A: yes", "rejected": "Q: hi A: yes"}, "identical_pair"),
        ({**good, "prompt": "p" * 300}, "prompt_too_long"),
        ({**good, "chosen": "c" * 400 + "a", "rejected": "c" * 400 + "b"}, "identical_tokens"),
        ({"prompt": "", "chosen": "<|endoftext|>", "rejected": "b"}, "no_scored_tokens"),
        ({**chat, "prompt": [{"role": "user", "content": "bad"}]}, "template_failed"),
    ]
    lines = [
        (row if isinstance(row, bytes) else json.dumps(row).encode(), reason)
        for row, reason in rows
    ]
    return {3 + 5 * i: line for i, line in enumerate(lines)}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A chat template that refuses one conversation."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('bad') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return str(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_planted_defect_is_found_at_its_row_and_no_other(
    tiny_model, template, tmp_path, monkeypatch, compressed
):
    defects = planted_defects()
    lines = [json.dumps(row).encode() for row in string_pairs(120)]
    for row, (line, _) in defects.items():
        lines[row] = line
    lines[50] = b"  "  # a blank line is no row, but has a number
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data) if compressed else data)
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 2000)
    monkeypatch.setattr(reading, "_BLOCK", 512)
    cfg = config(
        tiny_model,
        path,
        chat_template=template,
        encoding={"max_length": 256},
        max_row_bytes=2000,
    )
    assert len(plan(cfg).units) > 2
    found = validate_sources(cfg)
    assert {r.row: r.reason for r in found.refusals} == {k: v for k, (_, v) in defects.items()}
    assert all(r.file == str(path) for r in found.refusals)
    assert found.counts.read == 119
    assert found.counts.kept == 119 - len(defects)
    assert found.counts.quarantined["bad_roles"] == 2
    found.counts.check()
    settled, refused, _ = prepare(cfg)
    assert settled.schema.names == PREPARED.names
    assert schema.conform(refused, schema.QUARANTINE, "quarantine").num_rows == len(defects)
    assert set(settled["source_row"].to_pylist()) == set(range(120)) - set(defects) - {50}
    raw = dict(zip(refused["source_row"].to_pylist(), refused["raw"].to_pylist(), strict=True))
    assert raw[3] == '{"prompt": "\\xff"}'
    # The planted ones are all that one tokenizer and one shape can show.
    shown = {reason for _, reason in defects.values()}
    elsewhere = {"tie", "unlabelled", "prompt_mismatch", "too_long", "double_bos"}
    assert shown | elsewhere == set(REASONS)


def test_truncation_quarantine_refuses_what_keep_start_cuts(tiny_model, tmp_path):
    rows = [*string_pairs(5), {"prompt": "p", "chosen": "c" * 99, "rejected": "d"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    cut = validate_sources(config(tiny_model, path, encoding={"max_length": 90}))
    assert (cut.counts.truncated, cut.refusals) == (1, [])
    limits = {"max_length": 90, "truncation": "quarantine"}
    (refusal,) = validate_sources(config(tiny_model, path, encoding=limits)).refusals
    assert (refusal.row, refusal.reason) == (5, "too_long")


def test_stored_columns_are_what_was_read(tiny_model, tmp_path):
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "note": 3}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, string_pairs(1)[0]])
    settled, _, _ = prepare(config(tiny_model, path))
    rows = {r["source_row"]: r for r in settled.to_pylist()}
    assert rows[0]["conversational"]
    assert not rows[1]["conversational"]
    assert json.loads(rows[0]["chosen"]) == [YES]
    assert json.loads(rows[0]["passthrough"]) == {"note": 3}
    assert rows[1]["prompt"] == "Question 0: which?"
    assert bytes(rows[1]["prompt_ids"][:1]) != b""
    assert schema.conform(settled, schema.CORPUS, "corpus").num_rows == 2


# -- duplicates, contradictions, holdout, weight -------------------------------------------------


def test_the_first_of_equal_pairs_in_corpus_order_is_kept_whatever_the_order_of_units(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 1)
    rows = string_pairs(30)
    first = write_jsonl(tmp_path / "b.jsonl", rows[:20])
    again = write_jsonl(tmp_path / "a.jsonl", [*rows[10:], *rows[:5]])
    cfg = config(tiny_model, first, again)
    assert len(plan(cfg).units) == 2
    settled, _, counts = prepare(cfg)
    backwards, _, _ = prepare(cfg, order=reversed)
    assert settled.equals(backwards)
    assert (counts.read, counts.duplicates, counts.kept) == (45, 15, 30)
    kept = set(zip(settled["source"].to_pylist(), settled["source_row"].to_pylist(), strict=True))
    assert kept == {("b", i) for i in range(20)} | {("a", i) for i in range(10, 20)}
    everything, _, counts = prepare(config(tiny_model, first, again, duplicates="keep"))
    assert (counts.duplicates, counts.kept, everything.num_rows) == (0, 45, 45)
    # Each has its own id, whatever the order of the units; the first of equal pairs has the pair's.
    other_way, _, _ = prepare(config(tiny_model, first, again, duplicates="keep"), order=reversed)
    assert everything.equals(other_way)
    found = everything["pair_id"].to_pylist()
    assert len(set(found)) == 45 and set(settled["pair_id"].to_pylist()) <= set(found)


def test_contradictions_are_counted_and_dropped_if_asked(tiny_model, tmp_path):
    rows = string_pairs(6)
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[:2]]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *swapped, swapped[0]])
    _, _, counts = prepare(config(tiny_model, path))
    assert (counts.contradictions, counts.contradictions_dropped, counts.kept) == (4, 0, 8)
    settled, _, counts = prepare(config(tiny_model, path, contradictions="drop"))
    assert (counts.duplicates, counts.contradictions_dropped, counts.kept) == (1, 4, 4)
    assert sorted(settled["source_row"].to_pylist()) == [2, 3, 4, 5]


def test_pairs_without_a_prompt_are_settled_and_held_out_like_others(tiny_model, tmp_path):
    rows = [{"chosen": r["chosen"], "rejected": f"no{r['rejected']}"} for r in string_pairs(120)]
    swapped = {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[1], swapped])
    settled, _, counts = prepare(config(tiny_model, path, holdout_fraction=0.5))
    assert set(settled["prompt"].to_pylist()) == {""}
    assert (counts.duplicates, counts.contradictions, counts.kept) == (1, 2, 121)
    # 60 expected; the standard deviation of the count is 5.5.
    assert 38 < counts.holdout < 82
    assert len(set(settled["prompt_hash"].to_pylist())) == 120


def test_no_prompt_is_on_both_sides_of_the_holdout(tiny_model, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", string_pairs(300, prompts=60))
    cfg = config(tiny_model, path, holdout_fraction=0.3)
    settled, _, counts = prepare(cfg)
    sides: dict[str, set] = {}
    for prompt, split in zip(
        settled["prompt"].to_pylist(), settled["split"].to_pylist(), strict=True
    ):
        sides.setdefault(prompt, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    assert 0 < counts.holdout < 300
    other, _, _ = prepare(config(tiny_model, path, holdout_fraction=0.3, seed=1))
    assert other["split"] != settled["split"]
    # Prompts are together, so that a shard shares them.
    prompts = settled["prompt"].to_pylist()
    assert sum(a != b for a, b in pairwise(prompts)) == 59


def test_a_source_decides_its_holdout_and_a_prompt_held_out_anywhere_is_held_out(
    tiny_model, tmp_path
):
    rows = string_pairs(40)
    train = write_jsonl(tmp_path / "train.jsonl", rows[:30])
    held = write_jsonl(tmp_path / "held.jsonl", rows[25:])
    cfg = config(
        tiny_model,
        {"path": str(train), "holdout": False},
        {"path": str(held), "holdout": True},
        holdout_fraction=0.5,
    )
    settled, _, counts = prepare(cfg)
    assert counts.duplicates == 5
    assert counts.holdout == 15
    for row in settled.to_pylist():
        number = json.loads(row["passthrough"])["note"]
        assert (row["split"] == schema.HOLDOUT) == (number >= 25)


def test_weight_draws_pairs_by_content(tiny_model, tmp_path):
    rows = string_pairs(200)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", random.Random(1).sample(rows, 200))
    settled, _, counts = prepare(config(tiny_model, {"path": str(path), "weight": 0.25}))
    shuffled, _, _ = prepare(config(tiny_model, {"path": str(mixed), "weight": 0.25}))
    # 50 expected; the standard deviation of the count is 6.1.
    assert 25 < counts.kept < 75
    assert counts.unused == 200 - counts.kept
    assert settled["pair_id"] == shuffled["pair_id"]


# -- stability -----------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), files=st.integers(1, 4))
def test_pair_ids_do_not_depend_on_row_order_file_split_or_format(
    tiny_model, tmp_path_factory, seed, files
):
    rng = random.Random(seed)
    rows = [
        *string_pairs(12),
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [NO], "rejected": [YES]},
    ]
    folder = tmp_path_factory.mktemp("split")
    plain, _, _ = prepare(config(tiny_model, write_jsonl(folder / "all.jsonl", rows)))
    mixed = [dict(rng.sample(list(row.items()), len(row))) for row in rng.sample(rows, len(rows))]
    for i in range(files):
        write_jsonl(folder / f"many/{i}.jsonl", mixed[i::files] or mixed[:1])
    parts, _, _ = prepare(config(tiny_model, folder / "many"))
    texts = [row for row in mixed if isinstance(row["prompt"], str)]
    chats = [row for row in mixed if not isinstance(row["prompt"], str)]
    pq.write_table(pa.Table.from_pylist(texts), folder / "t.parquet")
    pq.write_table(pa.Table.from_pylist(chats), folder / "c.parquet")
    tables, _, _ = prepare(config(tiny_model, folder / "c.parquet", folder / "t.parquet"))
    keys = ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "split"]
    order = [("pair_id", "ascending")]
    expected = plain.select(keys).sort_by(order)
    assert parts.select(keys).sort_by(order).equals(expected)
    assert tables.select(keys).sort_by(order).equals(expected)


def test_the_size_of_units_changes_nothing(tiny_model, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [*string_pairs(80), *string_pairs(40)])
    whole, _, counts = prepare(config(tiny_model, path))
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 700)
    monkeypatch.setattr(reading, "_BLOCK", 128)
    assert len(plan(config(tiny_model, path)).units) > 5
    pieces, _, again = prepare(config(tiny_model, path), order=reversed)
    assert pieces.drop(["place"]).equals(whole.drop(["place"]))
    assert again.as_dict() == counts.as_dict()


# -- plan ----------------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_changes_the_corpus_and_nothing_else(
    tiny_model, template, tmp_path
):
    rows = string_pairs(20)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    base = plan(config(tiny_model, path)).fingerprint
    assert json.loads(json.dumps(base)) == base
    assert plan(config(tiny_model, path, max_bad_fraction=0.5)).fingerprint == base
    moved = write_jsonl(tmp_path / "elsewhere/rows.jsonl", rows)
    assert plan(config(tiny_model, moved)).fingerprint == base
    others = [
        config(tiny_model, path, seed=1),
        config(tiny_model, path, allow_empty_completion=True),
        config(tiny_model, path, encoding={"max_length": 512}),
        config(tiny_model, path, chat_template=template),
        config(tiny_model, {"path": str(path), "weight": 0.5}),
        config(tiny_model, {"path": str(path), "format": "columns", "columns": {"prompt": "note"}}),
    ]
    prints = [json.dumps(plan(cfg).fingerprint, sort_keys=True) for cfg in others]
    assert len({*prints, json.dumps(base, sort_keys=True)}) == len(others) + 1
    write_jsonl(path, rows[:-1])
    assert plan(config(tiny_model, path)).fingerprint != base


def test_sources_of_one_name_are_told_apart_and_said(tiny_model, tmp_path):
    for folder in "ab":
        write_jsonl(tmp_path / folder / "rows.jsonl", string_pairs(3))
    planned = plan(config(tiny_model, tmp_path / "a/rows.jsonl", tmp_path / "b/rows.jsonl"))
    assert [source.name for source in planned.sources] == ["rows", "rows-2"]
    named = [{"path": str(tmp_path / "a/rows.jsonl"), "name": name} for name in ("x", "x", "x-2")]
    assert [s.name for s in plan(config(tiny_model, *named)).sources] == ["x", "x-3", "x-2"]
    assert planned.said[1].startswith("rows-2: 1 file, shape trl (detected in 3 of the first 3")


def test_chat_rows_without_a_chat_template_are_refused_before_any_work(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    chats = write_jsonl(
        tmp_path / "rows.jsonl",
        [*string_pairs(2), {"prompt": [USER], "chosen": [YES], "rejected": [NO]}],
    )
    with pytest.raises(ModelError, match=r"set model\.chat_template"):
        plan(config(tmp_path / "bare", chats))
    strings = write_jsonl(tmp_path / "strings.jsonl", string_pairs(2))
    assert plan(config(tmp_path / "bare", strings)).units


def test_a_broken_chat_template_file_is_named(tiny_model, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", string_pairs(2))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    with pytest.raises(ModelError, match=r"broken\.jinja is not a Jinja template"):
        plan(config(tiny_model, path, chat_template=str(broken)))
    with pytest.raises(ModelError, match="cannot be read"):
        plan(config(tiny_model, path, chat_template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("not json\n", "none of its first 1 rows can be read; row 0: bad_json"),
        ('[{"chosen": "a"}]', "begins like a JSON array.*rename it to .json"),
        ("[\n {", "begins like a JSON array"),
        ('{"question": 1}\n', "question; name yours with format: columns"),
    ],
)
def test_a_source_without_pairs_is_an_error(tiny_model, tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message):
        plan(config(tiny_model, path))


def test_preparing_imports_neither_ray_nor_torch():
    code = "import refscale.corpus.preparation, sys; print({'ray', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_sample_is_bounded(tiny_model, tmp_path, monkeypatch):
    # A chat row beyond the sample is refused by itself where there is no template.
    monkeypatch.setattr(planning, "_SAMPLE_ROWS", 4)
    rows = [*string_pairs(6), {"prompt": [USER], "chosen": [YES], "rejected": [NO]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (refusal,) = validate_sources(config(tmp_path / "bare", path)).refusals
    assert (refusal.row, refusal.reason) == (6, "template_failed")


# -- counts --------------------------------------------------------------------------------------


def test_counts_add_up_and_a_lost_row_is_an_error():
    a = Counts(read=5, quarantined={"tie": 2}, unused=1)
    b = Counts(read=3, quarantined={"tie": 1, "bad_json": 4}, duplicates=1, kept=1)
    total = Counts.total([a.as_dict(), b.as_dict(), {}])
    assert total.read == 8
    assert dict(total.quarantined) == {"bad_json": 4, "tie": 3}
    assert total == Counts.total([b.as_dict(), a.as_dict()])
    with pytest.raises(SchemaError, match="read 8, kept 1"):
        total.check()
    Counts(read=10, quarantined={"tie": 2}, unused=1, duplicates=3, kept=4).check()


def test_too_many_refused_rows_name_the_top_reasons():
    counts = Counts(read=100, quarantined={"empty_chosen": 4, "bad_json": 2}, kept=94)
    check_refused(counts, 0.06, "runs/a")
    with pytest.raises(TooManyRefusedError, match=r"6 of 100 rows \(6\.0%\).*empty_chosen 4"):
        check_refused(counts, 0.05, "runs/a")
    assert TooManyRefusedError.exit_code == 3
    check_refused(Counts(), 0.0)
