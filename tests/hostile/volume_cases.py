"""NIfTI, NRRD and MetaImage files that are not whole, lie, or hold no chest."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from darnet.decode import write_volume
from darnet.errors import Status
from darnet.phantoms.decoys import make_head
from tests.ct_fixtures import make_chest
from tests.hostile.case import Case, Write, cut, deflate_bomb, garble, make_noise, patch

BOMB_BYTES = 1 << 30
# Where a NIfTI header holds its fields. Source: NIfTI-1.
DIM, DATATYPE, BITPIX, PIXDIM, START, SLOPE, INTER = 40, 70, 72, 76, 108, 112, 116
QFORM_CODE, QUATERNION, SFORM = 252, 256, 280


def write_image(
    place: Path, voxels: np.ndarray, suffix: str = ".mha", spacing_mm: tuple[float, ...] = (6, 6, 12)
) -> Path:
    """An uncompressed file by SimpleITK; a fourth axis is that of colours."""
    image = sitk.GetImageFromArray(voxels, isVector=voxels.ndim == 4)
    image.SetSpacing(spacing_mm)
    path = Path(f"{place}{suffix}")
    sitk.WriteImage(image, str(path))
    return path


def volume(make: Callable[[], np.ndarray], suffix: str = ".mha", **settings: Any) -> Write:
    """A file of other voxels than a chest's."""
    return lambda place: write_image(place, make(), suffix, **settings)


def changed(suffix: str, change: Callable[[Path], object]) -> Write:
    """A sound file, spoiled."""
    return lambda place: change(write_image(place, make_chest(), suffix))


def patched(offset: int, kind: str, *values: float, suffix: str = ".nii") -> Write:
    """A NIfTI file with other values in a field of its header."""

    def change(path: Path) -> None:
        data = struct.pack(f"<{kind}", *values)
        if suffix == ".nii":
            patch(path, offset, data)
            return
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[offset : offset + len(data)] = data
        path.write_bytes(gzip.compress(content, 1, mtime=0))

    return changed(suffix, change)


def replaced(suffix: str, old: bytes, new: bytes) -> Write:
    """A file with another line in its header."""

    def change(path: Path) -> None:
        data = path.read_bytes()
        assert data.count(old) == 1, data[:600]
        path.write_bytes(data.replace(old, new))

    return changed(suffix, change)


def named(suffix: str, content: bytes) -> Write:
    """A file of this name that holds something else."""
    return lambda place: Path(f"{place}{suffix}").write_bytes(content)


def make_bomb(path: Path) -> None:
    """A small gzip file with a sound header in front of a GiB of zeros."""
    head = gzip.compress(b"", mtime=0)[:10]
    path.write_bytes(head + deflate_bomb(gzip.decompress(path.read_bytes())[:352], BOMB_BYTES))


def recompress_bomb(path: Path) -> None:
    """The same behind a MetaImage's header of the right size."""
    head = path.read_bytes().split(b"ElementDataFile")[0].replace(b"CompressedData = False", b"CompressedData = True")
    path.write_bytes(head + b"ElementDataFile = LOCAL\n\x78\xda" + deflate_bomb(b"", BOMB_BYTES))


def with_value(value: float) -> Callable[[], np.ndarray]:
    """A chest of floats with one voxel of this value."""

    def make() -> np.ndarray:
        voxels = make_chest().astype(np.float32)
        voxels[3, 4, 5] = value
        return voxels

    return make


def write_head(place: Path) -> None:
    head = make_head(1, shape=(16, 96, 96), spacing_mm=(14.0, 3.0, 3.0))
    write_volume(Path(f"{place}.nii.gz"), head.voxels_hu, head.spacing_mm)


