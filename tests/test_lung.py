"""The lung mask against planted ellipsoids, real chests and a second opinion; the verdict against hostile scans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from darnet.auditing.shortcuts import measure_border
from darnet.config import VolumeConfig
from darnet.lung import has_lung, is_masked, mask_outside_lung, segment_display_lung, segment_lung
from darnet.phantom import make_phantom
from darnet.phantoms.canvas import Phantom
from darnet.phantoms.decoys import make_abdomen, make_head
from darnet.scan import BoolArray, CropBox, Diagnosis, FloatArray, Intensity, StandardVolume
from darnet.volume import make_standard_volume
from tests.places import SHARED

WINDOW = (-1350.0, 150.0)
GRIDS = [(64, 224, 224), (32, 96, 96), (24, 64, 64)]
SMALL_TO_LARGE = [(16, 64, 64), (24, 96, 96), (64, 224, 224)]
CHEST_MM = (300.0, 360.0, 360.0)
SERIES = SHARED / "data" / "ct"
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], bool)
CHESTS = ("weasis-chest-rt", "lung-pet-ct-dx/A0002-B40f-8mm", "lidc-idri-0314")
# The quick tests look at the smallest of them.
FEWER_CHESTS = [CHESTS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in (CHESTS[0], CHESTS[2]))]

needs_ct = pytest.mark.skipif(not SERIES.is_dir(), reason=f"no real CT at {SERIES}")


class Scene:
    """Ellipsoids in mm around the centre of a box of `extent_mm`, painted one over the other."""

    def __init__(self, shape: tuple[int, int, int], extent_mm: tuple[float, float, float]) -> None:
        self.spacing_mm = tuple(length / size for length, size in zip(extent_mm, shape, strict=True))
        steps = [(np.arange(n) + 0.5 - n / 2) * step for n, step in zip(shape, self.spacing_mm, strict=True)]
        self.z, self.y, self.x = np.meshgrid(*steps, indexing="ij")
        self.hu = np.full(shape, -1000.0)

    def find(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> BoolArray:
        axes = zip((self.z, self.y, self.x), centre, radii, strict=True)
        return np.asarray(sum(((axis - c) / r) ** 2 for axis, c, r in axes) < 1)

    def paint(self, centre: tuple[float, float, float], radii: tuple[float, float, float], hu: float) -> BoolArray:
        where = self.find(centre, radii)
        self.hu[where] = hu
        return where

    def to_volume(self, window: tuple[float, float] = WINDOW) -> StandardVolume:
        noisy = self.hu + np.random.default_rng(0).normal(0, 15, self.hu.shape)
        voxels = ((noisy - window[0]) / (window[1] - window[0]) * 255).clip(0, 255).round().astype(np.uint8)
        box = CropBox(self.hu.shape[0], 0, 0, *self.hu.shape[1:])
        return StandardVolume(voxels, Intensity.HU, self.spacing_mm, box)  # type: ignore[arg-type]


LUNGS = (((0.0, 0.0, -75.0), (120.0, 90.0, 58.0)), ((0.0, 0.0, 75.0), (120.0, 90.0, 58.0)))


def draw_chest(
    shape: tuple[int, int, int] = (32, 96, 96), extent_mm: tuple[float, float, float] = CHEST_MM
) -> tuple[Scene, BoolArray]:
    """A body on a foam couch with two ellipsoid lungs and a trachea; lungs apart from their truth have vessels."""
    scene = Scene(shape, extent_mm)
    scene.hu[(scene.y > 122) & (np.abs(scene.x) < 200)] = -940
    scene.hu[np.abs(scene.y - 123) < 3] = 0
    scene.paint((0, 0, 0), (9e9, 118, 165), 40)
    lung = np.zeros(shape, bool)
    for centre, radii in LUNGS:
        lung |= scene.paint(centre, radii, -850)
        scene.paint((0, 10, centre[2]), (60, 6, 6), 40)
    scene.hu[scene.find((-90, -20, 0), (80, 9, 9))] = -1000
    return scene, lung


def find_dice(first: BoolArray, second: BoolArray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def judge(scene: Scene) -> bool:
    volume = scene.to_volume()
    return has_lung(segment_lung(volume, WINDOW), volume)


@pytest.mark.parametrize("shape", GRIDS)
def test_planted_lungs_are_found_with_their_vessels(shape: tuple[int, int, int]) -> None:
    scene, lung = draw_chest(shape)
    mask = segment_lung(scene.to_volume(), WINDOW)
    assert mask.shape == shape
    assert mask.dtype == bool
    assert find_dice(mask, lung) > 0.98


@pytest.mark.parametrize("shape", GRIDS)
def test_outside_air_trachea_couch_and_mediastinum_are_no_lung(shape: tuple[int, int, int]) -> None:
    scene, _ = draw_chest(shape)
    mask = segment_lung(scene.to_volume(), WINDOW)
    assert not mask[~scene.find((0, 0, 0), (9e9, 118, 165))].any()
    assert not mask[scene.find((-90, -20, 0), (80, 12, 12))].any()
    assert not mask[np.abs(scene.x) < 10].any()


def test_any_window_that_holds_gas_and_lung_gives_the_same_lung() -> None:
    scene, _ = draw_chest()
    mask = segment_lung(scene.to_volume(), WINDOW)
    for window in ((-1000.0, 400.0), (-1250.0, 250.0), (-1024.0, 3000.0)):
        assert find_dice(segment_lung(scene.to_volume(window), window), mask) > 0.99


@pytest.mark.parametrize("window", [(-900.0, 150.0), (-1350.0, -500.0)])
def test_a_window_without_gas_or_lung_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        segment_lung(draw_chest((8, 32, 32))[0].to_volume(), window)


def test_display_images_are_refused() -> None:
    volume = replace(draw_chest((8, 32, 32))[0].to_volume(), spacing_mm=None)
    with pytest.raises(ValueError, match="display image"):
        segment_lung(volume, WINDOW)
    with pytest.raises(ValueError, match="display image"):
        has_lung(np.ones((8, 32, 32), bool), volume)


@pytest.mark.parametrize("shape", GRIDS[:2])
def test_small_lesions_belong_to_the_lung_even_at_the_pleura(shape: tuple[int, int, int]) -> None:
    scene, lung = draw_chest(shape)
    inside = scene.paint((0, -20, -75), (15, 15, 15), 30)
    at_the_pleura = scene.paint((10, 0, -130), (14, 9, 9), 30) & lung
    mask = segment_lung(scene.to_volume(), WINDOW)
    assert mask[inside].all()
    assert mask[at_the_pleura].mean() > 0.9


@pytest.mark.parametrize("radii", [(70, 8, 8), (15, 30, 20)], ids=["slender and tall", "wide and flat"])
def test_a_lesion_at_the_pleura_is_lung_if_lung_surrounds_it_in_plane_or_along_z(radii: tuple[int, int, int]) -> None:
    scene, lung = draw_chest((64, 224, 224))
    lesion = scene.paint((0, 0, -133), radii, 30) & lung
    assert segment_lung(scene.to_volume(), WINDOW)[lesion].mean() > 0.9


def test_emphysema_is_lung() -> None:
    scene, lung = draw_chest()
    for centre, radii in LUNGS:
        scene.paint(centre, (radii[0], 0.7 * radii[1], 0.6 * radii[2]), -985)
    assert find_dice(segment_lung(scene.to_volume(), WINDOW), lung) > 0.95


def test_a_pocket_of_food_and_air_below_the_lungs_stays_out() -> None:
    scene, _ = draw_chest()
    pocket = scene.paint((135, -70, 40), (12, 20, 30), -700)
    assert not segment_lung(scene.to_volume(), WINDOW)[pocket].any()


def test_a_liver_dome_inside_a_ring_of_lung_stays_out() -> None:
    scene, _ = draw_chest()
    dome = scene.paint((120, 0, -75), (90, 60, 40), 60)
    mask = segment_lung(scene.to_volume(), WINDOW)
    assert mask[dome].mean() < 0.2


@pytest.mark.parametrize("shape", GRIDS)
def test_a_crop_that_cuts_the_body_open_at_both_sides_loses_no_lung(shape: tuple[int, int, int]) -> None:
    scene, lung = draw_chest(shape, (300, 360, 200))
    assert lung[:, :, 0].any()
    assert lung[:, :, -1].any()
    assert find_dice(segment_lung(scene.to_volume(), WINDOW), lung) > 0.97


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("scale", [0.45, 1.0, 1.2])
def test_a_child_and_a_giant_have_lungs(shape: tuple[int, int, int], scale: float) -> None:
    volume = draw_chest(shape)[0].to_volume()
    sized = replace(volume, spacing_mm=tuple(scale * step for step in volume.spacing_mm or ()))
    assert has_lung(segment_lung(sized, WINDOW), sized)


@pytest.mark.parametrize("extent_mm", [(300.0, 550.0, 550.0), (200.0, 360.0, 360.0), (700.0, 500.0, 500.0)])
def test_wide_fields_short_scans_and_whole_trunks_have_lungs(extent_mm: tuple[float, float, float]) -> None:
    scene, lung = draw_chest(extent_mm=extent_mm)
    assert find_dice(segment_lung(scene.to_volume(), WINDOW), lung) > 0.96
    assert judge(scene)


CONSOLIDATIONS: dict[str, Callable[[Scene], BoolArray]] = {
    "one lung": lambda scene: scene.x > 0,
    "the back of both": lambda scene: scene.y > -30,
    "the lower half of both": lambda scene: scene.z > 0,
}


@pytest.mark.parametrize("part", CONSOLIDATIONS)
def test_a_chest_with_half_its_lung_consolidated_has_lungs(part: str) -> None:
    scene, lung = draw_chest()
    scene.hu[lung & CONSOLIDATIONS[part](scene)] = 30
    assert judge(scene)


@pytest.mark.parametrize("shape", GRIDS)
def test_a_head_has_no_lung(shape: tuple[int, int, int]) -> None:
    scene = Scene(shape, (200, 240, 240))
    scene.paint((0, 0, 0), (95, 92, 74), 800)
    scene.paint((0, 0, 0), (88, 85, 67), 35)
    for side in (-1, 1):
        scene.paint((40, -50, 25 * side), (17, 17, 14), -1000)  # maxillary sinus, 17 ml
        scene.paint((-25, -70, 10 * side), (12, 6, 10), -1000)  # frontal sinus
        scene.paint((30, 35, 58 * side), (12, 10, 6), -600)  # mastoid cells
    scene.paint((50, -30, 0), (45, 30, 9), -950)  # nose and throat
    assert not judge(scene)


def draw_abdomen(shape: tuple[int, int, int]) -> Scene:
    """Lung bases of 0.7 litres around a liver dome, a stomach bubble, loops of gas and a colon of stool and gas."""
    scene = Scene(shape, (400, 360, 400))
    scene.paint((0, 0, 0), (9e9, 118, 165), 40)
    for side in (-1, 1):
        scene.paint((-200, 0, 75 * side), (60, 90, 58), -850)
        scene.paint((-175, -5, 70 * side), (50, 70, 52), 60)
    scene.paint((-110, -60, 60), (30, 30, 45), -1000)
    for number in range(12):
        scene.paint((-60 + 20 * number, -70 + 8 * (number % 3), -110 + 20 * number), (14, 14, 18), -1000)
    scene.paint((40, 10, 120), (120, 22, 22), -300)
    scene.paint((40, -5, 120), (100, 9, 14), -700)
    return scene


@pytest.mark.parametrize("shape", GRIDS)
def test_an_abdomen_with_bowel_gas_and_lung_bases_has_no_lung(shape: tuple[int, int, int]) -> None:
    scene = draw_abdomen(shape)
    volume = scene.to_volume()
    mask = segment_lung(volume, WINDOW)
    litres = mask.sum() * np.prod(volume.spacing_mm) / 1e6
    assert 0.15 < litres < 1.0  # so that volume alone does not decide
    assert not has_lung(mask, volume)


def draw_stool(shape: tuple[int, int, int], radius: float, half_height: float) -> Scene:
    """An abdomen without lung: an upright colon full of stool on each side, and a full rectum."""
    scene = Scene(shape, (400, 360, 400))
    scene.paint((0, 0, 0), (9e9, 118, 165), 40)
    for side in (-1, 1):
        is_colon = (np.hypot(scene.y, scene.x - side * 105) < radius) & (np.abs(scene.z) < half_height)
        scene.hu[is_colon] = -305 + 45 * np.sin(scene.z[is_colon] / 20)
    scene.paint((150, 40, 0), (45, 35, 35), -300)
    return scene


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize(("radius", "half_height"), [(28, 140), (30, 180), (35, 150), (40, 120)])
def test_more_than_a_litre_of_stool_is_no_chest(radius: float, half_height: float, shape: tuple[int, int, int]) -> None:
    scene = draw_stool(shape, radius, half_height)
    assert not judge(scene)


@pytest.mark.parametrize("radii", [(70, 65, 70), (60, 65, 90)])
def test_one_mass_of_stool_in_the_middle_is_no_chest(radii: tuple[int, int, int]) -> None:
    scene = Scene((24, 96, 96), (400, 360, 400))
    scene.paint((0, 0, 0), (9e9, 118, 165), 40)
    scene.paint((60, 20, 0), radii, -300)
    assert not judge(scene)


def test_a_slab_from_the_middle_of_a_small_chest_has_lungs() -> None:
    volume = draw_chest(extent_mm=(60, 360, 360))[0].to_volume()
    small = replace(volume, spacing_mm=tuple(0.6 * step for step in volume.spacing_mm or ()))
    assert has_lung(segment_lung(small, WINDOW), small)


def test_much_lung_is_a_chest_however_much_abdomen_follows() -> None:
    scene = Scene((32, 96, 96), (400, 360, 400))
    scene.paint((0, 0, 0), (9e9, 118, 165), 40)
    for side in (-1, 1):
        scene.paint((-200, 0, 75 * side), (70, 90, 58), -850)
    assert judge(scene)


def test_nothing_but_air_or_nothing_but_body_has_no_lung() -> None:
    for hu in (-1000.0, 40.0):
        scene = Scene((24, 64, 64), (300, 300, 300))
        scene.hu[:] = hu
        assert not judge(scene)


@dataclass(frozen=True)
class ArrayStack:
    """A series in memory, as the resampler wants it."""

    voxels_hu: FloatArray
    spacing_mm: tuple[float, float, float]
    intensity: Intensity = Intensity.HU

    @property
    def shape(self) -> tuple[int, int, int]:
        num_slices, height, width = self.voxels_hu.shape
        return num_slices, height, width

    def read_slice(self, index: int) -> FloatArray:
        return self.voxels_hu[index].astype(np.float32)


def resample(stack: ArrayStack, shape: tuple[int, int, int]) -> StandardVolume:
    return make_standard_volume(stack, VolumeConfig(shape=shape))


def resample_truth(lung: BoolArray, volume: StandardVolume) -> BoolArray:
    """The lung of the standard volume: its voxel centres looked up in the phantom's own grid."""
    box = volume.crop
    starts, lengths = (0, box.top, box.left), (box.num_slices, box.height, box.width)
    lookup = [
        np.floor(start + (np.arange(n) + 0.5) * length / n).astype(int)
        for start, length, n in zip(starts, lengths, volume.voxels.shape, strict=True)
    ]
    return lung[np.ix_(*lookup)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("diagnosis", "severity"),
    [(Diagnosis.NORMAL, 0.0), (Diagnosis.CP, 0.3), (Diagnosis.CP, 1.0), (Diagnosis.NCP, 0.3), (Diagnosis.NCP, 1.0)],
)
def test_the_lung_of_an_anatomical_phantom_is_found(diagnosis: Diagnosis, severity: float, seed: int) -> None:
    phantom = make_phantom(diagnosis, seed, severity=severity)
    volume = resample(ArrayStack(phantom.voxels_hu, phantom.spacing_mm), (32, 96, 96))
    mask = segment_lung(volume, WINDOW)
    assert find_dice(mask, resample_truth(phantom.lung, volume)) > 0.93
    assert has_lung(mask, volume)


