"""The report: what it shows is what report.json holds, whatever the run and the corpus hold."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from refscale import schema, summary
from refscale.config import Config
from refscale.corpus.counts import Counts
from refscale.corpus.pairs import canonical_json
from refscale.evaluation.holdout import evaluate_pairs, label_purity
from refscale.report import plots
from refscale.report.render import collect, render_html, report_json, turns
from refscale.report.verdict import verdict
from refscale.selection import passes
from refscale.selection.order import keys_of
from refscale.selection.radix import decide
from refscale.storage.stages import FileRecord, StageFolder
from refscale.storage.store import Store

HOSTILE = (
    "<script>alert(1)</script></details></pre><img src=x onerror=alert(2)>"
    "<a href='javascript:alert(3)'>\u202ebidi \x00\x1b[31m \" & {{ 7*7 }}"
)
STAGES = ("prepare", "score", "select", "train", "evaluate")
CONFIG = {
    "model": {"model_name_or_path": "sft"},
    "corpus": {"sources": [{"path": "s3://me:hunter2@bucket/pairs.jsonl", "name": "docs"}]},
    "train": {"trl": {"hub_token": "hf_very_secret"}},
    "evaluate": {"flipped_column": "flipped"},
}


@dataclass
class Made:
    store: Store
    config: Config

    def data(self):
        return collect(self.store, self.config)


def chat(*turns_):
    """As a corpus stores it."""
    return canonical_json([{"role": role, "content": content} for role, content in turns_])


def make_run(
    root,
    upto="evaluate",
    *,
    num_pairs=400,
    text="Summarise.",
    refused=True,
    select=None,
    config=None,
) -> Made:
    """A run folder as the stages write it, with `text` in all places that hold corpus text."""
    store = Store(root)
    config = Config.model_validate({**CONFIG, "select": select or {}, **(config or {})})
    stages = STAGES[: STAGES.index(upto) + 1]
    rows = _rows(num_pairs, text)
    _prepare(store, rows, text, refused)
    if "score" in stages:
        _score(store, rows)
    if "select" in stages:
        decision = select_again(store, config)
    if "train" in stages:
        _train(store)
    if "evaluate" in stages:
        _evaluate(store, rows, decision, config)
    return Made(store, config)


def _rows(num_pairs, text):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num_pairs):
        chosen, rejected = (int(n) for n in rng.integers(20, 200, 2))
        wrong = bool(rng.random() < 0.3)
        gain = rng.normal(-0.8 if wrong else 0.8, 0.7)
        rows.append(
            {
                "pair_id": hashlib.blake2b(f"{i}".encode(), digest_size=16).digest(),
                "prompt_id": hashlib.blake2b(f"prompt {i}".encode(), digest_size=16).digest(),
                "source": "docs" if i % 3 else f"forum {text[:60]}",
                "source_row": i,
                "split": schema.HOLDOUT if i % 5 == 0 else schema.TRAIN,
                "prompt_ids": [1, 2],
                "chosen_ids": [3] * chosen,
                "rejected_ids": [4] * rejected,
                "chosen_truncated": False,
                "rejected_truncated": False,
                "conversational": True,
                "prompt": chat(("system", text), ("user", f"What does function {i} do?")),
                "chosen": chat(("assistant", f"It returns {i}. {text}")),
                "rejected": f"It prints {i}. {text}",
                "passthrough": json.dumps({"flipped": wrong}),
                "ref_chosen_logps": (gain - 2.5) * chosen,
                "ref_rejected_logps": -2.5 * rejected,
                "num_prompt_tokens": 1,
                "num_chosen_tokens": chosen,
                "num_rejected_tokens": rejected,
                "policy_chosen_logps": (gain - 2.5) * chosen + rng.normal(3, 4),
                "policy_rejected_logps": -2.5 * rejected,
            }
        )
    return rows


def _table(rows, wanted):
    return pa.Table.from_pylist([{n: row[n] for n in wanted.names} for row in rows], schema=wanted)


def _prepare(store, rows, text, refused):
    corpus, quarantine = StageFolder(store, "corpus"), StageFolder(store, "quarantine")
    reasons = ["bad_json"] * 5 + ["tie"] * 2 if refused else []
    bad = [
        {
            "source": "docs",
            "file": "pairs.jsonl",
            "source_row": i,
            "reason": reason,
            "detail": f"seen: {text}",
            "raw": text * 40,
        }
        for i, reason in enumerate(reasons)
    ]
    record = quarantine.publish_table("unit-00000.parquet", _table(bad, schema.QUARANTINE))
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    fingerprint = {"sources": {"docs": text}}
    quarantine.finish(fingerprint, [record], counts=counts, seconds=0.5)
    record = corpus.commit_shard("shard-00000", _table(rows, schema.CORPUS))
    corpus.finish(
        fingerprint,
        [record],
        counts=Counts(
            read=len(rows) + len(bad) + 9,
            quarantined=counts,
            duplicates=9,
            kept=len(rows),
            holdout=len(rows) // 5,
        ).as_dict(),
        seconds=3.25,
        details={"sources": [f"docs: trl shape {text}"]},
    )


def _score(store, rows):
    folder = StageFolder(store, "scores")
    details = summary.scoring_details(_score_records(rows), 4.5)
    record = folder.commit_shard("shard-00000", _table(rows, schema.SCORES))
    counts = {"pairs": len(rows), "scored": len(rows), "unscorable": {}}
    made = {"corpus": identity(store, "corpus"), "dtype": "bfloat16"}
    folder.finish(made, [record], counts=counts, seconds=4.5, details=details)


def _score_records(rows):
    records = []
    for shard in range(4):
        stats = {
            "useful_tokens": 9_000 + shard,
            "computed_tokens": 10_000,
            "head_rows": 5_000,
            "flops": 2.5e12,
            "oom_retries": 0,
            "token_budget": 65536 >> shard,
            "peak_memory_bytes": 3 << 30,
        }
        counts = {
            "pairs": len(rows) // 4,
            "unscorable": [],
            "replica": f"node-{shard % 2}:41{shard % 2}",
            "seconds": 1.5 + 0.5 * (shard % 2),
            "wait_s": 0.25,
            "stats": stats,
            "engine": {
                "device": "NVIDIA H100 80GB HBM3",
                "dtype": "bfloat16",
                "dtype_reason": "the device computes it fast",
                "path": "packed",
                "path_reason": "self-check passed, largest error 0.0031 nats",
                "token_budget": 65536,
            },
        }
        records.append(FileRecord(f"{shard}", 0, 0, "", counts))
    return records


@pytest.mark.parametrize(("kept", "said"), [(1.9, None), (-2.8, "by 55% of"), (2.4, "by 49% of")])
def test_a_selection_that_leans_to_one_length_is_said(kept, said):
    common = {
        "pairs": 9,
        "mean_key": 0.5,
        "mean_abs_length_difference": 5.0,
        "key_length_correlation": None,
    }
    facts = {
        "all": {**common, "mean_length_difference": -0.05},
        "kept": {**common, "mean_length_difference": kept},
        "size": {"fraction": 0.5},
        "match_lengths": False,
        "sources": {},
        **dict.fromkeys(("num_kept", "num_pairs"), 9),
        **dict.fromkeys(("strategy", "keep"), "x"),
    }
    found = dict(summary.selection_lines(facts)).get("careful")
    assert found is None if said is None else f"lean to one length, {said}" in found


def test_the_engine_is_that_of_all_shards():
    records = _score_records([None] * 8)
    assert summary.scoring_details(records, 1.0)["engine"]["path"] == "packed"
    records[1].counts["engine"].update(path="padded")
    records[2].counts["engine"].update(compiled="yes")
    engine = summary.scoring_details(records, 1.0)["engine"]
    assert engine["path"] == "packed: 3 shards, padded: 1 shards"
    assert engine["compiled"] == "no: 3 shards, yes: 1 shards"
    assert engine["token_budget"] == 8192, "the smallest: out of memory halved it"


def identity(store, stage):
    return StageFolder(store, stage).require()["identity"]


def select_again(store, config):
    """Write selection/ as the config says; the decision."""
    corpus, scores = StageFolder(store, "corpus"), StageFolder(store, "scores")
    spec = passes.spec_of(config.select)
    keys = keys_of(passes._train_scores(scores, "shard-00000"), spec)
    decision = decide(lambda: [keys], spec)
    facts = passes.facts(scores, decision)(["shard-00000"])
    shown = passes.describe(corpus, scores, decision, facts)
    folder = StageFolder(store, "selection")
    text = json.dumps({"decision": decision.to_json(), **shown}).encode()
    folder.publish_bytes("selection.json", text)
    made = {"scores": identity(store, "scores"), "select": config.select.deciding_options()}
    folder.finish(made, [], counts={}, seconds=0.1, details=shown)
    return decision


def _log(store, steps):
    rng = np.random.default_rng(1)
    rows = [
        {
            "step": step,
            "max_steps": 60,
            "loss": 0.6931 * float(np.exp(-step / 50)) + float(rng.normal(0, 0.01)),
            "rewards/margins": step / 40,
            "rewards/accuracies": min(1.0, 0.5 + step / 100),
            "grad_norm": 3.5 + float(rng.normal(0, 0.3)),
            "learning_rate": 5e-6 * (1 - step / 60),
        }
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    store.write_bytes("training/log.jsonl", text.encode())


def _train(store):
    _log(store, 60)
    metrics = {
        "steps": 60,
        "train_loss": 0.4321,
        "train_path": "packed",
        "start_check_loss": 0.6931,
    }
    made = {"selection": identity(store, "selection")}
    for stage in ("training", "policy"):
        StageFolder(store, stage).finish(made, [], counts={}, seconds=61.5, details=metrics)


def _evaluate(store, rows, decision, config):
    held = [row for row in rows if row["split"] == schema.HOLDOUT]
    facts = evaluate_pairs(_table(held, schema.EVALUATION), config.train.beta)
    keys = keys_of(passes._train_scores(StageFolder(store, "scores"), "shard-00000"), decision.spec)
    train = [row for row in rows if row["split"] == schema.TRAIN]
    flipped = np.array([json.loads(row["passthrough"])["flipped"] for row in train])
    facts["purity"] = label_purity(flipped, decision.mask(keys), keys.values)
    folder = StageFolder(store, "evaluation")
    made = {stage: identity(store, stage) for stage in ("policy", "scores")}
    folder.finish(made, [], counts={"pairs": len(held)}, seconds=9.0, details=facts)


VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, number cells, attributes and texts of a page."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], [], [], []
        self.data_value, self.cell = None, None
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td" and ("class", "n") in attrs:
            self.cell = {"numbers": [], "rest": ""}
            self.cells.append(self.cell)
        if tag == "data":
            self.data_value = dict(attrs)["value"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "td":
            self.cell = None

    def handle_data(self, text):
        if self.cell is None:
            return
        if self.open[-1] == "data":
            self.cell["numbers"].append((float(self.data_value), text))
        else:
            self.cell["rest"] += text


def numbers_in(value):
    if isinstance(value, dict):
        return {n for item in value.values() for n in numbers_in(item)}
    if isinstance(value, list):
        return {n for item in value for n in numbers_in(item)}
    return {float(value)} if isinstance(value, (int, float)) and value is not True else set()


def shown_number(text):
    """The number that a text shows, and half a unit of its last digit."""
    text = text.replace("−", "-")
    match = re.fullmatch(r"([+-]?[\d,]+(?:\.(\d+))?)( %| [PTGMk])?", text)
    assert match, text
    scale = {" %": 0.01, " P": 1e15, " T": 1e12, " G": 1e9, " M": 1e6, " k": 1e3}.get(match[3], 1.0)
    step = 10.0 ** -len(match[2] or "")
    # Three significant digits where there is a prefix.
    whole = match[1].lstrip("+-").replace(",", "")
    if match[3] not in (None, " %") and match[2] is None:
        step = 10.0 ** max(0, len(whole) - 3)
    return float(match[1].replace(",", "")) * scale, 0.5001 * step * scale


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run")).data()


def test_each_number_of_the_tables_is_that_of_report_json(finished):
    page, known = Page(render_html(finished)), numbers_in(report_json(finished))
    numbers = [number for cell in page.cells for number in cell["numbers"]]
    assert len(numbers) > 100
    for value, text in numbers:
        assert value in known
        shown, half = shown_number(text)
        assert abs(shown - value) <= half, (value, text)
    for cell in page.cells:  # no number that bypasses it
        assert not re.search(r"\d", cell["rest"]), cell


def test_the_funnel_counts_what_the_stages_counted(finished):
    funnel = report_json(finished)["funnel"]
    # 400 pairs, 7 refused, 9 duplicates; 80 held out; half of 320 kept.
    assert [(step["name"], step["count"]) for step in funnel["steps"]] == [
        ("read", 416),
        ("valid", 409),
        ("corpus", 400),
        ("scored", 400),
        ("selectable", 320),
        ("kept", 160),
    ]
    assert (funnel["counts"]["duplicates"], funnel["counts"]["holdout"]) == (9, 80)
    assert funnel["quarantined"] == {"bad_json": 5, "tie": 2}
    assert {reason: len(rows) for reason, rows in funnel["examples"].items()} == {
        "bad_json": 3,
        "tie": 2,
    }


def test_the_verdict_says_purity_and_holdout_first(finished):
    values = report_json(finished)
    purity, overall = values["evaluation"]["purity"], values["evaluation"]["overall"]
    kept, corpus, random = (
        f"{100 * purity[n]['value']:.0f} %" for n in ("kept", "corpus", "random")
    )
    after = overall["reward_accuracy"]["after"]
    assert values["verdict"][:2] == [
        f"Of the kept half, {kept} have the right label; of the corpus, {corpus};"
        f" of a random half, {random}.",
        f"Holdout reward accuracy 0.50 → {after['value']:.2f}"
        f" [{after['low']:.2f}, {after['high']:.2f}] on 80 pairs.",
    ]
    assert not any("Not finished" in sentence for sentence in values["verdict"])


def test_mfu_is_told_only_where_the_peak_is_known(finished, tmp_path):
    scoring = report_json(finished)["scoring"]
    # 4 shards of 2.5e12 in 1.5 + 2 + 1.5 + 2 = 7 seconds, of 989e12
    assert scoring["mfu"] == pytest.approx(10e12 / 7 / 989e12)
    assert "MFU" in render_html(finished)
    made = make_run(tmp_path, "score")
    path = "scores/MANIFEST.json"
    manifest = made.store.read_json(path)
    for device, peak in (("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        manifest["details"]["engine"]["device"] = device
        made.store.write_json(path, manifest)
        scoring = report_json(made.data())["scoring"]
        assert scoring["mfu"] == pytest.approx(10e12 / 7 / peak)
    for device in ("NVIDIA H100 PCIe", "NVIDIA L40", "cpu, 2 cores"):
        manifest["details"]["engine"]["device"] = device
        made.store.write_json(path, manifest)
        assert report_json(made.data())["scoring"]["mfu"] is None
        assert "MFU" not in render_html(made.data())


def test_hostile_text_stays_text(tmp_path):
    html = render_html(make_run(tmp_path, text=HOSTILE).data())
    page = Page(html)  # also: its </details> and </pre> closed nothing
    assert not {"script", "img", "iframe", "object", "link", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "srcset", "xlink:href", "action", "style"):
            assert tag == "a" and re.fullmatch(r"#[a-z]+", value), (tag, name, value)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    assert r"\u202ebidi \x00\x1b[31m" in html
    assert "url(" not in html and "@import" not in html


_MARK = "document.documentElement.setAttribute('data-owned', 'yes')"
ACTIVE = (
    f'</p></details><script>{_MARK}</script><img src=x onerror="{_MARK}"><svg onload="{_MARK}">'
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def dom_of(page, folder):
    """The page's DOM after a browser has loaded it and run what it runs."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "</html>" in done.stdout, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_runs_nothing_that_a_pair_holds(tmp_path):
    html = render_html(make_run(tmp_path / "run", text=ACTIVE).data())
    assert "data-owned=" not in dom_of(html, tmp_path)
    # Elsewhere the same text does run; put unescaped into the report, its policy still forbids it.
    assert 'data-owned="yes"' in dom_of(f"<html><body>{ACTIVE}</body></html>", tmp_path)
    unescaped = html.replace("<header>", f"<header>{ACTIVE}")
    assert unescaped != html
    assert "data-owned=" not in dom_of(unescaped, tmp_path)


