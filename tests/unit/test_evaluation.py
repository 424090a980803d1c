"""Holdout metrics and label purity, against numbers derived by hand."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from refscale import schema
from refscale.errors import EvaluationError, SchemaError
from refscale.evaluation import holdout
from refscale.evaluation.holdout import evaluate_pairs, label_purity


def table(rows: list[tuple]) -> pa.Table:
    """Rows of (source, ref c, ref r, policy c, policy r, tokens c, tokens r)."""
    names = [name for name in schema.EVALUATION.names if name != "pair_id"]
    return pa.Table.from_pylist(
        [
            {"pair_id": i.to_bytes(16, "big"), **dict(zip(names, row, strict=True))}
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
    bootstrap = holdout._means(values, seed=0)["x"]
    monkeypatch.setattr(holdout, "_BOOTSTRAP_PAIRS", 10)
    normal = holdout._means(values, seed=0)["x"]
    width = normal["high"] - normal["low"]
    # 2 * 1.96 / sqrt(2000) = 0.0877
    assert width == pytest.approx(0.0877, rel=0.05)
    assert bootstrap["low"] == pytest.approx(normal["low"], abs=0.08 * width)
    assert bootstrap["high"] == pytest.approx(normal["high"], abs=0.08 * width)


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
    estimate = holdout._wilson(81, 263)
    assert estimate["low"] == pytest.approx(0.2553, abs=1e-4)
    assert estimate["high"] == pytest.approx(0.3662, abs=1e-4)
    assert holdout._wilson(10, 10)["high"] == 1.0


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


def test_purity_without_wrong_labels_has_no_auc() -> None:
    result = label_purity(np.zeros(4, bool), np.array([1, 0, 1, 0], bool), np.arange(4.0))
    assert result["auc"] is None
    assert result["kept"]["value"] == 1.0


@pytest.mark.parametrize(
    ("flipped", "kept", "keys", "message"),
    [
        ([0, 1], [1, 0], [1.0], "got 2, 2, 1"),
        ([0, 1], [0, 0], [1.0, 2.0], "none of 2"),
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
