"""Room for replicas and for the workers of a training: whether there is any, and saying so.

Ray Train tries to place its workers for ever and says nothing. An embedded Ray never grows, so what
does not fit there is refused. Whether another cluster grows cannot be asked: Ray 2.60 keeps no
record of how far its autoscaler may go. So there one waits, for a bounded time, and says for what.
"""

import math
import os
import threading
from collections.abc import Mapping

import ray

from refscale.cluster.runtime import ClusterInfo
from refscale.config import RayConfig
from refscale.errors import ConfigError
from refscale.progress import say

_LOOK_EVERY_S = 5.0
_SAY_EVERY_S = 60.0
# After so long Ray Train 2.60 gives up on placing its workers, and tries again.
_ATTEMPT_S = 60.0
_ATTEMPT_S_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def require_replicas(
    ray_config: RayConfig, cluster: ClusterInfo, gpus_each: float, label: str
) -> None:
    """See that the replicas that scoring starts with fit, and a task beside them.

    Args:
        ray_config: The config's section ray.
        cluster: What there is.
        gpus_each: GPUs of a replica.
        label: Of the stage, for what is said.

    Raises:
        ConfigError: They do not, and Ray is embedded, so that nothing can change that.
    """
    replicas = ray_config.replica_bounds()[0]
    cpus = replicas * ray_config.cpus_per_replica + ray_config.cpus_per_task
    gpus = replicas * gpus_each
    if cpus <= cluster.cpus and gpus <= cluster.gpus:
        return
    lacking = (
        f"{replicas} replica(s) and a task beside them take {cpus:g} CPUs and {gpus:g} GPUs, and"
        f" do not fit: Ray has {cluster.cpus:g} and {cluster.gpus:g}"
    )
    if cluster.embedded:
        raise ConfigError(
            f"{lacking}; lower ray.replicas, ray.cpus_per_replica, ray.cpus_per_task or"
            " ray.gpus_per_replica, or raise ray.num_cpus"
        )
    say(f"{label:<9} {lacking}; waiting for nodes")


class Room:
    """Room on the cluster for `num_workers` workers of `resources` each.

    As a context manager it says every minute that there is none, or that others hold it, while that
    is so.
    """

    def __init__(self, resources: Mapping[str, float], num_workers: int) -> None:
        self._resources, self._num_workers = resources, num_workers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def missing(self) -> str | None:
        """What is there and does not suffice; None where it does, whoever holds it."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(
            int(min(node.get(name, 0) / each for name, each in self._resources.items() if each))
            for node in nodes
        )
        if room >= self._num_workers:
            return None
        total = ", ".join(f"{sum(node.get(n, 0) for node in nodes):g} {n}" for n in self._resources)
        return (
            f"{self._workers()}, and the cluster has room for {room}"
            f" ({total} on {len(nodes)} node(s))"
        )

    def held(self) -> str:
        """What is there and yet not to be had."""
        return f"{self._workers()}, and other work on the cluster holds the room for them"

    def _workers(self) -> str:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        return f"train.num_workers is {self._num_workers}, of {each} each"

    def require(self) -> None:
        """Refuse what does not fit now.

        Raises:
            ConfigError: Says what is there and what to set.
        """
        if missing := self.missing():
            raise ConfigError(
                f"{missing}; set train.num_workers, ray.cpus_per_worker or ray.gpus_per_worker"
            )

    def __enter__(self) -> "Room":
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        waited, said = 0.0, -_SAY_EVERY_S
        while True:
            wanted = self._waited_for()
            if wanted and waited - said >= _SAY_EVERY_S:
                said = waited
                say(f"train     waiting for {wanted}")
            if self._ended.wait(_LOOK_EVERY_S):
                return
            waited += _LOOK_EVERY_S

    def _waited_for(self) -> str | None:
        if missing := self.missing():
            return f"nodes: {missing}"
        return f"room: {self.held()}" if _is_placing() else None


def _is_placing() -> bool:
    """Whether what this driver's training asked Ray for at once is not all given."""
    job = ray.get_runtime_context().get_job_id()  # ends the id of each of its placement groups
    groups = ray.util.placement_group_table()
    return any(
        group["state"] in ("PENDING", "RESCHEDULING")
        for name, group in groups.items()
        if name.endswith(job)
    )


def attempts_within(seconds: float) -> int:
    """How often Ray Train can try to place its workers in so many seconds; at least once."""
    each = float(os.environ.get(_ATTEMPT_S_VARIABLE, _ATTEMPT_S))
    return max(1, math.ceil(seconds / each))