def test_half_a_surrogate_pair_of_a_chat_message_can_be_written():
    whole = chat(("user", "half pair")).replace("half", r"half \ud83d")
    assert turns(whole) == [("user", "half ? pair")]
    cut = whole[: whole.index("d pair") + 3] + "…"
    assert turns(cut) == [(None, "half ? p…")]


def test_every_stage_of_an_unfinished_run_renders(tmp_path):
    everything = ["prepare", "score", "select", "train", "evaluate"]
    for done, upto in enumerate(STAGES, start=1):
        data = make_run(tmp_path / upto, upto).data()
        html = render_html(data)
        Page(html)
        json.dumps(report_json(data), allow_nan=False)
        for command in everything[done:]:
            assert f"run <code>refscale {command}</code>" in html
        if everything[done:]:
            assert f"Not finished: {', '.join(everything[done:])}." in html


def test_a_folder_without_any_stage_renders(tmp_path):
    data = collect(Store(tmp_path), Config.model_validate(CONFIG))
    html = render_html(data)
    Page(html)
    assert "run <code>refscale prepare</code>" in html


def test_a_training_that_goes_on_shows_its_curves_so_far(tmp_path):
    made = make_run(tmp_path, "select")
    _log(made.store, 20)
    training = report_json(made.data())["training"]
    assert not training["finished"] and training["last_step"] == 20
    assert training["curves"]["loss"]["steps"] == list(range(1, 21))
    assert "in 20 of 60 steps so far" in render_html(made.data())


