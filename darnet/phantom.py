"""Synthetic chest CT in Hounsfield units, with or without findings, from a seed.

In goes a diagnosis and a seed, out comes a `Phantom` with its true lung and lesion; `phantoms.files` writes it.
Anatomy, protocol, findings and noise draw from separate streams: two diagnoses of one seed differ in findings alone.
Lengths are mm in body coordinates: x to the patient's left, y backwards, z towards the feet, 0 at the lungs' apex.
Sizes and HU are textbook values for adults, tuned by eye against real chest CT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from darnet.phantoms.body import AIR_HU, BLOOD_HU, FAT_HU, MUSCLE_HU, paint_couch, paint_spine, paint_wall
from darnet.phantoms.canvas import (
    ANGLE,
    Canvas,
    Grid,
    Phantom,
    acquire,
    draw_texture,
    fill_rods,
    find_ellipsoid,
    grow_tree,
    make_grid,
    ramp,
    ring,
)
from darnet.phantoms.findings import LungSpace, add_lesion, place_lesions
from darnet.scan import Diagnosis, FloatArray

Nodes: TypeAlias = Sequence[tuple[float, float, float, float]]

FROM_BACK = np.abs((ANGLE - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi)  # 0 at the spine, pi at the breast bone

# Tubes of the mediastinum: HU, then nodes (x mm, y mm, fraction of the lungs' height, radius mm).
MEDIASTINUM: tuple[tuple[float, Nodes], ...] = (
    (BLOOD_HU, ((-17, -26, 0.10, 7), (-23, -24, 0.26, 9), (-26, -20, 0.50, 10))),  # superior vena cava
    (BLOOD_HU, ((-17, -26, 0.10, 7), (18, -34, 0.17, 5.5), (26, -36, 0.05, 5))),  # left brachiocephalic vein
    (BLOOD_HU, ((-24, -22, -0.2, 5), (-22, -20, 0.04, 5), (-7, -18, 0.20, 6.5))),  # brachiocephalic artery
    (BLOOD_HU, ((22, -18, -0.2, 4), (18, -12, 0.05, 4), (8, -8, 0.22, 4.5))),  # left common carotid
    (BLOOD_HU, ((48, -6, -0.03, 5), (27, 6, 0.04, 5), (19, 8, 0.24, 5))),  # left subclavian
    (BLOOD_HU, ((-4, -24, 0.52, 15), (-12, -29, 0.38, 16), (-6, -26, 0.27, 14), (6, -8, 0.235, 13))),  # ascending
    (BLOOD_HU, ((6, -8, 0.235, 13), (18, 12, 0.245, 13), (26, 34, 0.29, 12.5), (27, 42, 0.38, 12))),  # arch
    (BLOOD_HU, ((27, 42, 0.38, 12), (23, 42, 0.6, 12), (12, 38, 0.85, 11), (5, 33, 1.3, 10))),  # descending aorta
    (BLOOD_HU, ((6, -42, 0.56, 16), (16, -36, 0.45, 14), (22, -18, 0.40, 13))),  # pulmonary trunk
    (BLOOD_HU, ((20, -20, 0.41, 11), (-2, -6, 0.435, 10), (-32, -1, 0.435, 8.5))),  # right pulmonary artery
    (BLOOD_HU, ((22, -18, 0.40, 12), (34, 4, 0.385, 10), (40, 14, 0.43, 8))),  # left pulmonary artery
    (50.0, ((0, 14, -0.2, 6), (3, 24, 0.3, 7), (2, 28, 0.5, 7), (12, 20, 0.9, 8))),  # oesophagus
    (BLOOD_HU, ((-20, 2, 0.7, 12), (-24, 14, 0.85, 13), (-22, 20, 1.3, 12))),  # inferior vena cava
    (45.0, ((-6, -16, 0.52, 26), (-8, -22, 0.64, 42), (-6, -16, 0.70, 36))),  # right heart
    (48.0, ((14, -6, 0.51, 32), (30, -26, 0.62, 45), (46, -36, 0.71, 30))),  # left heart
)
AIRWAYS: tuple[Nodes, ...] = (
    ((0, -14, -0.3, 8.5), (0, -6, 0.1, 9), (1, 6, 0.34, 9), (2, 9, 0.38, 8)),  # trachea
    ((0, 9, 0.37, 7.5), (-20, 11, 0.425, 7), (-36, 10, 0.45, 5.5)),  # right main bronchus
    ((3, 9, 0.37, 7.5), (28, 13, 0.44, 6), (43, 12, 0.465, 5)),  # left main bronchus
)
# Half width of the tissue between the lungs, mm: rows at MIDLINE_LEVELS of the lungs' height, columns at MIDLINE_Y.
MIDLINE_LEVELS = (0.0, 0.12, 0.28, 0.42, 0.62, 1.0)
MIDLINE_Y = (-85.0, -60.0, -35.0, 0.0, 30.0, 50.0, 85.0)
MIDLINE_HALF_WIDTH = (
    (44, 42, 36, 30, 27, 23, 22),
    (24, 28, 32, 27, 24, 20, 19),
    (5, 10, 26, 24, 22, 20, 18),
    (4, 6, 22, 26, 23, 20, 18),
    (5, 12, 26, 28, 22, 20, 18),
    (24, 30, 30, 24, 22, 20, 18),
)


@dataclass(frozen=True)
class Habitus:
    """What varies from patient to patient and from protocol to protocol. Lengths in mm."""

    scale: float  # of the chest's cross-section
    roundness: float  # front-to-back against side-to-side
    lung_mm: float  # apex to the deepest recess
    right_dome: float  # top of the diaphragm, as a fraction of lung_mm
    left_dome: float
    fat_mm: float
    muscle_mm: float
    breast_mm: float
    heart_scale: float
    lung_hu: float
    noise_hu: float
    couch_curve: float  # 1 / radius in mm; 0 = flat


def _draw_habitus(rng: np.random.Generator) -> Habitus:
    """One patient; every range is drawn uniformly but the breasts, which half of the patients have."""
    breast = rng.uniform(10, 34) * (rng.random() < 0.5)
    right_dome = rng.uniform(0.64, 0.74)
    return Habitus(
        scale=rng.uniform(0.86, 1.1),
        roundness=rng.uniform(0.92, 1.08),
        lung_mm=rng.uniform(230, 300),
        right_dome=right_dome,
        left_dome=right_dome + rng.uniform(0.03, 0.09),
        fat_mm=rng.uniform(7, 32),
        muscle_mm=rng.uniform(11, 19),
        breast_mm=breast,
        heart_scale=rng.uniform(0.9, 1.12),
        lung_hu=rng.uniform(-880, -835),
        noise_hu=rng.uniform(9, 22),
        couch_curve=float(rng.choice([0.0, 1 / 420, 1 / 330])),
    )


def make_phantom(
    diagnosis: Diagnosis,
    seed: int,
    *,
    severity: float = 0.5,
    shape: tuple[int, int, int] | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
) -> Phantom:
    """Build a chest. What the caller leaves open (slices, field of view 320-500 mm) varies with the seed alone.

    Shape:  (D, H, W); default 36 to 56 slices of 256 x 256.
    Units:  `severity` 0 (barely there) to 1 (extensive); Normal ignores it.
    Raises: ValueError if severity is outside 0..1.
    """
    if not 0 <= severity <= 1:
        raise ValueError(f"severity {severity} is outside 0..1")
    rng = np.random.default_rng([seed, 0])
    body = _draw_habitus(rng)
    grid = _place_grid(body, shape, spacing_mm, np.random.default_rng([seed, 1]))
    texture = draw_texture(grid.shape, rng)
    canvas, depth_mm = _paint_chest(grid, body, texture, rng)
    trees = _grow_trees(canvas, body, depth_mm, rng)
    parenchyma = body.lung_hu + 0.55 * grid.y + 25 * texture
    opacity = np.zeros(grid.shape, np.float32)
    space = LungSpace(grid, canvas.lung, depth_mm, body.lung_mm, body.scale)
    for lesion in place_lesions(diagnosis, severity, space, np.random.default_rng([seed, 2])):
        add_lesion(lesion, space, texture, parenchyma, opacity)
    _fill_lung(canvas, parenchyma, trees)
    lung = canvas.lung > 0.5
    voxels_hu = acquire(canvas.hu, grid, body.noise_hu, np.random.default_rng([seed, 3]))
    return Phantom(voxels_hu, grid.spacing_mm, lung, lung & (opacity > 0.5), diagnosis, seed)


def _place_grid(
    body: Habitus,
    shape: tuple[int, int, int] | None,
    spacing_mm: tuple[float, float, float] | None,
    rng: np.random.Generator,
) -> Grid:
    """Choose what the scan covers: from the lower neck to below the lungs, the patient a little off centre."""
    slices = int(rng.integers(36, 57))
    field_mm = np.clip(2 * (150 * body.scale + body.fat_mm + body.muscle_mm) * rng.uniform(0.98, 1.3), 320, 500)
    above, below = rng.uniform(8, 40), rng.uniform(4, 35)
    shift_x, shift_y = rng.uniform(-14, 14), rng.uniform(-6, 22)
    shape = shape or (slices, 256, 256)
    if spacing_mm is None:
        pixel = round(float(field_mm) / shape[2], 4)
        spacing_mm = (round((body.lung_mm + above + below) / shape[0], 2), pixel, pixel)
    return make_grid(shape, spacing_mm, (-above, shift_y, shift_x))


def _outline_chest(grid: Grid, body: Habitus) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Radii by slice and angle of the rib cage's inside, the inside of the fat, and the skin: (D, NUM_ANGLES) each."""
    level = grid.z[:, :, 0] / body.lung_mm
    gutter = 9 * np.exp(-(((FROM_BACK - 0.55) / 0.28) ** 2)) - 5 * np.exp(-((FROM_BACK / 0.2) ** 2))
    power = 2.25 + 0.2 * np.sin(ANGLE)  # blunter at the back
    full = body.scale * (ring(128, 96 * body.roundness, 88 * body.roundness, power) + gutter)
    cage = full * (1 - 0.42 * (1 - ramp(level, -0.06, 0.45)) ** 1.5)
    flank = np.abs(np.cos(ANGLE))
    muscle = full + 9 + body.muscle_mm * (0.7 + 0.5 * np.sin(2 * ANGLE) ** 2 + 0.8 * (1 - flank) * (np.sin(ANGLE) > 0))
    shoulder = body.scale * ring(205, 78, 104, 2.6)
    neck = ring(62, 60, 70, 2) + 0 * level
    top = np.maximum(shoulder * (1 - 0.45 * ramp(-level, 0.02, 0.2)), neck)
    blend = 1 - ramp(level, 0.0, 0.3)
    muscle = muscle + blend * (np.maximum(top, cage + 9) - muscle)
    fat = body.fat_mm * (0.55 + 0.45 * flank + 0.25 * ramp(level, 0.7, 1.1))
    lump = np.exp(-(((FROM_BACK - 2.35) / 0.34) ** 2) - ((level - 0.5) / 0.17) ** 2)
    furrow = 7 * np.exp(-((FROM_BACK / 0.16) ** 2)) + 5 * np.exp(-(((FROM_BACK - np.pi) / 0.2) ** 2))
    return cage, muscle, muscle + fat + body.breast_mm * lump - np.minimum(furrow, 0.5 * fat)


