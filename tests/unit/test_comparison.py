"""The grid, the per-pair outcomes, the statistics and the page of a comparison; no training."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from refscale import pipeline, schema
from refscale.cluster import runtime
from refscale.config import parse_config
from refscale.errors import ConfigError, EvaluationError, FingerprintError
from refscale.evaluation.judge import JudgeConfig
from refscale.evaluation.win_rate import win_rate
from refscale.experiments import comparison as comparison_module
from refscale.experiments import statistics
from refscale.experiments.arms import FULL, Arm, arm_config, grid, parse_arm
from refscale.experiments.comparison import _details, compare
from refscale.experiments.outcomes import MEASURES, OUTCOMES, on_shared_pairs, outcomes
from refscale.experiments.statistics import RESAMPLES, summarise
from refscale.report import plots
from refscale.report.comparison_page import lines, render_html, verdicts
from refscale.run import Run
from refscale.selection import passes
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

CONFIG = {
    "model": {"model_name_or_path": "m"},
    "corpus": {"sources": [{"path": "a.jsonl"}]},
    "select": {"strategy": "margin", "count": 7, "per_source": True, "beta": 0.3},
}


# -- the grid --------------------------------------------------------------------------------------


def test_the_grid_has_each_combination_and_a_control_of_each_size():
    arms = grid(["mean_margin", "margin"], ["largest", "smallest"], [0.5, 0.3])
    assert len(arms) == len(set(arms)) == 1 + 2 + 2 * 2 * 2
    assert arms[:3] == ["full", "random:0.5", "random:0.3"]
    assert all(parse_arm(arm).text == arm for arm in arms)
    controls = {parse_arm(arm).control for arm in arms} - {None}
    assert controls == {"random:0.5", "random:0.3"}


@pytest.mark.parametrize("match_lengths", [False, True])
def test_a_grid_of_matched_lengths_says_so_in_each_selections_name_and_in_no_controls(
    match_lengths,
):
    arms = grid(fractions=[0.5, 0.3], match_lengths=match_lengths)
    parsed = [parse_arm(arm) for arm in arms]
    assert [arm.text for arm in parsed] == arms
    assert len(arms) == len(set(arms)) == 3 + 3 * 2 * 2
    assert {arm.match_lengths for arm in parsed if arm.control is None} == {False}
    assert {arm.match_lengths for arm in parsed if arm.control} == {match_lengths}
    assert all(arm.text.endswith(":matched") == arm.match_lengths for arm in parsed)


def test_an_arm_is_read_into_a_selection():
    assert parse_arm("mean_margin:smallest:0.50") == Arm(
        "mean_margin:smallest:0.5", "mean_margin", "smallest", 0.5
    )
    assert parse_arm("random:0.3").control is None and parse_arm(FULL).fraction == 1.0
    assert parse_arm("margin:largest:0.3").folder == "margin-largest-0.3"
    matched = parse_arm("margin:largest:.3:matched")
    assert matched == Arm("margin:largest:0.3:matched", "margin", "largest", 0.3, True)
    assert matched.control == "random:0.3" and parse_arm(matched.text) == matched


@pytest.mark.parametrize(
    "text",
    [
        *["", "half", "margin:0.5", "margn:largest:0.5", "margin:band:0.5", "full:0.5"],
        *["margin:largest:0.5:match", "random:largest:0.5:matched"],
    ],
)
def test_what_is_no_arm_is_an_error_that_says_how_one_looks(text):
    with pytest.raises(ConfigError, match=r"an arm is full, random:FRACTION or STRATEGY"):
        parse_arm(text)


@pytest.mark.parametrize("fraction", ["0", "1.5", "x", "nan"])
def test_an_arms_fraction_is_a_share(fraction):
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
        parse_arm(f"margin:largest:{fraction}")


def test_an_arms_config_differs_in_selection_and_seed_alone():
    config = parse_config(CONFIG)
    arm = arm_config(config, parse_arm("mean_margin:middle:0.3"), seed=5)
    assert (arm.select.strategy, arm.select.keep, arm.select.fraction) == (
        "mean_margin",
        "middle",
        0.3,
    )
    assert arm.select.count is None and arm.select.per_source and arm.select.beta == 0.3
    assert arm.train.seed == 5 and arm.select.seed == 0
    assert arm.model_copy(update={"select": config.select, "train": config.train}) == config
    assert arm_config(config, parse_arm("random:0.3"), seed=5).select.seed == 5


@pytest.mark.parametrize("match_lengths", [False, True])
def test_an_arm_is_what_its_label_says_whatever_the_config(match_lengths):
    config = parse_config(
        {**CONFIG, "select": {"strategy": "margin", "match_lengths": match_lengths}}
    )
    for text in ("margin:largest:0.3", "random:0.3", "full"):
        assert not arm_config(config, parse_arm(text), 0).select.match_lengths
    assert arm_config(config, parse_arm("margin:largest:0.3:matched"), 0).select.match_lengths


def test_nothing_may_be_given_twice_and_a_seed_is_needed(tmp_path):
    config = parse_config(CONFIG)
    with pytest.raises(ConfigError, match=r"arm random:0\.5 is given twice"):
        compare(config, str(tmp_path), ["random:0.5", "random:0.50"])
    with pytest.raises(ConfigError, match="seed 1 is given twice"):
        compare(config, str(tmp_path), ["full"], seeds=[1, 1])
    with pytest.raises(ConfigError, match="at least one seed"):
        compare(config, str(tmp_path), ["full"], seeds=[])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": 0}, "--parallel must be a positive integer, got 0"),
        ({"parallel": -1}, "--parallel must be a positive integer, got -1"),
        ({"seeds": [0, -3]}, "a seed must be at least 0, got -3"),
    ],
)
def test_a_number_out_of_its_range_is_refused_before_anything_is_done(tmp_path, options, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        compare(parse_config(CONFIG), str(tmp_path / "run"), ["full"], **options)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ends_before_training(monkeypatch):
    """A comparison, its corpus scored, that ends with "far enough" where arms would begin."""

    def far_enough(*_arguments):
        raise EvaluationError("far enough")

    monkeypatch.setattr(pipeline, "prepare", lambda run: {"files": [{"counts": {"holdout": 1}}]})
    monkeypatch.setattr(pipeline, "score", lambda run: {"seconds": 1.0})
    monkeypatch.setattr(runtime, "disconnect", lambda: None)
    monkeypatch.setattr(Run, "cluster", None)
    monkeypatch.setattr(comparison_module, "_side_by_side", far_enough)


@pytest.mark.usefixtures("ends_before_training")
@pytest.mark.parametrize("restart", [False, True])
def test_restart_deletes_the_arms_asked_for_and_the_references_completions_alone(tmp_path, restart):
    store = Store(tmp_path)
    asked = ["arms/full/seed-0", "arms/full/seed-2", "reference_completions"]
    others = ["arms/full/seed-1", "arms/random-0.5/seed-0", "scores", "judgements"]
    for folder in asked + others:
        store.write_bytes(f"{folder}/kept", b"x")
    options = {"seeds": [0, 2], "parallel": 1, "restart": restart}
    with pytest.raises(EvaluationError, match="far enough"):
        compare(parse_config(CONFIG), str(tmp_path), ["full"], **options)
    left = [folder for folder in asked + others if store.exists(f"{folder}/kept")]
    assert left == (others if restart else asked + others)


@pytest.mark.usefixtures("ends_before_training")
@pytest.mark.parametrize("match_lengths", [False, True])
def test_without_arms_the_grid_is_matched_where_the_config_matches(
    tmp_path, monkeypatch, match_lengths
):
    begun = []

    def side_by_side(_work, jobs, _at_once):
        begun.extend(arm.text for arm, _ in jobs)
        raise EvaluationError("far enough")

    monkeypatch.setattr(comparison_module, "_side_by_side", side_by_side)
    config = parse_config({**CONFIG, "select": {"match_lengths": match_lengths}})
    with pytest.raises(EvaluationError, match="far enough"):
        compare(config, str(tmp_path), seeds=[0], parallel=1)
    assert begun == grid(match_lengths=match_lengths)
    assert ("mean_margin:largest:0.5:matched" in begun) is match_lengths


@pytest.mark.usefixtures("ends_before_training")
def test_completions_made_or_judged_otherwise_are_not_shown_side_by_side(tmp_path):
    def asked(**changes):
        judge = JudgeConfig(**{"base_url": "http://h/v1", "model": "one", **changes})
        return win_rate(judge, num_prompts=3)

    made = {"mean_tokens": 4.0, "settings": asked().settings}
    finished = StageFolder(Store(tmp_path / "arms/full/seed-0"), "compare")
    finished.begin({"made": "before"})
    finished.finish({"made": "before"}, [], counts={}, seconds=0.0, details={"extra": made})
    options = {"seeds": [0], "parallel": 1}
    arms = ["full", "random:0.5"]  # the second one is new
    for changes, field in (
        ({"model": "two"}, "judge.model = one, now it is two"),
        ({"base_url": "http://other/v1"}, "judge.endpoint"),
        ({"temperature": 1.0}, "judge.temperature"),
        ({"extra": {"seed": 1}}, "judge.extra.seed"),
    ):
        with pytest.raises(FingerprintError, match=rf"of full, seed 0, were made with {field}"):
            extra = asked(**changes)
            compare(parse_config(CONFIG), str(tmp_path), arms, extra=extra, **options)
    for same in (asked(concurrency=1, timeout_s=9), None):
        with pytest.raises(EvaluationError, match="far enough"):
            compare(parse_config(CONFIG), str(tmp_path), arms, extra=same, **options)


# -- outcomes --------------------------------------------------------------------------------------


def evaluation_table(rows):
    """Rows of (pair number, policy chosen, policy rejected, ref chosen, ref rejected)."""
    return pa.Table.from_pylist(
        [
            {
                "pair_id": number.to_bytes(16, "big"),
                "prompt_id": (number // 2).to_bytes(16, "big"),
                "source": "s",
                "policy_chosen_logps": a,
                "policy_rejected_logps": b,
                "ref_chosen_logps": c,
                "ref_rejected_logps": d,
                "num_chosen_tokens": 4,
                "num_rejected_tokens": 2,
            }
            for number, a, b, c, d in rows
        ],
        schema=schema.EVALUATION,
    )


def test_outcomes_are_the_pairs_rewards_sorted_by_pair():
    table = outcomes(
        evaluation_table([(9, -8, -4, -8, -4), (2, -4, -8, -6, -6), (5, -8, -2, -4, -4)]), beta=0.5
    )
    assert [int.from_bytes(i, "big") for i in table["pair_id"].to_pylist()] == [2, 5, 9]
    # Margins against the reference: 4 - 0, -6 - 0, -4 - -4; halved by beta.
    assert table["reward_margin"].to_pylist() == [2.0, -3.0, 0.0]
    assert table["reward_accuracy"].to_pylist() == [1.0, 0.0, 0.5]
    # Nats a token: -1 against -4, -2 against -1, -2 against -2.
    assert table["ranking_accuracy"].to_pylist() == [1.0, 0.0, 0.5]
    assert table["chosen_mean_logps"].to_pylist() == [-1.0, -2.0, -2.0]


def scored(numbers):
    """Outcomes of pairs by number: every third is lost."""
    rows = [(i, -1 - 2 * (i % 3 == 0), -2, -1, -1) for i in numbers]
    return outcomes(evaluation_table(rows), 0.1)


def test_arms_are_compared_on_the_pairs_that_all_of_them_have(tmp_path):
    pairs = range(40)
    lacks_7, lacks_9 = (scored([i for i in pairs if i != lost]) for lost in (7, 9))
    tables = {"full": {0: scored(pairs), 1: lacks_7}, "random:0.5": {0: lacks_9, 1: lacks_7}}
    kept, left_out = on_shared_pairs(tables, Store(tmp_path))
    expected = scored([i for i in pairs if i not in (7, 9)])
    assert all(t.equals(expected) for by_seed in kept.values() for t in by_seed.values())
    lacking = {"full": {1: 1}, "random:0.5": {0: 1, 1: 1}}
    assert left_out == {"pairs": 2, "of": 40, "lacking": lacking}


def test_a_whole_holdout_leaves_nothing_out(tmp_path):
    kept, left_out = on_shared_pairs({"full": {0: scored(range(5))}}, Store(tmp_path))
    assert kept["full"][0].equals(scored(range(5)))
    assert left_out == {"pairs": 0, "of": 5, "lacking": {}}


@pytest.mark.parametrize(
    ("lost", "refused"),
    [
        (1, False),  # of 60
        (3, False),  # 5 %
        (4, True),
    ],
)
def test_an_arm_that_lacks_more_than_a_twentieth_had_another_holdout(tmp_path, lost, refused):
    tables = {"full": {0: scored(range(60))}, "random:0.5": {3: scored(range(lost, 60))}}
    if not refused:
        assert on_shared_pairs(tables, Store(tmp_path))[1]["pairs"] == lost
        return
    with pytest.raises(EvaluationError) as caught:
        on_shared_pairs(tables, Store(tmp_path))
    assert "random:0.5, seed 3, lacks 4 of 60" in str(caught.value)
    # The way out names what lacks them and keeps all other trainings.
    assert f"delete {tmp_path}/arms/random-0.5/seed-3 and" in str(caught.value)
    assert "--restart" not in str(caught.value)


def test_arms_that_share_no_pair_cannot_be_compared(tmp_path):
    with pytest.raises(EvaluationError, match="different pairs"):
        on_shared_pairs({"full": {0: scored([1])}, "random:0.5": {0: scored([2])}}, Store(tmp_path))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The store of a run that is prepared and scored, with 40 held-out pairs of 20 prompts."""
    store = Store(tmp_path / "run")
    rows = [
        {
            "pair_id": i.to_bytes(16, "big"),
            "split": schema.HOLDOUT,
            "conversational": False,
            "prompt": f"prompt {i // 2}",
        }
        for i in range(40)
    ]
    corpus = StageFolder(store, "corpus")
    corpus.begin({})
    record = corpus.commit_shard("shard-0", pa.Table.from_pylist(rows), counts={"holdout": 40})
    file = {"name": record.name, "counts": record.counts}
    monkeypatch.setattr(pipeline, "prepare", lambda run: {"files": [file]})
    monkeypatch.setattr(pipeline, "score", lambda run: {"seconds": 1.0})
    monkeypatch.setattr(runtime, "disconnect", lambda: None)
    return store


