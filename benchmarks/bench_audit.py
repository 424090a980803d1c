"""How well does the reference model's doubt find wrong labels, and what does each selection hold?

    refscale bench audit --corpora docstrings graded facts
    refscale bench audit --corpora pairs.jsonl --flip 0.2      # a real corpus, labels flipped

Scores each corpus once and trains nothing. A row for each strategy and kept part: how many labels
are right in it, how much longer its chosen side is, and the AUC of the key for a right label; and a
row for the list of the most doubted pairs, with its precision. Costs the scoring of the pairs.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import corpora
from common import Row

STRATEGIES = ("mean_margin", "margin", "length_adjusted_margin")
PARTS: tuple[dict[str, Any], ...] = (
    {"keep": "largest", "fraction": 0.5},
    {"keep": "largest", "fraction": 0.5, "match_lengths": True},
    {"keep": "largest", "fraction": 0.3},
    {"keep": "largest", "fraction": 0.3, "match_lengths": True},
    {"keep": "smallest", "fraction": 0.5},
)
UNITS = {
    "right_labels": "of the part",
    "length_difference": "tokens, chosen minus rejected",
    "auc": "of the key for a right label",
}
COLUMNS = [
    "corpus",
    "strategy",
    "part",
    "pairs",
    "right_labels",
    "low",
    "high",
    "length_difference",
    "auc",
    "precision_at_25",
    "precision_at_flipped",
]


def audit_corpus(name: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one corpus, and facts about it."""
    from refscale import pipeline
    from refscale.cluster.runtime import disconnect
    from refscale.config_file import load_config
    from refscale.experiments.audit import audit
    from refscale.run import Run, claim
    from refscale.storage.locks import RunLock
    from refscale.storage.store import Store

    folder, facts = corpora.write(name, arguments)
    config = load_config(str(folder / "config.yaml"), arguments.set)
    store = Store(str(folder / "run"))
    rows: list[Row] = []
    whole: Row = {}
    with RunLock(store):
        run = Run(store, config, restart=frozenset({"select"}))
        claim(run)
        try:
            prepared, scored = pipeline.prepare(run), pipeline.score(run)
            for strategy in STRATEGIES:
                for options in PARTS:
                    part, whole = _part(run, {"strategy": strategy, **options})
                    rows.append(part)
        finally:
            disconnect()
    rows.insert(0, whole)
    if facts["flipped"]:
        quality = audit(store, flipped_column="label_flipped", split="train").quality
        assert quality is not None, "a column was named"
        rows.append(_doubt(quality))
    facts["refused"] = prepared["counts"]["quarantined"]
    facts["scoring_s"] = scored["seconds"]
    return [{"corpus": corpora.label(name), **row} for row in rows], facts


def _part(run: Any, options: dict[str, Any]) -> tuple[Row, Row]:
    """One selection's figures, and those of all pairs."""
    from dataclasses import replace

    from refscale import pipeline
    from refscale.selection import passes
    from refscale.selection.order import Decision

    select = run.config.select.model_copy(update=options)
    mine = replace(run, config=run.config.model_copy(update={"select": select}))
    facts = pipeline.select(mine)["details"]
    matched = options.get("match_lengths", False)
    row: Row = {
        "strategy": options["strategy"],
        "part": f"{options['keep']} {options['fraction']}{', lengths matched' if matched else ''}",
        "pairs": facts["num_kept"],
        "length_difference": facts["kept"]["mean_length_difference"],
    }
    whole: Row = {
        "strategy": "–",
        "part": "all",
        "pairs": facts["num_pairs"],
        "length_difference": facts["all"]["mean_length_difference"],
    }
    column = run.config.evaluate.flipped_column
    if column is not None:
        decision = Decision.from_json(run.store.read_json("selection/selection.json")["decision"])
        shards = [
            file["name"].removesuffix(".parquet")
            for file in run.folder("scores").require()["files"]
        ]
        purity = passes.purity(run.folder("corpus"), run.folder("scores"), shards, decision, column)
        for target, name in ((row, "kept"), (whole, "corpus")):
            target["right_labels"] = purity[name]["value"]
            target.update({end: purity[name][end] for end in ("low", "high")})
        if options["keep"] == "largest" and not matched:
            row["auc"] = purity["auc"]
    return row, whole


def _doubt(quality: dict[str, Any]) -> Row:
    precision = {k: at["value"] for k, at in quality["precision"].items()}
    return {
        "strategy": "mean_margin",
        "part": "most doubted",
        "pairs": quality["n"],
        "auc": quality["auc"],
        "precision_at_25": precision.get("25"),
        "precision_at_flipped": precision.get(str(quality["n_flipped"])),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Score, audit, write the result, print the table."""
    parser = argparse.ArgumentParser(prog="refscale bench audit", description=__doc__)
    corpora.add_arguments(parser, work="audit-work", train=240, holdout=20)
    arguments = parser.parse_args(argv)
    return corpora.measure(
        "audit",
        arguments,
        audit_corpus,
        units=UNITS,
        columns=COLUMNS,
        notes=[
            "right labels with Wilson's 95 % interval; what was not flipped on purpose counts as"
            " right, though people err too",
            "precision_at_flipped: wrong labels among as many most doubted pairs as were flipped",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
