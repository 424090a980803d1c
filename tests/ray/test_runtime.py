"""run_graph: what it promises where workers die, hang, raise or are many."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from refscale.cluster.runtime import Step, run_graph
from refscale.errors import ModelError, RefscaleError, ScoringError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

# Workers cannot import the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def items(count):
    return [{"n": i} for i in range(count)]


def numbers(results):
    return sorted(result["n"] for result in results)


def first_time(marker):
    """Whether this is the first of all processes to ask; `marker` is a path."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Passing:
    """Passes items on; `trouble` says what goes wrong, at item 3 or at the start."""

    def __init__(self, trouble="", marker="", log=""):
        self._trouble, self._marker, self._log = trouble, marker, log
        if log:
            Path(log, f"actor-{os.getpid()}").touch()
        if trouble == "exit at load once" and first_time(marker):
            os._exit(1)
        if trouble == "exit at load always":
            os._exit(1)
        if trouble == "raise at load":
            raise ModelError("no such model")

    def __call__(self, item):
        if self._log:
            Path(self._log, f"item-{item['n']}-{time.monotonic_ns()}").touch()
        number = item["n"]
        if (
            self._trouble == "exit often"
            and number % 6 == 3
            and first_time(self._marker + f"{number}")
        ):
            os._exit(1)
        if number == 3:
            if self._trouble == "exit always":
                os._exit(1)
            if self._trouble == "exit once" and first_time(self._marker):
                os._exit(1)
            if self._trouble == "raise":
                raise ScoringError("pair 3 is not finite")
            if self._trouble == "foreign error":
                raise ZeroDivisionError("a bug")
            if self._trouble == "hang":
                time.sleep(1000)
        return item


def actors(trouble="", *, pool=(1, 1), attempts=2, **options):
    return Step(
        Passing, options={"trouble": trouble, **options}, pool=pool, attempts=attempts, num_cpus=0.5
    )


def twice(item):
    return {"n": 2 * item["n"]}


# The claims of the module's docstring and of the comments.


def test_no_items_need_no_ray():
    assert list(run_graph([], [Step(twice)])) == []


@pytest.mark.parametrize("count", [1, 2, 100])
def test_every_item_arrives_once_through_tasks_and_actors(count):
    # Few tasks at a time: each starts a process of Ray's, which imports before it works.
    steps = [Step(twice, num_cpus=2), actors(pool=(1, 2)), Step(twice, num_cpus=2)]
    assert numbers(run_graph(items(count), steps)) == [4 * i for i in range(count)]


def test_an_item_is_a_block_of_its_own():
    dataset = ray.data.from_items(items(50), override_num_blocks=50)
    sizes = [ray.get(ref).num_rows for ref in dataset.get_internal_block_refs()]
    assert sizes == [1] * 50
    # And stays one: a task sees one row whatever the size of its result.
    large = Step(lambda item: {"n": item["n"], "data": b"x" * (3 << 20)}, num_cpus=2)
    steps = [large, Step(lambda item: {"n": item["n"], "pid": os.getpid()}, num_cpus=2)]
    assert numbers(run_graph(items(50), steps)) == list(range(50))


def test_items_of_any_json_and_bytes_pass_through():
    item = {"n": 0, "text": "ü", "data": b"\x00\xff", "list": [1, 2], "float": 0.1, "big": 2**60}
    (result,) = run_graph([item], [Step(lambda x: x)])
    assert result == item


# Failures.


def test_actor_that_dies_once_loses_nothing(tmp_path):
    step = actors("exit once", marker=str(tmp_path / "died"), pool=(2, 2))
    assert numbers(run_graph(items(8), [step])) == list(range(8))
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("others", [[], [0, 1, 2, 4, 5, 6, 7]], ids=["alone", "among others"])
def test_actor_that_always_dies_ends_with_an_error_after_its_attempts(tmp_path, others):
    step = actors("exit always", log=str(tmp_path), attempts=3)
    finished = []
    with pytest.raises(ScoringError, match=r"worker process failed.*same command resumes"):
        for result in run_graph([{"n": n} for n in sorted([3, *others])], [step]):
            finished.append(result)
    # Three attempts a round, and each round but the last finishes another item: alone, just three.
    rounds, rest = divmod(len(list(tmp_path.glob("item-3-*"))), 3)
    assert rest == 0 and 1 <= rounds <= len(finished) + 1


