"""Folds trained on a Ray cluster: trainings and a volumes folder enter, how to read each training's folds leaves.

A fold is one `TorchTrainer` run of some DDP workers; folds run side by side as far as the cluster has room.
"""

import contextlib
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import ray
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from darnet.code_version import name_training_code
from darnet.config import TrainConfig
from darnet.errors import ExitCode, RunError, UsageError
from darnet.ray_checkpoint import place_checkpoints, read_state
from darnet.ray_rank import train_ray_rank
from darnet.ray_token import list_nodes
from darnet.storage import open_store
from darnet.train import FoldResult, Metrics, check_device, check_fold, make_result
from darnet.training_plan import FoldTask, GangPlan, Places, Training, claim_runs, name_run, plan_gangs, read_room
from darnet.volumes_folder import VolumesTable

# Restarts of a fold's workers from the last epoch; then the fold is given up, unless it got further by them: see
# `_run_all`. Source: ours
MAX_FAILURES = 3
COLLECTIVE_TIMEOUT_S = 120  # a rank that is gone is noticed after this. Source: ours; torch's default is 1800
PROGRESS_WAIT_S = 0.5
FAILURE_CHARACTERS = 300  # of a failure that a fold survives
# How often Ray Train looks at its workers; an epoch's report waits for it. Source: ours; Ray's default is 2 s.
POLL_VARIABLE, POLL_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"

OnProgress: TypeAlias = Callable[[FoldTask, Metrics], None]
"""Called in the driver with each epoch's metrics."""
OnEnd: TypeAlias = Callable[[FoldTask], None]
"""Called in the driver when a fold is trained, behind its last epoch; at once for a fold that was before."""
ReadFolds: TypeAlias = Callable[[], list[FoldResult]]
"""Reads a training's folds where they are needed: the driver need not hold those of all, 140 MB each."""


class _ReportForwarder(UserCallback):
    """Sends each epoch's metrics from the run's controller to the driver."""

    def __init__(self, number: int, queue: Queue) -> None:
        self._number, self._queue = number, queue

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Checkpoint | None) -> None:  # noqa: ARG002
        self._queue.put((self._number, metrics[0]))


def plan_training(config: TrainConfig, workers: int, num_folds: int) -> GangPlan:
    """How so many folds of all networks share the cluster this job has joined.

    Raises: UsageError as `plan_gangs` and `check_device`.
    """
    plan = plan_gangs(read_room(list_nodes()), workers, num_folds, config.device)
    check_device(config, has_gpu=plan.has_gpus)
    return plan


def train_folds(
    table: VolumesTable,
    trainings: Sequence[Training],
    places: Places,
    *,
    workers: int,
    on_progress: OnProgress,
    on_end: OnEnd = lambda _: None,
) -> list[ReadFolds]:
    """Train all folds of all trainings, `workers` DDP ranks each; returns how to read each training's, in order.

    The runs keep every fold's last checkpoints: the same call again resumes what was killed and only reads what was
    finished. Local runs and volumes must be where every node of the cluster sees them.
    Raises: UsageError naming what the cluster lacks or what does not fit, and as `claim_runs`; RunError naming the
            first fold that failed.
    """
    tasks_of = [_list_folds(training, table, places, workers) for training in trainings]
    tasks = [task for tasks in tasks_of for task in tasks]
    plan = plan_training(trainings[0].config, workers, len(tasks))
    print(plan.title, file=sys.stderr)
    holder = _hold_runs(places)
    try:
        claim_runs(open_store(places.runs), [task.run for task in tasks], name_training_code())
        done = _fit_all(tasks, plan, on_progress, on_end)
    finally:
        ray.kill(holder)
    checkpoints = dict(zip(tasks, done, strict=True))
    return [functools.partial(_read_folds, [checkpoints[task] for task in tasks]) for tasks in tasks_of]


def name_failure(title: str, cause: BaseException) -> RunError:
    """What ended a worker, with the exit code that it asks for."""
    failure = RunError(f"{title}: {cause}")
    if isinstance(cause, RunError):
        failure.exit_code = cause.exit_code
    return failure


class _Holder:
    """Ends with the driver that made it, however that ends; its name is taken until then."""


def _hold_runs(places: Places) -> Any:
    """Two drivers would delete each other's checkpoints; in all other steps of jobs.paper both write the same bytes.

    Raises: UsageError while another driver of this cluster trains there.
    """
    name = f"darnet-runs-{hashlib.sha256(places.runs.encode()).hexdigest()[:16]}"
    try:
        return ray.remote(_Holder).options(name=name, namespace="darnet", num_cpus=0).remote()
    except ValueError as error:
        raise UsageError(f"{places.runs}: another job of this cluster trains there; wait for it, or stop it") from error


def _list_folds(training: Training, table: VolumesTable, places: Places, workers: int) -> list[FoldTask]:
    """Raises: UsageError as `check_fold`."""
    network, config = training.network, training.config
    for fold in range(config.num_folds):
        check_fold(table, fold, config, workers)
    return [
        FoldTask(places, name_run(table, network, config, workers, fold), network, config, fold)
        for fold in range(config.num_folds)
    ]