NAN = float("nan")
AXES = b"space directions: (6,0,0) (0,6,0) (0,0,12)"
NIFTI = {
    "nii empty": Case(named(".nii", b""), Status.BAD_UNREADABLE, ""),
    "nii of zeros": Case(named(".nii", bytes(9000)), Status.BAD_UNREADABLE, "no NIfTI header"),
    "nii of HTML": Case(named(".nii", b"<html>503</html>" * 40), Status.BAD_UNREADABLE, "no NIfTI header"),
    "nii cut in its header": Case(changed(".nii", lambda path: cut(path, 0.001)), Status.BAD_UNREADABLE, ""),
    "nii cut": Case(changed(".nii", lambda path: cut(path, 0.95)), Status.BAD_TRUNCATED, "bytes early"),
    "nii.gz cut": Case(changed(".nii.gz", lambda path: cut(path, 0.95)), Status.BAD_TRUNCATED, "ends early"),
    "nii.gz garbled": Case(changed(".nii.gz", garble), Status.BAD_UNREADABLE, "damaged"),
    "nii.gz that is not packed": Case(named(".nii.gz", b"n+1\0" * 500), Status.BAD_UNREADABLE, "damaged"),
    "nii.gz bomb": Case(changed(".nii.gz", make_bomb), Status.BAD_UNREADABLE, "longer than"),
    "nii NaN": Case(volume(with_value(NAN), ".nii"), Status.BAD_INTENSITY, "no numbers"),
    "nii infinite": Case(volume(with_value(-np.inf), ".nii"), Status.BAD_INTENSITY, "no numbers"),
    "nii singular affine": Case(patched(SFORM, "12f", *[0.0] * 12), Status.BAD_GEOMETRY, "no direction"),
    "nii affine of two axes": Case(
        patched(SFORM, "12f", 6, 6, 0, 0, 0, 0, 6, 0, 0, 0, 12, 0), Status.BAD_TILT, "sheared by 90"
    ),
    "nii affine NaN": Case(patched(SFORM, "12f", *[NAN] * 12), Status.BAD_GEOMETRY, "no direction"),
    "nii affine infinite": Case(patched(SFORM, "f", np.inf), Status.BAD_GEOMETRY, "no direction"),
    "nii without pose": Case(patched(QFORM_CODE, "2h", 0, 0), Status.BAD_GEOMETRY, "orientation is unknown"),
    "nii quaternion NaN": Case(patched(QUATERNION, "3f", NAN, 0, 0), Status.BAD_GEOMETRY, "no number"),
    "nii quaternion of length 5": Case(patched(QUATERNION, "3f", 3, 4, 0), Status.BAD_GEOMETRY, "differ by"),
    "nii of one slice more": Case(patched(DIM, "4h", 3, 64, 64, 25), Status.BAD_TRUNCATED, "8192 bytes early"),
    "nii of one slice less": Case(patched(DIM, "4h", 3, 64, 64, 23), Status.BAD_UNREADABLE, "longer than"),
    "nii of 32,767 a side": Case(patched(DIM, "4h", 3, 32767, 32767, 32767), Status.BAD_LIMIT, "volume declares"),
    "nii of sizes below 0": Case(patched(DIM, "4h", 3, -64, -64, 24), Status.BAD_UNREADABLE, ""),
    "nii of no axis": Case(patched(DIM, "h", 0), Status.BAD_UNREADABLE, ""),
    "nii of 99 axes": Case(patched(DIM, "h", 99), Status.BAD_UNREADABLE, ""),
    "nii of 7 axes": Case(patched(DIM, "8h", 7, 64, 64, 12, 2, 1, 1, 1), Status.BAD_PIXELS, ""),
    "nii of flat axes": Case(patched(DIM, "4h", 3, 64 * 64, 24, 1), Status.SKIP_FEW_SLICES, "1 slices"),
    "nii of no spacing": Case(patched(PIXDIM + 4, "3f", 0, 0, 0), Status.BAD_GEOMETRY, ""),
    "nii of spacing NaN": Case(patched(PIXDIM + 4, "3f", NAN, NAN, NAN), Status.BAD_GEOMETRY, ""),
    "nii voxels beyond the end": Case(patched(START, "f", 1e9), Status.BAD_TRUNCATED, ""),
    "nii voxels before the beginning": Case(patched(START, "f", -1e9), Status.BAD_UNREADABLE, "longer than"),
    "nii voxels nowhere": Case(patched(START, "f", NAN), Status.BAD_UNREADABLE, ""),
    "nii of bits its type has not": Case(patched(DATATYPE, "h", 64), Status.BAD_UNREADABLE, ""),
    "nii of an unknown type": Case(patched(DATATYPE, "h", 999), Status.BAD_UNREADABLE, ""),
    "nii of complex numbers": Case(patched(DATATYPE, "2h", 32, 64), Status.BAD_PIXELS, "no single numbers"),
    "nii slope NaN": Case(patched(SLOPE, "2f", NAN, 0), Status.BAD_INTENSITY, ""),
    "nii slope 1e30": Case(patched(SLOPE, "2f", 1e30, 0), Status.BAD_INTENSITY, ""),
    "nii intercept NaN": Case(patched(SLOPE, "2f", 1, NAN), Status.BAD_INTENSITY, ""),
    "nii of six slices": Case(volume(lambda: make_chest()[:6], ".nii"), Status.SKIP_FEW_SLICES, "6 slices"),
    "nii constant": Case(volume(lambda: make_chest() * 0 - 1000, ".nii"), Status.BAD_INTENSITY, "same value"),
    "nii.gz of a head": Case(write_head, Status.SKIP_NO_LUNG, "no lung"),
    "nii.gz of spacing NaN": Case(patched(PIXDIM + 4, "3f", NAN, NAN, NAN, suffix=".nii.gz"), Status.BAD_GEOMETRY, ""),
}
META = {
    "mha cut": Case(changed(".mha", lambda path: cut(path, 0.6)), Status.BAD_TRUNCATED, "bytes early"),
    "mha empty": Case(named(".mha", b""), Status.BAD_UNREADABLE, ""),
    "mha of HTML": Case(named(".mha", b"<html>503</html>"), Status.BAD_UNREADABLE, ""),
    "mha header without end": Case(named(".mha", b"Comment = " + b"x" * 100_000), Status.BAD_UNREADABLE, ""),
    "mha NaN": Case(volume(with_value(NAN)), Status.BAD_INTENSITY, "no numbers"),
    "mha of noise": Case(volume(make_noise), Status.BAD_INTENSITY, "cannot be HU"),
    "mha of six slices": Case(volume(lambda: make_chest()[:6]), Status.SKIP_FEW_SLICES, "6 slices"),
    "mha in colour": Case(volume(lambda: np.stack([make_chest()] * 3, -1)), Status.BAD_PIXELS, ""),
    "mha of absurd spacing": Case(volume(make_chest, spacing_mm=(1e-5, 6, 12)), Status.BAD_GEOMETRY, ""),
    "mha of spacing NaN": Case(
        replaced(".mha", b"ElementSpacing = 6 6 12", b"ElementSpacing = nan nan nan"), Status.BAD_GEOMETRY, ""
    ),
    "mha of other slices than it says": Case(
        replaced(".mha", b"DimSize = 64 64 24", b"DimSize = 64 64 23"), Status.BAD_UNREADABLE, "longer than"
    ),
    "mha of no slice": Case(replaced(".mha", b"DimSize = 64 64 24", b"DimSize = 64 64 0"), Status.BAD_UNREADABLE, ""),
    "mha of sizes below 0": Case(
        replaced(".mha", b"DimSize = 64 64 24", b"DimSize = -64 -64 24"), Status.BAD_UNREADABLE, ""
    ),
    "mha of 2^31 a side": Case(
        replaced(".mha", b"DimSize = 64 64 24", b"DimSize = 2147483648 2147483648 2147483648"), Status.BAD_LIMIT, ""
    ),
    "mha of another number of axes": Case(replaced(".mha", b"NDims = 3", b"NDims = 99"), Status.BAD_UNREADABLE, ""),
    "mha of an unknown number": Case(
        replaced(".mha", b"MET_SHORT", b"MET_STRING"), Status.BAD_UNREADABLE, "unknown value"
    ),
    "mha of other bytes first": Case(
        replaced(".mha", b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = True"),
        Status.BAD_INTENSITY,
        "cannot be HU",
    ),
    "mha of another file's voxels": Case(
        replaced(".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = /etc/passwd"), Status.BAD_UNREADABLE, "another"
    ),
    "mha singular": Case(
        replaced(".mha", b"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 1 0 0 0 0 1"),
        Status.BAD_TILT,
        "",
    ),
    "mha NaN axes": Case(
        replaced(".mha", b"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = nan 0 0 0 1 0 0 0 1"),
        Status.BAD_GEOMETRY,
        "",
    ),
    "mha bomb": Case(changed(".mha", recompress_bomb), Status.BAD_UNREADABLE, "longer than"),
}
NRRD = {
    "nrrd empty": Case(named(".nrrd", b""), Status.BAD_UNREADABLE, ""),
    "nrrd of HTML": Case(named(".nrrd", b"<html>503</html>\n"), Status.BAD_UNREADABLE, ""),
    "nrrd cut": Case(changed(".nrrd", lambda path: cut(path, 0.9)), Status.BAD_TRUNCATED, "bytes early"),
    "nrrd of other slices than it says": Case(
        replaced(".nrrd", b"sizes: 64 64 24", b"sizes: 64 64 40"), Status.BAD_TRUNCATED, "bytes early"
    ),
    "nrrd of 2^40 slices": Case(
        replaced(".nrrd", b"sizes: 64 64 24", b"sizes: 64 64 1099511627776"), Status.BAD_LIMIT, "volume declares"
    ),
    "nrrd of another encoding": Case(replaced(".nrrd", b"encoding: raw", b"encoding: hex"), Status.BAD_UNREADABLE, ""),
    "nrrd of another file's voxels": Case(
        replaced(".nrrd", b"encoding: raw", b"encoding: raw\ndata file: /etc/passwd"), Status.BAD_UNREADABLE, "another"
    ),
    "nrrd without directions": Case(
        replaced(".nrrd", AXES, b"space directions: none none none"),
        Status.BAD_GEOMETRY,
        "",
    ),
    "nrrd of directions NaN": Case(
        replaced(".nrrd", AXES, b"space directions: (nan,0,0) (0,6,0) (0,0,12)"),
        Status.BAD_GEOMETRY,
        "",
    ),
    "nrrd of flat directions": Case(
        replaced(".nrrd", AXES, b"space directions: (6,0,0) (0,6,0) (0,0,0)"),
        Status.BAD_GEOMETRY,
        "",
    ),
}
VOLUME_CASES = {**NIFTI, **META, **NRRD}
