"""The lock of a run folder."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from refscale import cli
from refscale.errors import RunLockedError
from refscale.storage import locks
from refscale.storage.locks import LOCK, RunLock
from refscale.storage.store import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "LOCK_SETTLED_S", 0.05)
    monkeypatch.setattr(locks, "LOCK_RENEWED_S", 0.05)
    monkeypatch.setattr(locks, "LOCK_WATCHED_S", 0.4)


def holder(**changes):
    """A lock's content; as of another host unless changed."""
    return {
        "token": "other",
        "host": "elsewhere",
        "namespace": os.readlink("/proc/self/ns/pid"),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid": 1,
        "started": "1",
        "renewed": time.time(),
        **changes,
    }


def test_second_driver_is_refused(tmp_path):
    with RunLock(Store(tmp_path)):
        with pytest.raises(RunLockedError, match=str(os.getpid())), RunLock(Store(tmp_path)):
            pass
    with RunLock(Store(tmp_path)):
        pass


def _hold_and_die(path):
    RunLock(Store(path)).__enter__()
    os._exit(9)


def test_lock_of_a_dead_driver_is_taken_over(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / LOCK).exists()
    with RunLock(Store(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_lock_of_a_reused_pid_is_taken_over(tmp_path):
    mine = holder(host=socket.gethostname(), pid=os.getpid(), started="1")
    (tmp_path / LOCK).write_text(json.dumps(mine))
    with RunLock(Store(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["token"] != "other"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "t"}'])
def test_torn_lock_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with RunLock(Store(tmp_path)):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("skew", [-3600, 0, 3600])
def test_lock_of_another_host_is_honoured_while_it_is_renewed_whatever_its_clock(tmp_path, skew):
    store, stop = Store(tmp_path), threading.Event()

    def renew():
        while not stop.wait(0.05):
            store.write_json(LOCK, holder(renewed=time.time() + skew))

    store.write_json(LOCK, holder(renewed=time.time() + skew))
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="elsewhere"), RunLock(store):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("skew", [-3600, 0, 3600])
def test_lock_of_another_host_is_taken_over_when_it_is_no_longer_renewed(tmp_path, skew):
    (tmp_path / LOCK).write_text(json.dumps(holder(renewed=time.time() + skew)))
    started = time.monotonic()
    with RunLock(Store(tmp_path)):
        assert time.monotonic() - started >= 0.4


def test_same_host_name_in_another_container_is_another_host(tmp_path):
    other = holder(host=socket.gethostname(), pid=os.getpid(), namespace="pid:[1]")
    (tmp_path / LOCK).write_text(json.dumps(other))
    started = time.monotonic()
    with RunLock(Store(tmp_path)):
        assert time.monotonic() - started >= 0.4


def test_a_clone_of_a_machine_is_another_machine(tmp_path):
    # Its first processes are in a namespace of the same number; pid 1 did not start at tick 1.
    other = holder(host=socket.gethostname(), boot="of the clone")
    (tmp_path / LOCK).write_text(json.dumps(other))
    started = time.monotonic()
    with RunLock(Store(tmp_path)):
        assert time.monotonic() - started >= 0.4


def test_a_lock_without_a_boot_is_watched(tmp_path):
    older = holder(host=socket.gethostname())
    del older["boot"]
    (tmp_path / LOCK).write_text(json.dumps(older))
    started = time.monotonic()
    with RunLock(Store(tmp_path)):
        assert time.monotonic() - started >= 0.4


def test_lock_of_this_machine_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_WATCHED_S", 60.0)
    (tmp_path / LOCK).write_text(json.dumps(holder(host=socket.gethostname())))
    started = time.monotonic()
    with RunLock(Store(tmp_path)):
        assert time.monotonic() - started < 30


def test_lock_is_renewed(tmp_path):
    with RunLock(Store(tmp_path)):
        first = json.loads((tmp_path / LOCK).read_text())["renewed"]
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["renewed"] > first


def test_driver_whose_lock_was_taken_over_stops_and_leaves_the_lock(tmp_path):
    with pytest.raises(RunLockedError, match="taken over"):
        with RunLock(Store(tmp_path)):
            (tmp_path / LOCK).write_text(json.dumps(holder()))
            time.sleep(5)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


@pytest.mark.parametrize("in_background", [False, True], ids=["terminal", "background"])
def test_driver_whose_lock_was_taken_over_stops_at_once(
    tmp_path, monkeypatch, capsys, in_background
):
    def work(*_, **__):
        with RunLock(Store(tmp_path)):
            (tmp_path / LOCK).write_text(json.dumps(holder()))
            time.sleep(30)

    monkeypatch.setattr(cli, "_work", work)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if in_background:  # as `sh -c "refscale run … &"` starts it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        started = time.monotonic()
        assert cli.main(["run", "config.yaml", "--run-dir", str(tmp_path)]) == 1
        assert time.monotonic() - started < 20
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "another driver has taken over" in capsys.readouterr().err


def test_of_two_drivers_that_take_over_together_one_stops(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(holder(host=socket.gethostname(), pid=2**22 - 1)))
    barrier, outcomes = threading.Barrier(2), []

    def drive():
        lock = RunLock(Store(tmp_path))
        barrier.wait()
        try:
            lock.__enter__()
        except RunLockedError:
            outcomes.append("refused")
            return
        outcomes.append("ran")
        time.sleep(0.5)
        lock._stop.set()

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ran", "refused"]
