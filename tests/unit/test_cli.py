"""The command line's answers that need neither Ray nor torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from support import string_pairs, write_jsonl

from refscale.cli import main
from refscale.errors import ConfigError
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


@pytest.fixture
def config(tmp_path, tiny_model):
    write_jsonl(tmp_path / "pairs.jsonl", string_pairs(10))
    path = tmp_path / "config.yaml"
    values = {
        "model": {"model_name_or_path": str(tiny_model)},
        "corpus": {"sources": [{"path": "pairs.jsonl"}]},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_config_show_writes_every_default_and_resolves_paths(config, capsys):
    assert main(["config", "show", str(config), "--set", "select.fraction=0.3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["select"]["fraction"] == 0.3
    assert shown["train"]["beta"] == 0.1
    assert shown["corpus"]["sources"][0]["path"] == str(config.parent / "pairs.jsonl")


def test_config_schema_is_a_json_schema_with_descriptions(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "corpus", "select", "train"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("select.fractoin=0.3", "did you mean fraction?"),
        ("selct.fraction=0.3", "did you mean select?"),
        ("select.fraction=10", "select.fraction"),
        ("select.fraction", "section.key=value"),
    ],
)
def test_a_wrong_override_is_one_line_and_exit_code_2(config, capsys, override, said):
    assert main(["run", str(config), "--run-dir", "unused", "--set", override]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_missing_config_is_exit_code_2(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the config" in capsys.readouterr().err


def test_status_of_a_folder_that_is_no_run_is_exit_code_2(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_plan_prints_its_table_to_stdout(config, capsys):
    assert main(["plan", str(config), "--gpus", "2xL4", "--price", "1"]) == 0
    out = capsys.readouterr().out
    assert "GPUs" in out and "2 x L4" in out and "cost" in out


def test_plan_names_the_gpus_it_knows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "--help"]) == 0
    assert "H100, H200, A100-80, L40S, L4" in capsys.readouterr().out


def test_plan_refuses_a_number_of_pairs_that_is_not_positive(config, capsys):
    arguments = ["plan", str(config), "--lengths", "400,300,300", "--pairs", "-5"]
    assert main(arguments) == 2
    assert "--pairs must be a positive integer, got -5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("compare", "--parallel", "-1"),
        ("compare", "--parallel", "0"),
        ("mtbench", "--batch-size", "0"),
        ("mtbench", "--batch-size", "-1"),
        ("mtbench", "--max-new-tokens", "0"),
    ],
)
def test_a_number_that_must_be_positive_is_refused_at_once(config, capsys, command, option, value):
    run_dir = config.parent / "run"
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "none"]
    arguments = [command, str(config), "--run-dir", str(run_dir), option, value]
    assert main(arguments + judge * (command == "mtbench")) == 2
    said = f"refscale: {option} must be a positive integer, got {value}\n"
    assert capsys.readouterr().err == said
    assert not run_dir.exists()


def test_the_help_of_arm_says_when_lengths_are_matched(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["compare", "--help"]) == 0
    assert "matched where it says so, whatever select.match_lengths is" in capsys.readouterr().out


def test_validate_prints_every_refusal_with_file_row_and_line(config, capsys):
    with (config.parent / "pairs.jsonl").open("ab") as file:
        file.write(b'{"prompt": "p", "chosen": "a", "rejected": "a"}\nnot json\n')
    assert main(["validate", str(config), "--set", "corpus.max_bad_fraction=1"]) == 0
    out = capsys.readouterr().out
    assert "pairs.jsonl, row 10 (line 11): identical_pair" in out
    assert "pairs.jsonl, row 11 (line 12): bad_json" in out


def test_what_a_row_says_cannot_drive_the_terminal(config, capsys):
    text = "\x1b]0;mine\x07\x1b[2J\x9b1m\u202e"
    row = {"prompt": "p", "chosen": text, "rejected": text}
    with (config.parent / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    hostile = config.parent / "all is well\n\x1bc.jsonl"
    (config.parent / "pairs.jsonl").rename(hostile)
    sources = f"corpus.sources={json.dumps([{'path': str(hostile)}])}"
    arguments = ["--set", sources, "--set", "corpus.max_bad_fraction=1"]
    assert main(["validate", str(config), *arguments]) == 0
    captured = capsys.readouterr()
    [line] = captured.out.splitlines()
    assert r"/all is well\n\x1bc.jsonl, row 10 (line 11): identical_pair: " in line
    assert line.endswith(r"both sides are \x1b]0;mine\x07\x1b[2J\x9b1m\u202e")
    # The line of the source names the file, too.
    assert r"\x1bc: 1 file, shape" in captured.err
    assert not set("\x07\x1b\x9b\u202e") & set(captured.out + captured.err)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("error", [ConfigError, ValueError])
def test_an_error_that_quotes_a_row_cannot_drive_the_terminal(capsys, monkeypatch, error, debug):
    def fail(*_args):
        raise error("row 3: \x1b]0;mine\x07 [/b]")

    monkeypatch.setattr("refscale.cli.load_config", fail)
    assert main(["config", "show", "c.yaml", *debug]) == (2 if error is ConfigError else 1)
    err = capsys.readouterr().err
    said = r"row 3: \x1b]0;mine\x07 [/b]"
    assert not set("\x07\x1b") & set(err) and said in err.splitlines()[-1]
    traced = [line for line in err.splitlines() if line.endswith(f"{error.__name__}: {said}")]
    assert len(traced) == len(debug)


def test_status_of_a_strangers_run_cannot_drive_the_terminal(run, capsys):
    path = Path(run.uri) / "scores/MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "finished": "now\n\x1b]0;mine\x07"}))
    assert r"(finished now\n\x1b]0;mine\x07)" in status(run, capsys)[1]


def test_validate_names_no_line_where_a_file_has_none(config, capsys):
    rows = [*string_pairs(10), {"prompt": "p", "chosen": "a", "rejected": "a"}]
    (config.parent / "pairs.json").write_text(json.dumps(rows))
    override = ["--set", "corpus.sources=[{path: pairs.json}]"]
    assert main(["validate", str(config), *override, "--set", "corpus.max_bad_fraction=1"]) == 0
    assert "pairs.json, row 10: identical_pair" in capsys.readouterr().out


def test_validate_ends_with_exit_code_3_when_too_much_is_refused(config, capsys):
    with (config.parent / "pairs.jsonl").open("ab") as file:
        file.write(b"not json\n")
    assert main(["validate", str(config)]) == 3
    assert "bad_json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nomodel", "model.model_name_or_path: folder {folder}/nomodel does not exist"),
        ("path/to/ckpt", "there is no folder path/to/ckpt beside the config, so it was taken for"),
    ],
)
def test_a_missing_model_folder_is_not_a_riddle_of_the_hub(config, capsys, name, said):
    assert main(["validate", str(config), "--set", f"model.model_name_or_path={name}"]) == 1
    assert said.format(folder=config.parent) in capsys.readouterr().err


def test_validate_starts_no_ray(config):
    code = (
        "import sys; from refscale.cli import main;"
        f" code = main(['validate', {str(config)!r}]);"
        " print(code, 'ray' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip().splitlines()[-1] == "0 False"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_bench_lists_the_benchmarks_with_what_each_answers(capsys, arguments):
    assert main(["bench", *arguments]) == 0
    listed = capsys.readouterr().out
    scripts = (Path(__file__).resolve().parents[2] / "benchmarks").glob("bench_*.py")
    for name in (path.stem.removeprefix("bench_") for path in scripts):
        assert re.search(rf"^  {name} +\w.*[.?]$", listed, re.MULTILINE)
    assert re.search(r"^  compare +Does the selection help\?", listed, re.MULTILINE)


def test_a_benchmark_that_is_none_is_exit_code_2_and_names_the_others(capsys):
    assert main(["bench", "speed"]) == 2
    assert "no benchmark 'speed'; known: audit, cluster, compare" in capsys.readouterr().err


def stage(run, name, fingerprint, *, rows=10, seconds=2.0, counts=None, done=True):
    """A stage's folder with a shard of `rows` rows; its identity if it is done."""
    folder = StageFolder(run, name)
    folder.begin(fingerprint, restart=run.exists(f"{name}/STAGE.json"))
    record = folder.commit_shard("shard-0", pa.table({"x": list(range(rows))}))
    if done:
        made = folder.finish(fingerprint, [record], counts=counts or {}, seconds=seconds)
        return made["identity"]


