"""`refscale submit` against a cluster of two nodes on loopback, token authentication on.

The cluster is this test's own: its ports are free ones, its files are in a folder of its own, and
only the processes started here are ended.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import requests
import yaml
from support import string_pairs, write_jsonl

from refscale import demo, pipeline
from refscale.config import Config
from refscale.config_file import load_config
from refscale.run import Run
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "loopback-cluster-token-0123456789abcdef"
CANARY = "canary-5d1f3a-must-not-leave-this-process"


@dataclass
class LoopbackCluster:
    dashboard: str
    folder: Path
    env: dict

    def command(self, *arguments: str, stage: str = "prepare") -> list[str]:
        code = (
            "import json, sys\n"
            "from refscale.errors import RefscaleError\n"
            "from refscale.cluster.submission import submit\n"
            "args = json.loads(sys.argv[1])\n"
            "try:\n"
            "    address, stage = args[2], args[3]\n"
            "    sys.exit(submit(args[0], args[1], args[4:], address=address, stage=stage))\n"
            "except RefscaleError as exc:\n"
            "    print(exc, file=sys.stderr); sys.exit(exc.exit_code)\n"
        )
        config, run_dir, *overrides = arguments
        words = [config, run_dir, self.dashboard, stage, *overrides]
        return [sys.executable, "-c", code, json.dumps(words)]

    def submit(
        self, *arguments: str, stage: str = "prepare", timeout_s: float = 300, **env: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments, stage=stage),
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def driver_of(self, stage: str, run_dir: str) -> psutil.Process:
        """The process on the cluster that runs a submitted stage of a run."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:4] == ["-m", "refscale.cli", stage] and run_dir in words:
                return process
        raise AssertionError(f"no driver of {stage} of {run_dir}")

    def get(self, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return requests.get(f"{self.dashboard}{path}", headers=headers, timeout=10)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _node(arguments: list[str], folder: Path, env: dict, log: Path) -> subprocess.Popen:
    agent, client, metrics = _free_ports(3)
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        *arguments,
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=80000000",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        "--block",
    ]
    if "--head" in arguments:
        command.append(f"--ray-client-server-port={client}")
    with open(log, "w") as output:
        # A session of its own: Ctrl-C on the tests does not reach it, the fixture ends it.
        return subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )


def _said(logs: Path) -> str:
    return "".join(f"{log.name}: {log.read_text()}" for log in sorted(logs.glob("*.log")))


