"""Training on a Ray cluster: a volumes folder and settings enter, a model bundle leaves."""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from darnet.bundle_writing import Files, TrainedFold, make_bundle, publish_bundles, refuse_existing
from darnet.code_version import name_training_code
from darnet.config import ScoreConfig
from darnet.evaluation.model_card import NO_TEST, describe_cohort, describe_test, evaluate_test
from darnet.inference.torch_backend import TorchBackend
from darnet.manifest import BundleManifest, BundleSettings
from darnet.model import DARNet, build_network
from darnet.ray_folds import ReadFolds, name_failure, train_folds
from darnet.ray_token import list_nodes, refuse_open_node
from darnet.score import Ensemble
from darnet.settings import TrainSettings
from darnet.storage import Store, open_store
from darnet.terminal import Meter, print_heading, show_progress
from darnet.tracking import TrackedNetwork, Tracker, track_training
from darnet.train import FoldResult, Metrics
from darnet.training_plan import (
    FoldTask,
    Places,
    Training,
    choose_gpus,
    choose_trainings,
    match_division,
    name_run,
    place_runs,
    read_room,
)
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesTable, read_table


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
        raise name_failure("the test cohort could not be measured", cause) from error


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