@pytest.fixture
def trained_arms(prepared, monkeypatch):
    """Compares arms whose training takes no time; returns the arms' store and what was trained."""
    trained = []
    scores = StageFolder(prepared, "scores")
    scores.begin({})
    scores.finish({}, [], counts={}, seconds=1.0)

    def select(run):
        kept = {"mean_length_difference": 0.0}
        return {"counts": {"kept": 9}, "details": {"kept": kept, "all": kept}, "seconds": 1.0}

    def train(run):
        policy = run.folder("policy")
        if policy.manifest() is None:
            trained.append(run.store.uri)
            policy.begin({})
            policy.finish({}, [policy.publish_bytes("weights", b"x")], counts={}, seconds=1.0)
            run.store.write_bytes("training/checkpoints/checkpoint-1/weights", b"x")
        return {"details": {}, "seconds": 1.0}

    def evaluate(run):
        folder = run.folder("evaluation")
        if not folder.begin({}):
            rows = evaluation_table([(i, -1, -2, -1, -1) for i in range(40)])
            folder.finish({}, [folder.publish_table("p.parquet", rows)], counts={}, seconds=1.0)
        return {"details": {}, "seconds": 1.0}

    for stage in (select, train, evaluate):
        monkeypatch.setattr(pipeline, stage.__name__, stage)
    monkeypatch.setattr(Run, "cluster", SimpleNamespace(gpus=0, embedded=True))

    def compared(*arms, seeds=(0,), **options):
        del trained[:]
        compare(parse_config(CONFIG), prepared.uri, arms, seeds=seeds, parallel=1, **options)
        return [uri.partition("/arms/")[2] for uri in trained]

    return compared, prepared


