"""Every faster decoder gives SimpleITK's values to the last HU, and leaves to it what is not as declared."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import imagecodecs
import jpeg_ls
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from darnet.config import DecodeConfig
from darnet.decode import open_images, read_dicom_slice
from darnet.errors import ScanError
from darnet.reading.dicom import read_header
from darnet.reading.stored_pixels import parse_gray_size, read_gray_jpeg, read_gray_png, read_stored_pixels
from darnet.scan import FloatArray, PixelLayout, StagedFile
from tests.ct_fixtures import make_slice
from tests.places import SHARED

REAL = [
    SHARED / "data" / "ct" / name
    for name in ("lidc-idri-0314", "weasis-chest-rt", "lung-pet-ct-dx/A0002-B40f-8mm", "odd/wado")
]
NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
# The near-lossless encoder at hand takes unsigned values only.
STORED = [
    *(
        (syntax, bits, signed)
        for syntax in (*NATIVE, JPEGLSLossless, JPEG2000Lossless, RLELossless)
        for bits in (12, 16)
        for signed in (False, True)
    ),
    *((JPEGLSNearLossless, bits, False) for bits in (12, 16)),
    *((JPEG2000, 16, signed) for signed in (False, True)),  # what is lossy may leave its 12 bits
]
RESCALES = [(1, -1024), (1, 0), (2, -1000), (0.5, -1024), (1.25, -1024.5), (-1, 300), (0.488281, -1023.7), (1000, 7)]


def find_layout(path: Path) -> PixelLayout | None:
    header = read_header(StagedFile(path.name, path, path.name))
    assert header is not None
    return header.layout


def read_both(path: Path) -> tuple[FloatArray | None, FloatArray]:
    """The fast way, None where it declines, and SimpleITK."""
    layout = find_layout(path)
    return None if layout is None else read_stored_pixels(path, layout), read_dicom_slice(path)


def store(
    path: Path, syntax: Any, stored: Any, edit: Callable[[FileDataset], None] = lambda _: None, **tags: Any
) -> Path:
    """A slice of these stored values, with an edit after they are encoded."""
    is_signed = stored.dtype == np.int16
    dataset = make_slice(np.zeros(stored.shape, np.int16), (0, 0, 0), PixelRepresentation=int(is_signed), **tags)
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax == JPEGLSNearLossless:
        dataset.PixelData = encapsulate([jpeg_ls.encode(stored, lossy_error=3).tobytes()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == JPEG2000:
        lossy = imagecodecs.jpeg2k_encode(stored, codecformat="j2k", level=40, reversible=False)
        dataset.PixelData = encapsulate([lossy])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == JPEGLosslessSV1:
        lossless = imagecodecs.jpeg8_encode(stored.view(np.uint16), lossless=True, predictor=1, bitspersample=16)
        dataset.PixelData = encapsulate([bytes(lossless)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax in NATIVE:
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        dataset.compress(syntax, generate_instance_uid=False)
    edit(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def draw_values(bits: int, is_signed: bool) -> Any:
    low = -(1 << bits - 1) if is_signed else 0
    values = np.random.default_rng(bits).integers(low, low + (1 << bits), (48, 64))
    values.flat[:2] = low, low + (1 << bits) - 1
    return values.astype(np.int16 if is_signed else np.uint16)


@pytest.mark.parametrize("slope_intercept", RESCALES)
@pytest.mark.parametrize(("syntax", "bits", "is_signed"), STORED)
def test_the_fast_way_gives_simpleitks_values(
    syntax: Any, bits: int, is_signed: bool, slope_intercept: tuple[float, float], tmp_path: Path
) -> None:
    slope, intercept = slope_intercept
    tags = {"BitsStored": bits, "HighBit": bits - 1, "RescaleSlope": slope, "RescaleIntercept": intercept}
    fast, reference = read_both(store(tmp_path / "a.dcm", syntax, draw_values(bits, is_signed), **tags))
    if fast is None:  # the encoder at hand stores signs in all 16 bits
        assert (syntax, bits, is_signed) == (JPEGLSLossless, 12, True)
    else:
        np.testing.assert_array_equal(fast, reference)


@pytest.mark.parametrize("folder", REAL, ids=lambda path: path.name)
def test_the_fast_way_gives_simpleitks_values_on_real_slices(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip(f"no real CT at {folder}")
    paths = [path for path in sorted(folder.glob("*.dcm")) if "no-pixel" not in path.name and "CT0012" not in path.name]
    for path in paths[:: max(1, len(paths) // 12)]:
        fast, reference = read_both(path)
        if fast is not None:
            np.testing.assert_array_equal(fast, reference, err_msg=path.name)
    assert folder.name == "wado" or fast is not None


def test_other_syntaxes_are_left_to_simpleitk(tmp_path: Path) -> None:
    fast, reference = read_both(store(tmp_path / "a.dcm", JPEGLosslessSV1, draw_values(16, False)))
    assert fast is None
    np.testing.assert_array_equal(reference, draw_values(16, False).astype(np.float32) - 1024)


def cut_frame(dataset: FileDataset) -> None:
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 2]


def enlarge_stream(dataset: FileDataset) -> None:
    """A JPEG 2000 stream that says of itself to be 60,000 pixels high."""
    at = dataset.PixelData.index(b"\xff\x4f\xff\x51") + 12
    dataset.PixelData = dataset.PixelData[:at] + (60_000).to_bytes(4, "big") + dataset.PixelData[at + 4 :]


DECLINED = {
    "a larger stream than declared": (JPEG2000Lossless, {}, enlarge_stream),
    "another sign than declared": (
        *(JPEG2000Lossless, {}),
        lambda dataset: setattr(dataset, "PixelRepresentation", 1),
    ),
    "a cut stream of JPEG 2000": (JPEG2000Lossless, {}, cut_frame),
    "another size than declared": (JPEGLSLossless, {}, lambda dataset: setattr(dataset, "Rows", 47)),
    "overlays above the bits stored": (ExplicitVRLittleEndian, {"BitsStored": 12, "HighBit": 11}, lambda _: None),
    "bits stored elsewhere": (ExplicitVRLittleEndian, {"BitsStored": 12, "HighBit": 15}, lambda _: None),
    "inverted": (ExplicitVRLittleEndian, {"PhotometricInterpretation": "MONOCHROME1"}, lambda _: None),
    "no rescale": (ExplicitVRLittleEndian, {"RescaleSlope": None}, lambda _: None),
    "not a CT image": (ExplicitVRLittleEndian, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, lambda _: None),
    "a cut stream": (JPEGLSLossless, {}, cut_frame),
    "a cut stream of RLE": (RLELossless, {}, cut_frame),
    "another size than declared in RLE": (RLELossless, {}, lambda dataset: setattr(dataset, "Rows", 47)),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_not_a_plain_slice_as_declared_is_left_to_simpleitk(reason: str, tmp_path: Path) -> None:
    syntax, tags, edit = DECLINED[reason]
    path = store(tmp_path / "a.dcm", syntax, draw_values(16, False), edit, **tags)
    layout = find_layout(path)
    assert layout is None or read_stored_pixels(path, layout) is None


def refuse_or_read(path: Path) -> FloatArray | None:
    """What SimpleITK alone reads, None where it refuses."""
    try:
        return read_dicom_slice(path)
    except ScanError:
        return None


def test_a_damaged_stream_of_rle_is_read_as_simpleitk_reads_it_or_left_to_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    smooth = (np.add.outer(np.arange(48), np.arange(64)) * 9).astype(np.uint16)
    taken = 0
    for _ in range(150):
        place, bit = float(rng.random()), int(rng.integers(8))

        def damage(dataset: FileDataset, place: float = place, bit: int = bit) -> None:
            data = bytearray(dataset.PixelData)
            data[16 + int(place * (len(data) - 24))] ^= 1 << bit  # behind the table of offsets, within the fragment
            dataset.PixelData = bytes(data)

        path = store(tmp_path / "a.dcm", RLELossless, smooth, damage)
        layout, reference = find_layout(path), refuse_or_read(path)
        fast = None if layout is None else read_stored_pixels(path, layout)
        if fast is not None:
            taken += 1
            assert reference is not None
            np.testing.assert_array_equal(fast, reference)
    assert taken > 0


def test_a_file_that_was_cut_after_its_header_was_read_is_left_to_simpleitk(tmp_path: Path) -> None:
    path = store(tmp_path / "a.dcm", ExplicitVRLittleEndian, draw_values(16, False))
    layout = find_layout(path)
    assert layout is not None
    path.write_bytes(path.read_bytes()[:-10])
    assert read_stored_pixels(path, layout) is None
    path.unlink()
    assert read_stored_pixels(path, layout) is None


def write_png(path: Path, **changes: Any) -> NDArray[np.uint8]:
    """A gray image of these values, and the values."""
    values = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    Image.fromarray(values).save(path, **changes)
    return values


def test_a_gray_png_has_the_values_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = write_png(path)
    assert parse_gray_size(path.read_bytes()) == values.shape
    np.testing.assert_array_equal(read_gray_png(path), values)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), values)


def test_a_gray_jpeg_has_simpleitks_values_and_colour_is_left_to_it(tmp_path: Path) -> None:
    values, path = write_png(tmp_path / "a.png"), tmp_path / "a.jpg"
    for settings in ({}, {"quality": 30}, {"progressive": True}):
        Image.fromarray(values).save(path, **settings)
        np.testing.assert_array_equal(
            read_gray_jpeg(path, values.shape), sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        )
    assert read_gray_jpeg(path, (20, 31)) is None
    Image.fromarray(values).convert("RGB").save(path)
    assert read_gray_jpeg(path, values.shape) is None


def test_a_damaged_jpeg_is_read_as_simpleitk_reads_it_or_left_to_it(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(2), tmp_path / "a.jpg"
    values = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    Image.fromarray(values).save(path)
    whole, taken = path.read_bytes(), 0
    for _ in range(150):
        data = bytearray(whole)
        data[int(rng.integers(2, len(data) - 2))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        fast = read_gray_jpeg(path, values.shape)
        if fast is not None:
            taken += 1
            reader = sitk.ImageFileReader()
            reader.SetImageIO("JPEGImageIO")
            reader.SetFileName(str(path))
            np.testing.assert_array_equal(fast, sitk.GetArrayFromImage(reader.Execute()))
    assert taken > 0


class CountedPath(PosixPath):
    """Notes how often each file is opened."""

    opened: ClassVar[Counter[str]] = Counter()

    def open(self, *arguments: Any, **settings: Any) -> Any:
        self.opened[self.name] += 1
        return super().open(*arguments, **settings)


def test_a_png_is_opened_once_for_its_ends_and_once_for_its_pixels(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    for name in names:
        values = write_png(tmp_path / name)
    files = [StagedFile(name, CountedPath(tmp_path / name), name) for name in names]
    CountedPath.opened.clear()
    stack = open_images(files, DecodeConfig(), is_head_first=True)
    assert CountedPath.opened == dict.fromkeys(names, 1)
    pixels = stack.read_slice(4)
    np.testing.assert_array_equal(pixels, values)
    assert pixels.dtype == np.uint8  # a quarter of the bytes; only what is cropped becomes float32
    assert CountedPath.opened == dict.fromkeys(names, 1) | {"4.png": 2}


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "I;16", "LA"])
def test_a_png_of_another_kind_is_left_to_simpleitk(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path)
    Image.open(path).convert(mode).save(path)
    assert parse_gray_size(path.read_bytes()) is None
    assert read_gray_png(path) is None


@pytest.mark.parametrize("place", [18, 31, 60, -30])
def test_a_damaged_png_is_left_to_simpleitk(place: int, tmp_path: Path) -> None:
    """In its size, the sum over it, its pixels, and cut before their end."""
    path = tmp_path / "a.png"
    write_png(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data if place > 0 else data[:place])
    assert read_gray_png(path) is None


def test_a_transparent_gray_png_is_left_to_simpleitk(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", transparency=7)
    assert read_gray_png(tmp_path / "a.png") is None
