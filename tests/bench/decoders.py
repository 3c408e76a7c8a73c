"""Decoders of one slice against SimpleITK: `make bench-decoders` prints milliseconds and who agrees.

A phantom's slice of 512 x 512 is written in each format; every decoder opens the file, reads it and decodes it. They
take turns, and medians are told. All are asked for one thread; SimpleITK's JPEG 2000 takes all cores whatever it is
asked, which the processors' milliseconds show. Uncompressed DICOM is read by numpy as scans are, rescale and all, which
SimpleITK applies too. `reading.stored_pixels` uses what takes less of a core here, gives SimpleITK's values, and takes
no damaged slice that SimpleITK refuses, as the fastest decoder of JPEG Lossless does.

pylibjpeg's decoders take part where they are installed (`pip install --target DIR pylibjpeg-openjpeg pylibjpeg-libjpeg
pylibjpeg-rle`, and DIR in PYTHONPATH); they are no dependency, and pylibjpeg-libjpeg is under the GPL.
"""

import argparse
import contextlib
import functools
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import imagecodecs
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from darnet.phantom import make_phantom
from darnet.reading.dicom import read_header
from darnet.reading.stored_pixels import read_stored_pixels
from darnet.scan import Diagnosis, PixelLayout, StagedFile
from darnet.terminal import print_table
from darnet.threads import set_decoder_threads
from tests.ct_fixtures import make_slice

REFERENCE, UNCOMPRESSED = "SimpleITK", "uncompressed"
Decode = Callable[[], NDArray[Any]]