def kept(store, arm):
    """Whether an arm's policy and its checkpoints are there."""
    found = {store.exists(f"arms/{arm}/{name}") for name in ("policy", "training/checkpoints")}
    assert len(found) == 1
    return found.pop()


def test_a_policy_that_was_kept_is_deleted_by_no_later_comparison(trained_arms):
    compared, store = trained_arms
    assert compared("full", keep_policies=True) == ["full/seed-0"]
    assert compared("full", "random:0.5") == ["random-0.5/seed-0"]
    assert kept(store, "full/seed-0") and not kept(store, "random-0.5/seed-0")
    results = StageFolder(Store(store.uri_of("arms/full/seed-0")), "compare")
    assert results.require()["details"]["policy_kept"] is True
    # Its results are lost: they are made again of the same policy.
    results.store.write_bytes("compare/outcomes.parquet", b"damaged")
    assert compared("full") == [] and kept(store, "full/seed-0")
    assert compared("full", restart=True) == ["full/seed-0"]
    assert not kept(store, "full/seed-0")


def test_arms_of_an_earlier_refscale_that_stored_more_options_stay_valid(trained_arms, monkeypatch):
    compared, _ = trained_arms
    with monkeypatch.context() as earlier:
        earlier.setattr(comparison_module, "deciding_options", dict)
        assert compared("full") == ["full/seed-0"]
    assert compared("full") == []


