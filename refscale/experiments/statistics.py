"""Means over seeds and held-out pairs, and paired differences between arms, with intervals.

In: for each measure and arm an array (seeds, pairs), all over the same pairs. Out: plain dicts of
estimates. An interval holds both that another holdout and that another training would have given
another number. The prompts are resampled, each with all its pairs, which are no independent
evidence, and once for all arms (they are shared, so differences are paired). The seeds are too few
to resample: three of them drawn with replacement show two thirds of their variance. So their part
is drawn from Student's t about the mean, which is wide for few seeds, as it should be; with one
seed it is unknown and left out. numpy only; seconds for a million pairs and ten arms.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from refscale.evaluation.holdout import sum_by_prompt, wilson

Estimate = Mapping[str, float | None]

RESAMPLES = 2000
# Resamples of O(1) values that lie closer together differ by rounding alone.
_ROUNDING = 1e-12
# Of the seeds' part for each resample: the tails of Student's t are far out and rarely met.
_DRAWS = 50
# Counts of resampled prompts held at once: 32 MB.
_BLOCK = 4_000_000


def summarise(
    values: Mapping[str, Mapping[str, np.ndarray]],
    controls: Mapping[str, str | None],
    prompts: np.ndarray,
    *,
    full: str,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Each arm's measures, and its differences against its control and the full corpus.

    Args:
        values: By measure and arm, float64 (seeds, pairs).
        controls: By arm, the random arm of equal size, where there is one.
        prompts: (pairs,) as `holdout.number_prompts` numbers their prompts.
        full: Name of the arm that trains on every pair.
        seed: Of the bootstrap.

    Returns:
        By arm and measure `{"value", "low", "high", "seeds": [mean of each], "seed_sd",
        "against_random", "against_full"}`; the last two are estimates of this arm minus the other,
        or None where the other was not run. Intervals are percentile intervals of 95 %; those of
        one seed say nothing of another training. An interval of values that all lie in [0, 1] is
        cut there. Where no resample differs, as of one pair or of pairs that are all won, an
        interval would claim certainty: of such values it is Wilson's, for as many as there are
        prompts; of others, and of differences, low and high are None.
    """
    result: dict[str, dict[str, Any]] = {}
    for measure, arms in values.items():
        resampled = _resample(arms, prompts, seed)
        for arm, matrix in arms.items():
            by_seed = matrix.mean(axis=1)
            result.setdefault(arm, {})[measure] = {
                **_mean(matrix, resampled[arm], int(prompts.max()) + 1),
                "seeds": by_seed.tolist(),
                "seed_sd": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
                "against_random": _difference(arms, resampled, arm, controls.get(arm)),
                "against_full": _difference(arms, resampled, arm, full),
            }
    return result


def _mean(matrix: np.ndarray, resampled: np.ndarray, num_prompts: int) -> Estimate:
    value = float(matrix.mean())
    if matrix.min() < 0 or matrix.max() > 1:
        return _estimate(value, resampled)
    if np.ptp(resampled) < _ROUNDING:
        return wilson(value * num_prompts, num_prompts)
    return _estimate(value, np.clip(resampled, 0, 1))


def _difference(
    arms: Mapping[str, np.ndarray],
    resampled: Mapping[str, np.ndarray],
    arm: str,
    other: str | None,
) -> Estimate | None:
    if other is None or other == arm or other not in arms:
        return None
    difference = float(arms[arm].mean() - arms[other].mean())
    return _estimate(difference, resampled[arm] - resampled[other])


def _resample(
    arms: Mapping[str, np.ndarray], prompts: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """By arm, its mean, had the prompts and the trainings been others.

    float64 (RESAMPLES,) of one seed, (RESAMPLES * _DRAWS,) of more.
    """
    rng = np.random.default_rng(seed)
    columns = np.concatenate(list(arms.values())).T  # (pairs, arms x seeds)
    sums, sizes = sum_by_prompt(columns, prompts)
    n = len(sizes)
    means = np.empty((RESAMPLES, columns.shape[1]))
    step = max(1, _BLOCK // n)
    for begin in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - begin)
        picked = rng.integers(n, size=(size, n))
        picked += n * np.arange(size)[:, None]
        counts = np.bincount(picked.ravel(), minlength=size * n).reshape(size, n)
        means[begin : begin + size] = counts @ sums / (counts @ sizes)[:, None]
    result, begin = {}, 0
    for arm, matrix in arms.items():
        num_seeds = matrix.shape[0]
        mine = means[:, begin : begin + num_seeds]
        result[arm] = mine.mean(axis=1)
        if num_seeds > 1:
            result[arm] = np.repeat(result[arm], _DRAWS)
            error = matrix.mean(axis=1).std(ddof=1) / np.sqrt(num_seeds)
            # By the arm's name: its interval does not depend on which others are there.
            own = np.random.default_rng([seed, zlib.crc32(arm.encode())])
            result[arm] += error * own.standard_t(num_seeds - 1, size=result[arm].size)
        begin += num_seeds
    return result


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    if np.ptp(resampled) < _ROUNDING:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}
