"""Trained networks, once for all tests of their inference."""

import numpy as np
import pytest
import torch

from darnet.bundle import Bundle
from darnet.scan import Uint8Array
from darnet.volumes_folder import VolumesIndex, read_voxels
from tests.inference_fixtures import make_index, train_bundle


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> VolumesIndex:
    return make_index(tmp_path_factory.mktemp("inference") / "volumes")


@pytest.fixture(scope="session")
def trained(index: VolumesIndex) -> Bundle:
    """In `bundle` beside the volumes."""
    torch.set_num_threads(1)
    return train_bundle(index, index.folder.parent / "bundle")


@pytest.fixture(scope="session")
def voxels(index: VolumesIndex) -> Uint8Array:
    """Some scans of each class, training and validation of every fold."""
    return np.stack([read_voxels(index, row) for row in range(18)])
