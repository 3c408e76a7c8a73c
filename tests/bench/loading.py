"""What loading scans takes from a training step: `make bench-loading` prints it for volumes of the paper's size.

Volumes are made up; each is read, augmented and scaled as in training, on a rank's one thread, by one rank and by two
that meet by gloo, as DDP's do. A step is timed with scans that are loaded in it, with those that are read ahead, as in
training, and with a batch that is there: what a step takes beyond the last counts also the processor that reading ahead
takes from training, and the other rank's wait. Ways take turns, and medians are told, of rank 0. The network is narrow
by default, so that shares are larger than the paper's network would have; nothing here says how fast a GPU is.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darnet.config import AugmentConfig, ModelConfig, VolumeConfig
from darnet.dataset import Augmentation, VolumeDataset, load_batches
from darnet.model import build_network
from darnet.storage import open_store
from darnet.terminal import print_table
from darnet.threads import set_model_threads
from darnet.train import ALONE, train_steps
from darnet.volumes_folder import read_index, write_index
from tests.volumes_fixtures import make_cohort

BATCH = 4  # scans of all ranks together
RANKS = (1, 2)
Batches = Iterator[tuple[Tensor, Tensor]]
Load = Callable[[VolumeDataset, Sequence[Sequence[int]]], Batches]


def load_in_step(dataset: VolumeDataset, batches: Sequence[Sequence[int]]) -> Batches:
    """Each batch when it is asked for, by the thread that trains."""
    for batch in batches:
        volumes, labels = zip(*(dataset[row] for row in batch), strict=True)
        yield torch.stack(volumes), torch.tensor(labels)


def load_before(dataset: VolumeDataset, batches: Sequence[Sequence[int]]) -> Batches:
    """The first batch for each of them, loaded before the first is asked for."""
    return itertools.repeat(next(load_in_step(dataset, batches)), len(batches))


WAYS: dict[str, Load] = {"in_step": load_in_step, "ahead": load_batches, "there": load_before}


@dataclass(frozen=True)
class Steps:
    """What is trained: a network of so many channels, by so many steps, each way so many times."""

    num_batches: int
    base_channels: int
    shape: tuple[int, int, int]
    repeats: int

    @property
    def network(self) -> ModelConfig:
        return ModelConfig(base_channels=self.base_channels, volume_shape=self.shape)


def measure(steps: Steps, num_ranks: int) -> dict[str, float]:
    """What rank 0 of so many found: see `measure_rank`. One rank works in this process, several in their own."""
    with tempfile.TemporaryDirectory() as place:
        folder, volume = Path(place), VolumeConfig(shape=steps.shape)
        cohort = make_cohort(folder, BATCH * steps.num_batches, 2, volume=volume)
        write_index(open_store(place), cohort, volume)
        if num_ranks == 1:
            return measure_rank(folder, steps)
        arguments = (num_ranks, folder, steps)
        torch.multiprocessing.start_processes(_run_rank, arguments, nprocs=num_ranks, start_method="spawn")
        found: dict[str, float] = json.loads((folder / "found.json").read_text())
        return found


def _run_rank(rank: int, num_ranks: int, folder: Path, steps: Steps) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    found = measure_rank(folder, steps, rank, num_ranks)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def share_batches(num_batches: int, rank: int, num_ranks: int) -> list[list[int]]:
    """This rank's rows of every batch."""
    rows: list[list[int]] = np.arange(BATCH * num_batches).reshape(num_batches, BATCH)[:, rank::num_ranks].tolist()
    return rows


def measure_rank(folder: Path, steps: Steps, rank: int = 0, num_ranks: int = 1) -> dict[str, float]:
    """Medians, in seconds: a scan loaded; of each way a step and its wait, and both shares of loading.

    `<way>_wait_share` is the part of a step in which its scans were waited for, `<way>_loading_share` the part that it
    takes longer than with a batch that is there.
    """
    set_model_threads(1)
    dataset = VolumeDataset(read_index(folder), Augmentation(AugmentConfig(), 0, 0, 0))
    batches = share_batches(steps.num_batches, rank, num_ranks)
    time_steps(load_in_step, dataset, batches[:1], steps.network, num_ranks)  # loads what is imported late
    readings = [_measure_once(dataset, batches, steps.network, num_ranks) for _ in range(steps.repeats)]
    return {name: median(reading[name] for reading in readings) for name in readings[0]}


def _measure_once(
    dataset: VolumeDataset, batches: list[list[int]], network: ModelConfig, num_ranks: int
) -> dict[str, float]:
    start_s = time.perf_counter()
    for batch in batches:
        for row in batch:
            dataset[row]
    measured = {"scan_s": (time.perf_counter() - start_s) / sum(map(len, batches))}
    for way, load in WAYS.items():
        step_s, wait_s = time_steps(load, dataset, batches, network, num_ranks)
        measured |= {f"{way}_step_s": step_s, f"{way}_wait_s": wait_s}
    return add_shares(measured)


def add_shares(measured: dict[str, float]) -> dict[str, float]:
    """Both shares of loading, of each way."""
    there_s = measured["there_step_s"]
    for way in WAYS:
        step_s = measured[f"{way}_step_s"]
        shares = {"wait": measured[f"{way}_wait_s"] / step_s, "loading": 1 - there_s / step_s}
        measured = measured | {f"{way}_{name}_share": share for name, share in shares.items()}
    return measured


def time_steps(
    load: Load, dataset: VolumeDataset, batches: list[list[int]], config: ModelConfig, num_ranks: int = 1
) -> tuple[float, float]:
    """Seconds of a step, and of its wait for scans."""
    network: nn.Module = build_network(config, 0)
    if num_ranks > 1:
        network = DistributedDataParallel(network)
    optimizer, clock = torch.optim.Adam(network.parameters()), _Clock(load(dataset, batches))
    if num_ranks > 1:
        dist.barrier()
    start_s = time.perf_counter()
    train_steps(network, optimizer, clock, ALONE.device)
    return (time.perf_counter() - start_s) / len(batches), clock.waited_s / len(batches)


class _Clock:
    """Batches as they come, and how long they were waited for."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self.waited_s = batches, 0.0

    def __iter__(self) -> "_Clock":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start_s = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - start_s


def make_line(ranks: str, way: str, found: dict[str, float]) -> list[str | float]:
    """A line of the table."""
    shares = [f"{found[f'{way}_{share}_share']:.2%}" for share in ("wait", "loading")]
    return [ranks, way, found[f"{way}_step_s"], found[f"{way}_wait_s"], *shares]


def main(arguments: list[str]) -> int:
    """Print a table, both shares of each number of ranks, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--base-channels", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 224, 224))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of one thread each")
    chosen = parser.parse_args(arguments)
    steps = Steps(chosen.batches, chosen.base_channels, tuple(chosen.shape), chosen.repeats)
    found = {f"{count} rank{'s' if count > 1 else ''}": measure(steps, count) for count in chosen.ranks}
    rows = [make_line(ranks, way, figures) for ranks, figures in found.items() for way in WAYS]
    title = f"a training step of {BATCH} scans, {chosen.base_channels} channels, medians of {chosen.repeats}"
    print_table(title, ["ranks", "scans are loaded", "s a step", "s waiting", "share", "beyond a batch there"], rows)
    for ranks, figures in found.items():
        shares = f"{figures['ahead_wait_share']:.2%} waiting, {figures['ahead_loading_share']:.2%} in all"
        print(f"{ranks}, as training reads ahead: the input pipeline's share of a step is {shares}", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
