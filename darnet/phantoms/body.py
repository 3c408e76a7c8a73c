"""What every phantom is made of: tissues in Hounsfield units, and the skin, couch and spine that all regions share.

In goes a canvas and outlines in mm; the canvas leaves painted. `phantom` and `decoys` paint the rest.
"""

import numpy as np

from darnet.phantoms.canvas import Canvas
from darnet.scan import FloatArray

AIR_HU, FAT_HU, MUSCLE_HU, BLOOD_HU = -1000.0, -100.0, 52.0, 42.0


def paint_wall(canvas: Canvas, skin: FloatArray, muscle: FloatArray, texture: FloatArray) -> None:
    """Skin, fat, and muscle with the thin sheets of fat between its bellies."""
    depth = canvas.grid.find_margin(skin)
    canvas.paint(canvas.grid.soften(depth), FAT_HU - 8)
    canvas.paint(canvas.grid.soften(1.2 - np.abs(depth - 1.2)), 0.0)
    depth = canvas.grid.find_margin(muscle)
    layer = np.abs((depth + 8 * texture) % 21 - 10.5)
    sheets = np.clip(1.6 - layer, 0, 1) * np.clip(0.4 + 1.5 * texture[:, ::-1], 0, 1)
    canvas.paint(canvas.grid.soften(depth), MUSCLE_HU - 130 * sheets)


def paint_couch(canvas: Canvas, back_mm: float, curve: float) -> None:
    """A couch top of two thin skins around foam, just below the patient's back."""
    y, x = canvas.grid.y, canvas.grid.x
    bend = curve * x**2 / 2
    below = y - back_mm - 3 + bend
    reach = 215 - np.abs(x)
    for top, thick, hu in ((0.0, 34.0, -940.0), (0.0, 2.5, -160.0), (31.0, 3.0, -60.0)):
        share = canvas.grid.soften(np.minimum(np.minimum(below - top, top + thick - below), reach))
        canvas.paint(np.broadcast_to(share, canvas.hu.shape), hu)


def paint_spine(canvas: Canvas, spine_mm: float, height_mm: float, phase: float) -> None:
    """Vertebrae with discs, canal, arches and processes, along the spine's curve. `spine_mm`: y of the bodies."""
    grid = canvas.grid
    level = grid.z.ravel() / height_mm
    centre = spine_mm + 12 * np.sin(np.pi * np.clip(level, -0.3, 1.3)) - 3
    box = grid.find_box((-62, spine_mm - 45, -1e4), (62, spine_mm + 75, 1e4))
    x, y = np.abs(grid.x[:, :, box[2]]), grid.y[:, box[1]] - centre[:, None, None].astype(np.float32)
    step = (grid.z / 23 + phase) % 1
    disc = np.clip((np.abs(step - 0.5) - 0.5) * 23 / grid.spacing_mm[0] + 0.9, 0, 1)
    width = 15 + 3.0 * np.clip(level, 0, 1)[:, None, None]
    body = (1 - np.sqrt((x / width) ** 2 + (y / 14) ** 2)) * 14
    arch = 4.2 - np.abs(np.hypot(x, y - 21) - 12)
    spike = np.minimum(3.6 - x, np.minimum(y - 30, 52 - y)) + 3.0 * (y > 46)
    wing = np.minimum(5 - np.abs(y - 26 - 0.25 * (x - 12)), np.minimum(x - 10, 34 - x)) - 9 * (
        np.abs(step - 0.45) > 0.35
    )
    flesh = np.minimum(1 - np.hypot((x - 22) / 24, (y - 40) / 20), 0.2) * 20
    canvas.paint(grid.soften(np.maximum(body + 3.5, flesh)), MUSCLE_HU, box)
    for margin in (wing, spike, arch):
        canvas.paint(grid.soften(margin), 560 - 90 * np.clip(margin, 0, 4), box)
    bone = 620 - 150 * np.clip(body, 0, 2.8)
    canvas.paint(grid.soften(body), bone + disc * (85 - bone), box)
    canvas.paint(grid.soften(9 - np.hypot(x, y - 21)), 8.0, box)
    canvas.paint(grid.soften(5 - np.hypot(x, y - 21)), 38.0, box)
