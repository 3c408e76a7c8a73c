"""Folders of PNG, JPEG and TIFF that are not whole, not 8-bit grey, or far too large."""

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from darnet.errors import Status
from tests.ct_fixtures import make_chest
from tests.hostile.case import DISPLAY, Case, Write, cut, patch


def write_images(folder: Path, suffix: str, voxels: Sequence[np.ndarray] | np.ndarray, first: int = 1) -> list[Path]:
    """1.png, 2.png, ... from head to feet."""
    folder.mkdir(parents=True)
    paths = [folder / f"{index + first}{suffix}" for index in range(len(voxels))]
    for path, plane in zip(paths, voxels, strict=True):
        assert cv2.imwrite(str(path), plane)
    return paths


def images(voxels: Sequence[np.ndarray] | np.ndarray, suffix: str = ".png") -> Write:
    return lambda place: write_images(place, suffix, voxels)


def spoil(suffix: str, change: Callable[[list[Path]], object]) -> Write:
    """A sound folder, changed."""
    return lambda place: change(write_images(place, suffix, DISPLAY))


def one(suffix: str, content: bytes) -> Write:
    """A sound folder of which the seventh image is something else."""
    return spoil(suffix, lambda paths: paths[6].write_bytes(content))


def all_of(suffix: str, content: bytes, count: int = 24) -> Write:
    """A folder of one image under many names."""

    def write(place: Path) -> None:
        place.mkdir(parents=True)
        (first := place / f"1{suffix}").write_bytes(content)
        for number in range(2, count + 1):
            (place / f"{number}{suffix}").hardlink_to(first)

    return write


def make_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(width: int, height: int, bits: int, colour: int, pixels: bytes, extra: bytes = b"") -> bytes:
    """A PNG of these rows, each with its filter byte. Source: PNG specification."""
    head = make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    end = make_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + make_chunk(b"IDAT", zlib.compress(pixels, 9)) + end