@pytest.fixture
def run(tmp_path):
    """The folders of a run whose training is done."""
    run = Store(tmp_path / "run")
    run.write_bytes("config.yaml", b"")
    corpus = stage(run, "corpus", {})
    scores = stage(run, "scores", {"corpus": corpus})
    selection = stage(run, "selection", {"scores": scores})
    stage(run, "policy", {"selection": selection}, rows=0, counts={"steps": 30})
    return run


def status(run, capsys):
    assert main(["status", run.uri]) == 0
    return capsys.readouterr().out.splitlines()


def test_status_says_how_far_each_stage_is(run, capsys):
    lines = status(run, capsys)
    assert lines[1].startswith("score     done: 10 rows in 2.0 s, 5.0 rows/s (finished ")
    assert lines[3].startswith("train     done: 30 steps in 2.0 s (finished ")
    assert lines[4:] == ["evaluate  not done", "next: refscale evaluate"]


def test_status_of_what_is_being_worked_on_counts_what_there_is(run, capsys):
    corpus = StageFolder(run, "corpus")
    corpus.begin({}, restart=True)
    for i in range(3):
        corpus.part("fragments").commit_bytes(f"unit-{i}", ".arrow", b"x", rows=1)
    StageFolder(run, "policy").begin({}, restart=True)
    stage(run, "scores", {"corpus": "x"}, done=False)
    lines = status(run, capsys)
    assert lines[0] == "prepare   unfinished, 3 unit(s) read, 0 shard(s) done"
    assert lines[1] == "score     unfinished, 1 shard(s) done"
    assert lines[3] == "train     begun"
    StageFolder(run, "training").begin({})
    run.write_bytes("training/log.jsonl", b'{"step": 7, "max_steps": 20}\n')
    assert status(run, capsys)[3] == "train     unfinished, step 7 of 20"
    run.write_bytes("training/log.jsonl", b'{"step"')
    assert status(run, capsys)[3] == "train     unfinished, its log is damaged"


