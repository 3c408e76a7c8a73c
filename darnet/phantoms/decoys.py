"""Synthetic CT of a head and an abdomen: scans of other regions, whose air a lung finder must not take for lung.

In goes a seed, out comes a `Phantom` without lung, lesion or diagnosis.
"""

import numpy as np

from darnet.phantoms.body import AIR_HU, BLOOD_HU, FAT_HU, MUSCLE_HU, paint_couch, paint_spine, paint_wall
from darnet.phantoms.canvas import ANGLE, Canvas, Phantom, acquire, draw_texture, make_grid, ramp, ring
from darnet.scan import FloatArray


def make_abdomen(
    seed: int,
    *,
    shape: tuple[int, int, int] = (32, 256, 256),
    spacing_mm: tuple[float, float, float] = (7.0, 1.6, 1.6),
) -> Phantom:
    """Build an abdomen: bowel gas that a lung finder may fall for, and no lung."""
    rng = np.random.default_rng([seed, 10])
    scale, belly_mm = rng.uniform(0.88, 1.1), rng.uniform(10, 40)
    grid = make_grid(shape, spacing_mm, (0.0, rng.uniform(-6, 12), rng.uniform(-10, 10)))
    texture = draw_texture(grid.shape, rng)
    canvas = Canvas(grid, np.full(grid.shape, AIR_HU, np.float32), np.zeros(grid.shape, np.float32))
    wall = np.tile(scale * ring(140, 85, 88, 2.3), (shape[0], 1))
    skin = wall + belly_mm * (0.7 - 0.3 * np.sin(ANGLE))
    paint_couch(canvas, float((skin * np.sin(ANGLE)).max()), 1 / 420)
    paint_wall(canvas, skin, wall, texture)
    canvas.paint(grid.soften(grid.find_margin(wall - 14)), FAT_HU)
    _paint_viscera(canvas, scale, rng)
    paint_spine(canvas, 40 * scale, np.inf, rng.uniform(0, 1))
    return _finish_without_lung(canvas, rng.uniform(9, 20), seed)


def _paint_viscera(canvas: Canvas, scale: float, rng: np.random.Generator) -> None:
    """Liver, spleen, kidneys, great vessels, small bowel and a gas-holding colon. Shapes in mm below the dome."""
    organs = (
        ((-62, -12, 35), (72, 66, 85), 58.0),
        ((10, -42, 20), (55, 30, 45), 57.0),
        ((92, 30, 40), (30, 46, 50), 50.0),
        ((-62, 42, 115), (24, 27, 52), 34.0),
        ((62, 44, 105), (24, 27, 52), 34.0),
        ((48, -25, 40), (42, 40, 40), 24.0),
        ((50, -52, 38), (24, 10, 24), -950.0),
    )
    for centre, semi_axes, hu in organs:
        canvas.paint_ellipsoid(scale * np.array(centre), scale * np.array(semi_axes), hu)
    for x, radius in ((4, 10), (-18, 11)):
        canvas.paint_tube(scale * np.array([(x, 18, -50, radius), (x, 20, 260, radius)]), BLOOD_HU)
    for _ in range(16):
        start = rng.uniform((-75, -55, 110, 8), (75, 0, 240, 13))
        loop = start + np.concatenate([np.zeros((1, 4)), rng.normal(0, 18, (3, 4)) * (1, 0.5, 0.7, 0)])
        canvas.paint_tube(scale * loop, rng.uniform(15, 40))
    colon = np.array(
        [(-98, 10, 230, 25), (-102, 5, 130, 24), (-50, -55, 125, 20), (60, -58, 120, 20), (104, 5, 90, 18)]
    )
    colon = np.concatenate([colon, [(106, 18, 170, 16), (95, 15, 250, 16)]])
    canvas.paint_tube(scale * colon, 40.0)
    canvas.paint_tube(scale * (colon - (0, 3, 0, 5)), -940.0)
    canvas.paint_tube(scale * np.array([(-98, 20, 230, 14), (-102, 15, 130, 13)]), -80.0)


