"""A canvas for synthetic CT: a grid in mm, soft-edged shapes painted in Hounsfield units, branching trees, noise.

In goes geometry in mm, out comes a `Phantom`; `phantom` paints anatomy with it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from darnet.scan import BoolArray, Diagnosis, FloatArray

Box: TypeAlias = tuple[slice, slice, slice]

NUM_ANGLES = 1440  # of the polar tables that hold outlines
ANGLE = np.linspace(-np.pi, np.pi, NUM_ANGLES, endpoint=False)  # 0 = patient's left, pi/2 = back


@dataclass(frozen=True)
class Phantom:
    """A synthetic scan and its truth. `diagnosis` is None where no chest is shown.

    Shape: `voxels_hu` int16, `lung` and `lesion` bool, all (D, H, W) in canonical axes; lung includes lesion.
    Units: `spacing_mm` (z, y, x).
    """

    voxels_hu: NDArray[np.int16]
    spacing_mm: tuple[float, float, float]
    lung: BoolArray
    lesion: BoolArray
    diagnosis: Diagnosis | None
    seed: int


@dataclass(frozen=True)
class Grid:
    """Where the voxels lie in the body, as open axes z (D,1,1), y (1,H,1), x (1,1,W) in mm."""

    z: FloatArray
    y: FloatArray
    x: FloatArray
    spacing_mm: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W."""
        return self.z.size, self.y.size, self.x.size

    def find_box(self, low: ArrayLike, high: ArrayLike) -> Box:
        """Slices of the voxels between two corners (x, y, z) in mm."""
        bounds = zip((self.z, self.y, self.x), np.asarray(low)[::-1], np.asarray(high)[::-1], strict=True)
        z, y, x = (slice(*np.searchsorted(axis.ravel(), (first, last))) for axis, first, last in bounds)
        return z, y, x

    def spread(self, table: FloatArray) -> FloatArray:
        """Give every voxel the value of its slice and angle: (D, NUM_ANGLES) -> (D, H, W)."""
        turn = (np.arctan2(self.y[0], self.x[0]) + np.pi) * (NUM_ANGLES / (2 * np.pi))
        values: FloatArray = np.take(table.astype(np.float32), turn.astype(np.int32) % NUM_ANGLES, axis=1)
        return values

    def find_margin(self, radius_mm: FloatArray) -> FloatArray:
        """Depth in mm, along the ray from the axis, below an outline given as radius: (D, NUM_ANGLES) -> (D, H, W)."""
        return self.spread(radius_mm) - np.hypot(self.y, self.x)

    def soften(self, margin_mm: FloatArray, width_mm: float | None = None) -> FloatArray:
        """Share of a voxel that lies inside a surface, from its depth; edges are one pixel wide or as told."""
        share = margin_mm / np.float32(width_mm or self.spacing_mm[2])
        share += np.float32(0.5)
        return np.clip(share, 0, 1, out=share)


@dataclass(frozen=True)
class Canvas:
    """What is being painted: HU, and the share of each voxel that is lung."""

    grid: Grid
    hu: FloatArray
    lung: FloatArray

    def paint(self, share: FloatArray, hu: float | FloatArray, box: Box = np.s_[:, :, :]) -> None:
        """Blend `hu` over what is there and take its share from the lung."""
        target, lung = self.hu[box], self.lung[box]
        target += share * (hu - target)
        lung *= 1 - share

    def paint_tube(self, nodes: FloatArray, hu: float, extra_mm: float = 0.0, over_lung: bool = False) -> None:
        """Paint a chain of tapering round rods through nodes (x, y, z, radius) in mm, or only where lung is."""
        for first, last in pairwise(nodes):
            reach = np.maximum(first[3], last[3]) + extra_mm + self.grid.spacing_mm[2]
            ends = np.stack([first[:3], last[:3]])
            box = self.grid.find_box(ends.min(axis=0) - reach, ends.max(axis=0) + reach)
            share = self.grid.soften(_find_rod_margin(self.grid, box, first, last) + np.float32(extra_mm))
            self.paint(share * self.lung[box] if over_lung else share, hu, box)

    def paint_ellipsoid(self, centre: ArrayLike, semi_axes: ArrayLike, hu: float, yaw: float = 0.0) -> None:
        """Paint an ellipsoid turned by `yaw` radians in the axial plane."""
        box, radius = find_ellipsoid(self.grid, centre, semi_axes, yaw)
        self.paint(self.grid.soften((1 - radius) * float(np.min(semi_axes))), hu, box)


