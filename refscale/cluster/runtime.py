"""Connecting to Ray, and running a graph of per-item steps on Ray Data.

An item is a small dict, one Ray Data row in a block of its own; for the big stages it stands for a
shard. So the block, Ray's unit of scheduling and retry, is our unit of work, and Ray Data can
neither merge nor split it. Steps publish their own results through a Store and pass on what the
next step needs; only records and counts reach the driver.
"""

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Read by Ray when it is imported: no progress bars of its own, no usage report, no advice that a
# user of refscale cannot act on.
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from refscale.errors import ConfigError, ScoringError

# Logical CPUs of an embedded Ray beside the replicas: reading and publishing tasks need slots, or
# the graph stalls with every CPU held by actors.
_SPARE_CPUS = 3
_RESTART_PAUSE_S = 2.0
_ROUNDS = 3


@dataclass(frozen=True)
class ClusterInfo:
    """What Ray offers."""

    embedded: bool
    cpus: float
    gpus: float
    nodes: int
    physical_cores: int  # of this machine, meaningful when embedded

    def now(self) -> "ClusterInfo":
        """With its size of this moment: one that is not embedded may grow."""
        return self if self.embedded else replace(self, **_size())


def _size() -> dict[str, Any]:
    resources = ray.cluster_resources()
    return {
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
    }


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
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError, RayError) as exc:
            first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            raise ConfigError(f"no Ray at {address or 'this machine'}: {first}") from exc
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there
        _close_token_file()
    return ClusterInfo(embedded=embedded, physical_cores=cores, **_size())


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
    # Of max_restarts and the like, which Ray Data 2.60 takes in no other way.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Prints every error as a traceback before it raises it.
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)


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
        attempts: Runs of an item whose process dies; the error after that ends the round. An
            instance is made when the first item reaches its actor, so a process that dies while it
            loads a model is such a run too.
    """

    run: Callable[[dict[str, Any]], dict[str, Any]] | type
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: tuple[int, int] = (1, 1)
    num_cpus: float = 1
    num_gpus: float = 0
    attempts: int = 3


# An exception travels in an item's place: Ray Data 2.60 keeps of it no more than its text.
_ERROR = "_error"
_NUMBER = "_number"  # of the item, which its result carries too


class _Task:
    """What a task runs: a step's function; exceptions become results."""

    def __init__(self, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._run = run

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if _ERROR in item:
            return item
        number = item.pop(_NUMBER)
        try:
            return {**self._run(item), _NUMBER: number}
        except Exception as exc:
            exc.add_note("".join(traceback.format_exception(exc)))
            try:
                return {_ERROR: ray.cloudpickle.dumps(exc)}
            except Exception:
                return {_ERROR: ray.cloudpickle.dumps(RuntimeError(f"{type(exc).__name__}: {exc}"))}


class _Actor(_Task):
    """What an actor runs: an instance of a step's class, made when the first item is there.

    Ray restarts an actor that dies in its constructor for ever when `max_restarts` is -1 (measured
    with 2.60: max_consecutive_actor_init_deaths does not see those), and a bound on it would also
    count the machines that a long run outlives. A death during an item is bounded by its attempts.
    """

    def __init__(self, kind: type, options: dict[str, Any]) -> None:
        super().__init__(self._first)
        self._kind, self._options = kind, options

    def _first(self, item: dict[str, Any]) -> dict[str, Any]:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # What killed the process, such as memory that others held, may need a moment.
            time.sleep(_RESTART_PAUSE_S)
        self._run = self._kind(**self._options)
        return self._run(item)


def run_graph(
    items: Sequence[dict[str, Any]], steps: Sequence[Step], *, stalled_after_s: float = 14400
) -> Iterator[dict[str, Any]]:
    """Run each item through the steps on Ray Data; yield the results as they come.

    A graph that a lost machine or worker broke is run again with the items that have no result:
    while Ray finds out that a machine is gone, calls to its actors fail at once and use up their
    attempts. Items that may have killed their worker come last then, so the others are done first.
    It ends after _ROUNDS rounds in a row with fewer results than actors, or one with none: a long
    run outlives any number of machines.

    Raises:
        Exception: What a step raised, as it was raised.
        ScoringError: Workers died too often, or nothing moved for `stalled_after_s` seconds.
    """
    if not items:
        return
    # Ray would else start itself, or connect to any cluster that it finds on this machine.
    assert ray.is_initialized(), "connect comes before run_graph"
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = stalled_after_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    left = {number: {**item, _NUMBER: number} for number, item in enumerate(items)}
    actors = max((step.pool[1] for step in steps if isinstance(step.run, type)), default=1)
    poor_rounds = 0
    while left:
        place = {number: i for i, number in enumerate(left)}
        furthest = -1
        try:
            for result in _results(list(left.values()), steps):
                if _ERROR in result:
                    raise ray.cloudpickle.loads(result[_ERROR])
                number = result.pop(_NUMBER)
                del left[number]
                furthest = max(furthest, place[number])
                yield result
        except ExecutionTimeoutError as exc:
            raise ScoringError(
                f"nothing has moved for {stalled_after_s:g} s (score.stalled_after_s): a worker"
                " hangs, has no room on the cluster, or needs longer for a shard (then raise it, or"
                " lower corpus.shard_pairs); finished shards are kept, the same command resumes"
            ) from exc
        except RayError as exc:
            finished = len(place) - len(left)
            poor_rounds = 0 if finished >= actors else poor_rounds + 1
            if not finished or poor_rounds == _ROUNDS or not ray.is_initialized():
                raise _translated(exc) from exc
            # Overtaken by others, it may be the one that killed its worker.
            left = {n: left[n] for n in sorted(left, key=lambda n: place[n] < furthest)}


def _results(items: list[dict[str, Any]], steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for step in steps:
        common: dict[str, Any] = {"num_cpus": step.num_cpus}
        if step.num_gpus:
            common["num_gpus"] = step.num_gpus
        if isinstance(step.run, type):
            low, high = step.pool
            high = min(high, len(items))
            dataset = dataset.map(
                _Actor,
                fn_constructor_kwargs={"kind": step.run, "options": dict(step.options)},
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(low, high), max_size=high, max_tasks_in_flight_per_actor=2
                ),
                max_restarts=-1,
                max_task_retries=step.attempts - 1,
                **common,
            )
        else:
            run = _Task(step.run)
            dataset = dataset.map(run.__call__, max_retries=step.attempts - 1, **common)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def _translated(exc: RayError) -> ScoringError:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return ScoringError(
        f"a worker process failed ({type(exc).__name__}): {lines[0][:300] if lines else ''};"
        " finished shards are kept, the same command resumes"
    )
