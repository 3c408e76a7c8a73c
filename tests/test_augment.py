"""The affine map against scipy's, and its geometry on single bright voxels."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from darnet.augment import augment_volume, draw_affine, warp_slices
from darnet.config import AugmentConfig

STILL = AugmentConfig(flip_probability=0, rotation_degrees=0, translation_voxels=0, zoom=(1, 1))


def make_smooth(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape)
    smooth = ndimage.gaussian_filter(noise, sigma=(0, 3, 3))
    span = np.ptp(smooth)
    return np.rint((smooth - smooth.min()) / span * 255).astype(np.uint8)


def warp_with_scipy(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Second opinion: scipy wants the map from output to input, in (y, x)."""
    turned = np.linalg.inv(np.vstack([affine, [0, 0, 1]]))[:2]
    linear, shift = turned[::-1, 1::-1], turned[::-1, 2]
    planes = [
        ndimage.affine_transform(plane.astype(float), linear, shift, order=1, mode="grid-constant") for plane in voxels
    ]
    return np.stack(planes)


@pytest.mark.parametrize("seed", range(6))
def test_the_warp_agrees_with_scipy_within_four_grey_levels(seed: int) -> None:
    voxels = make_smooth((3, 48, 64), seed)
    affine = draw_affine(AugmentConfig(), (48, 64), np.random.default_rng(seed))
    difference = np.abs(warp_slices(voxels, affine) - warp_with_scipy(voxels, affine))
    assert difference.max() <= 4
    assert difference.mean() < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_at_sharp_edges_the_warp_is_as_near_as_its_weights_are_fine(seed: int) -> None:
    """OpenCV's weights go in steps of 1/32 of a pixel: off by half a step in x and in y, and rounding."""
    voxels = np.random.default_rng(seed).choice(np.array([0, 255], np.uint8), (2, 48, 64))
    affine = draw_affine(AugmentConfig(), (48, 64), np.random.default_rng(seed))
    difference = np.abs(warp_slices(voxels, affine) - warp_with_scipy(voxels, affine))
    assert difference.max() <= 255 / 32 + 1


@pytest.mark.parametrize("depth", range(1, 10))
def test_a_slice_has_the_bits_that_it_has_alone_however_many_there_are(depth: int) -> None:
    voxels = np.random.default_rng(depth).integers(0, 256, (depth, 48, 64), dtype=np.uint8)
    affine = draw_affine(AugmentConfig(), (48, 64), np.random.default_rng(depth))
    alone = [cv2.warpAffine(plane, affine, (64, 48), flags=cv2.INTER_LINEAR, borderValue=0) for plane in voxels]
    np.testing.assert_array_equal(warp_slices(voxels, affine), alone)


def test_a_still_configuration_changes_nothing() -> None:
    voxels = np.random.default_rng(0).integers(0, 256, (4, 21, 30), dtype=np.uint8)
    assert np.array_equal(augment_volume(voxels, STILL, np.random.default_rng(1)), voxels)


def test_a_flip_mirrors_left_and_right_exactly() -> None:
    voxels = np.random.default_rng(0).integers(0, 256, (4, 21, 30), dtype=np.uint8)
    config = STILL.model_copy(update={"flip_probability": 1})
    assert np.array_equal(augment_volume(voxels, config, np.random.default_rng(1)), voxels[:, :, ::-1])


def test_all_slices_of_a_scan_get_the_same_map() -> None:
    voxels = np.repeat(make_smooth((1, 40, 40), 2), 5, axis=0)
    moved = augment_volume(voxels, AugmentConfig(), np.random.default_rng(3))
    assert np.array_equal(moved, np.repeat(moved[:1], 5, axis=0))
    assert not np.array_equal(moved, voxels)


def test_what_comes_in_from_outside_is_air() -> None:
    config = STILL.model_copy(update={"zoom": (0.5, 0.5)})
    shrunk = augment_volume(np.full((2, 32, 32), 255, np.uint8), config, np.random.default_rng(0))
    assert shrunk[:, 0, :].max() == 0
    assert shrunk[:, 16, 16].min() == 255


def test_a_zoom_magnifies_by_its_factor() -> None:
    disc = np.zeros((1, 101, 101), np.uint8)
    y, x = np.mgrid[:101, :101] - 50
    disc[0, np.hypot(y, x) <= 20] = 255
    config = STILL.model_copy(update={"zoom": (1.5, 1.5)})
    grown = augment_volume(disc, config, np.random.default_rng(0))
    assert grown.sum() / disc.sum() == pytest.approx(1.5**2, rel=0.03)


def test_translation_scales_with_the_width_and_stays_in_range() -> None:
    config = STILL.model_copy(update={"translation_voxels": 5.0})
    shifts = np.array([draw_affine(config, (112, 112), np.random.default_rng(seed))[:, 2] for seed in range(400)])
    assert 2.4 < np.abs(shifts).max() <= 2.5


def test_a_map_neither_shears_nor_stretches_and_turns_about_the_centre() -> None:
    config = AugmentConfig(translation_voxels=0)
    for seed in range(50):
        affine = draw_affine(config, (41, 61), np.random.default_rng(seed))
        gram = affine[:, :2].T @ affine[:, :2]
        assert gram == pytest.approx(gram[0, 0] * np.eye(2), abs=1e-12)
        assert affine @ [30, 20, 1] == pytest.approx([30, 20])


def test_rotation_and_flips_keep_their_ranges_and_rates() -> None:
    maps = np.array([draw_affine(AugmentConfig(), (64, 64), np.random.default_rng(seed)) for seed in range(2000)])
    zooms = np.hypot(maps[:, 0, 1], maps[:, 1, 1])
    angles = np.rad2deg(np.arctan2(-maps[:, 0, 1], maps[:, 1, 1]))
    mirrored = np.linalg.det(maps[:, :, :2]) < 0
    assert 4.9 < np.abs(angles).max() <= 5
    assert 0.9 <= zooms.min() < 0.905
    assert 1.095 < zooms.max() <= 1.1
    assert 0.45 < mirrored.mean() < 0.55


def test_the_generator_alone_decides() -> None:
    voxels = make_smooth((2, 32, 32), 0)
    first = augment_volume(voxels, AugmentConfig(), np.random.default_rng([7, 1]))
    again = augment_volume(voxels, AugmentConfig(), np.random.default_rng([7, 1]))
    other = augment_volume(voxels, AugmentConfig(), np.random.default_rng([7, 2]))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
