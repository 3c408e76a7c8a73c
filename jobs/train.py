"""python -m jobs.train: volumes + folds -> model bundle."""

import sys
from datetime import UTC, datetime
from typing import Any

from darnet.job import leave, run_job
from darnet.ray_cluster import connect
from darnet.ray_train import train_model
from darnet.settings import TrainSettings


def work(settings: TrainSettings) -> dict[str, Any]:
    """Train the folds."""
    connect()
    return train_model(settings, datetime.now(UTC).date())


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("train", TrainSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