def stages_of(values):
    return {stage["stage"]: (stage["done"], stage["stale"]) for stage in values["stages"]}


def test_what_was_trained_on_another_selection_is_left_out_and_said(tmp_path):
    made = make_run(tmp_path)
    before = report_json(made.data())
    config = Config.model_validate({**CONFIG, "select": {"strategy": "margin"}})
    select_again(made.store, config)
    values = report_json(made.data())
    another = "made from another selection/"
    of_stale = "made from policy/, which is stale"
    assert stages_of(values) == {
        "corpus": (True, None),
        "scores": (True, None),
        "selection": (True, None),
        "policy": (False, another),
        "evaluation": (False, of_stale),
    }
    assert values["training"] is values["evaluation"] is None
    assert not {"training", "policy", "evaluation"} & values["fingerprints"].keys()
    assert values["funnel"] == before["funnel"]
    said = " ".join(values["verdict"])
    assert "kept by margin" in said and "Holdout" not in said and "loss" not in said
    assert values["verdict"][-1] == f"Left out as stale: train, {another}; evaluate, {of_stale}."
    html = render_html(made.data())
    Page(html)
    status = "<code>refscale status</code> says what to redo"
    for reason in (another, of_stale):
        assert f"Left out as stale: {reason}. {status}" in html
        assert f"<td>stale: {reason}</td>" in html
    assert 'id="holdout"' in html and "0.4321" not in html