def _paint_chest(grid: Grid, body: Habitus, texture: FloatArray, rng: np.random.Generator) -> tuple[Canvas, FloatArray]:
    """Paint all but the inside of the lungs; also give the depth in mm below the pleura of the ribs."""
    cage, muscle, skin = _outline_chest(grid, body)
    canvas = Canvas(grid, np.full(grid.shape, AIR_HU, np.float32), np.zeros(grid.shape, np.float32))
    paint_couch(canvas, float((skin * np.sin(ANGLE)).max()), body.couch_curve)
    paint_wall(canvas, skin, muscle, texture)
    depth_mm = grid.find_margin(cage)
    inside = grid.soften(depth_mm)
    neck = np.clip(1.2 - grid.z / (0.1 * body.lung_mm), 0, 1) * np.clip(0.75 + texture, 0, 1)
    canvas.paint(inside, FAT_HU + 8 + neck * (MUSCLE_HU - FAT_HU))
    _paint_ribs(canvas, cage, depth_mm, body, rng)
    _paint_shoulders(canvas, body)
    _paint_upper_abdomen(canvas, body, inside, texture)
    canvas.lung[:] = inside * _find_lung_space(grid, body)
    _paint_mediastinum(canvas, body)
    paint_spine(canvas, body.scale * 40, body.lung_mm, rng.uniform(0, 1))
    return canvas, depth_mm


