"""What happens to a training; it must end in the bits of an undisturbed one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from darnet.bundle import load_networks, read_bundle
from darnet.config import ModelConfig, TrainConfig
from darnet.storage import open_store
from tests.chaos.night import (
    ChaosError,
    Outcome,
    count_left,
    end_group,
    end_processes,
    find_marked,
    mark_processes,
    wait_until,
)
from tests.gloo_ranks import train_with_torch_alone
from tests.places import ROOT
from tests.results_fixtures import flip_bit
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

CONFIG = TrainConfig(epochs=8, num_folds=2, learning_rate=3e-3)
NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)


class Training:
    """A training on made-up volumes in a folder of its own, with so many ranks a fold."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers, self.mark = folder, workers, uuid.uuid4().hex
        make_volumes(folder / "volumes", num_train=24, num_folds=2)

    def start(self) -> "subprocess.Popen[str]":
        """`python -m jobs.train` as a person starts it."""
        places = ["--volumes", str(self.folder / "volumes"), "--out", str(self.folder / "out")]
        places += ["--cache", str(self.folder / "cache"), "--workers", str(self.workers)]
        train = ["--train.epochs", "8", "--train.num-folds", "2", "--train.learning-rate", "3e-3"]
        command = [sys.executable, "-m", "jobs.train", *places, *train, "--network.base-channels", "4"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | mark_processes(self.mark),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def list_kept(self) -> list[list[Path]]:
        """Of each fold, the checkpoints that Ray Train would go on from, the newest last."""
        kept = []
        for path in sorted(self.folder.glob("out.runs/*/checkpoint_manager_snapshot.json")):
            with contextlib.suppress(ValueError):  # it is being written
                found = json.loads(path.read_text())["checkpoint_results"]
                kept.append([path.with_name(item["checkpoint_dir_name"]) for item in found])
        return kept

    def finish(self, job: "subprocess.Popen[str]") -> Outcome:
        """Raises: ChaosError unless it ends with 0. A row is a fold here, and nobody reads a table."""
        summary = json.loads(job.communicate(timeout=400)[0].splitlines()[-1])
        if summary["exit_code"]:
            raise ChaosError(str(summary))
        expected = train_with_torch_alone(self.folder / "volumes", NETWORK, CONFIG, self.workers, self.folder)
        networks = load_networks(read_bundle(open_store(str(self.folder / "out"))))
        pairs = zip(expected, networks, strict=True)
        other = sum(
            any(not torch.equal(fold.state[name], tensor) for name, tensor in trained.state_dict().items())
            for fold, trained in pairs
        )
        nothing = dict.fromkeys(("lost", "doubled", "partial", "polls"))
        left = count_left(self.mark)
        return Outcome(due=len(expected), other=other, left_running=left, exits=(summary["exit_code"],), **nothing)


@contextmanager
def prepare_training(folder: Path, workers: int) -> Iterator[Training]:
    """A training of which nothing runs any more when the block ends."""
    training = Training(folder, workers)
    try:
        yield training
    finally:
        end_processes(find_marked(training.mark))


def kill_rank(folder: Path) -> tuple[Outcome, str]:
    """SIGKILL to one of a fold's two ranks after the first epoch."""
    with prepare_training(folder, 2) as training:
        job = training.start()
        wait_until(lambda: bool(training.list_kept()) and len(find_marked(training.mark, "TrainWorker")) == 2, job)
        os.kill(find_marked(training.mark, "TrainWorker")[1], signal.SIGKILL)
        return training.finish(job), "one of two ranks killed after its first epoch"


def tear_checkpoint(folder: Path) -> tuple[Outcome, str]:
    """SIGKILL to the driver; of one fold's newest checkpoint a bit flipped, of the other's the half is missing."""
    with prepare_training(folder, 1) as training:
        job = training.start()
        wait_until(lambda: len(kept := training.list_kept()) == 2 and all(len(paths) > 1 for paths in kept), job)
        end_group(job)
        for number, paths in enumerate(training.list_kept()):
            state = paths[-1] / "state.pt"
            data = state.read_bytes()
            state.write_bytes(data[: len(data) // 2] if number else flip_bit(data, len(data) // 2))
        return training.finish(training.start()), "the newest checkpoints of two folds torn"