def test_figures_of_a_policy_that_is_being_redone_are_left_out(tmp_path):
    made = make_run(tmp_path)
    fingerprint = StageFolder(made.store, "policy").require()["fingerprint"]
    for stage in ("policy", "training"):
        made.store.delete(stage)
        StageFolder(made.store, stage).begin(fingerprint)
    _log(made.store, 20)
    values = report_json(made.data())
    reason = "made from policy/, which is not finished now"
    assert stages_of(values)["policy"] == (False, None)
    assert stages_of(values)["evaluation"] == (False, reason)
    assert values["training"]["last_step"] == 20 and values["evaluation"] is None
    assert values["verdict"][-2:] == [
        f"Left out as stale: evaluate, {reason}.",
        "Not finished: train.",
    ]


def test_the_log_of_an_unfinished_training_on_another_selection_is_left_out(tmp_path):
    made = make_run(tmp_path, "select")
    for stage in ("policy", "training"):
        StageFolder(made.store, stage).begin({"selection": identity(made.store, "selection")})
    _log(made.store, 20)
    assert report_json(made.data())["training"]["last_step"] == 20
    select_again(made.store, Config.model_validate({**CONFIG, "select": {"fraction": 0.25}}))
    values = report_json(made.data())
    assert values["training"] is None
    assert stages_of(values)["policy"] == (False, "made from another selection/")


