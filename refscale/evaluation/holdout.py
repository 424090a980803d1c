"""Did training help, and were the right pairs kept: numbers with their uncertainty.

In: the policy's and the reference's sums of held-out pairs, which `publish_evaluation` joins to the
evaluation table; or the labels known to be wrong and the mask of kept pairs. Out: plain dicts,
ready for JSON. Costs seconds for a million pairs; numpy and pyarrow only.

An *estimate* here is `{"value": v, "low": l, "high": h}` with a 95 % interval. Prompts are what is
resampled, each with all its pairs: k completions of a prompt make k(k-1)/2 pairs that win and lose
together, and intervals that take them for independent are too narrow.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.corpus.pairs import content_hash
from refscale.errors import ConfigError, EvaluationError
from refscale.scoring.shard_scoring import require_finite, table_from_bytes
from refscale.storage.stages import StageFolder

# Part of the evaluation's fingerprint: raised when its table or its numbers become others.
VERSION = 3  # 2 took a null label for a right one, 1 resampled pairs instead of prompts
RESAMPLES = 2000
# Above this many prompts a mean's bootstrap and its normal interval differ by less than 1 % of
# their width, and the bootstrap would cost gigabytes.
_BOOTSTRAP_PROMPTS = 20_000
_Z95 = 1.959964

Estimate = dict[str, float]


# -- the evaluation table --------------------------------------------------------------------------


def publish_evaluation(
    evaluation: StageFolder, corpus: StageFolder, scores: StageFolder
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The publishing step of the policy's scores, joined with the reference's and the prompts."""

    def publish(item: dict[str, Any]) -> dict[str, Any]:
        shard = item["shard"]
        policy = table_from_bytes(item["scores"])
        require_finite(policy, shard)
        reference = scores.read_table(f"{shard}.parquet")
        # What the reference could not score is in no table.
        rows = pc.index_in(policy["pair_id"], value_set=reference["pair_id"])
        policy, reference = policy.filter(pc.is_valid(rows)), reference.take(rows.drop_null())
        prompts = schema.matching_rows(
            prompt_ids(corpus, shard),
            reference["pair_id"],
            f"evaluated pairs of {shard} are not held out in the corpus",
        )
        table = pa.table(
            {
                "pair_id": reference["pair_id"],
                "prompt_id": prompts["prompt_id"],
                "source": reference["source"],
                "ref_chosen_logps": reference["ref_chosen_logps"],
                "ref_rejected_logps": reference["ref_rejected_logps"],
                "policy_chosen_logps": policy["ref_chosen_logps"],
                "policy_rejected_logps": policy["ref_rejected_logps"],
                "num_chosen_tokens": reference["num_chosen_tokens"],
                "num_rejected_tokens": reference["num_rejected_tokens"],
            }
        )
        record = evaluation.commit_shard(
            shard,
            schema.conform(table, schema.EVALUATION, "evaluation"),
            counts=json.loads(item["counts"]),
        )
        return {"record": json.dumps(asdict(record))}

    return publish


def prompt_ids(corpus: StageFolder, shard: str) -> pa.Table:
    """Which held-out pairs of a corpus shard have the same prompt.

    The prompt's text tells them apart, not its tokens: an empty prompt may have a BOS token, and a
    last token that merges with a completion would make two prompts of one.

    Returns:
        A row a held-out pair: pair_id, and prompt_id, a digest of the prompt. A pair without a
        prompt has its own id for it: it shares nothing.
    """
    columns = ["pair_id", "split", "conversational", "prompt"]
    table = corpus.read_table(f"{shard}.parquet", columns=columns)
    table = table.filter(pc.equal(table["split"], schema.HOLDOUT))
    ids = [
        content_hash(b"chat" if conversational else b"text", prompt.encode()) if prompt else pair_id
        for pair_id, conversational, prompt in zip(
            table["pair_id"].to_pylist(),
            table["conversational"].to_pylist(),
            table["prompt"].to_pylist(),
            strict=True,
        )
    ]
    return pa.table({"pair_id": table["pair_id"], "prompt_id": pa.array(ids, pa.binary(16))})


