"""Where the lungs are, by classical means, and whether a scan shows lungs at all.

A standard volume enters; a lung mask on its grid and a verdict leave. Hounsfield units and spacing are used where there
are any; of display images, contrast and proportions alone.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from darnet.config import AIR_AND_LUNG_HU
from darnet.scan import BoolArray, FloatArray, Intensity, StandardVolume, Uint8Array

LabelArray: TypeAlias = NDArray[np.integer[Any]]

# Gas, no tissue in it (outside air, trachea, bowel), lies below the radiologist's emphysema threshold. Air lies below
# the middle between aerated lung (-850) and soft tissue (50), so that partial volume falls evenly. Lung that is ground
# glass throughout lies above that, but well below fat (-100), whose noise stays out.
GAS_BELOW_HU, AIR_BELOW_HU, DENSE_BELOW_HU = AIR_AND_LUNG_HU
GAS_SHARE = 0.25  # of a patch of air; lung patches of real scans had up to 0.06, trachea and bowel 0.3 and more
GAS_SHARE_LARGE = 0.6  # severe emphysema reaches half; outside air had 0.6 to 0.9
LARGE_CM2 = 60.0  # no trachea or bowel loop is this wide, so a larger patch inside the body is lung unless all gas
PIECE_SHARE = 0.1  # of the largest piece: the smaller lung of a diseased chest, not a gas bubble of the stomach
INSIDE_SHARE = 0.25  # of a patch, between parts of the body: a lung cut open by the crop keeps half, couch foam none
CLOSING_MM = 10.0  # in plane, half the width of a notch that is closed: vessels, lesions, not the mediastinum
CLOSING_Z_MM = 25.0  # along z the same: lesions at the pleura have lung above and below, heart and liver have not
HOLE_CM2 = 12.0  # a disc of 4 cm: vessels, nodules, small consolidations; a liver dome is larger

MIN_LITRES = 0.15  # an infant of a year has 0.3; all air in a head together 0.1, bowel gas in one piece seldom more
CHEST_LITRES = 1.2  # nothing but a chest holds this much, however few slices it has; lung bases hold up to 1
DENSE_GAIN = 2.0  # from aerated to dense: healthy lung grows by a tenth, bowel by two thirds, ground glass many times
SLICE_SHARE = 1 / 3  # of the largest lung area in a slice: what counts as a slice of lung
MIN_TALLNESS = 0.65  # height over width of the lungs: real chests 1.0 to 1.2, cut at the base 0.8; bowel gas up to 0.54
MAX_DENSE_TALLNESS = 1.8  # ground glass throughout had up to 1.5; colons full of stool, tall and narrow, from 2.2
MAX_MIDDLE_SHARE = 0.5  # of the fullest column, in the emptiest between: dense lungs had up to 0.17, one mass has 1
MIN_FILLED = 0.9  # a slab from the middle of a chest shows lung from its first slice to its last

DISPLAY_GAS = 0.06  # above outside air, of its contrast with tissue: what -937 HU is between air and muscle
DISPLAY_GAS_SHARE = 0.5  # of a patch of a display image; emphysema too is mostly lighter than outside air
DISPLAY_LUNG_SHARE = 0.035  # of all voxels; chests in a wide field of view had 0.07, bowel and sinuses up to 0.025
NOMINAL_LUNGS_MM = (240.0, 180.0, 260.0)  # z, y, x extent of an adult's lungs: what stands in for a missing spacing
MASKED_ZERO_SHARE = 0.5  # of all voxels, at least, are 0 where all but lungs was blackened; chests had 0.84 to 0.92
MASKED_RIM_SHARE = 0.4  # of the rim of what is not 0, at most, is tissue: masked lungs had up to 0.17, bodies from 0.6
RIM_MM = 5.0  # kept around the lungs by mask_outside_lung: the mask's own inaccuracy, seldom more than the pleura

IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], bool)
IN_3D = ndimage.generate_binary_structure(3, 1)


def segment_lung(volume: StandardVolume, window_hu: tuple[float, float]) -> BoolArray:
    """Mark the voxels of both lungs, with their vessels and small lesions, without trachea.

    Where there is little aerated lung, a higher threshold may find much that is ground glass throughout. Stool is as
    dense as such lung, so it counts only where its proportions are those of two lungs.

    Shape:  (D, H, W) bool on the volume's grid; all False where there is no lung.
    Raises: ValueError for a display image or a window that cannot tell gas from lung from tissue.
    Source: ours. Limits: a consolidation at the pleura that is both wider and taller than the closing reaches stays
            outside, and so does lung in a slice where the crop leaves neither front and back nor both side walls.
            Of a chest with less than `CHEST_LITRES` between gas and `DENSE_BELOW_HU`, only aerated lung is found: both
            lungs consolidated throughout, or all of a small child's lung ground glass, look like an abdomen. So does
            the middle of a chest with both lungs ground glass throughout, or with one so and the other lost; while two
            masses of stool as large, as wide and as far apart as lungs would be taken for them.
    """
    lung = _segment_below(AIR_BELOW_HU, volume, window_hu)
    litres = _measure_litres(lung, volume)
    if litres >= CHEST_LITRES:
        return lung
    dense = _segment_below(DENSE_BELOW_HU, volume, window_hu)
    is_large = _measure_litres(dense, volume) >= max(CHEST_LITRES, DENSE_GAIN * litres)
    return dense if is_large and _is_pair_of_lungs(dense, volume) else lung


def segment_display_lung(voxels: Uint8Array) -> BoolArray:
    """Mark the lungs in an 8-bit scan of unknown window, or in one whose surroundings were blackened.

    Shape:  (D, H, W) bool on the volume's grid; all False where there is no lung.
    Source: ours. Limits: as `segment_lung`; and where the window shows lung as black as the air outside, none is found.
    """
    lung = voxels > 0 if is_masked(voxels) else _find_display_lung(voxels)
    pieces = _keep_large_pieces(lung)
    if (pieces > 0).mean() < DISPLAY_LUNG_SHARE:
        return np.zeros(voxels.shape, np.bool_)
    return _restore(pieces, _guess_spacing(pieces > 0))


def is_masked(voxels: Uint8Array) -> bool:
    """Whether a display scan comes with everything but the lungs blackened.

    Shape:  (D, H, W).
    Source: ours: such lungs are rimmed by lung, a body on black ground is rimmed by skin.
    """
    shown = voxels > 0
    if not shown.any() or shown.mean() > 1 - MASKED_ZERO_SHARE:
        return False
    filled = np.array([ndimage.binary_fill_holes(plane) for plane in shown])
    steps = max(1, voxels.shape[2] // 112)
    rim = ndimage.binary_erosion(filled, IN_PLANE, iterations=steps)
    rim &= ~ndimage.binary_erosion(rim, IN_PLANE, iterations=steps)
    is_tissue = voxels[rim] >= _split_display(voxels)
    return bool(is_tissue.size and is_tissue.mean() <= MASKED_RIM_SHARE)


def mask_outside_lung(
    volume: StandardVolume, window_hu: tuple[float, float], kept: Literal["outlines", "lungs"]
) -> Uint8Array:
    """Set to 0 whatever lies outside the lungs, or outside their hulls and a rim, where lesions at the pleura stay.

    Shape:  (D, H, W) uint8; all 0 where there is no lung.
    Source: ours, against scans that come masked. Limits: such a scan has nothing in hull and rim but lung, others show
            wall and heart there; and a lobe without any air in it stays outside either.
    """
    if volume.intensity is Intensity.HU:
        lung, spacing_mm = segment_lung(volume, window_hu), _spacing_mm(volume)
    else:
        lung = segment_display_lung(volume.voxels)
        spacing_mm = _guess_spacing(lung)
    if kept == "outlines":
        size = [2 * round(RIM_MM / step) + 1 for step in spacing_mm]
        lung = ndimage.maximum_filter(_fill_hulls(lung).view(np.uint8), size, mode="constant") > 0
    return np.where(lung, volume.voxels, np.uint8(0))


def _fill_hulls(lung: BoolArray) -> BoolArray:
    """Fill the convex outline of each lung in every axial, coronal and sagittal plane."""
    filled = np.zeros_like(lung)
    middle = _find_middle(lung)
    for side in (np.s_[:, :, :middle], np.s_[:, :, middle:]):
        one = lung[side]
        for axis in range(3):
            planes = np.moveaxis(one, axis, 0)
            filled[side] |= np.moveaxis(np.array([_fill_outline(plane) for plane in planes]), 0, axis)
    return filled


def _find_middle(lung: BoolArray) -> int:
    """The column between the lungs: the emptiest of the middle third."""
    num_voxels = lung.sum(axis=(0, 1))
    columns: list[int] = np.flatnonzero(num_voxels).tolist()
    if len(columns) < 3:
        return len(num_voxels) // 2
    third = (columns[-1] - columns[0]) // 3
    start = columns[0] + third
    return start + int(num_voxels[start : columns[-1] - third + 1].argmin())


def _fill_outline(plane: BoolArray) -> BoolArray:
    """Shape: (rows, columns) -> its convex hull."""
    filled = np.zeros(plane.shape, np.uint8)
    points = cv2.findNonZero(np.ascontiguousarray(plane).view(np.uint8))
    if points is not None:
        cv2.fillConvexPoly(filled, cv2.convexHull(points), 1)
    return filled.view(np.bool_)


def has_lung(mask: BoolArray, volume: StandardVolume) -> bool:
    """Say whether a lung mask shows a chest, not a head or an abdomen with or without lung bases.

    Judged by proportions, which a child, a wide field of view and a lost lobe leave as they are, and by volume.
    Raises: ValueError for a display image.
    Source: ours; the constants are measured on three chest series, what is left of them from the bases down, and
            phantoms. Limits: ground glass that lifts both lungs as a whole by up to 550 HU, to about -250, leaves all
            three a chest; 650 HU, to about -160, leaves none.
    """
    litres = _measure_litres(mask, volume)
    if litres < MIN_LITRES or litres >= CHEST_LITRES:
        return litres >= CHEST_LITRES
    tallness, filled = _measure_proportions(mask, volume)
    return tallness >= MIN_TALLNESS or filled >= MIN_FILLED


def _measure_proportions(mask: BoolArray, volume: StandardVolume) -> tuple[float, float]:
    """Say how tall a mask that is not empty is to its width, and what share of the slices shows much of it."""
    spacing_z, spacing_y, spacing_x = _spacing_mm(volume)
    area_mm2 = mask.sum(axis=(1, 2)) * spacing_y * spacing_x
    is_lung_slice = area_mm2 >= SLICE_SHARE * area_mm2.max()
    return float(is_lung_slice.sum() * spacing_z / np.sqrt(area_mm2.max())), float(is_lung_slice.mean())


def _is_pair_of_lungs(mask: BoolArray, volume: StandardVolume) -> bool:
    """Say whether a mask that is not empty is neither flat nor slender, and parted in a left and a right half."""
    tallness, _ = _measure_proportions(mask, volume)
    num_voxels = mask.sum(axis=(0, 1))
    middle = _find_middle(mask)
    fullest = min(num_voxels[:middle].max(initial=0), num_voxels[middle:].max(initial=0))
    is_parted = num_voxels[middle] <= MAX_MIDDLE_SHARE * fullest
    return bool(MIN_TALLNESS <= tallness <= MAX_DENSE_TALLNESS and is_parted)


def _segment_below(air_below_hu: float, volume: StandardVolume, window_hu: tuple[float, float]) -> BoolArray:
    """Mark the lungs, taking for lung what is darker than a threshold and not mostly gas."""
    spacing_mm = _spacing_mm(volume)
    # Compared with a whole number, voxels stay bytes.
    air = volume.voxels < math.ceil(_to_display(air_below_hu, window_hu))
    gas = volume.voxels < math.ceil(_to_display(GAS_BELOW_HU, window_hu))
    lung = _drop_gas_and_couch(air, gas, spacing_mm[1] * spacing_mm[2] / 100)
    return _restore(_keep_large_pieces(lung), spacing_mm)


def _measure_litres(mask: BoolArray, volume: StandardVolume) -> float:
    """Say how much room a mask takes."""
    spacing_z, spacing_y, spacing_x = _spacing_mm(volume)
    return float(np.count_nonzero(mask) * spacing_z * spacing_y * spacing_x / 1e6)


def _spacing_mm(volume: StandardVolume) -> tuple[float, float, float]:
    """Return the spacing a volume in Hounsfield units has."""
    if volume.spacing_mm is None:
        raise ValueError("lungs are judged on Hounsfield units with a spacing; a display image has neither")
    return volume.spacing_mm


def _guess_spacing(lung: BoolArray) -> tuple[float, float, float]:
    """A spacing by which the lungs would be as large as an adult's; any, where there are none."""
    z_mm, y_mm, x_mm = (
        length / max(1, int(lung.any(axis=axes).sum()))
        for length, axes in zip(NOMINAL_LUNGS_MM, ((1, 2), (0, 2), (0, 1)), strict=True)
    )
    return z_mm, y_mm, x_mm


