"""What share of a training step waits for its scans: `make bench-loading` prints it for volumes of the paper's size.

Volumes are made up; each is read, augmented and scaled as in training. The network is narrow by default, so that the
share is larger than the paper's network would have; nothing here says how fast a GPU is.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from darnet.config import AugmentConfig, ModelConfig, VolumeConfig
from darnet.dataset import Augmentation, VolumeDataset, load_batches, read_index, write_index
from darnet.model import build_network
from darnet.storage import open_store
from darnet.train import ALONE, train_steps
from tests.volumes_fixtures import make_cohort

BATCH = 4


def measure(num_batches: int, base_channels: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Seconds: a scan loaded in the training thread; a step's wait for scans so loaded, and for those read ahead."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, volume = open_store(folder), VolumeConfig(shape=shape)
        write_index(store, make_cohort(Path(folder), BATCH * num_batches, 2, volume=volume), volume)
        dataset = VolumeDataset(read_index(Path(folder)), Augmentation(AugmentConfig(), 0, 0, 0))
        batches = np.arange(BATCH * num_batches).reshape(num_batches, BATCH).tolist()
        start_s = time.perf_counter()
        for row in range(len(dataset)):
            dataset[row]
        scan_s = (time.perf_counter() - start_s) / len(dataset)
        ways = {"in_step": DataLoader(dataset, batch_sampler=batches), "ahead": load_batches(dataset, batches)}
        measured = {"scan_s": scan_s}
        for way, loader in ways.items():
            network = build_network(ModelConfig(base_channels=base_channels, volume_shape=shape), 0)
            clock = _Clock(loader)
            start_s = time.perf_counter()
            train_steps(network, torch.optim.Adam(network.parameters()), clock, ALONE.device)
            step_s = (time.perf_counter() - start_s) / num_batches
            measured |= {f"{way}_step_s": step_s, f"{way}_wait_share": clock.waited_s / num_batches / step_s}
    return measured


class _Clock:
    """Batches as they come, and how long they were waited for."""

    def __init__(self, batches) -> None:  # type: ignore[no-untyped-def]
        self._batches, self.waited_s = iter(batches), 0.0

    def __iter__(self):  # type: ignore[no-untyped-def]
        return self

    def __next__(self):  # type: ignore[no-untyped-def]
        start_s = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - start_s


def main(arguments: list[str]) -> int:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--base-channels", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 224, 224))
    chosen = parser.parse_args(arguments)
    print(json.dumps(measure(chosen.batches, chosen.base_channels, tuple(chosen.shape))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
