"""Findings of a synthetic chest: where a diagnosis puts its opacities, and how they blend into the lung.

In goes the free lung of a phantom, out come lesions that keep their place and grow as severity rises.
"""

from dataclasses import dataclass

import numpy as np

from darnet.phantoms.canvas import Grid, find_ellipsoid, ramp
from darnet.scan import BoolArray, Diagnosis, FloatArray


@dataclass(frozen=True)
class LungSpace:
    """Where findings may lie. `share` of each voxel that is lung and `depth_mm` below the ribs' pleura are (D, H, W).

    Units: `height_mm` from the apex to the deepest recess; `scale` of the chest's cross-section, 1 = average.
    """

    grid: Grid
    share: FloatArray
    depth_mm: FloatArray
    height_mm: float
    scale: float

    def pick_spot(self, allowed: BoolArray, rng: np.random.Generator) -> FloatArray:
        """One place (x, y, z) in mm among the voxels of a mask, all equally likely.

        Raises: ValueError if the mask is empty: the grid is too coarse or shows too little of the lungs.
        """
        z, y, x = np.nonzero(allowed)
        if z.size == 0:
            raise ValueError(f"no room for a finding in a grid of {self.grid.shape} at {self.grid.spacing_mm} mm")
        at = int(rng.random() * z.size)
        return np.array([self.grid.x[0, 0, x[at]], self.grid.y[0, y[at], 0], self.grid.z[z[at], 0, 0]])

    def thin_out(self) -> "LungSpace":
        """The same space on some 64 x 64 pixels a slice: choice enough, and quick."""
        step = max(1, self.grid.shape[2] // 64)
        _, dy, dx = self.grid.spacing_mm
        spacing_mm = (self.grid.spacing_mm[0], dy * step, dx * step)
        grid = Grid(self.grid.z, self.grid.y[:, ::step], self.grid.x[..., ::step], spacing_mm)
        share, depth_mm = self.share[:, ::step, ::step], self.depth_mm[:, ::step, ::step]
        return LungSpace(grid, share, depth_mm, self.height_mm, self.scale)


@dataclass(frozen=True)
class Lesion:
    """An opacity with a ragged edge.

    Units: `centre` and `semi_axes` (x, y, z) mm; `yaw` radians in the axial plane; `edge` is the edge's width
           relative to the semi-axes. `lobe`: +1 keeps it below the oblique fissure, -1 above, 0 ignores the fissure;
           `side`: +1 keeps it in the patient's left, -1 in the right, 0 ignores the midline.
    """

    centre: FloatArray
    semi_axes: FloatArray
    yaw: float
    hu: float
    edge: float
    lobe: int = 0
    side: int = 0


def place_lesions(diagnosis: Diagnosis, severity: float, space: LungSpace, rng: np.random.Generator) -> list[Lesion]:
    """Choose the findings of a diagnosis; a higher severity keeps the same ones, larger, and adds more."""
    if diagnosis is Diagnosis.NORMAL:
        return []
    place = _place_ground_glass if diagnosis is Diagnosis.NCP else _place_consolidation
    return place(severity, space.thin_out(), rng)


def _place_ground_glass(severity: float, space: LungSpace, rng: np.random.Generator) -> list[Lesion]:
    """COVID-19: ground glass in both lungs, under the pleura, mostly at the back of the bases.

    Source: the typical pattern of the radiology literature on COVID-19; numbers ours.
    """
    grid = space.grid
    rind = (space.share > 0.9) & (space.depth_mm > 3) & (space.depth_mm < 13)
    low = (grid.z > 0.42 * space.height_mm) & (grid.y > 0)
    lesions = []
    for number in range(16):
        favoured = low if number < 2 or rng.random() < 0.8 else grid.z > 0.2 * space.height_mm
        side = -1 if number % 2 else 1
        spot = space.pick_spot(rind & favoured & (side * grid.x > 0), rng)
        size = rng.uniform(13, 21) * (0.85 + 0.55 * severity)
        semi_axes = size * np.array([0.75, rng.uniform(1.1, 1.6), rng.uniform(0.8, 1.2)])
        hu = rng.uniform(-550, -420) + 60 * severity
        lesions.append(Lesion(spot, semi_axes, float(np.arctan2(spot[1], spot[0])), hu, 0.7))
    return lesions[: 2 + round(14 * severity)]


def _place_consolidation(severity: float, space: LungSpace, rng: np.random.Generator) -> list[Lesion]:
    """Bacterial pneumonia: one lobe consolidated up to its fissure, in a halo, with a few patches.

    Source: the typical pattern of lobar pneumonia; numbers ours.
    """
    side, lobe = int(rng.choice([-1, 1])), int(rng.choice([-1, 1], p=[0.35, 0.65]))
    room = (space.share > 0.9) & (side * space.grid.x > 0) & (lobe * find_fissure_depth(space) > 12)
    spot = space.pick_spot(room & (space.depth_mm > 12) & (space.depth_mm < 40), rng)
    semi_axes = rng.uniform(29, 39) * (0.6 + 0.8 * severity) * rng.uniform(0.85, 1.25, 3)
    yaw = rng.uniform(0, np.pi)
    core = Lesion(spot, semi_axes, yaw, rng.uniform(18, 32), 0.35, lobe, side)
    lesions = [Lesion(spot, 1.35 * semi_axes, yaw, -560.0, 0.6, lobe, side), core]
    for _ in range(5):
        near = space.pick_spot(room & (space.depth_mm > 6), rng)
        size = rng.uniform(7, 12) * (0.6 + 0.8 * severity)
        lesions.append(Lesion(near, np.full(3, size), 0.0, rng.uniform(-350, -100), 0.8, lobe, side))
    return lesions[: 2 + round(5 * severity)]


def find_fissure_depth(space: LungSpace) -> FloatArray:
    """Depth in mm below the oblique fissure, positive in the lower lobe: (D, H, 1)."""
    height_mm = space.height_mm * (0.62 - 0.0053 * space.grid.y / space.scale)
    depth: FloatArray = 0.75 * (space.grid.z - height_mm)
    return depth


def add_lesion(
    lesion: Lesion, space: LungSpace, texture: FloatArray, parenchyma: FloatArray, opacity: FloatArray
) -> None:
    """Blend a lesion into the parenchyma (HU) and keep the largest share in `opacity`; both change in place.

    Shape: `texture`, `parenchyma`, `opacity` (D, H, W).
    """
    box, radius = find_ellipsoid(space.grid, lesion.centre, lesion.semi_axes, lesion.yaw, reach=1.6)
    share = ramp(1 - radius + 0.3 * texture[box], -lesion.edge / 2, lesion.edge / 2).astype(np.float32)
    if lesion.lobe:
        share *= space.grid.soften(lesion.lobe * find_fissure_depth(space)[box[:2]], 4.0)
    if lesion.side:
        share *= space.grid.soften(lesion.side * space.grid.x[..., box[2]])
    parenchyma[box] += share * (lesion.hu + 18 * texture[box] - parenchyma[box])
    np.maximum(opacity[box], share, out=opacity[box])
