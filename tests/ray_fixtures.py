"""One small Ray cluster for all tests of a session that need one."""

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less a fold; nobody preempts this machine
    # Workers start in a folder of Ray's own and must find the code all the same.
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster in this process's care, never one that happens to be running."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=4, object_store_memory=150_000_000, include_dashboard=False, log_to_driver=False)
        yield
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray forgets its own processes before they have ended
            ray.shutdown()
            gc.collect()