def test_an_arm_that_an_earlier_refscale_matched_unsaid_is_not_taken_for_one_that_is_not(
    trained_arms, monkeypatch
):
    compared, _ = trained_arms
    arm, matched = "margin:largest:0.5", "margin:largest:0.5:matched"
    with monkeypatch.context() as earlier:
        earlier.setattr(
            comparison_module,
            "arm_config",
            lambda config, _arm, seed: arm_config(config, parse_arm(matched), seed),
        )
        assert compared(arm) == ["margin-largest-0.5/seed-0"]
    with pytest.raises(FingerprintError, match=r"select\.match_lengths = True, .*--restart"):
        compared(arm)
    assert compared(matched) == ["margin-largest-0.5-matched/seed-0"]
    assert compared(arm, restart=True) == ["margin-largest-0.5/seed-0"]


def test_what_a_killed_command_left_to_delete_is_deleted_by_the_next(trained_arms, monkeypatch):
    compared, store = trained_arms

    delete = Store.delete

    def killed(store, path):
        if path == "policy":
            raise KeyboardInterrupt
        delete(store, path)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            compared("full")
    assert kept(store, "full/seed-0")
    assert compared("full", keep_policies=True) == [] and kept(store, "full/seed-0")
    assert compared("full") == [] and not kept(store, "full/seed-0")


def test_a_policy_of_an_arm_that_does_not_say_whether_it_was_kept_stays(trained_arms):
    compared, store = trained_arms
    compared("full", keep_policies=True)
    path = "arms/full/seed-0/compare/MANIFEST.json"
    manifest = store.read_json(path)
    del manifest["details"]["policy_kept"]
    store.write_json(path, manifest)
    assert compared("full") == [] and kept(store, "full/seed-0")


