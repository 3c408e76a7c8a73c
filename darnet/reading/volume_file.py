"""A volume file's bytes in; a refusal out, unless it holds its own voxels, all of them and undamaged, in a known pose.

Decoders forgive too much: MetaIO hands out memory that it never filled, ITK puts zeros for what is missing and takes
any orientation for a sheared one, and both read the other file that a header names as its pixels.
"""

import gzip
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from darnet.config import OBLIQUE_DEGREES, TILT_DEGREES, DecodeConfig
from darnet.errors import ScanError, Status

MAX_VOXEL_BYTES = 8  # of the widest number; limits count two bytes a voxel
MAX_HEADER_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 12
CHUNK_BYTES = 1 << 20

# Size of a header, and where and as what it holds dim, datatype and bitpix, vox_offset, pixdim, slope and intercept,
# the codes of qform and sform, the quaternion of qform and the rows of sform. Source: NIfTI-1 and NIfTI-2.
NIFTI_LAYOUTS = (
    (348, (40, "8h"), (70, "2h"), (108, "f"), (76, "8f"), (112, "2f"), (252, "2h"), (256, "3f"), (280, "12f")),
    (540, (16, "8q"), (12, "2h"), (168, "q"), (104, "8d"), (176, "2d"), (344, "2i"), (352, "3d"), (400, "12d")),
)
# Numbers by their datatype, and its other values that may be sound. Source: NIfTI-1.
NIFTI_NUMBERS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
NIFTI_TUPLES = (32, 128, 1792, 2304)  # complex numbers and colours

NIFTI_MAGIC = b"n+"  # where the voxels follow the header; "ni" where they are another file

# Bytes of a number by its name in a header. Source: MetaIO's and teem's documentation.
META_BYTES = {
    f"MET_{sign}{name}": size
    for name, size in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG", 4), ("LONG_LONG", 8))
    for sign in ("", "U")
} | {"MET_FLOAT": 4, "MET_DOUBLE": 8}
NRRD_NAMES = {
    1: "char|signed char|int8|int8_t|uchar|unsigned char|uint8|uint8_t",
    2: "short|short int|signed short|signed short int|int16|int16_t|ushort|unsigned short|unsigned short int|uint16"
    "|uint16_t",
    4: "int|signed int|int32|int32_t|uint|unsigned int|uint32|uint32_t|float",
    8: "longlong|long long|int64|int64_t|ulonglong|unsigned long long|uint64|uint64_t|double",
}
NRRD_BYTES = {name: size for size, names in NRRD_NAMES.items() for name in names.split("|")}
META_POSES = ("TransformMatrix", "Orientation", "Rotation")
META_SIZES = ("ElementSpacing", "ElementSize")
SIZE_RATIO = 1.01  # between two statements of one voxel's size; more, and one of them is wrong

Axes: TypeAlias = NDArray[np.float64]
Stream: TypeAlias = BinaryIO | gzip.GzipFile
Body: TypeAlias = tuple[int, Iterator[bytes]]  # how many bytes there must be, and what there is


@dataclass(frozen=True)
class NiftiHeader:
    """What places a NIfTI file's voxels in the file and in the patient. Units: `steps_mm` along the stored axes."""

    start_bytes: int
    voxel_bytes: int
    number: "np.dtype[Any]"
    codes: tuple[int, int]
    steps_mm: tuple[float, ...]
    quaternion: tuple[float, ...]
    sform: Axes


