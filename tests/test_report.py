"""Figures: what is in the picture, judged by its pixels."""

from pathlib import Path

import cv2
import numpy as np

from darnet.report import CamPanel, draw_cam_figure


def _panel(hot_slice: int) -> CamPanel:
    voxels = np.full((8, 32, 32), 60, np.uint8)
    cam = np.zeros((8, 32, 32), np.float32)
    cam[hot_slice, 10:20, 10:20] = 1
    lesion = np.zeros(cam.shape, np.bool_)
    lesion[hot_slice, 5:27, 5:27] = True
    return CamPanel("NCP phantom", "CAM of NCP", voxels, cam, lesion)


def test_the_telling_slice_holds_most_of_the_map() -> None:
    assert _panel(5).telling_slice == 5


def test_the_map_is_coloured_beside_a_grey_slice_and_the_lesion_outlined(tmp_path: Path) -> None:
    draw_cam_figure([_panel(3), _panel(6)], "heading", tmp_path / "cam.png")
    image = cv2.imread(str(tmp_path / "cam.png")).astype(int)
    half = image.shape[1] // 2
    colour = np.ptp(image, axis=2)
    assert (colour[:, :half] > 40).mean() < 0.001  # the left column is grey
    assert (colour[:, half:] > 40).mean() > 0.03  # the right one is not
    blue = (image[..., 0] > 180) & (image[..., 2] < 120)
    assert blue[:, half:].sum() > 100
