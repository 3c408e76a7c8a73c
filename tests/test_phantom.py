"""A phantom is a chest with a known truth, the same for the same seed, whatever its diagnosis."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from darnet.phantom import make_phantom
from darnet.phantoms.canvas import Phantom
from darnet.scan import DIAGNOSES, Diagnosis

SHAPE = (28, 112, 112)
SEEDS = range(4)


def make(diagnosis: Diagnosis, seed: int, severity: float = 0.5) -> Phantom:
    return make_phantom(diagnosis, seed, severity=severity, shape=SHAPE)


@pytest.fixture(scope="module")
def phantoms() -> dict[Diagnosis, list[Phantom]]:
    return {diagnosis: [make(diagnosis, seed) for seed in SEEDS] for diagnosis in DIAGNOSES}


def find_lung_extent(phantom: Phantom) -> tuple[int, int]:
    """First and last slice that shows lung."""
    slices = np.flatnonzero(phantom.lung.any(axis=(1, 2)))
    return int(slices[0]), int(slices[-1])


def find_midline(phantom: Phantom) -> float:
    """Column halfway between the outermost lung columns of the slice with most lung."""
    widest = phantom.lung[phantom.lung.sum(axis=(1, 2)).argmax()]
    columns = np.flatnonzero(widest.any(axis=0))
    return float(columns[0] + columns[-1]) / 2


def test_a_seed_gives_the_same_bytes_twice():
    first, second = make(Diagnosis.NCP, 3), make(Diagnosis.NCP, 3)
    assert first.voxels_hu.tobytes() == second.voxels_hu.tobytes()
    assert first.lesion.tobytes() == second.lesion.tobytes()


def test_two_seeds_give_two_patients():
    first, second = make(Diagnosis.NORMAL, 0), make(Diagnosis.NORMAL, 1)
    assert first.spacing_mm != second.spacing_mm
    assert (first.lung != second.lung).mean() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("diagnosis", [Diagnosis.CP, Diagnosis.NCP])
def test_diagnoses_of_one_seed_differ_in_the_lung_alone(phantoms, diagnosis):
    for normal, ill in zip(phantoms[Diagnosis.NORMAL], phantoms[diagnosis], strict=True):
        assert ill.spacing_mm == normal.spacing_mm
        np.testing.assert_array_equal(ill.lung, normal.lung)
        away = ~ndimage.binary_dilation(normal.lung, np.ones((3, 9, 9)))
        np.testing.assert_array_equal(ill.voxels_hu[away], normal.voxels_hu[away])


@pytest.mark.slow
def test_protocol_varies_with_the_seed_and_not_with_the_diagnosis():
    normal = [make_phantom(Diagnosis.NORMAL, seed) for seed in range(3)]
    ill = make_phantom(Diagnosis.NCP, 0)
    assert (ill.voxels_hu.shape, ill.spacing_mm) == (normal[0].voxels_hu.shape, normal[0].spacing_mm)
    assert len({phantom.voxels_hu.shape[0] for phantom in normal}) > 1
    fields = [phantom.spacing_mm[1] * 256 for phantom in normal]
    assert 319.9 < min(fields) < max(fields) < 500.1
    assert max(fields) - min(fields) > 10


def test_shape_and_spacing_asked_for_are_given():
    phantom = make_phantom(Diagnosis.NCP, 5, shape=(24, 96, 112), spacing_mm=(10.0, 3.5, 3.0))
    assert phantom.voxels_hu.shape == phantom.lung.shape == phantom.lesion.shape == (24, 96, 112)
    assert phantom.voxels_hu.dtype == np.int16
    assert phantom.spacing_mm == (10.0, 3.5, 3.0)


def test_severity_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="severity"):
        make(Diagnosis.NCP, 0, severity=1.2)


def test_lungs_lie_inside_the_body(phantoms):
    for phantom in phantoms[Diagnosis.NORMAL]:
        for voxels_hu, lung in zip(phantom.voxels_hu, phantom.lung, strict=True):
            tissue = ndimage.binary_opening(voxels_hu > -300, np.ones((3, 3)))
            body = ndimage.binary_fill_holes(np.pad(tissue, ((0, 0), (1, 1)), mode="edge"))[:, 1:-1]
            assert not (lung & ~ndimage.binary_dilation(body, iterations=2)).any()


def test_two_lungs_of_adult_size_and_the_right_one_larger(phantoms):
    larger_right = []
    for phantom in phantoms[Diagnosis.NORMAL]:
        litres = phantom.lung.sum() * np.prod(phantom.spacing_mm) / 1e6
        assert 2.5 < litres < 7.5
        labels, _ = ndimage.label(phantom.lung)
        sizes = np.sort(np.bincount(labels.ravel())[1:])[::-1]
        assert sizes[1] > 0.5 * sizes[0]
        assert sizes[:2].sum() > 0.98 * sizes.sum()
        middle = round(find_midline(phantom))
        larger_right.append(phantom.lung[:, :, :middle].sum() > phantom.lung[:, :, middle:].sum())
    assert np.mean(larger_right) > 0.5


def test_lungs_taper_to_the_apex_and_the_right_diaphragm_is_higher(phantoms):
    for phantom in phantoms[Diagnosis.NORMAL]:
        first, last = find_lung_extent(phantom)
        area = phantom.lung.sum(axis=(1, 2))
        assert area[first] < 0.4 * area[(first + last) // 2]
        middle = round(find_midline(phantom))
        domes = []
        for half, beside_heart in ((np.s_[:, :, :middle], 0.3), (np.s_[:, :, middle:], 0.7)):
            _, y, x = np.nonzero(phantom.lung[half])
            column = phantom.lung[half][:, round(y.mean()), round(np.quantile(x, beside_heart))]
            domes.append(np.flatnonzero(column)[-1])
        assert domes[0] <= domes[1]


def test_tissues_have_their_hounsfield_units(phantoms):
    for phantom in phantoms[Diagnosis.NORMAL]:
        core = ndimage.binary_erosion(phantom.lung, np.ones((3, 5, 5)))
        assert -900 < np.median(phantom.voxels_hu[core]) < -780
        assert np.median(phantom.voxels_hu[:, :3]) < -980
        _, heart = find_lung_extent(phantom)
        soft = phantom.voxels_hu[heart // 2][
            (phantom.voxels_hu[heart // 2] > -20) & (phantom.voxels_hu[heart // 2] < 120)
        ]
        assert 35 < np.median(soft) < 62
        assert (phantom.voxels_hu > 350).mean() > 0.003
        assert phantom.voxels_hu.min() >= -1024
        assert phantom.voxels_hu.max() < 1500


def test_lower_lung_is_denser_for_gravity(phantoms):
    for phantom in phantoms[Diagnosis.NORMAL]:
        core = ndimage.binary_erosion(phantom.lung, np.ones((1, 7, 7)))
        rows = np.arange(SHAPE[1])[None, :, None] + np.zeros(SHAPE)
        front, back = np.quantile(rows[core], [0.2, 0.8])
        lower, upper = phantom.voxels_hu[core & (rows > back)], phantom.voxels_hu[core & (rows < front)]
        assert np.median(lower) > np.median(upper) + 20


def test_noise_is_correlated_between_neighbours_but_not_between_slices(phantoms):
    air = phantoms[Diagnosis.NORMAL][0].voxels_hu[:, 2:12, 8:-8].astype(float)
    clipped = air[:, :, 1:][air[:, :, 1:] > -1024]
    assert clipped.std() > 3
    beside = np.corrcoef(air[:, :, 1:].ravel(), air[:, :, :-1].ravel())[0, 1]
    above = np.corrcoef(air[1:].ravel(), air[:-1].ravel())[0, 1]
    assert beside > 0.2
    assert abs(above) < 0.1


def test_normal_has_no_lesion_and_the_others_have(phantoms):
    assert not any(phantom.lesion.any() for phantom in phantoms[Diagnosis.NORMAL])
    assert all(phantom.lesion.any() for d in (Diagnosis.CP, Diagnosis.NCP) for phantom in phantoms[d])


def test_lesions_lie_in_the_lung(phantoms):
    for phantom in phantoms[Diagnosis.CP] + phantoms[Diagnosis.NCP]:
        assert not (phantom.lesion & ~phantom.lung).any()


def test_ncp_is_bilateral_peripheral_and_basal(phantoms):
    for phantom in phantoms[Diagnosis.NCP]:
        middle = round(find_midline(phantom))
        right = phantom.lesion[:, :, :middle].sum() / phantom.lesion.sum()
        assert 0.12 < right < 0.88
        depth = ndimage.distance_transform_edt(phantom.lung, sampling=phantom.spacing_mm)
        assert np.median(depth[phantom.lesion]) < np.median(depth[phantom.lung])
        z_lung, y_lung, _ = np.nonzero(phantom.lung)
        z_lesion, y_lesion, _ = np.nonzero(phantom.lesion)
        assert np.mean(z_lesion) > np.mean(z_lung)
        assert np.mean(y_lesion) > np.mean(y_lung)


def test_cp_is_on_one_side(phantoms):
    for phantom in phantoms[Diagnosis.CP]:
        middle = round(find_midline(phantom))
        right = phantom.lesion[:, :, :middle].sum() / phantom.lesion.sum()
        assert max(right, 1 - right) > 0.95


def test_ncp_is_ground_glass_and_cp_is_solid(phantoms):
    for glass, solid in zip(phantoms[Diagnosis.NCP], phantoms[Diagnosis.CP], strict=True):
        assert -620 < np.median(glass.voxels_hu[glass.lesion]) < -330
        core = ndimage.binary_erosion(solid.lesion, np.ones((1, 5, 5)))
        assert np.quantile(solid.voxels_hu[core], 0.75) > -60
        assert np.quantile(solid.voxels_hu[core], 0.9) < 120


@pytest.mark.parametrize("diagnosis", [Diagnosis.CP, Diagnosis.NCP])
def test_a_higher_severity_contains_the_lower_one(diagnosis):
    for seed in range(2):
        lesions = [make(diagnosis, seed, severity).lesion for severity in (0.0, 0.1, 0.5, 1.0)]
        assert lesions[0].any()
        for less, more in pairwise(lesions):
            assert less.sum() < more.sum()
            assert (less & more).sum() > 0.97 * less.sum()


def test_mild_ncp_is_visible_against_the_same_healthy_lung(phantoms):
    for normal in phantoms[Diagnosis.NORMAL][:3]:
        mild = make(Diagnosis.NCP, normal.seed, severity=0.1)
        gain = mild.voxels_hu[mild.lesion].astype(float) - normal.voxels_hu[mild.lesion]
        assert np.median(gain) > 150
        assert mild.lesion.sum() * np.prod(mild.spacing_mm) > 5000
