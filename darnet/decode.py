"""Files in, pixels out: the only module that reads with SimpleITK, and the place where x, y, z is turned into z, y, x.

DICOM slices come as Hounsfield units (the rescale is applied here, once), slice images as 8-bit display values.
"""

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
from natsort import os_sorted
from numpy.typing import NDArray

from darnet.config import DecodeConfig
from darnet.errors import ScanError, Status, name_file
from darnet.reading.dicom import MISSING_RATIO
from darnet.reading.stored_pixels import (
    PNG_HEAD_BYTES,
    parse_gray_size,
    read_gray_jpeg,
    read_gray_png,
    read_stored_pixels,
)
from darnet.reading.volume_file import check_axes, check_volume_file
from darnet.scan import FloatArray, Intensity, PixelLayout, StagedFile, Uint8Array

# A reader chosen by the suffix, which was checked by it: chosen by content, it could be one that was not.
VOLUME_READERS = {".nii": "NiftiImageIO", ".gz": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".mha": "MetaImageIO"}
IMAGE_READERS = {
    ".png": "PNGImageIO",
    **dict.fromkeys((".jpg", ".jpeg"), "JPEGImageIO"),
    **dict.fromkeys((".tif", ".tiff"), "TIFFImageIO"),
}

EVEN_SHARE = 0.6  # of the steps between numbers, more than which are the same: fewer are a scan thinned out evenly

# How a file begins, which ITK's PNG reader does not look at. Source: PNG specification, ITU T.81 (SOI), TIFF 6.0.
_BEGINNINGS = {"PNGImageIO": (b"\x89PNG\r\n\x1a\n",), "JPEGImageIO": (b"\xff\xd8\xff",), "TIFFImageIO": (b"II", b"MM")}
# How a complete file ends; a cut one does not. Source: PNG specification (IEND chunk), ITU T.81 (EOI marker).
_ENDINGS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9"}
_TAIL_BYTES = 64  # in which it is looked for: some writers add a few bytes behind the end

PixelsT = TypeVar("PixelsT", FloatArray, Uint8Array)


@dataclass(frozen=True)
class VolumeStack:
    """A whole volume file, turned to canonical axes. `voxels_hu` (D, H, W) in the file's own kind of number."""

    voxels_hu: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    intensity: Intensity = Intensity.HU

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns."""
        depth, height, width = self.voxels_hu.shape
        return depth, height, width

    def read_slice(self, index: int) -> FloatArray:
        """One slice of the volume already in memory, (rows, columns) float32 HU."""
        slice_hu: FloatArray = self.voxels_hu[index].astype(np.float32)
        return slice_hu


@dataclass(frozen=True)
class ImageStack:
    """A folder of 8-bit slice images, head first. They have no spacing."""

    files: tuple[StagedFile, ...]
    shape: tuple[int, int, int]
    spacing_mm: None = None
    intensity: Intensity = Intensity.DISPLAY

    def read_slice(self, index: int) -> Uint8Array:
        """Decode one image; (rows, columns) uint8 display values.

        Raises: ScanError(BAD_PIXELS) for colour, or pixels that do not decode.
        """
        with name_file(self.files[index].label):
            path, gray = self.files[index].path, None
            if path.suffix == ".png":
                gray = read_gray_png(path)
            elif path.suffix in (".jpg", ".jpeg"):
                gray = read_gray_jpeg(path, self.shape[1:])
            pixels: NDArray[Any] = _read_pixels(path) if gray is None else gray
            if pixels.ndim == 3:
                if pixels.shape[2] < 3 or np.ptp(pixels[..., :3], axis=2).any():
                    raise ScanError(Status.BAD_PIXELS, "slice image is in colour")
                pixels = pixels[..., 0]
            return check_size(pixels, self.shape[1:])


def check_size(pixels: PixelsT, size: tuple[int, int]) -> PixelsT:
    """The pixels, if they are as many as the slice's header says.

    Raises: ScanError(BAD_PIXELS).
    """
    if pixels.shape != size:
        raise ScanError(Status.BAD_PIXELS, f"slice decodes to {pixels.shape} pixels, its header says {size}")
    return pixels


def read_dicom_slice(path: Path, layout: PixelLayout | None = None) -> FloatArray:
    """Decode one DICOM slice in any transfer syntax GDCM knows, by a faster way to the same values where there is one.

    Shape:  (rows, columns) float32, as stored.
    Units:  HU; slope and intercept are applied.
    Raises: ScanError(BAD_PIXELS) if its pixels do not decode.
    """
    fast = None if layout is None else read_stored_pixels(path, layout)
    if fast is not None:
        return fast
    pixels = _read_pixels(path, "GDCMImageIO")
    if pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 2:
        raise ScanError(Status.BAD_PIXELS, f"slice decodes to {pixels.ndim} dimensions")
    return pixels.astype(np.float32)


def open_volume(path: Path, limits: DecodeConfig) -> VolumeStack:
    """Read a NIfTI, NRRD or MetaImage volume and turn it to canonical axes.

    It is in memory as a whole: mostly it is compressed in one stream, and turned it may have slices along any of its
    stored axes. While it is turned SimpleITK holds it three times, and later it is here once.

    Raises: ScanError: BAD_LIMIT, BAD_PIXELS, BAD_GEOMETRY, BAD_INTENSITY, BAD_TILT, BAD_TRUNCATED, BAD_UNREADABLE,
            SKIP_FEW_SLICES, SKIP_ORIENTATION.
    """
    check_volume_file(path, limits)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(VOLUME_READERS[path.suffix])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        _check_volume(size, components, reader.GetSpacing(), limits)
        _check_slices(size, np.array(reader.GetDirection()), limits)
        image = reader.Execute()
        image = image[:, :, :, 0] if len(size) == 4 else image
        check_axes(np.array(image.GetDirection()).reshape(3, 3))
        # LPS puts x to the patient's left and y to the back; z then rises to the head and is turned last.
        image = sitk.DICOMOrient(image, "LPS")
    except RuntimeError as error:
        raise _explain(error, Status.BAD_UNREADABLE, "volume file does not decode") from error
    voxels_hu = sitk.GetArrayFromImage(image)[::-1]
    if len(voxels_hu) < limits.min_slices:
        raise ScanError(Status.SKIP_FEW_SLICES, f"{len(voxels_hu)} slices, {limits.min_slices} needed")
    with np.errstate(over="ignore"):  # a double that is too large for a float is none of its numbers either
        is_finite = voxels_hu.dtype.kind != "f" or all(np.isfinite(each.astype(np.float32)).all() for each in voxels_hu)
    if not is_finite:
        raise ScanError(Status.BAD_INTENSITY, "volume holds values that are no numbers")
    x_mm, y_mm, z_mm = image.GetSpacing()
    return VolumeStack(voxels_hu, (z_mm, y_mm, x_mm))


def write_volume(path: Path, voxels_hu: NDArray[np.int16], spacing_mm: tuple[float, float, float]) -> None:
    """Write canonical voxels (D, H, W) with (z, y, x) spacing as NIfTI, NRRD or MetaImage, by the path's suffix."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels_hu[::-1]))
    image.SetSpacing([float(value) for value in reversed(spacing_mm)])
    sitk.WriteImage(image, str(path), useCompression=True)