def _split_display(voxels: Uint8Array) -> int:
    """The display value that best parts dark from bright voxels, those that are 0 apart. Source: Otsu 1979."""
    counts = np.bincount(voxels.ravel(), minlength=256).astype(np.float64)
    counts[0] = 0
    dark, total = np.cumsum(counts), counts.sum()
    weighted = np.cumsum(counts * np.arange(256))
    between = (weighted[-1] * dark - weighted * total) ** 2 / np.maximum(dark * (total - dark), 1)
    return int(np.flatnonzero(between >= between.max() * (1 - 1e-9)).mean()) + 1


def _find_display_lung(voxels: Uint8Array) -> BoolArray:
    """Keep, slice by slice, the connected dark patches that lie in the body and are not as dark as the air outside."""
    threshold = _split_display(voxels)
    dark = voxels < threshold
    inside = _span_body(~dark)
    outside = voxels[dark & ~inside]
    air = float(np.median(outside)) if outside.size else 0.0
    tissue = float(np.median(voxels[~dark])) if not dark.all() else 255.0
    gas = dark & (voxels <= air + DISPLAY_GAS * (tissue - air))
    return _keep_patches(dark, gas, inside, lambda _: DISPLAY_GAS_SHARE)


def _to_display(value_hu: float, window_hu: tuple[float, float]) -> float:
    """Say which 8-bit display value a HU value has."""
    low, high = window_hu
    if not low < value_hu < high:
        raise ValueError(f"window {window_hu} HU does not hold {value_hu:g} HU, which a lung mask needs")
    return 255 * (value_hu - low) / (high - low)


