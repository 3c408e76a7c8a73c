"""A training in MLflow, for those who watch theirs there: settings, metrics and a bundle's documents enter, runs leave.

A network is a run, and each of its folds one below it. What a resumed training finds logged is not logged again.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from darnet.bundle import CARD_FILE
from darnet.errors import UsageError
from darnet.history import HISTORY_FILE
from darnet.manifest import MANIFEST_FILE, BundleManifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "darnet"  # unless MLFLOW_EXPERIMENT_NAME names another, as everywhere in MLflow
TRAINING_TAG, FOLD_TAG, PARENT_TAG = "darnet.training", "darnet.fold", "mlflow.parentRunId"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a hospital's machines report to nobody
    "MLFLOW_ALLOW_FILE_STORE": "true",  # who names a folder means one, though MLflow would rather have a database
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for the job's summary
    # A server that is gone holds the training up for half a minute; MLflow's own 120 s and 7 retries take many.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


@dataclass(frozen=True, slots=True)
class TrackedNetwork:
    """What a network's run says from its start. `training` is the same string whenever the same training goes on."""

    name: str
    training: str
    num_folds: int
    settings: Mapping[str, Any]
    tags: Mapping[str, str]


class _Run:
    """A run with this identity (tags that no other has), as an earlier start has left it, or a new one."""

    def __init__(
        self, client: "MlflowClient", experiment: str, name: str, identity: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        condition = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
        found = client.search_runs([experiment], condition, max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        run = found[0] if found else client.create_run(experiment, run_name=name, tags={**identity, **tags})
        self.id: str = run.info.run_id
        self._client = client
        self._logged = {
            (metric, point.step) for metric in run.data.metrics for point in client.get_metric_history(self.id, metric)
        }

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add the points that are defined and not there yet."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [
            Metric(name, value, now_ms, step)
            for name, value in metrics.items()
            if value is not None and math.isfinite(value) and (name, step) not in self._logged
        ]
        if points:
            self._client.log_batch(self.id, metrics=points)
        self._logged |= {(point.key, step) for point in points}


class _NetworkRuns:
    """The run of a network and those of its folds."""

    def __init__(self, client: "MlflowClient", experiment: str, network: TrackedNetwork) -> None:
        from mlflow.entities import Param

        training = hashlib.sha256(network.training.encode()).hexdigest()
        self._client = client
        self.run = _Run(client, experiment, network.name, {TRAINING_TAG: training}, network.tags)
        params = [Param(name, value) for name, value in flatten_settings(network.settings).items()]
        client.log_batch(self.run.id, params=params)
        self.folds = [
            _Run(client, experiment, f"{network.name} fold {fold}", {PARENT_TAG: self.run.id, FOLD_TAG: str(fold)}, {})
            for fold in range(network.num_folds)
        ]

    def log_epoch(self, fold: int, metrics: Mapping[str, float | None]) -> None:
        """A point of each of the fold's curves."""
        points = {name: value for name, value in metrics.items() if name not in ("fold", "epoch")}
        self.folds[fold].log(int(metrics["epoch"] or 0), points)

    def finish(self, manifest: BundleManifest, files: Mapping[str, bytes]) -> None:
        """Add what a bundle says, and the epochs that are still missing; the runs end whatever of it fails."""
        try:
            self._add_bundle(manifest, files)
        finally:
            self.end("FINISHED")

    def _add_bundle(self, manifest: BundleManifest, files: Mapping[str, bytes]) -> None:
        for line in files[HISTORY_FILE].decode().splitlines():
            metrics = json.loads(line)
            self.log_epoch(metrics["fold"], metrics)
        for name in set(manifest.folds[0].validation) - {"epoch", "learning_rate"}:
            values = [fold.validation[name] for fold in manifest.folds]
            self.run.log(0, {f"mean_{name}": None if None in values else float(np.mean(np.array(values, float)))})
        self._client.set_tag(self.run.id, "model_sha256", manifest.model_sha256)
        for name in (CARD_FILE, MANIFEST_FILE):
            self._client.log_text(self.run.id, files[name].decode(), name)

    def end(self, status: str) -> None:
        """Close all of them as FINISHED or FAILED, also where one is refused; a server that is gone is asked once.

        Raises: what the last one that was refused raised.
        """
        failure: Exception | None = None
        for run in (*self.folds, self.run):
            try:
                self._client.set_terminated(run.id, status)
            except Exception as error:  # MLflow's own, or its store's
                if isinstance(error.__context__, OSError):  # MLflow's word for no answer; it waits half a minute for it
                    raise
                failure = error
        if failure is not None:
            raise failure


class Tracker:
    """The runs of a training, by network; where nobody asked for MLflow there are none, and nothing is logged.

    A training neither fails with its tracking nor waits for it time and again: the first epoch that MLflow does not
    take is told on stderr, and the last to be tried before its network is done. Then all that are missing are.
    """

    def __init__(self, networks: Mapping[str, _NetworkRuns]) -> None:
        self._unfinished = dict(networks)
        self._has_failed = False

    def log_epoch(self, network: str, fold: int, metrics: Mapping[str, float]) -> None:
        """Add an epoch to a fold's curves."""
        if network in self._unfinished and not self._has_failed:
            with self._tell_trouble():
                self._unfinished[network].log_epoch(fold, metrics)

    def finish(self, network: str, manifest: BundleManifest, files: Mapping[str, bytes]) -> None:
        """Add to a network's run what its bundle says, its card and its manifest."""
        if network in self._unfinished:
            with self._tell_trouble():
                self._unfinished.pop(network).finish(manifest, files)

    def fail(self) -> None:
        """Mark the runs of networks without a bundle."""
        for runs in self._unfinished.values():
            with self._tell_trouble():
                runs.end("FAILED")

    @contextmanager
    def _tell_trouble(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an artifact store has its own library, and that its own errors
            self._has_failed = True
            told = f"MLflow did not take all of it, which stops nothing: {error}"
            print(hide_password(told), file=sys.stderr)


@contextmanager
def track_training(uri: str | None, networks: Sequence[TrackedNetwork]) -> Iterator[Tracker]:
    """Open the runs of these networks at an MLflow tracking URI; None tracks nothing.

    Raises: UsageError if MLflow is not installed, or does not answer at this address.
    """
    tracker = Tracker({}) if uri is None else _open_tracker(uri, networks)
    try:
        yield tracker
    except BaseException:
        tracker.fail()
        raise


def hide_password(text: str) -> str:
    """`http://user:password@host` as `http://***@host`, wherever the text has one."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"train": {"epochs": 80}}` as `{"train.epochs": "80"}`."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _open_tracker(uri: str, networks: Sequence[TrackedNetwork]) -> Tracker:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        told = f"--mlflow {hide_password(uri)}: MLflow is not installed; pip install '.[mlflow]'"
        raise UsageError(told) from error
    try:
        client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        return Tracker({network.name: _NetworkRuns(client, experiment, network) for network in networks})
    except (MlflowException, OSError) as error:
        told = f"--mlflow {uri}: MLflow cannot be used there ({error}); correct the address or leave it out"
        raise UsageError(hide_password(told)) from error
