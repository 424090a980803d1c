"""Did training help, and were the right pairs kept: numbers with their uncertainty.

In: the evaluation table (policy and reference sums of held-out pairs), or the labels known to be
wrong and the mask of kept pairs. Out: plain dicts, ready for JSON. Costs seconds for a million
pairs; numpy and pyarrow only.

An *estimate* here is `{"value": v, "low": l, "high": h}` with a 95 % interval.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.errors import EvaluationError

RESAMPLES = 2000
# Above this many pairs a mean's bootstrap and its normal interval differ by less than 1 % of their
# width, and the bootstrap would cost gigabytes.
_BOOTSTRAP_PAIRS = 20_000
_Z95 = 1.959964

Estimate = dict[str, float]


def evaluate_pairs(table: pa.Table, beta: float, *, seed: int = 0) -> dict[str, Any]:
    """Preference accuracy and margins on held-out pairs, overall and per source.

    With the implicit reward r(y) = beta (log pi(y|x) - log pi_ref(y|x)) (arXiv:2305.18290, eq. 5
    up to its prompt-only term, which cancels in differences):

    - reward_accuracy: share of pairs with r(chosen) > r(rejected), TRL's rewards/accuracies, but
      a tie counts one half. Before training policy and reference agree, every reward is 0 and the
      accuracy 0.5 by definition.
    - reward_margin: mean of r(chosen) - r(rejected), TRL's rewards/margins; 0 before training.
    - ranking_accuracy: share of pairs whose chosen completion has the larger mean log-prob a token
      (length-normalised ranking accuracy, arXiv:2405.19534), of the reference (before), of the
      policy (after), and the paired difference of the two.

    Args:
        table: Rows in `schema.EVALUATION`.
        beta: DPO's beta.
        seed: Of the bootstrap.

    Returns:
        `{"beta", "overall": M, "sources": {name: M}}` where M is `{"n", "reward_accuracy":
        {"before", "after"}, "reward_margin": {"before", "after"}, "ranking_accuracy": {"before",
        "after", "difference"}}` with an estimate at each leaf but n.

    Raises:
        EvaluationError: There is no pair, or a sum is not finite.
        SchemaError: The table is not in its schema.
    """
    table = schema.conform(table, schema.EVALUATION, "the evaluation table")
    if not table.num_rows:
        raise EvaluationError(
            "there is no held-out pair to evaluate; raise corpus.holdout_fraction"
        )
    columns = {
        name: np.asarray(table.column(name).to_numpy(), dtype=np.float64)
        for name in schema.EVALUATION.names
        if name.endswith("_logps") or name.startswith("num_")
    }
    for name, values in columns.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            pair_id = table.column("pair_id")[int(bad[0])].as_py().hex()
            raise EvaluationError(f"{name} of pair {pair_id} is {values[bad[0]]}, not finite")

    policy = columns["policy_chosen_logps"] - columns["policy_rejected_logps"]
    reference = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    chosen_tokens = np.maximum(columns["num_chosen_tokens"], 1)
    rejected_tokens = np.maximum(columns["num_rejected_tokens"], 1)

    def mean_margin(side: str) -> np.ndarray:
        chosen = columns[f"{side}_chosen_logps"] / chosen_tokens
        return chosen - columns[f"{side}_rejected_logps"] / rejected_tokens

    before, after = _wins(mean_margin("ref")), _wins(mean_margin("policy"))
    outcomes = {
        "reward_accuracy": _wins(policy - reference),
        "reward_margin": beta * (policy - reference),
        "before": before,
        "after": after,
        "difference": after - before,
    }

    def metrics(rows: np.ndarray) -> dict[str, Any]:
        estimates = _means({name: v[rows] for name, v in outcomes.items()}, seed)
        return {
            "n": int(rows.size),
            "reward_accuracy": {"before": _exactly(0.5), "after": estimates["reward_accuracy"]},
            "reward_margin": {"before": _exactly(0.0), "after": estimates["reward_margin"]},
            "ranking_accuracy": {k: estimates[k] for k in ("before", "after", "difference")},
        }

    sources = np.asarray(table.column("source").to_pylist(), dtype=object)
    names = sorted(pc.unique(table.column("source")).to_pylist())
    return {
        "beta": beta,
        "overall": metrics(np.arange(table.num_rows)),
        "sources": {name: metrics(np.flatnonzero(sources == name)) for name in names},
    }


def label_purity(
    flipped: np.ndarray, kept: np.ndarray, keys: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """How many labels are right in the corpus, in the kept set, and in a random set of its size.

    Args:
        flipped: (n,) bool: the label is known to be wrong.
        kept: (n,) bool: the pair was selected.
        keys: (n,) selection keys; a larger one is taken to speak for the label.
        seed: Of the random subset.

    Returns:
        n, n_kept; estimates (Wilson's score interval, 1927) corpus, kept and random, the last of
        one seeded subset of the kept set's size; random_expected (a random subset's expected
        purity is the corpus's) and random_sd (hypergeometric); auc: probability that a pair with a
        right label has the larger key, ties half (Hanley and McNeil, 1982); None where all labels
        are right or all wrong.

    Raises:
        EvaluationError: The arrays differ in length, nothing is kept, or a key is NaN.
    """
    right, kept = ~np.asarray(flipped, dtype=bool), np.asarray(kept, dtype=bool)
    keys = np.asarray(keys, dtype=np.float64)
    n, n_kept = right.size, int(kept.sum())
    if not n == kept.size == keys.size:
        raise EvaluationError(
            f"label purity needs one flip, mask and key a pair, got {n}, {kept.size}, {keys.size}"
        )
    if n_kept == 0:
        raise EvaluationError(f"none of {n} pairs is kept; label purity needs at least one")
    if np.isnan(keys).any():
        raise EvaluationError(f"{int(np.isnan(keys).sum())} selection keys are NaN")
    purity = float(right.mean())
    subset = np.random.default_rng(seed).choice(n, size=n_kept, replace=False)
    # Variance of a mean of n_kept draws without replacement.
    variance = purity * (1 - purity) / n_kept * ((n - n_kept) / (n - 1) if n > 1 else 0.0)
    return {
        "n": n,
        "n_kept": n_kept,
        "corpus": _wilson(int(right.sum()), n),
        "kept": _wilson(int(right[kept].sum()), n_kept),
        "random": _wilson(int(right[subset].sum()), n_kept),
        "random_expected": purity,
        "random_sd": float(np.sqrt(variance)),
        "auc": _auc(keys, right),
    }


def _wins(margins: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, one half where zero."""
    return (np.sign(margins) + 1) / 2


def _exactly(value: float) -> Estimate:
    return {"value": value, "low": value, "high": value}


def _means(values: dict[str, np.ndarray], seed: int) -> dict[str, Estimate]:
    """Means with 95 % intervals, all from the same resamples, so that differences are paired.

    Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) up to `_BOOTSTRAP_PAIRS` pairs,
    the normal interval above.
    """
    columns = np.stack(list(values.values()), axis=1)
    n = columns.shape[0]
    means = columns.mean(axis=0)
    if n > _BOOTSTRAP_PAIRS:
        half = _Z95 * columns.std(axis=0, ddof=1) / np.sqrt(n)
        low, high = means - half, means + half
    else:
        rng = np.random.default_rng(seed)
        resampled = np.empty((RESAMPLES, columns.shape[1]))
        for begin in range(0, RESAMPLES, 100):  # 100 x 20,000 counts are 16 MB
            counts = rng.multinomial(n, np.full(n, 1 / n), size=min(100, RESAMPLES - begin))
            resampled[begin : begin + 100] = counts @ columns / n
        low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {
        name: {"value": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(values)
    }


def _wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's 95 % score interval, which stays within [0, 1]."""
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The interval contains p; at p = 0 and 1 rounding may miss it by an ulp.
    return {"value": p, "low": float(min(centre - half, p)), "high": float(max(centre + half, p))}


def _auc(keys: np.ndarray, positive: np.ndarray) -> float | None:
    """Mann-Whitney U / (n1 n0), with midranks for ties."""
    n1 = int(positive.sum())
    n0 = positive.size - n1
    if not n1 or not n0:
        return None
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    midranks = last - (counts - 1) / 2  # mean of the 1-based ranks of each tied group
    rank_sum = midranks[inverse][positive].sum()
    return float((rank_sum - n1 * (n1 + 1) / 2) / (n1 * n0))
