"""Sources -> encoded pairs and refusals, unit by unit.

    plan            config -> units, encoder settings, fingerprint, what to say     (driver)
    prepare_unit    a unit -> table of encoded pairs, table of refused rows         (any process)
    settle_bucket   all pairs of some prompts -> without duplicates, ordered        (any process)

Neither ray nor torch is needed here; transformers brings the tokenizer. All of it is a function of
the sources' contents and the config: who prepares which unit in which order changes no byte.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from refscale import schema
from refscale.config import Config
from refscale.corpus.counts import Counts, check_refused, require_kept
from refscale.corpus.encoding import Encoded, Encoder
from refscale.corpus.pairs import Pair, Refusal, fraction_of, shorten
from refscale.corpus.planning import Plan, SourceSettings, plan
from refscale.corpus.reading import read_rows
from refscale.corpus.settling import PREPARED, SETTLED_BY, settle_bucket
from refscale.corpus.shapes import canonical_pair

__all__ = [
    "Counts",
    "Plan",
    "Prepared",
    "Validation",
    "check_refused",
    "plan",
    "prepare_unit",
    "require_kept",
    "settle_bucket",
    "validate_sources",
]

_BATCH_PAIRS = 512
_RAW_CHARS = 2_000
_PLACE_BITS = 32


@dataclass(frozen=True)
class RefusedRow:
    """A refused row, for people; its row is 0-based as in the quarantine, its line 1-based."""

    file: str
    row: int
    reason: str
    detail: str
    line: int | None = None

    def __str__(self) -> str:
        at = "" if self.line is None else f" (line {self.line})"
        return f"{self.file}, row {self.row}{at}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Prepared:
    """A prepared unit: `pairs` in PREPARED, `refused` in schema.QUARANTINE."""

    pairs: pa.Table
    refused: pa.Table
    counts: Counts


@dataclass(frozen=True)
class Validation:
    """What `refscale validate` shows."""

    sources: list[str]
    refusals: list[RefusedRow]
    counts: Counts

    def check_refused(self, max_bad_fraction: float) -> None:
        """As `counts.check_refused` and `counts.require_kept`.

        Raises:
            TooManyRefusedError: More than that share of the rows was refused.
            CorpusError: No pair is kept.
        """
        check_refused(self.counts, max_bad_fraction)
        require_kept(self.counts)


@dataclass
class _Batch:
    """Pairs of one source that wait to be encoded together, with what is known of their rows."""

    pairs: list[Pair] = field(default_factory=list)
    rows: list[tuple[str, int, int, Any, bytes | None]] = field(default_factory=list)


def prepare_unit(plan: Plan, unit_index: int, encoder: Encoder) -> Prepared:
    """Read, validate and encode one unit. Memory holds the unit's pairs and a batch of rows.

    Args:
        plan: From `plan`.
        unit_index: Index into plan.units.
        encoder: From plan.encoder.load().

    Returns:
        Pairs in corpus order, refused rows in row order, and counts without those of settling.

    Raises:
        CorpusError: A file of the unit is damaged.
    """
    unit = plan.units[unit_index]
    source = plan.sources[unit.source]
    work = _UnitWork(plan, source, encoder, unit_index << _PLACE_BITS)
    for part in unit.parts:
        for number, value, raw in read_rows(part, plan.max_row_bytes):
            work.add(part.shown, number, value, raw)
    return work.finish()


class _UnitWork:
    """The state of `prepare_unit`."""

    def __init__(
        self, plan: Plan, source: SourceSettings, encoder: Encoder, first_place: int
    ) -> None:
        self._plan, self._source, self._encoder = plan, source, encoder
        self._place = first_place
        self._read = self._unused = 0
        self._batch = _Batch()
        self._tables: list[pa.RecordBatch] = []
        self._refused: list[tuple[int, tuple[str, str, int, str, str, str]]] = []

    def add(self, file: str, number: int, value: Any, raw: bytes | None) -> None:
        self._read += 1
        place = self._place
        self._place += 1
        result: Pair | Refusal
        if isinstance(value, Refusal):
            result = value
        else:
            result = canonical_pair(
                value,
                self._source.shape,
                self._source.columns,
                allow_empty=self._plan.allow_empty,
            )
        if isinstance(result, Refusal):
            self._refuse(result, file, number, place, value, raw)
        elif self._source.weight < 1 and not self._is_drawn(result):
            self._unused += 1
        else:
            self._batch.pairs.append(result)
            self._batch.rows.append((file, number, place, value, raw))
            if len(self._batch.pairs) == _BATCH_PAIRS:
                self._flush()

    def _is_drawn(self, pair: Pair) -> bool:
        return fraction_of(pair.pair_id, self._plan.seed, "weight") < self._source.weight

    def _refuse(
        self,
        refusal: Refusal,
        file: str,
        number: int,
        place: int,
        value: Any,
        raw: bytes | None,
    ) -> None:
        if raw is not None:
            shown = raw[:_RAW_CHARS].decode("utf-8", "backslashreplace")
        elif isinstance(value, Refusal):
            shown = ""
        else:
            shown = json.dumps(value, default=str)[:_RAW_CHARS]
        detail = refusal.detail.encode("utf-8", "backslashreplace").decode()
        row = (self._source.name, file, number, refusal.reason, shorten(detail, 300), shown)
        self._refused.append((place, row))

    def _flush(self) -> None:
        batch, self._batch = self._batch, _Batch()
        kept = []
        encoded = self._encoder.encode(batch.pairs)
        for pair, row, result in zip(batch.pairs, batch.rows, encoded, strict=True):
            if isinstance(result, Refusal):
                file, number, place, value, raw = row
                self._refuse(result, file, number, place, value, raw)
            else:
                kept.append((pair, row[1], row[2], result))
        if kept:
            self._tables.append(self._record_batch(kept))

    def _record_batch(self, kept: list[tuple[Pair, int, int, Encoded]]) -> pa.RecordBatch:
        pairs = [item[0] for item in kept]
        encoded = [item[3] for item in kept]
        columns: dict[str, list[Any]] = {
            "pair_id": [pair.pair_id for pair in pairs],
            "source": [self._source.name] * len(kept),
            "source_row": [item[1] for item in kept],
            "split": [self._split(pair) for pair in pairs],
            "prompt_ids": [e.prompt_ids for e in encoded],
            "chosen_ids": [e.chosen_ids for e in encoded],
            "rejected_ids": [e.rejected_ids for e in encoded],
            "chosen_truncated": [e.chosen_truncated for e in encoded],
            "rejected_truncated": [e.rejected_truncated for e in encoded],
            "conversational": [pair.conversational for pair in pairs],
            "prompt": [pair.prompt_text for pair in pairs],
            "chosen": [pair.chosen_text for pair in pairs],
            "rejected": [pair.rejected_text for pair in pairs],
            "passthrough": [pair.passthrough for pair in pairs],
            "prompt_hash": [pair.prompt_hash for pair in pairs],
            "swapped_id": [pair.swapped_id for pair in pairs],
            "place": [item[2] for item in kept],
            "boundary_shifted": [e.boundary_shifted for e in encoded],
            "tokens": [
                len(e.prompt_ids) + len(e.chosen_ids) + len(e.rejected_ids) for e in encoded
            ],
        }
        arrays = [pa.array(columns[f.name], f.type) for f in PREPARED]
        return pa.RecordBatch.from_arrays(arrays, schema=PREPARED)

    def _split(self, pair: Pair) -> str:
        held = self._source.holdout
        if held is None:
            share = fraction_of(pair.prompt_hash, self._plan.seed, "holdout")
            held = share < self._plan.holdout_fraction
        return schema.HOLDOUT if held else schema.TRAIN

    def finish(self) -> Prepared:
        if self._batch.pairs:
            self._flush()
        rows = [row for _, row in sorted(self._refused, key=lambda item: item[0])]
        refused = pa.table(
            [pa.array([row[i] for row in rows], f.type) for i, f in enumerate(schema.QUARANTINE)],
            schema=schema.QUARANTINE,
        )
        reasons = dict(sorted(Counter(row[3] for row in rows).items()))
        return Prepared(
            pairs=pa.Table.from_batches(self._tables, PREPARED),
            refused=refused,
            counts=Counts(read=self._read, quarantined=reasons, unused=self._unused),
        )


def validate_sources(config: Config) -> Validation:
    """Prepare everything in this process and keep the counts and refusals alone.

    Memory: about 100 bytes a pair.

    Raises:
        CorpusError: A source cannot be read.
        ModelError: The tokenizer cannot encode what the sources hold.
    """
    planned = plan(config)
    encoder = planned.encoder.load()
    parts = [part for unit in planned.units for part in unit.parts]
    with_lines = {part.shown for part in parts if part.kind == "jsonl"}
    keys, refusals, counts = [], [], []
    for index in range(len(planned.units)):
        prepared = prepare_unit(planned, index, encoder)
        keys.append(prepared.pairs.select(SETTLED_BY))
        counts.append(prepared.counts.as_dict())
        refused = prepared.refused.select(["file", "source_row", "reason", "detail"])
        for file, row, reason, detail in (tuple(r.values()) for r in refused.to_pylist()):
            line = row + 1 if file in with_lines else None
            refusals.append(RefusedRow(file, row, reason, detail, line))
    _, settled = settle_bucket(
        pa.concat_tables(keys),
        duplicates=planned.duplicates,
        contradictions=planned.contradictions,
    )
    return Validation(planned.said, refusals, Counts.total([*counts, settled.as_dict()]))
