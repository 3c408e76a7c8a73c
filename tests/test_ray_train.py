"""Folds on a real, small Ray cluster: they give a bundle, survive the death of a rank, and refuse what cannot be."""

import contextlib
import functools
import hashlib
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.train import Checkpoint, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from rich.console import Console

from darnet.bundle import load_networks, read_bundle
from darnet.code_version import name_training_code
from darnet.config import ModelConfig, ScoreConfig, TrainConfig
from darnet.errors import CredentialsError, ExitCode, RunError, StorageError, UsageError
from darnet.evaluation.seeds import merge_seeds
from darnet.history import render_history
from darnet.manifest import find_bundles
from darnet.model import build_network
from darnet.ray_folds import _fit, _run_all, train_folds
from darnet.ray_train import _EpochFollower, measure_networks, train_model, write_bundles
from darnet.settings import TrainSettings
from darnet.storage import Store, open_store
from darnet.terminal import Meter
from darnet.tracking import Tracker
from darnet.train import ALONE, FoldResult, Metrics, evaluate
from darnet.training_plan import FoldTask, Places, Training, choose_networks, choose_trainings, name_run
from darnet.volumes_folder import VolumesIndex
from tests.gloo_ranks import train_with_torch_alone
from tests.places import ROOT
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)
CONFIG = TrainConfig(epochs=6, num_folds=2, learning_rate=3e-3)
TRAINING = Training(NETWORK, CONFIG)
WORKERS = 2
DAY = date(2020, 3, 1)


# Ray Train touches Ray Data's context, which warns of its own settings.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VolumesIndex:
    return make_volumes(tmp_path_factory.mktemp("ray") / "volumes", num_train=24, num_folds=2, num_test=3)


def make_settings(index: VolumesIndex, out: Path, **changed: object) -> TrainSettings:
    values = {"volumes": str(index.folder), "out": str(out), "workers": WORKERS, "train": CONFIG, "network": NETWORK}
    return TrainSettings.model_validate(values | changed)


def make_places(index: VolumesIndex, runs: Path) -> Places:
    return Places(str(index.folder), str(runs), runs / "cache", index.cohort_sha256)


def ignore(*_: object) -> None:
    """Progress nobody watches."""


@dataclass(frozen=True)
class Killed:
    """Both folds trained although a rank was killed: what came of it, what was reported, where the checkpoints are."""

    results: list[FoldResult]
    reported: list[tuple[int, int]]
    victims: list[int]
    runs: Path
    printed: str