def test_restart_keeps_what_other_arms_and_seeds_have_cost(trained_arms):
    compared, store = trained_arms
    compared("full", "random:0.5", seeds=(0, 1), keep_policies=True)
    assert compared("full", seeds=(1,), restart=True) == ["full/seed-1"]
    assert kept(store, "full/seed-0") and kept(store, "random-0.5/seed-1")
    assert compared("full", "random:0.5", seeds=(0, 1)) == []


def test_a_column_that_does_not_say_which_labels_are_wrong_costs_no_training(
    trained_arms, monkeypatch
):
    compared, store = trained_arms

    def refused(corpus, scores, flipped_column):
        raise ConfigError(f"{corpus.stage} {scores.stage} {flipped_column}")

    monkeypatch.setattr(passes, "check_labels", refused)

    def compared_with_the_column(**options):
        with monkeypatch.context() as patched:
            patched.setitem(CONFIG, "evaluate", {"flipped_column": "wrong"})
            with pytest.raises(ConfigError, match="corpus scores wrong"):
                compared("full", **options)

    compared_with_the_column()
    # Nothing was begun with that column, and nothing is deleted for it.
    assert compared("full", keep_policies=True) == ["full/seed-0"]
    compared_with_the_column(restart=True)
    assert compared("full") == [] and kept(store, "full/seed-0")


@pytest.fixture
def finished_arms(prepared, monkeypatch):
    """Writes finished arms into a run, and compares them as if no training were left to do."""
    store = prepared
    monkeypatch.setattr(
        comparison_module, "_run_arm", lambda run, arm, seed, **_: result(arm, seed)
    )

    def result(arm, seed):
        return StageFolder(
            Store(store.uri_of(f"arms/{arm.folder}/seed-{seed}")), "compare"
        ).require()

    def compared(tables):
        details = {"pairs": 9, "mean_length_difference": 0.0, "right_labels": None}
        details.update(train_s=1.0, train_gpu_s=0.0)
        for arm, table in tables.items():
            folder = StageFolder(
                Store(store.uri_of(f"arms/{parse_arm(arm).folder}/seed-0")), "compare"
            )
            folder.begin({})
            records = [folder.publish_table("outcomes.parquet", table)]
            folder.finish({}, records, counts={}, seconds=1.0, details=details)
        found = compare(parse_config(CONFIG), store.uri, list(tables), seeds=[0], parallel=1)
        return found, store

    return compared


def test_a_pair_that_one_policy_could_not_score_costs_no_comparison(finished_arms):
    whole, lacking = scored(range(40)), scored([i for i in range(40) if i != 7])
    found, store = finished_arms({"full": whole, "random:0.5": lacking})
    assert found["num_holdout"] == 39 and store.exists("arms/full/seed-0/compare/MANIFEST.json")
    # Pairs 0, 3, … 39, 14 of them, are lost.
    assert found["arms"]["full"]["reward_accuracy"]["value"] == pytest.approx(25 / 39)
    assert store.read_json("comparison.json")["left_out"] == {
        "pairs": 1,
        "of": 40,
        "lacking": {"random:0.5": {"0": 1}},
    }
    sentence = (
        "1 of 40 held-out pairs left out, because not every policy could score them: random:0.5,"
        " seed 0, lacks 1"
    )
    assert sentence in " ".join(found["notes"])
    assert sentence in store.read_bytes("comparison.html").decode()


def test_where_every_policy_scored_every_pair_no_word_is_said_of_it(finished_arms):
    found, store = finished_arms({"full": scored(range(40)), "random:0.5": scored(range(40))})
    assert found["num_holdout"] == 40 and found["notes"] == []
    assert "left out" not in store.read_bytes("comparison.html").decode()


def test_pairs_are_resampled_by_the_prompts_that_the_corpus_knows(finished_arms):
    arms = {"full": scored(range(40)), "random:0.5": scored(range(40))}
    found, _ = finished_arms(arms)
    names = OUTCOMES.names[2:]
    values = {
        name: {arm: [table[name].to_numpy()] for arm, table in arms.items()} for name in names
    }
    values = {name: {arm: np.stack(v) for arm, v in by.items()} for name, by in values.items()}
    assert found["arms"] == summarise(values, {}, np.arange(40) // 2, full="full")
    assert found["arms"] != summarise(values, {}, np.arange(40), full="full")


# -- statistics ------------------------------------------------------------------------------------


def summary(arms, controls=None, prompts=None):
    """Of one measure; each pair has a prompt of its own, unless their numbers are given."""
    if prompts is None:
        prompts = np.arange(next(iter(arms.values())).shape[1])
    found = summarise({"m": arms}, controls or {}, prompts, full="full")
    return {arm: measures["m"] for arm, measures in found.items()}


def test_a_paired_difference_is_sharper_than_its_parts():
    # Pairs differ much from each other, the two arms hardly: the same pairs are hard for both.
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=400)
    gained = hard + 0.1 + rng.normal(0, 1e-7, size=400)
    arms = {"full": np.tile(hard, (3, 1)), "top": np.tile(gained, (3, 1))}
    top = summary(arms)["top"]
    difference = top["against_full"]
    assert difference["value"] == pytest.approx(0.1)
    assert difference["high"] - difference["low"] < 1e-6 < top["high"] - top["low"]


