"""The whole product through its command line: one run of all stages on a tiny model."""

import json

import bench_scoring
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support import string_pairs, write_jsonl

from refscale import schema
from refscale.cli import main
from refscale.errors import RefscaleError

pytestmark = pytest.mark.ray


def chat_pairs(count):
    rows = []
    for i in range(count):
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Name number {i}."}],
                "chosen": [{"role": "assistant", "content": f"It is {i}, of course."}],
                "rejected": [{"role": "assistant", "content": f"No idea about {i % 3}"}],
                "wrong": i % 4 == 0,
            }
        )
    return rows


def write_config(folder, model, **changes):
    """A config over 60 string pairs, of which 2 are defective, and 24 chats."""
    strings = string_pairs(58)
    strings += [{"prompt": "p", "chosen": "", "rejected": "x"}, {"prompt": "p", "chosen": "same"}]
    write_jsonl(folder / "strings.jsonl", strings)
    write_jsonl(folder / "chats.jsonl", chat_pairs(24))
    config = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "corpus": {
            "sources": [{"path": "strings.jsonl"}, {"path": "chats.jsonl"}],
            "holdout_fraction": 0.2,
            "shard_pairs": 20,
        },
        "encoding": {"max_length": 256},
        "train": {
            "num_workers": 2,
            "deepspeed": "zero2",
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "save_steps": 2,
            "eval_steps": 2,
            "load_best_model_at_end": True,
        },
        "evaluate": {"flipped_column": "wrong"},
        # Few tasks at a time: each starts a process of Ray's, which imports before it works.
        "ray": {"replicas": 2, "cpus_per_task": 3},
    }
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, ray_session):
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_model)
    run = folder / "run"
    assert main(["run", str(config), "--run-dir", str(run), "--debug"]) == 0
    return config, run


def manifest(run, stage):
    return json.loads((run / stage / "MANIFEST.json").read_text())


def table(run, stage):
    files = [file["name"] for file in manifest(run, stage)["files"] if file["rows"]]
    return pa.concat_tables([pq.read_table(run / stage / name) for name in files])


def test_every_row_is_accounted_for(finished):
    _, run = finished
    counts = manifest(run, "corpus")["counts"]
    assert counts["read"] == 84
    assert counts["quarantined"] == {"empty_chosen": 1, "missing_field": 1}
    scores = manifest(run, "scores")
    assert scores["rows"] == manifest(run, "corpus")["rows"] == 82
    refused = table(run, "quarantine").to_pylist()
    assert {(row["source_row"], row["reason"]) for row in refused} == {
        (58, "empty_chosen"),
        (59, "missing_field"),
    }


def test_scores_hold_each_pair_once_and_the_holdout_shares_no_prompt(finished):
    _, run = finished
    scores, corpus = table(run, "scores"), table(run, "corpus")
    assert sorted(scores["pair_id"].to_pylist()) == sorted(corpus["pair_id"].to_pylist())
    assert len(set(scores["pair_id"].to_pylist())) == scores.num_rows
    prompts = {
        split: {row["prompt"] for row in corpus.to_pylist() if row["split"] == split}
        for split in (schema.TRAIN, schema.HOLDOUT)
    }
    assert prompts[schema.HOLDOUT] and not prompts[schema.TRAIN] & prompts[schema.HOLDOUT]


def test_scores_equal_those_of_trl_on_the_raw_rows(finished, tiny_model):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config, run = finished
    scores = {row["pair_id"]: row for row in table(run, "scores").to_pylist()}
    corpus = {(row["source"], row["source_row"]): row for row in table(run, "corpus").to_pylist()}
    for name in ("strings", "chats"):
        rows = [json.loads(line) for line in (config.parent / f"{name}.jsonl").open()]
        numbers = [n for source, n in sorted(corpus) if source == name]
        data = [{k: rows[n][k] for k in ("prompt", "chosen", "rejected")} for n in numbers]
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
            args=DPOConfig(
                output_dir=str(run.parent / f"trl-{name}"),
                precompute_ref_log_probs=True,
                max_length=256,
                per_device_train_batch_size=8,
                report_to="none",
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )
        for side in ("ref_chosen_logps", "ref_rejected_logps"):
            expected = np.array(trainer.train_dataset[side])
            ours = np.array([scores[corpus[name, n]["pair_id"]][side] for n in numbers])
            assert np.abs(ours - expected).max() < 1e-3, (name, side)


def test_the_selection_is_the_largest_half_by_mean_margin(finished):
    _, run = finished
    rows = [row for row in table(run, "scores").to_pylist() if row["split"] == schema.TRAIN]
    key = {
        row["pair_id"]: np.float32(
            np.float64(row["ref_chosen_logps"]) / row["num_chosen_tokens"]
            - np.float64(row["ref_rejected_logps"]) / row["num_rejected_tokens"]
        )
        for row in rows
    }
    order = sorted(key, key=lambda pair_id: (-key[pair_id], pair_id))
    kept = table(run, "selection")["pair_id"].to_pylist()
    assert set(kept) == set(order[: int(len(order) * 0.5 + 0.5)])


