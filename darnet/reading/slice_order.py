"""In which order a scan's slices are, told from the images alone: a standard volume enters, a verdict leaves.

Lungs begin as two small discs at their apex and end as wide, deep crescents behind the liver, in every chest; and a
slice looks more like its neighbours than like any other. What cannot be judged is said so, never guessed.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from darnet.lung import is_masked, segment_display_lung
from darnet.scan import BoolArray, FloatArray, Uint8Array

IndexArray: TypeAlias = NDArray[np.integer[Any]]

MIN_SLICES = 12  # of the standard volume; a sixth of fewer is no end of a lung
EMPTY_SHARE = 0.02  # of the brightest slice's sum: black slices at both ends of a masked scan say nothing
GRID = 28  # slices are compared as so many blocks either way: noise averages out, anatomy stays
# Way through the slices as stored over the shortest found. Chests in order had 1.00, with their halves swapped 1.11 and
# more; with all but the lungs blackened, which makes apex and base alike, 1.00 to 1.14 and from 1.16.
SHUFFLED_FROM, MASKED_SHUFFLED_FROM = 1.06, 1.15
END_SHARE = 1 / 6  # of the slices that show lung: what counts as its end
LUNG_SLICE_SHARE = 0.1  # of the largest lung area in a slice: what counts as a slice of lung
MAX_CUT_SHARE = 0.35  # of the largest lung area, in the first or last slice: more, and an end of the lungs is missing
MAX_CHANGE = 3.0  # of the lung area from slice to slice, all together, over the largest: 2 for up and down once
# How much the last slices of lung differ from the first where head comes first. Source: ours, half of what phantoms and
# three real chests show: width +0.27 to +0.34 (0.01 with a shrunken lung), depth +0.20 to +0.47, thinness 0.04 to 0.08.
WIDER, DEEPER, THINNER = 0.15, 0.15, 0.02
MIN_AGREEMENT = 0.5  # of the three signs, each counted from -1 to 1


class SliceOrder(StrEnum):
    """What the images say about the order of their slices."""

    HEAD_FIRST = "head first"
    FEET_FIRST = "feet first"
    SHUFFLED = "shuffled"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class OrderVerdict:
    """A verdict, and why: `disorder` 1 for slices in order; `evidence` 1 for head first, -1 for feet first."""

    order: SliceOrder
    reason: str
    disorder: float | None = None
    evidence: float | None = None


def judge_order(voxels: Uint8Array) -> OrderVerdict:
    """Say whether a standard volume starts at the head, at the feet, or has its slices mixed up.

    Shape:  (D, H, W).
    Source: ours. Limits: a few swapped neighbours go unnoticed; so does any order where the lungs cannot be found.
    """
    if len(voxels) < MIN_SLICES:
        return OrderVerdict(SliceOrder.NOT_JUDGED, f"{len(voxels)} slices are too few")
    disorder = measure_disorder(voxels)
    if disorder >= (MASKED_SHUFFLED_FROM if is_masked(voxels) else SHUFFLED_FROM):
        return OrderVerdict(SliceOrder.SHUFFLED, "neighbouring slices are less alike than others are", disorder)
    lung = segment_display_lung(voxels)
    if not lung.any():
        return OrderVerdict(SliceOrder.NOT_JUDGED, "no lung found", disorder)
    area = lung.sum(axis=(1, 2))
    if max(area[0], area[-1]) > MAX_CUT_SHARE * area.max():
        return OrderVerdict(SliceOrder.NOT_JUDGED, "the scan ends within the lungs", disorder)
    if np.abs(np.diff(area.astype(np.int64))).sum() > MAX_CHANGE * area.max():
        return OrderVerdict(SliceOrder.NOT_JUDGED, "the lungs are found in some slices only", disorder)
    evidence = measure_direction(lung)
    if abs(evidence) < MIN_AGREEMENT:
        return OrderVerdict(SliceOrder.NOT_JUDGED, "the lungs' ends look alike", disorder, evidence)
    order = SliceOrder.HEAD_FIRST if evidence > 0 else SliceOrder.FEET_FIRST
    return OrderVerdict(order, "shape of the lungs' ends", disorder, evidence)


def measure_disorder(voxels: Uint8Array) -> float:
    """Length of the way through the slices as stored, over the shortest found; 1 where none was shorter.

    Shape:  (D, H, W); a step's length is the difference as share of the two slices' sum (Bray and Curtis).
    """
    blocks = _average_blocks(voxels)
    blocks = blocks[blocks.sum(axis=1) > EMPTY_SHARE * blocks.sum(axis=1).max()]
    if len(blocks) < 3:
        return 1.0
    step = np.stack([np.abs(blocks - block).sum(axis=1) / (blocks + block).sum(axis=1) for block in blocks])
    stored = np.arange(len(blocks))
    shortest = min(_measure_way(step, _untangle(step, way)) for way in (stored, _chain_neighbours(step)))
    return _measure_way(step, stored) / shortest if shortest > 0 else 1.0


def measure_direction(lung: BoolArray) -> float:
    """Compare the two ends of the lungs by width, depth and thinness: 1 where all say head first, -1 feet first.

    Shape:  (D, H, W); there must be lung.
    """
    area = lung.sum(axis=(1, 2))
    slices = np.flatnonzero(area >= LUNG_SLICE_SHARE * area.max())
    num_end = max(1, round(len(slices) * END_SHARE))
    first, last = lung[slices[:num_end]], lung[slices[-num_end:]]
    depth, width = (float(lung.any(axis=axes).sum()) for axes in ((0, 2), (0, 1)))
    signs = (
        (_mean_extent(last, 1) - _mean_extent(first, 1)) / width / WIDER,
        (_mean_extent(last, 2) - _mean_extent(first, 2)) / depth / DEEPER,
        (_mean_thickness(first) - _mean_thickness(last)) / THINNER,
    )
    return float(np.clip(signs, -1, 1).mean())


def _average_blocks(voxels: Uint8Array) -> FloatArray:
    """Shape: (D, H, W) -> (D, blocks)."""
    edges = [np.linspace(0, size, min(GRID, size) + 1).astype(int)[:-1] for size in voxels.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(voxels, edges[0], axis=1, dtype=np.float32), edges[1], axis=2)
    counts = np.outer(*(np.diff([*edge, size]) for edge, size in zip(edges, voxels.shape[1:], strict=True)))
    means: FloatArray = (sums / counts).reshape(len(voxels), -1)
    return means


def _measure_way(step: FloatArray, way: IndexArray) -> float:
    return float(step[way[:-1], way[1:]].sum())


def _chain_neighbours(step: FloatArray) -> IndexArray:
    """A way that starts with the two slices most alike and grows at whichever end has the nearer next one."""
    apart = step + np.diag(np.full(len(step), np.inf))
    way = [int(place) for place in np.unravel_index(int(apart.argmin()), apart.shape)]
    apart[:, way] = np.inf
    while len(way) < len(step):
        at_head, at_tail = int(apart[way[0]].argmin()), int(apart[way[-1]].argmin())
        is_head_nearer = apart[way[0], at_head] < apart[way[-1], at_tail]
        way.insert(*(0, at_head) if is_head_nearer else (len(way), at_tail))
        apart[:, at_head if is_head_nearer else at_tail] = np.inf
    return np.array(way)


def _untangle(step: FloatArray, way: IndexArray) -> IndexArray:
    """Turn stretches of a way round as long as that shortens it. Source: 2-opt, Croes 1958."""
    size = len(way)
    padded = np.pad(step, (0, 1))  # a place that is no step from anywhere stands at either end
    while True:
        before, after = np.append(size, way[:-1]), np.append(way[1:], size)
        gain = (
            padded[before, way][:, None]
            + padded[way, after][None]
            - padded[np.ix_(before, way)]
            - padded[np.ix_(way, after)]
        )
        first, last = np.unravel_index(int(np.triu(gain, 1).argmax()), gain.shape)
        if gain[first, last] <= 1e-6 or first >= last:
            return way
        way = np.concatenate([way[:first], way[first : last + 1][::-1], way[last + 1 :]])


def _mean_extent(lung: BoolArray, axis: int) -> float:
    """Mean number of voxels from the first to the last that shows lung, per slice, across (axis 1) or deep (axis 2)."""
    shadow = lung.any(axis=axis)
    places = np.arange(shadow.shape[1])
    first = np.where(shadow, places, shadow.shape[1]).min(axis=1)
    last = np.where(shadow, places, -1).max(axis=1)
    return float(np.clip(last - first + 1, 0, None).mean())


def _mean_thickness(lung: BoolArray) -> float:
    """Mean depth of lung below its outline over the root of its area, per slice: 0.19 for a disc."""
    thickness = []
    for plane in lung:
        if plane.any():
            depth = ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1]
            thickness.append(depth[plane].mean() / np.sqrt(plane.sum()))
    return float(np.mean(thickness))