def _read_folds(checkpoints: Sequence[Checkpoint]) -> list[FoldResult]:
    return [make_result(fold, read_state(checkpoint)) for fold, checkpoint in enumerate(checkpoints)]


def _make_trainer(task: FoldTask, plan: GangPlan, callback: UserCallback) -> TorchTrainer:
    run_config = RunConfig(  # type: ignore[call-arg]  # mypy sees V1's class, which ray.train rebinds to V2's
        name=task.run,
        **place_checkpoints(task.places.runs),
        callbacks=[callback],  # type: ignore[list-item]
        failure_config=FailureConfig(max_failures=MAX_FAILURES),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    return TorchTrainer(
        train_ray_rank,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.has_gpus,
            resources_per_worker=plan.resources_per_worker,
        ),
        torch_config=TorchConfig(backend="nccl" if plan.has_gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=run_config,
    )


def _fit_all(tasks: Sequence[FoldTask], plan: GangPlan, on_progress: OnProgress, on_end: OnEnd) -> list[Checkpoint]:
    """Train these folds to their end; the last checkpoint of each."""
    os.environ.setdefault(POLL_VARIABLE, POLL_S)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # On the driver's own node: elsewhere the reports, and with them the training, would end with whatever node it is.
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def make_trainer(number: int) -> TorchTrainer:
        return _make_trainer(tasks[number], plan, _ReportForwarder(number, queue))

    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray prints its node's warnings, asked or not
            return _run_all(tasks, make_trainer, plan.side_by_side, queue, on_progress, on_end)
    finally:
        queue.shutdown()


def _run_all(
    tasks: Sequence[FoldTask],
    make_trainer: Callable[[int], TorchTrainer],
    side_by_side: int,
    queue: Queue,
    on_progress: OnProgress,
    on_end: OnEnd,
) -> list[Checkpoint]:
    """Keep `side_by_side` folds running; hand reports on as they come, in this thread.

    Ray counts the failures of a run from its beginning, and on machines that come and go a long one has many: a fold
    that failed goes on in a new run of the same name, if it has reported a later epoch than all runs before had. What
    asks for an exit code of its own, as a store without rights does, would be met again.
    """
    fits: list[Future[Checkpoint]] = []
    ended: set[int] = set()
    newest = [-1] * len(tasks)  # epoch that each fold has reported
    known = list(newest)  # the same when its last run began

    def follow(number: int, metrics: Metrics) -> None:
        newest[number] = max(newest[number], int(metrics["epoch"]))
        on_progress(tasks[number], metrics)

    while len(ended) < len(tasks):
        for number, fit in enumerate(fits):
            if number in ended or not fit.done():
                continue
            _forward_reports(queue, follow, 0)  # it has no more to come
            failure = fit.exception()
            may_pass = isinstance(failure, RunError) and failure.exit_code is ExitCode.FAILED
            if may_pass and newest[number] > known[number]:
                known[number] = newest[number]
                told = " ".join(str(failure).split())[:FAILURE_CHARACTERS]
                print(f"{told}; it goes on behind epoch {newest[number]}", file=sys.stderr)
                fits[number] = _start_fit(tasks[number], make_trainer(number))
                continue
            fit.result()
            on_end(tasks[number])
            ended.add(number)
        if len(fits) < len(tasks) and len(fits) - len(ended) < side_by_side:
            fits.append(_start_fit(tasks[len(fits)], make_trainer(len(fits))))
        elif len(ended) < len(tasks):
            _forward_reports(queue, follow, PROGRESS_WAIT_S)
    return [fit.result() for fit in fits]


def _forward_reports(queue: Queue, follow: Callable[[int, Metrics], None], wait_s: float) -> None:
    """Hand on all reports there are, each with its fold's number; wait this long for the first."""
    try:
        while True:
            follow(*(queue.get(timeout=wait_s) if wait_s else queue.get_nowait()))
            wait_s = 0
    except Empty:
        return


def _start_fit(task: FoldTask, trainer: TorchTrainer) -> "Future[Checkpoint]":
    """Run a trainer in a thread of its own, which unlike an executor's does not keep an interrupted job alive."""
    future: Future[Checkpoint] = Future()

    def run() -> None:
        try:
            future.set_result(_fit(task, trainer))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=task.run, daemon=True).start()
    return future


def _fit(task: FoldTask, trainer: TorchTrainer) -> Checkpoint:
    """Raises: RunError naming the network, the fold and a worker's error, with the exit code that this asks for."""
    try:
        checkpoint: Checkpoint | None = trainer.fit().checkpoint
    except WorkerGroupError as error:
        # Where one rank says what is wrong, the others only lose their connection to it.
        failures = sorted(error.worker_failures.values(), key=lambda failure: not isinstance(failure, RunError))
        title = f"{task.title} failed {MAX_FAILURES + 1} times in one run, the last time with"
        raise name_failure(title, failures[0]) from error
    except TrainingFailedError as error:
        raise RunError(f"{task.title} failed: {error}") from error
    assert checkpoint is not None, "every epoch reports a checkpoint"
    return checkpoint
