"""Ranks of torch alone, without Ray: how they wait for each other where only one has work."""

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from darnet.config import ModelConfig, TrainConfig
from darnet.gang import train_rank
from darnet.train import build_start
from darnet.training_plan import FoldTask, Places
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesIndex
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)
CONFIG = TrainConfig(epochs=2, num_folds=2, learning_rate=1e-9)  # the first weights can still be told
FOLD = 1
LATE_OPENING, LATE_REPORT = 1, 0  # ranks; the report is that of the first epoch
COLLECTIVE_TIMEOUT_S = 6
LATE_S = COLLECTIVE_TIMEOUT_S + 3


def run_rank(rank: int, volumes: Path, cohort_sha256: str, scratch: Path, both_are_up: Barrier) -> None:
    """One rank copies volumes, and later one uploads, for longer than a collective may take."""

    def open_index(place: str, cache: Path, cohort_sha256: str) -> VolumesIndex:
        time.sleep((rank == LATE_OPENING) * LATE_S)
        return open_volumes(place, cache, cohort_sha256)

    def report(epoch: int, *_: object) -> None:
        time.sleep((rank == LATE_REPORT and epoch == 0) * LATE_S)

    torch.set_num_threads(1)
    both_are_up.wait()
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{scratch / 'meeting'}", timeout, world_size=2, rank=rank)
    task = FoldTask(Places(str(volumes), str(scratch), scratch, cohort_sha256), "run", NETWORK, CONFIG, FOLD)
    result = train_rank(task, torch.device("cpu"), DistributedDataParallel, report, None, open_index)
    torch.save(result.state, scratch / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_for_one_that_copies_and_one_that_uploads_for_longer_than_a_collective_may_take(
    tmp_path: Path,
) -> None:
    index = make_volumes(tmp_path / "volumes", num_train=12, num_folds=2)
    both_are_up = multiprocessing.get_context("spawn").Barrier(2)
    arguments = (index.folder, index.cohort_sha256, tmp_path, both_are_up)
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.allclose(first["head.weight"], build_start(NETWORK, CONFIG, FOLD).head.weight, atol=1e-6)
