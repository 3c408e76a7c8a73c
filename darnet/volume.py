"""A scan's slices in, one a thread at a time; the standard volume out, beside which no more than these are held.

A volume file is the exception: ITK reads it whole, and turns it to canonical axes.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from darnet.config import VolumeConfig
from darnet.errors import ScanError, Status
from darnet.scan import BoolArray, CropBox, FloatArray, Intensity, Pixels, SliceStack, StandardVolume

# Source: authors' code crops 48 of 512 pixels off each side.
CROP_FRACTION = 48 / 512
# Source: ours. Air fills at least the lungs of any chest; a scan without a voxel this dark is not in HU.
AIR_HU = -200.0
# Source: ours. Bone and 12-bit metal end at 3071, and a 16-bit number with its intercept below -33000; a hundredth of a
# slice may be metal of an extended range. Where more lies outside, the voxels are damaged or no HU.
PLAUSIBLE_HU = (-34_000.0, 4_000.0)
MAX_IMPLAUSIBLE_SHARE = 0.02
# Source: ours. Skin against air, and the couch's foam falls below it.
BODY_HU = -400.0
NUM_BODY_SAMPLES = 9


@dataclass(frozen=True, slots=True)
class Contribution:
    """Source slice `source` adds `weight` of itself to output slice `target`."""

    source: int
    target: int
    weight: float


class SmallSlice(NamedTuple):
    """A source slice on the grid of an output slice, and what was seen of it whole.

    Shape: `pixels` (H, W) float32 in [0, 1].
    Units: `darkest` and `brightest` in HU or display values.
    """

    pixels: FloatArray
    darkest: float
    brightest: float
    implausible_share: float


def make_standard_volume(stack: SliceStack, config: VolumeConfig, num_threads: int = 1) -> StandardVolume:
    """Window, crop and resample a scan to the network's grid, reading only the slices that contribute.

    The number of threads changes no bit: slices are added up in their order.

    Shape:  (slices, rows, columns) of the stack -> (D, H, W) uint8 of `config.shape`.
    Units:  HU through the window, or display values as they are.
    Raises: ScanError from the slices' decoding; BAD_INTENSITY for values that cannot be HU.
    """
    depth, height, width = config.shape
    kept: dict[int, Pixels] = {}
    box = find_crop(stack, config, kept)
    grid = np.zeros((depth, height, width), np.float32)
    by_source = defaultdict(list)
    for item in list_contributions(stack.shape[0], depth, config.depth_resampling):
        by_source[item.source].append(item)
    sources = sorted(by_source)
    darkest, brightest, implausible_share = np.inf, -np.inf, 0.0
    shrink = functools.partial(_shrink_slice, stack, box, config, kept)
    for source, small in zip(sources, _run_in_order(shrink, sources, num_threads), strict=True):
        darkest, brightest = min(darkest, small.darkest), max(brightest, small.brightest)
        implausible_share += small.implausible_share / len(sources)
        for item in by_source[source]:
            grid[item.target] += np.float32(item.weight) * small.pixels
    _check_intensity(stack.intensity, darkest, brightest, implausible_share)
    grid *= 255
    voxels = np.clip(np.rint(grid, out=grid), 0, 255, out=grid).astype(np.uint8)
    return StandardVolume(voxels, stack.intensity, _grid_spacing(stack, box, config.shape), box)


def list_contributions(num_slices: int, depth: int, resampling: str) -> list[Contribution]:
    """Which slices make up each output slice, and with what weight; the weights of one output slice sum to 1.

    `linear`: between the two slices nearest to (i + 0.5) * N / D - 0.5, clamped. `area`: the share of each slice in
    [i, i + 1) * N / D where the depth shrinks, linear where it grows.
    Source: paper sec. 4.2 ("under-sampling or up-sampling"); `area` ours.
    """
    if resampling == "area" and num_slices > depth:
        return _list_area(num_slices, depth)
    contributions = []
    for target in range(depth):
        place = min(max((target + 0.5) * num_slices / depth - 0.5, 0.0), num_slices - 1.0)
        lower = int(place)
        for source, weight in ((lower, 1 - (place - lower)), (lower + 1, place - lower)):
            if weight > 0:
                contributions.append(Contribution(source, target, weight))
    return contributions


def find_crop(stack: SliceStack, config: VolumeConfig, kept: dict[int, Pixels] | None = None) -> CropBox:
    """The part of each slice that the network sees; slices that had to be read for it are put in `kept`.

    Raises: ScanError(BAD_INTENSITY) if `body` is asked for and no body is found.
    """
    num_slices, rows, columns = stack.shape
    if config.crop == "paper":
        top, left = round(rows * CROP_FRACTION), round(columns * CROP_FRACTION)
        return CropBox(num_slices, top, left, rows - 2 * top, columns - 2 * left)
    body = np.zeros((rows, columns), np.bool_)
    contributing = sorted({item.source for item in list_contributions(num_slices, config.shape[0], "linear")})
    chosen = np.linspace(0, len(contributing) - 1, min(NUM_BODY_SAMPLES, len(contributing))).round().astype(int)
    for index in chosen:
        pixels = stack.read_slice(contributing[index])
        body |= _find_body(pixels, stack.intensity)
        if kept is not None:
            kept[contributing[index]] = pixels
    if not body.any():
        raise ScanError(Status.BAD_INTENSITY, "no body in the scan")
    inside_rows, inside_columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    top, left = int(inside_rows[0]), int(inside_columns[0])
    return CropBox(num_slices, top, left, int(inside_rows[-1]) + 1 - top, int(inside_columns[-1]) + 1 - left)


def resample_mask(mask: BoolArray, box: CropBox, shape: tuple[int, int, int]) -> BoolArray:
    """A mask on the canonically ordered series, taken to the grid of its standard volume by nearest neighbour.

    Shape: (slices, rows, columns) -> (D, H, W).
    """
    corner, extent = (0, box.top, box.left), (box.num_slices, box.height, box.width)
    places = [
        start + ((np.arange(size) + 0.5) * length / size).astype(int)
        for start, length, size in zip(corner, extent, shape, strict=True)
    ]
    picked: BoolArray = mask[np.ix_(*places)]
    return picked


def _list_area(num_slices: int, depth: int) -> list[Contribution]:
    contributions = []
    step = num_slices / depth
    for target in range(depth):
        start, end = target * step, (target + 1) * step
        for source in range(int(start), min(int(np.ceil(end)), num_slices)):
            share = min(end, source + 1) - max(start, source)
            if share > 1e-9:
                contributions.append(Contribution(source, target, share / step))
    return contributions


def _run_in_order(
    shrink: Callable[[int], SmallSlice], sources: Sequence[int], num_threads: int
) -> Iterator[SmallSlice]:
    """The slices in order, read by as many threads; the first that cannot be read ends it."""
    if num_threads == 1:
        yield from map(shrink, sources)
        return
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(shrink, sources)
    finally:
        pool.shutdown(cancel_futures=True)


def _shrink_slice(
    stack: SliceStack, box: CropBox, config: VolumeConfig, kept: dict[int, Pixels], source: int
) -> SmallSlice:
    """One slice, windowed and cropped; read, unless it was and is among `kept`, where it is forgotten.

    Shape:  (rows, columns) of the stack -> (H, W) of `config.shape`.
    Units:  HU or display values in, [0, 1] out.
    Raises: ScanError from its decoding.
    """
    pixels = kept.pop(source) if source in kept else stack.read_slice(source)
    small = _resize(_to_unit(_crop(pixels, box), stack.intensity, config), config.shape[1:])
    darkest, brightest = float(pixels.min()), float(pixels.max())
    is_plausible = PLAUSIBLE_HU[0] <= darkest and brightest <= PLAUSIBLE_HU[1]  # never of what holds NaN
    return SmallSlice(small, darkest, brightest, 0.0 if is_plausible else _measure_implausible(pixels))


def _crop(pixels: Pixels, box: CropBox) -> Pixels:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _to_unit(pixels: Pixels, intensity: Intensity, config: VolumeConfig) -> FloatArray:
    """To [0, 1]: display values as they are, HU through the window."""
    if intensity is Intensity.DISPLAY:
        return pixels / np.float32(255)
    return apply_window(pixels, config.window_hu)


def apply_window(voxels_hu: Pixels, window_hu: tuple[float, float]) -> FloatArray:
    """Map Hounsfield units to [0, 1]; values outside the window clip.

    Shape:  any, float32 -> same.
    Source: ours; the paper does not state its window (README, deviations).
    """
    low, high = window_hu
    unit = voxels_hu - np.float32(low)
    unit /= np.float32(high - low)  # in place: memory for a new array costs more than the division
    return np.clip(unit, 0, 1, out=unit)


def _resize(pixels: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """In plane: area where the image shrinks, linear where it grows. Source: ours, against aliasing."""
    height, width = shape
    is_shrinking = pixels.shape[0] >= height and pixels.shape[1] >= width
    interpolation = cv2.INTER_AREA if is_shrinking else cv2.INTER_LINEAR
    return np.asarray(
        cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=interpolation), np.float32
    )


def _find_body(pixels: Pixels, intensity: Intensity) -> BoolArray:
    """The largest connected part of one slice that is not air, couch and clothes cut off by an opening.

    Shape:  (rows, columns) -> same; nowhere true where there is no such part.
    Units:  HU, or display values, of which those above their mean are no air.
    """
    threshold = BODY_HU if intensity is Intensity.HU else float(pixels.astype(np.float32).mean())
    tissue: BoolArray = ndimage.binary_opening(pixels > threshold, iterations=max(1, pixels.shape[1] // 128))
    labels, num_parts = ndimage.label(tissue)
    if num_parts == 0:
        return tissue
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest: BoolArray = labels == sizes.argmax()
    return largest


def _measure_implausible(pixels_hu: Pixels) -> float:
    """The share of a slice that no scanner gives."""
    low, high = PLAUSIBLE_HU
    return float((~((pixels_hu >= low) & (pixels_hu <= high))).mean())  # what is no number lies outside


def _check_intensity(intensity: Intensity, darkest: float, brightest: float, implausible_share: float) -> None:
    if darkest == brightest:
        raise ScanError(Status.BAD_INTENSITY, "every voxel has the same value")
    if intensity is Intensity.HU and darkest > AIR_HU:
        raise ScanError(Status.BAD_INTENSITY, f"darkest value is {darkest:.0f}: no air, so this is not HU")
    if intensity is Intensity.HU and implausible_share > MAX_IMPLAUSIBLE_SHARE:
        raise ScanError(Status.BAD_INTENSITY, f"{implausible_share:.0%} of the voxels cannot be HU")


def _grid_spacing(stack: SliceStack, box: CropBox, shape: tuple[int, int, int]) -> tuple[float, float, float] | None:
    if stack.spacing_mm is None:
        return None
    extents = (box.num_slices, box.height, box.width)
    z_mm, y_mm, x_mm = (
        spacing * extent / size for spacing, extent, size in zip(stack.spacing_mm, extents, shape, strict=True)
    )
    return z_mm, y_mm, x_mm
