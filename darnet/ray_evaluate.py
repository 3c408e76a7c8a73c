"""Evaluation where the GPUs are: settings enter, files and a summary leave, as `evaluate` makes them.

The driver of a submitted job often runs on a node without a GPU, where the networks of a whole study take hours.
"""

import contextlib
import io
import sys
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from darnet.errors import RunError
from darnet.evaluation.evaluate import run_evaluation
from darnet.ray_cluster import connect
from darnet.ray_token import list_nodes, refuse_open_node
from darnet.settings import EvaluateSettings
from darnet.terminal import print_heading
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
    """Evaluate in a task of the cluster; volumes, a local `out` and a local `truth` must be where every node sees them.

    What it has for people is printed here when it ends.
    Raises: RunError of every kind, also where the cluster gives the task up.
    """
    print_heading("evaluating on a node of the cluster")
    try:
        outcome, told = ray.get(ray.remote(num_gpus=num_gpus)(_evaluate_unseen).remote(settings))
    except RayTaskError:
        raise
    except RayError as error:
        raise RunError(
            f"the cluster gave up the evaluation ({error}); the same command begins it again, and trains nothing"
        ) from error
    print(told, file=sys.stderr, end="")
    if isinstance(outcome, RunError):
        raise outcome
    summary: dict[str, Any] = outcome
    return summary


def _evaluate_unseen(settings: EvaluateSettings) -> tuple[dict[str, Any] | RunError, str]:
    """The summary, or why there is none, and what was printed where nobody looks."""
    outcome: dict[str, Any] | RunError
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            refuse_open_node()
            outcome = run_evaluation(settings)
        except RunError as error:
            outcome = error
    return outcome, told.getvalue()
