"""Standard volumes as a network learns from them: augmented, in batches, on its device."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from darnet.augment import augment_volume
from darnet.config import AugmentConfig
from darnet.model import scale_voxels
from darnet.scan import Uint8Array
from darnet.volumes_folder import VolumesIndex

CPU = torch.device("cpu")
LOADER_THREADS, BATCHES_AHEAD = 2, 2  # Source: ours; tests/bench/loading.py prints what is still waited for


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Which random map a row gets: one of its own in every fold and epoch, whoever loads it and in what order."""

    config: AugmentConfig
    seed: int
    fold: int
    epoch: int

    def apply(self, voxels: Uint8Array, row: int) -> Uint8Array:
        """Shape: (D, H, W) -> same."""
        rng = np.random.default_rng((self.seed, self.fold, self.epoch, row))
        return augment_volume(voxels, self.config, rng)


class VolumeDataset(Dataset[tuple[Tensor, int]]):
    """Network input and label by row of the index; augmented only where an `Augmentation` is given."""

    def __init__(self, index: VolumesIndex, augmentation: Augmentation | None = None) -> None:
        self.shape = index.volume.shape
        self.labels: list[int] = index.labels.tolist()
        self._folder = index.folder
        self._arrays = index.frame["array"].tolist()
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Shape: tensor (1, D, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self.read_voxels(row).astype(np.float32)[None] / np.float32(255)), self.labels[row]

    def read_voxels(self, row: int) -> Uint8Array:
        """The volume of a row, augmented or memory-mapped; (D, H, W)."""
        voxels: Uint8Array = np.load(self._folder / self._arrays[row], mmap_mode="r")
        return voxels if self._augmentation is None else self._augmentation.apply(voxels, row)


def load_batches(
    dataset: VolumeDataset, batches: Sequence[Sequence[int]], device: torch.device = CPU
) -> Iterator[tuple[Tensor, Tensor]]:
    """Volumes and labels of each batch on the device, in order, read ahead by threads while one is trained on.

    Which thread loads a row changes nothing in it: a row's augmentation depends on the row alone. A GPU is sent the
    bytes, a quarter of what floats would be, from memory that it can read by itself, and scales them.
    Shape:  (B, 1, D, H, W) float32, (B,) int64.
    Source: ours: threads, since reading and resampling hold no lock, and processes would have to be started anew each
            epoch.
    """
    with ThreadPoolExecutor(LOADER_THREADS) as pool:
        ahead: deque[_Coming] = deque()
        try:
            for batch in batches:
                ahead.append(_Coming(pool, dataset, batch, is_pinned=device.type == "cuda"))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft().send(device)
            while ahead:
                yield ahead.popleft().send(device)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Coming:
    """A batch that threads are filling, each row in its place."""

    def __init__(
        self, pool: ThreadPoolExecutor, dataset: VolumeDataset, rows: Sequence[int], *, is_pinned: bool
    ) -> None:
        self._voxels = torch.empty((len(rows), *dataset.shape), dtype=torch.uint8, pin_memory=is_pinned)
        self._labels = torch.tensor([dataset.labels[row] for row in rows], pin_memory=is_pinned)

        def fill(place: Uint8Array, row: int) -> None:
            np.copyto(place, dataset.read_voxels(row))

        places = self._voxels.numpy()
        self._filling = [pool.submit(fill, place, row) for place, row in zip(places, rows, strict=True)]

    def send(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch once it is full; a copy to a GPU may still be under way."""
        for row in self._filling:
            row.result()
        return scale_voxels(self._voxels.to(device, non_blocking=True)), self._labels.to(device, non_blocking=True)
