"""The exported selection: what TRL and datasets load is what was selected."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from refscale import schema
from refscale.errors import FingerprintError, SchemaError, SelectionError, StorageError
from refscale.export import _size_category, export_selection
from refscale.storage.stages import FileRecord, StageFolder
from refscale.storage.store import Store

FACTS = {
    "strategy": "mean_margin",
    "keep": "largest",
    "size": {"fraction": 0.5},
    "groups": {"": {"pairs": 12, "kept": 6, "threshold": 0.25}},
    "sources": {"a|b": {"pairs": 12, "kept": 6}},
}


def chat(text: str, role: str = "assistant", **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text, **more}]


def make_run(
    root: Path,
    texts: list[list[tuple[Any, Any, Any]]],
    *,
    key: float = 1.0,
    adapter: dict[str, str] | None = None,
    quantization: str | None = None,
) -> Store:
    """A run whose shards hold the pairs of `texts`, of which every second is selected."""
    store = Store(str(root))
    corpus, selection = StageFolder(store, "corpus"), StageFolder(store, "selection")
    scores = StageFolder(store, "scores")
    records: list[Any] = []
    shards: list[Any] = []
    number = 0
    for s, pairs in enumerate(texts):
        rows = []
        for prompt, chosen, rejected in pairs:
            is_chat = not isinstance(prompt, str)
            as_text = (lambda value: json.dumps(value)) if is_chat else str
            rows.append(
                {
                    "pair_id": hashlib.blake2b(str(number).encode(), digest_size=16).digest(),
                    "source": "a|b",
                    "source_row": number,
                    "split": schema.TRAIN,
                    "prompt_ids": [1],
                    "chosen_ids": [2],
                    "rejected_ids": [3],
                    "chosen_truncated": False,
                    "rejected_truncated": False,
                    "conversational": is_chat,
                    "prompt": as_text(prompt),
                    "chosen": as_text(chosen),
                    "rejected": as_text(rejected),
                    "passthrough": json.dumps({"note": number}),
                    "ref_chosen_logps": -1.5 * number,
                    "ref_rejected_logps": -2.5 * number,
                    "selection_key": key * number,
                }
            )
            number += 1
        columns = [{name: row[name] for name in schema.CORPUS.names} for row in rows]
        table = pa.Table.from_pylist(columns, schema.CORPUS)
        shards.append(corpus.commit_shard(f"shard-{s:05d}", table))
        # Not in the corpus's order: the join goes by pair_id.
        kept = [{name: row[name] for name in schema.SELECTION.names} for row in rows[::2][::-1]]
        table = pa.Table.from_pylist(kept, schema.SELECTION)
        records.append(selection.commit_shard(f"shard-{s:05d}", table))
    records.append(selection.publish_bytes("selection.json", b"{}"))
    reference = {
        "corpus": corpus.finish({}, shards, counts={}, seconds=0)["identity"],
        "model": {"model.safetensors": "0123abcd"},
        "adapter": adapter,
        "dtype": "float32",
        "quantization": quantization,
    }
    scored = scores.finish(reference, [], counts={}, seconds=0)
    selection.finish(
        {"scores": scored["identity"], "key": key},
        records,
        counts={"kept": 6, "of": number},
        seconds=0,
        details=FACTS,
    )
    return store


def strings(start: int, count: int) -> list[tuple[str, str, str]]:
    return [(f"p{i}", f"good {i}", f"bad {i}\n") for i in range(start, start + count)]


def load(out: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(out), split="train", cache_dir=str(out / "cache"))


def test_datasets_loads_what_was_selected(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", [strings(0, 6), [], strings(6, 6)])
    out = tmp_path / "out"
    manifest = export_selection(store, out)
    assert manifest["counts"] == {"pairs": 6, "shards": 2}
    names = sorted(path.name for path in (out / "data").iterdir())
    # The run's shard names; the one without kept pairs is left out.
    assert names == ["MANIFEST.json", "STAGE.json", "shard-00000.parquet", "shard-00002.parquet"]
    rows = load(out).to_list()
    assert [row["prompt"] for row in rows] == ["p4", "p2", "p0", "p10", "p8", "p6"]
    for row in rows:
        i = int(row["prompt"][1:])
        assert row == {
            "prompt": f"p{i}",
            "chosen": f"good {i}",
            "rejected": f"bad {i}\n",
            "ref_chosen_logps": -1.5 * i,
            "ref_rejected_logps": -2.5 * i,
            "pair_id": hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest(),
            "selection_key": float(i),
            "passthrough": json.dumps({"note": i}),
        }
    table = StageFolder(Store(str(out)), "data").read_table("shard-00000.parquet")
    assert table.schema.field("ref_chosen_logps").type == pa.float32()


def test_messages_stay_messages_also_where_only_some_have_a_key(tmp_path: Path) -> None:
    plain = (chat("q0", "user"), chat("good"), chat("bad"))
    named = (chat("q1", "user", name="ann"), chat("good"), chat("bad"))
    store = make_run(tmp_path / "run", [[plain], [named]])
    export_selection(store, tmp_path / "out")
    rows = load(tmp_path / "out").to_list()
    assert rows[0]["chosen"] == chat("good")
    assert [row["prompt"] for row in rows] == [
        chat("q0", "user", name=None),
        chat("q1", "user", name="ann"),
    ]


def test_trl_trains_on_the_export(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    messages = [(chat(f"q {i}", "user"), chat(f"yes {i}"), chat(f"no {i}")) for i in range(8)]
    export_selection(make_run(tmp_path / "run", [messages]), tmp_path / "out")
    pairs = load(tmp_path / "out").remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    assert trainer.train().training_loss == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("pairs", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (6_000_000, "1M<n<10M"),
        (10**9, "1B<n<10B"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_a_dataset_is_of_one_of_the_hubs_sizes(pairs: int, name: str) -> None:
    assert _size_category(pairs) == name


def test_the_card_says_what_how_and_from_where(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", [strings(0, 12)])
    export_selection(store, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    identity = StageFolder(store, "selection").require()["identity"]
    for line in (
        'size_categories: ["n<1K"]',
        "| pairs | 6 of 12 scored ones |",
        "| form | strings |",
        "| selection key | mean_margin |",
        "| kept | largest, fraction 0.5 |",
        "| key at the cut | 0.25 |",
        f"| selection fingerprint | {identity} |",
        "| reference model, model.safetensors | 0123abcd |",
        "| a\\|b | 6 | 12 |",
    ):
        assert line in card, line
    assert str(tmp_path) not in card
    assert "adapter" not in card and "quantised" not in card


def test_the_card_names_all_that_the_reference_model_is_made_of(tmp_path: Path) -> None:
    adapter = {"adapter_config.json": "4567", "adapter_model.safetensors": "89ef"}
    run = tmp_path / "run"
    store = make_run(run, [strings(0, 12)], adapter=adapter, quantization="8bit")
    export_selection(store, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| reference model, model.safetensors | 0123abcd |",
        "| adapter merged into it, adapter_config.json | 4567 |",
        "| adapter merged into it, adapter_model.safetensors | 89ef |",
        "| reference model quantised to | 8bit |",
    ):
        assert line in card, line


@pytest.mark.parametrize(
    ("redone", "names"),
    [
        ("scores", r"selection/ was made from another scores/.*`refscale select --restart`"),
        ("corpus", r"scores/ was made from another corpus/.*`refscale score --restart`"),
    ],
    ids=["scores", "corpus"],
)
def test_a_stale_selection_is_not_exported(tmp_path: Path, redone: str, names: str) -> None:
    store = make_run(tmp_path / "run", [strings(0, 12)])
    folder = StageFolder(store, redone)
    before = folder.require()
    files = [FileRecord.from_dict(file) for file in before["files"]]
    again = {**before["fingerprint"], "model": {"model.safetensors": "4567cdef"}}
    folder.finish(again, files, counts={}, seconds=0)
    with pytest.raises(FingerprintError, match=names):
        export_selection(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", ["scores", "corpus"])
def test_a_selection_without_what_it_was_made_from_is_not_exported(
    tmp_path: Path, gone: str
) -> None:
    store = make_run(tmp_path / "run", [strings(0, 12)])
    store.delete(f"{gone}/MANIFEST.json")
    with pytest.raises(StorageError, match=f"{gone}/ in .* is not finished"):
        export_selection(store, tmp_path / "out")


def test_an_export_that_broke_off_goes_on_and_a_done_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(tmp_path / "run", [strings(0, 4), strings(4, 4), strings(8, 4)])
    commit, done = StageFolder.commit_shard, []

    def full(self: StageFolder, shard: str, *args: Any, **kwargs: Any) -> Any:
        if len(done) == 2:
            raise StorageError("no space left")
        done.append(shard)
        return commit(self, shard, *args, **kwargs)

    monkeypatch.setattr(StageFolder, "commit_shard", full)
    with pytest.raises(StorageError, match="no space left"):
        export_selection(store, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
    done.clear()
    export_selection(store, tmp_path / "out")
    assert done == ["shard-00002"]
    export_selection(store, tmp_path / "out")
    assert done == ["shard-00002"]
    assert len(load(tmp_path / "out")) == 6


def test_a_card_that_is_gone_is_written_again(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", [strings(0, 3)])
    before = export_selection(store, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_bytes()
    (tmp_path / "out/README.md").unlink()
    assert export_selection(store, tmp_path / "out")["identity"] == before["identity"]
    assert (tmp_path / "out/README.md").read_bytes() == card
    names = sorted(path.name for path in (tmp_path / "out/data").iterdir())
    assert names == ["MANIFEST.json", "STAGE.json", "shard-00000.parquet"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="run `refscale select`"):
        export_selection(Store(str(tmp_path / "none")), tmp_path / "out")
    message = (chat("q", "user"), chat("a"), chat("b"))
    for name, texts in (
        ("shard", [[message, message, *strings(0, 1)]]),
        ("shards", [[message], strings(0, 1)]),
    ):
        mixed = make_run(tmp_path / name, texts)
        with pytest.raises(SelectionError, match="mixes chat and text pairs"):
            export_selection(mixed, tmp_path / f"{name}-out")
    first = make_run(tmp_path / "first", [strings(0, 2)])
    export_selection(first, tmp_path / "taken")
    other = make_run(tmp_path / "other", [strings(0, 2)], key=2.0)
    with pytest.raises(FingerprintError, match="selection"):
        export_selection(other, tmp_path / "taken")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(StorageError, match=r"README.md that is not an export's"):
        export_selection(first, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_a_pair_that_the_corpus_lacks_is_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", [strings(0, 4)])
    corpus = StageFolder(store, "corpus")
    table = corpus.read_table("shard-00000.parquet")
    corpus.commit_shard("shard-00000", table.slice(1))
    with pytest.raises(SchemaError, match="1 selected pairs of shard-00000 are not in"):
        export_selection(store, tmp_path / "out")
