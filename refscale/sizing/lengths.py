"""How long a corpus' pairs are: what the cost of scoring and training depends on.

In: a prepared corpus, the sources, or bare averages. Out: totals of tokens and of attended context,
scaled from a sample to the corpus. Pure numpy; a sample of 2,000 pairs takes seconds, and at least
one unit of every source is read.

What it gives up: prompts and completions that recur beyond the sample are not seen, so a corpus of
many completions a prompt is estimated from a prepared run (whole shards), not from its sources.
Turns of one dialogue lie side by side in a source and apart in the shards, which share less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add

import numpy as np

from refscale.config import Config
from refscale.errors import ConfigError
from refscale.scoring.packing import Plan, plan_packs
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

SAMPLE_PAIRS = 2000
# Tokens of a pack, within which what prompts have in common is computed once. Replicas on large
# GPUs take more and share more.
_PACK_TOKENS = 16384


@dataclass(frozen=True)
class Work:
    """What a forward pass over pairs computes.

    Attributes:
        rows: Tokens through the backbone.
        head_rows: Rows through the output head.
        context: Keys attended, summed over the rows.
    """

    rows: float = 0.0
    head_rows: float = 0.0
    context: float = 0.0

    def __mul__(self, factor: float) -> "Work":
        """So many times this."""
        return Work(self.rows * factor, self.head_rows * factor, self.context * factor)

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(
            self.rows + other.rows,
            self.head_rows + other.head_rows,
            self.context + other.context,
        )


@dataclass(frozen=True)
class Lengths:
    """Totals over `num_pairs` pairs.

    Attributes:
        num_pairs: Pairs of the corpus, holdout included.
        holdout_pairs: Of these.
        useful_tokens: Prompt tokens once a distinct prompt, plus distinct completions' tokens.
        scoring: Of all pairs in packs, whatever they share computed once a pack.
        alone: Of each pair on its own, as in micro-batches of few pairs.
        padded_tokens: Prompt and completion of both sides, nothing shared, no padding counted.
        longest: Computed tokens of the longest pair.
        origin: Where the figures are from.
    """

    num_pairs: int
    holdout_pairs: int
    useful_tokens: float
    scoring: Work
    alone: Work
    padded_tokens: float
    longest: int
    origin: str

    def scaled_to(self, num_pairs: int, holdout_pairs: int | None = None) -> "Lengths":
        """The totals of a corpus of which this is a sample; default: with the same holdout."""
        factor = num_pairs / self.num_pairs
        if holdout_pairs is None:
            holdout_pairs = round(self.holdout_pairs * factor)
        return replace(
            self,
            num_pairs=num_pairs,
            holdout_pairs=holdout_pairs,
            useful_tokens=self.useful_tokens * factor,
            scoring=self.scoring * factor,
            alone=self.alone * factor,
            padded_tokens=self.padded_tokens * factor,
        )

    def __add__(self, other: "Lengths") -> "Lengths":
        """The totals of two corpora together, which share nothing."""
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("longest", "origin")
        }
        return replace(self, longest=max(self.longest, other.longest), **sums)


def of_means(
    num_pairs: int,
    prompt: float,
    chosen: float,
    rejected: float,
    *,
    holdout_fraction: float = 0.0,
    max_length: int | None = None,
) -> Lengths:
    """Of a corpus whose pairs have these numbers of tokens and share nothing between pairs.

    Averages say nothing of the longest pair, which decides memory. With `max_length`, which bounds
    prompt + completion, it is one whose two sides fill that; else as long as the average.
    """
    origin = f"given: {prompt:g} + {chosen:g} + {rejected:g} tokens a pair"
    if max_length is not None:
        origin += f"; memory is for a pair whose sides fill encoding.max_length, {max_length:,}"
    leaves = [max(side - 1, 0) for side in (chosen, rejected)]
    context = prompt * (prompt + 1) / 2
    context += sum(leaf * prompt + leaf * (leaf + 1) / 2 for leaf in leaves)
    work = Work(prompt + sum(leaves), chosen + rejected, context) * num_pairs
    return Lengths(
        num_pairs=num_pairs,
        holdout_pairs=round(num_pairs * holdout_fraction),
        useful_tokens=num_pairs * (prompt + chosen + rejected),
        scoring=work,
        alone=work,
        padded_tokens=num_pairs * (2 * prompt + chosen + rejected),
        longest=2 * max_length if max_length is not None else round(prompt + sum(leaves)),
        origin=origin,
    )


def of_pairs(
    prompt_ids: Sequence[np.ndarray],
    chosen_ids: Sequence[np.ndarray],
    rejected_ids: Sequence[np.ndarray],
    *,
    origin: str,
) -> Lengths:
    """Of these pairs, planned as the scoring engine plans them.

    Raises:
        ConfigError: There are none.
    """
    if not len(prompt_ids):
        raise ConfigError(f"no pairs to size the run from ({origin})")
    plan = plan_packs(prompt_ids, chosen_ids, rejected_ids, _PACK_TOKENS)
    pairs = list(zip(prompt_ids, chosen_ids, rejected_ids, strict=True))
    sides = [(len(p), len(c), len(r)) for p, c, r in pairs]
    return Lengths(
        num_pairs=len(prompt_ids),
        holdout_pairs=0,
        useful_tokens=plan.useful_tokens,
        scoring=_work(plan),
        alone=reduce(add, (_work(plan_packs([p], [c], [r])) for p, c, r in pairs)),
        padded_tokens=sum(2 * p + c + r for p, c, r in sides),
        longest=max(p + max(c - 1, 0) + max(r - 1, 0) for p, c, r in sides),
        origin=origin,
    )


def _work(plan: Plan) -> Work:
    packs = (Work(pack.num_tokens, len(pack.rows), pack.context) for pack in plan.iter_packs())
    return reduce(add, packs, Work())


def of_run(store: Store, *, sample: int = SAMPLE_PAIRS) -> Lengths:
    """Of a run's prepared corpus: its first shards up to `sample` pairs, scaled to all of them.

    Raises:
        StorageError: The corpus is not prepared or is damaged.
    """
    from refscale.scoring.shard_scoring import PAIR_COLUMNS

    corpus = StageFolder(store, "corpus")
    manifest = corpus.require()
    files = [file for file in manifest["files"] if file["rows"]]
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    used = 0
    for file in files:
        if columns[0] and len(columns[0]) >= sample:
            break
        table = corpus.read_table(file["name"], columns=PAIR_COLUMNS)
        _append(columns, table)
        used += 1
    origin = f"{used} of {len(files)} shards of {store.uri}/corpus"
    holdout = sum(file["counts"].get("holdout", 0) for file in files)
    return of_pairs(*columns, origin=origin).scaled_to(manifest["rows"], holdout)


def of_sources(
    config: Config, *, num_pairs: int | None = None, sample: int = SAMPLE_PAIRS
) -> Lengths:
    """Of each source's first units up to `sample` pairs in all, encoded as `prepare` would.

    Args:
        config: The config.
        num_pairs: Pairs of the whole corpus; default: what is not read counts like what is.
        sample: Pairs to encode, split evenly among the sources; whole units are read, so it may be
            more.

    Raises:
        CorpusError: A source cannot be read.
        ConfigError: No pair is valid.
    """
    from refscale.corpus import preparation

    plan = preparation.plan(config)
    encoder = plan.encoder.load()
    parts: list[Lengths] = []
    found = units = 0
    for number, source in enumerate(plan.sources):
        own = [index for index, unit in enumerate(plan.units) if unit.source == number]
        columns: tuple[list[np.ndarray], ...] = ([], [], [])
        used = 0
        while used < len(own) and len(columns[0]) < max(1, sample // len(plan.sources)):
            _append(columns, preparation.prepare_unit(plan, own[used], encoder).pairs)
            used += 1
        pairs = len(columns[0])
        found, units = found + pairs, units + used
        if pairs:
            size = [sum(part.num_bytes for part in plan.units[index].parts) for index in own]
            total = round(pairs * sum(size) / sum(size[:used]))
            held = plan.holdout_fraction if source.holdout is None else float(source.holdout)
            part = of_pairs(*columns, origin="").scaled_to(total, round(total * held))
            parts.append(part)
    origin = f"{found:,} pairs of {units} of {len(plan.units)} units of the sources"
    if not parts:
        raise ConfigError(f"no pairs to size the run from ({origin})")
    lengths = replace(reduce(add, parts), origin=origin)
    return lengths.scaled_to(num_pairs) if num_pairs else lengths


def _append(columns: tuple[list[np.ndarray], ...], table: object) -> None:
    from refscale.scoring.encoded_pairs import EncodedPairs

    pairs = EncodedPairs.from_table(table)
    for column, ids in zip(
        columns, (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids), strict=True
    ):
        column.extend(ids)


def read_means(text: str) -> tuple[float, float, float]:
    """Tokens of `PROMPT,CHOSEN,REJECTED`.

    Raises:
        ConfigError: It is not three positive numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) <= 0:
        raise ConfigError(
            f"--lengths must be PROMPT,CHOSEN,REJECTED tokens, got {text!r}; e.g. 400,300,300"
        )
    return numbers[0], numbers[1], numbers[2]