def test_training_starts_at_ln_2_and_leaves_a_policy_that_differs_from_the_reference(
    finished, tiny_model
):
    import torch
    from transformers import AutoModelForCausalLM

    _, run = finished
    details = manifest(run, "policy")["details"]
    assert details["start_check_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert details["steps"] == 3
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(policy.parameters(), reference.parameters(), strict=True)
    )
    logged = [json.loads(line) for line in (run / "training/log.jsonl").open()]
    assert [row["step"] for row in logged] == [1, 2, 3]


def test_the_policy_is_the_checkpoint_with_the_lowest_loss_on_the_holdout(finished):
    _, run = finished
    logged = [json.loads(line) for line in (run / "training/log.jsonl").open()]
    measured = {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    assert list(measured) == [2, 3]
    step = manifest(run, "policy")["details"]["policy_step"]
    assert step == min(measured, key=measured.get)
    # The evaluation looks at the same pairs in the same order. 15 of them in batches of 4 on two
    # ranks: the last batch is filled up with the first pair.
    (row,) = [row for row in logged if row["step"] == step]
    gains = {
        side: np.array(table(run, "evaluation")[f"policy_{side}_logps"])
        - np.array(table(run, "evaluation")[f"ref_{side}_logps"])
        for side in ("chosen", "rejected")
    }
    margins = 0.1 * (gains["chosen"] - gains["rejected"])
    assert len(margins) == 15
    filled = np.append(margins, margins[0])
    assert row["eval_rewards/margins"] == pytest.approx(filled.mean(), abs=1e-3)
    assert not (run / "training/holdout").exists()


def test_evaluation_covers_the_holdout(finished):
    _, run = finished
    corpus = table(run, "corpus")
    held = corpus["split"].to_pylist().count(schema.HOLDOUT)
    facts = manifest(run, "evaluation")["details"]
    assert facts["overall"]["n"] == held == manifest(run, "evaluation")["rows"]
    assert facts["purity"]["n"] > 0


def test_the_report_is_written_in_both_forms(finished):
    _, run = finished
    values = json.loads((run / "report.json").read_text())
    html = (run / "report.html").read_text()
    assert values and "<svg" in html and len(html) < 1_000_000


def test_the_same_command_again_does_nothing(finished, capsys):
    config, run = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}
    assert main(["run", str(config), "--run-dir", str(run)]) == 0
    said = capsys.readouterr().err
    assert said.count("done before") == 5
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}


def test_status_says_complete_and_names_damage(finished, capsys):
    _, run = finished
    assert main(["status", str(run)]) == 0
    assert "complete" in capsys.readouterr().out
    shard = next((run / "scores").glob("*.parquet"))
    saved = shard.read_bytes()
    shard.write_bytes(saved[:-10])
    try:
        assert main(["status", str(run)]) == 0
        said = capsys.readouterr().out
        assert "DAMAGED" in said and "next: refscale score" in said
    finally:
        shard.write_bytes(saved)


def test_another_size_of_the_selection_is_refused_by_name(finished, capsys):
    config, run = finished
    before = (run / "config.yaml").read_bytes()
    command = ["select", str(config), "--run-dir", str(run), "--set", "select.fraction=0.25"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "select.fraction = 0.5, now it is 0.25" in said and "--restart" in said
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_with_somebody_elses_config_is_left_alone(tmp_path, tiny_model, capsys):
    config = write_config(tmp_path, tiny_model)
    before = config.read_bytes()
    assert main(["run", str(config), "--run-dir", str(tmp_path)]) == 1
    assert "choose another --run-dir" in capsys.readouterr().err
    assert config.read_bytes() == before


def test_too_many_refused_rows_end_with_exit_code_3(tmp_path, tiny_model, ray_session, capsys):
    config = write_config(tmp_path, tiny_model, corpus={"max_bad_fraction": 0.01})
    assert main(["prepare", str(config), "--run-dir", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().err
    assert "empty_chosen" in said and "missing_field" in said


def test_the_scoring_benchmark_compares_a_replica_with_a_bare_process(
    tmp_path, ray_session, monkeypatch
):
    monkeypatch.setenv("REFSCALE_COMMIT", "0" * 40)
    found = tmp_path / "result.json"
    asked = "--model tiny-shape --dtype float32 --corpora hh-like --pairs 6 --repeats 2"
    asked += f" --oracle-pairs 2 --scorers packed --through-ray --out {found}"
    assert bench_scoring.main(asked.split()) == 0
    rows = {row["scorer"]: row for row in json.loads(found.read_text())["rows"]}
    through_ray = rows["refscale packed, one replica through Ray"]
    assert through_ray["pairs_per_s"]["repeats"] == 2
    assert 0 < through_ray["of_bare_process"]
    assert rows["refscale packed"]["largest_error_nats"] < 1e-3
    with pytest.raises(RefscaleError, match="with all cores"):
        bench_scoring.parse(["--through-ray", "--threads", "1"])