def _find_rod_margin(grid: Grid, box: Box, first: FloatArray, last: FloatArray) -> FloatArray:
    """Depth in mm inside a tapering rod between two nodes (x, y, z, radius)."""
    x, y, z = grid.x[..., box[2]] - first[0], grid.y[:, box[1]] - first[1], grid.z[box[0]] - first[2]
    way = (last - first)[:3]
    along = (x * way[0] + y * way[1] + z * way[2]) / max(float(way @ way), 1e-6)
    along = np.clip(along, 0, 1)
    distance = np.sqrt((x - along * way[0]) ** 2 + (y - along * way[1]) ** 2 + (z - along * way[2]) ** 2)
    margin: FloatArray = first[3] + along * (last[3] - first[3]) - distance
    return margin.astype(np.float32)


def find_ellipsoid(
    grid: Grid, centre: ArrayLike, semi_axes: ArrayLike, yaw: float, reach: float = 1.1
) -> tuple[Box, FloatArray]:
    """Box around an ellipsoid and, in it, the radius relative to its surface (1 = on the surface)."""
    centre, semi = np.asarray(centre, dtype=np.float64), np.asarray(semi_axes, dtype=np.float64)
    cos, sin = np.cos(yaw), np.sin(yaw)
    half = np.array([np.hypot(semi[0] * cos, semi[1] * sin), np.hypot(semi[0] * sin, semi[1] * cos), semi[2]])
    box = grid.find_box(centre - reach * half, centre + reach * half)
    x, y, z = grid.x[..., box[2]] - centre[0], grid.y[:, box[1]] - centre[1], grid.z[box[0]] - centre[2]
    squares = ((x * cos + y * sin) / semi[0]) ** 2 + ((y * cos - x * sin) / semi[1]) ** 2 + (z / semi[2]) ** 2
    return box, np.sqrt(squares).astype(np.float32)


def make_grid(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], origin_mm: tuple[float, float, float]
) -> Grid:
    """Lay the axes: the first slice at `origin_mm[0]`, the image centre at the other two."""
    steps = [
        np.arange(count, dtype=np.float32) * np.float32(step) for count, step in zip(shape, spacing_mm, strict=True)
    ]
    z = steps[0] + np.float32(origin_mm[0])
    y, x = (steps[i] - steps[i][-1] / 2 + np.float32(origin_mm[i]) for i in (1, 2))
    return Grid(z[:, None, None], y[None, :, None], x[None, None, :], spacing_mm)