def open_images(files: Sequence[StagedFile], limits: DecodeConfig, *, is_head_first: bool) -> ImageStack:
    """Order slice images by their names, as a person would, and check every header and ending.

    Raises: ScanError: BAD_LIMIT, BAD_MISSING_SLICE, BAD_MIXED_SERIES, BAD_PIXELS, BAD_TRUNCATED, BAD_UNREADABLE,
            SKIP_FEW_SLICES.
    """
    if len(files) > limits.max_slices:
        raise ScanError(Status.BAD_LIMIT, f"{len(files)} slices, at most {limits.max_slices}")
    names = [file.name for file in files]
    file_of = dict(zip(names, files, strict=True))
    if len({name.rpartition(".")[0] for name in names}) < len(names):
        raise ScanError(Status.BAD_MIXED_SERIES, "slices of one name in two image formats")
    if len({name.rpartition("/")[0] for name in names}) > 1:
        raise ScanError(Status.BAD_MIXED_SERIES, "several folders of images in one zip")
    ordered = [file_of[name] for name in os_sorted(names)]
    if not is_head_first:
        ordered.reverse()
    sizes, are_whole = set[tuple[int, int]](), list[bool | None]()
    for file in ordered:
        with name_file(file.label):
            size, is_whole = _read_image_header(file.path)
            sizes.add(size)
            are_whole.append(is_whole)
    if len(sizes) > 1:
        raise ScanError(Status.BAD_MIXED_SERIES, f"{len(sizes)} image sizes in one folder")
    (height, width) = sizes.pop()
    if len(ordered) * height * width > limits.max_scan_bytes:
        raise ScanError(Status.BAD_LIMIT, f"more than {limits.max_scan_bytes} bytes decoded")
    for file, is_whole in zip(ordered, are_whole, strict=True):
        with name_file(file.label):
            _check_whole(file.path, is_whole)
    if len(ordered) < limits.min_slices:
        raise ScanError(Status.SKIP_FEW_SLICES, f"{len(ordered)} slices, {limits.min_slices} needed")
    _check_numbers(names)
    return ImageStack(tuple(ordered), (len(ordered), height, width))


def _check_numbers(names: Sequence[str]) -> None:
    """Refuse a hole in otherwise evenly numbered slices; any number may be the first, and any step the even one.

    Names that differ in more than one number, and numbers without a step of their own, say nothing about holes.
    """
    parts = [re.split(r"(\d+)", name.rpartition(".")[0]) for name in names]
    columns = [set(column) for column in zip(*parts, strict=False)]
    varying = [index for index, column in enumerate(columns) if len(column) > 1]
    if len({len(part) for part in parts}) > 1 or len(varying) != 1 or varying[0] % 2 == 0:
        return
    steps = np.diff(sorted(int(part[varying[0]]) for part in parts))
    step = float(np.median(steps))
    num_holes = int((steps > MISSING_RATIO * step).sum())
    if num_holes and (steps == step).mean() > EVEN_SHARE:
        raise ScanError(Status.BAD_MISSING_SLICE, f"{num_holes} holes in the numbers of the slices")