def check_volume_file(path: Path, limits: DecodeConfig) -> None:
    """Demand every byte the header declares and not one more, to the end and checksum of a compressed stream.

    Raises: ScanError: BAD_TRUNCATED, BAD_UNREADABLE, BAD_LIMIT, BAD_PIXELS; BAD_INTENSITY for voxels that are no
            numbers; BAD_GEOMETRY or BAD_TILT for an unknown or sheared orientation.
    """
    try:
        with path.open("rb") as file:
            _check_length(*_OPENERS[path.suffix](file), limits)
    except EOFError as error:
        raise ScanError(Status.BAD_TRUNCATED, "compressed volume ends early") from error
    except (gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ScanError(Status.BAD_UNREADABLE, "volume file is damaged") from error
    except (KeyError, ValueError, OverflowError) as error:
        raise ScanError(Status.BAD_UNREADABLE, "volume's header lacks a field or holds an unknown value") from error


def check_axes(axes: Axes) -> None:
    """Refuse axes that are not perpendicular, or none of the patient's, in whatever order and direction.

    Shape:  (3, 3), a column for each axis; of any length.
    Raises: ScanError: BAD_GEOMETRY, BAD_TILT, SKIP_ORIENTATION.
    Source: ours; the limits are those of DICOM series.
    """
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(axes).all() or not lengths.all():
        raise ScanError(Status.BAD_GEOMETRY, "axes of the volume have no direction")
    unit = axes / lengths
    shear = np.abs(unit.T @ unit - np.eye(3)).max()
    degrees = math.degrees(math.asin(min(float(shear), 1.0)))
    if degrees > TILT_DEGREES:
        raise ScanError(Status.BAD_TILT, f"axes of the volume are sheared by {degrees:.1f} degrees")
    if np.abs(unit).max(axis=0).min() < math.cos(math.radians(OBLIQUE_DEGREES)):
        raise ScanError(Status.SKIP_ORIENTATION, "oblique volume")


def _check_length(needed: int, chunks: Iterator[bytes], limits: DecodeConfig) -> None:
    if not 0 < needed <= MAX_VOXEL_BYTES // 2 * limits.max_scan_bytes:
        raise ScanError(Status.BAD_LIMIT, f"volume declares {needed} bytes")
    found = 0
    for chunk in chunks:
        found += len(chunk)
        if found > needed:
            raise ScanError(Status.BAD_UNREADABLE, f"volume is longer than the {needed} bytes it declares")
    if found < needed:
        raise ScanError(Status.BAD_TRUNCATED, f"volume ends {needed - found} bytes early")


def _read_chunks(file: Stream, num_bytes: int) -> Iterator[bytes]:
    """The file in pieces, to its end or as many bytes."""
    while chunk := file.read(min(CHUNK_BYTES, num_bytes)):
        num_bytes -= len(chunk)
        yield chunk


def _inflate(file: Stream, num_bytes: int) -> Iterator[bytes]:
    """A zlib or gzip stream within so many bytes; its checksum is compared at its end.

    Raises: EOFError if it does not end there, zlib.error if it is damaged.
    """
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    for packed in _read_chunks(file, num_bytes):
        while packed and not stream.eof:
            yield stream.decompress(packed, CHUNK_BYTES)
            packed = stream.unconsumed_tail
    yield stream.flush()
    if not stream.eof:
        raise EOFError


def _open_nifti(file: Stream) -> Body:
    """Raises: ScanError: BAD_UNREADABLE, BAD_PIXELS, BAD_INTENSITY, BAD_GEOMETRY, BAD_TILT, SKIP_ORIENTATION."""
    head = file.read(NIFTI_LAYOUTS[-1][0])
    header = _parse_nifti(head)
    _check_nifti_pose(header)
    chunks = chain([head], _read_chunks(file, sys.maxsize))
    return header.start_bytes + header.voxel_bytes, _demand_numbers(chunks, header)


def _demand_numbers(chunks: Iterator[bytes], header: NiftiHeader) -> Iterator[bytes]:
    """The same chunks; ITK's reader puts 0 for voxels that are no numbers.

    Raises: ScanError(BAD_INTENSITY).
    """
    rest, num_skipped = b"", header.start_bytes
    for chunk in chunks:
        yield chunk
        rest += chunk[num_skipped:]
        num_skipped = max(num_skipped - len(chunk), 0)
        whole = len(rest) - len(rest) % header.number.itemsize
        if not np.isfinite(np.frombuffer(rest[:whole], header.number)).all():
            raise ScanError(Status.BAD_INTENSITY, "volume holds values that are no numbers")
        rest = rest[whole:]


def _open_nifti_gz(file: BinaryIO) -> Body:
    return _open_nifti(gzip.GzipFile(fileobj=file))


def _parse_nifti(head: bytes) -> NiftiHeader:
    for size, *fields in NIFTI_LAYOUTS:
        for order in "<>":
            if struct.unpack_from(order + "i", head)[0] == size and NIFTI_MAGIC in (head[344:346], head[4:6]):
                values = [struct.unpack_from(order + kind, head, offset) for offset, kind in fields]
                dim, kinds, (start,), pixdim, scale, codes, quaternion, sform = values
                number = _name_number(kinds, order, scale)
                voxel_bytes = math.prod(max(int(extent), 1) for extent in dim[1 : dim[0] + 1]) * number.itemsize
                axes = np.array(sform, np.float64).reshape(3, 4)[:, :3]
                return NiftiHeader(max(int(start), size), voxel_bytes, number, codes, pixdim[:4], quaternion, axes)
    raise ScanError(Status.BAD_UNREADABLE, "volume has no NIfTI header")


def _name_number(kinds: tuple[int, int], order: str, scale: tuple[float, float]) -> "np.dtype[Any]":
    """The type of a NIfTI file's voxels.

    Raises: KeyError for an unknown one, ValueError for other bits than it has; ScanError: BAD_PIXELS for tuples,
            BAD_INTENSITY for a slope or intercept that is no number.
    """
    if kinds[0] in NIFTI_TUPLES:
        raise ScanError(Status.BAD_PIXELS, "voxels of the volume are no single numbers")
    number = np.dtype(NIFTI_NUMBERS[kinds[0]]).newbyteorder("<" if order == "<" else ">")
    if 8 * number.itemsize != kinds[1]:
        raise ValueError("bitpix is another than that of datatype")
    if not all(map(math.isfinite, scale)):
        raise ScanError(Status.BAD_INTENSITY, "scl_slope or scl_inter is no number")
    return number


def _check_nifti_pose(header: NiftiHeader) -> None:
    """ITK takes qform for an sform that it cannot represent, any pose for none, and voxels of 1 mm for absurd ones."""
    steps_mm = np.abs(header.steps_mm[1:])
    if not np.isfinite(steps_mm).all() or not steps_mm.all():
        raise ScanError(Status.BAD_GEOMETRY, "pixdim is absurd")
    has_qform, has_sform = (code > 0 for code in header.codes)
    if not has_qform and not has_sform:
        raise ScanError(Status.BAD_GEOMETRY, "orientation is unknown: neither qform nor sform is set")
    if has_qform and not np.isfinite(header.quaternion).all():
        raise ScanError(Status.BAD_GEOMETRY, "the quaternion of qform is no number")
    if has_sform:
        check_axes(header.sform)
        ratios = np.linalg.norm(header.sform, axis=0) / steps_mm
        if max(ratios.max(), 1 / ratios.min()) > SIZE_RATIO:
            raise ScanError(Status.BAD_GEOMETRY, "voxels have another size in pixdim than in sform")
    if has_qform and has_sform:
        unit = header.sform / np.linalg.norm(header.sform, axis=0)
        cosine = float((unit * _find_qform(header)).sum(axis=0).min())
        degrees = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
        if degrees > TILT_DEGREES:
            raise ScanError(Status.BAD_GEOMETRY, f"qform and sform differ by {degrees:.1f} degrees")


def _find_qform(header: NiftiHeader) -> Axes:
    """Unit axes of qform, a column each. Source: NIfTI-1 specification, method 2.

    Nine terms of our own: SciPy's rotations take every reader half a second to load.
    """
    b, c, d = header.quaternion
    a = math.sqrt(max(1 - b * b - c * c - d * d, 0))
    axes: Axes = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    ) / (a * a + b * b + c * c + d * d)
    return axes * (1, 1, -1 if header.steps_mm[0] < 0 else 1)


