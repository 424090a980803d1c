"""Submitting a run to a Ray cluster: `refscale submit`.

In: a config and a run folder that the cluster's nodes can reach. Out: the job's log on stdout and
its exit code. What travels is the resolved config and the source of this refscale, about a
megabyte; corpus, model and results never do: the nodes read and write them by path or URI.

Secrets do not travel either. Ray shows a job's entry point, metadata and runtime environment to
everyone who can open its dashboard, so a token belongs into the environment of the nodes (a
Kubernetes secret, an instance profile), and a config or URI that holds one is refused.

A submitted job does not depend on this process: submitting the same command again resumes.
"""

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refscale.config import Config, dump_config
from refscale.config_file import load_config
from refscale.errors import ConfigError, RefscaleError
from refscale.progress import say, visible
from refscale.secrets import refuse_secrets

STAGES = ("run", "prepare", "score", "select", "train", "evaluate", "report")
CONFIG_FILE = "config.yaml"

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_RECONNECT_S = 2.0
# Time to restart the head, or to forward its port again.
_ANSWERS_WITHIN_S = 300.0


def submit(
    config_path: str,
    run_dir: str,
    overrides: list[str] | None = None,
    *,
    address: str | None = None,
    stage: str = "run",
    restart: bool = False,
    submission_id: str | None = None,
    wait: bool = True,
) -> int:
    """Run a stage, or all of them, as a Ray job; stream its log; return its exit code.

    Token authentication: the token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token, and used whenever there is one, unless RAY_AUTH_MODE says otherwise.

    Args:
        config_path: The run's config; relative paths in it are made absolute here.
        run_dir: The run folder: a URI, or a path of a file system that all nodes share.
        overrides: `section.key=value`, as for `refscale run`.
        address: Of the dashboard, for example http://127.0.0.1:8265; None takes
            RAY_API_SERVER_ADDRESS, then RAY_ADDRESS.
        stage: One of STAGES.
        restart: Redo the stage from nothing; not with `run`.
        submission_id: Name of the job; default: Ray's.
        wait: False returns 0 as soon as the job is accepted.

    Raises:
        ConfigError: The config is wrong or holds a secret, or there is no such stage.
        RefscaleError: The cluster cannot be reached, refuses the token or the job; or Ctrl-C, with
            its exit code: the job goes on.
    """
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}; known: {', '.join(STAGES)}")
    if restart and stage == "run":
        raise ConfigError("--restart redoes one stage; name it with --stage")
    config = load_config(config_path, overrides)
    run_dir = run_dir if "://" in run_dir else os.path.abspath(run_dir)
    refuse_secrets(config, run_dir)
    for path in paths_on_nodes(config, run_dir):
        say(f"submit    every node must see {path}")
    _enable_token()
    if address:
        # Ray's client would else prefer the variables, and send the job to their cluster.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    with tempfile.TemporaryDirectory(prefix="refscale-submit-") as folder:
        stage_job(config, Path(folder))
        client, job = _send(
            address, entry_point(run_dir, stage, restart=restart), folder, submission_id
        )
    say(f"submit    job {job} accepted")
    if not wait:
        return 0
    try:
        _follow(client, job)
    except KeyboardInterrupt as exc:
        # Not passed on: it stands for a run that is stopped.
        left = RefscaleError(
            f"job {job} goes on without this terminal: `ray job logs -f {job}` follows it,"
            f" `ray job stop {job}` ends it"
        )
        left.exit_code = 130
        raise left from exc
    return _exit_code(client, job)


def stage_job(config: Config, folder: Path) -> None:
    """Write what travels with the job into `folder`: the resolved config and this package."""
    inside = config.model_copy(update={"ray": config.ray.model_copy(update={"address": None})})
    (folder / CONFIG_FILE).write_text(dump_config(inside), encoding="utf-8")
    shutil.copytree(
        Path(__file__).parents[1],
        folder / "refscale",
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
    )


def entry_point(run_dir: str, stage: str, *, restart: bool = False) -> str:
    """The shell command of the job."""
    # Not jobs/*.py: a script's folder comes first on the import path, and jobs/evaluate.py would
    # stand in for the package `evaluate`.
    words = ["python", "-m", "refscale.cli", stage, CONFIG_FILE, "--run-dir", run_dir]
    return shlex.join([*words, "--restart"] if restart else words)


def paths_on_nodes(config: Config, run_dir: str) -> list[str]:
    """The local paths that the job reads or writes: they must exist on, or be shared by, nodes."""
    model = config.model
    candidates = [source.path or source.dataset for source in config.corpus.sources]
    candidates += [model.model_name_or_path, model.adapter, model.chat_template, run_dir]
    return [path for path in candidates if path and os.path.isabs(path)]


