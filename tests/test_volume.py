"""Slices to the standard volume, against sums written out by hand."""

import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from darnet.config import VolumeConfig
from darnet.errors import ScanError, Status
from darnet.scan import FloatArray, Intensity
from darnet.volume import apply_window, find_crop, list_contributions, make_standard_volume


@dataclass
class ArrayStack:
    """A stack in memory that notes which slices were read."""

    voxels: FloatArray
    intensity: Intensity = Intensity.HU
    spacing_mm: tuple[float, float, float] | None = (2.0, 1.0, 1.0)
    read: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        depth, height, width = self.voxels.shape
        return depth, height, width

    def read_slice(self, index: int) -> FloatArray:
        self.read.append(index)
        return self.voxels[index].astype(np.float32)


def _random(shape: tuple[int, int, int]) -> ArrayStack:
    return ArrayStack(np.random.default_rng(0).uniform(-1400, 400, shape).astype(np.float32))


@pytest.mark.parametrize(("num_slices", "depth"), [(30, 8), (8, 8), (5, 16), (275, 64), (1, 8)])
def test_linear_takes_the_two_nearest_slices(num_slices: int, depth: int) -> None:
    signal = np.random.default_rng(1).normal(size=num_slices)
    expected = [np.interp((i + 0.5) * num_slices / depth - 0.5, np.arange(num_slices), signal) for i in range(depth)]
    found = np.zeros(depth)
    for item in list_contributions(num_slices, depth, "linear"):
        found[item.target] += item.weight * signal[item.source]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(("num_slices", "depth"), [(30, 8), (64, 63), (275, 64)])
def test_area_is_the_mean_over_each_output_slice(num_slices: int, depth: int) -> None:
    signal = np.random.default_rng(1).normal(size=num_slices)
    fine = np.repeat(signal, depth)  # a slice is `depth` equal pieces, an output slice `num_slices` of them
    expected = fine.reshape(depth, num_slices).mean(axis=1)
    found = np.zeros(depth)
    for item in list_contributions(num_slices, depth, "area"):
        found[item.target] += item.weight * signal[item.source]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("resampling", ["linear", "area"])
def test_threads_change_no_bit(resampling: str) -> None:
    config = VolumeConfig(shape=(8, 16, 16), depth_resampling=resampling)
    alone = make_standard_volume(_random((100, 32, 32)), config)
    beside = make_standard_volume(_random((100, 32, 32)), config, num_threads=4)
    np.testing.assert_array_equal(alone.voxels, beside.voxels)
    assert alone.spacing_mm == beside.spacing_mm


def test_of_several_bad_slices_the_first_is_named_whatever_thread_was_faster() -> None:
    class Broken(ArrayStack):
        def read_slice(self, index: int) -> FloatArray:
            if index == 9:
                time.sleep(0.05)
            if index in (9, 10, 11):
                raise ScanError(Status.BAD_PIXELS, f"slice {index}")
            return super().read_slice(index)

    voxels = _random((12, 32, 32)).voxels
    with pytest.raises(ScanError, match="slice 9"):
        make_standard_volume(Broken(voxels), VolumeConfig(shape=(12, 16, 16)), num_threads=4)


def test_linear_reads_contributing_slices_only_and_area_reads_all() -> None:
    linear, area = _random((100, 32, 32)), _random((100, 32, 32))
    make_standard_volume(linear, VolumeConfig(shape=(8, 16, 16)))
    make_standard_volume(area, VolumeConfig(shape=(8, 16, 16), depth_resampling="area"))
    assert linear.read == sorted({item.source for item in list_contributions(100, 8, "linear")})
    assert len(linear.read) <= 16
    assert area.read == list(range(100))


def test_standard_volume_is_window_then_crop_then_box_mean() -> None:
    stack = _random((8, 64, 64))
    volume = make_standard_volume(stack, VolumeConfig(shape=(8, 13, 13)))
    unit = np.clip((stack.voxels.astype(np.float64) + 1350) / 1500, 0, 1)
    inner = unit[:, 6:58, 6:58]  # 48/512 of 64 is 6
    expected = inner.reshape(8, 13, 4, 13, 4).mean(axis=(2, 4)) * 255
    assert np.abs(volume.voxels - expected).max() <= 0.51
    assert volume.spacing_mm == (2.0, 4.0, 4.0)
    assert (volume.crop.top, volume.crop.left, volume.crop.height, volume.crop.width) == (6, 6, 52, 52)


