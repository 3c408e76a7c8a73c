"""A node of the cluster is lost in mid-work, as a spot machine is: training and scoring go on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darnet.bundle import load_networks, read_bundle
from darnet.config import ModelConfig, TrainConfig
from darnet.publishing.rows import PROBABILITIES
from darnet.results import read_predictions
from darnet.storage import open_store
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import make_chest, write_chest
from tests.gloo_ranks import train_with_torch_alone
from tests.places import ROOT
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

PATIENCE_S = 600
Job = subprocess.Popen[str]


def start_job(name: str, *arguments: str) -> Job:
    command = [sys.executable, "-m", f"jobs.{name}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish_job(job: Job) -> dict[str, Any]:
    """The job's summary.

    Raises: AssertionError with what it said if it failed.
    """
    printed, told = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, printed[-2000:] + told[-4000:]
    summary: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return summary


def wait_until(is_true: Callable[[], bool], job: Job) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_true():
        if job.poll() is not None:
            raise AssertionError("the job ended before its time: " + "".join(job.communicate())[-4000:])
        assert time.monotonic() < deadline_s, "what was waited for did not come"
        time.sleep(0.05)


def list_children(parent: int) -> dict[int, str]:
    """Titles of a process's children by process id."""
    children = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                children[int(entry.name)] = (entry / "cmdline").read_text()
        except (OSError, ValueError):
            continue
    return children


def find_workers(node: Any, title: str) -> list[int]:
    """Process ids of a node's workers whose title holds this."""
    (raylet,) = node.all_processes["raylet"]
    return [pid for pid, found in list_children(raylet.process.pid).items() if title in found]


def find_busy_node(cluster: Any, title: str) -> Any:
    return next(node for node in cluster.worker_nodes if find_workers(node, title))


def kill_worker(cluster: Any, title: str) -> bool:
    """Kill one worker that is at this now; whether there was one."""
    pids = [pid for node in cluster.worker_nodes for pid in find_workers(node, title)]
    if pids:
        os.kill(pids[0], signal.SIGKILL)
    return bool(pids)


NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)
CONFIG = TrainConfig(epochs=10, num_folds=2, learning_rate=3e-3)
TRAIN = "--train.epochs 10 --train.num-folds 2 --train.learning-rate 3e-3 --network.base-channels 4 --workers 2".split()


def count_epochs(runs: Path) -> list[int]:
    """Epochs in the history of each of the two folds."""
    paths = [list(runs.glob(f"*-fold{fold}-*/metrics.jsonl")) for fold in range(2)]
    return [sum(len(path.read_text().splitlines()) for path in found) for found in paths]


def test_training_goes_on_on_the_nodes_that_are_left_and_on_those_that_come(cluster: Any, tmp_path: Path) -> None:
    """One rank a node. With one node of three lost the gang moves; with two lost it waits for another."""
    index = make_volumes(tmp_path / "volumes", num_train=24, num_folds=2, num_test=3)
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    places = ["--volumes", str(index.folder), "--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/bundle"]
    job = start_job("train", *places, *TRAIN)
    seen = [count_epochs(tmp_path / "runs")]

    def has_epochs(fold: int, num_epochs: int) -> bool:
        seen.append(count_epochs(tmp_path / "runs"))
        return seen[-1][fold] >= num_epochs

    for fold in range(2):
        wait_until(lambda fold=fold: has_epochs(fold, 4), job)
        cluster.remove_node(find_busy_node(cluster, "TrainWorker"), allow_graceful=False)
        assert count_epochs(tmp_path / "runs")[fold] < CONFIG.epochs
        if fold == 1:
            cluster.add_node(num_cpus=1)
    wait_until(lambda: has_epochs(1, CONFIG.epochs), job)
    finish_job(job)
    steps_back = [was - now for before, after in pairwise(seen) for was, now in zip(before, after, strict=True)]
    assert max(steps_back) <= 2  # two checkpoints may not have been noted yet; a start from nothing loses three or more
    expected = train_with_torch_alone(index.folder, NETWORK, CONFIG, 2, tmp_path)
    trained = load_networks(read_bundle(open_store(f"{tmp_path}/bundle")))
    for result, network in zip(expected, trained, strict=True):
        assert all(torch.equal(result.state[name], tensor) for name, tensor in network.state_dict().items())


def score(archive: Path, model: Path, results: Path) -> Job:
    places = ["--archive", str(archive), "--model", str(model), "--results", str(results)]
    return start_job("score", *places, "--score.part-scans", "5", "--night", "2026-01-01")


def test_a_night_outlives_a_worker_and_the_node_with_the_networks(cluster: Any, tmp_path: Path) -> None:
    archive, model, quiet, hit = (tmp_path / name for name in ("archive", "model", "quiet", "hit"))
    for index in range(60):
        write_chest(archive / f"chest{index:02d}", np.roll(make_chest(), index, axis=2))
    write_random_bundle(model)
    for _ in range(3):
        cluster.add_node(num_cpus=2)
    finish_job(score(archive, model, quiet))

    job = score(archive, model, hit)
    wait_until(lambda: kill_worker(cluster, "FlatMap"), job)
    wait_until(lambda: len(list(hit.glob("_runs/*/parts/*.parquet"))) >= 2, job)
    cluster.remove_node(find_busy_node(cluster, "ScoringActor"), allow_graceful=False)
    assert len(list(hit.glob("_runs/*/parts/*.parquet"))) < 12
    summary = finish_job(job)

    assert (summary["published"], summary["statuses"]) == (1, {"OK": 60})
    rows, expected = read_predictions(str(hit)), read_predictions(str(quiet))
    assert list(rows["scan_id"]) == list(expected["scan_id"])
    assert rows["scan_id"].nunique() == len(rows) == 60
    assert expected["probability_ncp"].nunique() > 30  # the scans differ, so that a mix-up would show
    assert rows[PROBABILITIES].equals(expected[PROBABILITIES])
    assert rows["fold_probability_ncp"].map(list).equals(expected["fold_probability_ncp"].map(list))
