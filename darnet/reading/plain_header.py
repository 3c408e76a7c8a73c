"""A DICOM file's first bytes in; the values that scoring needs out, for a tenth of the time that pydicom takes.

A header with anything out of the ordinary is left to pydicom, so that values and verdicts are those of one reader.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

NEEDED_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "ImageType", "Manufacturer",
    "NumberOfFrames", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PhotometricInterpretation", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "ImagePositionPatient", "ImageOrientationPatient", "GantryDetectorTilt",
)  # fmt: skip
SYNTAXES = frozenset(
    uid.encode()
    for uid in (
        *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit, JPEGExtended12Bit),
        *(JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000),
    )
)
# In which the bytes below 128 are ASCII. Source: DICOM PS3.3 C.12.1.1.2, but for the Japanese ISO_IR 13.
CHARACTER_SETS = frozenset(
    (
        b"",
        b"GB18030",
        b"GBK",
        *(b"ISO_IR %d" % number for number in (6, 100, 101, 109, 110, 126, 127, 138, 144, 148, 192)),
    )
)
FIRST_BYTES = (8 * 1024, 64 * 1024)  # tried one after the other; a longer header is left to pydicom
MAX_NESTED = 8
MAX_UNKNOWN_BYTES = 0xFFFF  # of a value of representation UN, up to which pydicom takes the dictionary's

_NEEDED = {
    tag_for_keyword(name): (name, dictionary_VR(name).encode()) for name in (*NEEDED_TAGS, "SpecificCharacterSet")
}
_COUNTS = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}
_CHARACTER_SET, _PIXEL_GROUP, _PIXELS = 0x00080005, 0x7FE00000, 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_SHORT = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_16)
_LONG = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)

_CODES = re.compile(rb"((?:[A-Z0-9_]+(?:[ \\][A-Z0-9_]+)*)?) *")
_TEXTS = {
    b"UI": re.compile(rb"([0-9.]{0,64})\0?"),
    b"CS": re.compile(rb"((?:[A-Z0-9_]+(?: [A-Z0-9_]+)*)?) *"),
    b"LO": re.compile(rb"((?:[A-Za-z0-9](?:[A-Za-z0-9 ._/:,()+^#-]*[A-Za-z0-9._/:,()+^#-])?)?) *"),
}
_WHOLE = re.compile(rb" *[+-]?[0-9]{1,9} *")
_DECIMAL = re.compile(rb" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})? *")

_explicit, _implicit, _long = struct.Struct("<HH2sH"), struct.Struct("<HHI"), struct.Struct("<I")


class _Unusual(Exception):  # noqa: N818
    """Something that pydicom must decide on."""


@dataclass(frozen=True)
class PlainHeader:
    """As much of a FileDataset of pydicom as is asked for; the tag of the pixels is at byte `pixels_at`."""

    values: Mapping[str, Any]
    syntax: str
    pixels_at: int

    @property
    def file_meta(self) -> Mapping[str, str]:
        """What counts of the file meta information."""
        return {"TransferSyntaxUID": self.syntax}

    @property
    def original_encoding(self) -> tuple[bool, bool]:
        """Whether value representations are implicit, and little endian."""
        return self.syntax == str(ImplicitVRLittleEndian), True

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its keyword; None where it is empty and no text."""
        return self.values.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.values


def read_plain_header(body: BinaryIO) -> PlainHeader | None:
    """The header of a file that is plain throughout, and the file at the tag of its pixels; None for any other."""
    for num_bytes in FIRST_BYTES:
        body.seek(0)
        try:
            header = _walk(body.read(num_bytes))
        except struct.error:  # the header goes on
            continue
        except _Unusual:
            return None
        body.seek(header.pixels_at)
        return header
    return None


def _walk(data: bytes) -> PlainHeader:
    """Raises: _Unusual; struct.error where `data` ends before the header."""
    syntax, place = _read_meta(data)
    is_implicit = syntax == ImplicitVRLittleEndian.encode()
    if is_implicit and data[place + 4 : place + 6].isalpha():  # which pydicom takes for explicit
        raise _Unusual
    values: dict[str, Any] = {}
    last = 0x0002FFFF
    while True:
        tag, vr, length, start = _read_element(data, place, is_implicit=is_implicit)
        if tag == _PIXELS:
            break
        if not last < tag < _PIXEL_GROUP:
            raise _Unusual
        last = tag
        if tag in _NEEDED:
            name, needed_vr = _NEEDED[tag]
            if vr not in (needed_vr, b"") and not (vr == b"UN" and 0 < length < MAX_UNKNOWN_BYTES):
                raise _Unusual
            raw = _cut(data, start, length)
            if tag != _CHARACTER_SET:
                values[name] = _convert(name, needed_vr, raw)
            elif raw.rstrip(b" ") not in CHARACTER_SETS:
                raise _Unusual
        if length != _UNDEFINED:
            place = start + length
        elif _is_sequence(tag, vr):
            place = _skip_items(data, start, 1, is_implicit=is_implicit)
        else:
            raise _Unusual
    if "SOPClassUID" not in values:
        raise _Unusual
    return PlainHeader(values, syntax.decode(), place)