def _paint_ribs(canvas: Canvas, cage: FloatArray, depth: FloatArray, body: Habitus, rng: np.random.Generator) -> None:
    """Twelve oblique pairs of ribs, their cartilages and the breast bone, as shells around the rib cage."""
    grid = canvas.grid
    level = grid.z[:, :, 0]
    shell = 4.2 - np.abs(depth + 4.5)
    bone_hu = 640 - 130 * np.clip(shell, 0, 3)
    ribs, cartilage = np.zeros_like(cage), np.zeros_like(cage)
    start = rng.uniform(-0.06, -0.02)
    for number in range(12):
        end = 2.72 if number < 7 else 2.72 - 0.33 * (number - 6)
        drop = min(0.15 + 0.045 * number, 0.42) * np.minimum(FROM_BACK / 2.5, 1) ** 1.1
        middle = body.lung_mm * (start + 0.096 * number + drop)
        strip = np.clip((4.2 - np.abs(level - middle)) / grid.spacing_mm[0] + 0.5, 0, 1)
        ribs = np.maximum(ribs, strip * (FROM_BACK > 0.2) * (end > FROM_BACK))
        cartilage = np.maximum(cartilage, strip * (end <= FROM_BACK) * (number < 7))
    half_width = np.interp(level / body.lung_mm, [0.1, 0.13, 0.24, 0.3, 0.6, 0.68], [0, 30, 22, 15, 19, 0])
    sternum = np.clip((half_width - cage * np.abs(FROM_BACK - np.pi)) / grid.spacing_mm[2] + 0.5, 0, 1)
    sternum = sternum * (half_width > 0)
    cartilage = cartilage * (1 - sternum)
    shell_share = grid.soften(shell)
    for table, hu in ((cartilage, 115.0), (ribs, bone_hu), (sternum, bone_hu - 60)):
        canvas.paint(shell_share * grid.spread(table), hu)


