"""Every faster decoder gives SimpleITK's values to the last HU, and leaves to it what is not as declared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jpeg_ls
import numpy as np
import pytest
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from darnet.decode import read_dicom_slice
from darnet.reading.dicom import read_header
from darnet.reading.stored_pixels import read_stored_pixels
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
    *((syntax, bits, signed) for syntax in (*NATIVE, JPEGLSLossless) for bits in (12, 16) for signed in (False, True)),
    *((JPEGLSNearLossless, bits, False) for bits in (12, 16)),
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
    if fast is None:
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
    assert folder.name not in ("lidc-idri-0314", "A0002-B40f-8mm") or fast is not None


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless], ids=lambda uid: uid.name)
def test_other_syntaxes_are_left_to_simpleitk(syntax: Any, tmp_path: Path) -> None:
    fast, reference = read_both(store(tmp_path / "a.dcm", syntax, draw_values(16, False)))
    assert fast is None
    np.testing.assert_array_equal(reference, draw_values(16, False).astype(np.float32) - 1024)


def cut_frame(dataset: FileDataset) -> None:
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 2]


DECLINED = {
    "another size than declared": (JPEGLSLossless, {}, lambda dataset: setattr(dataset, "Rows", 47)),
    "overlays above the bits stored": (ExplicitVRLittleEndian, {"BitsStored": 12, "HighBit": 11}, lambda _: None),
    "bits stored elsewhere": (ExplicitVRLittleEndian, {"BitsStored": 12, "HighBit": 15}, lambda _: None),
    "inverted": (ExplicitVRLittleEndian, {"PhotometricInterpretation": "MONOCHROME1"}, lambda _: None),
    "no rescale": (ExplicitVRLittleEndian, {"RescaleSlope": None}, lambda _: None),
    "not a CT image": (ExplicitVRLittleEndian, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, lambda _: None),
    "a cut stream": (JPEGLSLossless, {}, cut_frame),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_not_a_plain_slice_as_declared_is_left_to_simpleitk(reason: str, tmp_path: Path) -> None:
    syntax, tags, edit = DECLINED[reason]
    path = store(tmp_path / "a.dcm", syntax, draw_values(16, False), edit, **tags)
    layout = find_layout(path)
    assert layout is None or read_stored_pixels(path, layout) is None


def test_a_file_that_was_cut_after_its_header_was_read_is_left_to_simpleitk(tmp_path: Path) -> None:
    path = store(tmp_path / "a.dcm", ExplicitVRLittleEndian, draw_values(16, False))
    layout = find_layout(path)
    assert layout is not None
    path.write_bytes(path.read_bytes()[:-10])
    assert read_stored_pixels(path, layout) is None
    path.unlink()
    assert read_stored_pixels(path, layout) is None
