"""Online augmentation: a standard volume enters, the same volume under one random in-plane affine map leaves.

All slices of a scan get the same map, and each voxel is resampled once.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from darnet.config import AugmentConfig
from darnet.scan import Uint8Array

PAPER_WIDTH = 224  # `translation_voxels` is stated at this width. Source: paper sec. 4.2
PLANES = 4  # channels that OpenCV resamples together; two take longer than one by one. Source: ours, measured


def augment_volume(voxels: Uint8Array, config: AugmentConfig, rng: np.random.Generator) -> Uint8Array:
    """Flip, rotate, shift and zoom all slices alike; what comes in from outside is air.

    Shape:  (D, H, W) uint8 -> same.
    Source: paper sec. 4.2; one map for all slices and in plane only, authors' code.
    """
    _, height, width = voxels.shape
    return warp_slices(voxels, draw_affine(config, (height, width), rng))


def draw_affine(config: AugmentConfig, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the map from input to output (x, y): mirror, zoom and rotate about the centre of the slice, then shift.

    Shape: slice (H, W) -> (2, 3), the last column the shift.
    Units: voxels; x is the column and y the row, as cv2 has them.
    """
    height, width = shape
    mirror = -1.0 if rng.random() < config.flip_probability else 1.0
    angle = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
    zoom = rng.uniform(*config.zoom)
    reach = config.translation_voxels * width / PAPER_WIDTH
    shift = rng.uniform(-reach, reach, size=2)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    linear = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    return np.column_stack([linear, centre + shift - linear @ centre])


def warp_slices(voxels: Uint8Array, affine: NDArray[np.float64]) -> Uint8Array:
    """Resample every slice once, linearly, under the map from input to output (x, y); outside is 0 (air).

    OpenCV takes weights in steps of 1/32 of a pixel: beside an exact resampling a voxel is off by at most 1/32 of the
    range of the four around it, and rounding. `PLANES` slices at once, as the channels of a picture, have the bits they
    have alone, in less time.

    Shape: (D, H, W) uint8, (2, 3) -> (D, H, W) uint8.
    """
    depth, height, width = voxels.shape
    warped = np.empty_like(voxels)
    for start in range(0, depth, PLANES):
        planes = [voxels[min(place, depth - 1)] for place in range(start, start + PLANES)]  # the last fills up
        picture = cv2.warpAffine(cv2.merge(planes), affine, (width, height), flags=cv2.INTER_LINEAR, borderValue=0)
        for place, plane in zip(range(start, depth), cv2.split(picture), strict=False):
            warped[place] = plane
    return warped
