"""What a hostile scan is, and what several kinds of them share."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from darnet.errors import Status
from tests.ct_fixtures import Voxels, make_chest

Write: TypeAlias = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One hostile source. `write` makes it at a place: a folder of that name, or a file of that name and a suffix.

    `reason` is what the row's detail must hold; where a single file is to blame, it begins with that file.
    """

    write: Write
    status: Status
    reason: str


def cut(path: Path, keep: float) -> None:
    """Leave a share of a file's beginning."""
    os.truncate(path, int(path.stat().st_size * keep))


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in place."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def garble(path: Path) -> None:
    """Overwrite some bytes in the middle of a file."""
    patch(path, path.stat().st_size // 2, b"\x55" * 20)


def deflate_bomb(head: bytes, num_bytes: int) -> bytes:
    """A raw deflate stream of some bytes and so many zeros behind them."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    zeros = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)  # stands by itself, so it may be repeated
    return start + zeros * (num_bytes >> 24) + packer.flush()


def make_abdomen() -> Voxels:
    """A body of soft tissue in air."""
    body = np.where(np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]) < 0.8, 40, -1000)
    return body[None].repeat(24, 0).astype(np.int16)


def make_noise() -> Voxels:
    """What a reader hands out that never filled its memory."""
    return np.random.default_rng(0).integers(-32768, 32768, (24, 64, 64)).astype(np.int16)


DISPLAY = ((make_chest().astype(np.float32) + 1350) / 1500 * 255).clip(0, 255).astype(np.uint8)