def test_a_policy_whose_training_folder_is_gone_has_been_trained(tmp_path, capsys):
    made = make_run(tmp_path)
    before = report_json(made.data())["training"]
    made.store.delete("training")
    training = report_json(made.data())["training"]
    assert training["finished"] and training["metrics"] == before["metrics"]
    assert training["last_step"] == 60 and training["num_logged"] == 0
    html = render_html(made.data())
    assert "No policy has been trained" not in html and "Not finished" not in html
    assert "4,321" in html or "0.4321" in html  # train_loss
    assert not capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("log", [b'{"step": 1, "loss": 9}', b"\xff", b'{"step"', None])
def test_a_damaged_log_is_said_and_left_out(tmp_path, capsys, log, finished):
    made = make_run(tmp_path)
    folder = StageFolder(made.store, "training")
    fingerprint = folder.require()["fingerprint"]
    folder.finish(fingerprint, folder.adopt(["log.jsonl"]), counts={}, seconds=1)
    if not finished:
        made.store.delete("training/MANIFEST.json")
        made.store.delete("policy/MANIFEST.json")
    made.store.delete("training/log.jsonl")
    if log is not None:
        made.store.write_bytes("training/log.jsonl", log)
    training = report_json(made.data())["training"]
    # Without a manifest, a log that can be read is believed and one that is not there is none.
    taken = not finished and log is not None and log.endswith(b"}")
    said = finished or log in (b"\xff", b'{"step"')
    assert (training or {"num_logged": 0})["num_logged"] == int(taken)
    assert ("training/log.jsonl is damaged or missing" in capsys.readouterr().err) == said


