"""Does the selection help? The same model trained on all, the clearest, random and the least clear.

    refscale bench compare                                     # the docstring corpus, 3 seeds
    refscale bench compare --corpora docstrings graded --arms full random:0.5 margin:largest:0.5
    refscale bench compare --corpora pairs.jsonl --flip 0.2    # a real corpus, labels flipped

Every arm of a corpus shares one scoring pass and one holdout with right labels. A row an arm: the
holdout's preference accuracy over seeds with its interval, its difference against as many random
pairs and against all pairs, what it kept and what it cost. The work folder keeps every run: the
same command resumes. `refscale bench audit` looks at the labels and trains nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import corpora
from common import Row

UNITS = {
    "accuracy": "of held-out pairs",
    "length_difference": "tokens, chosen minus rejected",
    "length_lean": "of the mean absolute difference, against all pairs",
    "prefers_longer": "of held-out pairs whose sides differ in tokens",
    "right_labels": "of kept pairs",
    "train": "s",
    "train_gpu": "GPU s",
    "reward_margin": "nats",
    "chosen_logps": "nats/token",
}
COLUMNS = [
    "corpus",
    "arm",
    "pairs",
    "right_labels",
    "length_difference",
    "length_lean",
    "prefers_longer",
    "accuracy",
    "low",
    "high",
    "seed_sd",
    "against_random",
    "against_random_low",
    "against_random_high",
    "against_full",
    "reward_margin",
    "chosen_logps",
    "train",
]


def compare_corpus(name: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one corpus, and facts about it."""
    from refscale.config_file import load_config
    from refscale.experiments.comparison import compare

    folder, facts = corpora.write(name, arguments)
    config = load_config(str(folder / "config.yaml"), arguments.set)
    result = compare(
        config,
        str(folder / "run"),
        arguments.arms,
        seeds=arguments.seeds,
        parallel=arguments.parallel,
    )
    rows = [_arm_row(folder.name, arm, result) for arm in result["arms"]]
    facts["scoring_s"] = result["scoring_s"]
    facts["holdout_scored"] = result["num_holdout"]
    return rows, facts


def _arm_row(corpus: str, arm: str, result: dict[str, Any]) -> Row:
    measures, runs = result["arms"][arm], list(result["runs"][arm].values())
    accuracy = measures["reward_accuracy"]
    row: Row = {"corpus": corpus, "arm": arm, "pairs": runs[0]["pairs"]}
    labels = [run["right_labels"] for run in runs]
    row["right_labels"] = None if None in labels else sum(labels) / len(labels)
    row["length_difference"] = sum(run["mean_length_difference"] for run in runs) / len(runs)
    row["length_lean"] = sum(run["length_lean"] for run in runs) / len(runs)
    longer = [run["longer_side"] for run in runs]
    row["prefers_longer"] = (
        None if None in longer else sum(each["preferred"] for each in longer) / len(longer)
    )
    row.update(accuracy=accuracy["value"], low=accuracy["low"], high=accuracy["high"])
    row.update(seed_sd=accuracy["seed_sd"], seed_values=accuracy["seeds"])
    for other in ("against_random", "against_full"):
        difference = accuracy[other] or {"value": None, "low": None, "high": None}
        row.update({other: difference["value"]})
        row.update({f"{other}_{end}": difference[end] for end in ("low", "high")})
    row["reward_margin"] = measures["reward_margin"]["value"]
    row["chosen_logps"] = measures["chosen_mean_logps"]["value"]
    for name in ("train", "train_gpu"):
        costs = [run[f"{name}_s"] for run in runs]
        row[name] = None if None in costs else sum(costs) / len(costs)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, write the result, print the table."""
    parser = argparse.ArgumentParser(prog="refscale bench compare", description=__doc__)
    corpora.add_arguments(parser, work="compare-work", train=240, holdout=60)
    parser.add_argument("--arms", nargs="+", default=None, help="default: the whole grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=None, help="trainings side by side")
    arguments = parser.parse_args(argv)
    return corpora.measure(
        "compare",
        arguments,
        compare_corpus,
        units=UNITS,
        columns=COLUMNS,
        not_measured=[
            "win rate and MT-Bench: they need a judge (refscale compare, refscale mtbench)"
        ],
        notes=[
            "intervals of 95 %: prompts of held-out pairs resampled, the seeds' part from Student's"
            " t; differences are paired",
            "train is the mean wall time of a training, its start included; empty where one of"
            " the arm's trainings was killed and resumed",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