def _read_pixels(path: Path, image_io: str | None = None) -> FloatArray:
    """Decode a file by this reader, or by that of an image's suffix."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io or IMAGE_READERS[path.suffix])
    reader.SetFileName(str(path))
    try:
        pixels: FloatArray = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise _explain(error, Status.BAD_PIXELS, "slice does not decode") from error
    return pixels


def _explain(error: RuntimeError, status: Status, detail: str) -> Exception:
    """SimpleITK has one exception for everything; only a lack of memory may pass another time."""
    lacks_memory = any(words in str(error) for words in ("bad_alloc", "Failed to allocate", "MemoryAllocation"))
    return MemoryError() if lacks_memory else ScanError(status, detail)


def _check_volume(size: tuple[int, ...], components: int, spacing_mm: tuple[float, ...], limits: DecodeConfig) -> None:
    """Judge a volume file by its header, before its voxels are read."""
    if components != 1 or len(size) not in (3, 4) or (len(size) == 4 and size[3] != 1):
        raise ScanError(Status.BAD_PIXELS, f"{len(size)} dimensions of {components} values; a scan has 3 of 1")
    if 2 * size[0] * size[1] * size[2] > limits.max_scan_bytes:
        raise ScanError(Status.BAD_LIMIT, f"more than {limits.max_scan_bytes} bytes decoded")
    finest, middle, coarsest = sorted(spacing_mm[:3])  # the coarsest may be that of slices, which has no limit
    if not (finest > 0.01 and middle < 100 and math.isfinite(coarsest)):
        raise ScanError(Status.BAD_GEOMETRY, f"voxels of {spacing_mm} mm")


def _check_slices(size: tuple[int, ...], direction: NDArray[np.float64], limits: DecodeConfig) -> None:
    """Also by its header. Slices lie along the axis that runs most from feet to head, as they are turned later."""
    heights = np.abs(direction.reshape(len(size), len(size))[2, :3])
    num_slices = size[int(heights.argmax())]
    if num_slices > limits.max_slices:
        raise ScanError(Status.BAD_LIMIT, f"{num_slices} slices, at most {limits.max_slices}")


def _read_image_header(path: Path) -> tuple[tuple[int, int], bool | None]:
    """Rows and columns of an 8-bit image by its header, and whether its end is there; None where nothing marks it.

    A file is opened once, and only its two ends are read, unless SimpleITK must tell its size.
    """
    image_io, ending = IMAGE_READERS[path.suffix], _ENDINGS.get(path.suffix)
    with path.open("rb", buffering=0) as file:
        head = file.read(PNG_HEAD_BYTES)
        if not head.startswith(_BEGINNINGS[image_io]):
            raise ScanError(Status.BAD_UNREADABLE, "slice image is not what its suffix says")
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
        is_whole = None if ending is None else ending in file.read()
    size = parse_gray_size(head) if image_io == "PNGImageIO" else None
    return size or _ask_image_size(path, image_io), is_whole


def _ask_image_size(path: Path, image_io: str) -> tuple[int, int]:
    """Rows and columns of an 8-bit image, by SimpleITK."""
    if image_io == "TIFFImageIO":
        _check_pages(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(Status.BAD_UNREADABLE, "slice image has no readable header") from error
    if reader.GetPixelID() not in (sitk.sitkUInt8, sitk.sitkVectorUInt8):
        raise ScanError(Status.BAD_PIXELS, "slice image is not 8-bit")
    width, height = reader.GetSize()[:2]
    return height, width


def _check_pages(path: Path) -> None:
    """Demand one page of a TIFF: its reader follows a chain of pages for ever where that is a ring.

    Source: TIFF 6.0, image file directory; BigTIFF has 43 for 42.
    """
    with path.open("rb") as file:
        order = {b"II": "<", b"MM": ">"}[file.read(2)]
        try:
            (version,) = struct.unpack(f"{order}H", file.read(2))
            count, offset, entry_bytes = ("Q", "4xQ", 20) if version == 43 else ("H", "I", 12)
            file.seek(*struct.unpack(order + offset, file.read(struct.calcsize(order + offset))))
            (num_entries,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
            file.seek(entry_bytes * num_entries, 1)
            has_more = any(file.read(8 if version == 43 else 4))
        except (struct.error, OverflowError, OSError) as error:
            raise ScanError(Status.BAD_UNREADABLE, "slice image has no readable header") from error
    if has_more:
        raise ScanError(Status.BAD_PIXELS, "several pages in one slice image")


def _check_whole(path: Path, is_whole: bool | None) -> None:
    """Demand an image's end; nothing marks a TIFF's, so that it is decoded instead."""
    if is_whole is None:
        _read_pixels(path)
    elif not is_whole:
        raise ScanError(Status.BAD_TRUNCATED, "slice image ends early")
