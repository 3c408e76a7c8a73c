"""A volume file is read whole, undamaged and in a known pose, or not at all: SimpleITK and nibabel write, we judge."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from darnet.config import DecodeConfig
from darnet.decode import open_volume, write_volume
from darnet.errors import ScanError, Status
from darnet.reading.volume_file import NiftiHeader, _find_qform, check_volume_file
from tests.ct_fixtures import SPACING_MM, make_chest

LIMITS = DecodeConfig()
COMPRESSED = (".mha", ".nrrd", ".nii.gz")
SUFFIXES = (*COMPRESSED, ".nii")
NO_TURN = np.eye(3)


def judge(path: Path) -> Status:
    """What becomes of a file on the way to its voxels."""
    try:
        open_volume(path, LIMITS)
    except ScanError as error:
        return error.status
    return Status.OK


def find_body(data: bytes, suffix: str) -> int:
    """Where the compressed voxels begin, looked for in the bytes."""
    if suffix == ".mha":
        return data.index(b"LOCAL\n") + 6
    return data.index(b"\n\n") + 2 if suffix == ".nrrd" else 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_whole_file_of_our_own_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_volume(path, make_chest(), SPACING_MM)
    np.testing.assert_array_equal(open_volume(path, LIMITS).voxels_hu, make_chest())


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_file_without_compression_is_read_in_any_number(suffix: str, kind: Any, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    chest = make_chest().clip(0).astype(kind)
    sitk.WriteImage(sitk.GetImageFromArray(chest), str(path))
    check_volume_file(path, LIMITS)
    stack = open_volume(path, LIMITS)
    read = np.stack([stack.read_slice(index) for index in range(len(chest))])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, chest[::-1].astype(np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    assert judge(path) is Status.BAD_TRUNCATED


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_number_that_the_network_cannot_take_is_refused_wherever_it_is(value: float, tmp_path: Path) -> None:
    """Also in the last slice, and of a double that is too large for a float."""
    path, chest = tmp_path / "a.nii", make_chest().astype(np.float64)
    chest[-1, 0, 0] = value
    sitk.WriteImage(sitk.GetImageFromArray(chest), str(path))
    assert judge(path) is Status.BAD_INTENSITY


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.9999])
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_flipped_byte_among_compressed_voxels_is_found(suffix: str, place: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_volume(path, make_chest(), SPACING_MM)
    data = bytearray(path.read_bytes())
    start = find_body(data, suffix)
    data[start + int(place * (len(data) - start))] ^= 0x55
    path.write_bytes(data)
    assert judge(path) in (Status.BAD_UNREADABLE, Status.BAD_TRUNCATED)


@pytest.mark.parametrize("kept", [0.2, 0.8, 0.99])
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_zeroed_or_missing_last_part_is_found(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_volume(path, make_chest(), SPACING_MM)
    data = path.read_bytes()
    for rest in (bytes(len(data) - int(kept * len(data))), b""):
        path.write_bytes(data[: int(kept * len(data))] + rest)
        assert judge(path) in (Status.BAD_UNREADABLE, Status.BAD_TRUNCATED)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_header_of_fewer_slices_than_there_are_is_found(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(make_chest()), str(path))
    if suffix == ".nii.gz":
        image = nibabel.load(path)
        image.to_filename(path.with_suffix(""))
        path = path.with_suffix("")
    data = path.read_bytes()
    fewer = data.replace(b"64 64 24", b"64 64 20") if suffix in (".mha", ".nrrd") else data + bytes(4 * 64 * 64 * 2)
    assert fewer != data
    path.write_bytes(fewer)
    assert judge(path) is Status.BAD_UNREADABLE


def test_a_metaimage_whose_pixels_are_another_file_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "other.raw"
    secret.write_bytes(make_chest().tobytes())
    write_volume(tmp_path / "a.mha", make_chest(), SPACING_MM)
    head = (tmp_path / "a.mha").read_bytes().split(b"ElementDataFile")[0].replace(b"CompressedData = True\n", b"")
    for named in (str(secret), "other.raw", "LIST\nother.raw", "slice%03d.raw 1 24 1"):
        (tmp_path / "a.mha").write_bytes(head + f"ElementDataFile = {named}\n".encode())
        assert judge(tmp_path / "a.mha") is Status.BAD_UNREADABLE


@pytest.mark.parametrize("field", ["data file", "datafile", "Data File"])
def test_an_nrrd_whose_pixels_are_another_file_is_refused(field: str, tmp_path: Path) -> None:
    (tmp_path / "other.raw").write_bytes(make_chest().tobytes())
    sitk.WriteImage(sitk.GetImageFromArray(make_chest()), str(tmp_path / "a.nrrd"))
    head = (tmp_path / "a.nrrd").read_bytes().split(b"\n\n")[0]
    for end in (b"\n", b"\n\n"):
        (tmp_path / "a.nrrd").write_bytes(head + f"\n{field}: {tmp_path / 'other.raw'}".encode() + end)
        assert judge(tmp_path / "a.nrrd") is Status.BAD_UNREADABLE


def test_a_nifti_header_of_another_file_is_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", make_chest(), SPACING_MM)
    data = (tmp_path / "a.nii").read_bytes()
    for magic in (b"ni1\0", b"\0\0\0\0"):
        (tmp_path / "a.nii").write_bytes(data[:344] + magic + data[348:])
        assert judge(tmp_path / "a.nii") is Status.BAD_UNREADABLE


def test_a_file_of_another_format_than_its_name_says_is_refused(tmp_path: Path) -> None:
    """A reader chosen by content would read what no check of that format has seen."""
    for suffix in (".mha", ".nrrd", ".nii"):
        write_volume(tmp_path / f"a{suffix}", make_chest(), SPACING_MM)
        for other in {".mha", ".nrrd", ".nii"} - {suffix}:
            path = tmp_path / f"b{other}"
            path.write_bytes((tmp_path / f"a{suffix}").read_bytes())
            assert judge(path) is Status.BAD_UNREADABLE


def turn(degrees: float) -> np.ndarray:
    """A rotation about x."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def shear(degrees: float) -> np.ndarray:
    """Slices stacked askew, as by a tilted gantry."""
    return np.array([[1, 0, 0], [0, 1, math.tan(math.radians(degrees))], [0, 0, 1]])