def make_palette(colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG that shows a slice through a palette."""
    rows = b"".join(b"\0" + bytes(row) for row in DISPLAY[12])
    return make_png(64, 64, 8, 3, rows, make_chunk(b"PLTE", bytes(value for colour in colours for value in colour)))


def make_tiff(width: int, height: int, strip: bytes, next_directory: int = 0) -> bytes:
    """A TIFF of one strip of 8-bit grey. Source: TIFF 6.0."""
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height))
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*tags, (279, len(strip)))]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", next_directory)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def make_alike(paths: list[Path]) -> None:
    """Slices of one name in two formats."""
    for path, plane in zip(paths, DISPLAY, strict=True):
        assert cv2.imwrite(str(path.with_suffix(".jpg")), plane)


def grow_jpeg(path: Path) -> None:
    """65,500 pixels a side in a file of a kilobyte. Source: ITU T.81, the frame header."""
    patch(path, path.read_bytes().index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500))


RED = [(value, 0, 255 - value) for value in range(256)]
PNG = {
    "png empty": Case(one(".png", b""), Status.BAD_UNREADABLE, "7.png: "),
    "png of HTML": Case(one(".png", b"<html>503</html>"), Status.BAD_UNREADABLE, "7.png: "),
    "png of zeros": Case(one(".png", bytes(9000)), Status.BAD_UNREADABLE, "7.png: "),
    "png cut": Case(spoil(".png", lambda paths: cut(paths[6], 0.8)), Status.BAD_TRUNCATED, "7.png: "),
    "png garbled": Case(spoil(".png", lambda paths: patch(paths[6], 300, b"\x55" * 40)), Status.BAD_PIXELS, "7.png: "),
    "png too short for its rows": Case(one(".png", make_png(64, 64, 8, 0, bytes(65 * 20))), Status.BAD_PIXELS, "7.png"),
    "png bomb": Case(all_of(".png", make_png(20_000, 20_000, 8, 0, bytes(20_001 * 2000))), Status.BAD_LIMIT, "bytes"),
    "png of 2^31 a side": Case(
        all_of(".png", make_png(2**31 - 1, 2**31 - 1, 8, 0, b"")), Status.BAD_UNREADABLE, "1.png"
    ),
    "png of no pixel": Case(all_of(".png", make_png(0, 0, 8, 0, b"")), Status.BAD_UNREADABLE, "1.png: "),
    "png of 16 bits": Case(
        images(DISPLAY.astype(np.uint16) * 256), Status.BAD_PIXELS, "1.png: slice image is not 8-bit"
    ),
    "png of 16 bits in one slice": Case(
        one(".png", make_png(64, 64, 16, 0, bytes(129 * 64))), Status.BAD_PIXELS, "7.png: slice image is not 8-bit"
    ),
    "png in colour": Case(
        images(np.stack([DISPLAY, DISPLAY // 2, DISPLAY], -1)), Status.BAD_PIXELS, "1.png: slice image is in colour"
    ),
    "png of a palette in colour": Case(all_of(".png", make_palette(RED)), Status.BAD_PIXELS, "1.png: "),
    "png that is a TIFF": Case(one(".png", make_tiff(64, 64, DISPLAY[12].tobytes())), Status.BAD_UNREADABLE, "7.png: "),
    "png constant": Case(images(DISPLAY * 0 + 7), Status.BAD_INTENSITY, "same value"),
    "png of two sizes": Case(
        one(".png", make_png(32, 64, 8, 0, bytes(33 * 64))), Status.BAD_MIXED_SERIES, "2 image sizes"
    ),
    "png numbers with a hole": Case(
        spoil(".png", lambda paths: paths[6].unlink()), Status.BAD_MISSING_SLICE, "1 holes"
    ),
    "nine png": Case(images(DISPLAY[:9]), Status.SKIP_FEW_SLICES, "9 slices"),
    "10,000 png": Case(all_of(".png", make_png(8, 8, 8, 0, bytes(72)), 10_000), Status.BAD_LIMIT, "10000 slices"),
    "images in two formats": Case(spoil(".png", make_alike), Status.BAD_MIXED_SERIES, "two image formats"),
}
JPEG = {
    "jpg empty": Case(one(".jpg", b""), Status.BAD_UNREADABLE, "7.jpg: "),
    "jpg cut": Case(spoil(".jpg", lambda paths: cut(paths[6], 0.7)), Status.BAD_TRUNCATED, "7.jpg: "),
    "jpg bomb": Case(spoil(".jpg", lambda paths: [grow_jpeg(path) for path in paths]), Status.BAD_LIMIT, "bytes"),
    "jpg in colour": Case(
        images(np.stack([DISPLAY, DISPLAY // 2, DISPLAY], -1), ".jpg"), Status.BAD_PIXELS, "1.jpg: slice image is in"
    ),
}
TIFF = {
    "tif empty": Case(one(".tif", b""), Status.BAD_UNREADABLE, "7.tif: "),
    "tif cut": Case(spoil(".tif", lambda paths: cut(paths[6], 0.5)), Status.BAD_UNREADABLE, "7.tif: "),
    "tif without its pixels": Case(one(".tif", make_tiff(64, 64, bytes(100))), Status.BAD_PIXELS, "7.tif: "),
    "tif bomb": Case(all_of(".tif", make_tiff(60_000, 60_000, bytes(64))), Status.BAD_LIMIT, "bytes"),
    "tif of endless pages": Case(
        all_of(".tif", make_tiff(64, 64, DISPLAY[12].tobytes(), 8 + 64 * 64)), Status.BAD_PIXELS, "1.tif: several pages"
    ),
    "tif of floats": Case(images(make_chest().astype(np.float32), ".tif"), Status.BAD_PIXELS, "1.tif: slice image is"),
}
IMAGE_CASES = {**PNG, **JPEG, **TIFF}
