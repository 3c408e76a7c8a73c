"""Writers of phantoms: DICOM series, slice images and zips, as scanners and data sets leave them.

In goes a `Phantom`, out come files that all describe the same physical scan.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import cv2
import numpy as np
from natsort import natsorted
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from darnet.config import VolumeConfig
from darnet.phantoms.canvas import Phantom
from darnet.scan import Uint8Array
from darnet.volume import apply_window

IMAGE_SUFFIXES = (".png", ".jpg", ".tif")
WINDOW_HU = VolumeConfig().window_hu


class Axes(StrEnum):
    """How a slice's rows and columns lie in the patient; the physical scan is the same."""

    STANDARD = "standard"  # columns to the patient's left, rows backwards
    ROTATED = "rotated"  # both reversed, as for a prone patient shown face up
    MIRRORED = "mirrored"  # columns to the patient's right
    TRANSPOSED = "transposed"  # columns backwards, rows to the patient's left


# Direction cosines of a row, then of a column, in DICOM's patient axes (left, back, head).
ORIENTATION: dict[Axes, tuple[int, ...]] = {
    Axes.STANDARD: (1, 0, 0, 0, 1, 0),
    Axes.ROTATED: (-1, 0, 0, 0, -1, 0),
    Axes.MIRRORED: (-1, 0, 0, 0, 1, 0),
    Axes.TRANSPOSED: (0, 1, 0, 1, 0, 0),
}


@dataclass(frozen=True)
class DicomStyle:
    """How one physical scan is put into DICOM. An intercept above -1024 stores signed values."""

    transfer_syntax: str = ExplicitVRLittleEndian
    axes: Axes = Axes.STANDARD
    feet_first: bool = False  # InstanceNumber counts from the feet
    rescale_intercept: int = -1024
    manufacturer: str = "SIEMENS"


def write_dicom(
    phantom: Phantom,
    folder: Path,
    *,
    style: DicomStyle = DicomStyle(),
    patient_id: str | None = None,
    series: int = 1,
) -> list[Path]:
    """Write a CT series, one file a slice, names in no order. Identifiers follow from the patient and `series`.

    Returns: the paths from head to feet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    patient = patient_id or f"PHANTOM-{phantom.seed:06d}"
    depth = len(phantom.voxels_hu)
    names = np.random.default_rng([phantom.seed, series]).permutation(depth)
    paths = []
    for index in range(depth):
        slice_ = _describe_series(phantom, style, patient, series)
        _describe_slice(slice_, phantom, style, index)
        _store_pixels(slice_, phantom.voxels_hu[index], style)
        paths.append(folder / f"IM{names[index] + 1:05d}.dcm")
        slice_.save_as(paths[-1], enforce_file_format=True)
    return paths


def _make_uid(*parts: object) -> str:
    """A UID that is the same for the same parts."""
    return generate_uid(entropy_srcs=["darnet phantom", *map(str, parts)])


def _describe_series(phantom: Phantom, style: DicomStyle, patient_id: str, series: int) -> Dataset:
    """What all slices of a CT series share."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.SOPClassUID = CTImageStorage
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Modality = "CT"
    data.Manufacturer = style.manufacturer
    data.PatientName, data.PatientID = f"Phantom^{patient_id}", patient_id
    data.PatientBirthDate, data.PatientSex = "", ""
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = "20200301"
    data.StudyTime = data.SeriesTime = "120000"
    data.AccessionNumber, data.ReferringPhysicianName, data.StudyID = "", "", "1"
    data.StudyInstanceUID = _make_uid(patient_id, phantom.seed, "study")
    data.SeriesInstanceUID = _make_uid(patient_id, phantom.seed, "series", series)
    data.FrameOfReferenceUID = _make_uid(patient_id, phantom.seed, "frame")
    data.PositionReferenceIndicator = ""
    data.SeriesNumber, data.AcquisitionNumber = series, 1
    data.PatientPosition = "FFS" if style.feet_first else "HFS"
    data.KVP = 120
    data.WindowCenter, data.WindowWidth = -600, 1500
    return data


def _describe_slice(data: Dataset, phantom: Phantom, style: DicomStyle, index: int) -> None:
    """What is one slice's own: its identity and where it lies in the patient."""
    depth, height, width = phantom.voxels_hu.shape
    thickness, dy, dx = phantom.spacing_mm
    data.SOPInstanceUID = _make_uid(data.SeriesInstanceUID, index)
    data.InstanceNumber = depth - index if style.feet_first else index + 1
    orientation = ORIENTATION[style.axes]
    left, back = -(width - 1) * dx / 2, -(height - 1) * dy / 2
    if style.axes in (Axes.ROTATED, Axes.MIRRORED):
        left = -left
    if style.axes is Axes.ROTATED:
        back = -back
    data.ImageOrientationPatient = list(orientation)
    data.ImagePositionPatient = [round(left, 5), round(back, 5), round(-index * thickness, 5)]
    data.SliceLocation = round(-index * thickness, 5)
    data.SliceThickness = thickness
    data.PixelSpacing = [dx, dy] if style.axes is Axes.TRANSPOSED else [dy, dx]


def _store_pixels(data: Dataset, slice_hu: NDArray[np.int16], style: DicomStyle) -> None:
    """Turn a slice into stored values, lay it along the style's axes, and encode it."""
    turned = _turn(slice_hu, style.axes)
    signed = style.rescale_intercept > -1024
    stored = np.ascontiguousarray(turned - style.rescale_intercept).astype(np.int16 if signed else np.uint16)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16 if signed else 12, 15 if signed else 11
    data.PixelRepresentation = int(signed)
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = style.rescale_intercept, 1, "HU"
    syntax = UID(style.transfer_syntax)
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    data["PixelData"].VR = "OW"
    if syntax.is_encapsulated:
        data.compress(syntax, generate_instance_uid=False)


def _turn(slice_hu: NDArray[np.int16], axes: Axes) -> NDArray[np.int16]:
    """Lay a canonical slice along other axes."""
    if axes is Axes.ROTATED:
        return slice_hu[::-1, ::-1]
    if axes is Axes.MIRRORED:
        return slice_hu[:, ::-1]
    return slice_hu.T if axes is Axes.TRANSPOSED else slice_hu


def render_display(phantom: Phantom, window_hu: tuple[float, float] = WINDOW_HU) -> Uint8Array:
    """What the phantom looks like as 8-bit images: (D, H, W)."""
    display: Uint8Array = np.rint(255 * apply_window(phantom.voxels_hu.astype(np.float32), window_hu)).astype(np.uint8)
    return display


def write_slice_images(
    phantom: Phantom, folder: Path, suffix: str = ".png", window_hu: tuple[float, float] = WINDOW_HU
) -> list[Path]:
    """Write 1.png, 2.png, ... from head to feet, as CC-CCII stores its scans: no orientation, no spacing.

    Raises: ValueError for a suffix that is not one of IMAGE_SUFFIXES.
    """
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"suffix {suffix!r} is none of {IMAGE_SUFFIXES}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(render_display(phantom, window_hu), start=1):
        paths.append(folder / f"{number}{suffix}")
        if not cv2.imwrite(str(paths[-1]), image):
            raise OSError(f"{paths[-1]}: could not be written")
    return paths


def write_zip(folder: Path, path: Path) -> Path:
    """Pack a folder of slices into one zip; the same files give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members: Sequence[Path] = natsorted(item for item in folder.iterdir() if item.is_file())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            entry = zipfile.ZipInfo(f"{folder.name}/{member.name}")  # its date is fixed
            archive.writestr(entry, member.read_bytes(), zipfile.ZIP_DEFLATED)
    return path
