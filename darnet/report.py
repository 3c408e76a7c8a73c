"""What people look at: slices beside their activation maps, as a figure. Every figure says "research use only"."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from darnet import RESEARCH_USE
from darnet.scan import BoolArray, CropBox, FloatArray, Uint8Array

INK, PAPER = "#e8e8e8", "#111418"
CAM_COLOURS = "inferno"


@dataclass(frozen=True)
class CamPanel:
    """One slice of a CAM figure, in radiological convention: the patient's right is on the left of the picture, and
    marked, where the side is known; slice images do not say it.

    Shape: `image` (rows, columns), and `lesion` the same or None where the truth is not known; `cam` (h, w), spread
           over the part `box` of the image.
    Units: `cam` is a share of the whole map's maximum; `pixel_aspect` the height of a pixel over its width.
    """

    title: str
    caption: str
    image: Uint8Array
    cam: FloatArray
    box: CropBox
    lesion: BoolArray | None
    pixel_aspect: float = 1.0
    is_side_known: bool = True


def draw_cam_figure(panels: Sequence[CamPanel], heading: str, path: Path) -> None:
    """Write a PNG with a row for each panel: the slice, and the same slice under its map.

    Source: paper Fig. 2.
    """
    figure = Figure(figsize=(9.4, 3.2 * len(panels) + 0.9), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{heading}\n{RESEARCH_USE}", color=INK, fontsize=12)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        _draw_slice(row[0], panel, panel.title)
        _draw_slice(row[1], panel, panel.caption)
        _overlay_cam(row[1], panel)
    _draw_bar(figure, axes[:, 1])
    figure.savefig(path, dpi=110)


def draw_case_figure(cases: Sequence[Sequence[CamPanel]], heading: str) -> Figure:
    """A row for each case: the slice, then the same slice under each network's map.

    Every case has one panel a network, all of one slice; a panel's caption stands over its map.
    Source: paper Fig. 2.
    """
    num_columns = 1 + len(cases[0])
    first = cases[0][0]
    height = 2.6 * first.pixel_aspect * first.image.shape[0] / first.image.shape[1] + 0.45
    figure = Figure(figsize=(2.6 * num_columns + 0.9, height * len(cases) + 0.7), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{heading}\n{RESEARCH_USE}", color=INK, fontsize=12)
    axes = figure.subplots(len(cases), num_columns, squeeze=False)
    for row, panels in zip(axes, cases, strict=True):
        _draw_slice(row[0], panels[0], panels[0].title)
        for axis, panel in zip(row[1:], panels, strict=True):
            _draw_slice(axis, panel, panel.caption)
            _overlay_cam(axis, panel)
    _draw_bar(figure, axes[:, -1])
    return figure


def _draw_slice(axis: Axes, panel: CamPanel, title: str) -> None:
    axis.imshow(panel.image, cmap="gray", vmin=0, vmax=255, aspect=panel.pixel_aspect, interpolation="bicubic")
    axis.set_title(title, color=INK, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if panel.is_side_known:
        axis.text(0.02, 0.96, "R", color=INK, fontsize=9, transform=axis.transAxes, va="top")


def _draw_bar(figure: Figure, axes: NDArray[Any]) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), CAM_COLOURS), ax=axes, shrink=0.4, aspect=30)
    bar.set_label("share of the map's maximum", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)


def _overlay_cam(axis: Axes, panel: CamPanel) -> None:
    """The map in colour, more opaque where it is stronger, and the planted lesion's outline."""
    top, left = panel.box.top - 0.5, panel.box.left - 0.5
    axis.imshow(
        panel.cam,
        cmap=CAM_COLOURS,
        vmin=0,
        vmax=1,
        alpha=0.6 * panel.cam,
        extent=(left, left + panel.box.width, top + panel.box.height, top),
        aspect=panel.pixel_aspect,
        interpolation="bilinear",
    )
    axis.set_xlim(-0.5, panel.image.shape[1] - 0.5)
    axis.set_ylim(panel.image.shape[0] - 0.5, -0.5)
    if panel.lesion is not None and panel.lesion.any():
        axis.contour(panel.lesion, levels=[0.5], colors="#39d0ff", linewidths=1.0)
