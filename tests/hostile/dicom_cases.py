"""DICOM series and files that are no chest CT, or not whole, or lie."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    ComprehensiveSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from darnet.errors import Status
from darnet.phantoms.decoys import make_abdomen as make_true_abdomen
from darnet.phantoms.decoys import make_head
from darnet.phantoms.files import write_dicom
from tests.ct_fixtures import SPACING_MM, make_chest, make_slice, write_chest
from tests.hostile.case import Case, Write, cut, deflate_bomb, make_abdomen
from tests.poison_fixtures import PIXEL_DATA, insert, split

DEPTH = 5000
UNDEFINED = "1.2.840.10008.1.2.7"  # as a transfer syntax
BOMB_BYTES = 3 << 29
Edit = Callable[[int, FileDataset], None]


def tag(**tags: Any) -> Write:
    """Every slice with these tags; None removes one."""
    return lambda place: write_chest(place, **tags)


def edit(change: Edit) -> Write:
    """Every slice changed before it is written."""
    return lambda place: write_chest(place, edit=change)


def one(number: int, **tags: Any) -> Write:
    """A single slice with these tags, slices counted from the head."""

    def change(index: int, dataset: FileDataset) -> None:
        for name, value in tags.items() if index == number else ():
            setattr(dataset, name, value)

    return edit(change)


def spoil(change: Callable[[list[Path]], object]) -> Write:
    """The files of a sound series changed, given head first."""
    return lambda place: change(write_chest(place))


def raw(keyword: str, text: str) -> Write:
    """Every slice with a text of this element that pydicom would not take."""

    def change(_: int, dataset: FileDataset) -> None:
        value = text.encode().ljust(len(text) + len(text) % 2)
        number, vr = Tag(keyword), dictionary_VR(keyword)
        dataset[number] = RawDataElement(number, vr, len(value), value, 0, False, True)

    return edit(change)


def bare(content: bytes, name: str = "1.dcm") -> Write:
    """A folder of one file."""

    def write(place: Path) -> None:
        place.mkdir(parents=True)
        (place / name).write_bytes(content)

    return write


def among(content: bytes) -> Write:
    """A sound series of which one file is something else."""
    return spoil(lambda paths: paths[3].write_bytes(content))


def compressed(syntax: str, change: Edit | None = None) -> Write:
    """A series in a transfer syntax, its slices changed after they were compressed."""

    def compress(index: int, dataset: FileDataset) -> None:
        dataset.compress(syntax, generate_instance_uid=False)
        if change is not None:
            change(index, dataset)

    return edit(compress)


def shear(index: int, dataset: FileDataset) -> None:
    dataset.ImagePositionPatient = [-190.0, -190.0 + 2.0 * index, 500.0 - SPACING_MM[0] * index]


def coronal(index: int, dataset: FileDataset) -> None:
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    dataset.ImagePositionPatient = [-190.0, -190.0 + SPACING_MM[0] * index, 500.0]


def sagittal(index: int, dataset: FileDataset) -> None:
    dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    dataset.ImagePositionPatient = [-190.0 + SPACING_MM[0] * index, -190.0, 500.0]


def oblique(index: int, dataset: FileDataset) -> None:
    """Turned by 35 degrees about x and stacked along its own normal."""
    cos, sin = np.cos(np.radians(35)), np.sin(np.radians(35))
    dataset.ImageOrientationPatient = [1, 0, 0, 0, cos, -sin]
    dataset.ImagePositionPatient = [-190.0, -190.0 - 12.0 * index * sin, 500.0 - 12.0 * index * cos]


def uneven(index: int, dataset: FileDataset) -> None:
    dataset.ImagePositionPatient = [-190.0, -190.0, 500.0 - SPACING_MM[0] * index - 4.5 * (index % 2)]


def drop_rescale(index: int, dataset: FileDataset) -> None:
    if index == 10:
        del dataset.RescaleSlope, dataset.RescaleIntercept


def garble_codestream(_: int, dataset: FileDataset) -> None:
    data = bytearray(dataset.PixelData)
    data[60:-16] = b"\x55" * (len(data) - 76)
    dataset.PixelData = bytes(data)


def replace_fragment(content: bytes, number: int = 10) -> Edit:
    """Of one slice: 10 contributes to the network's input."""

    def change(index: int, dataset: FileDataset) -> None:
        if index == number:
            dataset.PixelData = encapsulate([content])

    return change