def test_more_machines_are_lost_than_one_round_outlives(tmp_path):
    # No second attempt: a death ends a round.
    step = actors("exit often", marker=str(tmp_path / "died-"), pool=(2, 2), attempts=1)
    assert numbers(run_graph(items(24), [step])) == list(range(24))
    assert len(list(tmp_path.glob("died-*"))) == 4


def test_actor_that_dies_once_while_loading_is_started_again(tmp_path):
    step = actors("exit at load once", marker=str(tmp_path / "died"))
    assert numbers(run_graph(items(4), [step])) == list(range(4))


def test_actor_that_always_dies_while_loading_ends_with_an_error():
    with pytest.raises(ScoringError, match="worker process failed"):
        list(run_graph(items(4), [actors("exit at load always")]))


def test_error_of_a_step_arrives_as_it_was_raised():
    with pytest.raises(ScoringError, match="pair 3") as caught:
        list(run_graph(items(8), [actors("raise")]))
    assert type(caught.value) is ScoringError
    assert str(caught.value) == "pair 3 is not finite"


def test_error_of_a_task_arrives_as_it_was_raised():
    def fails(item):
        raise ModelError(f"item {item['n']}")

    with pytest.raises(RefscaleError, match="item 0") as caught:
        list(run_graph(items(1), [Step(fails)]))
    assert type(caught.value) is ModelError


def test_error_while_loading_arrives_as_it_was_raised_and_is_not_repeated(tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        list(run_graph(items(8), [actors("raise at load", log=str(tmp_path))]))
    assert len(list(tmp_path.glob("actor-*"))) == 1


def test_bug_in_a_step_arrives_with_its_traceback():
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(run_graph(items(8), [actors("foreign error"), Step(twice)]))
    assert "in __call__" in "".join(caught.value.__notes__)


def test_hung_replica_is_detected_and_the_others_finish():
    seen, started = [], time.monotonic()
    # Time enough for two processes to start beside other tests.
    with pytest.raises(ScoringError, match="nothing has moved for 20 s"):
        for result in run_graph(items(30), [actors("hang", pool=(2, 2))], stalled_after_s=20):
            seen.append(result["n"])
    assert time.monotonic() - started < 60
    assert 3 not in seen and len(seen) >= 20


# The pool.


def test_pool_grows_no_larger_than_its_upper_bound(tmp_path):
    class Slow(Passing):
        def __call__(self, item):
            time.sleep(0.05)
            return super().__call__(item)

    step = Step(Slow, options={"log": str(tmp_path)}, pool=(1, 2), num_cpus=0.5)
    assert numbers(run_graph(items(60), [step])) == list(range(60))
    assert 1 <= len(list(tmp_path.glob("actor-*"))) <= 2


def test_one_item_starts_one_actor(tmp_path):
    step = actors(pool=(2, 4), log=str(tmp_path))
    assert numbers(run_graph(items(1), [step])) == [0]
    assert len(list(tmp_path.glob("actor-*"))) == 1


def test_results_stream_and_the_graph_stays_a_bounded_distance_ahead(tmp_path):
    """A consumer that stops holds the producers back: results do not pile up in memory."""
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(object_store_memory=64 << 20)

    def produce(item):
        Path(tmp_path, str(item["n"])).touch()
        return {"n": item["n"], "data": bytes(4 << 20)}

    try:
        results = run_graph(items(100), [Step(produce, num_cpus=0.5)])
        next(results)
        time.sleep(4)
        assert len(list(tmp_path.iterdir())) < 60
        assert 1 + len(list(results)) == 100
    finally:
        context.execution_options.resource_limits = limits


# Signals.

_DRIVER = """
    import signal, sys, time
    sys.path.insert(0, {root!r})
    from refscale import cli
    from refscale.cluster.runtime import Step, connect, disconnect, run_graph

    def slow(item):
        open({marker!r}, "w").close()
        time.sleep(0.2)
        return item

    signal.signal(signal.SIGTERM, cli._terminated)
    # Tests that run in a shell's background inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connect(None, num_cpus=2, replicas=1, cpus_per_replica=1)
    try:
        list(run_graph([{{"n": i}} for i in range(1000)], [Step(slow)]))
    except KeyboardInterrupt:
        print("stopped")
    finally:
        disconnect()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_driver_cleanly(tmp_path, number):
    marker = tmp_path / "working"
    code = textwrap.dedent(_DRIVER).format(
        marker=str(marker), root=str(Path(__file__).resolve().parents[2])
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(driver.pid, number)
    output, errors = driver.communicate(timeout=30)
    assert output.strip() == "stopped", errors
    assert driver.returncode == 0