def draw_texture(shape: tuple[int, int, int], rng: np.random.Generator) -> FloatArray:
    """Random field of unit variance: two octaves, some 14 and 5 pixels coarse in plane, correlated along z."""
    octaves = []
    for coarse in (14, 5):
        field = rng.standard_normal((shape[0], shape[1] // coarse + 2, shape[2] // coarse + 2)).astype(np.float32)
        field[1:] += field[:-1]
        octaves.append(np.stack([cv2.resize(plane, shape[:0:-1], interpolation=cv2.INTER_LINEAR) for plane in field]))
    texture: FloatArray = np.float32(0.85) * octaves[0] + np.float32(0.5) * octaves[1]
    return texture


def ring(half_width: float, front: float, back: float, power: ArrayLike) -> FloatArray:
    """Radius of a superellipse, by angle, whose front and back depths may differ."""
    depth, power = np.where(np.sin(ANGLE) < 0, front, back), np.asarray(power)
    across, along = np.abs(np.cos(ANGLE)) / half_width, np.abs(np.sin(ANGLE)) / depth
    radius: FloatArray = (across**power + along**power) ** (-1 / power)
    return radius


def ramp(value: ArrayLike, start: float, stop: float) -> FloatArray:
    """Smooth step from 0 at `start` to 1 at `stop`."""
    t = np.clip((np.asarray(value) - start) / (stop - start), 0, 1)
    ramp: FloatArray = t * t * (3 - 2 * t)
    return ramp


def grow_tree(root: FloatArray, targets: FloatArray, thickness: float, rng: np.random.Generator) -> FloatArray:
    """Branch from a root to targets, halving them along their longest axis; radii follow Murray's law.

    Shape: targets (2**n, 3) -> (2**(n+1) - 2, 2, 4), the ends of each branch as (x, y, z, radius), thickest first.
    """
    nodes, groups, branches = root[None], targets[None], []
    while groups.shape[1] > 1:
        axis = np.argmax(np.ptp(groups, axis=1), axis=1)[:, None, None]
        order = np.argsort(np.take_along_axis(groups, axis, axis=2), axis=1)
        count = groups.shape[1] // 2
        groups = np.take_along_axis(groups, order, axis=1).reshape(-1, count, 3)
        start = np.repeat(nodes, 2, axis=0)
        way = groups.mean(axis=1) - start
        length = np.linalg.norm(way, axis=1, keepdims=True)
        nodes = start + way * (0.42 if count > 1 else 1) + 0.05 * length * rng.standard_normal(way.shape)
        radius = thickness * np.array([(2 * count) ** 0.33, count**0.33])
        ends = np.stack([start, nodes], axis=1)
        branches.append(np.concatenate([ends, np.broadcast_to(radius[:, None], (*ends.shape[:2], 1))], axis=2))
    return np.concatenate(branches)


def fill_rods(grid: Grid, rods: FloatArray, rng: np.random.Generator, points_per_mm3: float = 2.5) -> FloatArray:
    """Share of each voxel inside thin rods, by throwing points into them: right at any voxel size, unlike distances.

    Shape: rods (n, 2, 4), ends as (x, y, z, radius) in mm -> (D, H, W).
    """
    length = np.linalg.norm(rods[:, 1, :3] - rods[:, 0, :3], axis=1)
    volume = np.pi * rods[:, :, 3].mean(axis=1) ** 2 * length
    rod = np.repeat(np.arange(len(rods)), np.ceil(points_per_mm3 * volume).astype(int))
    along = rng.random((len(rod), 1), dtype=np.float32)
    ends = rods.astype(np.float32)[rod]
    points = ends[:, 0] + along * (ends[:, 1] - ends[:, 0])
    offset = rng.standard_normal((len(rod), 3), dtype=np.float32)
    points[:, :3] += offset * (points[:, 3:] * 0.5)  # a Gaussian rod of the same cross-section, near enough
    first = np.array([grid.x[0, 0, 0], grid.y[0, 0, 0], grid.z[0, 0, 0]], dtype=np.float32)
    index = np.rint((points[:, :3] - first) / np.array(grid.spacing_mm[::-1], dtype=np.float32)).astype(np.int32)
    index = index[np.all((index >= 0) & (index < np.array(grid.shape[::-1])), axis=1)]
    flat = (index[:, 2] * grid.shape[1] + index[:, 1]) * grid.shape[2] + index[:, 0]
    counts = np.bincount(flat, minlength=int(np.prod(grid.shape))).reshape(grid.shape)
    share: FloatArray = counts.astype(np.float32) / np.float32(points_per_mm3 * np.prod(grid.spacing_mm))
    return np.minimum(share, 1)


def acquire(hu: FloatArray, grid: Grid, noise_hu: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """Blur by the scanner's point spread, add correlated quantum noise, round to what a scanner stores."""
    sharp = _blur(hu, 5, 0.8 / grid.spacing_mm[2])
    noise = _blur(rng.standard_normal(hu.shape, dtype=np.float32), 3, 0.55)
    thick = np.interp(np.hypot(grid.y[0], grid.x[0]), [0, 200], [2.0, 1.1]).astype(np.float32)
    stored: NDArray[np.int16] = np.clip(np.rint(sharp + noise * (noise_hu * thick)), -1024, 3071).astype(np.int16)
    return stored


def _blur(voxels: FloatArray, size: int, sigma: float) -> FloatArray:
    """Blur in plane, all slices as one tall image: they mix only in the outermost rows."""
    tall = voxels.reshape(-1, voxels.shape[2])
    blurred: FloatArray = np.asarray(cv2.GaussianBlur(tall, (size, size), sigma), dtype=np.float32)
    return blurred.reshape(voxels.shape)
