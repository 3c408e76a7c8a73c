"""Training on a Ray cluster: a volumes folder and settings enter, a model bundle leaves.

A fold is one `TorchTrainer` run of some DDP workers; folds run side by side as far as the cluster has room.
"""

import contextlib
import functools
import hashlib
import os
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import date
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError
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

from darnet.bundle import BundleManifest, BundleSettings
from darnet.bundle_writing import Files, TrainedFold, make_bundle, publish_bundles, refuse_existing
from darnet.code_version import name_training_code
from darnet.config import ScoreConfig, TrainConfig
from darnet.errors import ExitCode, RunError, UsageError
from darnet.evaluation.model_card import NO_TEST, describe_cohort, describe_test, evaluate_test
from darnet.inference.torch_backend import TorchBackend
from darnet.model import DARNet, build_network
from darnet.ray_checkpoint import place_checkpoints, read_state
from darnet.ray_rank import train_ray_rank
from darnet.ray_token import list_nodes, refuse_open_node
from darnet.score import Ensemble
from darnet.settings import TrainSettings
from darnet.storage import Store, open_store
from darnet.terminal import Meter, print_heading, show_progress
from darnet.tracking import TrackedNetwork, Tracker, track_training
from darnet.train import FoldResult, Metrics, check_device, check_fold, make_result
from darnet.training_plan import (
    FoldTask,
    GangPlan,
    Places,
    Training,
    choose_gpus,
    choose_trainings,
    claim_runs,
    match_division,
    name_run,
    place_runs,
    plan_gangs,
    read_room,
)
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesTable, read_table

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


def train_model(settings: TrainSettings, today: date) -> dict[str, Any]:
    """Train all folds of all networks and write the bundles; a summary for people and schedulers.

    Raises: RunError of every kind; there is no bundle then, and the same call again resumes.
    """
    out = open_store(settings.out)
    volumes = open_store(settings.volumes)
    table = read_table(volumes)
    match_division(settings.cohorts, table)
    trainings = choose_trainings(settings, table.volume)
    refuse_existing(settings.out, [training.folder for training in trainings])
    runs = open_store(place_runs(settings, out.uri), create=True)
    _check_writable(runs)
    places = Places(volumes.uri, runs.uri, settings.cache, table.cohort_sha256)
    total = settings.train.epochs * settings.train.num_folds * len(trainings)
    with track_training(settings.mlflow, _describe_trainings(settings, table, trainings, runs)) as tracker:
        with show_progress("training, epochs of all folds", total) as meter:
            follower = _EpochFollower(meter, tracker)
            trained = train_folds(
                table,
                trainings,
                places,
                workers=settings.workers,
                on_progress=follower.follow,
                on_end=follower.end,
            )
        tested_on = measure_networks(table, trainings, trained, places, settings.score)
        bundles = write_bundles(settings, table, trainings, trained, tested_on, today)
        for training, (manifest, files) in zip(trainings, bundles, strict=True):
            tracker.finish(training.title, manifest, files)
    models = [_summarise(manifest) for manifest, _ in bundles]
    epochs = {"epochs": meter.done - meter.found, "epochs_resumed": meter.found}
    return {"bundle": out.uri, **epochs, **(models[0] if len(models) == 1 else {"models": models})}


def measure_networks(
    table: VolumesTable,
    trainings: Sequence[Training],
    trained: Sequence[ReadFolds],
    places: Places,
    config: ScoreConfig,
) -> list[str]:
    """What each network's model card says of the test cohort, measured where the cluster has volumes and GPUs.

    Raises: RunError if the cluster or a task gives up; the same call again trains nothing twice.
    """
    if not (table.frame["cohort"] == "test").any():
        return [NO_TEST] * len(trainings)
    has_gpu = choose_gpus(read_room(list_nodes()), trainings[0].config.device)
    measure = ray.remote(num_cpus=1, num_gpus=int(has_gpu))(_measure_network)
    print_heading("measuring on the test cohort")
    try:
        told: list[str] = ray.get(
            [
                measure.remote(places, training, read_folds, config, "cuda" if has_gpu else "cpu")
                for training, read_folds in zip(trainings, trained, strict=True)
            ]
        )
        return told
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise _name_failure("the test cohort could not be measured", cause) from error


def _measure_network(
    places: Places, training: Training, read_folds: ReadFolds, config: ScoreConfig, device: str
) -> str:
    """On the cluster: the model card's Markdown on the test cohort. Raises: UsageError as `refuse_open_node`."""
    refuse_open_node()
    folds, seed = read_folds(), training.config.seed
    members = (_build_member(training, fold) for fold in folds)
    backend = TorchBackend(members, batch_size=config.batch_size, num_threads=config.num_threads, device=device)
    ensemble = Ensemble(backend, batch_size=config.batch_size, temperatures=[fold.temperature for fold in folds])
    index = open_volumes(places.volumes, places.cache, places.cohort_sha256)
    return describe_test(evaluate_test(ensemble, index, config.batch_size, seed))