def make_head(
    seed: int,
    *,
    shape: tuple[int, int, int] = (30, 256, 256),
    spacing_mm: tuple[float, float, float] = (5.5, 0.94, 0.94),
) -> Phantom:
    """Build a head from the crown to the jaw: air in sinuses and mastoids, and no lung."""
    rng = np.random.default_rng([seed, 11])
    scale = rng.uniform(0.92, 1.06)
    grid = make_grid(shape, spacing_mm, (4.0, rng.uniform(-4, 10), rng.uniform(-6, 6)))
    texture = draw_texture(grid.shape, rng)
    canvas = Canvas(grid, np.full(grid.shape, AIR_HU, np.float32), np.zeros(grid.shape, np.float32))
    level = grid.z[:, :, 0] / scale
    vault = np.sqrt(np.clip(1 - (np.clip(92 - level, 0, None) / 94) ** 2, 0.01, 1))
    back = 1 - 0.3 * ramp(level, 105, 150) * ramp(np.sin(ANGLE), -0.6, 0.5)
    skin = scale * ring(76, 98, 96, 2.1) * vault * back
    paint_couch(canvas, float((skin * np.sin(ANGLE)).max()), 1 / 130)
    canvas.paint(grid.soften(grid.find_margin(skin)), -20.0)
    canvas.paint(grid.soften(grid.find_margin(skin - 5)), MUSCLE_HU + 8 * texture)
    skull = np.where(level < 118 * scale, skin - 7, 0)
    _paint_skull(canvas, skull, texture)
    _paint_face(canvas, scale, rng)
    return _finish_without_lung(canvas, rng.uniform(3, 7), seed)


def _paint_skull(canvas: Canvas, outside: FloatArray, texture: FloatArray) -> None:
    """Two tables of bone around marrow, and the brain with its ventricles."""
    grid = canvas.grid
    depth = grid.find_margin(outside)
    canvas.paint(grid.soften(depth), 1050 - 180 * np.clip(3 - np.abs(depth - 3), 0, 2.5))
    brain = grid.soften(depth - 6.5)
    rim = np.clip((depth - 10) / 6, 0, 1)
    canvas.paint(brain, 38 - 9 * np.clip(rim + 0.3 * texture, 0, 1))
    for side in (-1, 1):
        horn = np.array([(side * 9, -28, 70, 5), (side * 8, 0, 62, 6), (side * 18, 32, 72, 7)])
        canvas.paint_tube(horn, 7.0)


def _paint_face(canvas: Canvas, scale: float, rng: np.random.Generator) -> None:
    """Skull base, eye sockets, air of nose, sinuses, mastoids and throat, jaw and the top of the spine."""
    bone, air = 650.0, AIR_HU + 5
    midline = (
        ((0, 8, 118), (60, 70, 6), bone),
        ((0, -84, 86), (20, 5, 10), air),
        ((0, -25, 114), (14, 12, 9), air),
        ((0, -62, 122), (13, 24, 18), 60.0),
        ((0, -60, 124), (4, 22, 17), air),
        ((0, 2, 145), (10, 8, 26), air),
    )
    paired = (
        ((33, -66, 104), (21, 25, 18), bone),
        ((33, -68, 104), (18, 24, 15), FAT_HU),
        ((33, -76, 104), (12, 12, 12), 12.0),
        ((30, -56, 127), (18, 19, 17), bone),
        ((30, -56, 127), (16, 17, 15), air),
        ((56, 26, 120), (14, 18, 15), bone),
        ((66, 8, 120), (16, 3, 3), air),
    )
    for centre, semi_axes, hu in midline:
        canvas.paint_ellipsoid(scale * np.array(centre), scale * np.array(semi_axes), hu)
    for side in (-1, 1):
        for centre, semi_axes, hu in paired:
            canvas.paint_ellipsoid(scale * np.array(centre) * (side, 1, 1), scale * np.array(semi_axes), hu)
        for cell in rng.normal((56, 28, 120), (5, 7, 6), (40, 3)):
            canvas.paint_ellipsoid(scale * cell * (side, 1, 1), rng.uniform(1.5, 3.5, 3), -900.0)
        jaw = np.array([(50, 5, 122, 5), (48, -8, 152, 6), (34, -50, 160, 6), (0, -76, 162, 6)]) * (side, 1, 1, 1)
        canvas.paint_tube(scale * jaw, 800.0)
    canvas.paint_tube(scale * np.array([(0, 34, 128, 13), (0, 34, 220, 13)]), 350.0)
    canvas.paint_tube(scale * np.array([(0, 50, 100, 8), (0, 56, 220, 8)]), 30.0)


def _finish_without_lung(canvas: Canvas, noise_hu: float, seed: int) -> Phantom:
    """Acquire a scan that shows no chest."""
    voxels_hu = acquire(canvas.hu, canvas.grid, noise_hu, np.random.default_rng([seed, 3]))
    empty = np.zeros(canvas.grid.shape, dtype=bool)
    return Phantom(voxels_hu, canvas.grid.spacing_mm, empty, empty.copy(), None, seed)