def test_display_values_pass_without_window_and_have_no_spacing() -> None:
    voxels = np.random.default_rng(2).integers(0, 256, (8, 13, 13)).astype(np.float32)
    stack = ArrayStack(voxels, Intensity.DISPLAY, None)
    volume = make_standard_volume(stack, VolumeConfig(shape=(8, 11, 11)))
    np.testing.assert_array_equal(volume.voxels, voxels[:, 1:12, 1:12])
    assert volume.spacing_mm is None


def test_window_maps_its_bounds_to_0_and_1_and_clips() -> None:
    values = np.array([-2000, -1350, -600, 150, 3000], np.float32)
    np.testing.assert_allclose(apply_window(values, (-1350, 150)), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("window", [(-1350.0, 150.0), (-1000.3, 400.7)])
def test_every_stored_value_has_the_bits_of_the_window_s_formula(window: tuple[float, float]) -> None:
    values = np.append(np.arange(-(2**15), 2**16, dtype=np.float32), [np.nan, np.inf]).astype(np.float32)
    before = values.copy()
    low, width = np.float32(window[0]), np.float32(window[1] - window[0])
    np.testing.assert_array_equal(apply_window(values, window), ((values - low) / width).clip(0, 1))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("wrong", [-40_000.0, 5_000.0, np.inf])
def test_values_that_no_scanner_gives_are_counted_and_two_in_a_hundred_refused(wrong: float) -> None:
    voxels = _random((100, 10, 10)).voxels
    config = VolumeConfig(shape=(100, 8, 8))
    voxels[:2] = wrong
    assert make_standard_volume(ArrayStack(voxels), config).voxels.shape == config.shape
    voxels[5, 5, 5] = wrong
    with pytest.raises(ScanError, match="2% of the voxels cannot be HU"):
        make_standard_volume(ArrayStack(voxels), config)
    voxels[:3] = np.nan
    with pytest.raises(ScanError, match="3% of the voxels cannot be HU"):
        make_standard_volume(ArrayStack(voxels), config)


def test_body_crop_is_the_box_of_the_body_and_leaves_the_couch_out() -> None:
    voxels = np.full((20, 128, 128), -1000.0, np.float32)
    voxels[:, 30:90, 20:100] = 40
    voxels[:, 100:102, 5:120] = 100  # couch
    box = find_crop(ArrayStack(voxels), VolumeConfig(shape=(8, 16, 16), crop="body"))
    assert (box.top, box.left, box.height, box.width) == (30, 20, 60, 80)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("resampling", ["linear", "area"])
def test_body_crop_reads_no_slice_twice(resampling: str, num_threads: int) -> None:
    stack = ArrayStack(np.pad(np.full((30, 40, 60), 40.0), ((0, 0), (5, 5), (5, 5)), constant_values=-1000))
    config = VolumeConfig(shape=(12, 16, 16), crop="body", depth_resampling=resampling)
    make_standard_volume(stack, config, num_threads)
    assert sorted(stack.read) == sorted({item.source for item in list_contributions(30, 12, resampling)})


def test_a_wide_field_of_view_does_not_shrink_the_body_under_body_crop() -> None:
    body = np.full((12, 40, 60), 40.0, np.float32)
    config = VolumeConfig(shape=(12, 16, 16), crop="body")
    narrow = make_standard_volume(ArrayStack(np.pad(body, ((0, 0), (5, 5), (5, 5)), constant_values=-1000)), config)
    wide = make_standard_volume(ArrayStack(np.pad(body, ((0, 0), (50, 50), (50, 50)), constant_values=-1000)), config)
    assert np.abs(narrow.voxels.astype(int) - wide.voxels).max() <= 25  # corners of the opening only
    assert wide.voxels.mean() > 220


@pytest.mark.parametrize("value", [-1000.0, 0.0, 900.0])
def test_a_constant_scan_is_no_scan(value: float) -> None:
    with pytest.raises(ScanError) as caught:
        make_standard_volume(ArrayStack(np.full((10, 32, 32), value, np.float32)), VolumeConfig(shape=(8, 16, 16)))
    assert caught.value.status is Status.BAD_INTENSITY


def test_values_without_air_are_not_hounsfield_units() -> None:
    stack = ArrayStack(np.random.default_rng(0).uniform(0, 255, (10, 32, 32)).astype(np.float32))
    with pytest.raises(ScanError) as caught:
        make_standard_volume(stack, VolumeConfig(shape=(8, 16, 16)))
    assert caught.value.status is Status.BAD_INTENSITY
