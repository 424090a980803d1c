"""Holdout metrics and label purity, against numbers derived by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from refscale import schema, summary
from refscale.errors import ConfigError, EvaluationError, SchemaError, ScoringError
from refscale.evaluation import holdout
from refscale.evaluation.holdout import (
    evaluate_pairs,
    known_labels,
    label_purity,
    number_prompts,
    publish_evaluation,
)
from refscale.report.verdict import verdict
from refscale.scoring.shard_scoring import table_to_bytes
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


def table(rows: list[tuple], prompts: list[int] | None = None) -> pa.Table:
    """Rows of (source, ref c, ref r, policy c, policy r, tokens c, tokens r), each its prompt's."""
    names = [name for name in schema.EVALUATION.names if name not in ("pair_id", "prompt_id")]
    return pa.Table.from_pylist(
        [
            {
                "pair_id": i.to_bytes(16, "big"),
                "prompt_id": (prompts[i] if prompts else i).to_bytes(16, "big"),
                **dict(zip(names, row, strict=True)),
            }
            for i, row in enumerate(rows)
        ],
        schema=schema.EVALUATION,
    )


FOUR = table(
    [
        # logratio margin (pc - rc) - (pr - rr), then mean log-probs c against r, ref and policy
        ("a", -10, -20, -8, -22, 2, 2),  # 2 + 2 = 4 > 0; ref -5 > -10; policy -4 > -11
        ("a", -30, -20, -32, -19, 3, 4),  # -2 - 1 = -3 < 0; ref -10 < -5; policy -10.7 < -4.75
        ("b", -10, -10, -10, -10, 1, 1),  # 0: tie; ref tie; policy tie
        ("b", -12, -8, -9, -10, 4, 2),  # 3 + 2 = 5; ref -3 > -4; policy -2.25 > -5
    ]
)