def _drop_gas_and_couch(air: BoolArray, gas: BoolArray, pixel_cm2: float) -> BoolArray:
    """Keep, slice by slice, the connected patches of air that hold lung tissue and lie in the body.

    A patch is judged by what it is made of, not by touching the image border: a tight crop cuts lungs open too.
    """

    def limit_gas(num_pixels: LabelArray) -> FloatArray:
        return np.where(num_pixels * pixel_cm2 > LARGE_CM2, GAS_SHARE_LARGE, GAS_SHARE)

    return _keep_patches(air, gas, _span_body(~air), limit_gas)


def _keep_patches(
    dark: BoolArray, gas: BoolArray, inside: BoolArray, limit_gas: Callable[[LabelArray], FloatArray | float]
) -> BoolArray:
    """Keep, slice by slice, the connected dark patches of which less than a share by their size is gas, and enough
    inside the body.
    """
    kinds = gas.view(np.uint8) | inside.view(np.uint8) << 1
    kept = np.zeros(dark.shape, np.bool_)
    for plane, kind, room in zip(dark, kinds, kept, strict=True):
        num_patches, patches = cv2.connectedComponents(plane.view(np.uint8), connectivity=4)
        counts = np.bincount((patches << 2 | kind).ravel(), minlength=4 * num_patches).reshape(-1, 4)
        num_pixels, num_gas, num_inside = counts.sum(axis=1), counts[:, [1, 3]].sum(axis=1), counts[:, 2:].sum(axis=1)
        is_lung = (num_gas < limit_gas(num_pixels) * num_pixels) & (num_inside >= INSIDE_SHARE * num_pixels)
        is_lung[0] = False  # of what is not dark
        np.take(is_lung, patches, out=room)
    return kept


