"""Small CT scans for tests: a lopsided chest in HU, written as DICOM with any tag one wants to spoil."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SHAPE = (24, 64, 64)
SPACING_MM = (12.0, 6.0, 6.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SERIES_UID = "1.2.3.4.5"

Voxels = NDArray[np.int16]


def make_chest(shape: tuple[int, int, int] = SHAPE) -> Voxels:
    """Body, two lungs of different size, heart on the left, liver at the right base: no two axes look alike."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    voxels = np.full(shape, -1000, np.int16)
    voxels[(x / 0.85) ** 2 + (y / 0.6) ** 2 < 1] = 40
    for centre, radius in ((-0.38, 0.3), (0.4, 0.26)):
        voxels[((x - centre) / radius) ** 2 + (y / 0.42) ** 2 + (z / 0.85) ** 2 < 1] = -850
    voxels[((x - 0.18) / 0.2) ** 2 + ((y + 0.15) / 0.22) ** 2 + ((z - 0.2) / 0.4) ** 2 < 1] = 45
    voxels[((x + 0.4) / 0.35) ** 2 + (y / 0.5) ** 2 + ((z - 0.95) / 0.4) ** 2 < 1] = 60
    return voxels


def make_slice(pixels_hu: Voxels, position_mm: Sequence[float], **tags: Any) -> FileDataset:
    """One CT slice as a DICOM object, stored unsigned with intercept -1024; `tags` replace or, as None, remove tags."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, "1.2.3", "CT"
    dataset.SeriesInstanceUID, dataset.PatientID, dataset.Manufacturer = SERIES_UID, "patient-1", "SIEMENS"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = pixels_hu.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelSpacing = list(SPACING_MM[1:])
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position_mm), list(AXIAL)
    dataset.PixelData = (pixels_hu.astype(np.int32) + 1024).astype("<u2").tobytes()
    _apply(dataset, tags)
    return dataset


def _apply(dataset: Dataset, tags: dict[str, Any]) -> None:
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)


def write_chest(
    folder: Path, voxels: Voxels | None = None, edit: Callable[[int, FileDataset], None] | None = None, **tags: Any
) -> list[Path]:
    """Write a series head first, names in no order; `edit` may change slice `index` before it is written."""
    voxels = make_chest() if voxels is None else voxels
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, pixels in enumerate(voxels):
        dataset = make_slice(pixels, (-190.0, -190.0, 500.0 - SPACING_MM[0] * index), **tags)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{index}"
        if edit is not None:
            edit(index, dataset)
        paths.append(folder / f"{(index * 7) % len(voxels):03d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths
