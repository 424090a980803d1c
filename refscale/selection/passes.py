"""The selection over a run's score shards: passes, facts, and the shards that are trained on.

In: scores/ and corpus/, a shard at a time. Out: selection/ shards of the kept pairs, and the facts
about them that selection.json and the report show. The mathematics is order.py's; here it meets
the run folder. Each pass is a function of some shards whose results add up, so pipeline.py can run
it in this process or as tasks on a cluster. Memory: one shard, and what a pass returns.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.config import SelectConfig
from refscale.errors import ConfigError, SelectionError
from refscale.evaluation.holdout import known_labels, label_purity
from refscale.selection.order import (
    Decision,
    Keys,
    SelectionSpec,
    groups_of,
    keys_of,
    train_rows,
)
from refscale.selection.radix import RadixSelect, Tally
from refscale.selection.statistics import Statistics
from refscale.selection.strategies import (
    SCORE_COLUMNS,
    Moments,
    length_difference,
    moments_of,
    pair_id_hex,
    score_columns,
)
from refscale.storage.stages import FileRecord, StageFolder

# Shards of one task of a pass: about 200,000 pairs at the default shard size.
_SHARDS_A_TASK = 100
_SCATTERED_PAIRS = 1500
_EXAMPLES = 4
_EXAMPLE_CHARACTERS = 2000
_SCORE_TABLE = ["pair_id", "source", "split", *SCORE_COLUMNS]
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

Item = dict[str, Any]


def spec_of(config: SelectConfig) -> SelectionSpec:
    """The specification that a config's `select` section asks for."""
    return SelectionSpec(**config.model_dump())


def chunks(shards: Sequence[str]) -> list[list[str]]:
    """The shards in groups that are worth a task each."""
    return [
        list(shards[start : start + _SHARDS_A_TASK])
        for start in range(0, len(shards), _SHARDS_A_TASK)
    ]


def _train_scores(scores: StageFolder, shard: str) -> pa.Table:
    return train_rows(scores.read_table(f"{shard}.parquet", columns=_SCORE_TABLE))


# -- passes ----------------------------------------------------------------------------------------


def moments(scores: StageFolder) -> Callable[[Sequence[str]], Moments]:
    """The pass that length_adjusted_margin is fitted from."""

    def run(shards: Sequence[str]) -> Moments:
        total = Moments()
        for shard in shards:
            total += moments_of(score_columns(_train_scores(scores, shard)))
        return total

    return run


def tally(
    scores: StageFolder, search: RadixSelect, spec: SelectionSpec, fit: tuple[float, float]
) -> Callable[[Sequence[str]], Tally]:
    """One pass of the radix selection."""

    def run(shards: Sequence[str]) -> Tally:
        total = Tally()
        for shard in shards:
            total += search.tally(keys_of(_train_scores(scores, shard), spec, fit))
        return total

    return run


@dataclass(frozen=True)
class Example:
    """A pair worth showing; `order` sorts the examples of its place."""

    order: tuple[float, str]
    shard: str
    kept: bool


@dataclass(frozen=True)
class Facts:
    """What a decision kept; add the shards' up in any order.

    Attributes:
        statistics: Sums, histogram, sources.
        sample: (sampling hash, key, length difference, kept) of the pairs with the smallest hashes:
            the same sample whatever the shards.
        examples: The few pairs nearest to each place: top, kept_at_cut, dropped_at_cut, bottom.
    """

    statistics: Statistics | None = None
    sample: tuple[tuple[int, float, int, bool], ...] = ()
    examples: Mapping[str, tuple[Example, ...]] | None = None

    def __add__(self, other: "Facts") -> "Facts":
        if self.statistics is None or other.statistics is None:
            return other if self.statistics is None else self
        mine, theirs = self.examples or {}, other.examples or {}
        return Facts(
            self.statistics + other.statistics,
            tuple(heapq.nsmallest(_SCATTERED_PAIRS, self.sample + other.sample)),
            {
                place: tuple(
                    heapq.nsmallest(
                        _EXAMPLES,
                        [*mine.get(place, ()), *theirs.get(place, ())],
                        key=lambda example: example.order,
                    )
                )
                for place in mine.keys() | theirs.keys()
            },
        )


def facts(scores: StageFolder, decision: Decision) -> Callable[[Sequence[str]], Facts]:
    """The pass that describes what a decision keeps."""

    def run(shards: Sequence[str]) -> Facts:
        total = Facts()
        for shard in shards:
            total += _shard_facts(_train_scores(scores, shard), shard, decision)
        return total

    return run