def test_a_long_log_is_shown_by_means_of_consecutive_rows(tmp_path):
    made = make_run(tmp_path, "prepare")
    rows = [{"step": i + 1, "loss": float(i)} for i in range(1000)]
    made.store.write_bytes("training/log.jsonl", "\n".join(map(json.dumps, rows)).encode())
    curve = report_json(made.data())["training"]["curves"]["loss"]
    # 1000 rows at most 400 points: means of three, and the last row alone.
    assert curve["rows_a_point"] == 3 and len(curve["values"]) == 334
    assert curve["values"][:2] == [1.0, 4.0] and curve["values"][-1] == 999.0
    assert curve["steps"][:2] == [3, 6] and curve["steps"][-1] == 1000


def test_an_empty_quarantine_is_said(tmp_path):
    html = render_html(make_run(tmp_path, refused=False).data())
    assert "No row was refused." in html


def test_a_corpus_that_was_refused_shows_its_quarantine(tmp_path):
    made = make_run(tmp_path, "prepare")
    made.store.delete("corpus")
    assert [s["name"] for s in report_json(made.data())["funnel"]["steps"]] == []
    assert "the line is not JSON" in render_html(made.data())


def test_a_key_that_follows_length_is_warned_of(tmp_path):
    # Summed log-probs of about -2.5 a token: the margin is mostly the length difference.
    data = make_run(tmp_path, "select", select={"strategy": "margin"}).data()
    selection = report_json(data)["selection"]
    assert abs(selection["all"]["key_length_correlation"]) > 0.5
    assert "The key follows length" in render_html(data)