def _read_meta(data: bytes) -> tuple[bytes, int]:
    """The transfer syntax, and where the data set begins: where the meta information says and ends."""
    if data[128:132] != b"DICM":
        raise _Unusual
    tag, vr, length, start = _read_element(data, 132)
    if (tag, vr, length) != (0x00020000, b"UL", 4):
        raise _Unusual
    end = start + 4 + _long.unpack_from(data, start)[0]
    place, last, syntax = start + 4, tag, b""
    while place < end:
        tag, _, length, start = _read_element(data, place)
        if not last < tag < 0x00030000:
            raise _Unusual
        last, place = tag, start + length
        if tag == 0x00020010:
            syntax = _cut(data, start, length).rstrip(b"\0")
    if place != end or syntax not in SYNTAXES:
        raise _Unusual
    return syntax, place


def _read_element(data: bytes, place: int, *, is_implicit: bool = False) -> tuple[int, bytes, int, int]:
    """Tag, value representation (none where it is implicit), length, and where the value begins."""
    if is_implicit:
        group, element, length = _implicit.unpack_from(data, place)
        return group << 16 | element, b"", length, place + 8
    group, element, vr, length = _explicit.unpack_from(data, place)
    if vr in _SHORT:
        return group << 16 | element, vr, length, place + 8
    if vr not in _LONG:
        raise _Unusual
    return group << 16 | element, vr, _long.unpack_from(data, place + 8)[0], place + 12


def _cut(data: bytes, start: int, length: int) -> bytes:
    """Raises: struct.error where the value ends later than `data`, among them those of undefined length."""
    value = data[start : start + length]
    if len(value) < length:
        raise struct.error
    return value


def _is_sequence(tag: int, vr: bytes) -> bool:
    return vr == b"SQ" or (vr == b"" and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ")


def _skip_items(data: bytes, place: int, depth: int, *, is_implicit: bool) -> int:
    """Where a sequence of undefined length ends; `place` is its first item."""
    if depth > MAX_NESTED:
        raise _Unusual
    while True:
        tag, _, length, start = _read_element(data, place, is_implicit=True)
        if tag == _SEQUENCE_END and length == 0:
            return start
        if tag != _ITEM or length == 0:
            raise _Unusual
        end = None if length == _UNDEFINED else start + length
        place = _skip_elements(data, start, end, depth, is_implicit=is_implicit)


def _skip_elements(data: bytes, place: int, end: int | None, depth: int, *, is_implicit: bool) -> int:
    """Where an item ends: at `end` exactly or, if that is None, behind its delimiter."""
    last = 0x0007FFFF
    while place != end:
        if end is None and _read_element(data, place, is_implicit=True)[0] == _ITEM_END:
            return place + 8
        if end is not None and place > end:
            raise _Unusual
        tag, vr, length, start = _read_element(data, place, is_implicit=is_implicit)
        if not last < tag < _PIXEL_GROUP or tag == _CHARACTER_SET:
            raise _Unusual
        last = tag
        if length != _UNDEFINED:
            place = start + length
        elif _is_sequence(tag, vr):
            place = _skip_items(data, start, depth + 1, is_implicit=is_implicit)
        else:
            raise _Unusual
    return place


def _convert(name: str, vr: bytes, raw: bytes) -> Any:
    """A value as pydicom gives it, or equal to that: texts without what fills them up, numbers as they are."""
    if vr == b"US":
        if len(raw) == 2:
            return int.from_bytes(raw, "little")
    elif vr == b"DS":
        parts = raw.split(b"\\")
        if all(map(_DECIMAL.fullmatch, parts)) and len(parts) == _COUNTS.get(name, 1):
            return float(raw) if len(parts) == 1 else tuple(map(float, parts))
    elif vr == b"IS":
        if _WHOLE.fullmatch(raw):
            return int(raw)
    else:
        found = (_CODES if name == "ImageType" else _TEXTS[vr]).fullmatch(raw)
        if found is not None:
            text = found[1].decode("ascii")
            return text.split("\\") if "\\" in text else text
    if raw or name in _COUNTS:
        raise _Unusual
    return None
