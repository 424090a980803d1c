"""What SECURITY.md promises and a bare process can show."""

import ast
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refscale import secrets
from refscale.cli import main
from refscale.cluster import submission
from refscale.config import TrainConfig, parse_config
from refscale.config_file import load_config
from refscale.errors import ConfigError, ModelError, RefscaleError, StorageError
from refscale.evaluation.generation import Generator, GeneratorSettings
from refscale.run import Run, claim
from refscale.scoring.reference import ReferenceModel
from refscale.storage.fingerprints import model_fingerprint
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store
from refscale.training.options import WorkerSettings
from refscale.training.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "refscale").rglob("*.py"))
CANARY = "hf_canary0123456789"
# Modules that exchange objects between processes of one run, never through a file.
_MESSAGES = ("pipeline.py", "runtime.py")


def make_config(**sections):
    values = {
        "model": {"model_name_or_path": "org/model"},
        "corpus": {"sources": [{"path": "s3://bucket/pairs.jsonl"}]},
        **sections,
    }
    return parse_config(values)


def calls(path):
    """Dotted names of everything that a module calls, with the call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_unpickled_and_no_text_evaluated(path):
    forbidden = re.compile(
        r"(^|\.)(pickle|cloudpickle|dill|joblib|marshal|shelve)\."
        r"|^(eval|exec|compile|__import__|os\.system|os\.popen)$|yaml\.(load|unsafe_load|full_load)$"
    )
    for name, node in calls(path):
        # Only what our own tasks hand to the driver, as Ray's own messages are.
        if path.name not in _MESSAGES or not name.endswith((".loads", ".dumps")):
            assert not forbidden.search(name), f"{path.name}:{node.lineno}: {name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("shell") != "True", f"{path.name}:{node.lineno}"
        assert keywords.get("allow_pickle") != "True", f"{path.name}:{node.lineno}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_remote_code_and_runtime_environments_are_never_switched_on_in_code(path):
    for name, node in calls(path):
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) != "True", f"{path.name}:{node.lineno}"
            if keyword.arg == "runtime_env":
                # One place, and nothing but the working folder in it.
                assert path.name == "submission.py" and name == "client.submit_job"
                assert [ast.literal_eval(key) for key in keyword.value.keys] == ["working_dir"]


def test_remote_code_is_off_by_default():
    assert make_config().model.trust_remote_code is False


def test_a_model_that_is_a_pickle_is_refused_wherever_one_is_loaded(tmp_path, tiny_model):
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"lm_head.weight": Payload()}, tmp_path / "pytorch_model.bin")
    for load in _loaders(str(tmp_path), None):
        with pytest.raises(ModelError, match="cannot load"):
            load()
    with pytest.raises(StorageError, match=r"holds no .*safetensors"):
        model_fingerprint(str(tmp_path), None)
    assert not (tmp_path / "executed").exists()


def test_pickled_adapters_are_refused_wherever_one_is_merged(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    whole = _loaders(str(tiny_model), str(tmp_path))
    for load in whole:
        load()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")  # a loader that took it would not fail
    (tmp_path / "adapter_model.safetensors").unlink()
    for load in whole:
        with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
            load()


def _loaders(model, adapter):
    """Every place that loads a model: to score, to train and to let it answer."""
    training = WorkerSettings(
        train=TrainConfig().model_dump(),
        model_name_or_path=model,
        adapter=adapter,
        selection_files=[],
        output_dir="",
        policy_dir="",
        max_length=64,
    )
    return [
        lambda: ReferenceModel.load(model, adapter=adapter, device="cpu"),
        lambda: load_policy(training, "cpu"),
        lambda: Generator(GeneratorSettings(model, adapter=adapter)),
    ]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside"])
def test_paths_that_leave_the_run_folder_are_refused(tmp_path, name):
    store = Store(tmp_path / "run")
    for use in (store.path, store.exists, store.read_bytes, store.delete, store.open_input):
        with pytest.raises(StorageError, match="leaves the run folder"):
            use(name)
    with pytest.raises(StorageError, match="leaves the run folder"):
        store.write_bytes(name, b"")
    assert not (tmp_path / "outside").exists()


def test_a_manifest_that_names_files_outside_is_refused(tmp_path):
    folder = StageFolder(Store(tmp_path), "scores")
    manifest = folder.finish({}, [folder.publish_bytes("a", b"x")], counts={}, seconds=0)
    manifest["files"][0]["name"] = "../../secret"
    (tmp_path / "scores/MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="outside"):
        folder.manifest()


# -- what is submitted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {"train": {"trl": {"hub_token": CANARY}}},
        {"train": {"trl": {"extra": {"wandb_api_key": CANARY}}}},
        {"train": {"deepspeed": {"aws_secret": CANARY}}},
    ],
)
def test_a_config_with_a_secret_is_not_submitted_and_the_secret_not_shown(section):
    with pytest.raises(ConfigError, match="holds a secret") as caught:
        secrets.refuse_secrets(make_config(**section), "s3://bucket/run")
    assert CANARY not in str(caught.value)


def test_uris_with_credentials_are_not_submitted():
    uri = f"s3://AKIA0123:{CANARY}@bucket/run"
    with pytest.raises(ConfigError, match="URI with credentials") as caught:
        secrets.refuse_secrets(make_config(), uri)
    assert CANARY not in str(caught.value)
    with pytest.raises(ConfigError, match=r"corpus\.sources\.0\.path is a URI with credentials"):
        config = make_config(corpus={"sources": [{"path": uri}]})
        secrets.refuse_secrets(config, "s3://bucket/run")


@pytest.mark.parametrize(
    "query",
    [
        f"sv=2024-11-04&sig={CANARY}",
        f"SIG={CANARY}",
        f"X-Amz-Credential={CANARY}&region=eu",
        f"X-Amz-Signature={CANARY}",
        f"X-Amz-Security-Token={CANARY}",
        f"token={CANARY}",
        f"secret_key={CANARY}",
        f"client_secret={CANARY}",
        f"AWSAccessKeyId={CANARY}",
        f"%73ig={CANARY}",
    ],
)
def test_uris_signed_in_their_query_are_refused_and_the_signature_not_shown(query):
    uri = f"abfs://account.blob.core.windows.net/container/run?{query}"
    with pytest.raises(ConfigError, match="--run-dir is a URI with credentials") as caught:
        secrets.refuse_secrets(make_config(), uri)
    assert CANARY not in str(caught.value)
    with pytest.raises(ConfigError, match=r"corpus\.sources\.0\.path is a URI with") as caught:
        secrets.refuse_secrets(make_config(corpus={"sources": [{"path": uri}]}), "run")
    assert CANARY not in str(caught.value)


def test_a_container_is_no_user_but_its_password_is_one():
    at = "account.dfs.core.windows.net/run"
    for scheme in ("abfs", "abfss", "ABFSS"):
        secrets.refuse_secrets(make_config(), f"{scheme}://container@{at}")
        with pytest.raises(ConfigError, match="a password") as caught:
            secrets.refuse_secrets(make_config(), f"{scheme}://container:{CANARY}@{at}")
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/run",
        "s3://bucket/run?endpoint_override=minio:9000&scheme=http&region=us-east-1",
        "abfs://container@account.dfs.core.windows.net/run?credential_kind=environment&sv=1",
    ],
)
def test_names_that_only_look_like_secrets_pass(uri):
    config = make_config(
        train={"trl": {"include_num_input_tokens_seen": "all", "hub_token": None}},
        score={"token_budget": 4096},
    )
    secrets.refuse_secrets(config, uri)


def test_a_run_folder_is_not_claimed_with_a_secret(tmp_path):
    config = make_config(train={"trl": {"hub_token": CANARY}})
    with pytest.raises(ConfigError, match="holds a secret"):
        claim(Run(Store(tmp_path / "run"), config))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", ["compare", "mtbench"])
def test_the_commands_around_a_run_write_and_show_no_secret(tmp_path, capsys, command):
    values = {
        "model": {"model_name_or_path": "org/model"},
        "corpus": {"sources": [{"path": "pairs.jsonl"}]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"]
    arguments = [command, str(path), *judge, "--run-dir"]
    run = tmp_path / "run"
    secret = ["--set", f"train.trl.hub_token={CANARY}"]
    assert main([*arguments, str(run), *secret]) == 2
    assert "train.trl.hub_token holds a secret" in capsys.readouterr().err
    assert not run.exists()
    assert main([*arguments, f"abfs://account.blob.core.windows.net/c/run?sig={CANARY}"]) == 2
    said = capsys.readouterr().err
    assert "the query's sig" in said and CANARY not in said


def test_what_is_staged_is_the_config_and_the_package_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    source = tmp_path / "here"
    source.mkdir()
    (source / "pairs.jsonl").write_text("{}\n" * 1000)
    (source / "config.yaml").write_text(
        "model: {model_name_or_path: org/model}\n"
        "corpus: {sources: [{path: pairs.jsonl}]}\n"
        "ray: {address: '10.0.0.1:6379'}\n"
    )
    config = load_config(str(source / "config.yaml"))
    staged = tmp_path / "staged"
    staged.mkdir()
    submission.stage_job(config, staged)
    files = [path for path in staged.rglob("*") if path.is_file()]
    assert {path.relative_to(staged).parts[0] for path in files} == {"config.yaml", "refscale"}
    assert not [path for path in files if path.suffix in (".pyc", ".safetensors")]
    assert "pairs.jsonl" not in {path.name for path in files}
    # Ray's limit for a working folder is far above; corpus and model must never be in it.
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    values = yaml.safe_load((staged / "config.yaml").read_text())
    assert values["corpus"]["sources"][0]["path"] == str(source / "pairs.jsonl")
    # An address of the submitter's network means nothing inside the cluster.
    assert values["ray"]["address"] is None
    assert submission.paths_on_nodes(config, "s3://bucket/run") == [str(source / "pairs.jsonl")]


def test_the_entry_point_quotes_what_a_shell_would_read():
    command = submission.entry_point("s3://bucket/a b;rm -rf ~", "run")
    assert command.endswith("--run-dir 's3://bucket/a b;rm -rf ~'")


def test_the_token_is_used_when_there_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # so that what the code sets is taken back
    monkeypatch.delenv("RAY_AUTH_MODE")
    submission._enable_token()
    assert "RAY_AUTH_MODE" not in os.environ
    assert "accepts anyone's" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    submission._enable_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    submission._enable_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert CANARY not in capsys.readouterr().err


def test_a_jobs_log_cannot_drive_the_terminal(monkeypatch, capsys):
    pieces = iter([["one\x1b[2J\n", "50%\r100%\n"], ["one\x1b[2J\n50%\r100%\n", "two\n"]])

    async def tail(client, job, show):
        seen = 0
        for text in next(pieces):
            seen = show(text, seen)
        if text != "two\n":
            raise ConnectionError("lost")

    monkeypatch.setattr(submission, "_tail", tail)
    states = iter(["RUNNING", "SUCCEEDED"])
    monkeypatch.setattr(submission, "_poll", lambda client, job, what: next(states))
    monkeypatch.setattr(submission, "_RECONNECT_S", 0.0)
    monkeypatch.setattr(submission, "_ray_errors", lambda: (ConnectionError,))
    submission._follow(None, "job")
    assert capsys.readouterr().out == "one\\x1b[2J\n50%\n100%\ntwo\n"


class Connections:
    """Ray's client, of scripted answers: an error is raised, others are the log or the state."""

    def __init__(self, logs, states):
        self.logs, self.states = iter(logs), iter(states)

    async def tail_job_logs(self, job):
        for piece in next(self.logs):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, job):
        state = next(self.states)
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(status=state, driver_exit_code=3, message="its reason")


