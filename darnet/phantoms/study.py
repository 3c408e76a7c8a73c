"""An archive of phantoms to try the paper's evaluation on: settings enter; scans, cohort table and truth leave.

Three severities of each disease, so that mild cases are there to be missed. The truth is each lesion's mask on the grid
of the standard volume.
"""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from darnet.config import VolumeConfig
from darnet.evaluation.truth import Truth, write_truth
from darnet.phantoms.archive import PhantomScan, build_phantom, store_phantom
from darnet.phantoms.canvas import Phantom
from darnet.scan import DIAGNOSES, FloatArray, Intensity
from darnet.storage import open_store
from darnet.volume import find_crop, resample_mask

SEVERITIES = (0.4, 0.7, 1.0)  # mild, moderate, severe. Source: ours; below 0.4 a training of minutes sees nothing
LAYOUTS = ("dicom", "nii.gz", "mha")  # that keep Hounsfield units and spacing
FIRST_SEED = 20_000  # of patients; the demo's lie below


@dataclass(frozen=True)
class PhantomStack:
    """A phantom as the scan it is, without any file between."""

    phantom: Phantom
    intensity: Intensity = Intensity.HU

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W."""
        depth, height, width = self.phantom.voxels_hu.shape
        return depth, height, width

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along z, y, x."""
        return self.phantom.spacing_mm

    def read_slice(self, index: int) -> FloatArray:
        """Shape: (rows, columns) float32."""
        pixels: FloatArray = self.phantom.voxels_hu[index].astype("float32")
        return pixels


def plan_study(num_train: int, num_test: int) -> list[PhantomScan]:
    """The cohort, so many scans of each diagnosis: neither layout nor severity nor cohort tells the diagnosis."""
    scans = []
    for label, diagnosis in enumerate(DIAGNOSES):
        for index in range(num_train + num_test):
            seed = FIRST_SEED + 1000 * label + index
            layout = LAYOUTS[index // len(SEVERITIES) % len(LAYOUTS)]
            cohort = "train" if index < num_train else "test"
            scans.append(PhantomScan(diagnosis, seed, layout, cohort, SEVERITIES[index % len(SEVERITIES)]))
    return scans


def write_study(
    scans: Sequence[PhantomScan], archive: Path, truth: Path, volume: VolumeConfig, on_written: Callable[[], None]
) -> None:
    """Write the scans and, of those for test, the truth; two at a time."""
    context = multiprocessing.get_context("spawn")
    write = functools.partial(write_study_scan, archive=archive, truth=truth, volume=volume)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for _ in pool.map(write, scans):
            on_written()


def write_study_scan(scan: PhantomScan, archive: Path, truth: Path, volume: VolumeConfig) -> None:
    """Write one phantom at its place, and what is known of it."""
    phantom = build_phantom(scan)
    store_phantom(phantom, scan, archive, volume.window_hu)
    if scan.cohort == "test":
        write_truth(open_store(str(truth), create=True), trace_truth(phantom, scan.source_key, volume))


def trace_truth(phantom: Phantom, scan_id: str, volume: VolumeConfig) -> Truth:
    """A phantom's masks on the grid that its scan is resampled to."""
    box = find_crop(PhantomStack(phantom), volume)
    depth_mm, height_mm, width_mm = (
        spacing * extent / size
        for spacing, extent, size in zip(
            phantom.spacing_mm, (box.num_slices, box.height, box.width), volume.shape, strict=True
        )
    )
    lesion, lung = (resample_mask(mask, box, volume.shape) for mask in (phantom.lesion, phantom.lung))
    return Truth(scan_id, lesion, lung, (depth_mm, height_mm, width_mm))
