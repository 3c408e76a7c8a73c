"""A bundle trained for some seconds, so that its probabilities spread, and the volumes it was trained on."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from darnet.bundle import Bundle
from darnet.bundle_writing import TrainedFold
from darnet.cohort import Division
from darnet.config import CohortConfig, ModelConfig, TrainConfig, VolumeConfig
from darnet.dataset import VolumeDataset
from darnet.manifest import BundleSettings
from darnet.model import DARNet, build_network
from darnet.storage import open_store
from darnet.volumes_folder import VolumesIndex, read_index, write_array, write_index
from tests.bundle_fixtures import write_bundle

VOLUME = VolumeConfig(shape=(16, 32, 32))
NETWORK = ModelConfig(volume_shape=VOLUME.shape, base_channels=4)
TEMPERATURES = (0.8, 1.0, 1.7)
NUM_TRAIN, NUM_TEST = 72, 9
STEPS, BATCH = 40, 9
DIVISION = Division(cohorts_by="cohort", folds_by="patient", cohorts=CohortConfig(), num_folds=3)


def draw_voxels(number: int) -> np.ndarray:
    """Noise with a blob as strong as chance has it: bright for CP, dark for NCP, none for Normal. Weak ones are hard.

    Shape: VOLUME.shape uint8.
    """
    rng = np.random.default_rng(number)
    voxels = rng.normal(110, 12, VOLUME.shape)
    z, y, x = (int(rng.integers(0, size // 2)) for size in VOLUME.shape)
    strength = rng.uniform(0, 40) * (1, -1, 0)[number % 3]
    voxels[z : z + 8, y : y + 16, x : x + 16] += strength
    return np.clip(voxels, 0, 255).astype(np.uint8)


def make_index(folder: Path) -> VolumesIndex:
    """A volumes folder of three folds and a test cohort."""
    rows = []
    for number in range(NUM_TRAIN + NUM_TEST):
        name, sha256 = write_array(open_store(str(folder)), f"scan-{number:03d}", draw_voxels(number))
        is_train = number < NUM_TRAIN
        rows.append(
            {
                "scan_id": f"scan-{number:03d}",
                "patient_id": f"patient-{number:03d}",
                "diagnosis": ("CP", "NCP", "Normal")[number % 3],
                "cohort": "train" if is_train else "test",
                "fold": (number // 3) % 3 if is_train else None,
                "array": name,
                "sha256": sha256,
            }
        )
    write_index(open_store(str(folder)), pd.DataFrame(rows).astype({"fold": "Int64"}), VOLUME, DIVISION)
    return read_index(folder)


def train_network(index: VolumesIndex, fold: int) -> DARNet:
    """The network of a fold after a few steps of Adam."""
    network = build_network(NETWORK, fold, head_std=0.1)
    dataset, rows = VolumeDataset(index), index.select_training(fold)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    rng = np.random.default_rng(fold)
    for _ in range(STEPS):
        volumes, labels = zip(*(dataset[int(row)] for row in rng.choice(rows, BATCH, replace=False)), strict=True)
        loss = torch.nn.functional.cross_entropy(network(torch.stack(volumes)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def train_bundle(index: VolumesIndex, out: Path) -> Bundle:
    """A bundle of three trained folds, each at a temperature of its own."""
    states = [train_network(index, fold).state_dict() for fold in range(3)]
    folds = [
        TrainedFold(state, 1, fold, {}, temperature)
        for fold, (state, temperature) in enumerate(zip(states, TEMPERATURES, strict=True))
    ]
    return write_bundle(
        str(out),
        settings=BundleSettings(volume=VOLUME, network=NETWORK, train=TrainConfig(num_folds=3)),
        folds=folds,
        cohort_sha256=index.cohort_sha256,
        model_version="trained-briefly",
        code_version="0",
        trained_on="made-up volumes",
    )
