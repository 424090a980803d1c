"""Connecting to Ray, and running a graph of per-item steps on Ray Data.

An item is a small dict, one Ray Data row in a block of its own; for the big stages it stands for a
shard. So the block, Ray's unit of scheduling and retry, is our unit of work, and Ray Data can
neither merge nor split it. Steps publish their own results through storage.py and pass on what the
next step needs; only records and counts reach the driver.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Read by Ray when it is imported: no progress bars of its own, no usage report, no advice that a
# user of refscale cannot act on.
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

import ray
import ray.data
from ray.exceptions import RayError

from refscale.errors import ConfigError, RefscaleError, ScoringError

# Logical CPUs of an embedded Ray beside the replicas: reading and publishing tasks need slots, or
# the graph stalls with every CPU held by actors.
_SPARE_CPUS = 3


@dataclass(frozen=True)
class ClusterInfo:
    """What Ray offers."""

    embedded: bool
    cpus: float
    gpus: float
    nodes: int
    physical_cores: int  # of this machine, meaningful when embedded


_started_here = False


def connect(
    address: str | None, *, num_cpus: int | None, replicas: int, cpus_per_replica: float
) -> ClusterInfo:
    """Connect to a running Ray, or start an embedded one.

    Args:
        address: Ray address; None takes RAY_ADDRESS, and without it starts an embedded Ray.
        num_cpus: Logical CPUs of an embedded Ray; None for enough of them.
        replicas: Scoring replicas that must fit.
        cpus_per_replica: Logical CPUs of each.

    Raises:
        ConfigError: No Ray answers at `address`.
    """
    _quiet()
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    global _started_here
    embedded = False
    _started_here = not ray.is_initialized()
    if _started_here:
        address = address or os.environ.get("RAY_ADDRESS")
        embedded = address is None
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if embedded:
            wanted = int(replicas * cpus_per_replica + 0.999) + _SPARE_CPUS
            options.update(num_cpus=num_cpus or max(cores, wanted), include_dashboard=False)
        try:
            ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError, RayError) as exc:
            first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            raise ConfigError(f"no Ray at {address or 'this machine'}: {first}") from exc
        _close_token_file()
    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return ClusterInfo(
        embedded=embedded,
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        nodes=len(nodes),
        physical_cores=cores,
    )


def disconnect(*, force: bool = False) -> None:
    """Leave Ray, and stop it if `connect` started it for this run alone.

    Args:
        force: Also stop one that had been started before `connect` was last called.
    """
    if ray.is_initialized() and (_started_here or force):
        ray.shutdown()


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _close_token_file() -> None:
    # Ray 2.60 writes its cluster token readable by everyone under the usual umask.
    path = os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    try:
        if os.path.isfile(path) and os.stat(path).st_mode & 0o077:
            os.chmod(path, 0o600)
    except OSError:
        return  # not ours to change


@dataclass(frozen=True)
class Step:
    """One step of a graph.

    Args:
        run: A function dict -> dict, or a class whose instances are that: then it runs in actors.
        options: Constructor arguments of the class.
        pool: (smallest, largest) number of actors of a class.
        num_cpus: Logical CPUs of each task or actor.
        num_gpus: GPUs of each.
        attempts: Runs of an item whose process dies; the error after that ends the graph.
    """

    run: Callable[[dict[str, Any]], dict[str, Any]] | type
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: tuple[int, int] = (1, 1)
    num_cpus: float = 1
    num_gpus: float = 0
    attempts: int = 3


def run_graph(
    items: Sequence[dict[str, Any]], steps: Sequence[Step], *, stalled_after_s: float = 1800
) -> Iterator[dict[str, Any]]:
    """Run each item through the steps on Ray Data; yield the results as they come.

    Raises:
        RefscaleError: One that a step raised, as it was raised; or ScoringError when a worker
            died too often or nothing moved for `stalled_after_s` seconds.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = stalled_after_s
    context.max_consecutive_actor_init_deaths = 3
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    for step in steps:
        common: dict[str, Any] = {"num_cpus": step.num_cpus}
        if step.num_gpus:
            common["num_gpus"] = step.num_gpus
        if isinstance(step.run, type):
            low, high = step.pool
            high = min(high, len(items))
            dataset = dataset.map(
                step.run,
                fn_constructor_kwargs=dict(step.options),
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(low, high), max_size=high, max_tasks_in_flight_per_actor=2
                ),
                max_restarts=-1,
                max_task_retries=step.attempts - 1,
                **common,
            )
        else:
            dataset = dataset.map(step.run, max_retries=step.attempts, **common)
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
    except RefscaleError:
        raise
    except Exception as exc:
        raise _translate(exc) from exc


def _translate(exc: BaseException) -> BaseException:
    """The error that a user should see for what came out of Ray."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, RefscaleError):
            # RayTaskError mixes its cause's class into its own: rebuild the plain one.
            cause = getattr(current, "cause", None)
            return cause if isinstance(cause, RefscaleError) else current
        cause = getattr(current, "cause", None)
        current = cause if isinstance(cause, BaseException) else current.__cause__
    name = type(exc).__name__
    if "Timeout" in name:
        return ScoringError(f"nothing has moved for too long: {_first_line(exc)}")
    if isinstance(exc, RayError) or "Ray" in name or "Actor" in name:
        return ScoringError(
            f"a worker process failed ({name}): {_first_line(exc)}; finished shards are kept, the"
            " same command resumes"
        )
    return exc


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(exc).__name__