def test_both_ends_of_a_band_are_drawn(tmp_path):
    select = {"keep": "band", "band": [0.25, 0.75]}
    data = make_run(tmp_path, "select", select=select).data()
    (ends,) = data.cuts.values()
    assert len(ends) == 2 and ends[0] != ends[1]
    assert render_html(data).count(">cut ") == 2


def test_the_cuts_of_sources_are_told_in_the_table(tmp_path):
    data = make_run(tmp_path, "select", select={"per_source": True}).data()
    assert set(data.cuts) == set(report_json(data)["selection"]["sources"])
    shown = {value for cell in Page(render_html(data)).cells for value, _ in cell["numbers"]}
    assert {end for ends in data.cuts.values() for end in ends} <= shown


def test_matched_lengths_are_said_and_no_cut_is_drawn(tmp_path):
    data = make_run(tmp_path, "select", select={"match_lengths": True}).data()
    plain = make_run(tmp_path / "plain", "select").data()
    drawn = [render_html(each).partition("histogram of")[2] for each in (data, plain)]
    lines = [each.partition("</svg>")[0].count('class="c"') for each in drawn]
    assert lines == [0, 1] and not data.cuts
    details = data.manifests["selection"]["details"]
    details["all"]["key_length_correlation"] = -0.9
    page = render_html(data)
    assert page.count("lengths matched") == 2
    assert "follows length" not in page
    by = dict(summary.selection_lines(details))["by"]
    assert by == "mean_margin, largest, fraction 0.5, lengths matched"


def test_a_selection_that_leans_to_one_length_is_said_in_the_report(tmp_path):
    data = make_run(tmp_path, "select").data()
    details = data.manifests["selection"]["details"]
    details["all"].update(mean_length_difference=1.0, mean_abs_length_difference=4.0)
    said = []
    for kept in (-0.5, -1.5):
        details["kept"]["mean_length_difference"] = kept
        said.append("The kept pairs lean to a shorter chosen side, by" in render_html(data))
        assert report_json(data)["selection"]["length_lean"] == (kept - 1) / 4
    assert said == [False, True]  # three eighths and five eighths of a usual difference


def test_credentials_of_the_config_are_not_shown(finished):
    for text in (render_html(finished), json.dumps(report_json(finished))):
        assert "hunter2" not in text and "hf_very_secret" not in text
        assert "s3://bucket/pairs.jsonl" in text


def test_the_page_stays_below_a_megabyte(tmp_path):
    data = make_run(tmp_path, num_pairs=4000, text=HOSTILE * 30).data()
    assert len(data.manifests["selection"]["details"]["scatter"]["keys"]) == 1500
    assert len(render_html(data).encode()) < 1_000_000


def test_the_same_run_gives_the_same_report(finished):
    again = collect(Store(finished.uri), finished.config)
    assert render_html(again) == render_html(finished)
    assert report_json(again) == report_json(finished)