def _wait_for_nodes(cluster: LoopbackCluster, count: int, nodes: list, logs: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert all(node.poll() is None for node in nodes), _said(logs)
        try:
            alive = cluster.get("/nodes?view=summary").json()["data"]["summary"]
            if sum(node["raylet"]["state"] == "ALIVE" for node in alive) == count:
                return
        except (requests.RequestException, KeyError, ValueError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"no cluster of {count} nodes: {_said(logs)}")


def _start(nodes: list, folder: Path, env: dict, logs: Path) -> LoopbackCluster:
    """A head and a second node, added to `nodes` as they are started."""
    port, dashboard = _free_ports(2)
    found = LoopbackCluster(f"http://127.0.0.1:{dashboard}", folder, env)
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    nodes.append(_node(head, folder, env, logs / "head.log"))
    _wait_for_nodes(found, 1, nodes, logs)
    # Its own folder, as on a machine of its own: nodes that share one unpack a job's files over
    # each other's.
    worker = [f"--address=127.0.0.1:{port}"]
    nodes.append(_node(worker, folder / "w", env, logs / "worker.log"))
    _wait_for_nodes(found, 2, nodes, logs)
    return found


def _end(nodes: list) -> None:
    """End the nodes and what they started, by process id."""
    started = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    started += [child for parent in started for child in parent.children(recursive=True)]
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Unix sockets below it may not be longer than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    logs = tmp_path_factory.mktemp("nodes")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_TOKEN"))}
    env = {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Each process costs seconds here; none is started before it is asked for.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    nodes: list = []
    try:
        for attempt in "abcdef":
            try:
                found = _start(nodes, folder / attempt, env, logs)
                break
            except AssertionError:
                # Beside other tests a raylet can need longer than the 30 s that Ray gives it, and a
                # port that was free be taken.
                _end(nodes)
                nodes.clear()
                if attempt == "f":
                    raise
        yield found
    finally:
        _end(nodes)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def config(tmp_path, tiny_model) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", string_pairs(30))
    values = {
        "model": {"model_name_or_path": str(tiny_model)},
        "corpus": {"sources": [{"path": "pairs.jsonl"}], "shard_pairs": 100},
        "encoding": {"max_length": 128},
        # Of the submitter's machine; inside the cluster it would be wrong.
        "ray": {"address": "127.0.0.1:1"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_job_runs_streams_its_log_resumes_and_shows_no_secret(cluster, config, tmp_path):
    run = tmp_path / "run"
    first = cluster.submit(str(config), str(run), HF_TOKEN=CANARY, WANDB_API_KEY=CANARY)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "corpus" in first.stdout  # the stage's own table, from the job's log
    manifest = json.loads((run / "corpus/MANIFEST.json").read_text())
    assert manifest["rows"] == 30

    again = cluster.submit(str(config), str(run), HF_TOKEN=CANARY, WANDB_API_KEY=CANARY)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done before (30 rows), skipped" in again.stdout

    jobs = cluster.get("/api/jobs/").json()
    submitted = [job for job in jobs if job["type"] == "SUBMISSION"]
    assert len(submitted) == 2
    for job in submitted:
        assert list(job["runtime_env"]) == ["working_dir"]
        assert "RAY_AUTH" not in json.dumps(job)
    seen = json.dumps(jobs) + first.stdout + first.stderr
    seen += "".join(cluster.get(f"/api/jobs/{job['submission_id']}/logs").text for job in submitted)
    for secret in (CANARY, TOKEN):
        assert secret not in seen
    files = [p for root in (run, cluster.folder) for p in root.rglob("*") if p.is_file()]
    assert len(files) > 10  # the run's files and Ray's logs are among them
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_the_exit_code_is_that_of_the_job(cluster, config, tmp_path):
    # Known on the nodes only: here the config is well-formed.
    override = "corpus.sources.0.path=absent.jsonl"
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9", "RAY_ADDRESS": "127.0.0.1:9"}
    done = cluster.submit(str(config), str(tmp_path / "run"), override, **elsewhere)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "absent.jsonl" in done.stdout


def test_a_wrong_token_is_one_line_and_no_job(cluster, config, tmp_path):
    before = len(cluster.get("/api/jobs/").json())
    refused = cluster.submit(str(config), str(tmp_path / "run"), RAY_AUTH_TOKEN="wrong" * 8)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert "cannot submit the job" in last and "RAY_AUTH_TOKEN" in last
    assert "Traceback" not in refused.stderr
    assert len(cluster.get("/api/jobs/").json()) == before


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of this checkout whose refscale has a version of its own, and junk beside it."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "refscale", copy / "refscale")
    shutil.copytree(ROOT / "jobs", copy / "jobs")
    shutil.copy(ROOT / ".gitignore", copy)
    version = copy / "refscale/__init__.py"
    version.write_text(version.read_text() + '__version__ = "0.0+checkout"\n')
    for junk in (".git/objects/a", ".venv/lib/a", "runs/a", "demo/a", "refscale/__pycache__/a"):
        (copy / junk).parent.mkdir(parents=True, exist_ok=True)
        (copy / junk).write_text("junk")
    return copy


def _ray_job_submit(cluster, working_dir: Path, *entry_point: str) -> subprocess.CompletedProcess:
    """The command line of README.md, typed into `working_dir`."""
    return subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", *entry_point],
        cwd=working_dir,
        env={**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_ray_job_submit_without_the_package_runs_the_installed_one_and_fails_as_the_job_does(
    cluster, checkout
):
    shutil.rmtree(checkout / "refscale")
    (checkout / "config.yaml").write_text("modle: {}\n")
    done = _ray_job_submit(cluster, checkout, "jobs/pipeline.py", "config.yaml", "--run-dir", "r")
    assert done.returncode != 0
    assert "did you mean" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


@pytest.mark.timeout(600)
def test_a_killed_job_resubmitted_by_ray_job_submit_does_the_rest_and_selects_as_an_embedded_run(
    cluster, config, checkout, s3, tmp_path, ray_session
):
    shown = "ray job submit --working-dir . -- python jobs/pipeline.py config.yaml --run-dir s3://"
    assert all(shown in (ROOT / page).read_text() for page in ("README.md", "docs/cluster.md"))
    values = yaml.safe_load(config.read_text())
    values["corpus"]["sources"][0]["path"] = str(tmp_path / "pairs.jsonl")
    values["corpus"]["shard_pairs"] = 3
    values["train"] = {"deepspeed": None, "max_steps": 1}
    config.write_text(yaml.safe_dump(values))
    del values["ray"]  # a driver on the cluster finds it by itself
    (checkout / "config.yaml").write_text(yaml.safe_dump(values))
    run_dir = s3.uri("submitted")
    store, loaded = Store(run_dir), load_config(str(config), ["ray.address=null"])
    pipeline.prepare(Run(store, loaded))

    done = _kill_after(3, cluster, s3, config, run_dir, "score", tmp_path / "killed.log")
    entry_point = ("jobs/pipeline.py", "config.yaml", "--run-dir", run_dir)
    again = _ray_job_submit(cluster, checkout, *entry_point)
    assert again.returncode == 0, again.stdout + again.stderr
    scored = _scored(s3)
    assert len(scored) == 7 and not done & scored
    assert store.exists("policy/model.safetensors") and store.exists("report.html")
    kept = [_selected(store), _selected_embedded(loaded, tmp_path / "embedded")]
    assert kept[0] == kept[1] and kept[0].num_rows == 15

    # The code that travelled ran, not what is installed on the nodes; no junk travelled with it.
    stages = ("scores", "selection", "policy", "evaluation")
    manifests = [StageFolder(store, stage).require() for stage in stages]
    assert {manifest["versions"]["refscale"] for manifest in manifests} == {"0.0+checkout"}
    sent = [path.parent for path in cluster.folder.rglob("_ray_pkg_*/config.yaml")]
    sent = [path for path in sent if (path / "jobs").is_dir()]
    files = [path for folder in sent for path in folder.rglob("*") if path.is_file()]
    assert sent and not [path for path in files if path.read_bytes() == b"junk"]


@pytest.mark.timeout(3600)
def test_the_demo_killed_and_resubmitted_on_s3_selects_as_an_embedded_run(
    cluster, s3, tmp_path, ray_session, request
):
    if not request.config.getoption("--demo"):
        pytest.skip("a real model on two cores, a quarter of an hour: --demo runs it")
    config = demo.write_demo(tmp_path / "demo")
    run_dir = s3.uri("demo")
    done = _kill_after(2, cluster, s3, config, run_dir, "run", tmp_path / "killed.log")
    again = cluster.submit(str(config), run_dir, stage="run", timeout_s=3000)
    print(again.stdout)
    assert again.returncode == 0, again.stdout + again.stderr
    scored = _scored(s3)
    assert len(scored) == 3 and not done & scored

    embedded = _selected_embedded(load_config(str(config)), tmp_path / "embedded")
    kept = _selected(Store(run_dir))
    assert kept["pair_id"] == embedded["pair_id"] and kept.num_rows == 120
    # The embedded replica has both cores, and sums of floats depend on the number of threads.
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        difference = pc.max(pc.abs(pc.subtract(kept[column], embedded[column]))).as_py()
        assert difference < 2e-3, column
    for name in ("policy/model.safetensors", "report.html", "evaluation/MANIFEST.json"):
        assert Store(run_dir).exists(name), name


def _scored(s3) -> set[str]:
    """The score shards whose records were put: with its record a shard counts."""
    paths = [path for method, path in s3.requests if method == "PUT"]
    found = (re.search(r"/scores/(shard-\d+)\.json", path) for path in paths)
    return {match[1] for match in found if match}


def _kill_after(shards: int, cluster, s3, config: Path, run_dir: str, stage: str, log: Path) -> set:
    """Submit, and kill the driver when so many score shards are there: their names.

    The store refuses the next record and all after it, so the job cannot have finished.
    """
    s3.requests.clear()
    s3.fail(10**6, when=lambda method, path: method == "PUT" and len(_scored(s3)) > shards)
    with open(log, "w") as output:
        job = subprocess.Popen(
            cluster.command(str(config), run_dir, stage=stage),
            env=cluster.env,
            stdout=output,
            stderr=output,
        )
        deadline = time.monotonic() + 600
        while len(_scored(s3)) <= shards:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        cluster.driver_of(stage, run_dir).kill()
        assert job.wait(120) != 0
    s3.heal()
    there = Store(run_dir).list_files("scores")
    done = {name for name in _scored(s3) if f"scores/{name}.json" in there}
    assert len(done) == shards
    s3.requests.clear()
    return done


def _selected_embedded(config: Config, run_dir: Path) -> pa.Table:
    """What a run of this process' own Ray selects."""
    run = Run(Store(run_dir), config)
    for stage in (pipeline.prepare, pipeline.score, pipeline.select):
        stage(run)
    return _selected(run.store)


def _selected(store: Store) -> pa.Table:
    folder = StageFolder(store, "selection")
    names = [file["name"] for file in folder.require()["files"] if "shard" in file["name"]]
    table = pa.concat_tables([folder.read_table(name) for name in names])
    return table.sort_by("pair_id")