def replace_offsets(table: bytes) -> Edit:
    """The basic offset table of slice 10; its fragments stay whole."""

    def change(index: int, dataset: FileDataset) -> None:
        if index == 10:
            start = 8 + int(struct.unpack_from("<I", dataset.PixelData, 4)[0])
            head = struct.pack("<HHI", 0xFFFE, 0xE000, len(table)) + table
            dataset.PixelData = head + dataset.PixelData[start:]

    return change


def break_chain(_: int, dataset: FileDataset) -> None:
    """Another tag where the first fragment's should be, behind the offset table."""
    data = bytearray(dataset.PixelData)
    start = 8 + int(struct.unpack_from("<I", data, 4)[0])
    data[start : start + 4] = b"\x12\x34\x56\x78"
    dataset.PixelData = bytes(data)


def rename_syntax(paths: list[Path], old: str = ExplicitVRLittleEndian, new: str = UNDEFINED) -> None:
    """Another transfer syntax in the header, of as many characters; the pixels stay."""
    assert len(old) == len(new)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(f"{old}\0".encode(), f"{new}\0".encode()))


def fragment_native(place: Path) -> None:
    """Plain pixels in a chain of fragments, in the plainest transfer syntax."""

    def pack(_: int, dataset: FileDataset) -> None:
        dataset.PixelData = encapsulate([dataset.PixelData])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = RLELossless

    rename_syntax(write_chest(place, edit=pack), RLELossless, ExplicitVRLittleEndian)


def grow_codestream(index: int, dataset: FileDataset) -> None:
    """A JPEG 2000 codestream of 2^31 by 2^31 pixels in a slice of 64 x 64. Source: ITU T.800, SIZ marker."""
    if index == 10:
        data = bytearray(dataset.PixelData)
        place = data.index(b"\xff\x51") + 6
        struct.pack_into(">8I", data, place, *(2**31 - 1,) * 2, 0, 0, *(2**31 - 1,) * 2, 0, 0)
        dataset.PixelData = bytes(data)


def grow_jpeg(marker: bytes) -> Edit:
    """A JPEG or JPEG-LS stream of 65,535 by 65,535 pixels in a slice of 64 x 64."""

    def change(index: int, dataset: FileDataset) -> None:
        if index == 10:
            data = bytearray(dataset.PixelData)
            struct.pack_into(">HH", data, data.index(marker) + 5, 65535, 65535)
            dataset.PixelData = bytes(data)

    return change


def as_jpeg(change: Edit | None = None) -> Write:
    """A series of 8-bit JPEG slices."""

    def encode(index: int, dataset: FileDataset) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<u2").reshape(64, 64) // 16
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.RescaleSlope = 8, 8, 7, 16
        dataset.PixelData = encapsulate([cv2.imencode(".jpg", pixels.astype(np.uint8))[1].tobytes()])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        if change is not None:
            change(index, dataset)

    return edit(encode)


def cut_fragment(place: Path) -> None:
    cut(write_in(JPEG2000Lossless, place)[5], 0.9)


def write_in(syntax: str, place: Path) -> list[Path]:
    """A sound series in a compressed transfer syntax."""
    return write_chest(place, edit=lambda _, dataset: dataset.compress(syntax, generate_instance_uid=False))


def deflate(change: Callable[[bytes], bytes], number: int = 4) -> Write:
    """A deflated series; the packed data set of one slice is changed."""

    def write(place: Path) -> None:
        paths = write_chest(
            place, edit=lambda _, data: setattr(data.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian)
        )
        head, packed = split(paths[number])
        paths[number].write_bytes(head + change(packed))

    return write


