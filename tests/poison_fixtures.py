"""Real files that kill, stall or starve the process that reads them, and small sound scans to put around them."""

import os
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1

from darnet.decode import write_volume
from tests.ct_fixtures import SPACING_MM, make_chest, make_slice, write_chest

PIXEL_DATA = struct.pack("<HH1s", 0x7FE0, 0x0010, b"O")  # OW, and OB where they are compressed
NUM_NESTED = 60_000  # GDCM follows nested sequences by recursion: so deep, its stack ends in a segmentation fault
NUM_ELEMENTS = 1_000_000  # in each of NUM_HEADERS headers; each is read by itself, some seconds a file
NUM_HEADERS = 24
BOMB_BYTES = 3 << 30  # of a deflated DICOM file, which has to be inflated before it says anything


def write_crash(folder: Path) -> None:
    """A series of which one slice holds sequences in sequences in sequences; JPEG Lossless, which only GDCM reads."""
    path = write_chest(folder)[7]
    dataset = pydicom.dcmread(path)
    stored = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns)
    frame = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=16)
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.save_as(path)
    heads, inside = [], 0
    for _ in range(NUM_NESTED):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, inside)
        inside += len(item)
        heads.append(struct.pack("<HH2sHI", 0x0041, 0x1001, b"SQ", 0, inside) + item)
        inside += 12
    insert(path, b"".join(reversed(heads)))


def write_hang(folder: Path) -> None:
    """A DICOM series of headers with a million empty elements each; all slices are one file."""
    first, *others = write_chest(folder)
    insert(first, struct.pack("<HH2sH", 0x0041, 0x1001, b"CS", 0) * NUM_ELEMENTS)
    for path in others[: NUM_HEADERS - 1]:
        path.unlink()
        path.hardlink_to(first)


def write_bomb(folder: Path) -> None:
    """A deflated DICOM file of a few megabytes that inflates to BOMB_BYTES."""
    folder.mkdir(parents=True)
    path = folder / "000.dcm"
    dataset = make_slice(make_chest()[0], (0, 0, 0))
    dataset.save_as(path, enforce_file_format=True)
    plain = split(path)[1]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    head = split(path)[0]
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    parts = [packer.compress(plain[: plain.index(PIXEL_DATA) + 8] + struct.pack("<I", BOMB_BYTES))]
    parts += [packer.compress(bytes(1 << 24)) for _ in range(BOMB_BYTES >> 24)]
    path.write_bytes(head + b"".join(parts) + packer.flush())


POISONS = {"crash": write_crash, "hang": write_hang, "bomb": write_bomb}


def write_sound(archive: Path, index: int) -> None:
    """A small chest unlike any other index's; every fourth is a DICOM series, the others are volume files."""
    noise = np.random.default_rng(index).integers(-30, 30, make_chest().shape)
    voxels = (np.roll(make_chest(), index % 8, axis=2) + noise).clip(-1024, 3000).astype(np.int16)
    if index % 4 == 0:
        write_chest(archive / f"sound{index:05d}", voxels)
    else:
        write_volume(archive / f"sound{index:05d}{('.nii.gz', '.mha', '.nrrd')[index % 4 - 1]}", voxels, SPACING_MM)


def link_copy(template: Path, folder: Path) -> None:
    """The same files under another name, without a second copy on the disk."""
    folder.mkdir()
    for path in template.iterdir():
        os.link(path, folder / path.name)


def insert(path: Path, elements: bytes) -> None:
    """Put encoded elements before the pixels."""
    data = path.read_bytes()
    start = data.index(PIXEL_DATA[:4])
    path.write_bytes(data[:start] + elements + data[start:])


def split(path: Path) -> tuple[bytes, bytes]:
    """What a DICOM file holds of preamble and file meta group, and the data set behind them."""
    data = path.read_bytes()
    end = 144 + int(struct.unpack_from("<I", data, 140)[0])
    return data[:end], data[end:]
