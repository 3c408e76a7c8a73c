"""DICOM files of one source in; its series out, each either in canonical order with its geometry checked or refused.

Only headers are read here, of every slice, with the declared length of the pixels; pixels are decoded elsewhere.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage

from darnet.config import OBLIQUE_DEGREES, TILT_DEGREES, DecodeConfig
from darnet.errors import ScanError, Status, name_file
from darnet.reading.excerpt import MissingBytes, open_staged
from darnet.reading.pixel_length import Header, find_damage
from darnet.reading.plain_header import NEEDED_TAGS, read_plain_header
from darnet.scan import Manufacturer, PixelLayout, StagedFile

# Source: ours. A table feeds to a few hundredths of a mm; a tenth of a slice is beyond rounding in any header seen.
DUPLICATE_MM = 0.01
MISSING_RATIO = 1.5
IRREGULAR_RATIO = 0.25
MIN_AXIAL_COSINE = math.cos(math.radians(OBLIQUE_DEGREES))
MAX_SIDE = 8192
MAX_POSITION_MM = 1e6

_MAKERS = (
    ("ge medical", Manufacturer.GE),
    ("siemens", Manufacturer.SIEMENS),
    ("philips", Manufacturer.PHILIPS),
    ("canon", Manufacturer.CANON),
    ("toshiba", Manufacturer.CANON),
    ("united imaging", Manufacturer.UNITED_IMAGING),
    ("uih", Manufacturer.UNITED_IMAGING),
)


@dataclass(frozen=True)
class SliceHeader:
    """What the header of one DICOM file says, as far as scoring needs it; None where it says nothing usable."""

    file: StagedFile
    series_uid: str
    patient_id: str
    modality: str
    is_secondary: bool
    image_type: tuple[str, ...]
    manufacturer: Manufacturer | None
    num_frames: int
    num_samples: int
    rows: int
    columns: int
    bits_allocated: int
    has_sound_bits: bool
    pixel_spacing_mm: tuple[float, ...] | None
    has_sound_rescale: bool
    has_rescale: bool
    position_mm: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    tilt_degrees: float
    layout: PixelLayout | None
    damage: ScanError | None


@dataclass(frozen=True)
class DicomSeries:
    """One series in canonical order: files head first with the layouts of their pixels, and how to turn each slice.

    What all headers must agree on is taken from that of `spokesman`.
    Units: `spacing_mm` (z, y, x) in mm. Shape: `shape` is slices, rows, columns after turning.
    """

    files: tuple[StagedFile, ...]
    spokesman: StagedFile
    layouts: tuple[PixelLayout | None, ...]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    is_transposed: bool
    is_row_flipped: bool
    is_column_flipped: bool

    def turn(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Stored (rows, columns) to canonical: rows front to back, columns the patient's right to left."""
        if self.is_transposed:
            pixels = pixels.T
        return pixels[:: -1 if self.is_row_flipped else 1, :: -1 if self.is_column_flipped else 1]


def read_header(file: StagedFile, *, by_pydicom: bool = False) -> SliceHeader | None:
    """Read one file's header and check that its pixels are as long as declared.

    A file without magic word counts if it parses to an object with a SOP class; otherwise it is no DICOM: None. Plain
    headers are read without pydicom, to the same values, unless it is asked for.
    Raises: ScanError(BAD_UNREADABLE) for a file that claims to be DICOM and is not readable as such; MissingBytes where
            only an excerpt is there, and it does not hold what was looked for.
    """
    with warnings.catch_warnings(), open_staged(file) as body:
        warnings.simplefilter("ignore")
        is_claimed = body.read(132)[128:] == b"DICM"  # behind DICOM's preamble
        try:
            dataset = (None if by_pydicom else _read_plainly(body)) or _read_by_pydicom(body)
            if "SOPClassUID" in dataset:
                return _describe(dataset, file, body)
        except (MemoryError, MissingBytes):
            raise
        except Exception as error:  # pydicom raises nearly every built-in exception on hostile input
            if isinstance(error, OSError) and error.errno is not None:
                raise  # trouble of this machine; pydicom's own for a cut file has no number
            if is_claimed:
                raise ScanError(Status.BAD_UNREADABLE, f"header does not parse: {type(error).__name__}") from error
    if is_claimed:
        raise ScanError(Status.BAD_UNREADABLE, "DICOM file without a single needed tag")
    return None


def _read_plainly(body: BinaryIO) -> Header | None:
    try:
        return read_plain_header(body)
    except MissingBytes:  # of which pydicom may need none
        return None


def _read_by_pydicom(body: BinaryIO) -> Header:
    body.seek(0)
    return pydicom.dcmread(body, stop_before_pixels=True, force=True, specific_tags=[*NEEDED_TAGS])


