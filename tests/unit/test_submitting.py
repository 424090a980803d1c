"""`refscale submit` against a server that answers as Ray's dashboard does."""

import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from refscale.cli import main
from refscale.cluster import submission
from refscale.config_file import load_config


class Dashboard(BaseHTTPRequestHandler):
    """Accepts a job of each name once."""

    def log_message(self, *_):
        """Says nothing."""

    def answer(self, code, text):
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session": ""}
        self.answer(200, json.dumps(version))  # of a package: that it is there

    def do_POST(self):
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"]
        try:
            if name in self.server.jobs:
                raise ValueError(f"Job with submission_id {name} already exists. Use another one.")
        except ValueError:
            self.answer(400, traceback.format_exc())  # as Ray 2.60 answers
            return
        self.server.jobs.add(name)
        self.answer(200, json.dumps({"job_id": name, "submission_id": name}))


@pytest.fixture
def submit(tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {model_name_or_path: org/model}\ncorpus: {sources: [{path: pairs.jsonl}]}\n"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    server.jobs = set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    words = ["submit", str(config), "--run-dir", "s3://bucket/run", "--address", address]
    yield lambda *more: main([*words, "--submission-id", "first", *more])
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_job_server_answers_is_said_without_advice_on_its_address(submit, capsys):
    assert submit("--no-wait") == 0
    capsys.readouterr()
    assert submit("--no-wait") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "refscale: cannot submit the job: ValueError: Job with submission_id first already exists."
        " Use another one"
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("404: Job first does not exist.", "404: Job first does not exist"),
        ("502: <html>\n<body>Bad Gateway</body>\n</html>\n.", "502: <html>"),
    ],
    ids=["of Ray", "of a proxy"],
)
def test_an_answer_without_a_traceback_is_known_by_its_beginning(answer, said):
    exc = RuntimeError(f"Request failed with status code {answer}")
    expected = f"cannot ask for job first: Request failed with status code {said}"
    assert str(submission._explained("ask for job first", exc)) == expected


def test_a_server_that_does_not_answer_may_be_at_another_address():
    exc = ConnectionError("Failed to connect to Ray at address: http://127.0.0.1:9.")
    assert "is --address the dashboard's" in str(submission._explained("submit the job", exc))


def test_ctrl_c_says_that_the_job_goes_on_and_nothing_of_a_run_that_stopped(
    submit, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "_follow", interrupted)
    assert submit() == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("refscale: job first goes on without this terminal")
    assert "stopped" not in said and "`ray job stop first` ends it" in said


def test_a_clone_of_a_dataset_is_a_path_that_every_node_must_see(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {model_name_or_path: org/model}\n"
        "corpus: {sources: [{dataset: /data/clone}, {dataset: org/pairs}]}\n"
    )
    loaded = load_config(str(config))
    assert submission.paths_on_nodes(loaded, "s3://bucket/run") == ["/data/clone"]