def _enable_token() -> None:
    """Ray 2.60 leaves authentication off for an explicit address, even where a token is there."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    path = os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    if os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(path):
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        say(
            "submit    no token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token): a cluster"
            " that accepts this job accepts anyone's"
        )


def _send(
    address: str | None, command: str, folder: str, submission_id: str | None
) -> tuple[Any, str]:
    """Submit; the client and the job's id."""
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules", "ray._private.runtime_env.packaging"):
        _quiet(name)
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=command,
            runtime_env={"working_dir": folder},
            submission_id=submission_id,
        )
    except _ray_errors() as exc:
        raise _explained("submit the job", exc) from exc
    return client, job


def _quiet(prefix: str) -> None:
    """Silence Ray's notes on uploads and sockets; its modules set their own levels on import."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(prefix):
            logging.getLogger(name).setLevel(logging.WARNING)


def _ray_errors() -> tuple[type[BaseException], ...]:
    import requests
    from ray.exceptions import RayError

    return (RayError, RuntimeError, ConnectionError, ValueError, requests.RequestException)


def _explained(action: str, exc: BaseException) -> RefscaleError:
    # Ray puts a full stop after what the server answered, on a line of its own.
    lines = [line.strip() for line in str(exc).splitlines() if line.strip(" .")]
    answered = bool(lines) and lines[0].startswith("Request failed with status code")
    if answered and "Traceback (most recent call last)" in lines[0]:
        lines.reverse()  # its last line says why
    text = lines[0][:300].rstrip(".") if lines else type(exc).__name__
    if "uthenticat" in type(exc).__name__ + text:
        return RefscaleError(
            f"cannot {action}: {text}; set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the"
            " cluster's token"
        )
    if answered:
        return RefscaleError(f"cannot {action}: {text}")
    return RefscaleError(
        f"cannot {action}: {text}; is --address the dashboard's, and is it forwarded to here?"
    )


def _follow(client: Any, job: str) -> None:
    """Print the job's log as it comes, until the job has ended; survive a lost connection.

    Raises:
        RefscaleError: Ray has not answered for _ANSWERS_WITHIN_S.
    """
    import aiohttp

    shown = 0

    def show(text: str, seen: int) -> int:
        # A new connection starts at the log's beginning.
        nonlocal shown
        fresh = text[max(0, shown - seen) :]
        sys.stdout.write(visible(fresh.replace("\r", "\n")))
        sys.stdout.flush()
        shown += len(fresh)
        return seen + len(text)

    lost: tuple[type[BaseException], ...]
    lost = (*_ray_errors(), aiohttp.ClientError, TimeoutError)
    ended = False
    while True:
        try:
            asyncio.run(_tail(client, job, show))
            whole = True
        except lost:
            whole = False
        # Ray 2.60 raises for close code 1006 only: "whole" may be a head that shuts down.
        before, ended = ended, _poll(client, job, "status") in _ENDED
        if ended and (whole or before):
            return
        time.sleep(_RECONNECT_S)  # then for what is missing, also of a job that has ended


async def _tail(client: Any, job: str, show: Callable[[str, int], int]) -> None:
    seen = 0
    async for text in client.tail_job_logs(job):
        seen = show(text, seen)


def _exit_code(client: Any, job: str) -> int:
    """The code that the ended job's command ended with; 1 where Ray knows none."""
    status, code = _poll(client, job, "status"), _poll(client, job, "driver_exit_code")
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        say(f"submit    job {job} was stopped")
        return 130
    reason = str(_poll(client, job, "message") or "no reason given").splitlines()[0]
    say(f"submit    job {job} failed: {reason.partition(', last available logs')[0]}")
    return int(code) if code else 1


def _poll(client: Any, job: str, what: str) -> Any:
    """A field of the job's info; asks for _ANSWERS_WITHIN_S where Ray does not answer."""
    deadline = None
    while True:
        try:
            value = getattr(client.get_job_info(job), what)
            return getattr(value, "value", value)
        except _ray_errors() as exc:
            error = _explained(f"ask for job {job}", exc)
            error.__cause__ = exc
        if deadline is None:
            deadline = time.monotonic() + _ANSWERS_WITHIN_S
            say(f"submit    {error}; trying again for {_ANSWERS_WITHIN_S / 60:.0f} min")
        elif time.monotonic() > deadline:
            raise RefscaleError(
                f"{error}; gave up after {_ANSWERS_WITHIN_S / 60:.0f} min, but the job may go on:"
                f" `ray job logs -f {job}` follows it"
            ) from error
        time.sleep(_RECONNECT_S)
