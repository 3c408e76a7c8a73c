"""Evaluation where the GPUs are: settings enter, files and a summary leave, as `evaluate` makes them.

The driver of a submitted job often runs on a node without a GPU, where the networks of a whole study take hours.
"""

from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from darnet.errors import RunError
from darnet.evaluation.evaluate import run_evaluation
from darnet.ray_cluster import connect, list_nodes
from darnet.settings import EvaluateSettings
from darnet.training_plan import ClusterRoom, choose_gpus, plan_gangs, read_room


def evaluate_on_cluster(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate where `train.device` says, as training does: in a task with a GPU, or here without one.

    Raises: RunError of every kind, among it UsageError as `plan_gangs` where a GPU is asked for that cannot come.
    """
    connect()
    placed = place_evaluation(settings, read_room(list_nodes()))
    return evaluate_in_task(placed, num_gpus=1) if placed.train.device == "gpu" else run_evaluation(placed)


def place_evaluation(settings: EvaluateSettings, room: ClusterRoom) -> EvaluateSettings:
    """The settings with the device that `auto` means on this cluster.

    Raises: UsageError as `plan_gangs`: a task that asks for what cannot be would wait for ever.
    """
    device: Literal["cpu", "gpu"] = "gpu" if choose_gpus(room, settings.train.device) else "cpu"
    if device == "gpu":
        plan_gangs(room, 1, 1, device)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"device": device})})


def evaluate_in_task(settings: EvaluateSettings, num_gpus: int) -> dict[str, Any]:
    """Evaluate in a task of the cluster; volumes and a local `out` must be where every node sees them."""
    try:
        summary: dict[str, Any] = ray.get(ray.remote(num_gpus=num_gpus)(run_evaluation).remote(settings))
    except RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from error
        raise
    return summary