def _scale_nodes(nodes: Nodes, scale: float, height_mm: float) -> FloatArray:
    """From anatomical units (mm of the average chest, fraction of the lungs' height) to mm."""
    scaled: FloatArray = np.asarray(nodes) * np.array([scale, scale, height_mm, scale])
    return scaled


def _paint_shoulders(canvas: Canvas, body: Habitus) -> None:
    """Collar bones, shoulder blades and the heads of the raised arms, mirrored."""
    rods: list[Nodes] = [((20, -62, 0.05, 7), (70, -66, 0.0, 5), (125, -30, -0.04, 6))]
    rods.append(((168, 8, -0.08, 22), (195, 0, -0.25, 20)))
    for turn in np.linspace(0.1, 0.74, 15):  # radians above the horizontal, at the back
        x, y = 136 * np.cos(turn), 100 * np.sin(turn) + 6
        rods.append(((x, y, 0.02, 4.2), (x, y, 0.46 - 0.2 * abs(turn - 0.6), 3.4)))
    for rod in rods:
        for side in (-1, 1):
            nodes = _scale_nodes(rod, body.scale, body.lung_mm) * (side, 1, 1, 1)
            canvas.paint_tube(nodes, 480.0)
            canvas.paint_tube(nodes, 230.0, extra_mm=-2.2)


def _paint_upper_abdomen(canvas: Canvas, body: Habitus, inside: FloatArray, texture: FloatArray) -> None:
    """Liver, spleen and stomach below the domes; the lungs are put over them later."""
    grid, k, h = canvas.grid, body.scale, body.lung_mm
    organs = (
        ((-72, -4, 1.0), (105, 98, 0.40), 58.0, 0.0),
        ((15, -48, 1.02), (75, 34, 0.2), 57.0, 0.25),
        ((84, 36, 0.98), (38, 54, 0.22), 50.0, 0.6),
        ((62, -18, 1.0), (50, 52, 0.24), 28.0, 0.3),
        ((58, -58, 0.98), (34, 16, 0.13), -960.0, 0.0),
    )
    for (x, y, level), (a, b, c), hu, yaw in organs:
        box, radius = find_ellipsoid(grid, (x * k, y * k, level * h), (a * k, b * k, c * h), yaw)
        share = grid.soften((1 - radius + 0.03 * texture[box]) * b) * inside[box]
        canvas.paint(share, hu, box)


