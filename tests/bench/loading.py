"""What share of a training step waits for its scans: `make bench-loading` prints it for volumes of the paper's size.

Volumes are made up; each is read, augmented and scaled as in training, on a worker's one thread. Ways take turns, and
medians are told. The network is narrow by default, so that the share is larger than the paper's network would have;
nothing here says how fast a GPU is.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from darnet.config import AugmentConfig, ModelConfig, VolumeConfig
from darnet.dataset import Augmentation, VolumeDataset, load_batches
from darnet.model import build_network
from darnet.storage import open_store
from darnet.terminal import print_table
from darnet.threads import set_num_threads
from darnet.train import ALONE, train_steps
from darnet.volumes_folder import read_index, write_index
from tests.volumes_fixtures import make_cohort

BATCH = 4
Batches = Iterator[tuple[Tensor, Tensor]]


def load_in_step(dataset: VolumeDataset, batches: Sequence[Sequence[int]]) -> Batches:
    """Each batch when it is asked for, by the thread that trains."""
    for batch in batches:
        volumes, labels = zip(*(dataset[row] for row in batch), strict=True)
        yield torch.stack(volumes), torch.tensor(labels)


WAYS: dict[str, Callable[[VolumeDataset, Sequence[Sequence[int]]], Batches]] = {
    "in_step": load_in_step,
    "ahead": load_batches,
}


def measure(num_batches: int, base_channels: int, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Medians, in seconds: a scan loaded; of scans loaded in the step and of those read ahead, a step and its wait.

    `<way>_wait_share` is the input pipeline's share of a step.
    """
    set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, volume = open_store(folder), VolumeConfig(shape=shape)
        write_index(store, make_cohort(Path(folder), BATCH * num_batches, 2, volume=volume), volume)
        dataset = VolumeDataset(read_index(Path(folder)), Augmentation(AugmentConfig(), 0, 0, 0))
        batches = np.arange(BATCH * num_batches).reshape(num_batches, BATCH).tolist()
        network = ModelConfig(base_channels=base_channels, volume_shape=shape)
        _train(load_in_step, dataset, batches[:1], network)  # loads what is imported late
        readings = [_measure_once(dataset, batches, network) for _ in range(repeats)]
    return {name: median(reading[name] for reading in readings) for name in readings[0]}


def _measure_once(dataset: VolumeDataset, batches: list[list[int]], network: ModelConfig) -> dict[str, float]:
    start_s = time.perf_counter()
    for row in range(len(dataset)):
        dataset[row]
    measured = {"scan_s": (time.perf_counter() - start_s) / len(dataset)}
    for way, load in WAYS.items():
        step_s, wait_s = _train(load, dataset, batches, network)
        measured |= {f"{way}_step_s": step_s, f"{way}_wait_s": wait_s, f"{way}_wait_share": wait_s / step_s}
    return measured


def _train(
    load: Callable[[VolumeDataset, Sequence[Sequence[int]]], Batches],
    dataset: VolumeDataset,
    batches: list[list[int]],
    config: ModelConfig,
) -> tuple[float, float]:
    """Seconds of a step, and of its wait for scans."""
    network = build_network(config, 0)
    optimizer, clock = torch.optim.Adam(network.parameters()), _Clock(load(dataset, batches))
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


def main(arguments: list[str]) -> int:
    """Print a table, the share, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--base-channels", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 224, 224))
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    found = measure(chosen.batches, chosen.base_channels, tuple(chosen.shape), chosen.repeats)
    rows = [[way, found[f"{way}_step_s"], found[f"{way}_wait_s"], f"{found[f'{way}_wait_share']:.2%}"] for way in WAYS]
    title = f"a training step of {BATCH} scans, {chosen.base_channels} channels, medians of {chosen.repeats}"
    print_table(title, ["scans are loaded", "s a step", "s waiting", "share"], rows)
    share = found["ahead_wait_share"]
    print(f"the input pipeline's share of a training step, as training reads ahead: {share:.2%}", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