def _build_member(training: Training, fold: FoldResult) -> DARNet:
    network = build_network(training.network, training.config.seed)
    network.load_state_dict(fold.state)
    return network


def write_bundles(
    settings: TrainSettings,
    table: VolumesTable,
    trainings: Sequence[Training],
    trained: Sequence[ReadFolds],
    tested_on: Sequence[str],
    today: date,
) -> list[tuple[BundleManifest, Files]]:
    """Write each training's bundle to its folder of `settings.out`.

    `tested_on` is what each model card says of the test cohort. Returns each manifest with the files but the weights.
    """
    made: list[tuple[BundleManifest, Files]] = []

    def make_each() -> Iterator[tuple[str, Files]]:
        for training, read_folds, told in zip(trainings, trained, tested_on, strict=True):
            bundle, files = make_bundle(
                settings=BundleSettings(volume=table.volume, network=training.network, train=training.config),
                folds=[
                    TrainedFold(
                        fold.state, settings.workers, training.config.seed, fold.metrics, fold.temperature, fold.history
                    )
                    for fold in read_folds()
                ],
                cohort_sha256=table.cohort_sha256,
                model_version=today.isoformat(),
                code_version=name_training_code(),
                trained_on=describe_cohort(table),
                tested_on=told,
            )
            weights = {fold.file for fold in bundle.manifest.folds}
            made.append((bundle.manifest, {name: data for name, data in files.items() if name not in weights}))
            yield training.folder, files

    publish_bundles(settings.out, make_each())
    return made


def _summarise(manifest: BundleManifest) -> dict[str, Any]:
    return {
        "model": manifest.model_name,
        "seed": manifest.settings.train.seed,
        "model_sha256": manifest.model_sha256,
        "validation_accuracy_3class": [fold.validation["accuracy_3class"] for fold in manifest.folds],
    }


def _check_writable(store: Store) -> None:
    """Raises: StorageError, CredentialsError: at once, and not from the first worker that keeps a checkpoint."""
    probe = f".probe-{uuid.uuid4().hex}"
    store.write_bytes(probe, b"")
    store.delete(probe)


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


def _describe_trainings(
    settings: TrainSettings, table: VolumesTable, trainings: Sequence[Training], runs: Store
) -> list[TrackedNetwork]:
    """What MLflow is told of each training before it begins."""
    volume = table.volume.model_dump(mode="json")
    tags = {"cohort_sha256": table.cohort_sha256, "preprocessing_version": table.volume.preprocessing_version}
    return [
        TrackedNetwork(
            training.title,
            f"{runs.uri}/{name_run(table, training.network, training.config, settings.workers, 0)}",
            training.config.num_folds,
            {
                "volume": volume,
                "train": training.config.model_dump(mode="json"),
                "network": training.network.model_dump(mode="json"),
                "workers": settings.workers,
            },
            tags | {"code_version": name_training_code()},
        )
        for training in trainings
    ]


class _EpochFollower:
    """Counts the epochs of all folds. Those a fold had before this start count as found, those it has twice once."""

    def __init__(self, meter: Meter, tracker: Tracker) -> None:
        self._meter, self._tracker = meter, tracker
        self._done: Counter[FoldTask] = Counter()

    def follow(self, task: FoldTask, metrics: Metrics) -> None:
        """A fold has trained an epoch: the first to be told of follows those found in its checkpoint."""
        epoch = int(metrics["epoch"])
        if task not in self._done:
            self._find(task, epoch)
        units = max(0, epoch + 1 - self._done[task])
        self._done[task] += units
        self._meter.advance(units, {task.title: units})
        self._tracker.log_epoch(Training(task.network, task.config).title, task.fold, metrics)

    def end(self, task: FoldTask) -> None:
        """A fold is trained: what it told of no epoch of was there before."""
        self._find(task, task.config.epochs - self._done[task])

    def _find(self, task: FoldTask, units: int) -> None:
        self._done[task] += units
        self._meter.find(units, {task.title: units})


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
        raise _name_failure(f"{task.title} failed {MAX_FAILURES + 1} times, the last time with", failures[0]) from error
    except TrainingFailedError as error:
        raise RunError(f"{task.title} failed: {error}") from error
    assert checkpoint is not None, "every epoch reports a checkpoint"
    return checkpoint


def _name_failure(title: str, cause: BaseException) -> RunError:
    """What ended a worker, with the exit code that it asks for."""
    failure = RunError(f"{title}: {cause}")
    if isinstance(cause, RunError):
        failure.exit_code = cause.exit_code
    return failure