def write_nifti(path: Path, qform: np.ndarray | None, sform: np.ndarray | None) -> None:
    """nibabel's own arithmetic writes quaternion and matrix."""
    image = nibabel.Nifti1Image(make_chest().transpose(2, 1, 0), None)
    image.header.set_zooms(SPACING_MM[::-1])
    for axes, put in ((qform, image.set_qform), (sform, image.set_sform)):
        affine = np.diag([*SPACING_MM[::-1], 1.0])
        if axes is not None:
            affine[:3, :3] = axes @ affine[:3, :3]
        put(affine if axes is not None else None, code=int(axes is not None))
    nibabel.save(image, path)


POSES: dict[str, tuple[np.ndarray | None, np.ndarray | None, Status]] = {
    "straight": (NO_TURN, NO_TURN, Status.OK),
    "a little oblique": (turn(15), turn(15), Status.OK),
    "mirrored": (np.diag([-1, 1, 1]), np.diag([-1, 1, 1]), Status.OK),
    "sform alone": (None, NO_TURN, Status.OK),
    "qform alone": (NO_TURN, None, Status.OK),
    "neither": (None, None, Status.BAD_GEOMETRY),
    "oblique": (turn(35), turn(35), Status.SKIP_ORIENTATION),
    "oblique by sform alone": (None, turn(35), Status.SKIP_ORIENTATION),
    "oblique by qform alone": (turn(35), None, Status.SKIP_ORIENTATION),
    "sheared": (None, shear(20), Status.BAD_TILT),
    "sheared beside a straight qform": (NO_TURN, shear(20), Status.BAD_TILT),
    "two turns": (turn(0), turn(10), Status.BAD_GEOMETRY),
    "left in one is right in the other": (NO_TURN, np.diag([-1, 1, 1]), Status.BAD_GEOMETRY),
}


@pytest.mark.parametrize("pose", POSES)
def test_a_nifti_in_an_unknown_oblique_or_sheared_pose_is_refused(pose: str, tmp_path: Path) -> None:
    qform, sform, expected = POSES[pose]
    write_nifti(tmp_path / "a.nii", qform, sform)
    assert judge(tmp_path / "a.nii") is expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sform", [NO_TURN, None])
def test_a_quaternion_that_is_no_number_is_refused(sform: np.ndarray | None, value: float, tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", NO_TURN, sform)
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[256:260] = np.float32(value).tobytes()  # quatern_b
    (tmp_path / "a.nii").write_bytes(data)
    assert judge(tmp_path / "a.nii") is Status.BAD_GEOMETRY


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_a_quaternion_turns_as_scipy_says(scale: float) -> None:
    """Also one longer than 1, which leaves no turn about the first axis and is brought to length 1."""
    for quaternion in np.random.default_rng(0).normal(size=(50, 3)):
        b, c, d = quaternion * scale / np.linalg.norm(quaternion)
        header = NiftiHeader(352, 2, np.dtype("<i2"), (1, 1), (-1.0, 1.0, 1.0, 1.0), (b, c, d), np.eye(3))
        expected = Rotation.from_quat((b, c, d, math.sqrt(max(1 - scale**2, 0)))).as_matrix() * (1, 1, -1)
        np.testing.assert_allclose(_find_qform(header), expected, atol=1e-7)  # the root of a rounding, at length 1


def test_the_second_version_of_nifti_is_judged_by_its_own_layout(tmp_path: Path) -> None:
    """ITK does not read it; the check must still not take one number for another."""
    for axes, expected in ((NO_TURN, Status.BAD_UNREADABLE), (shear(20), Status.BAD_TILT)):
        affine = np.diag([*SPACING_MM[::-1], 1.0])
        affine[:3, :3] = axes @ affine[:3, :3]
        nibabel.save(nibabel.Nifti2Image(make_chest().transpose(2, 1, 0), affine), tmp_path / "a.nii")
        assert judge(tmp_path / "a.nii") is expected
        if axes is NO_TURN:
            check_volume_file(tmp_path / "a.nii", LIMITS)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize(
    ("axes", "expected"),
    [(turn(35), Status.SKIP_ORIENTATION), (shear(20), Status.BAD_TILT), (turn(15), Status.OK)],
    ids=["oblique", "sheared", "a little oblique"],
)
def test_axes_of_other_formats_are_judged_as_well(
    suffix: str, axes: np.ndarray, expected: Status, tmp_path: Path
) -> None:
    image = sitk.GetImageFromArray(make_chest())
    image.SetDirection((axes / np.linalg.norm(axes, axis=0)).ravel())
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    assert judge(tmp_path / f"a{suffix}") is expected


LINES: dict[str, Callable[[bytes], bytes]] = {
    ".mha": lambda data: data.replace(b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b""),
    ".nrrd": lambda data: data.replace(b"space: left-posterior-superior\n", b"space dimension: 3\n"),
}


@pytest.mark.parametrize("suffix", LINES)
def test_other_formats_must_say_how_they_lie_too(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(make_chest()), str(path))
    data = path.read_bytes()
    path.write_bytes(LINES[suffix](data))
    assert path.read_bytes() != data
    assert judge(path) is Status.BAD_GEOMETRY