def deflate_short(index: int, dataset: FileDataset) -> None:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if index == 4:
        dataset.PixelData = dataset.PixelData[:4096]


def inflate_to_bomb(packed: bytes) -> bytes:
    """The data set, its pixels as many zeros as BOMB_BYTES."""
    plain = zlib.decompress(packed, -zlib.MAX_WBITS)
    return deflate_bomb(plain[: plain.index(PIXEL_DATA) + 8] + struct.pack("<I", BOMB_BYTES), BOMB_BYTES)


def nest(depth: int) -> bytes:
    """Sequences of undefined length in sequences, as many as `depth`."""
    open_item = struct.pack("<HH2sHIHHI", 0x0041, 0x1001, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    close_item = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return open_item * depth + close_item * depth


def empty_last(paths: list[Path]) -> None:
    paths[-1].unlink()
    paths[-1].with_suffix("").touch()


def make_empty_dataset() -> bytes:
    """A file with magic word and meta group, and nothing behind them."""
    body = io.BytesIO()
    dataset = make_slice(make_chest()[0], (0, 0, 0))
    empty = FileDataset("", {}, file_meta=dataset.file_meta, preamble=b"\0" * 128)
    empty.save_as(body, enforce_file_format=True)
    return body.getvalue()


def make_dose_report() -> bytes:
    """A structured report of dose: CT study, no pixels."""
    body = io.BytesIO()
    dataset = make_slice(make_chest()[0], (0, 0, 0), Modality="SR", SOPClassUID=ComprehensiveSRStorage)
    for name in ("PixelData", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"):
        del dataset[name]
    item = Dataset()
    item.ValueType, item.TextValue = "TEXT", "CTDIvol 8.1 mGy"
    dataset.ContentSequence = [item]
    dataset.save_as(body, enforce_file_format=True)
    return body.getvalue()


def make_zip() -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        file.writestr("readme", "not a slice")
    return body.getvalue()


def write_ten_thousand(place: Path) -> None:
    """10,000 names of one slice."""
    (first,) = write_chest(place, make_chest()[:1])
    for index in range(1, 10_000):
        (place / f"{index:05d}.dcm").hardlink_to(first)


def move(index: int, x_mm: float, y_mm: float = -190.0) -> Write:
    """One slice moved in its plane."""
    return one(index, ImagePositionPatient=[x_mm, y_mm, 500.0 - index * SPACING_MM[0]])


JPEG, JPEG_LS = b"\xff\xc0", b"\xff\xf7"  # the markers in front of a frame's size
TWICE_MM = [-190.0, -190.0, 500.0 - 4 * SPACING_MM[0]]
HEAD = make_head(1, shape=(16, 96, 96), spacing_mm=(14.0, 3.0, 3.0))
ABDOMEN = make_true_abdomen(1, shape=(16, 96, 96), spacing_mm=(14.0, 4.3, 4.3))
VIDEO = "1.2.840.10008.1.2.4.100"
NO_FRAGMENT = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE0DD, 0)
HTML = b"<html>503</html>"

KINDS = {
    "MR": Case(tag(Modality="MR"), Status.SKIP_MODALITY, "not CT"),
    "CR": Case(tag(Modality="CR"), Status.SKIP_MODALITY, "not CT"),
    "PET": Case(tag(Modality="PT"), Status.SKIP_MODALITY, "not CT"),
    "no modality": Case(tag(Modality=None), Status.SKIP_MODALITY, "not CT"),
    "dose report": Case(bare(make_dose_report()), Status.SKIP_MODALITY, "not CT"),
    "scout": Case(tag(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), Status.SKIP_LOCALIZER, "scout"),
    "screenshot": Case(tag(SOPClassUID=SecondaryCaptureImageStorage), Status.SKIP_SECONDARY, "secondary"),
    "multi-frame": Case(tag(NumberOfFrames=2, PixelData=b"\0" * 64 * 64 * 4), Status.SKIP_MULTIFRAME, "frames"),
    "coronal": Case(edit(coronal), Status.SKIP_ORIENTATION, "coronal"),
    "sagittal": Case(edit(sagittal), Status.SKIP_ORIENTATION, "sagittal"),
    "oblique": Case(edit(oblique), Status.SKIP_ORIENTATION, "oblique"),
    "nine slices": Case(lambda place: write_chest(place, make_chest()[:9]), Status.SKIP_FEW_SLICES, "9 slices"),
    "no lung": Case(lambda place: write_chest(place, make_abdomen()), Status.SKIP_NO_LUNG, "no lung"),
    "head": Case(
        lambda place: write_dicom(HEAD, place),
        Status.SKIP_NO_LUNG,
        "no lung",
    ),
    "abdomen": Case(
        lambda place: write_dicom(ABDOMEN, place),
        Status.SKIP_NO_LUNG,
        "no lung",
    ),
}
FILES = {
    "empty file": Case(bare(b""), Status.BAD_UNREADABLE, "1.dcm: should be DICOM"),
    "zeros": Case(bare(bytes(9000)), Status.BAD_UNREADABLE, "1.dcm: should be DICOM"),
    "HTML named .dcm": Case(bare(HTML), Status.BAD_UNREADABLE, "1.dcm: should be DICOM"),
    "ZIP named .dcm": Case(bare(make_zip()), Status.BAD_UNREADABLE, "1.dcm: should be DICOM"),
    "ZIP among slices": Case(among(make_zip()), Status.BAD_UNREADABLE, "021.dcm: should be DICOM"),
    "magic word alone": Case(bare(bytes(128) + b"DICM"), Status.BAD_UNREADABLE, "1.dcm: "),
    "noise behind the magic word": Case(
        bare(bytes(128) + b"DICM" + np.random.default_rng(1).bytes(5000)), Status.BAD_UNREADABLE, "1.dcm: "
    ),
    "empty data set": Case(bare(make_empty_dataset()), Status.BAD_UNREADABLE, "without a single needed tag"),
    "empty data set among slices": Case(among(make_empty_dataset()), Status.BAD_UNREADABLE, "021.dcm: DICOM file"),
    "empty data set without magic word": Case(
        among(make_empty_dataset()[132:]), Status.BAD_UNREADABLE, "021.dcm: should be DICOM"
    ),
    "a file named like nothing": Case(bare(make_empty_dataset(), "data"), Status.BAD_UNREADABLE, "needed tag"),
    "header cut": Case(spoil(lambda paths: cut(paths[3], 0.02)), Status.BAD_UNREADABLE, "021.dcm: "),
    "element cut": Case(spoil(lambda paths: cut(paths[3], 0.05)), Status.BAD_TRUNCATED, "021.dcm: "),
    "empty slice": Case(spoil(lambda paths: cut(paths[3], 0)), Status.BAD_UNREADABLE, "021.dcm: "),
    "empty slice without suffix": Case(spoil(empty_last), Status.BAD_UNREADABLE, "017: "),
    "pixels cut": Case(spoil(lambda paths: cut(paths[3], 0.8)), Status.BAD_TRUNCATED, "021.dcm: pixel data ends"),
    "pixels cut where linear reads nothing": Case(
        spoil(lambda paths: cut(paths[0], 0.9)), Status.BAD_TRUNCATED, "000.dcm: "
    ),
    "pixel data too short for its rows": Case(
        one(4, PixelData=b"\0" * 64), Status.BAD_TRUNCATED, "004.dcm: pixel data declares 64 bytes"
    ),
    "no pixel data": Case(tag(PixelData=None), Status.BAD_TRUNCATED, "000.dcm: ends before"),
    "sequences 5,000 deep": Case(
        spoil(lambda paths: insert(paths[3], nest(DEPTH))), Status.BAD_UNREADABLE, "021.dcm: header does not parse"
    ),
}
TAGS = {
    "Rows 0": Case(tag(Rows=0), Status.BAD_HEADER, "000.dcm: image of 0 x 64"),
    "no Rows": Case(tag(Rows=None), Status.BAD_HEADER, "000.dcm: image of 0 x 64"),
    "two Rows": Case(tag(Rows=[64, 64]), Status.BAD_UNREADABLE, "000.dcm: header does not parse"),
    "one column": Case(tag(Columns=1), Status.BAD_HEADER, "000.dcm: image of 64 x 1"),
    "65,535 x 65,535": Case(tag(Rows=65535, Columns=65535), Status.BAD_LIMIT, "bytes decoded"),
    "65,535 x 65,535 in one slice": Case(one(4, Rows=65535, Columns=65535), Status.BAD_LIMIT, "bytes decoded"),
    "2^31 frames": Case(tag(NumberOfFrames=2**31 - 1), Status.BAD_HEADER, "000.dcm: NumberOfFrames"),
    "more frames than a number can say": Case(
        raw("NumberOfFrames", "99999999999"), Status.BAD_HEADER, "NumberOfFrames"
    ),
    "no frame": Case(tag(NumberOfFrames=0), Status.BAD_HEADER, "000.dcm: NumberOfFrames is 0"),
    "frames below nothing": Case(tag(NumberOfFrames=-1), Status.BAD_HEADER, "000.dcm: NumberOfFrames is -1"),
    "no position": Case(tag(ImagePositionPatient=None), Status.BAD_HEADER, "000.dcm: ImagePosition"),
    "position NaN": Case(raw("ImagePositionPatient", "nan\\nan\\nan"), Status.BAD_HEADER, "ImagePosition"),
    "position of two numbers": Case(raw("ImagePositionPatient", "1\\2"), Status.BAD_HEADER, "ImagePosition"),
    "position beyond the world": Case(
        one(10, ImagePositionPatient=["-190", "-190", "1e300"]), Status.BAD_HEADER, "022.dcm: ImagePosition"
    ),
    "no orientation": Case(tag(ImageOrientationPatient=None), Status.BAD_HEADER, "Orientation"),
    "orientation of zeros": Case(tag(ImageOrientationPatient=[0] * 6), Status.BAD_GEOMETRY, "000.dcm: "),
    "skewed orientation": Case(tag(ImageOrientationPatient=[1, 0, 0, 0.5, 0.9, 0]), Status.BAD_GEOMETRY, "000.dcm: "),
    "no pixel spacing": Case(tag(PixelSpacing=None), Status.BAD_HEADER, "000.dcm: PixelSpacing"),
    "pixel spacing NaN": Case(raw("PixelSpacing", "nan\\nan"), Status.BAD_HEADER, "000.dcm: PixelSpacing"),
    "pixel spacing 0": Case(tag(PixelSpacing=[0, 0]), Status.BAD_HEADER, "000.dcm: PixelSpacing"),
    "pixel spacing below 0": Case(tag(PixelSpacing=[-6, 6]), Status.BAD_HEADER, "000.dcm: PixelSpacing"),
    "pixel spacing of a kilometre": Case(tag(PixelSpacing=[1e6, 1e6]), Status.BAD_HEADER, "000.dcm: PixelSpacing"),
    "pixel spacing in words": Case(raw("PixelSpacing", "six\\six"), Status.BAD_UNREADABLE, "000.dcm: header"),
    "slope 0": Case(tag(RescaleSlope=0), Status.BAD_HEADER, "000.dcm: RescaleSlope"),
    "slope NaN": Case(raw("RescaleSlope", "nan"), Status.BAD_HEADER, "000.dcm: RescaleSlope"),
    "slope inf": Case(raw("RescaleSlope", "inf"), Status.BAD_HEADER, "000.dcm: RescaleSlope"),
    "slope 1e300": Case(tag(RescaleSlope="1e300"), Status.BAD_INTENSITY, ""),
    "slope of one slice 1e300": Case(one(10, RescaleSlope="1e300"), Status.BAD_INTENSITY, "cannot be HU"),
    "slope below 0": Case(tag(RescaleSlope=-1, RescaleIntercept=1024), Status.BAD_INTENSITY, "no air"),
    "intercept NaN": Case(raw("RescaleIntercept", "nan"), Status.BAD_HEADER, "000.dcm: RescaleSlope"),
    "intercept 1e30": Case(tag(RescaleIntercept="1e30"), Status.BAD_INTENSITY, ""),
    "no rescale in one slice": Case(edit(drop_rescale), Status.BAD_MIXED_SERIES, "2 ways"),
    "no series": Case(tag(SeriesInstanceUID=""), Status.BAD_HEADER, "000.dcm: SeriesInstanceUID"),
    "colour": Case(tag(SamplesPerPixel=3, PixelData=b"\0" * 64 * 64 * 6), Status.BAD_PIXELS, "000.dcm: 3 samples"),
    "no samples": Case(tag(SamplesPerPixel=0), Status.BAD_PIXELS, "000.dcm: 0 samples"),
    "12 bits allocated": Case(tag(BitsAllocated=12), Status.BAD_PIXELS, "000.dcm: 1 samples of 12"),
    "64 bits allocated": Case(
        tag(BitsAllocated=64, PixelData=b"\0" * 64 * 64 * 8), Status.BAD_PIXELS, "000.dcm: 1 samples of 64"
    ),
    "99 bits stored": Case(tag(BitsStored=99), Status.BAD_HEADER, "000.dcm: "),
    "no bit stored": Case(tag(BitsStored=0), Status.BAD_HEADER, "000.dcm: "),
    "high bit 40": Case(tag(HighBit=40), Status.BAD_HEADER, "000.dcm: "),
    "palette without a table": Case(tag(PhotometricInterpretation="PALETTE COLOR"), Status.BAD_PIXELS, "000.dcm: "),
    "pixel representation 7": Case(tag(PixelRepresentation=7), Status.BAD_HEADER, "000.dcm: "),
    "no air": Case(lambda place: write_chest(place, make_chest().clip(-100)), Status.BAD_INTENSITY, "no air"),
    "constant": Case(lambda place: write_chest(place, make_chest() * 0 - 1000), Status.BAD_INTENSITY, "same value"),
    "impossible HU": Case(
        lambda place: write_chest(place, (make_chest() + 1000) * 20 - 1000), Status.BAD_INTENSITY, "cannot be HU"
    ),
}
SERIES = {
    "gap": Case(spoil(lambda paths: paths[10].unlink()), Status.BAD_MISSING_SLICE, "1 gaps"),
    "two gaps": Case(spoil(lambda paths: (paths[4].unlink(), paths[15].unlink())), Status.BAD_MISSING_SLICE, "2 gaps"),
    "same position twice": Case(one(5, ImagePositionPatient=TWICE_MM), Status.BAD_DUPLICATE_SLICE, "1 slices"),
    "a slice copied": Case(
        spoil(lambda paths: (paths[0].parent / "copy.dcm").write_bytes(paths[7].read_bytes())),
        Status.BAD_DUPLICATE_SLICE,
        "1 slices",
    ),
    "uneven slices": Case(edit(uneven), Status.BAD_GEOMETRY, "apart"),
    "two patients": Case(one(5, PatientID="patient-2"), Status.BAD_MIXED_SERIES, "2 patients"),
    "two pixel sizes": Case(one(5, PixelSpacing=[5.0, 5.0]), Status.BAD_MIXED_SERIES, "2 pixel sizes"),
    "two orientations": Case(one(5, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), Status.BAD_MIXED_SERIES, "2 orient"),
    "two image sizes": Case(one(5, Rows=32, Columns=128), Status.BAD_MIXED_SERIES, "2 image sizes"),
    "sheared by a tilt": Case(edit(shear), Status.BAD_TILT, "tilted by 9.5"),
    "tilt stated": Case(tag(GantryDetectorTilt=15.0), Status.BAD_TILT, "tilted by 15.0"),
    "a slice moved in plane": Case(move(10, -110.0, -250.0), Status.BAD_GEOMETRY, "beside the line"),
    "the last slice moved a little": Case(move(23, -196.5), Status.BAD_TILT, "tilted by 1.3"),
    "the slice before the last moved a little": Case(move(22, -196.5), Status.BAD_GEOMETRY, "beside the line"),
}
PACKED = {
    "fragment cut": Case(cut_fragment, Status.BAD_TRUNCATED, "011.dcm: compressed pixel data ends early"),
    "garbled codestream": Case(
        compressed(JPEG2000Lossless, garble_codestream), Status.BAD_PIXELS, "000.dcm: slice does not decode"
    ),
    "no fragment": Case(
        compressed(RLELossless, lambda _, data: setattr(data, "PixelData", NO_FRAGMENT)),
        Status.BAD_TRUNCATED,
        "000.dcm: no compressed pixel data",
    ),
    "chain of fragments broken": Case(
        compressed(JPEGLSLossless, break_chain), Status.BAD_PIXELS, "000.dcm: chain of compressed fragments"
    ),
    "offset table beyond the pixels": Case(
        compressed(JPEG2000Lossless, replace_offsets(struct.pack("<I", 0xFFFFFF00))), Status.BAD_PIXELS, "022.dcm: "
    ),
    "offset table into a fragment": Case(
        compressed(RLELossless, replace_offsets(struct.pack("<I", 6))), Status.BAD_PIXELS, "022.dcm: "
    ),
    "offset table of half a number": Case(
        compressed(JPEGLSLossless, replace_offsets(b"\0\0")), Status.BAD_PIXELS, "022.dcm: "
    ),
    "fragments of native pixels": Case(fragment_native, Status.BAD_PIXELS, "000.dcm: fragments of pixels"),
    "native pixels of a slice named RLE": Case(
        spoil(lambda paths: rename_syntax(paths[:1], new=RLELossless)), Status.BAD_PIXELS, "000.dcm: pixels in one"
    ),
    "unknown transfer syntax": Case(spoil(rename_syntax), Status.BAD_PIXELS, "000.dcm: "),
    "video": Case(
        compressed(RLELossless, lambda _, data: setattr(data.file_meta, "TransferSyntaxUID", VIDEO)),
        Status.BAD_PIXELS,
        "000.dcm: ",
    ),
    "JPEG named JPEG 2000": Case(
        as_jpeg(lambda _, data: setattr(data.file_meta, "TransferSyntaxUID", JPEG2000Lossless)),
        Status.BAD_PIXELS,
        "000.dcm: ",
    ),
    "JPEG 2000 bomb": Case(compressed(JPEG2000Lossless, grow_codestream), Status.BAD_PIXELS, "022.dcm: "),
    "JPEG-LS bomb": Case(compressed(JPEGLSLossless, grow_jpeg(JPEG_LS)), Status.BAD_PIXELS, "022.dcm: "),
    "JPEG bomb": Case(as_jpeg(grow_jpeg(JPEG)), Status.BAD_PIXELS, "022.dcm: "),
    "deflated pixels cut": Case(edit(deflate_short), Status.BAD_TRUNCATED, "004.dcm: "),
    "deflated stream cut": Case(deflate(lambda packed: packed[:-200]), Status.BAD_UNREADABLE, "004.dcm: "),
    "deflated stream of noise": Case(deflate(lambda _: b"\x55" * 4000), Status.BAD_UNREADABLE, "004.dcm: "),
    "deflate bomb": Case(deflate(inflate_to_bomb), Status.ERR_MEMORY, ""),
    **{
        f"garbage in a fragment of {name}": Case(
            compressed(syntax, replace_fragment(np.random.default_rng(2).bytes(3000))),
            Status.BAD_PIXELS,
            "022.dcm: slice does not decode",
        )
        for name, syntax in (("JPEG 2000", JPEG2000Lossless), ("JPEG-LS", JPEGLSLossless), ("RLE", RLELossless))
    },
}
SLOW_CASES = {"10,000 slices": Case(write_ten_thousand, Status.BAD_LIMIT, "10000 slices")}  # half a minute
DICOM_CASES = {**KINDS, **FILES, **TAGS, **SERIES, **PACKED}
