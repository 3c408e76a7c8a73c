"""A DICOM file that stands at its pixels in; what is wrong with their declared length or chain of fragments out."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pydicom
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UncompressedTransferSyntaxes,
)

from darnet.errors import ScanError, Status

NATIVE = frozenset(UncompressedTransferSyntaxes)
ENCAPSULATED = frozenset(AllTransferSyntaxes) - NATIVE  # of what is neither, private or retired, a decoder judges


class Header(Protocol):
    """What is asked of a header, be it pydicom's or a plain one."""

    @property
    def file_meta(self) -> Any:
        """A mapping by keywords."""

    @property
    def original_encoding(self) -> tuple[bool | None, bool | None]:
        """Whether value representations are implicit, and little endian."""

    def get(self, name: str, default: Any = None, /) -> Any:
        """A value by its keyword."""

    def __contains__(self, name: str, /) -> bool: ...


def find_damage(dataset: Header, path: Path, body: BinaryIO) -> ScanError | None:
    """What is wrong with the declared length of the pixels, at whose tag `body` stands; they are not read.

    `path` is as long as the file. A deflated data set has no visible end: it is inflated whole instead.
    """
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    if syntax == DeflatedExplicitVRLittleEndian:
        length = len(pydicom.dcmread(path).get("PixelData") or b"")
        return _compare_length(dataset, length, length)
    end_bytes = path.stat().st_size
    order = "<" if dataset.original_encoding[1] else ">"
    tag = body.read(4)
    if len(tag) < 4:
        return ScanError(Status.BAD_TRUNCATED, "ends before its pixel data")
    if struct.unpack(order + "HH", tag) != (0x7FE0, 0x0010):
        return ScanError(Status.BAD_PIXELS, "pixel data of another kind than CT uses")
    if dataset.original_encoding[0]:
        (length,) = struct.unpack(order + "I", body.read(4))
    else:
        (length,) = struct.unpack(order + "4xI", body.read(8))
    if length == 0xFFFFFFFF:
        if syntax in NATIVE:
            return ScanError(Status.BAD_PIXELS, "fragments of pixels in a transfer syntax that has none")
        return _follow_fragments(body, end_bytes)
    if syntax in ENCAPSULATED:
        return ScanError(Status.BAD_PIXELS, "pixels in one piece in a transfer syntax of fragments")
    return _compare_length(dataset, length, end_bytes - body.tell())


def _compare_length(dataset: Header, length: int, left_bytes: int) -> ScanError | None:
    """Native pixels: as many bytes as rows, columns and bits ask for, and all of them in the file."""
    needed = int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0)
    needed *= int(dataset.get("SamplesPerPixel") or 1) * int(dataset.get("NumberOfFrames") or 1)
    needed = needed * int(dataset.get("BitsAllocated") or 0) // 8
    if length > left_bytes:
        return ScanError(Status.BAD_TRUNCATED, f"pixel data ends {length - left_bytes} bytes early")
    if length < needed:
        return ScanError(Status.BAD_TRUNCATED, f"pixel data declares {length} bytes where {needed} are needed")
    return None


def _follow_fragments(body: BinaryIO, end_bytes: int) -> ScanError | None:
    """Encapsulated pixels: follow the chain of fragments to its end."""
    table: bytes | None = None  # of offsets, the first item
    starts: list[int] = []
    while True:
        head = body.read(8)
        if len(head) == 0 and starts:
            return _check_offsets(table or b"", starts)  # some writers leave out the closing delimiter
        if len(head) < 8:
            return ScanError(Status.BAD_TRUNCATED, "compressed pixel data ends early")
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            if not starts:
                return ScanError(Status.BAD_TRUNCATED, "no compressed pixel data")
            return _check_offsets(table or b"", starts)
        if (group, element) != (0xFFFE, 0xE000):
            return ScanError(Status.BAD_PIXELS, "chain of compressed fragments is broken")
        if body.tell() + length > end_bytes:
            return ScanError(Status.BAD_TRUNCATED, "compressed pixel data ends early")
        if table is None:
            table = body.read(length)
        else:
            starts.append(body.tell() - 8)
            body.seek(length, 1)


def _check_offsets(table: bytes, starts: Sequence[int]) -> ScanError | None:
    """An offset table is empty, or names beginnings of fragments, the first one first; decoders do not look."""
    places = {start - starts[0] for start in starts}
    offsets = [offset for (offset,) in struct.iter_unpack("<I", table[: len(table) // 4 * 4])]
    if len(table) % 4 or offsets[:1] not in ([], [0]) or not places.issuperset(offsets):
        return ScanError(Status.BAD_PIXELS, "offset table of the compressed pixels is wrong")
    return None
