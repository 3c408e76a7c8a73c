"""Threads of the libraries that decode and run networks, set here and nowhere else: a number goes in, they keep to it.

Each library is loaded where it is set: who decodes needs no torch, and who scores no SimpleITK. What runs side by side
beyond them Ray places, which counts CPUs for it (`cpus`, `training_plan`).
"""

from typing import Any

# Of the libraries that decode one slice, in which more would only wait for each other. Source: ours, measured. Slices
# of a scan are decoded side by side by as many of Python's threads as score.decode.num_threads says.
SLICE_THREADS = 1
# The same for numpy, which reads it when it is loaded; Ray tells its workers to use about as many as are counted.
SLICE_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(SLICE_THREADS))


def set_decoder_threads() -> None:
    """Let SimpleITK and OpenCV use `SLICE_THREADS` in this process; imagecodecs is told with every slice.

    Of one thing nobody is asked: SimpleITK's reader of JPEG 2000 takes all cores for the slices that are left to it.
    """
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(SLICE_THREADS)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(SLICE_THREADS)


def set_model_threads(num_threads: int) -> None:
    """Threads torch and OpenCV may use here; for torch part of its numbers, as sums are split among them."""
    import cv2
    import torch

    torch.set_num_threads(num_threads)
    cv2.setNumThreads(num_threads)


def describe_openvino_threads(num_threads: int) -> dict[str, Any]:
    """The same for a network that OpenVINO compiles, as its properties.

    Threads are not pinned: several actors on a machine would all be pinned to its first cores.
    """
    return {"INFERENCE_NUM_THREADS": num_threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
