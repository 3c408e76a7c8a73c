"""A header is read as pydicom reads it or left to pydicom, whatever is in it."""

import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)

from darnet.errors import ScanError
from darnet.reading.dicom import read_header
from darnet.reading.plain_header import read_plain_header
from darnet.scan import StagedFile
from tests.ct_fixtures import make_slice
from tests.hostile import CASES, QUICK_CASES
from tests.places import SHARED

SERIES = SHARED / "data" / "ct"
PYDICOM_DATA = Path(pydicom.data.__file__).parent
Edit = Callable[[FileDataset], None]


def write(path: Path, *edits: Edit, syntax: str = ExplicitVRLittleEndian) -> Path:
    """One slice, changed before it is written in a transfer syntax."""
    dataset = make_slice(np.zeros((4, 4), np.int16), (-190.0, -190.5, 1e3))
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == JPEGLSLossless:
        dataset.PixelData = encapsulate([b"ab"])
        dataset["PixelData"].is_undefined_length = True
    for edit in edits:
        edit(dataset)
    dataset.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, enforce_file_format=True)
    return path


def add_what_is_skipped(dataset: FileDataset) -> None:
    """Private elements, long values, and sequences of defined and undefined length in one another."""
    dataset.private_block(0x0009, "GEMS", create=True).add_new(1, "OB", bytes(300))
    dataset.StudyDescription, dataset.SpecificCharacterSet = "Thorax ü", "ISO_IR 100"
    inner = Dataset()
    inner.ReferencedSOPClassUID, inner.ImageType = "1.2", ["A"]
    for name in ("ReferencedImageSequence", "RequestAttributesSequence"):
        outer = Dataset()
        outer.PurposeOfReferenceCodeSequence, outer.Rows = [inner, inner], 7
        outer["PurposeOfReferenceCodeSequence"].is_undefined_length = name.startswith("Request")
        setattr(dataset, name, [outer])
        dataset[name].is_undefined_length = True
        dataset[name].value[0].is_undefined_length_sequence_item = name.startswith("Request")


def leave_empty(dataset: FileDataset) -> None:
    dataset.Manufacturer, dataset.PatientID, dataset.GantryDetectorTilt, dataset.ImageType = "", None, None, ""


def describe(path: Path, *, by_pydicom: bool) -> str:
    """All that is said of a file; NaN equals NaN here."""
    try:
        return repr(read_header(StagedFile(path.name, path, path.name), by_pydicom=by_pydicom))
    except ScanError as error:
        return repr((error.status, error.detail))


def is_plain(path: Path) -> bool:
    with path.open("rb") as body:
        return read_plain_header(body) is not None


def is_read_alike(path: Path) -> bool:
    return describe(path, by_pydicom=False) == describe(path, by_pydicom=True)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless])
@pytest.mark.parametrize("edit", [lambda _: None, add_what_is_skipped, leave_empty])
def test_a_plain_header_is_read_without_pydicom_to_the_same_values(edit: Edit, syntax: str, tmp_path: Path) -> None:
    path = write(tmp_path / "slice", edit, syntax=syntax)
    assert is_plain(path)
    assert is_read_alike(path)
    assert "position_mm=(-190.0, -190.5, 1000.0)" in describe(path, by_pydicom=False)


def say_unknown(data: bytes) -> bytes:
    """As in files that other means than their standard's wrote, of which LIDC is full: UN for all but the meta's."""
    pieces, places = [data[:132]], list_places(data)
    for place, end in pairwise([*places, data.index(b"\xe0\x7f\x10\0")]):
        length = struct.pack("<I", end - place - 8)
        is_kept = data[place : place + 2] == b"\2\0" or length == bytes(4)
        pieces.append(
            data[place:end] if is_kept else data[place : place + 4] + b"UN\0\0" + length + data[place + 8 : end]
        )
    return b"".join([*pieces, data[data.index(b"\xe0\x7f\x10\0") :]])


def test_unknown_representations_are_those_of_the_dictionary(tmp_path: Path) -> None:
    path = write(tmp_path / "slice", lambda dataset: setattr(dataset, "SpecificCharacterSet", "ISO_IR 100"))
    path.write_bytes(say_unknown(path.read_bytes()))
    assert b"\x28\0\x10\0UN\0\0" in path.read_bytes()
    assert is_plain(path)
    assert is_read_alike(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda dataset: setattr(dataset, "SpecificCharacterSet", "ISO_IR 13"),
        lambda dataset: setattr(dataset, "PatientID", "Müller"),
        lambda dataset: setattr(dataset, "PixelSpacing", [1, 1, 1]),
        lambda dataset: setattr(dataset, "Modality", ["CT", "MR"]),
        lambda dataset: setattr(dataset, "Rows", [4, 4]),
        lambda dataset: delattr(dataset, "SOPClassUID"),
        lambda dataset: delattr(dataset, "PixelData"),
        lambda dataset: setattr(dataset, "EncapsulatedDocument", bytes(70_000)),
    ],
)
def test_an_unusual_header_is_left_to_pydicom(edit: Edit, tmp_path: Path) -> None:
    path = write(tmp_path / "slice", edit)
    assert not is_plain(path)
    assert is_read_alike(path)


def test_a_deflated_file_is_left_to_pydicom(tmp_path: Path) -> None:
    assert not is_plain(write(tmp_path / "slice", syntax=DeflatedExplicitVRLittleEndian))


def test_no_file_of_pydicom_is_read_otherwise() -> None:
    paths = [path for path in sorted(PYDICOM_DATA.rglob("*")) if path.is_file() and path.stat().st_size < 2 << 20]
    assert [path for path in paths if not is_read_alike(path)] == []
    assert sum(map(is_plain, paths)) > 50


@pytest.mark.skipif(not SERIES.is_dir(), reason=f"no real CT at {SERIES}")
def test_every_real_chest_is_read_without_pydicom_to_the_same_values() -> None:
    paths = [path for path in SERIES.rglob("*") if path.is_file()]
    assert [path for path in paths if not is_read_alike(path)] == []
    assert [path for path in paths if path.suffix == ".dcm" and "odd" not in path.parts and not is_plain(path)] == []


@pytest.mark.slow
def test_no_hostile_file_is_read_otherwise(tmp_path: Path) -> None:
    for name in QUICK_CASES:
        CASES[name].write(tmp_path / name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if not is_read_alike(path)] == []


VALUES = (
    b"", b"  ", b"\0\0", b" 1", b"1\\2 ", b"+1.5", b"1e3 ", b"nan ", b"inf ", b"0x10", b"1_0 ", b"-0", b"1.2\0",
    b"AB CD ", b" AB ", b"A\\\\B ", b"ab", b"9" * 20, b"1" * 40, b"\xb5 ", b"3.5 \0 ", b"1E400 ", b"- 1 ", b"1.", b".5",
    b"1 2 ", b"utf-16", b"ISO_IR 13 ", b"\\ISO_IR 100 ", b"\\ ", b"1.2\\3.4 ",
)  # fmt: skip


def list_places(data: bytes) -> list[int]:
    """Where the elements of an explicit header begin, those of the meta information first."""
    places, place = [], 132
    while data[place : place + 4] != b"\xe0\x7f\x10\0":
        places.append(place)
        is_long = data[place + 4 : place + 6] in (b"OB", b"UN", b"SQ", b"UT")
        length = struct.unpack_from("<I" if is_long else "<H", data, place + (8 if is_long else 6))[0]
        place += (12 if is_long else 8) + length
    return places


def mutate(data: bytes, places: list[int], rng: random.Random) -> bytes:
    """A byte, a length, a representation or a value changed; an element twice, gone, or with another's tag."""
    index = rng.randrange(len(places) - 1)
    place, following = places[index], places[index + 1]
    element = data[place:following]
    kind = rng.randrange(7)
    if kind == 0:
        at = rng.randrange(place, following)
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        value = rng.choice(VALUES)
        element = element[:6] + struct.pack("<H", len(value)) + value
    elif kind == 2:
        element = element[:4] + rng.choice((b"UN", b"US", b"DS", b"IS", b"CS", b"LO", b"SQ", b"zz")) + element[6:]
    elif kind == 3:
        element = element[:6] + struct.pack("<H", rng.randrange(40)) + element[8:]
    elif kind == 4:
        element = data[rng.choice(places) :][:4] + element[4:]
    else:
        element *= 2 * (kind - 5)
    return data[:place] + element + data[following:]


def test_no_mutated_header_is_read_otherwise(tmp_path: Path) -> None:
    rng = random.Random(0)
    sound = [write(tmp_path / "sound", *edits).read_bytes() for edits in ((), (leave_empty,))]
    places = [list_places(data) for data in sound]
    path, num_plain = tmp_path / "mutated", 0
    for _ in range(400):
        which = rng.randrange(len(sound))
        path.write_bytes(mutate(sound[which], places[which], rng))
        if is_plain(path):
            num_plain += 1
            assert is_read_alike(path), path.read_bytes()
    assert 50 < num_plain < 350
