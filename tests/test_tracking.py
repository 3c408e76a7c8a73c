"""A training in MLflow, read back by MLflow's own client from its own file store."""

import itertools
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from darnet.bundle import Bundle
from darnet.bundle_writing import Files, TrainedFold, make_bundle
from darnet.config import ModelConfig, TrainConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.manifest import BundleSettings
from darnet.model import build_network
from darnet.tracking import EXPERIMENT, TrackedNetwork, Tracker, track_training
from tests.places import ROOT

SHAPE = (16, 32, 32)
NETWORK = ModelConfig(base_channels=4, volume_shape=SHAPE)
TRAINING = TrackedNetwork(
    "darnet-da-ca",
    "s3://it's/runs/darnet-da-ca-fold0-0123",
    2,
    {"train": {"epochs": 3, "augment": {"zoom": [0.9, 1.1]}}, "workers": 2},
    {"cohort_sha256": "c" * 64},
)


def make_epoch(fold: int, epoch: int) -> dict[str, float]:
    """The first has no AUC: a fold without a class."""
    auc = math.nan if epoch == 0 else 0.5 + epoch / 10
    return {"epoch": epoch, "learning_rate": 1e-3, "train_loss": 3.0 - epoch - fold, "auc_ncp": auc}


def make_files() -> tuple[Bundle, Files]:
    return make_bundle(
        settings=BundleSettings(volume=VolumeConfig(shape=SHAPE), network=NETWORK, train=TrainConfig()),
        folds=[
            TrainedFold(
                build_network(NETWORK, fold).state_dict(),
                2,
                0,
                make_epoch(fold, 2),
                history=[make_epoch(fold, epoch) for epoch in range(3)],
            )
            for fold in range(2)
        ],
        cohort_sha256="c" * 64,
        model_version="1",
        code_version="0",
        trained_on="nothing",
    )


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A reader of the store that the tests log to, and none of this machine's own settings."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return MlflowClient(str(tmp_path / "mlflow"))


def find_runs(client: MlflowClient) -> tuple[list[Run], list[Run]]:
    """Runs of networks, and runs of folds below them in the order of the folds."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], sorted(children, key=lambda run: run.info.run_name or "")


def read_curve(client: MlflowClient, run: Run, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def break_off(tracker: Tracker) -> None:
    """Two epochs of one fold, and then a failure."""
    for epoch in range(2):
        tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, epoch))
    raise KeyboardInterrupt


def start_and_break_off(place: str) -> None:
    with track_training(place, [TRAINING]) as tracker:
        break_off(tracker)


def test_a_training_that_was_resumed_is_logged_once(client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start_and_break_off(str(tmp_path / "mlflow"))
    (network,), (first, _) = find_runs(client)
    assert (network.info.status, first.info.status) == ("FAILED", "FAILED")
    assert read_curve(client, first, "train_loss") == [(0, 3.0), (1, 2.0)]

    bundle, files = make_files()
    with track_training(str(tmp_path / "mlflow"), [TRAINING]) as tracker:
        assert client.get_run(network.info.run_id).info.status == "RUNNING"
        tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, 1))  # what was done after the last checkpoint
        tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, 2))
        tracker.finish("darnet-da-ca", bundle.manifest, files)

    (again,), folds = find_runs(client)
    assert again.info.run_id == network.info.run_id
    assert [run.info.status for run in (again, *folds)] == ["FINISHED"] * 3
    for fold, run in enumerate(folds):
        assert run.data.tags["mlflow.parentRunId"] == network.info.run_id
        assert read_curve(client, run, "train_loss") == [(epoch, 3.0 - epoch - fold) for epoch in range(3)]
        assert read_curve(client, run, "auc_ncp") == [(1, 0.6), (2, 0.7)]
        assert "epoch" not in run.data.metrics


def test_a_networks_run_tells_settings_means_and_documents(client: MlflowClient, tmp_path: Path) -> None:
    bundle, files = make_files()
    for _ in range(2):
        with track_training(str(tmp_path / "mlflow"), [TRAINING]) as tracker:
            tracker.finish("darnet-da-ca", bundle.manifest, files)
    (run,), _ = find_runs(client)
    assert run.info.run_name == "darnet-da-ca"
    assert run.data.params == {"train.epochs": "3", "train.augment.zoom": "[0.9, 1.1]", "workers": "2"}
    assert run.data.metrics == {"mean_train_loss": 0.5, "mean_auc_ncp": 0.7}
    assert len(client.get_metric_history(run.info.run_id, "mean_auc_ncp")) == 1
    assert run.data.tags["cohort_sha256"] == "c" * 64
    assert run.data.tags["model_sha256"] == bundle.manifest.model_sha256
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    for name in ("MODEL_CARD.md", "bundle.json"):
        assert (folder / name).read_bytes() == files[name]


def test_another_place_of_checkpoints_is_another_training(client: MlflowClient, tmp_path: Path) -> None:
    for training in ("runs/a", "runs/b", "runs/a"):
        network = TrackedNetwork(TRAINING.name, training, 2, {}, {})
        with track_training(str(tmp_path / "mlflow"), [network]):
            pass
    networks, folds = find_runs(client)
    assert (len(networks), len(folds)) == (2, 4)


def test_a_training_goes_on_when_mlflow_fails(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, files = make_files()
    with track_training(str(tmp_path / "mlflow"), [TRAINING]) as tracker:
        _, folds = find_runs(client)
        client.delete_run(folds[0].info.run_id)
        tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, 0))
        assert "MLflow did not take all of it" in capsys.readouterr().err
        client.restore_run(folds[0].info.run_id)
        tracker.finish("darnet-da-ca", bundle.manifest, files)
    assert [step for step, _ in read_curve(client, folds[0], "train_loss")] == [0, 1, 2]


class TrackingServer(ThreadingHTTPServer):
    """As much of MLflow's REST interface as a training needs, until it is told to fall silent."""

    def __init__(self) -> None:
        self.num_unanswered, self.is_silent, self.is_over = 0, False, threading.Event()
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: TrackingServer
    runs = itertools.count()

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.is_silent:
            self.server.num_unanswered += 1
            self.server.is_over.wait()
            return
        answers = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "1"}},
            "runs/create": {"run": {"info": {"run_id": f"run{next(self.runs)}"}}},
        }
        path = self.path.partition("?")[0].partition("/mlflow/")[2]
        body = json.dumps(answers.get(path, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Not on stderr, which the tests read."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    """Asked without a proxy and with a second's patience."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server = TrackingServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.is_over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("retries", "attempts"), [pytest.param(None, 3, marks=pytest.mark.slow), ("0", 1)])
def test_a_server_that_falls_silent_is_waited_for_once(
    server: TrackingServer,
    retries: str | None,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The number of retries is the user's, where there is one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries or "")
    if retries is None:
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    with track_training(server.address, [TRAINING]) as tracker:
        server.is_silent = True
        for epoch in range(5):
            tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, epoch))
    assert server.num_unanswered == attempts
    assert capsys.readouterr().err.count("MLflow did not take all of it, which stops nothing") == 1


def test_a_server_that_is_gone_is_told_of_once_and_tried_once_more_at_the_end(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bundle, files = make_files()
    with track_training(server.address, [TRAINING]) as tracker:
        server.shutdown()
        server.server_close()
        for epoch in range(5):
            tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, epoch))
        assert capsys.readouterr().err.count("MLflow did not take all of it") == 1
        tracker.finish("darnet-da-ca", bundle.manifest, files)
    assert capsys.readouterr().err.count("MLflow did not take all of it") == 1


