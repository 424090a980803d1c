"""One driver a run folder: the lock that keeps a second one out.

LOCK.json in the run folder names the driver's process and machine, since when that was started, and
is renewed by a thread. A lock is taken over at once when its process is gone from this machine, and
else when it has not been renewed for LOCK_WATCHED_S while we watched: clocks of two hosts are not
compared. What it costs: a small read and write every LOCK_RENEWED_S seconds, and that wait after a
driver died on another host or with its host.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refscale.errors import RunLockedError, StorageError
from refscale.progress import say
from refscale.storage.store import Store

LOCK = "LOCK.json"
LOCK_RENEWED_S = 15.0
LOCK_WATCHED_S = 60.0
# Two drivers that look at the same moment both write: after this long the last one's name stands.
LOCK_SETTLED_S = 1.0


class RunLock:
    """One driver a run folder. Use as a context manager, in the main thread, around all writing.

    A driver that finds its lock taken over, because it was suspended for long, interrupts itself.

    Raises:
        RunLockedError: Another driver holds the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = uuid.uuid4().hex
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def _content(self) -> bytes:
        me = {
            "token": self._token,
            **_machine(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "renewed": time.time(),
        }
        return json.dumps(me).encode()

    def __enter__(self) -> "RunLock":
        created = self._store.create_exclusively(LOCK, self._content())
        if not created:
            holder = self._holder()
            if holder and self._is_alive(holder):
                raise RunLockedError(
                    f"{self._store.uri} is in use by process {holder['pid']} on {holder['host']};"
                    " wait for it or stop it, or choose another --run-dir"
                )
            self._store.write_bytes(LOCK, self._content())
        if not (created and self._store.is_local):
            time.sleep(LOCK_SETTLED_S)
        if not self._is_mine():
            raise RunLockedError(f"another driver has just taken {self._store.uri}; wait for it")
        self._thread.start()
        return self

    def _holder(self) -> dict[str, Any] | None:
        """What the lock says; None where there is none, or a torn one that says nothing."""
        if not self._store.exists(LOCK):
            return None
        try:
            holder = json.loads(self._store.read_bytes(LOCK))
        except ValueError:
            return None
        known = {"token", "host", "namespace", "pid", "started", "renewed"}
        return holder if isinstance(holder, dict) and known <= holder.keys() else None

    def _is_mine(self) -> bool:
        holder = self._holder()
        return holder is not None and holder["token"] == self._token

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        machine = _machine()
        # A lock that an older refscale wrote names no boot.
        if {name: holder.get(name, "") for name in machine} == machine:
            return _process_start(holder["pid"]) == holder["started"] is not None
        say(f"lock      held by {holder['host']}: seeing whether it is alive")
        deadline = time.monotonic() + LOCK_WATCHED_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, LOCK_WATCHED_S / 20))
            now = self._holder()
            if now is None or now["token"] != holder["token"]:
                return now is not None
            if now["renewed"] != holder["renewed"]:
                return True
        return False

    def _renew(self) -> None:
        while not self._stop.wait(LOCK_RENEWED_S):
            try:
                holder = self._holder()
                if holder is not None and holder["token"] != self._token:
                    self._lost = True
                    _interrupt()
                    return
                self._store.write_bytes(LOCK, self._content())
            except StorageError:
                continue  # a full disk must not stop the renewal for good

    def __exit__(self, _type: Any, exc: BaseException | None, _traceback: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._lost:
            raise RunLockedError(
                f"another driver has taken over {self._store.uri}; this one stops"
            ) from exc
        try:
            if self._is_mine():
                self._store.delete(LOCK)
        except StorageError:
            if exc is None:
                raise


def _interrupt() -> None:
    """Interrupt the main thread as Ctrl-C does, whoever called: a notebook lives on.

    A shell that is not interactive starts what it puts into the background with Ctrl-C ignored.
    There it is done as `kill` does, which the command line takes for the same.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


def _machine() -> dict[str, str]:
    """Whose process ids these are.

    Containers may share a host's name, and cloned virtual machines the namespace of their processes
    too: a kernel's first has the same number on all of them.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"host": socket.gethostname(), "namespace": namespace, "boot": _boot()}


def _boot() -> str:
    """The running kernel's id, drawn when it was started; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks, so that a reused pid is told apart; None if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if not Path("/proc").exists():  # macOS
            try:
                os.kill(pid, 0)
            except OSError:
                return None
            return "unknown"
        return None
    return None if fields[0] == "Z" else fields[19]
