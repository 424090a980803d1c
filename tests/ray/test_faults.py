"""Everything that goes wrong in a long run: afterwards nothing is lost, doubled or mixed.

Each test disturbs a run of prepare, score and select, repeats the same commands, and compares every
published file with those of a run that nothing disturbed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import yaml
from support import save_tiny_llama, string_pairs, write_jsonl

from refscale.cli import main
from refscale.scoring import shard_scoring
from refscale.storage.locks import LOCK, RunLock
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

pytestmark = pytest.mark.ray

# Workers cannot import the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STAGES = ("prepare", "score", "select")
PAIRS = 240


def write_config(folder, model, rows=None):
    write_jsonl(folder / "pairs.jsonl", rows or string_pairs(PAIRS))
    config = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "corpus": {"sources": [{"path": "pairs.jsonl"}], "shard_pairs": 30},
        "encoding": {"max_length": 256},
        "score": {"max_attempts": 2},
        # Two tasks at a time: each starts a process of Ray's, which imports before it works.
        "ray": {"replicas": 1, "cpus_per_task": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_stages(config, run, *options, stages=STAGES):
    """The exit code of the last command; stops at the first that fails."""
    for stage in stages:
        code = main([stage, str(config), "--run-dir", str(run), *options])
        if code:
            break
    return code


def published(run):
    """{stage: {file: sha256}} of a finished run, verified against the files themselves."""
    result = {}
    for stage in ("corpus", "scores", "selection"):
        folder = StageFolder(Store(run), stage)
        manifest = folder.require()
        assert folder.damaged(manifest) == []
        result[stage] = {file["name"]: file["sha256"] for file in manifest["files"]}
    return result


def scored_pairs(run):
    """The pair_ids of all score files that the manifest names."""
    folder = StageFolder(Store(run), "scores")
    names = [file["name"] for file in folder.require()["files"]]
    table = pa.concat_tables([folder.read_table(name) for name in names])
    return table["pair_id"].to_pylist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model, ray_session):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, tiny_model)
    assert run_stages(config, folder / "run") == 0
    files = published(folder / "run")
    assert len(files["scores"]) > 5
    pair_ids = scored_pairs(folder / "run")
    assert len(set(pair_ids)) == len(pair_ids) == PAIRS
    return config, folder / "run", files


@pytest.fixture
def copy(undisturbed, tmp_path):
    """The undisturbed run's config, and a copy of its folder to damage."""
    config, run, _ = undisturbed
    shutil.copytree(run, tmp_path / "run")
    return config, tmp_path / "run"