def _open_metaimage(file: Stream) -> Body:
    """Raises: ScanError: BAD_UNREADABLE for voxels in another file, BAD_GEOMETRY, BAD_TILT, SKIP_ORIENTATION."""
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        key, value = re.split(r"\s*[=:]\s*", _read_line(file), maxsplit=1)
        if key in fields:
            raise ValueError("a field comes twice")
        fields[key] = value
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise ScanError(Status.BAD_UNREADABLE, "voxels lie in another file")
    if fields["BinaryData"].lower() != "true" or int(fields.get("HeaderSize", 0)):
        raise ScanError(Status.BAD_UNREADABLE, "voxels are stored as text or behind a header of their own")
    sizes = _parse_sizes(fields["DimSize"], int(fields["NDims"]))
    _check_meta_pose(fields, len(sizes))
    needed = math.prod(sizes) * META_BYTES[fields["ElementType"]] * int(fields.get("ElementNumberOfChannels", 1))
    if fields.get("CompressedData", "False").lower() != "true":
        return needed, _read_chunks(file, sys.maxsize)
    return needed, _inflate(file, abs(int(fields.get("CompressedDataSize", 0))) or sys.maxsize)


def _check_meta_pose(fields: dict[str, str], num_axes: int) -> None:
    """MetaIO takes any pose for none, and any size; it ends the process over more axes than it knows."""
    if not any(key in fields for key in META_POSES):
        raise ScanError(Status.BAD_GEOMETRY, "orientation is unknown: no TransformMatrix")
    if not any(key in fields for key in META_SIZES):
        raise ScanError(Status.BAD_GEOMETRY, "size of the voxels is unknown: no ElementSpacing")
    for key in META_POSES:
        if key in fields:
            rows = np.array(fields[key].split(), np.float64).reshape(num_axes, num_axes)
            check_axes(rows[:3, :3].T)
    for key in META_SIZES:
        if key in fields and len(fields[key].split()) != num_axes:
            raise ValueError(f"{key} is not of {num_axes} axes")