def write_dicom(path: Path, stored: NDArray[np.uint16], syntax: str) -> Path:
    """The slice in this syntax, which the header declares."""
    dataset = make_slice(np.zeros(stored.shape, np.int16), (0, 0, 0), PixelRepresentation=0, RescaleIntercept=-1024)
    dataset.PixelData = stored.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax == JPEGLosslessSV1:
        frame = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=16)
        dataset.PixelData = encapsulate([bytes(frame)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def list_decoders(folder: Path, stored: NDArray[np.uint16]) -> dict[tuple[str, str], Decode]:
    """What decodes the slice of each format, by (format, decoder); the reference comes first."""
    gray, shape = np.clip(stored >> 3, 0, 255).astype(np.uint8), stored.shape
    ways: dict[tuple[str, str], Decode] = {}

    def add(name: str, path: Path, image_io: str, read: Callable[[], bytes], **decoders: Callable[..., Any]) -> None:
        ways[name, REFERENCE] = lambda: ask_simpleitk(path, image_io)
        for decoder, decode in decoders.items():
            ways[name, decoder] = lambda decode=decode: np.asarray(decode(read()))  # type: ignore[misc]

    for suffix, image_io in ((".png", "PNGImageIO"), (".jpg", "JPEGImageIO")):
        path = folder / f"a{suffix}"
        Image.fromarray(gray).save(path)
        codecs = {"png": imagecodecs.png_decode, "spng": imagecodecs.spng_decode}
        chosen = codecs if suffix == ".png" else {"jpeg8": imagecodecs.jpeg8_decode} | list_pylibjpeg(libjpeg="libjpeg")
        add(f"{suffix[1:]}, 8 bits", path, image_io, path.read_bytes, opencv=ask_opencv, **chosen)
    syntaxes: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
        UNCOMPRESSED: (ExplicitVRLittleEndian, {}),
        "JPEG-LS": (JPEGLSLossless, {"jpegls": imagecodecs.jpegls_decode} | list_pylibjpeg(libjpeg="libjpeg")),
        "JPEG 2000": (
            JPEG2000Lossless,
            {"jpeg2k": lambda data: imagecodecs.jpeg2k_decode(data, numthreads=1), "opencv": ask_opencv}
            | list_pylibjpeg(openjpeg="openjpeg"),
        ),
        "JPEG Lossless SV1": (
            JPEGLosslessSV1,
            {name: getattr(imagecodecs, f"{name}_decode") for name in ("ljpeg", "jpegsof3", "jpeg8")}
            | list_pylibjpeg(libjpeg="libjpeg"),
        ),
        "RLE": (
            RLELossless,
            {"dicomrle": lambda data: np.frombuffer(imagecodecs.dicomrle_decode(data, "<u2"), "<u2").reshape(shape)}
            | {
                name: functools.partial(ask_pylibjpeg_rle, decode, shape)
                for name, decode in list_pylibjpeg("decode_frame", rle="rle.rle").items()
            },
        ),
    }
    for name, (syntax, decoders) in syntaxes.items():
        path = write_dicom(folder / f"{name}.dcm", stored, syntax)
        header = read_header(StagedFile(path.name, path, path.name))
        assert header is not None
        assert header.layout is not None
        start = header.layout.start
        if name == UNCOMPRESSED:
            ways[name, REFERENCE] = functools.partial(ask_simpleitk, path, "GDCMImageIO")
            ways[name, "numpy"] = functools.partial(read_uncompressed, path, header.layout)
            continue

        def read_frame(path: Path = path, start: int = start) -> bytes:
            with path.open("rb") as body:
                body.seek(start)
                return get_frame(body, 0, number_of_frames=1)

        add(name, path, "GDCMImageIO", read_frame, **decoders)
    return ways


def list_pylibjpeg(function: str = "decode", **modules: str) -> dict[str, Callable[..., Any]]:
    """Its decoders of these modules that are installed, by their packages' names."""
    found: dict[str, Callable[..., Any]] = {}
    for name, module in modules.items():
        with contextlib.suppress(ImportError):
            found[f"pylibjpeg-{name}"] = getattr(importlib.import_module(module), function)
    return found


def ask_pylibjpeg_rle(decode: Callable[..., Any], shape: tuple[int, ...], data: bytes) -> NDArray[Any]:
    """Its planes of bytes as numbers of 16 bits."""
    return np.frombuffer(decode(data, shape[0] * shape[1], 16, "<"), "<u2").reshape(shape)


def ask_opencv(data: bytes) -> NDArray[Any] | None:
    """The picture as it is stored, None if OpenCV does not take it."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def read_uncompressed(path: Path, layout: PixelLayout) -> NDArray[Any]:
    """The pixels as stored, by way of HU, as a scan is read."""
    pixels = read_stored_pixels(path, layout)
    assert pixels is not None, f"{path}: left to SimpleITK"
    return pixels + 1024


def ask_simpleitk(path: Path, image_io: str) -> NDArray[Any]:
    """The pixels; of DICOM HU, as its reader applies the rescale."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    pixels = sitk.GetArrayFromImage(reader.Execute())
    return pixels[0] + 1024 if image_io == "GDCMImageIO" else pixels


def measure(
    ways: dict[tuple[str, str], Decode], repeats: int
) -> dict[tuple[str, str], tuple[float, float, bool | None]]:
    """Median milliseconds of each by the clock and of processors, and whether its values are SimpleITK's.

    None as values if it cannot decode.
    """
    references = {name: decode() for (name, decoder), decode in ways.items() if decoder == REFERENCE}
    same: dict[tuple[str, str], bool | None] = {}
    for way, decode in ways.items():
        try:
            same[way] = bool(np.array_equal(decode(), references[way[0]]))
        except (RuntimeError, ValueError) as error:
            print(f"{way}: {error}", file=sys.stderr)
            same[way] = None
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways if same[way] is not None}
    for _ in range(repeats):
        for way, taken in spent.items():
            start_s, own_start_s = time.perf_counter(), time.process_time()
            ways[way]()
            taken.append((time.perf_counter() - start_s, time.process_time() - own_start_s))
    medians = {way: [1000 * median(seconds) for seconds in zip(*taken, strict=True)] for way, taken in spent.items()}
    return {way: (clock_ms, own_ms, same[way]) for way, (clock_ms, own_ms) in medians.items()}


def main(arguments: list[str]) -> int:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--size", type=int, default=512)
    chosen = parser.parse_args(arguments)
    set_decoder_threads()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # else it tells of every slice without colours
    chest = make_phantom(Diagnosis.NCP, 1, shape=(24, chosen.size, chosen.size)).voxels_hu[12]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(list_decoders(Path(folder), (chest + 1024).clip(0).astype(np.uint16)), chosen.repeats)
    rows = [
        [name, decoder, spent_ms, own_ms, f"{found[name, REFERENCE][0] / spent_ms:.2f}", "yes" if is_same else "no"]
        for (name, decoder), (spent_ms, own_ms, is_same) in found.items()
    ]
    title = f"a slice of {chosen.size} x {chosen.size}, medians of {chosen.repeats}"
    print_table(title, ["format", "decoder", "ms", "CPU ms", f"times {REFERENCE}", "its values"], rows)
    told = {f"{name}, {decoder}": round(spent_ms, 3) for (name, decoder), (spent_ms, *_) in found.items()}
    print(json.dumps({"repeats": chosen.repeats, "ms": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
