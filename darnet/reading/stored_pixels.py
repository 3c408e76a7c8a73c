"""A plain CT slice, PNG or JPEG in, in a format that has a faster decoder than SimpleITK; its values out.

These decoders let other threads work meanwhile, which SimpleITK does not. What is not exactly as its header says is
left to SimpleITK, so that the values and verdicts are those of one decoder.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from darnet.scan import FloatArray, PixelLayout
from darnet.threads import SLICE_THREADS

EXACT_IN_FLOAT32 = 2**24  # whole numbers up to here
PNG_HEAD_BYTES = 33  # signature and first chunk
MAX_PNG_SIDE = 1_000_000  # pixels that libpng takes


def read_stored_pixels(path: Path, layout: PixelLayout) -> FloatArray | None:
    """The slice, or None where SimpleITK must decide: another syntax, or pixels other than declared.

    Shape: (rows, columns) float32, as stored.
    Units: HU.
    """
    reader = _READERS.get(layout.syntax)
    if reader is None:
        return None
    try:
        stored = reader(path, layout)
    except (OSError, RuntimeError, ValueError, struct.error):
        return None
    if stored.dtype != np.uint16 or stored.size != layout.size[0] * layout.size[1]:
        return None
    values = stored.reshape(layout.size).view(np.int16 if layout.is_signed else np.uint16)
    return _rescale(values, layout) if _fits(values, layout) else None


def _read_native(path: Path, layout: PixelLayout) -> NDArray[np.uint16]:
    return np.fromfile(path, np.dtype("<u2"), layout.size[0] * layout.size[1], offset=layout.start)


def _read_jpeg_ls(path: Path, layout: PixelLayout) -> NDArray[np.uint16]:
    """The decoder refuses to fill an array of another size or type, before it takes memory."""
    room = np.empty(layout.size, np.uint16)
    decoded: NDArray[np.uint16] = imagecodecs.jpegls_decode(_read_frame(path, layout), out=room)
    return decoded


def _read_jpeg_2000(path: Path, layout: PixelLayout) -> NDArray[np.uint16]:
    """A stream's own size is looked at first: the decoder believes it, and takes memory for it.

    Source: ISO/IEC 15444-1 A.5.1, the markers SOC and SIZ: length, capabilities, extents, offsets.
    """
    frame = _read_frame(path, layout)
    (soc, siz, width, height, left, top) = struct.unpack_from(">HH4xIIII", frame)
    if (soc, siz) != (0xFF4F, 0xFF51) or (height - top, width - left) != layout.size:
        raise ValueError("not the size of the header")
    if b"\xff\xd9" not in frame[-4:]:  # the end of the stream; a fragment may have a byte more to be even
        raise ValueError("the stream ends early")
    decoded = imagecodecs.jpeg2k_decode(frame, numthreads=SLICE_THREADS)
    if decoded.dtype != (np.int16 if layout.is_signed else np.uint16):
        raise ValueError("not the sign of the header")
    stored: NDArray[np.uint16] = decoded.view(np.uint16)
    return stored


def _read_rle(path: Path, layout: PixelLayout) -> NDArray[np.uint16]:
    """The decoder refuses segments that hold more than the slice; of those that hold less the caller sees it."""
    num_bytes = 2 * layout.size[0] * layout.size[1]
    return np.frombuffer(imagecodecs.dicomrle_decode(_read_frame(path, layout), "<u2", out=num_bytes), np.uint16)


def parse_gray_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns of an 8-bit gray PNG by its first 33 bytes, or None where SimpleITK must decide.

    Source: PNG specification, signature and chunk IHDR: width, height, bits, colour type, three methods, CRC.
    """
    head = data[:PNG_HEAD_BYTES]
    if len(head) < PNG_HEAD_BYTES or zlib.crc32(head[12:29]).to_bytes(4, "big") != head[29:]:
        return None
    signature, width, height, *kind = struct.unpack_from(">16sII5B", head)
    is_gray = signature == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and kind == [8, 0, 0, 0, 0]
    return (height, width) if is_gray and 0 < width <= MAX_PNG_SIDE and 0 < height <= MAX_PNG_SIDE else None


def read_gray_png(path: Path) -> NDArray[np.uint8] | None:
    """The pixels of such an image, or None where SimpleITK must decide.

    Shape: (rows, columns).
    """
    data = path.read_bytes()
    size = parse_gray_size(data)
    if size is None:
        return None
    try:
        pixels: NDArray[np.uint8] = imagecodecs.png_decode(data)
    except (RuntimeError, ValueError):
        return None
    return pixels if pixels.dtype == np.uint8 and pixels.shape == size else None  # transparency is another plane


def read_gray_jpeg(path: Path, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The pixels of an 8-bit gray JPEG of this size, or None where SimpleITK must decide.

    Shape: (rows, columns).
    """
    try:
        pixels: NDArray[np.uint8] = imagecodecs.jpeg8_decode(path.read_bytes(), out=np.empty(size, np.uint8))
    except (RuntimeError, ValueError):
        return None
    return pixels


def _read_frame(path: Path, layout: PixelLayout) -> bytes:
    with path.open("rb") as body:
        body.seek(layout.start)
        return get_frame(body, 0, number_of_frames=1)


# JPEG Lossless is not among them: imagecodecs' fastest decoder of it takes damaged streams that SimpleITK refuses.
_READERS: dict[str, Callable[[Path, PixelLayout], NDArray[np.uint16]]] = {
    ExplicitVRLittleEndian: _read_native,
    ImplicitVRLittleEndian: _read_native,
    JPEGLSLossless: _read_jpeg_ls,
    JPEGLSNearLossless: _read_jpeg_ls,
    JPEG2000Lossless: _read_jpeg_2000,
    JPEG2000: _read_jpeg_2000,
    RLELossless: _read_rle,
}


def _fits(values: NDArray[Any], layout: PixelLayout) -> bool:
    """Whether no value needs more than the bits stored: others are overlays, or lack the extension of their sign."""
    if layout.bits_stored == 16:
        return True
    num_values = 1 << layout.bits_stored
    low = -num_values // 2 if layout.is_signed else 0
    return bool(low <= values.min() and values.max() < low + num_values)


def _rescale(values: NDArray[Any], layout: PixelLayout) -> FloatArray:
    """Slope and intercept in double precision, or in single where that is as exact."""
    slope, intercept = layout.slope, layout.intercept
    is_whole = slope.is_integer() and intercept.is_integer()
    if is_whole and abs(slope) * 2**16 + abs(intercept) < EXACT_IN_FLOAT32:
        rescaled = values.astype(np.float32)  # and from there in place: new memory costs more than the arithmetic
        if slope != 1:
            rescaled *= np.float32(slope)
        rescaled += np.float32(intercept)
        return rescaled
    return (values * np.float64(slope) + np.float64(intercept)).astype(np.float32)
