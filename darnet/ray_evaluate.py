"""Evaluation where the GPUs are: settings enter, files and a summary leave, as `evaluate` makes them.

The driver of a submitted job often runs on a node without a GPU, where the networks of a whole study take hours.
"""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from darnet.errors import RunError
from darnet.evaluation.evaluate import run_evaluation
from darnet.ray_cluster import connect, count_resource
from darnet.settings import EvaluateSettings


def evaluate_on_cluster(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate in a task with a GPU where the cluster has one, else here.

    Raises: RunError of every kind.
    """
    connect()
    return evaluate_in_task(settings, num_gpus=1) if count_resource("GPU") else run_evaluation(settings)


def evaluate_in_task(settings: EvaluateSettings, num_gpus: int) -> dict[str, Any]:
    """Evaluate in a task of the cluster; volumes and a local `out` must be where every node sees them."""
    try:
        summary: dict[str, Any] = ray.get(ray.remote(num_gpus=num_gpus)(run_evaluation).remote(settings))
    except RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from error
        raise
    return summary