def _span_body(tissue: BoolArray) -> BoolArray:
    """Mark what lies between parts of each slice's largest piece of tissue, along y or along x.

    Unlike hole filling it reaches lungs that the crop cut open, and unlike a box it leaves the couch out.
    """
    body = np.zeros(tissue.shape, np.bool_)
    for plane, room in zip(tissue, body, strict=True):
        num_patches, patches = cv2.connectedComponents(plane.view(np.uint8), connectivity=4)
        if num_patches > 1:
            num_pixels = np.bincount(patches.ravel())
            num_pixels[0] = 0  # of what is no tissue
            largest = np.flatnonzero(num_pixels == num_pixels.max())
            first = largest[0] if len(largest) == 1 else patches.flat[np.isin(patches, largest).argmax()]
            np.equal(patches, first, out=room)
    return _span_rows(body) | _span_columns(body)


def _span_rows(body: BoolArray) -> BoolArray:
    """Mark what has body on both sides of it along x."""
    places = np.arange(body.shape[2])
    first = np.where(body.any(axis=2), body.argmax(axis=2), len(places))
    last = len(places) - 1 - body[:, :, ::-1].argmax(axis=2)
    return np.asarray((places >= first[..., None]) & (places <= last[..., None]))


def _span_columns(body: BoolArray) -> BoolArray:
    """Mark what has body on both sides of it along y; row by row, which is quicker than numpy's `accumulate`."""
    before, after = body.copy(), body.copy()
    num_rows = body.shape[1]
    for row in range(1, num_rows):
        before[:, row] |= before[:, row - 1]
        after[:, num_rows - 1 - row] |= after[:, num_rows - row]
    return before & after