def test_seeds_that_disagree_widen_the_interval():
    pairs = np.random.default_rng(0).integers(0, 2, size=300).astype(float)
    calm = np.stack([pairs, pairs, pairs])
    wild = np.stack([np.zeros(300), pairs, np.ones(300)])
    found = summary({"calm": calm, "wild": wild})
    width = {arm: at["high"] - at["low"] for arm, at in found.items()}
    # A holdout of 300 at one half: 4 x 0.5 / sqrt(300) = 0.115.
    assert 0.09 < width["calm"] < 0.14 < 0.5 < width["wild"]
    assert found["calm"]["seed_sd"] == 0 and found["wild"]["seed_sd"] == pytest.approx(
        0.5, abs=0.02
    )
    assert found["wild"]["seeds"] == [0.0, pairs.mean(), 1.0]


def test_an_interval_of_shares_stays_within_them_and_claims_no_certainty():
    rows = np.arange(100)
    arms = {"top": np.stack([rows >= 7, rows >= 3, rows >= 1]).astype(float)}
    arms["all"] = np.ones((3, 100))
    found = summary(arms)
    assert 0.85 < found["top"]["low"] < 0.95 and found["top"]["high"] == 1.0
    # Wilson, of 100 of 100: 1 / (1 + 1.96^2 / 100).
    assert found["all"]["high"] == 1.0 and found["all"]["low"] == pytest.approx(0.963, abs=5e-4)
    assert summary({"top": arms["top"] * 20})["top"]["high"] > 20


@pytest.mark.parametrize(
    ("mine", "others", "num_seeds"),
    [
        ([0.0], [1.0], 1),  # one held-out pair
        ([1.0] * 30, [0.0] * 30, 3),
        ([0.0, 1.0] * 15, [0.0, 1.0] * 15, 1),
        ([1.0, 0.5, 0.5] * 7, [0.5, 0.0, 0.0] * 7, 3),  # each resample differs by rounding
    ],
    ids=["one pair", "all won", "the same", "by a half"],
)
def test_a_difference_of_which_no_resample_differs_has_no_interval_and_no_verdict(
    mine, others, num_seeds
):
    arms = {"random:0.5": np.tile(others, (num_seeds, 1)), "top": np.tile(mine, (num_seeds, 1))}
    values = {measure: arms for measure in MEASURES}
    found = summarise(values, {"top": "random:0.5"}, np.arange(len(mine)), full=FULL)
    value = mine[0] - others[0]
    difference = found["top"]["reward_accuracy"]["against_random"]
    assert difference == {"value": pytest.approx(value), "low": None, "high": None}
    shown = {**comparison(), "arms": found, "controls": {"top": "random:0.5"}}
    shown["runs"] = dict.fromkeys(found, shown["runs"]["full"])
    said = f"top is not told apart from random pairs of equal size: {value:+.3f} (no interval)"
    assert verdicts(shown) == lines(shown)[-1:] == [said]
    assert said in render_html(shown)


def test_the_mean_of_one_pair_claims_no_certainty():
    arms = {"full": np.array([[-3.5]]), "tied": np.array([[0.5]]), "won": np.array([[1.0]])}
    found = summary(arms)
    assert [found["full"][end] for end in ("value", "low", "high")] == [-3.5, None, None]
    # Wilson's, of one trial: (1.92 +- 1.96 sqrt(1.21)) / 4.84 + 0.5 / 4.84, and 1 / (1 + 3.84).
    ends = [0.5 - 0.445, 0.5 + 0.445]
    assert [found["tied"][end] for end in ("low", "high")] == pytest.approx(ends, abs=5e-4)
    assert found["won"]["low"] == pytest.approx(0.2065, abs=1e-4) and found["won"]["high"] == 1
    at = {"value": -3.5, "low": None, "high": None}
    drawn = plots.intervals([("full", -3.5, at)], "nats", (-4, -3))
    assert drawn.count("<circle") == 2 and 'class="l"' not in drawn