# -- what it says ----------------------------------------------------------------------------------


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
    - longer_side: of the n pairs whose sides differ in tokens, the shares whose longer side is
      chosen, and has the larger reward (a tie counts one half): far apart where the policy learned
      length. None where there is no such pair.

    Args:
        table: Rows in `schema.EVALUATION`.
        beta: DPO's beta.
        seed: Of the bootstrap.

    Returns:
        `{"beta", "overall": M, "sources": {name: M}}` where M is `{"n", "reward_accuracy":
        {"before", "after"}, "reward_margin": {"before", "after"}, "ranking_accuracy": {"before",
        "after", "difference"}, "longer_side": {"n", "chosen", "preferred"} or None}` with an
        estimate at each leaf but those of longer_side and n. An accuracy of 0 or 1 has
        Wilson's interval, for as many trials as there are prompts.

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

    prompts = number_prompts(table["prompt_id"])
    longer = np.sign(columns["num_chosen_tokens"] - columns["num_rejected_tokens"])
    preferred = _wins(longer * (policy - reference))

    def longer_side(rows: np.ndarray) -> dict[str, Any] | None:
        rows = rows[longer[rows] != 0]
        if not rows.size:
            return None
        chosen = float((longer[rows] > 0).mean())
        return {"n": int(rows.size), "chosen": chosen, "preferred": float(preferred[rows].mean())}

    def metrics(rows: np.ndarray) -> dict[str, Any]:
        mine = number_prompts(pa.array(prompts[rows]))
        estimates = _means({name: v[rows] for name, v in outcomes.items()}, mine, seed)
        for name in ("reward_accuracy", "before", "after"):
            # Where all win or lose no resample differs, and an interval would claim certainty.
            if estimates[name]["value"] in (0, 1):
                num_prompts = int(mine.max()) + 1
                estimates[name] = wilson(int(estimates[name]["value"]) * num_prompts, num_prompts)
        return {
            "n": int(rows.size),
            "reward_accuracy": {"before": _exactly(0.5), "after": estimates["reward_accuracy"]},
            "reward_margin": {"before": _exactly(0.0), "after": estimates["reward_margin"]},
            "ranking_accuracy": {k: estimates[k] for k in ("before", "after", "difference")},
            "longer_side": longer_side(rows),
        }

    sources = np.asarray(table.column("source").to_pylist(), dtype=object)
    names = sorted(pc.unique(table.column("source")).to_pylist())
    return {
        "beta": beta,
        "overall": metrics(np.arange(table.num_rows)),
        "sources": {name: metrics(np.flatnonzero(sources == name)) for name in names},
    }


