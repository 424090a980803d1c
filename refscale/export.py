"""The selection as a dataset for other trainers: parquet that TRL loads, with a dataset card.

In: a run's selection/ and corpus/, joined shard by shard. Out: a folder that
`datasets.load_dataset(FOLDER)` loads:

    README.md                    what it holds, how it was selected, counts, fingerprints
    data/shard-00007.parquet     the kept pairs of the run's shard of that name, with their texts
    data/MANIFEST.json           written last: without it the export is unfinished

Costs two passes over the texts of the kept pairs, one shard in memory; no model, no Ray. A broken
off export goes on where it was. What it gives up: a dataset holds strings or chat messages, not
both, so a selection that mixes them is refused.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from refscale import schema
from refscale.errors import SelectionError, StorageError
from refscale.lineage import require_lineage
from refscale.storage.stages import STAGE_FILE, StageFolder
from refscale.storage.store import Store

EXPORT_FORMAT = 1
CARD = "README.md"
_TEXTS = ("prompt", "chosen", "rejected")
_SELECTED = ("ref_chosen_logps", "ref_rejected_logps", "pair_id", "selection_key")


def export_selection(store: Store, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a run's selection to `out`.

    Columns: prompt, chosen, rejected (strings, or lists of messages), ref_chosen_logps and
    ref_rejected_logps (float32 sums, nats), pair_id (32 hex digits), selection_key, and passthrough
    (JSON of the source's other columns).

    Args:
        store: The run.
        out: Folder or URI of the dataset. The same selection may be exported to it again; what is
            there already is kept.

    Returns:
        The manifest of data/; `counts` holds pairs and shards.

    Raises:
        StorageError: The run has no selection, its scores or corpus are gone, or `out` holds other
            files.
        SelectionError: The selection mixes chat and text pairs, or messages of unlike types.
        FingerprintError: The selection is of other scores than those that are there, or these of
            another corpus; or `out` holds the export of another selection.
    """
    started = time.monotonic()
    selection, corpus = StageFolder(store, "selection"), StageFolder(store, "corpus")
    selected, scored = selection.require(), StageFolder(store, "scores").require()
    require_lineage({"corpus": corpus.require(), "scores": scored, "selection": selected})
    target = StageFolder(Store(out), "data")
    if target.store.exists(CARD) and not target.store.exists(target.file(STAGE_FILE)):
        raise StorageError(
            f"{target.store.uri} holds a {CARD} that is not an export's; choose another --out"
        )
    fingerprint = {"selection": selected["identity"], "format": EXPORT_FORMAT}
    if target.begin(fingerprint) and target.store.exists(CARD):
        return target.require()
    files = {name: file["rows"] for file in selected["files"] if (name := _shard(file)) is not None}
    shards = [name for name, rows in files.items() if rows]
    texts = _common_type([_texts(selection, corpus, shard).schema for shard in shards])
    finished = target.finished_shards()
    for shard in shards:
        if shard not in finished:
            table = _joined(selection, corpus, shard, texts)
            finished[shard] = target.commit_shard(shard, table)
    counts = {"pairs": sum(files.values()), "shards": len(shards)}
    card = dataset_card(selected, scored, texts, counts)
    target.store.write_bytes(CARD, card.encode())
    records = [finished[shard] for shard in shards]
    seconds = time.monotonic() - started
    manifest = target.finish(fingerprint, records, counts=counts, seconds=seconds)
    # The manifest has their contents; beside the data they would only puzzle a reader.
    target.store.delete_files([target.file(f"{shard}.json") for shard in shards])
    return manifest


def _shard(file: Mapping[str, Any]) -> str | None:
    name = PurePosixPath(file["name"])
    return name.stem if name.suffix == ".parquet" else None


def _texts(selection: StageFolder, corpus: StageFolder, shard: str) -> pa.Table:
    """Prompt, chosen and rejected of a shard's kept pairs, in the selection's order.

    Raises:
        SchemaError: A kept pair is not in the corpus.
        SelectionError: Chat and text are mixed.
    """
    kept = selection.read_table(f"{shard}.parquet", columns=["pair_id"])
    columns = ["pair_id", "conversational", *_TEXTS, "passthrough"]
    pairs = corpus.read_table(f"{shard}.parquet", columns=columns)
    pairs = schema.matching_rows(
        pairs, kept["pair_id"], f"selected pairs of {shard} are not in the corpus"
    )
    chats = pc.sum(pairs["conversational"]).as_py()
    if 0 < chats < len(pairs):
        raise _mixed()
    if chats:
        for name in _TEXTS:
            messages = [json.loads(text) for text in pairs[name].to_pylist()]
            try:
                column = pa.array(messages)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as exc:
                raise SelectionError(
                    f"the messages of {name} in {shard} have contents of unlike types, which a"
                    f" dataset's column cannot hold: {exc}"
                ) from exc
            pairs = pairs.set_column(pairs.column_names.index(name), name, column)
    return pairs.select([*_TEXTS, "passthrough"])