LOST = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
DOWN = ConnectionError("refused")


@pytest.mark.parametrize(
    ("logs", "states"),
    [
        # The dashboard is still down when it is asked.
        ([["one\n", LOST], ["one\ntwo\n"]], [DOWN, DOWN, "RUNNING", "SUCCEEDED"]),
        # Every close code but 1006 looks like the log's end.
        ([["one\n"], ["one\n", "two\n"]], ["RUNNING", "SUCCEEDED"]),
        # The job ends while the connection is lost, and its last lines are not yet seen.
        ([["one\n", LOST], [LOST], ["one\ntwo\n"]], ["RUNNING", "SUCCEEDED", "SUCCEEDED"]),
        # They cannot be seen any more.
        ([["one\ntwo\n", LOST], [LOST]], ["SUCCEEDED", "SUCCEEDED"]),
    ],
    ids=["dashboard down", "closed normally", "ended meanwhile", "log gone"],
)
def test_a_lost_connection_ends_neither_the_log_nor_the_job(monkeypatch, capsys, logs, states):
    monkeypatch.setattr(submission, "_RECONNECT_S", 0.0)
    client = Connections(logs, states)
    submission._follow(client, "job-1")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert list(client.states) == list(client.logs) == []


def test_a_cluster_that_stays_away_is_given_up_with_the_way_back(monkeypatch, capsys):
    monkeypatch.setattr(submission, "_RECONNECT_S", 0.01)
    monkeypatch.setattr(submission, "_ANSWERS_WITHIN_S", 0.05)
    client = Connections([[LOST]], itertools.repeat(DOWN))
    with pytest.raises(RefscaleError, match=r"refused.* gave up .*`ray job logs -f job-1`"):
        submission._follow(client, "job-1")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("cannot ask for job job-1: refused") == said.count("trying again for") == 1


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("STOPPED", 130), ("FAILED", 3)])
def test_the_exit_code_waits_for_a_dashboard_that_is_away(monkeypatch, state, code):
    monkeypatch.setattr(submission, "_RECONNECT_S", 0.0)
    assert submission._exit_code(Connections([], [DOWN, *[state] * 3]), "job-1") == code


def test_wrong_stages_are_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(ConfigError, match="known: run, prepare"):
        submission.submit("absent.yaml", str(tmp_path), stage="prepair")
    with pytest.raises(ConfigError, match="name it with --stage"):
        submission.submit("absent.yaml", str(tmp_path), restart=True)


# -- what is printed -----------------------------------------------------------------------------


def test_rich_is_given_no_bare_text():
    """A string would be markup to it, and its controls would reach the terminal."""
    seen = set()
    for path in SOURCES:
        for name, node in calls(path):
            given = [ast.unparse(argument) for argument in node.args]
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            escaped = all(text.startswith(("literal(", "*map(literal, ")) for text in given)
            where = f"{path.name}:{node.lineno}"
            if name.endswith("console.print"):
                assert given == ["table"] or escaped, where
            elif name == "table.add_row":
                assert escaped, where
            elif name == "TextColumn":
                assert keywords.get("markup") == "False", where
            else:
                continue
            seen.add(name)
    assert seen == {"console.print", "table.add_row", "TextColumn"}
