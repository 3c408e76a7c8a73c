"""The scoring actor without a cluster: what it is handed, where that lies, and which row is whose."""

import pickle
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from darnet.config import ScoreConfig, VolumeConfig
from darnet.decoded_scan import DecodedScan, pack_scan
from darnet.errors import Status
from darnet.inference.graph import FoldAnswer
from darnet.manifest import RunFacts
from darnet.ray_actor import ScoringActor
from darnet.scan import CropBox, IngestedScan, Intensity, ScanFacts, StandardVolume, Uint8Array
from darnet.storage_local import LocalStore
from tests.block_fixtures import make_block
from tests.bundle_fixtures import SHAPE, write_random_bundle

pytestmark = pytest.mark.filterwarnings("default")  # of Ray


class Recorder:
    """Notes where the voxels it is asked about lie, and answers with the value of their first."""

    def __init__(self, forward_scans: int) -> None:
        self.forward_scans = forward_scans
        self.asked: list[int] = []

    def forward(self, volumes: Sequence[Uint8Array]) -> list[FoldAnswer]:
        self.asked += [voxels.__array_interface__["data"][0] for voxels in volumes]
        first = np.array([[0, 0, voxels.flat[0] / 50] for voxels in volumes], np.float32)
        return [FoldAnswer(first, np.ones((len(volumes), 3, 2, 2, 2), np.float32), None)] * 5


def make_row(name: str, value: int | None) -> dict[str, Any]:
    """A scan whose voxels are all of one value, or one that was refused."""
    scan = IngestedScan(name, Status.SKIP_FEW_SLICES, "3 slices")
    if value is not None:
        crop = CropBox(SHAPE[0], 0, 0, *SHAPE[1:])
        volume = StandardVolume(np.full(SHAPE, value, np.uint8), Intensity.DISPLAY, None, crop)
        scan = IngestedScan(name, Status.OK, "", ScanFacts(3, 9), volume)
    return pack_scan(DecodedScan(name, name, "0" * 64, 1, scan), VolumeConfig(shape=SHAPE))


def list_addresses(block: pa.Table) -> list[int]:
    """Where the voxels of each row begin, by Arrow's own word."""
    (column,) = block["voxels"].chunks
    *_, data = column.buffers()
    return [data.address + row * int(np.prod(SHAPE)) for row in range(len(column))]


@pytest.fixture
def actor(tmp_path: Path) -> ScoringActor:
    manifest = write_random_bundle(tmp_path / "model").manifest
    run = RunFacts("run", date(2026, 1, 1), manifest, "0")
    return ScoringActor(LocalStore(tmp_path / "model"), run, ScoreConfig(batch_size=8), "cpu")


@pytest.mark.parametrize("forward_scans", [1, 2])
def test_voxels_of_a_batch_reach_the_network_where_the_cluster_has_them(
    forward_scans: int, actor: ScoringActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks they came in, and a scan that was refused between them: nothing is copied."""
    blocks = [
        make_block([make_row("a", 10), make_row("b", None), make_row("c", 100)]),
        make_block([make_row("d", 200)]),
        make_block([make_row("e", 30), make_row("f", 40)]),
    ]
    backend = Recorder(forward_scans)
    monkeypatch.setattr(actor._ensemble, "_backend", backend)
    rows = [row for _, _, row in map(pickle.loads, actor(pa.concat_tables(blocks))["row"])]
    there = [address for block in blocks for address in list_addresses(block)]
    assert backend.asked == there[:1] + there[2:]  # all but b
    assert [row["scan_id"] for row in rows] == list("abcdef")
    told = [row["probability_normal"] for row in rows]
    expected = [1 / (1 + 2 * np.exp(-value / 50)) for value in (10, 100, 200, 30, 40)]
    assert told[1] is None
    np.testing.assert_allclose([told[0], *told[2:]], expected, rtol=1e-5)