def _mixed() -> SelectionError:
    return SelectionError(
        "the selection mixes chat and text pairs, and a dataset's column holds one of them; select"
        " from sources of one kind, in a run of their own"
    )


def _common_type(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for all shards: keys that only some messages have are null in the others."""
    if len({pa.types.is_string(schema.field("prompt").type) for schema in schemas}) > 1:
        raise _mixed()
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as exc:
        raise SelectionError(
            "the messages of the selection have contents of unlike types, which a dataset's column"
            f" cannot hold: {exc}"
        ) from exc


def _joined(selection: StageFolder, corpus: StageFolder, shard: str, texts: pa.Schema) -> pa.Table:
    pairs = _texts(selection, corpus, shard)
    table = pa.table(
        {name: _as_type(pairs[name], texts.field(name).type) for name in _TEXTS},
    )
    kept = selection.read_table(f"{shard}.parquet", columns=list(_SELECTED))
    for name in _SELECTED:
        column = kept[name]
        if name == "pair_id":
            column = pa.array([pair_id.hex() for pair_id in column.to_pylist()], pa.string())
        table = table.append_column(name, column)
    return table.append_column("passthrough", pairs["passthrough"])


def _as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """`column` with the keys of `kind`, which may be more than it has."""
    return column if column.type == kind else pa.array(column.to_pylist(), kind)


def dataset_card(
    selected: Mapping[str, Any],
    scored: Mapping[str, Any],
    texts: pa.Schema,
    counts: Mapping[str, int],
) -> str:
    """README.md of the dataset: what it is, how it was selected, counts, fingerprints.

    Args:
        selected: Manifest of selection/.
        scored: Manifest of scores/, which names the reference model's weights.
        texts: Types of the text columns.
        counts: pairs and shards.
    """
    facts: Mapping[str, Any] = selected["details"]
    chat = not pa.types.is_string(texts.field("prompt").type)
    size = ", ".join(f"{name} {value}" for name, value in facts.get("size", {}).items())
    rows = {
        "pairs": f"{counts['pairs']:,} of {selected['counts']['of']:,} scored ones",
        "form": "chat messages" if chat else "strings",
        "selection key": facts.get("strategy", "unknown"),
        "kept": f"{facts.get('keep', 'unknown')}{f', {size}' if size else ''}"
        f"{', of each length difference' if facts.get('match_lengths') else ''}",
        "selection fingerprint": selected["identity"],
    }
    for name, group in facts.get("groups", {}).items():
        if group.get("threshold") is not None and not facts.get("match_lengths"):
            rows[f"key at the cut{f', {name}' if name else ''}"] = f"{group['threshold']}"
    reference = scored["fingerprint"]
    for name, digest in reference["model"].items():
        rows[f"reference model, {name}"] = digest
    for name, digest in (reference["adapter"] or {}).items():
        rows[f"adapter merged into it, {name}"] = digest
    if reference["quantization"]:
        rows["reference model quantised to"] = reference["quantization"]
    rows["reference sums computed in"] = reference["dtype"]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    sources = "\n".join(
        f"| {_cell(name)} | {found['kept']:,} | {found['pairs']:,} |"
        for name, found in facts.get("sources", {}).items()
    )
    versions = ", ".join(
        f"{name} {selected['versions'][name]}"
        for name in ("refscale", "torch", "transformers", "trl")
        if name in selected["versions"]
    )
    return _CARD.format(
        size=_size_category(counts["pairs"]), table=table, sources=sources, versions=versions
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _size_category(pairs: int) -> str:
    """The hub's name for the order of magnitude."""
    names = ("", "1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    power = max(0, len(str(pairs)) - 3)
    if power >= len(names) - 1:
        return f"n>{names[-1]}"
    return f"{names[power]}<n<{names[power + 1]}".removeprefix("<")


_CARD = """---
tags: [preference, dpo, trl, refscale]
size_categories: ["{size}"]
configs:
  - config_name: default
    data_files: data/*.parquet
---

# A selection of preference pairs

Pairs that a reference model finds clear, selected by refscale, with that model's log-probabilities.

| | |
|---|---|
{table}

| source | kept | scored |
|---|---:|---:|
{sources}

## Columns

| column | what it holds |
|---|---|
| prompt, chosen, rejected | as in the source |
| ref_chosen_logps, ref_rejected_logps | float32: log-probability of the completion given the \
prompt under the reference model, summed over its tokens, in nats |
| pair_id | hash of the pair's content, 32 hex digits |
| selection_key | what the pairs were ordered by |
| passthrough | JSON of the source's other columns; `tools` and `chat_template_kwargs` are there |

## Use

```python
from datasets import load_dataset

pairs = load_dataset("FOLDER", split="train")
```

TRL's DPOTrainer loads prompt, chosen and rejected. TRL 1.16 does not use stored sums: with
`precompute_ref_log_probs=True` it computes its own and fails on the columns, so remove them first.
The sums hold for the reference model above with its own chat template and truncation only.

Made with {versions}.
"""