def known_labels(
    rows: Sequence[Mapping[str, Any]], flipped_column: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs' labels are known to be right or wrong, and which of them are wrong.

    Args:
        rows: Passthrough columns of each pair.
        flipped_column: True or 1 where the label is wrong, false or 0 where it is right; null, or
            absent, where nobody knows.

    Returns:
        (rows,) bool, known; and (known rows,) bool, wrong.

    Raises:
        ConfigError: A value is none of these. The text "false" would pass for true, a rating above
            0 for a wrong label.
    """
    values = [row.get(flipped_column) for row in rows]
    for value in values:
        if value is not None and value not in (0, 1):  # which True, False, 0.0 and 1.0 equal
            raise ConfigError(
                f"the column {flipped_column!r}, which should say which labels are wrong, must be"
                f" true or false, 1 or 0, or null where nobody knows, got {value!r:.100}; convert"
                " it in the source, or name another column"
            )
    known = np.array([value is not None for value in values], dtype=bool)
    return known, np.array([value == 1 for value in values if value is not None], dtype=bool)


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
        are right or all wrong. Where none of the pairs is kept, kept, random and random_sd are
        None.

    Raises:
        EvaluationError: There is no pair, the arrays differ in length, or a key is NaN.
    """
    right, kept = ~np.asarray(flipped, dtype=bool), np.asarray(kept, dtype=bool)
    keys = np.asarray(keys, dtype=np.float64)
    n, n_kept = right.size, int(kept.sum())
    if not n == kept.size == keys.size:
        raise EvaluationError(
            f"label purity needs one flip, mask and key a pair, got {n}, {kept.size}, {keys.size}"
        )
    if n == 0:
        raise EvaluationError(
            "there is no pair with a known label; label purity needs at least one"
        )
    if np.isnan(keys).any():
        raise EvaluationError(f"{int(np.isnan(keys).sum())} selection keys are NaN")
    purity = float(right.mean())
    result: dict[str, Any] = {
        "n": n,
        "n_kept": n_kept,
        "corpus": wilson(int(right.sum()), n),
        "kept": None,
        "random": None,
        "random_expected": purity,
        "random_sd": None,
        "auc": auc(keys, right),
    }
    if n_kept:
        subset = np.random.default_rng(seed).choice(n, size=n_kept, replace=False)
        # Variance of a mean of n_kept draws without replacement.
        variance = purity * (1 - purity) / n_kept * ((n - n_kept) / (n - 1) if n > 1 else 0.0)
        result["kept"] = wilson(int(right[kept].sum()), n_kept)
        result["random"] = wilson(int(right[subset].sum()), n_kept)
        result["random_sd"] = float(np.sqrt(variance))
    return result


def _wins(margins: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, one half where zero."""
    return (np.sign(margins) + 1) / 2


def _exactly(value: float) -> Estimate:
    return {"value": value, "low": value, "high": value}


def number_prompts(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Number of each pair's prompt, in the order in which prompts appear.

    Where all pairs have one prompt, each gets a number of its own: how another prompt would fare
    cannot be known, and intervals are for this one.

    Args:
        ids: (pairs,) of any type, equal where the prompt is.

    Returns:
        int64 (pairs,), from 0 on without a gap.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    encoded = ids.dictionary_encode()
    if len(encoded.dictionary) == 1:
        return np.arange(len(ids))
    return encoded.indices.to_numpy().astype(np.int64)


def sum_by_prompt(columns: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each prompt's pairs, and how many they are.

    Args:
        columns: (pairs, k).
        prompts: As `number_prompts` numbers them.

    Returns:
        (prompts, k), which is `columns` itself where each pair has its own prompt, and (prompts,).
    """
    sizes = np.bincount(prompts)
    if len(sizes) == len(prompts):
        return columns, sizes
    sums = [np.bincount(prompts, weights=column) for column in columns.T]
    return np.stack(sums, axis=1), sizes


def _means(values: dict[str, np.ndarray], prompts: np.ndarray, seed: int) -> dict[str, Estimate]:
    """Means over pairs with 95 % intervals for other prompts.

    Percentile bootstrap of prompts (Efron and Tibshirani, 1993, chapter 13) up to
    `_BOOTSTRAP_PROMPTS` of them, all from the same resamples, so that differences are paired. Above
    it the normal interval of a ratio of sums over clusters (Cochran, 1977, chapter 9A): the
    mean is the outcomes' sum over the number of pairs, which both vary with the prompts.
    """
    columns = np.stack(list(values.values()), axis=1)
    means = columns.mean(axis=0)
    sums, sizes = sum_by_prompt(columns, prompts)
    n = len(sizes)
    if n > _BOOTSTRAP_PROMPTS:
        residuals = sums - sizes[:, None] * means
        deviation = np.sqrt((residuals**2).sum(axis=0) / (n - 1)) / sizes.mean()
        half = _Z95 * deviation / np.sqrt(n)
        low, high = means - half, means + half
    else:
        rng = np.random.default_rng(seed)
        resampled = np.empty((RESAMPLES, columns.shape[1]))
        for begin in range(0, RESAMPLES, 100):  # 100 x 20,000 counts are 16 MB
            counts = rng.multinomial(n, np.full(n, 1 / n), size=min(100, RESAMPLES - begin))
            resampled[begin : begin + 100] = counts @ sums / (counts @ sizes)[:, None]
        low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {
        name: {"value": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(values)
    }


def wilson(successes: float, n: int) -> Estimate:
    """A proportion with Wilson's 95 % score interval, which stays within [0, 1].

    A tie is half a success; the interval is then rather too wide.
    """
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The interval contains p; at p = 0 and 1 rounding may miss it by an ulp.
    return {
        "value": p,
        "low": float(min(centre - half, p)),
        "high": float(min(max(centre + half, p), 1.0)),
    }


def auc(keys: np.ndarray, positive: np.ndarray) -> float | None:
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
