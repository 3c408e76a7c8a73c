"""A plain CT slice in, in a transfer syntax that has a faster decoder than SimpleITK; Hounsfield units out.

What is not exactly as its header says is left to SimpleITK, so that the values and verdicts are those of one decoder.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jpeg_ls
import numpy as np
from _CharLS import read_header
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, JPEGLSNearLossless

from darnet.scan import FloatArray, PixelLayout

EXACT_IN_FLOAT32 = 2**24  # whole numbers up to here


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
    """A third less processor time than SimpleITK takes; like it, it holds Python's lock, so threads gain nothing."""
    with path.open("rb") as body:
        body.seek(layout.start)
        encoded = get_frame(body, 0, number_of_frames=1)
    told = read_header(encoded)
    if (told["height"], told["width"]) != layout.size:  # the decoder would believe it, and take memory for it
        raise ValueError("not the size of the header")
    decoded: NDArray[np.uint16] = jpeg_ls.decode(np.frombuffer(encoded, np.uint8))
    return decoded


_READERS: dict[str, Callable[[Path, PixelLayout], NDArray[np.uint16]]] = {
    ExplicitVRLittleEndian: _read_native,
    ImplicitVRLittleEndian: _read_native,
    JPEGLSLossless: _read_jpeg_ls,
    JPEGLSNearLossless: _read_jpeg_ls,
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
        return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return (values * np.float64(slope) + np.float64(intercept)).astype(np.float32)
