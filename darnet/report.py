"""What people look at: slices beside their activation maps, as a figure. Every figure says "research use only"."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darnet.scan import BoolArray, FloatArray, Uint8Array

NOTICE = "Research use only"
INK, PAPER = "#e8e8e8", "#111418"


@dataclass(frozen=True)
class CamPanel:
    """One scan of a CAM figure.

    Shape: `voxels`, `cam` and `lesion` (D, H, W) on one grid; `lesion` None where the truth is not known.
    Units: `pixel_aspect` is the height of a pixel over its width.
    """

    title: str
    caption: str
    voxels: Uint8Array
    cam: FloatArray
    lesion: BoolArray | None
    pixel_aspect: float = 1.0

    @property
    def telling_slice(self) -> int:
        """The slice that holds most of the map."""
        return int(self.cam.sum(axis=(1, 2)).argmax())


def draw_cam_figure(panels: Sequence[CamPanel], heading: str, path: Path) -> None:
    """Write a PNG with a row for each scan: the most telling slice, and the same slice under its CAM.

    Source: paper Fig. 2.
    """
    figure = Figure(figsize=(8.2, 3.9 * len(panels) + 0.9), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{heading}\n{NOTICE}", color=INK, fontsize=12)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        _draw_slice(row[0], panel, f"{panel.title}: slice {panel.telling_slice + 1} of {len(panel.voxels)}")
        _draw_slice(row[1], panel, panel.caption)
        _overlay_cam(row[1], panel)
    figure.savefig(path, dpi=110)


def _draw_slice(axis: Axes, panel: CamPanel, title: str) -> None:
    """Radiological convention: the patient's right is on the left of the picture."""
    axis.imshow(
        panel.voxels[panel.telling_slice],
        cmap="gray",
        vmin=0,
        vmax=255,
        aspect=panel.pixel_aspect,
        interpolation="bicubic",
    )
    axis.set_title(title, color=INK, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.text(0.02, 0.96, "R", color=INK, fontsize=9, transform=axis.transAxes, va="top")


def _overlay_cam(axis: Axes, panel: CamPanel) -> None:
    """The map in colour, more opaque where it is stronger, and the planted lesion's outline."""
    plane = panel.cam[panel.telling_slice] / max(float(panel.cam.max()), np.finfo(np.float32).tiny)
    axis.imshow(
        plane, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * plane, aspect=panel.pixel_aspect, interpolation="bicubic"
    )
    if panel.lesion is not None and panel.lesion[panel.telling_slice].any():
        axis.contour(panel.lesion[panel.telling_slice], levels=[0.5], colors="#39d0ff", linewidths=1.2)