@pytest.fixture(scope="module")
def killed(
    index: VolumesIndex,
    ray_cluster: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Killed:
    return train_and_kill(index, tmp_path_factory.mktemp("runs"))


def train_and_kill(index: VolumesIndex, runs: Path) -> Killed:
    """Train both folds; once each has reported its second epoch, the newest worker dies."""
    reported: list[tuple[int, int]] = []
    victims: list[int] = []

    def kill_once(task: FoldTask, metrics: Metrics) -> None:
        reported.append((task.fold, int(metrics["epoch"])))
        if not victims and {(0, 1), (1, 1)} <= set(reported):
            victims.append(find_train_workers()[-1])
            os.kill(victims[0], signal.SIGKILL)

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        (read_folds,) = train_folds(index, [TRAINING], make_places(index, runs), workers=WORKERS, on_progress=kill_once)
    return Killed(read_folds(), reported, victims, runs, printed.getvalue())


class ReportQueue:
    """Ray's queue, within this process."""

    def __init__(self) -> None:
        self._queue = queue.Queue[tuple[int, Metrics]]()
        self.put = self._queue.put

    def get(self, timeout: float | None = None) -> tuple[int, Metrics]:
        try:
            return self._queue.get(block=timeout is not None, timeout=timeout)
        except queue.Empty as error:
            raise Empty from error

    get_nowait = get


@pytest.mark.ray
def test_a_resumed_training_counts_what_was_there_and_tells_the_pace_of_what_it_does() -> None:
    """Fold 0 was trained, fold 1 had four epochs of six; fold 2 is new, and does its first one twice."""
    places, reports = Places("volumes", "runs", Path("cache"), ""), ReportQueue()
    tasks = [FoldTask(places, f"run{fold}", NETWORK, CONFIG, fold) for fold in range(3)]
    told = {0: [], 1: [4, 5], 2: [0, 0, 1, 2, 3, 4, 5]}

    def make_trainer(fold: int) -> TorchTrainer:
        def fit() -> SimpleNamespace:
            for epoch in told[fold]:
                reports.put((fold, {"epoch": float(epoch)}))
            return SimpleNamespace(checkpoint=f"of fold {fold}")

        return cast(TorchTrainer, SimpleNamespace(fit=fit))

    meter = Meter("training", 18, Console(file=io.StringIO()), None)
    follower = _EpochFollower(meter, Tracker({}))
    found = _run_all(tasks, make_trainer, 1, cast(Queue, reports), follower.follow, follower.end)
    assert [str(checkpoint) for checkpoint in found] == ["of fold 0", "of fold 1", "of fold 2"]
    assert (meter.done, meter.found) == (18, 6 + 4)
    assert meter.counts == {task.title: 6 for task in tasks}


def find_train_workers() -> list[int]:
    """Process ids of the Ray Train workers this process has started, oldest first."""
    parents, workers = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title = (entry / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if title.startswith("ray::") and "TrainWorker" in title:
            workers.append(int(entry.name))
    return sorted(worker for worker in workers if is_descendant(worker, parents))


def is_descendant(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid == os.getpid():
            return True
        pid = parents[pid]
    return False


@pytest.mark.ray
def test_a_killed_rank_restarts_and_ends_in_the_bits_of_an_undisturbed_training(
    index: VolumesIndex, killed: Killed, tmp_path: Path
) -> None:
    undisturbed = train_with_torch_alone(index.folder, NETWORK, CONFIG, WORKERS, tmp_path)
    assert len(killed.victims) == 1
    # from where it was: training anew would end in the same bits
    assert [killed.reported.count((fold, 0)) for fold in range(2)] == [1, 1]
    for result, expected in zip(killed.results, undisturbed, strict=True):
        assert (result.fold, result.metrics, result.history) == (expected.fold, expected.metrics, expected.history)
        assert all(torch.equal(result.state[name], expected.state[name]) for name in expected.state)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_so_does_one_that_ray_has_given_up_and_that_goes_on_in_a_new_run(
    index: VolumesIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("darnet.ray_folds.MAX_FAILURES", 0)
    killed = train_and_kill(index, tmp_path / "runs")
    undisturbed = train_with_torch_alone(index.folder, NETWORK, CONFIG, WORKERS, tmp_path)
    assert "; it goes on behind epoch" in capsys.readouterr().err
    assert [killed.reported.count((fold, 0)) for fold in range(2)] == [1, 1]
    for result, expected in zip(killed.results, undisturbed, strict=True):
        assert all(torch.equal(result.state[name], expected.state[name]) for name in expected.state)


@pytest.mark.ray
def test_every_fold_reports_every_epoch_and_learns(killed: Killed) -> None:
    assert set(killed.reported) == {(fold, epoch) for fold in range(2) for epoch in range(6)}
    for result in killed.results:
        assert [int(metrics["epoch"]) for metrics in result.history] == list(range(6))
        assert result.metrics in result.history
        assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_history_beside_the_checkpoints_has_each_epoch_once_in_spite_of_the_kill(killed: Killed) -> None:
    written = {path.parent.name: path.read_bytes() for path in killed.runs.glob("*/metrics.jsonl")}
    assert len(written) == 2
    assert {render_history(result.fold, result.history) for result in killed.results} == set(written.values())
    assert len(list(killed.runs.glob("*/tensorboard/events.out.tfevents.*"))) == 2
    assert [path.read_text() for path in killed.runs.glob("*/code_version")] == [name_training_code()] * 2


@pytest.mark.slow
@pytest.mark.ray
def test_training_prints_nothing_on_stdout(killed: Killed) -> None:
    assert killed.printed == ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_training_is_read_back_into_a_bundle(index: VolumesIndex, killed: Killed, tmp_path: Path) -> None:
    results = killed.results
    settings = make_settings(index, tmp_path / "bundle", runs=str(killed.runs), mlflow=str(tmp_path / "mlflow"))
    summary = train_model(settings, DAY)
    assert summary["validation_accuracy_3class"] == [result.metrics["accuracy_3class"] for result in results]
    bundle = read_bundle(open_store(str(tmp_path / "bundle")))
    assert bundle.manifest.cohort_sha256 == index.cohort_sha256
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "3 scans of 3 patients" in card
    assert "| auc_ncp |" in card
    assert [fold.world_size for fold in bundle.manifest.folds] == [WORKERS, WORKERS]
    for result, network in zip(results, load_networks(bundle), strict=True):
        measured = evaluate(network, index, index.select_validation(result.fold), 2, ALONE)
        assert measured == pytest.approx({name: result.metrics[name] for name in measured}, abs=1e-5)
    check_mlflow(tmp_path / "mlflow", summary["model_sha256"], index)


def check_mlflow(folder: Path, model_sha256: str, index: VolumesIndex) -> None:
    """Every epoch of both folds, although they were trained before anybody asked for MLflow; no scan, no patient."""
    client = MlflowClient(str(folder))
    (experiment,) = client.search_experiments(filter_string="name = 'darnet'")
    runs = client.search_runs([experiment.experiment_id])
    (network,) = [run for run in runs if run.data.tags.get("model_sha256") == model_sha256]
    assert network.data.params["train.epochs"] == "6"
    folds = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == network.info.run_id]
    curves = [client.get_metric_history(run.info.run_id, "validation_loss") for run in folds]
    assert [[point.step for point in curve] for curve in curves] == [list(range(6))] * 2
    logged = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    names = [*index.frame["scan_id"], *index.frame["patient_id"]]
    assert [name for name in names if name in logged] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_can_hold_are_refused_at_once(index: VolumesIndex, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"batch_size": 12})
    with pytest.raises(UsageError, match="--workers 12 takes 12 CPUs at once; the cluster has 4 CPUs"):
        train_folds(index, [Training(NETWORK, config)], make_places(index, tmp_path), workers=12, on_progress=ignore)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_second_driver_is_refused_while_the_first_trains_there(index: VolumesIndex, tmp_path: Path) -> None:
    places = make_places(index, tmp_path)
    name = f"darnet-runs-{hashlib.sha256(places.runs.encode()).hexdigest()[:16]}"
    first = ray.remote(Killed).options(name=name, namespace="darnet", num_cpus=0).remote([], [], [], tmp_path, "")
    with pytest.raises(UsageError, match="another job of this cluster trains there"):
        train_folds(index, [TRAINING], places, workers=WORKERS, on_progress=ignore)
    del first


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_training_that_other_code_began_is_refused_and_nobody_kept_out(index: VolumesIndex, tmp_path: Path) -> None:
    places = make_places(index, tmp_path)
    note = tmp_path / name_run(index, NETWORK, CONFIG, WORKERS, 1) / "code_version"
    note.parent.mkdir()
    note.write_text("0.0.9+0123456789ab")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"code version 0\.0\.9\+0123456789ab began 1 of these 2 folds"):
            train_folds(index, [TRAINING], places, workers=WORKERS, on_progress=ignore)


class FailingTrainer:
    """A trainer whose workers end with these."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = dict(enumerate(failures))

    def fit(self) -> NoReturn:
        raise WorkerGroupError("2 workers failed", self._failures)


@pytest.mark.parametrize("error", [StorageError("s3://volumes: gone"), CredentialsError("s3://volumes: who are you?")])
def test_what_a_worker_says_of_store_and_credentials_decides_the_exit_code(error: RunError, tmp_path: Path) -> None:
    task = FoldTask(Places("volumes", "runs", tmp_path, ""), "run", NETWORK, CONFIG, 1)
    with pytest.raises(
        RunError, match=f"darnet-da-ca seed 0 fold 1 failed 4 times in one run, .* {re.escape(str(error))}"
    ) as caught:
        _fit(task, cast(TorchTrainer, FailingTrainer(RuntimeError("Connection closed by peer"), error)))
    assert caught.value.exit_code == error.exit_code > 1
    with pytest.raises(RunError, match="Connection closed by peer") as caught:
        _fit(task, cast(TorchTrainer, FailingTrainer(RuntimeError("Connection closed by peer"))))
    assert caught.value.exit_code == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_workers_kind_of_failure_survives_the_way_back(index: VolumesIndex, tmp_path: Path) -> None:
    """The driver reads the tables alone; that an array is missing is seen by the workers, and is wrong use."""
    shutil.copytree(index.folder, tmp_path / "volumes")
    array = tmp_path / "volumes" / index.frame["array"][0]
    array.unlink()
    places = replace(make_places(index, tmp_path / "runs"), volumes=str(tmp_path / "volumes"))
    with pytest.raises(RunError, match=re.escape(f"{array}: cannot be read")) as caught:
        train_folds(index, [TRAINING], places, workers=WORKERS, on_progress=ignore)
    assert caught.value.exit_code == ExitCode.WRONG_USE
    fold = FoldResult(0, build_network(NETWORK, 0).state_dict(), {}, [])
    with pytest.raises(RunError, match=f"the test cohort could not be measured: {re.escape(str(array))}") as caught:
        measure_networks(index, [TRAINING], [functools.partial(list, [fold])], places, ScoreConfig())
    assert caught.value.exit_code == ExitCode.WRONG_USE


class LosingTrainer:
    """Each run of it resumes, reports some epochs, which are the next of `told`, and fails while there are more."""

    def __init__(self, reports: ReportQueue, *told: Sequence[int]) -> None:
        self._reports, self._told = reports, list(told)
        self.failure: Exception = RuntimeError("the node\nis gone")
        self.num_made = 0

    def make(self, number: int) -> TorchTrainer:
        self.num_made += 1
        return cast(TorchTrainer, SimpleNamespace(fit=functools.partial(self._fit, number)))

    def _fit(self, number: int) -> SimpleNamespace:
        for epoch in self._told.pop(0):
            self._reports.put((number, {"epoch": float(epoch)}))
        if self._told:
            raise WorkerGroupError("2 workers failed", {0: self.failure})
        return SimpleNamespace(checkpoint="the last")


def run_losing(*told: Sequence[int]) -> tuple[LosingTrainer, list[int], Callable[[], list[Checkpoint]]]:
    """A fold trained by a `LosingTrainer`, and the epochs it is told of."""
    task, reports, followed = FoldTask(Places("", "", Path("cache"), ""), "run", NETWORK, CONFIG, 1), ReportQueue(), []
    losing = LosingTrainer(reports, *told)

    def follow(_: FoldTask, metrics: Metrics) -> None:
        followed.append(int(metrics["epoch"]))

    return losing, followed, lambda: _run_all([task], losing.make, 1, cast(Queue, reports), follow, ignore)


def test_a_fold_that_gets_further_each_time_survives_any_number_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    losing, followed, run = run_losing([0], [1], [1, 2], [3], [4], [5], [])
    assert list(map(str, run())) == ["the last"]
    assert losing.num_made == 7
    assert followed == [0, 1, 1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("the node is gone; it goes on behind epoch") == 6


@pytest.mark.parametrize(
    ("told", "num_made"),
    [(([], [0]), 1), (([0, 1], [], [2]), 2), (([0, 1], [1], [2]), 2)],
    ids=["at the start", "after progress", "an epoch that was trained before"],
)
def test_a_fold_that_gets_no_further_is_given_up(told: Sequence[Sequence[int]], num_made: int) -> None:
    losing, _, run = run_losing(*told)
    with pytest.raises(
        RunError, match="da-ca seed 0 fold 1 failed 4 times in one run, the last time with: the node\nis go"
    ):
        run()
    assert losing.num_made == num_made


def test_a_fold_that_gets_further_but_may_not_write_ends_with_that_exit_code() -> None:
    losing, _, run = run_losing([0, 1], [2], [])
    losing.failure = CredentialsError("s3://runs: may not be written")
    with pytest.raises(RunError, match="may not be written") as caught:
        run()
    assert (caught.value.exit_code, losing.num_made) == (ExitCode.CREDENTIALS, 1)


def test_what_does_not_fit_the_folds_is_refused_without_a_cluster(index: VolumesIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 workers do not divide a batch of 4"):
        train_folds(index, [TRAINING], make_places(index, tmp_path), workers=3, on_progress=ignore)


def test_an_existing_bundle_is_refused_before_anything_starts(index: VolumesIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        train_model(make_settings(index, tmp_path), DAY)


def test_several_networks_leave_a_folder_of_bundles_whole_or_not_at_all(index: VolumesIndex, tmp_path: Path) -> None:
    settings = make_settings(index, tmp_path / "out", networks=("plain", "da"))
    trainings = choose_trainings(settings, SMALL_VOLUME)
    trained = [functools.partial(list, make_folds(training)) for training in trainings]
    with pytest.raises(ValueError, match="these weights are not of the network"):
        write_bundles(settings, index, trainings, trained[:1] * 2, ["", ""], DAY)
    assert list(tmp_path.iterdir()) == []
    write_bundles(settings, index, trainings, trained, ["", ""], DAY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for training, name in zip(trainings, ("darnet-plain", "darnet-da"), strict=True):
        assert read_bundle(open_store(str(tmp_path / "out" / name))).manifest.settings.network == training.network


def test_every_network_of_every_seed_is_found_and_merged_as_one_ensemble(index: VolumesIndex, tmp_path: Path) -> None:
    settings = make_settings(index, tmp_path / "out", networks=("plain", "da"), seeds=(3, 4, 5))
    trainings = choose_trainings(settings, SMALL_VOLUME)
    trained = [functools.partial(list, make_folds(training)) for training in trainings]
    write_bundles(settings, index, trainings, trained, [""] * 6, DAY)
    manifests = [read_bundle(place).manifest for place in find_bundles(open_store(str(tmp_path / "out")))]
    assert {manifest.code_version for manifest in manifests} == {name_training_code()}
    for name in ("darnet-plain", "darnet-da"):
        merged = merge_seeds([manifest for manifest in manifests if manifest.model_name == name])
        assert sorted((fold.seed, fold.number) for fold in merged.folds) == [
            (seed, number) for seed in (3, 4, 5) for number in (0, 1)
        ]


def make_folds(training: Training) -> list[FoldResult]:
    states = [build_network(training.network, training.config.seed + fold).state_dict() for fold in range(2)]
    return [FoldResult(fold, state, {"accuracy_3class": 0.5}, []) for fold, state in enumerate(states)]


def start_job(*arguments: str) -> "subprocess.Popen[bytes]":
    """A job of its own, since workers of the shared cluster do not know the S3 server."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True)


def read_snapshots(runs: Store) -> list[bytes]:
    return [runs.read_bytes(item.key) for item in runs.list_objects() if item.key.endswith("snapshot.json")]


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_killed_job_resumes_from_a_bucket_and_ends_in_the_bits_of_an_undisturbed_training(
    index: VolumesIndex, s3: Callable[[], str], tmp_path: Path
) -> None:
    uri = s3()
    volumes, runs = open_store(uri + "/volumes"), open_store(uri + "/runs")
    for item in open_store(str(index.folder)).list_objects():
        volumes.write_bytes(item.key, (index.folder / item.key).read_bytes())
    places = ["--volumes", volumes.uri, "--runs", runs.uri, "--out", f"{uri}/out", "--cache", f"{tmp_path}/cache"]
    train = ["--train.epochs", "4", "--train.num-folds", "2", "--train.learning-rate", "3e-3"]
    arguments = [*places, *train, "--network.base-channels", "4", "--networks", "plain,ca"]

    job = start_job(*arguments)
    while not any(b"checkpoint_dir_name" in data for data in read_snapshots(runs)):  # what Ray resumes from
        assert job.poll() is None
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    job = start_job(*arguments)
    summary = json.loads(job.communicate(timeout=400)[0].splitlines()[-1])

    assert [model["model"] for model in summary["models"]] == ["darnet-plain", "darnet-ca"]
    assert len(list((tmp_path / "cache").glob("*/volumes.json"))) == 1
    assert summary["epochs_resumed"] >= 1
    assert summary["epochs"] + summary["epochs_resumed"] == 2 * 2 * 4
    (network,) = choose_networks(make_settings(index, tmp_path, networks=("plain",)), SMALL_VOLUME)
    expected = train_with_torch_alone(index.folder, network, CONFIG.model_copy(update={"epochs": 4}), 1, tmp_path)
    bundle = read_bundle(open_store(f"{uri}/out/darnet-plain"))
    for fold, trained in zip(expected, load_networks(bundle), strict=True):
        assert all(torch.equal(fold.state[name], tensor) for name, tensor in trained.state_dict().items())