def judge_phantom(phantom: Phantom, shapes: Sequence[tuple[int, int, int]]) -> list[bool]:
    """What is said of a phantom on each grid."""
    volumes = [resample(ArrayStack(phantom.voxels_hu, phantom.spacing_mm), shape) for shape in shapes]
    return [has_lung(segment_lung(volume, WINDOW), volume) for volume in volumes]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 11, 26])  # bowel gas of 11 and 26 lies so that 16 slices make it look tall
@pytest.mark.parametrize("make", [make_head, make_abdomen])
def test_anatomical_heads_and_abdomens_have_no_lung(make: Callable[..., Phantom], seed: int) -> None:
    assert not any(judge_phantom(make(seed), [*SMALL_TO_LARGE[:2], *GRIDS[1:]]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_head, make_abdomen])
def test_no_head_or_abdomen_of_forty_has_lung(make: Callable[..., Phantom]) -> None:
    verdicts = [judge_phantom(make(seed), SMALL_TO_LARGE) for seed in range(40)]
    assert not np.any(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("diagnosis", [Diagnosis.CP, Diagnosis.NCP])
def test_no_chest_of_the_worst_severity_is_refused(diagnosis: Diagnosis) -> None:
    verdicts = [judge_phantom(make_phantom(diagnosis, seed, severity=1.0), SMALL_TO_LARGE) for seed in range(12)]
    assert np.all(verdicts)


def test_a_phantom_whose_lungs_are_all_ground_glass_is_a_chest() -> None:
    phantom = make_phantom(Diagnosis.NORMAL, 0)
    for gain_hu in (300, 500):
        sick = replace(phantom, voxels_hu=phantom.voxels_hu + np.int16(gain_hu) * phantom.lung)
        assert all(judge_phantom(sick, SMALL_TO_LARGE))


def test_a_higher_threshold_leaves_healthy_lungs_as_they_are() -> None:
    """Two thresholds are for the sick: a small chest keeps the mask of the lower one."""
    phantom = make_phantom(Diagnosis.NORMAL, 0)
    volume = resample(ArrayStack(phantom.voxels_hu, phantom.spacing_mm), (24, 64, 64))
    child = replace(volume, spacing_mm=tuple(0.5 * step for step in volume.spacing_mm or ()))
    mask = segment_lung(child, WINDOW)
    assert 0.15 < mask.sum() * np.prod(child.spacing_mm) / 1e6 < 1.2
    assert has_lung(mask, child)
    assert not (mask & (child.voxels >= 255 * (-400 + 1350) / 1500)).sum() > 0.2 * mask.sum()


@cache
def read_chest(name: str) -> ArrayStack:
    """Real series, head first, slices at least 3 mm apart, 256 x 256; read by pydicom, not our reader."""
    slices = [pydicom.dcmread(path) for path in (SERIES / name).rglob("*.dcm")]
    slices.sort(key=lambda item: -float(item.ImagePositionPatient[2]))
    gap_mm = float(slices[0].ImagePositionPatient[2]) - float(slices[1].ImagePositionPatient[2])
    slices = slices[:: max(1, round(3 / gap_mm))]
    top, bottom = (float(slices[end].ImagePositionPatient[2]) for end in (0, -1))
    spacing = ((top - bottom) / (len(slices) - 1), *(2 * float(step) for step in slices[0].PixelSpacing))
    hu = [item.pixel_array * float(item.RescaleSlope) + float(item.RescaleIntercept) for item in slices]
    return ArrayStack(np.array(hu, np.float32).reshape(-1, 256, 2, 256, 2).mean((2, 4)), spacing)  # type: ignore[arg-type]


@needs_ct
@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_real_chests_have_lungs_of_two_to_six_litres(name: str, shape: tuple[int, int, int]) -> None:
    volume = resample(read_chest(name), shape)
    mask = segment_lung(volume, WINDOW)
    assert has_lung(mask, volume)
    assert 2 < mask.sum() * np.prod(volume.spacing_mm) / 1e6 < 6


def segment_simply(volume: StandardVolume, air_below_hu: float) -> BoolArray:
    """What `segment_lung` says it does at one threshold, by scipy, whole volumes at a time."""
    spacing_mm = volume.spacing_mm
    assert spacing_mm is not None
    air, gas = (volume.voxels < 255 * (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) for hu in (air_below_hu, -950.0))
    patches, num_patches = ndimage.label(air, IN_PLANE)
    size, in_gas, in_body = (
        np.bincount(patches[where], minlength=num_patches + 1) for where in (air, gas, air & span_simply(~air))
    )
    is_large = size * (spacing_mm[1] * spacing_mm[2] / 100) > 60.0
    is_lung = (in_gas < np.where(is_large, 0.6, 0.25) * size) & (in_body >= 0.25 * size)
    is_lung[0] = False
    pieces, num_pieces = ndimage.label(is_lung[patches])
    size = np.bincount(pieces.ravel(), minlength=num_pieces + 1)
    size[0] = 0
    lung = np.zeros(air.shape, bool)
    for number in np.flatnonzero((size > 0) & (size >= 0.1 * size.max())):
        lung |= restore_simply(pieces == number, spacing_mm)
    return lung


def span_simply(tissue: BoolArray) -> BoolArray:
    """What has parts of each slice's largest piece on both sides; of equal pieces, the one that comes first."""
    spanned = np.zeros_like(tissue)
    for plane, room in zip(tissue, spanned, strict=True):
        labels, num_labels = ndimage.label(plane)
        if num_labels:
            body = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
            for axis in range(2):
                before = np.logical_or.accumulate(body, axis)
                room |= before & np.flip(np.logical_or.accumulate(np.flip(body, axis), axis), axis)
    return spanned


def restore_simply(piece: BoolArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    filled = np.zeros_like(piece)
    for reach_mm in ((0.0, 10.0, 10.0), (25.0, 0.0, 0.0)):
        steps = [round(length / step) for length, step in zip(reach_mm, spacing_mm, strict=True)]
        size = [2 * count + 1 for count in steps]
        whole = np.pad(piece, [(count, count) for count in steps]).view(np.uint8)
        for extreme in (ndimage.maximum_filter, ndimage.minimum_filter):
            whole = extreme(whole, size, mode="constant")
        filled |= whole[tuple(slice(count, count + n) for count, n in zip(steps, piece.shape, strict=True))] > 0
    for neighbours, most in ((IN_PLANE, 1200.0 / (spacing_mm[1] * spacing_mm[2])), (None, np.inf)):
        gaps, _ = ndimage.label(np.pad(~filled, 1, constant_values=True), neighbours)
        is_hole = np.bincount(gaps.ravel()) <= most
        is_hole[gaps[:, 0, 0]] = is_hole[0] = False
        filled = filled | is_hole[gaps[1:-1, 1:-1, 1:-1]]
    return filled


def draw_blobs(seed: int) -> StandardVolume:
    """Patches of every density with holes of every size, and slices with two equal rings: no chest, but all cases."""
    shape, spacing_mm = (20, 40, 50), (6.0 + seed, 5.0 + seed, 4.0)
    rough = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (1, 2, 2))
    voxels = (rough / rough.std() * 90 + 100).clip(0, 255).astype(np.uint8)
    voxels[::4] = 0
    for left in (3, 27):
        voxels[::4, 5:25, left : left + 19] = 250
        voxels[::4, 8:22, left + 3 : left + 16] = 90
    return StandardVolume(voxels, Intensity.HU, spacing_mm, CropBox(shape[0], 0, 0, *shape[1:]))


def draw_enclosed_mass() -> StandardVolume:
    """Lung all round a mass that is too wide and too tall to be closed, in a body."""
    voxels = np.zeros((20, 40, 50), np.uint8)
    voxels[:, 3:37, 3:47] = 250
    voxels[2:18, 8:32, 8:42] = 90
    voxels[4:16, 14:26, 16:34] = 250
    return StandardVolume(voxels, Intensity.HU, (6.0, 5.0, 4.0), CropBox(20, 0, 0, 40, 50))


def is_simply_segmented(volume: StandardVolume) -> bool:
    """At one of the two thresholds; and the mask is not empty."""
    lung = segment_lung(volume, WINDOW)
    return bool(lung.any()) and any(np.array_equal(lung, segment_simply(volume, hu)) for hu in (-400.0, -250.0))


@pytest.mark.parametrize("seed", range(6))
def test_every_voxel_of_the_mask_is_that_of_the_simple_way(seed: int) -> None:
    assert is_simply_segmented(draw_blobs(seed))
    phantom = make_phantom(list(Diagnosis)[seed % 3], seed, shape=GRIDS[2])
    assert is_simply_segmented(resample(ArrayStack(phantom.voxels_hu.astype(np.float32), phantom.spacing_mm), GRIDS[2]))


def test_a_mass_that_lung_encloses_is_lung_however_large() -> None:
    volume = draw_enclosed_mass()
    assert is_simply_segmented(volume)
    np.testing.assert_array_equal(np.argwhere(segment_lung(volume, WINDOW))[[0, -1]], [[2, 8, 8], [17, 31, 41]])
    assert segment_lung(volume, WINDOW)[4:16, 14:26, 16:34].all()


@needs_ct
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_every_voxel_of_a_real_mask_is_that_of_the_simple_way(name: str) -> None:
    for shape in GRIDS:
        assert is_simply_segmented(resample(read_chest(name), shape))


def find_lung_by_itk(voxels: NDArray[Any], low: float, high: float) -> BoolArray:
    """Large 3D pieces between two values that do not touch the image's sides."""
    air = sitk.BinaryThreshold(sitk.GetImageFromArray(voxels), low, high)
    pieces = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(air), minimumObjectSize=20000))
    sides = np.concatenate([pieces[:, end].ravel() for end in (0, -1)] + [pieces[:, :, end].ravel() for end in (0, -1)])
    return np.asarray((pieces > 0) & ~np.isin(pieces, sides))