def _parse_sizes(text: str, num_axes: int) -> list[int]:
    """Voxels along each axis.

    Raises: ValueError for another number of axes, or an axis without voxels.
    """
    sizes = [int(size) for size in text.split()]
    if len(sizes) != num_axes or num_axes not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"{num_axes} axes of {sizes} voxels")
    return sizes


def _open_nrrd(file: Stream) -> Body:
    """Raises: ScanError: BAD_UNREADABLE for voxels in another file, BAD_GEOMETRY, BAD_TILT, SKIP_ORIENTATION."""
    fields: dict[str, str] = {}
    magic = _read_line(file)
    while line := _read_line(file):
        if not line.startswith("#") and ":=" not in line:
            key, value = line.split(":", 1)
            key = key.lower().replace(" ", "")
            if key in fields:
                raise ValueError("a field comes twice")
            fields[key] = value.strip()
    if not magic.startswith("NRRD") or "datafile" in fields:
        raise ScanError(Status.BAD_UNREADABLE, "voxels lie in another file, or it is no NRRD")
    if int(fields.get("byteskip", 0)) or int(fields.get("lineskip", 0)):
        raise ScanError(Status.BAD_UNREADABLE, "voxels lie behind a header of their own")
    if "space" not in fields or "spacedirections" not in fields:
        raise ScanError(Status.BAD_GEOMETRY, "orientation is unknown: no space or no space directions")
    vectors = re.findall(r"\(([^()]*)\)", fields["spacedirections"])
    if len(vectors) != 3:
        raise ScanError(Status.BAD_GEOMETRY, f"space directions of {len(vectors)} axes")
    check_axes(np.array([vector.split(",") for vector in vectors], np.float64).T)
    sizes = _parse_sizes(fields["sizes"], int(fields["dimension"]))
    needed = math.prod(sizes) * NRRD_BYTES[fields["type"].lower()]
    open_body = {"raw": _read_chunks, "gzip": _inflate, "gz": _inflate}[fields["encoding"].lower()]
    return needed, open_body(file, sys.maxsize)


def _read_line(file: Stream) -> str:
    """One line of a header, without its end.

    Raises: ValueError for a header without end.
    """
    line = file.readline(MAX_LINE_BYTES)
    if not line.endswith(b"\n") or file.tell() > MAX_HEADER_BYTES:
        raise ValueError("header does not end")
    return line.decode("latin-1").strip()


_OPENERS: dict[str, Callable[[BinaryIO], Body]] = {
    ".nii": _open_nifti,
    ".gz": _open_nifti_gz,
    ".mha": _open_metaimage,
    ".nrrd": _open_nrrd,
}
