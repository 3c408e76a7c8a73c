"""Where a class activation map lies: a map on the network's input enters, its numbers for one scan leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from darnet.scan import BoolArray, CropBox, Diagnosis, FloatArray, Intensity

TIE = 1e-6  # values this close to the maximum are the maximum. Source: ours, float32 rounding of the stretching


@dataclass(frozen=True, slots=True)
class CamStatistics:
    """The `cam_*` and gate columns of a results row; all None where the map is nowhere positive.

    Units:  fractions in [0, 1]; the peak in 0-based voxels of the canonically ordered original series.
    Source: ours.
    """

    cam_class: Diagnosis | None = None
    cam_in_lung_fraction: float | None = None
    cam_left_fraction: float | None = None
    cam_extent_fraction: float | None = None
    cam_peak_slice: int | None = None
    cam_peak_y: int | None = None
    cam_peak_x: int | None = None
    cam_depth_profile: tuple[float, ...] | None = None
    depth_gate_profile: tuple[float, ...] | None = None


def measure_cam(
    cam: FloatArray,
    cam_class: Diagnosis,
    *,
    crop: CropBox,
    intensity: Intensity,
    lung: BoolArray | None,
    depth_gate_profile: Sequence[float] | None,
) -> CamStatistics:
    """Where one scan's map lies, how far it spreads, and where it peaks.

    Shape:  cam (D, H, W), nowhere negative, on the grid of the standard volume; lung the same or None;
            depth_gate_profile (d,), the last block's gates averaged over channels and folds, or None without DA.
    Raises: ValueError if lung and cam differ in shape.
    Source: ours.
    """
    if lung is not None and lung.shape != cam.shape:
        raise ValueError(f"lung mask {lung.shape} and CAM {cam.shape} are on different grids")
    maximum = cam.max()
    if not maximum > 0:
        return CamStatistics()
    depth_sums = cam.sum(axis=(1, 2), dtype=np.float64)  # (D,)
    total = float(depth_sums.sum())
    peak_slice, peak_y, peak_x = _locate_peak(cam, crop)
    return CamStatistics(
        cam_class=cam_class,
        cam_in_lung_fraction=None if lung is None else float(cam[lung].sum(dtype=np.float64)) / total,
        cam_left_fraction=None if intensity is Intensity.DISPLAY else _sum_left(cam) / total,
        cam_extent_fraction=float(np.mean(cam >= maximum / 2)),
        cam_peak_slice=peak_slice,
        cam_peak_y=peak_y,
        cam_peak_x=peak_x,
        cam_depth_profile=tuple((depth_sums / total).tolist()),
        depth_gate_profile=None if depth_gate_profile is None else tuple(map(float, depth_gate_profile)),
    )


def _sum_left(cam: FloatArray) -> float:
    """Sum over the patient's left: canonical x runs from the patient's right to left, so x >= W / 2."""
    return float(cam[..., (cam.shape[2] + 1) // 2 :].sum(dtype=np.float64))


def find_peak(cam: FloatArray) -> tuple[int, int, int]:
    """The voxel (z, y, x) of the maximum; of several that are equal, the one nearest to the middle of the volume.

    Shape:  (D, H, W).
    Source: ours. A maximum at the border of the class map is stretched outwards unchanged, up to a corner of the scan
            that may lie outside the body; its voxel nearest to the middle is the centre of the map's own cell.
    """
    top = np.argwhere(cam >= cam.max() * (1 - TIE))
    from_middle = top - (np.array(cam.shape) - 1) / 2
    z, y, x = (int(index) for index in top[(from_middle**2).sum(axis=1).argmin()])
    return z, y, x


def _locate_peak(cam: FloatArray, crop: CropBox) -> tuple[int, int, int]:
    """Slice, y and x of the original voxel under the maximum."""
    z, y, x = find_peak(cam)
    depth, height, width = cam.shape
    return (
        _map_index(z, depth, crop.num_slices),
        crop.top + _map_index(y, height, crop.height),
        crop.left + _map_index(x, width, crop.width),
    )


def _map_index(index: int, num_cells: int, num_original: int) -> int:
    """Nearest original index to (index + 0.5) * num_original / num_cells - 0.5, halves upwards, in exact integers."""
    return (2 * index + 1) * num_original // (2 * num_cells)