@pytest.mark.slow
@needs_ct
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_simpleitk_finds_the_same_lung_in_real_chests(name: str) -> None:
    """Second opinion: what is between gas and tissue."""
    volume = resample(read_chest(name), (64, 224, 224))
    theirs = find_lung_by_itk(volume.voxels, 68, 161)
    mask = segment_lung(volume, WINDOW)
    assert find_dice(mask, theirs) > 0.9
    assert mask[theirs].mean() > 0.98


def widen(stack: ArrayStack) -> ArrayStack:
    margin = ((0, 0), (60, 60), (60, 60))
    return replace(stack, voxels_hu=np.pad(stack.voxels_hu, margin, constant_values=-1024))


def thicken(stack: ArrayStack) -> ArrayStack:
    step = max(1, round(8 / stack.spacing_mm[0]))
    spacing = (step * stack.spacing_mm[0], *stack.spacing_mm[1:])
    return replace(stack, voxels_hu=stack.voxels_hu[::step], spacing_mm=spacing)


def keep_slices(stack: ArrayStack, first: float, last: float) -> ArrayStack:
    num_slices = stack.shape[0]
    return replace(stack, voxels_hu=stack.voxels_hu[round(first * num_slices) : round(last * num_slices)])


def consolidate(stack: ArrayStack, part: tuple[slice, slice, slice]) -> ArrayStack:
    """Fill what is lung-like in one part of the image, body or not, with soft tissue."""
    voxels = stack.voxels_hu.copy()
    box = voxels[part]
    box[(box > -960) & (box < -300)] = 30
    return replace(stack, voxels_hu=voxels)


