"""Small volumes folders made up for tests: random voxels, with a bright blob where the diagnosis is NCP."""

from pathlib import Path

import numpy as np
import pandas as pd

from darnet.cohort import Division
from darnet.config import CohortConfig, VolumeConfig
from darnet.storage import open_store
from darnet.volumes_folder import VolumesIndex, read_index, write_array, write_index

SMALL_VOLUME = VolumeConfig(shape=(8, 32, 32))
EXCLUDED = {"NOT_IN_ARCHIVE": 1, "BAD_TRUNCATED": 2}
DIVISION = Division(cohorts_by="cohort", folds_by="patient", cohorts=CohortConfig(seed=5), num_folds=2)


def make_voxels(diagnosis: str, seed: int, shape: tuple[int, int, int] = SMALL_VOLUME.shape) -> np.ndarray:
    """Dark noise for Normal, a bright blob for NCP, bright noise for CP."""
    voxels = np.random.default_rng(seed).integers(0, 60, shape, dtype=np.uint8)
    if diagnosis == "CP":
        voxels += 80
    if diagnosis == "NCP":
        depth, height, width = (size // 4 for size in shape)
        voxels[depth:-depth, height:-height, width:-width] += 150
    return voxels


def make_cohort(
    folder: Path, num_train: int, num_folds: int, num_test: int = 0, volume: VolumeConfig = SMALL_VOLUME
) -> pd.DataFrame:
    """Arrays in `folder` and their cohort table: scan by scan CP, NCP, Normal, and fold by fold."""
    rows = []
    for number in range(num_train + num_test):
        diagnosis = ("CP", "NCP", "Normal")[number % 3]
        voxels = make_voxels(diagnosis, number, volume.shape)
        name, sha256 = write_array(open_store(str(folder)), f"scan-{number:03d}", voxels)
        rows.append(
            {
                "scan_id": f"scan-{number:03d}",
                "patient_id": f"patient-{number:03d}",
                "diagnosis": diagnosis,
                "cohort": "train" if number < num_train else "test",
                "fold": (number // 3) % num_folds if number < num_train else None,
                "array": name,
                "sha256": sha256,
            }
        )
    return pd.DataFrame(rows).astype({"fold": "Int64"})


def make_volumes(folder: Path, num_train: int, num_folds: int, num_test: int = 0) -> VolumesIndex:
    """A whole volumes folder, read back."""
    cohort = make_cohort(folder, num_train, num_folds, num_test)
    write_index(open_store(str(folder)), cohort, SMALL_VOLUME, DIVISION, EXCLUDED)
    return read_index(folder)