def test_status_tells_a_stage_that_was_made_from_another_one(run, capsys):
    stage(run, "corpus", {"seed": 1})
    lines = status(run, capsys)
    assert lines[1].startswith("score     STALE: made from another corpus/; 10 rows")
    assert lines[-1] == "next: refscale score --restart"
    assert lines[2].startswith("select    STALE: made from scores/, which is stale; 10 rows")
    assert lines[3].startswith("train     STALE: made from selection/, which is stale; 30 steps")


def test_status_names_damage_and_an_unreadable_manifest(run, capsys):
    run.write_bytes("selection/shard-0.parquet", b"cut")
    run.write_bytes("scores/MANIFEST.json", b"{")
    lines = status(run, capsys)
    assert lines[1].startswith("score     DAMAGED: scores/MANIFEST.json")
    assert lines[2].startswith("select    DAMAGED: shard-0.parquet; 10 rows")
    assert lines[-1] == "next: refscale score"


def test_a_report_of_before_is_not_the_end(run, capsys):
    manifests = {name: StageFolder(run, name).require() for name in ("policy", "scores")}
    parents = {name: manifest["identity"] for name, manifest in manifests.items()}
    stage(run, "evaluation", parents)
    run.write_bytes("report.html", b"")
    run.write_json("report.json", {"finished": "2026-01-01T00:00:00Z"})
    assert status(run, capsys)[-1] == "next: refscale report"
    run.write_json("report.json", {"finished": "9999-01-01T00:00:00Z"})
    assert status(run, capsys)[-1] == "complete"


def test_validate_of_a_corpus_of_which_nothing_is_left_fails(config, capsys):
    assert main(["validate", str(config), "--set", "corpus.sources.0.weight=1e-9"]) == 2
    assert "no pair is left of the 10 rows: 0 were refused, 10 left" in capsys.readouterr().err
