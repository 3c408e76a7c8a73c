"""One worker of a fold on a Ray cluster: its task enters, reports and checkpoints leave after each epoch."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import enable_reproducibility, get_device, prepare_model

from darnet.gang import train_rank
from darnet.history import render_files
from darnet.ray_checkpoint import read_newest_state, write_state
from darnet.ray_token import refuse_open_node
from darnet.storage import open_store
from darnet.threads import set_model_threads
from darnet.train import FoldState, Metrics
from darnet.training_plan import FoldTask


def train_ray_rank(loop_config: dict[str, Any]) -> None:
    """Resume what there is, and train with the gang that Ray has put together.

    Raises: UsageError as `refuse_open_node`: Ray may put a rank on a node that has joined since the job looked at all.
    """
    refuse_open_node()
    task: FoldTask = loop_config["task"]
    set_model_threads(1)  # part of what makes numbers repeatable; a node's other ranks use its other CPUs
    enable_reproducibility(task.config.seed)
    checkpoint = ray.train.get_checkpoint()
    report = _report_as_rank(ray.train.get_context().get_world_rank(), task)
    train_rank(task, get_device(), prepare_model, report, None if checkpoint is None else read_newest_state(checkpoint))


def _report_as_rank(rank: int, task: FoldTask) -> Callable[[int, Metrics, FoldState], None]:
    """A report that all ranks make together, and that carries rank 0's state as a checkpoint.

    Rank 0 keeps the history beside the checkpoints, where it can be watched.
    """
    run = open_store(task.places.runs).child(task.run)

    def report(_: int, metrics: Metrics, state: FoldState) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                checkpoint = write_state(state, Path(folder))
                for name, data in render_files(task.fold, state["history"]).items():
                    run.write_bytes(name, data)
            ray.train.report(dict(metrics), checkpoint=checkpoint)

    return report