def _find_lung_space(grid: Grid, body: Habitus) -> FloatArray:
    """Share of each voxel that is above the diaphragm, below the apices and beside the midline."""
    k, h = body.scale, body.lung_mm
    space = np.clip((_find_diaphragm(grid, body) - grid.z) / np.float32(0.7 * grid.spacing_mm[0]) + 0.5, 0, 1)
    columns = np.stack(
        [np.interp(grid.z.ravel() / h, MIDLINE_LEVELS, c) for c in zip(*MIDLINE_HALF_WIDTH, strict=True)]
    )
    rows = np.stack([np.interp(grid.y.ravel() / k, MIDLINE_Y, level) for level in columns.T])
    space *= grid.soften(np.abs(grid.x) - (k * rows[:, :, None]).astype(np.float32))
    top = slice(0, int(np.searchsorted(grid.z.ravel(), 0.3 * h)))
    rise = np.clip(1 - grid.z[top] / (0.3 * h), 0, None)
    across = ((np.abs(grid.x) - 60 * k) / (72 * k)) ** 2 + ((grid.y - 8 * k) / (86 * k)) ** 2
    space[top] *= grid.soften((1 - np.sqrt(across + rise**1.7)) * 60 * k)
    return space


def _find_diaphragm(grid: Grid, body: Habitus) -> FloatArray:
    """Height (z in mm) of the diaphragm over the axial plane: (H, W). Deepest at the back, domed on either side."""
    k, h = body.scale, body.lung_mm
    x, y = grid.x[0] / k, grid.y[0] / k
    recess = np.interp(y, [-90, -40, 80], [0.86, 0.9, 1.0])
    surface = recess
    for side, top in ((-1, body.right_dome), (1, body.left_dome)):
        across = np.hypot((x - 58 * side) / 72, (y + 8) / 84)
        dome = np.clip(1 - across**2.4, 0, 1) ** 0.6
        surface = np.minimum(surface, recess - (recess - top) * dome)
    height: FloatArray = (surface * h).astype(np.float32)
    return height


def _paint_mediastinum(canvas: Canvas, body: Habitus) -> None:
    """Heart, vessels, gullet and airways, in a sleeve of fat."""
    tubes = [(hu, _scale_nodes(nodes, body.scale, body.lung_mm)) for hu, nodes in MEDIASTINUM]
    for number in (-1, -2):
        tubes[number][1][:, 3] *= body.heart_scale
    airways = [_scale_nodes(nodes, body.scale, body.lung_mm) for nodes in AIRWAYS]
    for _, nodes in tubes:
        canvas.paint_tube(nodes, FAT_HU + 10, extra_mm=3.5, over_lung=True)
    for hu, nodes in tubes:
        canvas.paint_tube(nodes, hu)
    for nodes in airways:
        canvas.paint_tube(nodes, 30.0, extra_mm=1.8)
    for nodes in airways:
        canvas.paint_tube(nodes, AIR_HU + 10)


@dataclass(frozen=True)
class Trees:
    """What branches through the lungs, each as share of a voxel: blood vessels, walls of airways, air in airways."""

    vessels: FloatArray
    walls: FloatArray
    airways: FloatArray


def _grow_trees(canvas: Canvas, body: Habitus, depth_mm: FloatArray, rng: np.random.Generator) -> Trees:
    """Arteries with their airways, and veins, from both hila to within 6 mm of the pleura."""
    grid, airways, vessels = canvas.grid, [], []
    deep = (canvas.lung > 0.98) & (depth_mm > 6)
    for side in (-1, 1):
        z, y, x = np.nonzero(deep & (side * grid.x > 0))
        spots = np.stack([grid.x.ravel()[x], grid.y.ravel()[y], grid.z.ravel()[z]], axis=1)
        for root, thickness in (((36, 6, 0.44), 0.56), ((26, 2, 0.53), 0.5)):
            targets = spots[rng.integers(0, len(spots), 1024)] + rng.uniform(-1, 1, (1024, 3))
            hilum = np.array(root) * (side * body.scale, body.scale, body.lung_mm)
            branches = grow_tree(hilum, targets, thickness, rng)
            vessels.append(branches)
            if root[2] == 0.44:
                airways.append(branches[:510] * (1, 1, 1, 0.8) + branches[:510, :, 3:] * (1.3, 1.3, 0, 0))
    return Trees(
        fill_rods(grid, np.concatenate(vessels), rng),
        fill_rods(grid, np.concatenate([tree[:126] for tree in airways]) * (1, 1, 1, 1.35), rng),
        fill_rods(grid, np.concatenate(airways), rng),
    )


def _fill_lung(canvas: Canvas, parenchyma: FloatArray, trees: Trees) -> None:
    """Put the lungs, with what branches in them, into the space left for them."""
    for share, hu in ((trees.vessels, BLOOD_HU), (trees.walls, 0.0), (trees.airways, AIR_HU + 20)):
        parenchyma += share * (hu - parenchyma)
    canvas.hu[:] += canvas.lung * (parenchyma - canvas.hu)
