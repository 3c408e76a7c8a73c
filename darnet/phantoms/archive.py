"""Archives of phantoms: which scan lies where and in which format enters; files and a cohort table leave."""

import functools
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pandas as pd
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from darnet.decode import write_volume
from darnet.phantom import make_phantom
from darnet.phantoms.canvas import Phantom
from darnet.phantoms.files import DicomStyle, write_dicom, write_slice_images, write_zip
from darnet.scan import Diagnosis

WindowHU: TypeAlias = tuple[float, float]

SHAPE = (32, 144, 144)
STYLES = {
    "dicom": DicomStyle(),
    "zip": DicomStyle(manufacturer="Philips"),
    "jpeg2000": DicomStyle(JPEG2000Lossless, rescale_intercept=0, manufacturer="GE MEDICAL SYSTEMS"),
    "jpegls": DicomStyle(JPEGLSLossless, feet_first=True, manufacturer="Philips"),
    "rle": DicomStyle(RLELossless, manufacturer="TOSHIBA"),
}


@dataclass(frozen=True)
class PhantomScan:
    """One phantom of an archive: what it shows, where, in which cohort, and how severe (0 to 1)."""

    diagnosis: Diagnosis
    seed: int
    layout: str
    cohort: str
    severity: float

    @property
    def source_key(self) -> str:
        """Where it lies in the archive."""
        if self.layout in ("png", "jpg", "tif"):
            return f"images/{self.diagnosis}/{self.patient_id}/1"
        if self.layout in STYLES and self.layout != "zip":
            return f"{self.layout}/{self.patient_id}"
        return f"files/{self.patient_id}.{self.layout}"

    @property
    def patient_id(self) -> str:
        """One patient a phantom."""
        return f"P{self.seed:05d}"


def write_archive(
    scans: Sequence[PhantomScan], archive: Path, window_hu: WindowHU, on_written: Callable[[], None]
) -> None:
    """Write the scans, two at a time; those of 8-bit images in this window."""
    context = multiprocessing.get_context("spawn")
    write = functools.partial(write_scan, archive=archive, window_hu=window_hu)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for _ in pool.map(write, scans):
            on_written()


def write_scan(scan: PhantomScan, archive: Path, window_hu: WindowHU) -> None:
    """Write one phantom at its place."""
    store_phantom(build_phantom(scan), scan, archive, window_hu)


def store_phantom(phantom: Phantom, scan: PhantomScan, archive: Path, window_hu: WindowHU) -> None:
    """Write a phantom at a scan's place, in the scan's layout."""
    path = archive / scan.source_key
    path.parent.mkdir(parents=True, exist_ok=True)
    if scan.layout == "zip":
        slices = path.with_suffix(".slices")
        write_dicom(phantom, slices, style=STYLES["zip"], patient_id=scan.patient_id)
        write_zip(slices, path)
        shutil.rmtree(slices)
    elif scan.layout in STYLES:
        write_dicom(phantom, path, style=STYLES[scan.layout], patient_id=scan.patient_id)
    elif scan.layout in ("png", "jpg", "tif"):
        write_slice_images(phantom, path, f".{scan.layout}", window_hu)
    else:
        write_volume(path, phantom.voxels_hu, phantom.spacing_mm)


def build_phantom(scan: PhantomScan) -> Phantom:
    """The phantom behind a scan, the same every time."""
    return make_phantom(scan.diagnosis, scan.seed, severity=scan.severity, shape=SHAPE)


def write_cohort(scans: Sequence[PhantomScan], path: Path) -> None:
    """The cohort table, as a research group would bring it."""
    columns = ("source_key", "patient_id", "diagnosis", "cohort")
    frame = pd.DataFrame([[str(getattr(scan, name)) for name in columns] for scan in scans], columns=columns)
    frame.rename(columns={"source_key": "scan_id"}).to_csv(path, index=False)
