"""The order detector against phantoms and real chests turned round or shuffled: hits and false alarms are counted."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.decode import VolumeStack
from darnet.ingest import Ingester
from darnet.phantom import make_phantom
from darnet.phantoms.canvas import Phantom
from darnet.phantoms.decoys import make_abdomen, make_head
from darnet.reading.road import Road
from darnet.reading.slice_order import SliceOrder, judge_order, measure_direction, measure_disorder
from darnet.scan import DIAGNOSES, BoolArray, Uint8Array
from darnet.storage import open_store
from darnet.volume import make_standard_volume, resample_mask
from tests.places import SHARED

SEEDS = range(12)
CONFIG = VolumeConfig(shape=(64, 96, 96))
CT = SHARED / "data" / "ct"
CHESTS = ("weasis-chest-rt", "lung-pet-ct-dx/A0002-B40f-8mm", "lidc-idri-0314")
# The quick tests look at the smallest of them.
FEWER_CHESTS = [CHESTS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in (CHESTS[0], CHESTS[2]))]

needs_ct = pytest.mark.skipif(not CT.is_dir(), reason=f"no real CT at {CT}")


@cache
def build(seed: int) -> Phantom:
    return make_phantom(DIAGNOSES[seed % 3], 700 + seed, severity=(seed % 4) / 3, shape=(44, 144, 144))


def resample(phantom: Phantom, order: np.ndarray, config: VolumeConfig = CONFIG) -> Uint8Array:
    """The phantom as a standard volume, its slices taken in `order` first."""
    voxels_hu = np.ascontiguousarray(phantom.voxels_hu[order]).astype(np.float32)
    return make_standard_volume(VolumeStack(voxels_hu, phantom.spacing_mm), config).voxels


def list_orders(num_slices: int, seed: int) -> dict[str, np.ndarray]:
    """Stored right, turned round, dealt at random, sorted by name as text (1, 10, 11, ...), lower half first."""
    stored = np.arange(num_slices)
    return {
        "stored": stored,
        "reversed": stored[::-1],
        "random": np.random.default_rng(seed).permutation(num_slices),
        "by name": np.array(sorted(stored, key=lambda number: str(number + 1))),
        "halves": np.roll(stored, num_slices // 2),
    }


def count_verdicts(shape: tuple[int, int, int]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for seed in SEEDS:
        for name, order in list_orders(44, seed).items():
            verdict = judge_order(resample(build(seed), order, CONFIG.model_copy(update={"shape": shape})))
            counts.setdefault(name, Counter())[verdict.order] += 1
    return counts


@pytest.mark.slow
def test_every_phantom_s_order_is_told_and_no_false_alarm_is_raised() -> None:
    assert count_verdicts((64, 96, 96)) == {
        "stored": {"head first": 12},
        "reversed": {"feet first": 12},
        "random": {"shuffled": 12},
        "by name": {"shuffled": 12},
        "halves": {"shuffled": 12},
    }


@pytest.mark.slow
def test_a_coarse_grid_is_never_judged_wrongly() -> None:
    counts = count_verdicts((16, 64, 64))
    assert counts["stored"]["head first"] >= 10
    assert counts["reversed"]["feet first"] >= 10
    assert counts["random"]["shuffled"] == 12
    for name, wrong in (("stored", ("feet first", "shuffled")), ("reversed", ("head first", "shuffled"))):
        assert not any(counts[name][order] for order in wrong)


@pytest.mark.slow
def test_lungs_on_black_ground_are_judged_by_their_shape() -> None:
    for seed in SEEDS:
        phantom = build(seed)
        voxels = resample(phantom, np.arange(44))
        volume = make_standard_volume(VolumeStack(phantom.voxels_hu.astype(np.float32), phantom.spacing_mm), CONFIG)
        lung = resample_mask(phantom.lung, volume.crop, CONFIG.shape)
        masked = np.where(lung, voxels, 0).astype(np.uint8)
        assert judge_order(masked).order is SliceOrder.HEAD_FIRST
        assert judge_order(masked[::-1]).order is SliceOrder.FEET_FIRST
        shuffled = masked[np.random.default_rng(seed).permutation(len(masked))]
        assert judge_order(shuffled).order is SliceOrder.SHUFFLED


@pytest.mark.parametrize("make", [make_head, make_abdomen])
def test_a_scan_without_lungs_is_not_judged(make: object) -> None:
    for seed in range(3):
        phantom: Phantom = make(seed, shape=(30, 128, 128))  # type: ignore[operator]
        verdict = judge_order(resample(phantom, np.arange(30)))
        assert (verdict.order, verdict.reason) == (SliceOrder.NOT_JUDGED, "no lung found")


def test_what_cannot_be_judged_is_not_guessed() -> None:
    voxels = resample(build(0), np.arange(44))
    assert judge_order(voxels[:11]).reason == "11 slices are too few"
    assert judge_order(voxels[20:44]).reason == "the scan ends within the lungs"
    for nothing in (np.zeros_like(voxels), np.full_like(voxels, 90)):
        assert judge_order(nothing).order is SliceOrder.NOT_JUDGED
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, 48),) * 3, indexing="ij")
    egg = z**2 + (y / 0.7) ** 2 + (x / 0.7) ** 2 < 1
    assert measure_direction(egg) == pytest.approx(0, abs=0.01)


def test_disorder_is_one_in_order_and_by_hand_what_a_detour_costs() -> None:
    """Four slices that light up one block after another: neighbours differ by 1 part of 3, 5, 7, others by more."""
    voxels = np.zeros((4, 28, 28), np.uint8)
    for number in range(4):
        voxels[number, : number + 1, 0] = 100
    assert measure_disorder(voxels) == pytest.approx(1)
    way = {(a, b): abs(a - b) / (a + b + 2) for a in range(4) for b in range(4)}
    stored = way[2, 0] + way[0, 3] + way[3, 1]
    shortest = way[0, 1] + way[1, 2] + way[2, 3]
    assert measure_disorder(voxels[[2, 0, 3, 1]]) == pytest.approx(stored / shortest)


@cache
def ingest_chest(name: str) -> tuple[Uint8Array, BoolArray]:
    store = open_store(str(CT / name))
    ingester = Ingester(store, Road(CONFIG, DecodeConfig()))
    (scan,) = [scan for source in list_sources(store.list_objects()) for scan in ingester.ingest(source)]
    ingester.close()
    assert scan.volume is not None
    assert scan.lung is not None
    return scan.volume.voxels, scan.lung


@needs_ct
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_a_real_chest_s_order_is_told_whole_and_masked(name: str) -> None:
    voxels, lung = ingest_chest(name)
    for seen in (voxels, np.where(lung, voxels, 0).astype(np.uint8)):
        assert judge_order(seen).order is SliceOrder.HEAD_FIRST
        assert judge_order(seen[::-1]).order is SliceOrder.FEET_FIRST
        for seed in range(3):
            shuffled = seen[np.random.default_rng(seed).permutation(len(seen))]
            assert judge_order(shuffled).order is SliceOrder.SHUFFLED