def test_metrics_equal_those_derived_by_hand() -> None:
    overall = evaluate_pairs(FOUR, beta=0.5)["overall"]
    assert overall["n"] == 4
    # (1 + 0 + 0.5 + 1) / 4
    assert overall["reward_accuracy"]["after"]["value"] == pytest.approx(0.625)
    # 0.5 (4 - 3 + 0 + 5) / 4
    assert overall["reward_margin"]["after"]["value"] == pytest.approx(0.75)
    ranking = overall["ranking_accuracy"]
    # (1 + 0 + 0.5 + 1) / 4 for both, so that their difference is 0 in every resample
    assert ranking["before"]["value"] == ranking["after"]["value"] == pytest.approx(0.625)
    assert ranking["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_each_source_has_its_own_metrics() -> None:
    sources = evaluate_pairs(FOUR, beta=0.5)["sources"]
    assert list(sources) == ["a", "b"]
    assert sources["a"]["n"] == 2
    assert sources["a"]["reward_accuracy"]["after"]["value"] == 0.5  # (1 + 0) / 2
    assert sources["b"]["reward_accuracy"]["after"]["value"] == 0.75  # (0.5 + 1) / 2
    assert sources["b"]["reward_margin"]["after"]["value"] == pytest.approx(1.25)  # 0.5 * 5 / 2


def test_a_policy_equal_to_its_reference_scores_one_half() -> None:
    same = table([("a", -1.5 * i - 1, -3.0, -1.5 * i - 1, -3.0, 2, 3) for i in range(10)])
    overall = evaluate_pairs(same, beta=0.1)["overall"]
    assert overall["reward_accuracy"]["after"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert overall["reward_accuracy"]["before"]["value"] == 0.5
    assert overall["reward_margin"]["after"]["value"] == 0.0


@pytest.mark.parametrize(("prompts", "low"), [([0], 0.2065), ([0, 1, 2, 3, 4, 5, 6, 7], 0.6756)])
@pytest.mark.parametrize("won", [True, False])
def test_a_few_pairs_that_all_win_or_lose_make_nothing_certain(
    won: bool, prompts: list[int], low: float
) -> None:
    # Wilson's bound is n / (n + 1.96²): 1 / 4.8415 and 8 / 11.8415.
    better = (-8, -12) if won else (-12, -8)
    rows = [("a", -10, -10, *better, 2, 2) for _ in prompts]
    after = evaluate_pairs(table(rows, prompts), beta=0.1)["overall"]["reward_accuracy"]["after"]
    bounds = (low, 1.0) if won else (0.0, 1 - low)
    assert (after["low"], after["high"]) == pytest.approx(bounds, abs=1e-4)


def test_ranking_accuracy_is_normalised_by_length() -> None:
    # Sum prefers the rejected (-6 < -4), the mean a token the chosen (-1 > -2).
    one = table([("a", -6, -4, -6, -4, 6, 2)])
    ranking = evaluate_pairs(one, beta=0.1)["overall"]["ranking_accuracy"]
    assert ranking["before"]["value"] == 1.0


def test_the_bootstrap_interval_matches_the_binomial_one() -> None:
    # 70 wins of 100: the standard error is sqrt(0.7 * 0.3 / 100) = 0.0458, so 0.61 to 0.79.
    rows = [("a", -1, -1, 0 if i < 70 else -2, -1, 1, 1) for i in range(100)]
    after = evaluate_pairs(table(rows), beta=0.1, seed=1)["overall"]["reward_accuracy"]["after"]
    assert after["value"] == pytest.approx(0.7)
    assert after["low"] == pytest.approx(0.61, abs=0.015)
    assert after["high"] == pytest.approx(0.79, abs=0.015)


def test_many_pairs_take_the_normal_interval_which_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"x": np.random.default_rng(0).normal(size=2000)}
    own = np.arange(2000)
    bootstrap = holdout._means(values, own, seed=0)["x"]
    monkeypatch.setattr(holdout, "_BOOTSTRAP_PROMPTS", 10)
    normal = holdout._means(values, own, seed=0)["x"]
    width = normal["high"] - normal["low"]
    # 2 * 1.96 / sqrt(2000) = 0.0877
    assert width == pytest.approx(0.0877, rel=0.05)
    assert bootstrap["low"] == pytest.approx(normal["low"], abs=0.08 * width)
    assert bootstrap["high"] == pytest.approx(normal["high"], abs=0.08 * width)


# 150 prompts of 6 pairs, the pairs of 4 completions.
SIXES = np.repeat(np.arange(150), 6)


def misses(prompts: np.ndarray, experiments: int) -> int:
    """How many intervals miss the truth, 0.5, where a prompt's pairs win and lose together."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(experiments):
        # A prompt's chance to win is uniform, so two of its pairs correlate by
        # var(chance) / var(outcome) = (1 / 12) / (1 / 4) = 1 / 3: a mean's variance is
        # 1 + 5 / 3 = 2.7 times that of independent pairs, and an interval for those, of 1.96
        # standard errors, holds the truth as often as one of 1.2, 77 %.
        wins = (rng.random(SIXES.size) < rng.random(150)[SIXES]).astype(float)
        found = holdout._means({"wins": wins}, prompts, seed=0)["wins"]
        missed += not found["low"] <= 0.5 <= found["high"]
    return missed


def test_pairs_that_share_a_prompt_leave_the_interval_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdout, "RESAMPLES", 400)  # enough to find a share of 2.5 %
    # 5 % of 200 is 10, with a standard deviation of 3.1; 23 % of 60 is 14, and 5 % of 60 is 3.
    assert 3 <= misses(SIXES, 200) <= 18
    assert misses(np.arange(SIXES.size), 60) > 9


def test_the_normal_interval_has_its_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "_BOOTSTRAP_PROMPTS", 10)
    # 5 % of 2000 is 100, with a standard deviation of 10; 23 % is 460.
    assert 70 <= misses(SIXES, 2000) <= 135
    assert misses(np.arange(SIXES.size), 2000) > 400


def test_the_normal_interval_of_two_uneven_prompts_equals_that_derived_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdout, "_BOOTSTRAP_PROMPTS", 1)
    wins = np.array([1.0, 1.0, 0.0, 1.0])
    found = holdout._means({"wins": wins}, np.array([0, 0, 1, 0]), seed=0)["wins"]
    # 3 of 4. Residuals 3 - 3 x 0.75 and 0 - 1 x 0.75; sqrt(2 / (2 - 1) x 2 x 0.75^2) / 4 = 0.375.
    assert found["value"] == 0.75
    assert found["high"] - 0.75 == pytest.approx(1.96 * 0.375, rel=1e-4)
    assert 0.75 - found["low"] == pytest.approx(1.96 * 0.375, rel=1e-4)


@pytest.mark.parametrize("threshold", [20_000, 10])
def test_with_a_pair_a_prompt_prompts_are_pairs_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setattr(holdout, "_BOOTSTRAP_PROMPTS", threshold)
    values = np.random.default_rng(2).normal(size=(60, 2))
    found = holdout._means({"x": values[:, 0], "y": values[:, 1]}, np.arange(60), seed=7)
    mean = values.mean(axis=0)
    if threshold == 10:
        half = 1.959964 * values.std(axis=0, ddof=1) / np.sqrt(60)
        low, high = mean - half, mean + half
    else:
        rng = np.random.default_rng(7)
        draws = [rng.multinomial(60, np.full(60, 1 / 60), size=100) for _ in range(20)]
        means = np.concatenate([counts @ values / 60 for counts in draws])
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
    for i, name in enumerate(("x", "y")):
        assert found[name] == {"value": mean[i], "low": low[i], "high": high[i]}


def test_prompts_are_numbered_as_they_appear_and_one_alone_is_resampled_by_pair() -> None:
    assert number_prompts(pa.array([b"q", b"p", b"q", b"r"])).tolist() == [0, 1, 0, 2]
    chunks = pa.chunked_array([[b"q", b"p"], [b"r", b"q"]])
    assert number_prompts(chunks).tolist() == [0, 1, 2, 0]
    assert number_prompts(pa.array([b"p"] * 3)).tolist() == [0, 1, 2]


def test_a_source_is_resampled_by_its_own_prompts() -> None:
    # Source b has two prompts of 20 equal pairs: all its resamples have 0, 20 or 40 wins of 40.
    rows = [("a", -1, -1, 0, -1, 1, 1)] * 10
    rows += [("b", -1, -1, 0, -1, 1, 1)] * 20 + [("b", -1, -1, -2, -1, 1, 1)] * 20
    prompts = [*range(10), *[10] * 20, *[11] * 20]
    after = evaluate_pairs(table(rows, prompts), beta=0.1)["sources"]["b"]["reward_accuracy"]
    assert after["after"] == {"value": 0.5, "low": 0.0, "high": 1.0}


def test_the_paired_difference_is_narrower_than_unpaired_ones() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        ref = float(rng.normal())
        rows.append(("a", ref, 0.0, ref + 0.2, 0.0, 1, 1))
    ranking = evaluate_pairs(table(rows), beta=0.1)["overall"]["ranking_accuracy"]
    width = {k: v["high"] - v["low"] for k, v in ranking.items()}
    assert 0 < width["difference"] < 0.75 * width["before"]


def test_the_same_seed_gives_the_same_interval() -> None:
    assert evaluate_pairs(FOUR, 0.1, seed=3) == evaluate_pairs(FOUR, 0.1, seed=3)


def test_no_pairs_and_non_finite_sums_are_refused() -> None:
    with pytest.raises(EvaluationError, match="holdout_fraction"):
        evaluate_pairs(table([]), 0.1)
    bad = table([("a", -1, -1, float("nan"), -1, 1, 1)])
    with pytest.raises(EvaluationError, match=r"policy_chosen_logps of pair 0{32} is nan"):
        evaluate_pairs(bad, 0.1)
    with pytest.raises(SchemaError):
        evaluate_pairs(FOUR.drop_columns(["ref_chosen_logps"]), 0.1)


def test_a_table_that_does_not_know_its_prompts_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"lacks the column\(s\) prompt_id"):
        evaluate_pairs(FOUR.drop_columns(["prompt_id"]), 0.1)


# -- the evaluation table --------------------------------------------------------------------------


def pair_id(i: int) -> bytes:
    return bytes([i] * 16)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, StageFolder]:
    """Corpus and scores of pairs 0 to 7; number 7 is a training pair."""
    # 0 to 2 share a prompt, which 1 shares to its last token; 3 and 4 have none, but a BOS token;
    # 5 and 6 have the same text, one of them as a chat.
    prompts = ["same", "same", "same", "", "", "[]", "[]", "same"]
    ids = [[1, 5], [1], [1, 5], [1], [1], [1, 6], [1, 6], [1, 5]]
    rows = [
        {
            "pair_id": pair_id(i),
            "source": "a",
            "source_row": i,
            "split": schema.TRAIN if i == 7 else schema.HOLDOUT,
            "prompt_ids": ids[i],
            "chosen_ids": [7, 8],
            "rejected_ids": [9],
            "chosen_truncated": False,
            "rejected_truncated": False,
            "conversational": i == 6,
            "prompt": prompts[i],
            "chosen": "",
            "rejected": "",
            "passthrough": "{}",
            "ref_chosen_logps": -1.0 * i,
            "ref_rejected_logps": -2.0 * i,
            "num_prompt_tokens": 1,
            "num_chosen_tokens": 2,
            "num_rejected_tokens": 1,
        }
        for i in range(8)
    ]
    store = Store(tmp_path / "run")
    found = {name: StageFolder(store, name) for name in ("corpus", "scores", "evaluation")}
    for folder in found.values():
        folder.begin({})
    for name, columns in (("corpus", schema.CORPUS), ("scores", schema.SCORES)):
        made = pa.Table.from_pylist([{n: row[n] for n in columns.names} for row in rows], columns)
        found[name].commit_shard("shard-0", made)
    return found


def policy_scores(folders: dict[str, StageFolder], numbers: list[int]) -> pa.Table:
    """As the policy's replica hands them over: a tenth of a nat above the reference's."""
    scored = folders["scores"].read_table("shard-0.parquet")
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        values = pa.array(scored[name].to_numpy() + np.float32(0.1))
        scored = scored.set_column(scored.column_names.index(name), name, values)
    return schema.conform(scored.take(numbers), schema.SCORES, "scores")


def publish(folders: dict[str, StageFolder], policy: pa.Table) -> pa.Table:
    step = publish_evaluation(folders["evaluation"], folders["corpus"], folders["scores"])
    item = {"shard": "shard-0", "scores": table_to_bytes(policy), "counts": "{}"}
    assert json.loads(step(item)["record"])["name"] == "shard-0.parquet"
    return folders["evaluation"].read_table("shard-0.parquet")


def test_the_evaluation_joins_by_pair_id_whatever_the_order(
    folders: dict[str, StageFolder],
) -> None:
    policy = policy_scores(folders, [6, 2, 0])
    stranger = policy.slice(0, 1).set_column(
        0, policy.schema.field(0), pa.array([pair_id(99)], pa.binary(16))
    )
    found = publish(folders, pa.concat_tables([policy.slice(0, 1), stranger, policy.slice(1)]))
    assert found.schema.equals(schema.EVALUATION)
    # 99 has no reference.
    assert found["pair_id"].to_pylist() == [pair_id(i) for i in (6, 2, 0)]
    assert found["ref_rejected_logps"].to_pylist() == [-12.0, -4.0, 0.0]
    assert found["policy_chosen_logps"].to_pylist() == pytest.approx([-5.9, -1.9, 0.1])


def test_pairs_of_one_prompt_have_its_id_and_those_without_one_their_own(
    folders: dict[str, StageFolder],
) -> None:
    found = publish(folders, policy_scores(folders, list(range(7))))["prompt_id"].to_pylist()
    assert found[0] == found[1] == found[2]
    assert found[3:5] == [pair_id(3), pair_id(4)]
    assert len(set(found)) == 5  # and the same text is another prompt as a chat


def test_an_evaluated_sum_that_is_not_finite_or_no_held_out_pair_is_never_published(
    folders: dict[str, StageFolder],
) -> None:
    policy = policy_scores(folders, [0, 1])
    place = policy.column_names.index("ref_chosen_logps")
    values = pa.array([1.0, np.inf], pa.float32())
    bad = policy.set_column(place, policy.schema.field(place), values)
    with pytest.raises(ScoringError, match=pair_id(1).hex()):
        publish(folders, bad)
    with pytest.raises(SchemaError, match="1 evaluated pairs of shard-0 are not held out"):
        publish(folders, policy_scores(folders, [0, 7]))
    assert folders["evaluation"].finished_shards() == {}


# -- right labels ----------------------------------------------------------------------------------


def test_label_purity_equals_that_derived_by_hand() -> None:
    flipped = np.array([False, False, True, False, True])
    kept = np.array([True, True, False, False, False])
    keys = np.array([5.0, 4.0, 3.0, 3.0, 1.0])
    result = label_purity(flipped, kept, keys)
    assert (result["n"], result["n_kept"]) == (5, 2)
    assert result["corpus"]["value"] == pytest.approx(0.6)  # 3 of 5
    assert result["kept"]["value"] == 1.0
    assert result["random_expected"] == pytest.approx(0.6)
    # sqrt(0.6 * 0.4 / 2 * (5 - 2) / (5 - 1)) = 0.3
    assert result["random_sd"] == pytest.approx(0.3)
    # right keys 5, 4, 3 against wrong 3, 1: wins 2 + 2 + (0.5 + 1) = 5.5 of 6
    assert result["auc"] == pytest.approx(5.5 / 6)


def test_wilson_interval_equals_the_published_value() -> None:
    # 81 of 263, Newcombe (1998), table I, method 3: 0.2553 to 0.3662
    estimate = holdout.wilson(81, 263)
    assert estimate["low"] == pytest.approx(0.2553, abs=1e-4)
    assert estimate["high"] == pytest.approx(0.3662, abs=1e-4)
    assert holdout.wilson(10, 10)["high"] == 1.0


def test_the_random_control_averages_to_the_corpus() -> None:
    rng = np.random.default_rng(0)
    flipped = rng.random(1000) < 0.3
    kept = np.arange(1000) < 500
    keys = rng.random(1000)
    values = [label_purity(flipped, kept, keys, seed=s)["random"]["value"] for s in range(50)]
    expected = label_purity(flipped, kept, keys)
    # The mean of 50 subsets lies within 4 standard errors of the expectation.
    error = expected["random_sd"] / np.sqrt(50)
    assert abs(np.mean(values) - expected["random_expected"]) < 4 * error


def test_where_nothing_is_kept_the_purity_of_the_corpus_is_left() -> None:
    result = label_purity(np.array([1, 0, 0, 0], bool), np.zeros(4, bool), np.arange(4.0))
    assert (result["n"], result["n_kept"], result["corpus"]["value"]) == (4, 0, 0.75)
    assert (result["auc"], result["random_expected"]) == (1.0, 0.75)
    assert result["kept"] is result["random"] is result["random_sd"] is None
    shown = summary.evaluation_lines({"unscorable": {}, "purity": result})
    assert [label for label, _ in shown] == ["right labels, corpus"]
    values = {"selection": None, "training": None, "stages": [], "evaluation": {"purity": result}}
    assert "right label" not in " ".join(verdict(values))


def test_known_labels_are_flags_and_null_is_no_label() -> None:
    values = [True, False, 1, 0, 1.0, 0.0, None]
    known, wrong = known_labels(
        [*({"wrong": value} for value in values), {}, {"other": "x"}], "wrong"
    )
    assert known.tolist() == [True] * 6 + [False] * 3
    assert wrong.tolist() == [True, False] * 3


@pytest.mark.parametrize(
    "value", ["false", "true", "0", "", 2, 0.5, -1, float("nan"), [], {"a": 1}]
)
def test_a_label_that_is_no_flag_is_refused_by_column_and_value(value: object) -> None:
    said = f"column 'wrong', .* true or false, 1 or 0, or null .* got {re.escape(repr(value))};"
    with pytest.raises(ConfigError, match=said):
        known_labels([{"wrong": True}, {"wrong": value}], "wrong")


def test_purity_without_wrong_labels_has_no_auc() -> None:
    result = label_purity(np.zeros(4, bool), np.array([1, 0, 1, 0], bool), np.arange(4.0))
    assert result["auc"] is None
    assert result["kept"]["value"] == 1.0


@pytest.mark.parametrize(
    ("flipped", "kept", "keys", "message"),
    [
        ([0, 1], [1, 0], [1.0], "got 2, 2, 1"),
        ([], [], [], "no pair with a known label"),
        ([0, 1], [1, 0], [1.0, float("nan")], "1 selection keys are NaN"),
    ],
)
def test_impossible_purity_inputs_are_refused(
    flipped: list, kept: list, keys: list, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        label_purity(np.array(flipped, bool), np.array(kept, bool), np.array(keys))


def test_importing_evaluation_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, refscale.evaluation.holdout; assert not {'torch', 'ray'} & set(sys.modules),"
        " 'evaluation must stay light'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_policy_that_learned_length_is_told():
    # Chosen is the longer side of two in three; the policy likes the shorter side of every pair.
    shorter_chosen = ("s", -4.0, -4.0, -3.0, -5.0, 2, 4)
    longer_chosen = ("s", -4.0, -4.0, -5.0, -3.0, 4, 2)
    equal = ("s", -4.0, -4.0, -3.0, -5.0, 3, 3)
    rows = table([shorter_chosen, longer_chosen, longer_chosen, equal])
    facts = evaluate_pairs(rows, beta=0.1)
    assert facts["overall"]["longer_side"] == {"n": 3, "chosen": 2 / 3, "preferred": 0.0}
    shown = dict(summary.evaluation_lines({"unscorable": {}, **facts}))
    assert "longer side in 0% of 3 pairs, chosen is it in 67%" in shown["careful"]

    right = table([("s", -4.0, -4.0, -3.0, -5.0, *sides) for sides in ((2, 4), (4, 2), (4, 2))])
    facts = evaluate_pairs(right, beta=0.1)
    assert facts["overall"]["longer_side"]["preferred"] == 2 / 3
    assert "careful" not in dict(summary.evaluation_lines({"unscorable": {}, **facts}))
    assert evaluate_pairs(table([equal]), beta=0.1)["overall"]["longer_side"] is None