@pytest.mark.parametrize("login", ["nurse:s3cret", ":s3cret", "s3cret", "nurse:s3cr@s3cret"])
def test_no_message_repeats_a_password(
    server: TrackingServer, login: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = server.address.replace("://", f"://{login}@")
    with track_training(address, [TRAINING]) as tracker:
        server.shutdown()
        server.server_close()
        tracker.log_epoch("darnet-da-ca", 0, make_epoch(0, 0))
    with pytest.raises(UsageError) as refused, track_training(address, [TRAINING]):
        pass
    for told in (capsys.readouterr().err, str(refused.value)):
        assert f"://***@127.0.0.1:{server.server_port}" in told
        assert "s3c" not in told


class FullStore:
    """The runs of a network whose artifacts lie where another library than MLflow refuses them."""

    def finish(self, *_: object) -> NoReturn:
        raise ArithmeticError("the artifact store is full")


def test_a_trained_network_stays_trained_whatever_an_artifact_store_raises(capsys: pytest.CaptureFixture[str]) -> None:
    bundle, files = make_files()
    Tracker({"darnet-da-ca": cast(Any, FullStore())}).finish("darnet-da-ca", bundle.manifest, files)
    assert "stops nothing: the artifact store is full" in capsys.readouterr().err


def test_runs_end_although_their_documents_are_refused_and_one_of_them_is_gone(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, files = make_files()
    with track_training(str(tmp_path / "mlflow"), [TRAINING]) as tracker:
        (network,), folds = find_runs(client)
        client.delete_run(folds[0].info.run_id)
        tracker.finish("darnet-da-ca", bundle.manifest, {**files, "MODEL_CARD.md": b"\xff"})
    assert "MLflow did not take all of it" in capsys.readouterr().err
    assert [client.get_run(run.info.run_id).info.status for run in (network, folds[1])] == ["FINISHED"] * 2


def test_an_interrupted_training_ends_every_run_that_can_be(client: MlflowClient, tmp_path: Path) -> None:
    other = TrackedNetwork("darnet-ca", "runs/other", 2, {}, {})

    def interrupt() -> None:
        with track_training(str(tmp_path / "mlflow"), [TRAINING, other]):
            _, folds = find_runs(client)
            gone = next(run for run in folds if run.info.run_name == "darnet-da-ca fold 0")
            client.delete_run(gone.info.run_id)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    networks, folds = find_runs(client)
    assert [run.info.status for run in (*networks, *folds)] == ["FAILED"] * 5


def test_an_address_that_mlflow_does_not_know_is_refused(tmp_path: Path) -> None:
    def start(place: str) -> Any:
        with track_training(place, [TRAINING]) as tracker:
            return tracker

    with pytest.raises(UsageError, match=r"--mlflow gopher://x: MLflow cannot be used there \(.*unsupported URI"):
        start("gopher://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"--mlflow {tmp_path}/file: MLflow cannot be used there"):
        start(str(tmp_path / "file"))


@pytest.mark.slow
def test_without_mlflow_nothing_is_logged_and_asking_for_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['mlflow'] = None\n"
        "from darnet.errors import UsageError\n"
        "from darnet.tracking import track_training\n"
        "with track_training(None, []) as tracker: tracker.log_epoch('darnet-da-ca', 0, {'epoch': 0})\n"
        "try:\n"
        "    with track_training('http://nurse:secret@mlflow', []): pass\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "--mlflow http://***@mlflow: MLflow is not installed; pip install '.[mlflow]'\n"
