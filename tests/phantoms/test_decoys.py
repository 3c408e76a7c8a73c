"""Scans of other regions hold air a lung finder may fall for, and no lung."""

import numpy as np
import pytest
from scipy import ndimage

from darnet.phantoms.decoys import make_abdomen, make_head


@pytest.mark.parametrize("make_other", [make_head, make_abdomen])
def test_a_scan_of_another_region_has_air_inside_but_no_lung(make_other):
    phantom = make_other(2)
    assert phantom.diagnosis is None
    assert not phantom.lung.any()
    assert not phantom.lesion.any()
    tissue = phantom.voxels_hu > -400
    inside = np.stack([ndimage.binary_fill_holes(plane) for plane in ndimage.binary_opening(tissue)])
    assert (inside & (phantom.voxels_hu < -700)).sum() * np.prod(phantom.spacing_mm) > 5000
    assert (phantom.voxels_hu > 350).any()
    again = make_other(2)
    assert phantom.voxels_hu.tobytes() == again.voxels_hu.tobytes()
    assert phantom.voxels_hu.tobytes() != make_other(3).voxels_hu.tobytes()