def arrange_series(
    headers: Sequence[SliceHeader], limits: DecodeConfig, unreadable: Sequence[ScanError] = ()
) -> DicomSeries:
    """Put the slices of one series into canonical order; `unreadable` are files of it whose header did not parse.

    Raises: ScanError with the first reason, in this order, why the series is not a chest CT volume: kind, limits,
            damage, mixed content, header, number of slices, orientation, tilt, positions.
    """
    _check_kind(headers)
    _check_limits(headers, limits)
    _check_damage(headers, unreadable)  # first, since a cut header says less than the others
    _check_uniform(headers)
    for header in headers:
        with name_file(header.file.label):
            _check_header(header)
    if len(headers) < limits.min_slices:
        raise ScanError(Status.SKIP_FEW_SLICES, f"{len(headers)} slices, {limits.min_slices} needed")
    return _order_slices(headers)


def hash_series_uid(series_uid: str) -> str:
    """8 hex digits that tell the series of a source apart."""
    return hashlib.sha256(series_uid.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _describe(dataset: Header, file: StagedFile, body: BinaryIO) -> SliceHeader:
    orientation = _numbers(dataset, "ImageOrientationPatient", 6)
    frames = _number(dataset, "NumberOfFrames", 1.0)
    tilt = _number(dataset, "GantryDetectorTilt", 0.0)
    return SliceHeader(
        file=file,
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        patient_id=str(dataset.get("PatientID") or ""),
        modality=str(dataset.get("Modality") or ""),
        is_secondary=str(dataset.get("SOPClassUID")).startswith(SecondaryCaptureImageStorage),
        image_type=tuple(str(value).upper() for value in _values(dataset.get("ImageType"))),
        manufacturer=_recognise_maker(str(dataset.get("Manufacturer") or "")),
        num_frames=int(frames) if math.isfinite(frames) else 0,
        num_samples=int(_number(dataset, "SamplesPerPixel", 1.0)),
        rows=int(_number(dataset, "Rows", 0.0)),
        columns=int(_number(dataset, "Columns", 0.0)),
        bits_allocated=int(_number(dataset, "BitsAllocated", 0.0)),
        has_sound_bits=_has_sound_bits(dataset),
        pixel_spacing_mm=_numbers(dataset, "PixelSpacing", 2),
        has_sound_rescale=_has_sound_rescale(dataset),
        has_rescale="RescaleSlope" in dataset and "RescaleIntercept" in dataset,
        position_mm=_numbers(dataset, "ImagePositionPatient", 3),
        orientation=orientation,
        tilt_degrees=tilt if math.isfinite(tilt) else 0.0,
        layout=_find_layout(dataset, body.tell()),
        damage=find_damage(dataset, file.header_path, body),
    )


def _values(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return [value] if isinstance(value, str) else list(value)


def _number(dataset: Header, tag: str, default: float) -> float:
    """A single number; the default where the tag is absent or empty, NaN where it is no number."""
    value = dataset.get(tag)
    if value is None or value == "":
        return default
    return float(value)


def _numbers(dataset: Header, tag: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, or None."""
    values = tuple(float(value) for value in _values(dataset.get(tag)))
    return values if len(values) == count and all(math.isfinite(value) for value in values) else None


def _has_sound_rescale(dataset: Header) -> bool:
    """Whether stored values can be turned into Hounsfield units: slope and intercept are finite, the slope not 0."""
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    return math.isfinite(slope) and math.isfinite(intercept) and slope != 0


def _has_sound_bits(dataset: Header) -> bool:
    """Whether the bits in use fit into those allocated, and have a sign or none: GDCM reads on whatever is said."""
    allocated = _number(dataset, "BitsAllocated", 0.0)
    stored = _number(dataset, "BitsStored", allocated)
    high_bit = _number(dataset, "HighBit", stored - 1)
    return 1 <= stored <= high_bit + 1 <= allocated and _number(dataset, "PixelRepresentation", 0.0) in (0, 1)


def _recognise_maker(text: str) -> Manufacturer | None:
    """None where the header does not say; free text never leaves this function."""
    text = text.strip().lower()
    if not text:
        return None
    if text == "ge":
        return Manufacturer.GE
    return next((maker for words, maker in _MAKERS if words in text), Manufacturer.OTHER)


def _find_layout(dataset: Header, tag_bytes: int) -> PixelLayout | None:
    """Where and how the pixels lie, their tag being at byte `tag_bytes`; None for all but the plainest CT slice."""
    rows, columns, bits = (dataset.get(tag) for tag in ("Rows", "Columns", "BitsStored"))
    needed = ("RescaleSlope", "RescaleIntercept", "PixelRepresentation")
    if not all(isinstance(value, int) for value in (rows, columns, bits)) or any(tag not in dataset for tag in needed):
        return None
    plain = {
        "SOPClassUID": CTImageStorage, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16, "HighBit": bits - 1,
    }  # fmt: skip
    if any(dataset.get(tag) != value for tag, value in plain.items()):
        return None
    return PixelLayout(
        syntax=str(dataset.file_meta.get("TransferSyntaxUID", "")),
        start=tag_bytes + (8 if dataset.original_encoding[0] else 12),
        size=(rows, columns),
        bits_stored=bits,
        is_signed=dataset.get("PixelRepresentation") == 1,
        slope=_number(dataset, "RescaleSlope", 1.0),
        intercept=_number(dataset, "RescaleIntercept", 0.0),
    )


def _check_kind(headers: Sequence[SliceHeader]) -> None:
    """Refuse what is valid but no axial CT volume."""
    if any(header.modality != "CT" for header in headers):
        raise ScanError(Status.SKIP_MODALITY, "modality is not CT")
    if all(header.is_secondary for header in headers):
        raise ScanError(Status.SKIP_SECONDARY, "secondary capture")
    if all("LOCALIZER" in header.image_type for header in headers):
        raise ScanError(Status.SKIP_LOCALIZER, "scout view")
    if any(header.num_frames != 1 for header in headers):
        for header in headers:
            if not 0 < header.num_frames <= 100_000:
                raise ScanError(Status.BAD_HEADER, f"{header.file.label}: NumberOfFrames is {header.num_frames}")
        raise ScanError(Status.SKIP_MULTIFRAME, "several frames in one object")


def _check_limits(headers: Sequence[SliceHeader], limits: DecodeConfig) -> None:
    """Refuse what would take too much memory, before any pixel is read."""
    if len(headers) > limits.max_slices:
        raise ScanError(Status.BAD_LIMIT, f"{len(headers)} slices, at most {limits.max_slices}")
    scan_bytes = sum(2 * max(header.rows, 0) * max(header.columns, 0) for header in headers)
    side = max(max(header.rows, header.columns) for header in headers)
    if scan_bytes > limits.max_scan_bytes or side > MAX_SIDE:
        raise ScanError(Status.BAD_LIMIT, f"{scan_bytes} bytes decoded, at most {limits.max_scan_bytes}")


def _check_uniform(headers: Sequence[SliceHeader]) -> None:
    """One patient, one image size, one orientation, one pixel size."""
    for name, values in (
        ("patients", {header.patient_id for header in headers}),
        ("image sizes", {(header.rows, header.columns) for header in headers}),
        ("orientations", {_rounded(header.orientation, 3) for header in headers}),
        ("pixel sizes", {_rounded(header.pixel_spacing_mm, 4) for header in headers}),
        ("ways to store Hounsfield units", {header.has_rescale for header in headers}),
    ):
        if len(values) > 1:
            raise ScanError(Status.BAD_MIXED_SERIES, f"{len(values)} {name} in one series")


def _rounded(values: tuple[float, ...] | None, digits: int) -> tuple[float, ...] | None:
    """Adding 0.0 turns -0.0 into 0.0."""
    return values if values is None else tuple(round(value, digits) + 0.0 for value in values)


def _check_header(header: SliceHeader) -> None:
    """Refuse a slice that lacks what its place and size need."""
    if not header.series_uid:
        raise ScanError(Status.BAD_HEADER, "SeriesInstanceUID is missing")
    if header.rows < 2 or header.columns < 2:
        raise ScanError(Status.BAD_HEADER, f"image of {header.rows} x {header.columns} pixels")
    if header.num_samples != 1 or header.bits_allocated not in (8, 16, 32):
        samples, bits = header.num_samples, header.bits_allocated
        raise ScanError(Status.BAD_PIXELS, f"{samples} samples of {bits} bits a pixel; CT has one of 8, 16 or 32")
    if not header.has_sound_bits:
        raise ScanError(Status.BAD_HEADER, "BitsStored, HighBit or PixelRepresentation is absurd")
    if header.position_mm is None or header.orientation is None:
        raise ScanError(Status.BAD_HEADER, "ImagePositionPatient or ImageOrientationPatient is missing or no number")
    if max(map(abs, header.position_mm)) > MAX_POSITION_MM:
        raise ScanError(Status.BAD_HEADER, "ImagePositionPatient is absurd")
    if header.pixel_spacing_mm is None or not all(0.01 < value < 10 for value in header.pixel_spacing_mm):
        raise ScanError(Status.BAD_HEADER, "PixelSpacing is missing or absurd")
    if not header.has_sound_rescale:
        raise ScanError(Status.BAD_HEADER, "RescaleSlope is 0, or it or RescaleIntercept is no number")
    row, column = np.array(header.orientation[:3]), np.array(header.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(float(length) - 1) for length in lengths) > 0.01 or abs(float(row @ column)) > 0.01:
        raise ScanError(Status.BAD_GEOMETRY, "ImageOrientationPatient is no pair of perpendicular unit vectors")


def _check_damage(headers: Sequence[SliceHeader], unreadable: Sequence[ScanError]) -> None:
    damaged = list(unreadable)
    for header in headers:
        if header.damage is not None:
            damaged.append(ScanError(header.damage.status, f"{header.file.label}: {header.damage.detail}"))
    if damaged:
        more = f"; {len(damaged)} of {len(headers) + len(unreadable)} slices are damaged" if len(damaged) > 1 else ""
        raise ScanError(damaged[0].status, damaged[0].detail + more)


def _order_slices(headers: Sequence[SliceHeader]) -> DicomSeries:
    """Order by position along the slices' normal, head first, and find how each slice must be turned."""
    first = headers[0]
    assert first.orientation is not None
    assert first.pixel_spacing_mm is not None
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    if abs(normal[2]) < MIN_AXIAL_COSINE or max(abs(row[0]), abs(row[1])) < MIN_AXIAL_COSINE:
        raise ScanError(Status.SKIP_ORIENTATION, "coronal, sagittal or oblique slices")
    normal *= np.sign(normal[2])
    positions_mm = np.array([header.position_mm for header in headers])
    along_mm = positions_mm @ normal
    order = np.argsort(-along_mm, kind="stable")
    _check_tilt(positions_mm[order], normal, max(abs(header.tilt_degrees) for header in headers))
    slice_spacing_mm = _measure_spacing(-along_mm[order])
    _check_line(positions_mm[order], along_mm[order], max(first.pixel_spacing_mm))
    is_transposed = bool(abs(row[0]) < abs(row[1]))
    right_to_left, front_to_back = (column, row) if is_transposed else (row, column)
    height, width = (first.columns, first.rows) if is_transposed else (first.rows, first.columns)
    row_mm, column_mm = first.pixel_spacing_mm
    return DicomSeries(
        files=tuple(headers[index].file for index in order),
        spokesman=first.file,
        layouts=tuple(headers[index].layout for index in order),
        shape=(len(headers), height, width),
        spacing_mm=(slice_spacing_mm, *((column_mm, row_mm) if is_transposed else (row_mm, column_mm))),
        is_transposed=is_transposed,
        is_row_flipped=bool(front_to_back[1] < 0),
        is_column_flipped=bool(right_to_left[0] < 0),
    )


def _check_tilt(positions_mm: NDArray[np.float64], normal: NDArray[np.float64], stated_degrees: float) -> None:
    """Slices of an untilted gantry are stacked along their own normal."""
    path_mm = positions_mm[-1] - positions_mm[0]
    along_mm = abs(float(path_mm @ normal))
    across_mm = float(np.linalg.norm(path_mm - (path_mm @ normal) * normal))
    degrees = max(math.degrees(math.atan2(across_mm, along_mm)) if along_mm else 0.0, stated_degrees)
    if degrees > TILT_DEGREES:
        raise ScanError(Status.BAD_TILT, f"gantry tilted by {degrees:.1f} degrees")


def _check_line(positions_mm: NDArray[np.float64], along_mm: NDArray[np.float64], pixel_mm: float) -> None:
    """No slice lies a pixel or more beside the line from the first to the last: its content would be moved as well."""
    share = (along_mm - along_mm[0]) / (along_mm[-1] - along_mm[0])
    line_mm = positions_mm[0] + share[:, None] * (positions_mm[-1] - positions_mm[0])
    beside_mm = float(np.linalg.norm(positions_mm - line_mm, axis=1).max())
    if beside_mm >= pixel_mm:
        raise ScanError(Status.BAD_GEOMETRY, f"a slice lies {beside_mm:.1f} mm beside the line of the others")


def _measure_spacing(ascending_mm: NDArray[np.float64]) -> float:
    """The distance between neighbours, the same everywhere. There is no limit on how large it is."""
    steps_mm = np.diff(ascending_mm)
    if steps_mm.min() < DUPLICATE_MM:
        num_same = int((steps_mm < DUPLICATE_MM).sum())
        raise ScanError(Status.BAD_DUPLICATE_SLICE, f"{num_same} slices share a position with another")
    middle_mm = float(np.median(steps_mm))
    if steps_mm.max() > MISSING_RATIO * middle_mm:
        num_gaps = int((steps_mm > MISSING_RATIO * middle_mm).sum())
        raise ScanError(Status.BAD_MISSING_SLICE, f"{num_gaps} gaps, the largest {steps_mm.max():.2f} mm")
    if np.abs(steps_mm - middle_mm).max() > IRREGULAR_RATIO * middle_mm:
        raise ScanError(Status.BAD_GEOMETRY, f"slices {steps_mm.min():.2f} to {steps_mm.max():.2f} mm apart")
    return float(ascending_mm[-1] - ascending_mm[0]) / (len(ascending_mm) - 1)
