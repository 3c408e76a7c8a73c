"""Figures: what is in the picture, judged by its pixels."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from darnet.report import CamPanel, draw_cam_figure, draw_case_figure
from darnet.scan import CropBox


def _panel() -> CamPanel:
    image = np.full((64, 80), 60, np.uint8)
    cam = np.zeros((8, 8), np.float32)
    cam[2:5, 2:5] = 1
    lesion = np.zeros(image.shape, np.bool_)
    lesion[10:50, 15:60] = True
    return CamPanel("NCP phantom", "CAM of NCP", image, cam, CropBox(1, 16, 24, 32, 32), lesion)


def test_the_map_is_coloured_beside_a_grey_slice_and_the_lesion_outlined(tmp_path: Path) -> None:
    draw_cam_figure([_panel(), _panel()], "heading", tmp_path / "cam.png")
    image = cv2.imread(str(tmp_path / "cam.png")).astype(int)
    middle, end = int(0.46 * image.shape[1]), int(0.92 * image.shape[1])  # beyond the end is the colour bar
    colour, blueness = np.ptp(image, axis=2), image[..., 0] - image[..., 2]
    assert (colour[:, :middle] > 40).mean() < 0.001  # the left column is grey
    assert (blueness[:, middle:end] < -40).mean() > 0.005  # the right one has warm colours
    assert (blueness[:, middle:end] > 60).sum() > 100  # and a blue outline


def test_the_map_lies_on_its_box_and_nowhere_else(tmp_path: Path) -> None:
    """The hot cells 2..4 of 8 cover rows 24..36 of 64 and columns 32..44 of 80 of the image."""
    panel = replace(_panel(), lesion=None, image=np.zeros((64, 80), np.uint8))
    draw_cam_figure([panel], "heading", tmp_path / "cam.png")
    image = cv2.imread(str(tmp_path / "cam.png")).astype(int)
    right = image[:, int(0.46 * image.shape[1]) : int(0.92 * image.shape[1])]
    black = np.argwhere(right.max(axis=2) < 5)
    top, left = black.min(axis=0)
    height, width = black.max(axis=0) - (top, left) + 1
    assert abs(width / height - 80 / 64) < 0.03
    warm = right[..., 2] - right[..., 0]
    rows, columns = np.nonzero(warm[top : top + height, left : left + width] > 30)
    centre = (rows.mean() + 0.5) * 64 / height, (columns.mean() + 0.5) * 80 / width
    assert np.abs(np.array(centre) - (30, 38)).max() < 2


def test_right_is_marked_only_where_the_side_is_known() -> None:
    for is_known, marks in ((True, ["R", "R"]), (False, [])):
        figure = draw_case_figure([[replace(_panel(), is_side_known=is_known)]], "cases")
        assert [text.get_text() for axis in figure.axes for text in axis.texts] == marks
