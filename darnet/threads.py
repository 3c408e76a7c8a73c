"""The threads of a process that computes: a number enters, and torch and OpenCV keep to it.

SimpleITK's are set in `decode`, which alone knows it; OpenVINO takes the same number with each network it compiles.
"""

import cv2
import torch


def set_num_threads(num_threads: int) -> None:
    """Threads torch and OpenCV may use here; for torch part of its numbers, as sums are split among them."""
    torch.set_num_threads(num_threads)
    cv2.setNumThreads(num_threads)