def _shard_facts(table: pa.Table, shard: str, decision: Decision) -> Facts:
    if not table.num_rows:
        return Facts()
    columns = score_columns(table)
    keys = keys_of(table, decision.spec, decision.fit)
    kept = decision.mask(keys)
    difference = length_difference(columns)
    hashes = keys.pair_ids[:, 1].astype(np.uint64)
    few = np.argsort(hashes, kind="stable")[:_SCATTERED_PAIRS]
    sample = tuple(
        (int(hashes[i]), float(keys.values[i]), int(difference[i]), bool(kept[i])) for i in few
    )

    def nearest(distance: np.ndarray, rows: np.ndarray) -> tuple[Example, ...]:
        ids = keys.pair_ids[rows]
        # Ties by pair_id: each group has a pair right at its cut.
        first = rows[np.lexsort((ids[:, 1], ids[:, 0], distance[rows]))[:_EXAMPLES]]
        return tuple(
            Example((float(distance[i]), pair_id_hex(keys.pair_ids[i])), shard, bool(kept[i]))
            for i in first
        )

    every = np.arange(len(keys))
    values = keys.values.astype(np.float64)
    examples = {"top": nearest(-values, every), "bottom": nearest(values, every)}
    cut = _distance_to_cut(keys, decision)
    at_cut = np.isfinite(cut)
    examples["kept_at_cut"] = nearest(cut, np.flatnonzero(at_cut & kept))
    examples["dropped_at_cut"] = nearest(cut, np.flatnonzero(at_cut & ~kept))
    return Facts(Statistics.of(keys, columns, kept, decision), sample, examples)


def _distance_to_cut(keys: Keys, decision: Decision) -> np.ndarray:
    """|key - threshold of its group|; infinite where the group has none; float64 (N,)."""
    distance = np.full(len(keys), np.inf)
    for group, rows in groups_of(keys, decision.spec):
        interval = decision.groups.get(group)
        if interval is not None and interval.threshold is not None:
            distance[rows] = np.abs(keys.values[rows].astype(np.float64) - interval.threshold)
    return distance


def describe(corpus: StageFolder, scores: StageFolder, decision: Decision, found: Facts) -> Item:
    """The facts as JSON values, with the texts of the examples.

    Raises:
        SelectionError: There is nothing to describe.
    """
    if found.statistics is None:
        raise SelectionError("there is no scored training pair to select from")
    spec = decision.spec
    size = next(
        {name: getattr(spec, name)}
        for name in ("fraction", "count", "threshold", "band")
        if getattr(spec, name) is not None
    )
    places = found.examples or {}
    at_cut = [*places.get("kept_at_cut", ()), *places.get("dropped_at_cut", ())]
    wanted = {"top": places.get("top", ()), "cut": at_cut, "bottom": places.get("bottom", ())}
    return {
        "strategy": spec.strategy,
        "keep": spec.keep,
        "size": size,
        "per_source": spec.per_source,
        "match_lengths": spec.match_lengths,
        **found.statistics.to_json(),
        "groups": {
            group.name: {"pairs": found.pairs, "kept": found.kept, "threshold": found.threshold}
            for group, found in decision.groups.items()
        },
        "scatter": {
            "keys": [key for _, key, _, _ in found.sample],
            "length_differences": [difference for _, _, difference, _ in found.sample],
            "kept": [kept for _, _, _, kept in found.sample],
        },
        "examples": {
            place: [_shown(corpus, scores, decision, example) for example in examples]
            for place, examples in wanted.items()
        },
    }


def _shown(corpus: StageFolder, scores: StageFolder, decision: Decision, example: Example) -> Item:
    pair_id = example.order[1]
    row = _row_of(scores.read_table(f"{example.shard}.parquet"), pair_id)
    text = _row_of(
        corpus.read_table(
            f"{example.shard}.parquet", columns=["pair_id", "prompt", "chosen", "rejected"]
        ),
        pair_id,
    )
    key = keys_of(row, decision.spec, decision.fit).values[0]
    numbers = row.select(["source", *SCORE_COLUMNS]).to_pylist()[0]
    return {
        "pair_id": pair_id,
        "kept": example.kept,
        "selection_key": float(key),
        **numbers,
        **{
            name: value[:_EXAMPLE_CHARACTERS] + ("…" if len(value) > _EXAMPLE_CHARACTERS else "")
            for name, value in text.to_pylist()[0].items()
            if name != "pair_id"
        },
    }


def _row_of(table: pa.Table, pair_id: str) -> pa.Table:
    return table.filter(
        pc.equal(table["pair_id"], pa.scalar(bytes.fromhex(pair_id), pa.binary(16)))
    )


# -- the kept pairs --------------------------------------------------------------------------------


