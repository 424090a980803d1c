"""Corpora for the scoring benchmark: random ids with the lengths of real ones, or a file of pairs.

Lengths are log-normal with the parameters measured on the real corpora (SmolLM2's tokenizer), cut
at 1,024 tokens per sequence as training does, not counting what all prompts begin with:

    hh-like             medians 81, 27 and 33 tokens of prompt, chosen and rejected: much to share
    pandalm-like        medians 38, 36 and 20: little to share
    ultrafeedback-like  medians 120, 290 and 290 (prefix to completion 0.42, arXiv 2410.20305)
    k4                  prompts of 81 tokens with 4 completions of 55, and all 6 pairs of them
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import BenchmarkError

from refscale.config import parse_config
from refscale.corpus import preparation
from refscale.scoring.encoded_pairs import EncodedPairs

MAX_LENGTH = 1024
# Log-means and log-deviations of prompt, chosen, rejected tokens.
_LENGTHS: dict[str, tuple[tuple[float, float], ...]] = {
    "hh-like": ((4.40, 0.98), (3.30, 0.93), (3.49, 0.97)),
    "pandalm-like": ((3.64, 0.90), (3.59, 1.18), (3.02, 1.43)),
    "ultrafeedback-like": ((4.79, 0.90), (5.67, 0.70), (5.67, 0.70)),
    "k4": ((4.40, 0.80), (4.00, 0.70), (4.00, 0.70)),
}
NAMES = tuple(_LENGTHS)


def make(
    name: str, num_pairs: int, vocab_size: int, seed: int = 0, *, common_tokens: int = 0
) -> EncodedPairs:
    """Pairs of random ids; for k4 a multiple of six.

    Args:
        name: One of NAMES.
        num_pairs: Pairs at least.
        vocab_size: Ids are below it.
        seed: Of the generator.
        common_tokens: Every prompt begins with the same so many ids more, as with a system prompt.

    Raises:
        BenchmarkError: The name is unknown.
    """
    if name not in _LENGTHS:
        raise BenchmarkError(f"unknown corpus {name!r}; known: {', '.join(NAMES)}")
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = _LENGTHS[name]

    def ids(lengths: tuple[float, float], limit: int) -> np.ndarray:
        count = int(np.clip(np.exp(rng.normal(*lengths)).round(), 1, limit))
        return rng.integers(0, vocab_size, count).astype(np.int32)

    common = np.random.default_rng([seed, common_tokens]).integers(0, vocab_size, common_tokens)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(rows) < num_pairs:
        own = ids(prompt, MAX_LENGTH // 2)
        start = np.concatenate([common.astype(np.int32), own])
        rest = MAX_LENGTH - len(own)
        if name == "k4":
            some = [ids(chosen, rest) for _ in range(4)]
            rows += [(start, some[i], some[j]) for i in range(4) for j in range(i)]
        else:
            rows.append((start, ids(chosen, rest), ids(rejected, rest)))
    return EncodedPairs(*map(list, zip(*rows, strict=True)))


def read(path: Path, num_pairs: int, model: str) -> EncodedPairs:
    """Pairs of the start of a file as `prepare` encodes and orders them, cut to 1,024 tokens.

    Args:
        path: Pairs in any shape that a corpus may have.
        num_pairs: Pairs at most.
        model: A folder whose tokenizer and chat template they take.

    Raises:
        RefscaleError: They cannot be read, or none is valid.
    """
    data = {
        "model": {"model_name_or_path": model},
        "corpus": {"sources": [{"path": str(path)}]},
        "encoding": {"max_length": MAX_LENGTH},
    }
    plan = preparation.plan(parse_config(data))
    encoder = plan.encoder.load()
    tables: list[pa.Table] = []
    while len(tables) < len(plan.units) and sum(map(len, tables)) < num_pairs:
        tables.append(preparation.prepare_unit(plan, len(tables), encoder).pairs)
    # Shards have pairs in that order: turns of a dialogue do not lie side by side.
    table = pa.concat_tables(tables).sort_by("prompt_hash")
    pairs = EncodedPairs.from_table(table)
    if not len(pairs):
        raise BenchmarkError(f"{path} holds no valid pair")
    return pairs.take(range(min(num_pairs, len(pairs))))


def describe(pairs: EncodedPairs) -> dict[str, Any]:
    """Counts, mean lengths and a fingerprint of the ids."""
    digest = hashlib.sha256()
    columns: dict[str, Sequence[np.ndarray]] = {
        "prompt": pairs.prompt_ids,
        "chosen": pairs.chosen_ids,
        "rejected": pairs.rejected_ids,
    }
    for arrays in columns.values():
        for array in arrays:
            digest.update(len(array).to_bytes(4, "little") + array.tobytes())
    return {
        "pairs": len(pairs),
        "prompts": len({p.tobytes() for p in pairs.prompt_ids}),
        "mean_tokens": {name: float(np.mean([*map(len, x)])) for name, x in columns.items()},
        "sha256": digest.hexdigest(),
    }


def one_pair_a_prompt(pairs: EncodedPairs) -> list[EncodedPairs]:
    """The same pairs in as many parts as a prompt has pairs at most, one of each in a part."""
    turns = _turns(pairs)
    return [pairs.take(np.flatnonzero(turns == turn).tolist()) for turn in range(max(turns) + 1)]


def order_of_parts(pairs: EncodedPairs) -> np.ndarray:
    """Row numbers of the pairs in the order of `one_pair_a_prompt`."""
    return np.argsort(_turns(pairs), kind="stable")


def _turns(pairs: EncodedPairs) -> np.ndarray:
    """How many pairs before each have its prompt."""
    seen: dict[bytes, int] = {}
    turns = []
    for prompt in pairs.prompt_ids:
        turn = seen.get(prompt.tobytes(), 0)
        seen[prompt.tobytes()] = turn + 1
        turns.append(turn)
    return np.array(turns)
