"""MT-Bench end to end on Ray: a real tiny model answers, and one that really generates judges."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from judge_server import JudgeServer, Reply

from refscale.config import parse_config
from refscale.evaluation.generation import Generator, GeneratorSettings
from refscale.evaluation.judge import judge_config
from refscale.evaluation.mtbench import run_mtbench
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """Address of an OpenAI-compatible server of somebody else's, with the tiny model behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def run(tmp_path, tiny_model):
    """A run folder whose policy is finished, and its config."""
    store = Store(tmp_path / "run")
    policy = StageFolder(store, "policy")
    policy.begin({"made": "here"})
    shutil.copytree(tiny_model, tmp_path / "run" / "policy", dirs_exist_ok=True)
    policy.finish({"made": "here"}, policy.adopt(), counts={}, seconds=0.0)
    config = {
        "model": {"model_name_or_path": str(tiny_model), "dtype": "float32"},
        "corpus": {"sources": [{"path": "unused.jsonl"}]},
    }
    return parse_config(config), store


def test_a_judge_that_talks_nonsense_and_rate_limits_loses_nothing(run, tiny_model, ray_session):
    config, store = run
    generator = Generator(
        GeneratorSettings(str(tiny_model), dtype="float32", max_new_tokens=4, num_threads=1)
    )

    def script(number, request):
        if number % 10 == 3:
            return Reply(status=429, headers={"Retry-After": "0.01"})
        # The tiny model's context is short: it hears the end of what it is told.
        heard = [{"role": "user", "content": request["messages"][-1]["content"][-200:]}]
        return generator.reply([heard], temperature=0, seed=0)[0].text

    with JudgeServer(script) as server:
        judge = server.config(concurrency=1, timeout_s=60)
        result = run_mtbench(config, store.uri, judge, max_new_tokens=6, batch_size=8)
        asked = len(server.requests)
        answers = store.read_json("mtbench/policy/MANIFEST.json")
        # Policy and reference are one model here and answer alike, so half the ratings are cached:
        # 16 questions x 2 turns rated, and as many compared: both orders are the same request.
        assert result["usage"]["requests"] == 32 + 32
        assert asked == 64 + result["usage"]["retries"] and result["usage"]["retries"] >= 6
        for scores in (*result["single"].values(), result["pairwise"]):
            overall = scores["overall"]
            assert (overall["n"], overall["unparsable"], overall["failed"]) == (0, 32, 0)
        text = store.read_bytes("mtbench/policy-single.jsonl").decode()
        rows = [json.loads(line) for line in text.split("\n") if line]
        assert len(rows) == 32 and all(
            row["score"] is None and row["error"] is None for row in rows
        )
        assert all(isinstance(row["judgment"], str) for row in rows)
        assert result["answers"]["policy"] == result["answers"]["reference"]

        again = run_mtbench(config, store.uri, judge, max_new_tokens=6, batch_size=8)
        assert len(server.requests) == asked
        assert {**again, "usage": None} == {**result, "usage": None}
        assert store.read_json("mtbench/policy/MANIFEST.json") == answers


def test_transformers_serve_judges(run, tiny_model, served, ray_session):
    config, store = run
    judge = judge_config(base_url=served, model=str(tiny_model), max_tokens=4, concurrency=2)
    result = run_mtbench(config, store.uri, judge, max_new_tokens=6, batch_size=8)
    usage = result["usage"]
    assert usage["requests"] == 64 and usage["failed"] == usage["without_counts"] == 0
    assert 0 < usage["completion_tokens"] <= 4 * usage["requests"] < usage["prompt_tokens"]
    for scores in (*result["single"].values(), result["pairwise"]):
        overall = scores["overall"]  # random weights say nothing that can be read as a verdict
        assert (overall["n"], overall["unparsable"], overall["failed"]) == (0, 32, 0)
    again = run_mtbench(config, store.uri, judge, max_new_tokens=6, batch_size=8)
    assert again["usage"]["requests"] == 0 < again["usage"]["cached"]
    assert {**again, "usage": None} == {**result, "usage": None}