HOSTILE: dict[str, Callable[[ArrayStack], ArrayStack]] = {
    "a wide field": widen,
    "8 mm slices": thicken,
    "a small child": lambda stack: replace(stack, spacing_mm=tuple(0.45 * step for step in stack.spacing_mm)),
    "cut at the apex": lambda stack: keep_slices(stack, 1 / 3, 1),
    "cut at the base": lambda stack: keep_slices(stack, 0, 2 / 3),
    "cut at the sides": lambda stack: replace(stack, voxels_hu=stack.voxels_hu[:, :, 35:-35]),
    "off centre": lambda stack: replace(stack, voxels_hu=np.roll(stack.voxels_hu, 50, axis=2)),
    "prone": lambda stack: replace(stack, voxels_hu=stack.voxels_hu[:, ::-1, ::-1]),
    "left lung consolidated": lambda stack: consolidate(stack, np.s_[:, :, stack.shape[2] // 2 :]),
    "right lung consolidated": lambda stack: consolidate(stack, np.s_[:, :, : stack.shape[2] // 2]),
    "lower half consolidated": lambda stack: consolidate(stack, np.s_[stack.shape[0] // 2 :]),
}


@pytest.mark.slow
@needs_ct
@pytest.mark.parametrize("change", HOSTILE)
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_no_real_chest_is_refused(name: str, change: str) -> None:
    stack = HOSTILE[change](read_chest(name))
    volume = resample(stack, (24, 64, 64))
    assert has_lung(segment_lung(volume, WINDOW), volume)


@pytest.mark.slow
@needs_ct
@pytest.mark.parametrize(
    "gain_hu", [pytest.param(hu, marks=pytest.mark.slow) for hu in (100, 200, 300, 400, 500)] + [550]
)
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_no_real_chest_is_refused_for_ground_glass_in_all_of_both_lungs(name: str, gain_hu: int) -> None:
    stack = read_chest(name)
    lung = find_lung_by_itk(stack.voxels_hu, -950, -400)
    sick = replace(stack, voxels_hu=np.where(lung, np.minimum(stack.voxels_hu + gain_hu, 50), stack.voxels_hu))
    litres = lung.sum() * np.prod(stack.spacing_mm) / 1e6
    for shape in SMALL_TO_LARGE:
        volume = resample(sick, shape)
        mask = segment_lung(volume, WINDOW)
        assert has_lung(mask, volume)
        assert 0.5 < mask.sum() * np.prod(volume.spacing_mm) / 1e6 / litres < 1.1


@pytest.mark.slow
@needs_ct
@pytest.mark.parametrize(
    ("name", "top_mm"), [(CHESTS[0], 215.0), (CHESTS[1], 150.0), (CHESTS[2], 205.0)], ids=("weasis", "a0002", "lidc")
)
def test_the_lung_bases_left_above_a_real_abdomen_are_no_chest(name: str, top_mm: float) -> None:
    """`top_mm` below the first slice is 1 to 3 cm above the highest liver dome, where abdomen scans begin.

    From there down, as long as ten slices are left.
    """
    stack = read_chest(name)
    last_top = (stack.shape[0] - 10) * stack.spacing_mm[0]
    for start_mm in np.arange(top_mm, last_top, 15):
        abdomen = replace(stack, voxels_hu=stack.voxels_hu[round(start_mm / stack.spacing_mm[0]) :])
        for shape in (*GRIDS, SMALL_TO_LARGE[0]):
            volume = resample(abdomen, shape)
            mask = segment_lung(volume, WINDOW)
            assert mask.any()
            assert not has_lung(mask, volume)


def to_display(volume: StandardVolume) -> StandardVolume:
    return replace(volume, intensity=Intensity.DISPLAY, spacing_mm=None)


def narrow(voxels: np.ndarray) -> np.ndarray:
    """What a window from -1000 to 0 HU makes of one from -1350 to 150: the air outside becomes 0, as in CC-CCII."""
    return ((voxels - 59.5) * 1.5).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", GRIDS)
def test_display_lungs_are_found_in_any_window_and_on_black_ground(shape: tuple[int, int, int]) -> None:
    scene, lung = draw_chest(shape)
    voxels = scene.to_volume().voxels
    for seen in (voxels, narrow(voxels), np.where(lung, voxels, 0).astype(np.uint8)):
        assert find_dice(segment_display_lung(seen), lung) > 0.97
    assert [is_masked(seen) for seen in (voxels, narrow(voxels), np.where(lung, voxels, 0))] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_head, make_abdomen])
def test_a_display_scan_of_no_chest_has_no_lung_and_is_masked_whole(make: Callable[..., Phantom]) -> None:
    for seed in range(4):
        for crop in ("paper", "body"):
            phantom = make(seed)
            stack = ArrayStack(phantom.voxels_hu, phantom.spacing_mm)
            volume = make_standard_volume(stack, VolumeConfig(shape=(32, 96, 96), crop=crop))
            assert not segment_display_lung(volume.voxels).any()
            assert not mask_outside_lung(to_display(volume), WINDOW, "outlines").any()


FAR_MM = 40.0


@cache
def mask_phantoms(extent: Literal["outlines", "lungs"]) -> dict[str, list[tuple[float, float]]]:
    """For HU and display: of every phantom the kept share of its planted lesion, and of what is far from its lungs."""
    kept: dict[str, list[tuple[float, float]]] = {"HU": [], "DISPLAY": []}
    for seed in range(12):
        diagnosis = (Diagnosis.NCP, Diagnosis.CP)[seed % 2]
        phantom = make_phantom(diagnosis, 900 + seed, severity=(0.2, 0.6, 1.0)[seed // 2 % 3], shape=(40, 144, 144))
        volume = resample(ArrayStack(phantom.voxels_hu, phantom.spacing_mm), (48, 112, 112))
        distance_mm = ndimage.distance_transform_edt(~phantom.lung, sampling=phantom.spacing_mm)
        lesion, far = resample_truth(phantom.lesion, volume), resample_truth(distance_mm > FAR_MM, volume)
        for name, seen in (("HU", volume), ("DISPLAY", to_display(volume))):
            is_kept = mask_outside_lung(seen, WINDOW, extent) > 0
            kept[name].append((float(is_kept[lesion].mean()), float(is_kept[far].mean())))
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("intensity", ["HU", "DISPLAY"])
@pytest.mark.parametrize(("extent", "mean", "least"), [("outlines", 0.97, 0.85), ("lungs", 0.65, 0.25)])
def test_planted_lesions_survive_the_mask_and_the_surroundings_do_not(
    extent: Literal["outlines", "lungs"], mean: float, least: float, intensity: str
) -> None:
    """Lesions at the pleura are what NCP looks like: outlines keep them, but for a lobe without any air; lungs lose."""
    lesion, far = np.array(mask_phantoms(extent)[intensity]).T
    told = f"{lesion.mean():.3f} on average, {lesion.min():.3f} at least"
    print(f"of planted lesion voxels kept, {extent}, {intensity}: {told}")
    assert lesion.mean() > mean
    assert lesion.min() > least
    assert far.max() < 0.04  # of heart and liver dome, within the hulls


@pytest.mark.parametrize("extent", ["outlines", "lungs"])
def test_the_mask_leaves_the_kept_voxels_as_they_are(extent: Literal["outlines", "lungs"]) -> None:
    scene, lung = draw_chest()
    volume = scene.to_volume()
    masked = mask_outside_lung(volume, WINDOW, extent)
    assert (masked[lung] == volume.voxels[lung]).all()
    assert set(np.unique(masked[masked != volume.voxels])) == {0}
    assert not masked[:, 0].any()


@pytest.mark.slow
@needs_ct
@pytest.mark.parametrize("name", FEWER_CHESTS)
def test_display_lungs_of_real_chests_are_those_found_by_hounsfield_units(name: str) -> None:
    volume = resample(read_chest(name), (48, 112, 112))
    assert find_dice(segment_display_lung(volume.voxels), segment_lung(volume, WINDOW)) > 0.95


@pytest.mark.slow
def test_masking_every_scan_takes_from_the_masked_ones_what_tells_them() -> None:
    """Scans of one diagnosis come masked, as in CC-CCII. Of outlines the border no longer tells, but walls that are not
    there do; of lungs neither."""
    seen: dict[str, list[list[float]]] = {"before": [], "outlines": [], "lungs": []}
    is_masked_before = [seed % 3 == 0 for seed in range(18)]
    for seed, came_masked in enumerate(is_masked_before):
        phantom = make_phantom(Diagnosis.NORMAL, 950 + seed, shape=(36, 96, 96))
        volume = to_display(resample(ArrayStack(phantom.voxels_hu, phantom.spacing_mm), (32, 64, 64)))
        if came_masked:
            lung = resample_truth(phantom.lung, volume)
            volume = replace(volume, voxels=np.where(lung, volume.voxels, 0).astype(np.uint8))
        outlines, lungs = (mask_outside_lung(volume, WINDOW, extent) for extent in ("outlines", "lungs"))
        for when, voxels in (("before", volume.voxels), ("outlines", outlines), ("lungs", lungs)):
            border = measure_border(voxels)
            seen[when].append([float(border["border_zero_share"]), float(border["zero_share"])])
    auc = {
        when: [roc_auc_score(is_masked_before, values) for values in np.array(rows).T] for when, rows in seen.items()
    }
    print({when: [f"{value:.2f}" for value in values] for when, values in auc.items()})
    assert auc["before"] == [1, 1]
    assert auc["outlines"][0] < 0.7
    assert auc["outlines"][1] > 0.9
    assert all(0.3 < value < 0.7 for value in auc["lungs"])