def _keep_large_pieces(lung: BoolArray) -> LabelArray:
    """Number the connected pieces that are at least `PIECE_SHARE` of the largest; 0 elsewhere."""
    box = _find_box(lung)
    pieces, num_pieces = ndimage.label(lung[box])
    num_voxels = np.bincount(pieces.ravel(), minlength=num_pieces + 1)
    num_voxels[0] = 0
    is_kept = (num_voxels > 0) & (num_voxels >= PIECE_SHARE * num_voxels.max())
    numbered = np.zeros(lung.shape, np.int32)
    numbered[box] = np.where(is_kept, np.cumsum(is_kept), 0).astype(np.int32)[pieces]
    return numbered


def _find_box(mask: BoolArray) -> tuple[slice, ...]:
    """The smallest box that holds the whole mask, an empty one if nothing is marked."""
    planes = np.any(mask, axis=0)
    shadows = (np.any(mask, axis=(1, 2)), np.any(planes, axis=1), np.any(planes, axis=0))
    places = [np.flatnonzero(shadow) for shadow in shadows]
    return tuple(slice(int(marked[0]), int(marked[-1]) + 1) if marked.size else slice(0) for marked in places)


def _restore(pieces: LabelArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Give each piece of lung back what the threshold took: vessels, lesions, notches of its outline.

    Piece by piece, so that the mediastinum between two lungs stays out.
    """
    lung = np.zeros(pieces.shape, bool)
    for number in range(1, int(pieces.max()) + 1):
        whole = pieces == number
        box = _find_box(whole)
        piece = whole[box]
        closed = _close_in_plane(piece, spacing_mm) | _close_along_z(piece, spacing_mm)
        lung[box] |= _fill_holes(closed, spacing_mm)
    return lung


def _close_in_plane(piece: BoolArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Close notches of each slice up to twice as wide as `CLOSING_MM`, with a box.

    With a rim as wide as the box reaches, no slice of the pile comes near another.
    """
    rim = [round(CLOSING_MM / step) for step in spacing_mm[1:]]
    padded = np.pad(piece, [(0, 0), *((steps, steps) for steps in rim)])
    pile = padded.view(np.uint8).reshape(-1, padded.shape[2])
    closed = _close(pile, rim).reshape(padded.shape)
    return closed[:, rim[0] : rim[0] + piece.shape[1], rim[1] : rim[1] + piece.shape[2]] > 0


def _close_along_z(piece: BoolArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Close gaps between slices up to twice as tall as `CLOSING_Z_MM`."""
    steps = round(CLOSING_Z_MM / spacing_mm[0])
    lines = np.pad(piece.reshape(len(piece), -1), [(steps, steps), (0, 0)]).view(np.uint8)
    return (_close(lines, [steps, 0])[steps : steps + len(piece)] > 0).reshape(piece.shape)


def _close(image: Uint8Array, reach: list[int]) -> Uint8Array:
    """Shape: (rows, columns), with a rim of 0 as wide as `reach`."""
    box = np.ones([2 * steps + 1 for steps in reach], np.uint8)
    return np.asarray(cv2.erode(cv2.dilate(image, box), box), np.uint8)


def _fill_holes(piece: BoolArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Fill what the piece encloses: in a slice up to `HOLE_CM2` (a liver dome is larger), in 3D any size."""
    max_pixels = 100 * HOLE_CM2 / (spacing_mm[1] * spacing_mm[2])
    filled = piece.copy()
    enclosing = [index for index, plane in enumerate(filled) if _fill_small_holes(plane, max_pixels)]
    if enclosing:  # elsewhere nothing is enclosed in 3D either
        slab = filled[max(enclosing[0] - 1, 0) : enclosing[-1] + 2]
        gaps, num_gaps = ndimage.label(np.pad(~slab, 1, constant_values=True), IN_3D)
        is_hole = np.arange(num_gaps + 1) > 0
        is_hole[gaps[0, 0, 0]] = False  # of the surroundings
        slab |= is_hole[gaps[1:-1, 1:-1, 1:-1]]
    return filled


def _fill_small_holes(plane: BoolArray, max_pixels: float) -> bool:
    """Fill what a slice encloses up to a size, in place; whether it encloses more."""
    around = np.pad(~plane, 1, constant_values=True).view(np.uint8)
    num_gaps, gaps = cv2.connectedComponents(around, connectivity=4)
    is_enclosed = np.ones(num_gaps, np.bool_)
    is_enclosed[[0, gaps[0, 0]]] = False  # the slice itself, and its surroundings
    if not is_enclosed.any():
        return False
    is_hole = is_enclosed & (np.bincount(gaps.ravel()) <= max_pixels)
    plane |= is_hole[gaps[1:-1, 1:-1]]
    return bool((is_enclosed & ~is_hole).any())