def test_an_interval_depends_neither_on_the_other_arms_nor_much_on_the_draw():
    rng = np.random.default_rng(4)
    pairs = rng.random(120)
    arms = {name: (pairs < rng.normal(0.6, 0.05, (3, 1))).astype(float) for name in "abcd"}
    controls = {"a": "b"}
    few = summary({name: arms[name] for name in "ba"}, controls)["a"]
    many = summary(arms, controls)["a"]
    assert few == many
    ends = []
    for seed in range(8):
        values = {"m": {name: arms[name] for name in "ab"}}
        at = summarise(values, controls, np.arange(120), full="full", seed=seed)["a"]["m"]
        ends.append(at["against_random"]["high"])
    # With 2,000 draws of Student's t for 3 seeds it is twice that.
    assert np.std(ends) < 0.03 * (ends[0] - few["against_random"]["value"])


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_an_interval_of_the_difference_covers_the_truth_at_its_rate(num_seeds):
    # 200 experiments of 60 pairs whose true difference is 0.1, mostly hidden by the trainings.
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        level = rng.normal(0, 0.2, size=(2, num_seeds, 1))
        noise = rng.normal(0, 1, size=(2, num_seeds, 60)) + rng.normal(0, 1, size=60)
        arms = {"random:0.5": (level + noise)[0], "top": (level + noise)[1] + 0.1}
        at = summary(arms, {"top": "random:0.5"})["top"]["against_random"]
        hits += at["low"] <= 0.1 <= at["high"]
    # 95 % of 200, or more: with two unknown variances Student's t is on the safe side.
    assert 185 <= hits


def test_pairs_that_share_a_prompt_leave_the_difference_its_rate(monkeypatch):
    # 150 prompts of 6 pairs, the pairs of 4 completions. An arm and its control win each by the
    # prompt's own chance with that arm, so that nothing is better than random.
    monkeypatch.setattr(statistics, "RESAMPLES", 400)  # enough to find a share of 2.5 %
    sixes = np.repeat(np.arange(150), 6)

    def misses(prompts, experiments):
        rng = np.random.default_rng(0)
        missed = 0
        for _ in range(experiments):
            chances = rng.random((2, 1, 150))[..., sixes]
            wins = (rng.random(chances.shape) < chances).astype(float)
            arms = {"random:0.5": wins[0], "top": wins[1]}
            at = summary(arms, {"top": "random:0.5"}, prompts)["top"]["against_random"]
            missed += not at["low"] <= 0 <= at["high"]
        return missed

    # 5 % of 200 is 10, with a standard deviation of 3.1. Two pairs of a prompt correlate by 1 / 3,
    # so an interval for independent ones is that of 1.96 / sqrt(1 + 5 / 3) = 1.2 standard errors,
    # which misses 23 %: 14 of 60 and not 3.
    assert 3 <= misses(sixes, 200) <= 18
    assert misses(np.arange(900), 60) > 9


def test_with_a_pair_a_prompt_prompts_are_pairs_to_the_last_bit():
    values = np.random.default_rng(2).normal(size=(1, 60))
    rng = np.random.default_rng(0)
    picked = rng.integers(60, size=(RESAMPLES, 60))
    counts = np.stack([np.bincount(row, minlength=60) for row in picked])
    low, high = np.quantile(counts @ values.T / 60, [0.025, 0.975])
    found = summary({"top": values})["top"]
    assert (found["value"], found["low"], found["high"]) == (values.mean(), low, high)


def test_one_seed_is_said_to_be_one():
    one = {**comparison(), "seeds": [0]}
    assert all(s.endswith("(one training each)") for s in verdicts(one))


def test_what_was_not_run_has_no_difference():
    found = summary({"top": np.ones((1, 4))}, {"top": "random:0.5"})["top"]
    assert found["against_random"] is None and found["against_full"] is None
    assert found["seed_sd"] is None


# -- for people ------------------------------------------------------------------------------------


def comparison():
    rng = np.random.default_rng(0)
    arms = {"full": 0.75, "random:0.5": 0.7, "margin:largest:0.5": 0.95, "margin:smallest:0.5": 0.2}
    values = {
        measure: {arm: (rng.random((3, 200)) < share).astype(float) for arm, share in arms.items()}
        for measure in MEASURES
    }
    controls = {arm: parse_arm(arm).control for arm in arms}
    run = {
        "pairs": 100,
        "mean_length_difference": -1.5,
        "length_lean": -0.3,
        "longer_side": {"n": 90, "chosen": 0.5, "preferred": 0.31},
        "right_labels": 0.9,
        "train_s": 10.0,
        "train_gpu_s": 0.0,
    }
    return {
        "arms": summarise(values, controls, np.arange(200), full=FULL),
        "runs": {arm: {seed: dict(run) for seed in (0, 1, 2)} for arm in arms},
        "controls": controls,
        "seeds": [0, 1, 2],
        "num_holdout": 200,
        "notes": [],
        "scoring_s": 3.0,
        "model": "<script>alert(1)</script>",
    }