def wait_for(run, pattern, count, process, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while len(list(run.glob(pattern))) < count:
        assert process.poll() is None, "the driver ended before it could be disturbed"
        assert time.monotonic() < deadline, f"no {pattern} in {timeout_s} s"
        time.sleep(0.002)


_DRIVER = """
    import sys
    from refscale.cli import main
    from refscale.cluster.runtime import connect

    # Connected once: the processes of one stage serve the next.
    connect({address!r}, num_cpus=None, replicas=1, cpus_per_replica=1)
    for stage in {stages!r}:
        code = main([stage, {config!r}, "--run-dir", {run!r}])
        if code:
            sys.exit(code)
"""


def start_driver(config, run):
    address = ray.get_runtime_context().gcs_address
    code = textwrap.dedent(_DRIVER).format(
        stages=STAGES, config=str(config), run=str(run), address=address
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def disturb(config, run, pattern, count, number):
    """Signal a driver once the run has `count` such files; the driver, and what it said."""
    assert len(list(run.glob(pattern))) < count, f"{pattern}: an earlier driver did it all"
    driver = start_driver(config, run)
    wait_for(run, pattern, count, driver)
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=60)
    return driver, errors


def test_a_run_killed_in_each_of_its_stages_is_resumed_by_the_same_command(undisturbed, tmp_path):
    config, _, files = undisturbed
    run = tmp_path / "run"
    for pattern, count in (
        ("corpus/fragments/unit-*.json", 1),
        ("corpus/shard-*.parquet", 3),
        ("scores/shard-*.json", 2),
        ("selection/STAGE.json", 1),
    ):
        driver, _ = disturb(config, run, pattern, count, signal.SIGKILL)
        assert driver.returncode == -signal.SIGKILL
    assert run_stages(config, run) == 0
    assert published(run) == files


def test_a_driver_told_to_stop_while_it_scores_is_resumed_by_the_same_command(undisturbed, copy):
    config, run = copy
    for stage in ("scores", "selection"):
        shutil.rmtree(run / stage)
    driver, errors = disturb(config, run, "scores/shard-*.json", 1, signal.SIGTERM)
    assert driver.returncode == 130, errors
    assert "the same command resumes" in errors and not (run / LOCK).exists()
    assert run_stages(config, run) == 0
    assert published(run) == undisturbed[2]


class Dying(shard_scoring.ShardScorer):
    """Dies at the third shard of a replica's life, the first time that happens anywhere."""

    marker = ""

    def __call__(self, item):
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 3:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return super().__call__(item)


def test_scoring_actor_that_dies_loses_nothing(undisturbed, tmp_path, monkeypatch):
    config, _, files = undisturbed
    marker = str(tmp_path / "died")
    monkeypatch.setattr(shard_scoring, "ShardScorer", type("Dying", (Dying,), {"marker": marker}))
    assert run_stages(config, tmp_path / "run") == 0
    assert os.path.exists(marker)
    assert published(tmp_path / "run") == files


class DyingAlways(shard_scoring.ShardScorer):
    def __call__(self, item):
        os._exit(1)


def test_scoring_actor_that_always_dies_is_an_error_and_the_run_resumes(
    undisturbed, tmp_path, monkeypatch, capsys
):
    config, _, files = undisturbed
    with monkeypatch.context() as patch:
        patch.setattr(shard_scoring, "ShardScorer", DyingAlways)
        assert run_stages(config, tmp_path / "run") == 1
    assert "worker process failed" in capsys.readouterr().err
    assert run_stages(config, tmp_path / "run") == 0
    assert published(tmp_path / "run") == files


@pytest.mark.parametrize("stage", ["corpus", "scores", "selection"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_shard_is_redone(undisturbed, copy, stage, damage):
    config, run = copy
    files = undisturbed[2]
    victim = sorted(name for name in files[stage] if name.endswith(".parquet"))[1]
    path = run / stage / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    untouched = run / "scores" / sorted(files["scores"])[3]
    written = untouched.stat().st_mtime_ns
    assert main(["status", str(run)]) == 0
    assert run_stages(config, run) == 0
    assert published(run) == files
    assert untouched.stat().st_mtime_ns == written


def test_flipped_byte_stops_a_stage_that_reads_it(undisturbed, copy, capsys):
    config, run = copy
    victim = run / "scores" / sorted(undisturbed[2]["scores"])[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 0x20
    victim.write_bytes(data)
    assert run_stages(config, run, "--restart", stages=["select"]) == 1
    assert victim.name in capsys.readouterr().err


def refusal(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("refscale: ")]
    return line


def test_changed_corpus_file_is_refused_by_name(undisturbed, copy, tmp_path, capsys):
    config, run = copy
    text = (config.parent / "pairs.jsonl").read_text()
    shutil.copytree(config.parent, tmp_path / "changed", ignore=shutil.ignore_patterns("run"))
    changed = tmp_path / "changed"
    (changed / "pairs.jsonl").write_text(text.replace("red", "rad", 1))
    assert run_stages(changed / "config.yaml", run) == 1
    line = refusal(capsys)
    assert "corpus/" in line and "sources" in line and "another --run-dir" in line
    assert published(run) == undisturbed[2]


def test_other_model_is_refused_by_name(undisturbed, copy, tmp_path, capsys):
    config, run = copy
    other = save_tiny_llama(tmp_path / "other", seed=1)
    assert run_stages(config, run, "--set", f"model.model_name_or_path={other}") == 1
    assert "made with model.model.safetensors = " in refusal(capsys)
    assert published(run) == undisturbed[2]


def test_second_driver_is_refused(copy, capsys):
    config, run = copy
    with RunLock(Store(run)):
        assert run_stages(config, run) == 1
    assert f"in use by process {os.getpid()}" in refusal(capsys)


def test_full_disk_is_an_error_and_the_run_resumes(undisturbed, tmp_path, capsys):
    config, _, files = undisturbed
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert run_stages(config, disk / "run") == 1
        assert "no space left to write" in refusal(capsys)
        assert not list(disk.rglob("MANIFEST.json")) or not list(disk.rglob("selection/M*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_stages(config, disk / "run") == 0
        assert published(disk / "run") == files
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_pairs_that_cannot_be_scored_are_counted_listed_and_left_out(
    undisturbed, tmp_path, ray_session
):
    """A model whose embedding of "~" is not a number: its pairs go, their neighbours stay."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_tiny_llama(tmp_path / "model")
    loaded, tokenizer = (
        cls.from_pretrained(model) for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    with torch.no_grad():
        loaded.get_input_embeddings().weight[tokenizer("~")["input_ids"][0]] = float("nan")
    loaded.save_pretrained(model)
    rows = string_pairs(PAIRS)
    bad = (3, 100, 101)
    for row in bad:
        rows[row]["rejected"] += "~x"
    config = write_config(tmp_path, model, rows)
    run = tmp_path / "run"
    assert run_stages(config, run) == 0
    manifest = StageFolder(Store(run), "scores").require()
    assert manifest["counts"] == {
        "pairs": PAIRS,
        "scored": PAIRS - 3,
        "unscorable": {"nonfinite_logp": 3},
    }
    listed = {x for file in manifest["files"] for x, _ in file["counts"]["unscorable"]}
    corpus = StageFolder(Store(run), "corpus")
    table = pa.concat_tables(
        [corpus.read_table(file["name"]) for file in corpus.require()["files"]]
    ).to_pylist()
    assert listed == {row["pair_id"].hex() for row in table if row["source_row"] in bad}
    assert not listed & {pair_id.hex() for pair_id in scored_pairs(run)}


_NODES = """
    import sys, threading, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    from refscale.cli import main
    from refscale.cluster.runtime import connect, disconnect

    run = Path({run!r})
    cluster = Cluster(
        initialize_head=True, head_node_args={{"num_cpus": 4, "include_dashboard": False}}
    )
    doomed = cluster.add_node(num_cpus=3)
    removed = []

    def remove():
        while len(list(run.glob("scores/shard-*.json"))) < 2:
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)
        removed.append(1)

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    connect(cluster.address, num_cpus=None, replicas=1, cpus_per_replica=1)
    # One CPU a task: what remains holds three replicas and a task.
    options = ["--run-dir", str(run), "--set", "ray.cpus_per_task=1"]
    options += ["--set", "ray.replicas={{min: 1, max: 3}}"]
    for stage in {stages!r}:
        code = main([stage, {config!r}, *options])
        if code:
            sys.exit(code)
    thread.join()
    print(len(removed))
    disconnect(force=True)
    cluster.shutdown()
"""


def test_removed_node_loses_nothing(undisturbed, copy):
    config, run = copy
    files = undisturbed[2]
    for stage in ("scores", "selection"):
        shutil.rmtree(run / stage)
    code = textwrap.dedent(_NODES).format(run=str(run), config=str(config), stages=STAGES[1:])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("1")
    assert published(run) == files


_ROOM = """
import subprocess
import threading

from ray.cluster_utils import Cluster

from refscale.cli import main

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
settings = [
    "train.num_workers=1", "train.deepspeed=null", "train.max_steps=1", "ray.cpus_per_worker=2",
    f"ray.address={{cluster.address}}",
]


def train(wait_s):
    options = [word for setting in settings for word in ("--set", setting)]
    wait = ["--set", f"ray.wait_for_room_s={{wait_s}}"]
    return main(["train", {config!r}, "--run-dir", {run!r}, *options, *wait])


def add_node():
    command = [{ray!r}, "start", f"--address={{cluster.address}}", "--num-cpus=2", "--block"]
    nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))


nodes = []
print(train(3))
threading.Timer(8, add_node).start()
print(train(300))
for node in nodes:
    node.terminate()
    node.wait()
"""


def test_a_training_waits_for_nodes_so_long_as_it_may(copy):
    config, run = copy
    command = str(Path(sys.executable).with_name("ray"))
    code = _ROOM.format(run=str(run), config=str(config), ray=command)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        # An attempt ends before the node is there.
        env={**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"},
    )
    assert result.stdout.split() == ["1", "0"], result.stderr
    assert result.stderr.count("waiting for nodes: train.num_workers is 1, of 2 CPU each") == 2
    assert result.stderr.count("the cluster has none now, so CPUs do the work") == 2
    assert "has room for 0 (1 CPU on 1 node(s)); ray.wait_for_room_s bounds" in result.stderr
    assert (run / "policy/MANIFEST.json").exists()


def test_whole_pipeline_on_an_object_store_with_passing_errors(undisturbed, s3):
    config, _, files = undisturbed
    run = s3.uri("whole")
    assert run_stages(config, run, stages=["prepare"]) == 0
    s3.fail(3)
    assert run_stages(config, run, stages=["score"]) == 0
    s3.fail(3, "500 Internal Server Error", "InternalError")
    assert run_stages(config, run, stages=["select"]) == 0
    assert published(run) == files
    assert not Store(run).exists(LOCK)
    # A damaged object is found and redone there too.
    victim = sorted(files["scores"])[1]
    Store(run).write_bytes(f"scores/{victim}", b"damaged")
    assert run_stages(config, run) == 0
    assert published(run) == files


def test_finished_run_is_left_as_it_is(undisturbed):
    config, run, files = undisturbed
    before = {path: path.stat().st_mtime_ns for path in Path(run).rglob("*.*") if path.is_file()}
    assert run_stages(config, run) == 0
    after = {path: path.stat().st_mtime_ns for path in Path(run).rglob("*.*") if path.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {run / "config.yaml"}
    assert json.loads((run / "scores/MANIFEST.json").read_text())["rows"] == PAIRS
    assert published(run) == files
