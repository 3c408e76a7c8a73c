"""Class activation maps against the logits they decompose, against scipy, and against voxel-by-voxel loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from darnet.cam import class_activation_maps, upsample_cam
from darnet.cam_statistics import CamStatistics, measure_cam
from darnet.model import ModelConfig, build_network
from darnet.scan import BoolArray, CropBox, Diagnosis, FloatArray, Intensity

SHAPE = (5, 6, 8)
CROP = CropBox(num_slices=37, top=48, left=20, height=101, width=300)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _sparse_cam(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> FloatArray:
    values = np.random.default_rng(seed).random(shape).astype(np.float32)
    return np.maximum(values - np.float32(0.4), 0)


def _lung(seed: int = 1, shape: tuple[int, int, int] = SHAPE) -> BoolArray:
    return np.random.default_rng(seed).random(shape) > 0.5


def _measure(
    cam: FloatArray,
    lung: BoolArray | None = None,
    intensity: Intensity = Intensity.HU,
    crop: CropBox = CROP,
    gates: list[float] | None = None,
) -> CamStatistics:
    return measure_cam(cam, Diagnosis.NCP, crop=crop, intensity=intensity, lung=lung, depth_gate_profile=gates)


def _single_voxel(z: int, y: int, x: int, shape: tuple[int, int, int] = SHAPE) -> FloatArray:
    cam = np.zeros(shape, np.float32)
    cam[z, y, x] = 2.5
    return cam


def test_mean_of_the_map_plus_bias_is_the_logit() -> None:
    network = build_network(ModelConfig(volume_shape=(16, 32, 32), base_channels=4), seed=3).eval().double()
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.head.bias, generator=torch.Generator().manual_seed(1))
    x = torch.rand((2, 1, 16, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.inference_mode():
        features, logits = network.features(x), network(x)
        maps = class_activation_maps(features, network.head.weight)
    assert maps.shape == (2, 3, 2, 2, 2)
    torch.testing.assert_close(maps.flatten(2).mean(2) + network.head.bias, logits, rtol=1e-12, atol=1e-12)


def test_each_voxel_of_the_map_is_the_weighted_sum_of_its_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand((2, 3, 2, 1, 2), generator=generator, dtype=torch.float64)
    weight = torch.randn((4, 3), generator=generator, dtype=torch.float64)
    maps = class_activation_maps(features, weight)
    for b, k, z, y, x in product(range(2), range(4), range(2), range(1), range(2)):
        expected = sum(weight[k, c].item() * features[b, c, z, y, x].item() for c in range(3))
        assert maps[b, k, z, y, x].item() == pytest.approx(expected, rel=1e-12)


def test_upsampling_is_relu_then_linear_between_voxel_centres() -> None:
    small = np.random.default_rng(0).normal(size=(2, 3, 4))
    shape = (9, 7, 16)
    grid = np.meshgrid(
        *((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(shape, small.shape, strict=True)), indexing="ij"
    )
    expected = map_coordinates(np.maximum(small, 0), grid, order=1, mode="nearest")
    stretched = upsample_cam(torch.from_numpy(small), shape)
    assert stretched.dtype == np.float32
    assert (small < 0).any()
    np.testing.assert_allclose(stretched, expected, atol=1e-6)


def test_fractions_agree_with_loops_over_voxels() -> None:
    cam, lung = _sparse_cam(), _lung()
    in_lung, left, half, depth_sums = 0.0, 0.0, 0, [0.0] * SHAPE[0]
    total, largest = sum(map(float, cam.flat)), max(map(float, cam.flat))
    for z, y, x in product(*(range(n) for n in SHAPE)):
        value = float(cam[z, y, x])
        in_lung += value if lung[z, y, x] else 0
        left += value if x >= SHAPE[2] / 2 else 0
        half += value >= largest / 2
        depth_sums[z] += value
    measured = _measure(cam, lung)
    assert measured.cam_class is Diagnosis.NCP
    assert measured.cam_in_lung_fraction == pytest.approx(in_lung / total, rel=1e-12)
    assert measured.cam_left_fraction == pytest.approx(left / total, rel=1e-12)
    assert measured.cam_extent_fraction == half / math.prod(SHAPE)
    assert measured.cam_depth_profile == pytest.approx([value / total for value in depth_sums], rel=1e-12)
    assert sum(measured.cam_depth_profile or ()) == pytest.approx(1, abs=1e-12)


def test_a_voxel_at_exactly_half_the_maximum_counts_as_extent() -> None:
    cam = _single_voxel(0, 0, 0) + _single_voxel(2, 3, 4) / 2 + _single_voxel(4, 5, 7) / np.float32(2.01)
    assert _measure(cam).cam_extent_fraction == 2 / math.prod(SHAPE)


@pytest.mark.parametrize(("width", "x", "left"), [(8, 3, 0.0), (8, 4, 1.0), (5, 2, 0.0), (5, 3, 1.0)])
def test_the_patients_left_is_where_x_is_at_least_half_the_width(width: int, x: int, left: float) -> None:
    assert _measure(_single_voxel(1, 1, x, (2, 2, width))).cam_left_fraction == left


@pytest.mark.parametrize(
    "crop",
    [
        CROP,
        CropBox(num_slices=5, top=0, left=0, height=6, width=8),
        CropBox(num_slices=3, top=7, left=9, height=2, width=3),
        CropBox(num_slices=10, top=1, left=0, height=1, width=512),
    ],
)
def test_peak_is_mapped_back_to_the_original_series(crop: CropBox) -> None:
    axes = [(0, crop.num_slices), (crop.top, crop.height), (crop.left, crop.width)]
    for voxel in product(*(range(n) for n in SHAPE)):
        expected = []
        for index, cells, (start, length) in zip(voxel, SHAPE, axes, strict=True):
            nearest = math.floor(start + (index + 0.5) * length / cells - 0.5 + 0.5)
            expected.append(min(max(nearest, start), start + length - 1))
        measured = _measure(_single_voxel(*voxel), crop=crop)
        assert [measured.cam_peak_slice, measured.cam_peak_y, measured.cam_peak_x] == expected


def test_peak_on_a_whole_series_is_where_a_hand_count_puts_it() -> None:
    crop = CropBox(num_slices=128, top=48, left=48, height=416, width=416)
    cam = _single_voxel(10, 0, 223, (64, 224, 224))
    measured = _measure(cam, crop=crop)
    # (10.5 * 2 - 0.5, 48 + 0.5 * 416/224 - 0.5, 48 + 223.5 * 416/224 - 0.5) = (20.5, 48.43, 462.57)
    assert (measured.cam_peak_slice, measured.cam_peak_y, measured.cam_peak_x) == (21, 48, 463)


def test_of_equal_maxima_the_one_nearest_the_middle_is_the_peak() -> None:
    cam = _single_voxel(0, 0, 0) + _single_voxel(1, 2, 3) + _single_voxel(3, 0, 0)
    crop = CropBox(SHAPE[0], 0, 0, *SHAPE[1:])
    measured = _measure(cam, crop=crop)
    assert (measured.cam_peak_slice, measured.cam_peak_y, measured.cam_peak_x) == (1, 2, 3)


@pytest.mark.parametrize("corner", list(product((0, 1), (0, 3), (0, 4))))
def test_peak_of_a_corner_cell_is_that_cell_and_not_the_corner_of_the_scan(corner: tuple[int, int, int]) -> None:
    """Cells of 8 x 16 x 16 voxels have their centres at 3.5, 11.5; 7.5, ..., 55.5; 7.5, ..., 71.5."""
    rng = np.random.default_rng(0)
    class_map = torch.from_numpy(rng.uniform(0, 0.9, (2, 4, 5)).astype(np.float32))
    class_map[corner] = 1.0
    cam = upsample_cam(class_map, (16, 64, 80))
    measured = _measure(cam, lung=None, crop=CropBox(16, 0, 0, 64, 80))
    peak = (measured.cam_peak_slice, measured.cam_peak_y, measured.cam_peak_x)
    centre = [(index + 0.5) * size - 0.5 for index, size in zip(corner, (8, 16, 16), strict=True)]
    assert np.abs(np.array(peak) - centre).max() == 0.5


def test_display_images_have_no_side_and_no_lung() -> None:
    measured = _measure(_sparse_cam(), lung=None, intensity=Intensity.DISPLAY)
    assert measured.cam_left_fraction is None
    assert measured.cam_in_lung_fraction is None
    assert measured.cam_extent_fraction is not None


def test_a_map_nowhere_positive_has_no_statistics() -> None:
    assert _measure(np.zeros(SHAPE, np.float32), _lung(), gates=[0.5]) == CamStatistics()
    assert all(getattr(CamStatistics(), name) is None for name in CamStatistics.__slots__)


def test_gate_profile_is_passed_on_as_plain_floats() -> None:
    gates = np.array([0.25, 0.75], np.float32)
    measured = measure_cam(
        _sparse_cam(), Diagnosis.CP, crop=CROP, intensity=Intensity.HU, lung=None, depth_gate_profile=gates.tolist()
    )
    assert measured.depth_gate_profile == (0.25, 0.75)
    assert _measure(_sparse_cam()).depth_gate_profile is None


def test_lung_on_another_grid_raises() -> None:
    with pytest.raises(ValueError, match="different grids"):
        _measure(_sparse_cam(), np.ones((5, 6, 7), bool))
