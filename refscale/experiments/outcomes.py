"""What the arms' policies do on the held-out pairs, and the same pairs of all of them.

In: an evaluation's table, an arm and seed each. Out: a row a pair, `OUTCOMES`; then arrays over the
pairs that every policy could score, and how many those left out are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.errors import EvaluationError
from refscale.evaluation.holdout import number_prompts, prompt_ids
from refscale.experiments.arms import arm_store, parse_arm
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

# See `outcomes`.
OUTCOMES = pa.schema(
    [
        pa.field("pair_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reward_accuracy", pa.float64(), nullable=False),
        pa.field("reward_margin", pa.float64(), nullable=False),
        pa.field("ranking_accuracy", pa.float64(), nullable=False),
        pa.field("chosen_mean_logps", pa.float64(), nullable=False),
    ]
)
MEASURES = tuple(OUTCOMES.names[2:])
# Share of the held-out pairs that an arm may lack, or else they are another holdout; one always.
_MAX_LACKING = 0.05

Tables = dict[str, dict[int, pa.Table]]  # by arm and seed


def outcomes(table: pa.Table, beta: float) -> pa.Table:
    """What a policy does on each held-out pair, sorted by pair_id.

    Args:
        table: Rows in `schema.EVALUATION`.
        beta: DPO's beta.

    Returns:
        Rows in OUTCOMES: reward_accuracy (1 where the implicit reward prefers chosen, a tie one
        half), reward_margin (beta times the difference of the log-ratios, nats), ranking_accuracy
        (the policy's mean log-prob a token prefers chosen), chosen_mean_logps (nats a token).
    """
    table = table.sort_by("pair_id")
    columns = {
        name: table[name].to_numpy().astype(np.float64)
        for name in schema.EVALUATION.names
        if name.endswith("_logps") or name.startswith("num_")
    }
    policy = columns["policy_chosen_logps"] - columns["policy_rejected_logps"]
    reference = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    chosen, rejected = (
        columns[f"policy_{side}_logps"] / np.maximum(columns[f"num_{side}_tokens"], 1)
        for side in ("chosen", "rejected")
    )
    values = {
        "reward_accuracy": (np.sign(policy - reference) + 1) / 2,
        "reward_margin": beta * (policy - reference),
        "ranking_accuracy": (np.sign(chosen - rejected) + 1) / 2,
        "chosen_mean_logps": chosen,
    }
    return pa.table(
        {"pair_id": table["pair_id"], "source": table["source"], **values}, schema=OUTCOMES
    )


def on_shared_pairs(tables: Tables, store: Store) -> tuple[Tables, dict[str, Any]]:
    """The outcomes on the pairs that every policy could score, and how many the others are.

    A pair may not fit a worker's memory in one evaluation or have a log-prob that is not finite
    under one policy: no reason to throw trainings away.

    Args:
        tables: Rows in OUTCOMES, sorted by pair_id.
        store: Of the comparison, for the message.

    Returns:
        The same rows of every table, and `{"pairs", "of", "lacking": {arm: {seed: pairs}}}`, where
        `of` counts the pairs that any policy could score.

    Raises:
        EvaluationError: An arm lacks so many that it was evaluated on another holdout.
    """
    every = [table for by_seed in tables.values() for table in by_seed.values()]
    scored = pa.concat_tables([table.select(["pair_id"]) for table in every])
    found = scored["pair_id"].combine_chunks().value_counts()
    ids, num_pairs = found.field("values"), len(found)
    shared = ids.filter(pc.equal(found.field("counts"), len(every)))
    lacking = {
        arm: {seed: num_pairs - table.num_rows for seed, table in by_seed.items()}
        for arm, by_seed in tables.items()
    }
    most, arm, seed = max((n, arm, seed) for arm in lacking for seed, n in lacking[arm].items())
    if most > max(1, _MAX_LACKING * num_pairs) or not len(shared):
        raise EvaluationError(
            f"the arms were evaluated on different pairs: {arm}, seed {seed}, lacks {most:,} of"
            f" {num_pairs:,}, more than a comparison may leave out; leave that arm out of --arm, or"
            f" delete {arm_store(store, parse_arm(arm), seed).uri} and repeat the command, which"
            " redoes that arm and seed alone"
        )
    kept = {
        arm: {
            seed: table.filter(pc.is_in(table["pair_id"], value_set=shared))
            for seed, table in by_seed.items()
        }
        for arm, by_seed in tables.items()
    }
    lacking = {arm: {s: n for s, n in by_seed.items() if n} for arm, by_seed in lacking.items()}
    return kept, {
        "pairs": num_pairs - len(shared),
        "of": num_pairs,
        "lacking": {arm: by_seed for arm, by_seed in lacking.items() if by_seed},
    }


def notes_on(left_out: Mapping[str, Any]) -> list[str]:
    """What must be said beside the numbers, a sentence each."""
    if not left_out["pairs"]:
        return []
    lacking = [
        f"{arm}, seed {seed}, lacks {num_pairs:,}"
        for arm, by_seed in left_out["lacking"].items()
        for seed, num_pairs in by_seed.items()
    ]
    if len(lacking) > 3:
        lacking[3:] = [f"{len(lacking) - 3:,} more in comparison.json"]
    return [
        f"{left_out['pairs']:,} of {left_out['of']:,} held-out pairs left out, because not every"
        f" policy could score them: {'; '.join(lacking)}"
    ]


def shared_prompts(
    tables: Tables, corpus: StageFolder, files: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Number of each shared pair's prompt, int64 (pairs,)."""
    shared = next(iter(next(iter(tables.values())).values()))["pair_id"]
    shards = [file["name"].removesuffix(".parquet") for file in files if file["counts"]["holdout"]]
    known = pa.concat_tables([prompt_ids(corpus, shard) for shard in shards])
    pairs = schema.matching_rows(known, shared, "compared pairs are not held out in the corpus")
    return number_prompts(pairs["prompt_id"])


def by_measure(tables: Tables) -> dict[str, dict[str, np.ndarray]]:
    """By measure and arm, float64 (seeds, pairs); the tables hold the same pairs."""
    return {
        measure: {
            arm: np.stack([table[measure].to_numpy() for table in by_seed.values()])
            for arm, by_seed in tables.items()
        }
        for measure in MEASURES
    }