def keep_pairs(
    corpus: StageFolder, scores: StageFolder, selection: StageFolder, decision: Decision
) -> Callable[[Item], Item]:
    """The step that commits one shard's kept pairs, in the order of the shard."""

    def keep(item: Item) -> Item:
        shard = item["shard"]
        scored = _train_scores(scores, shard)
        keys = keys_of(scored, decision.spec, decision.fit)
        kept = decision.mask(keys)
        scored = scored.append_column("selection_key", pa.array(keys.values)).filter(pa.array(kept))
        table = schema.conform(_with_ids(scored, corpus, shard), schema.SELECTION, "selection")
        record = selection.commit_shard(shard, table)
        return {"record": json.dumps(asdict(record))}

    return keep


def hold_out(
    corpus: StageFolder, scores: StageFolder, target: StageFolder, up_to: bytes
) -> Callable[[Item], Item]:
    """The step that commits one shard's held-out pairs with a pair_id up to `up_to`."""

    def hold(item: Item) -> Item:
        shard = item["shard"]
        scored = scores.read_table(f"{shard}.parquet", columns=_SCORE_TABLE)
        table = _with_ids(schema.held_out(scored, up_to), corpus, shard)
        record = target.commit_shard(shard, schema.conform(table, schema.HELD_OUT, "holdout"))
        return {"record": json.dumps(asdict(record))}

    return hold


def _with_ids(scored: pa.Table, corpus: StageFolder, shard: str) -> pa.Table:
    """The scored pairs with their token ids, in the same order."""
    encoded = corpus.read_table(f"{shard}.parquet", columns=["pair_id", *_IDS])
    encoded = schema.matching_rows(
        encoded, scored["pair_id"], f"scored pairs of {shard} are not in the corpus"
    )
    for name in _IDS:
        scored = scored.append_column(name, encoded[name])
    return scored


def check(records: Iterable[FileRecord], decision: Decision) -> None:
    """Refuse a selection whose shards do not hold what was decided.

    Raises:
        SelectionError: The counts differ.
    """
    kept = sum(record.rows for record in records)
    if kept != decision.kept:
        raise SelectionError(
            f"the selection's shards hold {kept} pairs, {decision.kept} were decided on; the scores"
            " changed while they were read: run `refscale select --restart`"
        )


# -- known labels ----------------------------------------------------------------------------------


def purity(
    corpus: StageFolder,
    scores: StageFolder,
    shards: Sequence[str],
    decision: Decision,
    flipped_column: str,
) -> dict[str, Any]:
    """How many labels are right in corpus and selection, where a column says which are wrong.

    Args:
        corpus: The corpus stage.
        scores: The scores stage.
        shards: Names of the score shards.
        decision: What was kept.
        flipped_column: Passthrough column that says where the label is wrong, as
            `holdout.known_labels` reads it.

    Returns:
        `holdout.label_purity` of the training pairs that have a value in the column.

    Raises:
        ConfigError: No pair has one, or one does not say whether a label is wrong.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen: set[str] = set()
    for shard in shards:
        scored = _train_scores(scores, shard)
        rows = _passthrough(corpus, shard, scored["pair_id"])
        seen.update(*rows)
        known, flipped = known_labels(rows, flipped_column)
        keys = keys_of(scored, decision.spec, decision.fit)
        parts.append((flipped, decision.mask(keys)[known], keys.values[known]))
    if not any(len(flipped) for flipped, _, _ in parts):
        raise _no_labels(flipped_column, seen)
    flipped, kept, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    sign = -1.0 if decision.spec.keep == "smallest" else 1.0
    return label_purity(flipped, kept, sign * values)


def check_labels(corpus: StageFolder, scores: StageFolder, flipped_column: str) -> None:
    """Refuse a column that `purity` would refuse, before anything is selected or trained.

    Raises:
        ConfigError: As `purity`.
    """
    seen: set[str] = set()
    found = False
    for file in scores.require()["files"]:
        shard = file["name"].removesuffix(".parquet")
        pair_ids = train_rows(scores.read_table(file["name"], columns=["pair_id", "split"]))
        rows = _passthrough(corpus, shard, pair_ids["pair_id"])
        seen.update(*rows)
        known, _ = known_labels(rows, flipped_column)
        found = found or bool(known.any())
    if not found:
        raise _no_labels(flipped_column, seen)


def _passthrough(corpus: StageFolder, shard: str, pair_ids: pa.ChunkedArray) -> list[Item]:
    """The passthrough columns of a shard's pairs, in the order of their ids."""
    table = corpus.read_table(f"{shard}.parquet", columns=["pair_id", "passthrough"])
    texts = dict(zip(table["pair_id"].to_pylist(), table["passthrough"].to_pylist(), strict=True))
    return [json.loads(texts[pair_id]) for pair_id in pair_ids.to_pylist()]


def _no_labels(flipped_column: str, seen: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"evaluate.flipped_column is {flipped_column!r}, in which no training pair has a value; the"
        f" corpus carries {', '.join(sorted(seen)) or 'no other columns'}"
    )
