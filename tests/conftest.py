"""Fixtures shared by all tests: a tiny random model, and one Ray for the session."""

import os
from pathlib import Path

# Before torch, ray and transformers are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No process of Ray's is started before it is asked for: each imports before it works.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")

import pytest
from support import save_tiny_llama


def pytest_addoption(parser):
    parser.addoption(
        "--demo", action="store_true", help="also run the demo's own config on a loopback cluster"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def ray_session():
    """One embedded Ray for all tests that need it; more logical CPUs than cores."""
    from refscale.cluster.runtime import connect, disconnect

    connect(None, num_cpus=8, replicas=2, cpus_per_replica=1)
    yield
    disconnect(force=True)