def test_chats_are_shown_by_role_also_when_they_are_cut_short():
    whole = chat(("user", 'Say "hi"\n'), ("assistant", "hi [{"))
    first = ("user", 'Say "hi"\n')
    assert turns(whole) == [first, ("assistant", "hi [{")]
    # The role comes after the text: where that is cut, it is gone.
    cut = whole[: whole.index("hi [") + 2] + "…"
    assert turns(cut) == [first, (None, "hi…")]
    assert turns(whole[: whole.index("\\n") + 1] + "…") == [(None, 'Say "hi"…')]
    called = canonical_json([{"role": "assistant", "content": "hm\x01", "tool_calls": ["f", "g"]}])
    assert turns(called[: called.index('"f"') + 2] + "…") == [("assistant", "hm\x01…")]
    assert turns(called[: called.index("01") + 1] + "…") == [(None, "hm…")]
    for text in ("plain", "[{not json", '[{"a": 1}]', "[1, 2]", "", '[{"content":"half', "[{cut…"):
        assert turns(text) == [(None, text)]


def test_a_cut_at_any_place_loses_no_turn_and_no_text_before_it():
    said = [("system", "Be \\ brief…"), ("user", 'Say "hi"\n'), ("assistant", "hi")]
    whole = chat(*said)
    ends = [whole.index(f'"{role}"}}') + len(f'"{role}"}}') for role, _ in said]
    shown = {role: set() for role, _ in said}
    for at in range(1, len(whole)):
        done = sum(end <= at for end in ends)
        found = turns(whole[:at] + "…")
        assert found[:done] == said[:done]
        [(role, text)] = found[done:]
        assert text.endswith("…")
        # The role comes last: it is there where nothing but the brace is missing.
        assert role == (said[done][0] if at + 1 in ends else None)
        if text[0] in "[{":  # not a word of it is there
            assert whole[:at].endswith(text[:-1])
        elif done < len(said):
            shown[said[done][0]].add(text[:-1])
    for role, text in said:
        assert shown[role] == {text[:i] for i in range(len(text) + 1)}


def test_a_long_chat_is_shown_as_text_in_the_page(tmp_path):
    data = make_run(tmp_path, "select", text="Summarise. " * 400).data()
    example = data.manifests["selection"]["details"]["examples"]["top"][0]
    assert example["prompt"].endswith("…") and example["chosen"].endswith("…")
    page = render_html(data)
    assert "Summarise. Summarise." in page
    assert "[{" not in page.partition('id="examples"')[2].partition('id="scoring"')[0]


def test_a_run_that_was_evaluated_before_length_was_looked_at_has_its_report(tmp_path):
    data = make_run(tmp_path).data()
    page = render_html(data)
    del data.manifests["evaluation"]["details"]["overall"]["longer_side"]
    (line,) = set(page.splitlines()) - set(render_html(data).splitlines())
    assert line.startswith("<p>The policy prefers the longer side in ")


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (0.0003, "0.03 %"),
        (0.004, "0.4 %"),
        (0.005, "0.5 %"),
        (0.006, "1 %"),
        (0.5, "50 %"),
        (0.994, "99 %"),
        (0.996, "99.6 %"),
        (1999 / 2000, "99.95 %"),
        (1.0, "100 %"),
    ],
)
def test_a_share_in_between_is_neither_nothing_nor_all(share, shown):
    purity = {name: {"value": share} for name in ("kept", "corpus", "random")}
    values = {"selection": {}, "training": {}, "evaluation": {"purity": purity}, "stages": []}
    said = f"Of the kept part, {shown} have the right label; of the corpus, {shown};"
    assert verdict(values)[0].startswith(said)


def test_plots_escape_names_and_survive_single_values():
    assert "<script>" not in plots.bars([("<script>", 1, None, "</svg>")], 1)
    assert "NaN" not in plots.curve("loss", [1], [0.5])
    flat = plots.histogram({"low": 0.0, "high": 1.0, "all": [0, 0], "kept": [0, 0]}, {}, "key")
    assert "<rect" not in flat


def test_the_report_needs_neither_torch_nor_ray():
    code = (
        "import sys, refscale.report.render;"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
