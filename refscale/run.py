"""What every stage is given: the run's folder, its config and the Ray cluster that it works on.

In: a Store and a Config. Out: stage folders, and the cluster, connected to when first needed.
"""

from dataclasses import dataclass, field

import yaml

from refscale.cluster.runtime import ClusterInfo, connect
from refscale.config import Config, dump_config, parse_config
from refscale.errors import ConfigError, StorageError
from refscale.progress import console, literal
from refscale.secrets import refuse_secrets
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

CONFIG_FILE = "config.yaml"
_CONFIG_HEADER = b"# The resolved config of this run, written by refscale.\n"


@dataclass
class Run:
    """A run folder, its config, and the Ray it works on (connected to when first needed)."""

    store: Store
    config: Config
    restart: frozenset[str] = frozenset()
    # Another run whose corpus/ and scores/ this one works on: an arm of a comparison.
    shared: Store | None = None
    _cluster: ClusterInfo | None = field(default=None, repr=False)
    _said_no_gpu: bool = field(default=False, repr=False)

    def folder(self, stage: str) -> StageFolder:
        """A stage's folder."""
        if self.shared is not None and stage in ("corpus", "quarantine", "scores"):
            return StageFolder(self.shared, stage)
        return StageFolder(self.store, stage)

    @property
    def cluster(self) -> ClusterInfo:
        """The Ray cluster as it was at first; connects to it or starts it."""
        if self._cluster is None:
            ray = self.config.ray
            self._cluster = connect(
                ray.address,
                num_cpus=ray.num_cpus,
                replicas=max(ray.replica_bounds()[1], self.config.train.num_workers),
                cpus_per_replica=max(ray.cpus_per_replica, ray.cpus_per_worker),
            )
        return self._cluster

    def gpus(self, asked: float | None) -> float:
        """GPUs of a replica or worker: as asked for, else 1 where the cluster has any now."""
        if asked is not None:
            return asked
        if not self.cluster.gpus and not self.cluster.embedded and not self._said_no_gpu:
            self._said_no_gpu = True
            self._say_no_gpu()
        return float(self.cluster.gpus > 0)

    def _say_no_gpu(self) -> None:
        ray = self.config.ray
        unset = [k for k in ("gpus_per_replica", "gpus_per_worker") if getattr(ray, k) is None]
        lines = [
            "NO GPU: the cluster has none now, so CPUs do the work.",
            "If its GPU nodes come when they are needed, stop this, set and run again:",
            "    ray:",
            *(f"      {key}: 1" for key in unset),
            "If CPUs are what you want, set 0.",
        ]
        for line in lines:
            console.print(literal(f"gpus      !!! {line}", "bold red"))

    def threads(self, processes: int, cpus_each: float) -> int:
        """Threads of torch in each process.

        An embedded Ray declares more logical CPUs than there are cores, so the cores are shared
        out among the processes instead. Ray itself would give each one thread per logical CPU.
        """
        if self.cluster.embedded:
            return max(1, int(cpus_each), self.cluster.physical_cores // processes)
        return max(1, int(cpus_each))


def claim(run: Run) -> None:
    """Make the folder a run folder, or see that it is one.

    The config of an existing run is replaced only when a stage has accepted the new one.

    Raises:
        ConfigError: The config or the folder's URI holds a secret, which would be written here.
        StorageError: Its config.yaml is somebody else's.
    """
    refuse_secrets(run.config, run.store.uri)
    if not run.store.exists(CONFIG_FILE):
        write_config(run)
    elif not run.store.read_bytes(CONFIG_FILE).startswith(_CONFIG_HEADER):
        raise StorageError(
            f"{run.store.uri} holds a {CONFIG_FILE} that is not a run's; choose another --run-dir"
        )


def accepted_config(run: Run) -> Config:
    """The config that the stages in the folder were made with; that of `run` where none is there.

    Raises:
        ConfigError: The one that is there is damaged, or has keys that this refscale does not know.
    """
    if not run.store.exists(CONFIG_FILE):
        return run.config
    name = f"{run.store.uri}/{CONFIG_FILE}"
    way_out = "any stage's command writes it anew, also one that finds its stage done"
    try:
        return parse_config(yaml.safe_load(run.store.read_bytes(CONFIG_FILE)), name)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{name} is not YAML; {way_out}") from exc
    except ConfigError as exc:
        raise ConfigError(f"{exc}; {way_out}") from exc


def write_config(run: Run) -> None:
    """Make the config of this run the folder's."""
    run.store.write_bytes(CONFIG_FILE, _CONFIG_HEADER + dump_config(run.config).encode())