def test_verdicts_follow_the_intervals_in_both_directions():
    said = verdicts(comparison())
    assert any(s.startswith("margin:largest:0.5 is better than random pairs") for s in said)
    assert any(s.startswith("margin:smallest:0.5 is worse than all pairs") for s in said)
    assert not [s for s in said if s.startswith(("full", "random"))]
    same = comparison()
    same["arms"]["margin:largest:0.5"] = {
        **same["arms"]["margin:largest:0.5"],
        "reward_accuracy": {
            **same["arms"]["margin:largest:0.5"]["reward_accuracy"],
            "against_random": {"value": 0.01, "low": -0.02, "high": 0.04},
        },
    }
    assert any("is not told apart from random pairs" in s for s in verdicts(same))


def test_the_page_shows_every_arm_and_escapes_what_it_is_given():
    values = comparison()
    page = render_html(values)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == len(MEASURES)
    assert all(page.count(arm) >= len(MEASURES) for arm in values["arms"])
    assert "90.0 %" in page and "-1.5" in page and "31 %" in page
    for runs in values["runs"].values():
        for run in runs.values():
            run["right_labels"] = run["longer_side"] = None
    assert "nan" not in render_html(values)


def test_plots_tell_arms_apart_that_begin_alike():
    values = comparison()
    page = render_html(values)
    for arm in values["arms"]:
        assert f">{arm}</text>" in page
    whole = "length_adjusted_margin:smallest:0.25:matched"
    at = {"value": 0.5, "low": 0.4, "high": 0.6}
    drawn = plots.intervals([(whole, 0.5, at), ("x" * 99, 0.5, at)], "accuracy", (0, 1))
    assert f">{whole}</text>" in drawn and "x" * 50 not in drawn


def test_completions_and_win_rate_are_shown_where_they_were_measured():
    values = comparison()
    assert "win rate" not in render_html(values) and "tokens," not in " ".join(lines(values))
    for runs in values["runs"].values():
        for run in runs.values():
            run["extra"] = {"mean_tokens": 41.0, "against_reference": {"win_rate": 0.625}}
    assert "0.625" in render_html(values) and "41.0" in render_html(values)
    assert "full: completions of 41 tokens, win rate against the reference model 0.625" in lines(
        values
    )


@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_resumed_training_cost_is_unknown(resumed):
    run = SimpleNamespace(config=parse_config(CONFIG), gpus=lambda asked: 2.0)
    kept = {"mean_length_difference": -1.0}
    selected = {"counts": {"pairs": 4, "kept": 2}, "details": {"kept": kept, "all": kept}}
    training = {"resumed": resumed, "train_runtime_s": 6.0, "steps": 5, "train_loss": 0.5}
    trained = {"seconds": 10.0, "details": training}
    details = _details(run, selected, trained, {"seconds": 3.0, "details": {}})
    costs = tuple(details[name] for name in ("train_s", "train_gpu_s", "steps_s"))
    assert costs == ((None, None, None) if resumed else (10.0, 20.0, 6.0))
    assert (details["steps"], details["train_loss"], details["evaluate_s"]) == (5, 0.5, 3.0)


@pytest.mark.parametrize(
    ("purity", "right"),
    [({}, None), ({"purity": {"kept": None}}, None), ({"purity": {"kept": {"value": 0.7}}}, 0.7)],
)
def test_an_arm_that_kept_no_known_label_has_no_share_of_right_ones(purity, right):
    run = SimpleNamespace(config=parse_config(CONFIG), gpus=lambda asked: 0.0)
    part = {"mean_length_difference": -1.0}
    selected = {"counts": {"pairs": 4, "kept": 2}, "details": {"kept": part, "all": part}}
    stage = {"seconds": 1.0, "details": {}}
    details = _details(run, selected, stage, {"seconds": 3.0, "details": purity})
    assert details["right_labels"] == right


def test_an_unknown_cost_is_a_dash_in_page_terminal_and_benchmark():
    values = comparison()
    values["runs"]["full"][1].update(train_s=None, train_gpu_s=None)
    page, shown = render_html(values), lines(values)
    assert "nan" not in page and "nan" not in " ".join(shown)
    (row,) = re.findall(r"<tr><td>full</td><td class=\"n\">100</td>.*</tr>", page)
    assert re.findall(r">\s*–</td>", row) and "10.0" not in row
    full, random = (next(line for line in shown if line.startswith(arm)) for arm in ("full", "ran"))
    assert full.endswith(" –") and random.endswith(" 10") and len(full) == len(random)
    script = Path(__file__).resolve().parents[2] / "benchmarks/bench_compare.py"
    arm_row = runpy.run_path(str(script))["_arm_row"]
    row = arm_row("corpus", "full", values)
    assert row["train"] is row["train_gpu"] is None
    assert arm_row("corpus", "random:0.5", values)["train"] == 10.0


def test_the_terminal_has_a_line_an_arm():
    values = comparison()
    shown = lines(values)
    for arm in values["arms"]:
        assert sum(line.startswith(f"{arm} ") for line in shown) >= 1
