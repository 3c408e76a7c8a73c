"""Bytes to network input: one scan is one volume however it is stored, and what is damaged around it is told apart.

What no scan may pass as is in `tests/test_hostile.py`.
"""

import hmac
import os
import pickle
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.decode import open_volume
from darnet.errors import CredentialsError, ScanError, Status
from darnet.ingest import Ingester, make_sandbox
from darnet.reading.road import Road, decode_scan
from darnet.reading.sandbox import Sandbox
from darnet.scan import IngestedScan, Intensity, Source, StoredObject
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from tests.ct_fixtures import SERIES_UID, SPACING_MM, make_chest, write_chest
from tests.hostile.case import DISPLAY, cut, garble
from tests.hostile.image_cases import write_images
from tests.hostile.zip_cases import encrypted, zipped
from tests.marks import mark_slow
from tests.places import SHARED
from tests.poison_fixtures import write_crash

CT_DATA = SHARED / "data" / "ct"
VOLUME = VolumeConfig(shape=(16, 32, 32))
ROAD = Road(VOLUME, DecodeConfig(), b"a secret of thirty-two bytes ....")
Ingest = Callable[..., list[IngestedScan]]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One child for all tests, as in a worker."""
    sandbox = make_sandbox(ROAD.decode)
    yield sandbox
    sandbox.close()


@pytest.fixture
def ingest(tmp_path: Path, sandbox: Sandbox) -> Ingest:
    """Ingest every source below tmp_path / "archive"; `between` runs after planning."""

    def run(road: Road = ROAD, between: Callable[[], object] = lambda: None) -> list[IngestedScan]:
        store = open_store(str(tmp_path / "archive"))
        sources = list(list_sources(store.list_objects()))
        between()
        ingester = Ingester(store, road, sandbox)
        return [scan for source in sources for scan in ingester.ingest(source)]

    return run


def _digest(uid: str) -> str:
    return sha256(uid.encode()).hexdigest()[:8]


# One scan, however it is stored, is one volume


@pytest.fixture
def reference(ingest: Ingest, tmp_path: Path) -> IngestedScan:
    write_chest(tmp_path / "archive" / "reference")
    (scan,) = ingest()
    assert scan.status is Status.OK
    return scan


def test_a_plain_series_has_its_identity_and_facts(reference: IngestedScan) -> None:
    assert reference.scan_id == f"reference#{_digest(SERIES_UID)}"
    facts = reference.facts
    assert (facts.num_files, facts.num_slices, facts.intensity) == (24, 24, Intensity.HU)
    assert (facts.slice_spacing_mm, facts.pixel_spacing_mm, facts.manufacturer) == (12.0, 6.0, "Siemens")
    assert facts.patient_key == hmac.new(ROAD.pseudonym_key or b"", b"patient-1", sha256).hexdigest()


def test_standard_volume_agrees_with_simpleitk_reading_the_series(reference: IngestedScan, tmp_path: Path) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "archive" / "reference")))
    voxels_hu = sitk.GetArrayFromImage(reader.Execute())[::-1].astype(np.float64)
    np.testing.assert_array_equal(voxels_hu, make_chest())
    unit = np.clip((voxels_hu + 1350) / 1500, 0, 1)[:, 6:58, 6:58]
    planes = np.stack([cv2.resize(plane, (32, 32), interpolation=cv2.INTER_AREA) for plane in unit])
    places = (np.arange(16) + 0.5) * 24 / 16 - 0.5
    lower = np.floor(places).astype(int)
    weight = (places - lower)[:, None, None]
    expected = 255 * ((1 - weight) * planes[lower] + weight * planes[lower + 1])
    assert reference.volume is not None
    assert np.abs(reference.volume.voxels - expected).max() <= 0.51


def _turned(
    turn: Callable[[np.ndarray], np.ndarray], orientation: tuple[float, ...], corner: tuple[float, float]
) -> Any:
    """Edit that stores the same physical slice with turned pixels."""

    def edit(_: int, dataset: FileDataset) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<u2").reshape(64, 64)
        dataset.PixelData = np.ascontiguousarray(turn(pixels)).tobytes()
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [*corner, dataset.ImagePositionPatient[2]]

    return edit


END_MM = -190.0 + 63 * SPACING_MM[1]
TURNS = {
    "left-right mirrored": _turned(lambda p: p[:, ::-1], (-1, 0, 0, 0, 1, 0), (END_MM, -190)),
    "upside down": _turned(lambda p: p[::-1], (1, 0, 0, 0, -1, 0), (-190, END_MM)),
    "rotated half a turn": _turned(lambda p: p[::-1, ::-1], (-1, 0, 0, 0, -1, 0), (END_MM, END_MM)),
    "transposed": _turned(lambda p: p.T, (0, 1, 0, 1, 0, 0), (-190, -190)),
    "rotated a quarter": _turned(lambda p: np.rot90(p), (0, 1, 0, -1, 0, 0), (END_MM, -190)),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_copy_gives_the_same_volume(
    name: str, reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    voxels = make_chest()
    assert not np.array_equal(voxels, voxels[:, :, ::-1])  # the chest is lopsided, or this test shows nothing
    write_chest(tmp_path / "archive" / "turned", edit=TURNS[name])
    turned = ingest()[-1]
    assert turned.volume is not None, turned.status_detail
    assert reference.volume is not None
    np.testing.assert_array_equal(turned.volume.voxels, reference.volume.voxels)


def test_a_feet_first_copy_gives_the_same_volume(reference: IngestedScan, ingest: Ingest, tmp_path: Path) -> None:
    """File and instance order say nothing: only positions do."""
    paths = write_chest(tmp_path / "archive" / "turned")
    for index, path in enumerate(reversed(paths)):
        path.rename(path.with_name(f"x{index:03d}.dcm"))
    turned = ingest()[-1]
    assert turned.volume is not None
    assert reference.volume is not None
    np.testing.assert_array_equal(turned.volume.voxels, reference.volume.voxels)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless, DeflatedExplicitVRLittleEndian])
def test_a_lossless_transfer_syntax_changes_nothing(
    syntax: Any, reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    def compress(_: int, dataset: FileDataset) -> None:
        if syntax == DeflatedExplicitVRLittleEndian:
            dataset.file_meta.TransferSyntaxUID = syntax
        else:
            dataset.compress(syntax, generate_instance_uid=False)

    write_chest(tmp_path / "archive" / "turned", edit=compress)
    compressed = ingest()[-1]
    assert compressed.volume is not None, compressed.status_detail
    assert reference.volume is not None
    np.testing.assert_array_equal(compressed.volume.voxels, reference.volume.voxels)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_uncompressed_encodings_change_nothing(
    syntax: Any, reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    def encode(_: int, dataset: FileDataset) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.set_original_encoding(False, False)

    write_chest(tmp_path / "archive" / "turned", edit=encode)
    encoded = ingest()[-1]
    assert encoded.volume is not None, encoded.status_detail
    assert reference.volume is not None
    np.testing.assert_array_equal(encoded.volume.voxels, reference.volume.voxels)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_in_any_axis_order_gives_the_same_volume(
    suffix: str, axes: tuple[int, ...], signs: tuple[int, ...], reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    """NIfTI's world is right, anterior, superior to DICOM's left, posterior, superior; nibabel writes, we read."""
    ras = make_chest().transpose(2, 1, 0)[::-1, ::-1, ::-1]  # x to the left, y to the back, z to the feet, all turned
    affine = np.diag([SPACING_MM[2], SPACING_MM[1], SPACING_MM[0], 1.0])
    affine[:3, 3] = (-END_MM, -END_MM, 500.0 - 23 * SPACING_MM[0])
    image = nibabel.Nifti1Image(np.ascontiguousarray(ras), affine)
    wanted = nibabel.orientations.axcodes2ornt(
        [("RL"[s < 0], "AP"[s < 0], "SI"[s < 0])[i] for i, s in zip(range(3), signs, strict=True)]
    )
    wanted = wanted[list(axes)]
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), wanted))
    nibabel.save(image, tmp_path / "archive" / f"turned{suffix}")
    turned = next(scan for scan in ingest() if scan.scan_id.startswith("turned"))
    assert turned.scan_id == f"turned{suffix}"
    assert turned.volume is not None, turned.status_detail
    assert reference.volume is not None
    np.testing.assert_array_equal(turned.volume.voxels, reference.volume.voxels)
    np.testing.assert_allclose(turned.volume.spacing_mm or (), reference.volume.spacing_mm or ())


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_nrrd_and_metaimage_give_the_same_volume(
    suffix: str, reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    image = sitk.GetImageFromArray(make_chest())
    image.SetSpacing(SPACING_MM[::-1])
    image.SetDirection([1, 0, 0, 0, 1, 0, 0, 0, -1])
    sitk.WriteImage(image, str(tmp_path / "archive" / f"turned{suffix}"))
    turned = next(scan for scan in ingest() if scan.scan_id.startswith("turned"))
    assert turned.volume is not None, turned.status_detail
    assert reference.volume is not None
    np.testing.assert_array_equal(turned.volume.voxels, reference.volume.voxels)


def test_a_zip_of_the_slices_gives_the_same_volume(reference: IngestedScan, ingest: Ingest, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive / "turned.zip", "w") as file:
        for path in sorted((archive / "reference").iterdir()):
            file.write(path, f"deep/inside/{path.name}")
    scan = ingest()[-1]
    assert scan.scan_id == f"turned.zip#{_digest(SERIES_UID)}"
    assert scan.volume is not None
    assert reference.volume is not None
    np.testing.assert_array_equal(scan.volume.voxels, reference.volume.voxels)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_slice_images_are_taken_in_natural_order(suffix: str, ingest: Ingest, tmp_path: Path) -> None:
    display = np.repeat(np.arange(24, dtype=np.uint8) * 10, 64 * 64).reshape(24, 64, 64)  # 1.png, 10.png, 2.png ...
    write_images(tmp_path / "archive" / "NCP" / "12" / "34", suffix, display)
    (scan,) = ingest()
    assert (scan.scan_id, scan.status, scan.facts.intensity) == ("NCP/12/34", Status.OK, Intensity.DISPLAY)
    assert scan.facts.slice_spacing_mm is None
    assert scan.lung is None
    assert scan.volume is not None
    expected = np.interp((np.arange(16) + 0.5) * 1.5 - 0.5, np.arange(24), np.arange(24) * 10.0)
    assert np.abs(scan.volume.voxels.mean(axis=(1, 2)) - expected).max() <= 1


NUMBERS: dict[str, tuple[Sequence[str], Status]] = {
    "a gap": ([f"{n:04d}" for n in range(24) if not 8 <= n < 14], Status.BAD_MISSING_SLICE),
    "one lost": ([f"IM-0001-{n}" for n in range(1, 25) if n != 5], Status.BAD_MISSING_SLICE),
    "three holes": ([f"{n}" for n in range(70, 94) if n not in (75, 80, 91)], Status.BAD_MISSING_SLICE),
    "one lost of every third": ([f"{n}" for n in range(4, 76, 3) if n != 31], Status.BAD_MISSING_SLICE),
    "from 113 on": ([f"{n}" for n in range(113, 137)], Status.OK),
    "every third": ([f"{n:03d}" for n in range(4, 76, 3)], Status.OK),
    "two in three": ([f"{n}" for n in range(36) if n % 3], Status.OK),
    "numbers at random": ([f"{n * n * 31 + 7}" for n in range(24)], Status.OK),
    "letters": ([f"slice_{chr(97 + n)}" for n in range(24)], Status.OK),
    "two numbers": ([f"{n // 12}-{n % 12}" for n in range(24)], Status.OK),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_images_with_a_hole_in_their_numbers_are_refused(name: str, ingest: Ingest, tmp_path: Path) -> None:
    """How the numbers of a whole scan run is free, as in CC-CCII."""
    numbers, expected = NUMBERS[name]
    (tmp_path / "archive" / "a").mkdir(parents=True)
    _add_images(tmp_path / "archive" / "a", [f"{number}.png" for number in numbers])
    (scan,) = ingest()
    assert scan.status is expected, scan.status_detail


def test_feet_first_images_are_turned_round_by_the_setting(ingest: Ingest, tmp_path: Path) -> None:
    display = np.repeat(np.arange(24, dtype=np.uint8) * 10, 64 * 64).reshape(24, 64, 64)
    write_images(tmp_path / "archive" / "a", ".png", display)
    write_images(tmp_path / "archive" / "b", ".png", display[::-1])
    head_first = ingest()[0]
    feet_first = ingest(Road(VOLUME.model_copy(update={"slice_order": "feet_first"}), DecodeConfig()))[1]
    assert head_first.volume is not None
    assert feet_first.volume is not None
    np.testing.assert_array_equal(head_first.volume.voxels, feet_first.volume.voxels)


@pytest.mark.parametrize("slice_order", ["head_first", "feet_first"])
def test_a_source_known_to_be_reversed_is_turned_and_no_other(slice_order: str, ingest: Ingest, tmp_path: Path) -> None:
    display = np.repeat(np.arange(24, dtype=np.uint8) * 10, 64 * 64).reshape(24, 64, 64)
    write_images(tmp_path / "archive" / "a", ".png", display)
    write_images(tmp_path / "archive" / "b", ".png", display[::-1])
    write_chest(tmp_path / "archive" / "c")
    volume = VOLUME.model_copy(update={"slice_order": slice_order})
    plain = ingest(Road(volume, DecodeConfig()))
    turned = ingest(Road(volume, DecodeConfig(), reversed_sources=frozenset({"b", "c"})))
    voxels = [[scan.volume.voxels for scan in scans if scan.volume is not None] for scans in (plain, turned)]
    np.testing.assert_array_equal(voxels[1][0], voxels[0][0])
    np.testing.assert_array_equal(voxels[1][1], voxels[0][0])
    np.testing.assert_array_equal(voxels[1][2], voxels[0][2])  # DICOM knows its own order


def test_a_decoding_child_leaves_the_other_processors_alone(sandbox: Sandbox) -> None:
    """Ray counts one for it; OpenCV would take them all."""
    assert sandbox.call(cv2.getNumThreads) == 1


def test_area_and_body_settings_reach_the_volume(reference: IngestedScan, ingest: Ingest) -> None:
    assert reference.volume is not None
    for update in ({"depth_resampling": "area"}, {"crop": "body"}):
        (scan,) = ingest(Road(VOLUME.model_copy(update=update), DecodeConfig()))
        assert scan.volume is not None
        assert not np.array_equal(scan.volume.voxels, reference.volume.voxels)


def test_a_prefix_called_like_a_file_is_read_as_a_prefix(
    reference: IngestedScan, ingest: Ingest, tmp_path: Path
) -> None:
    for name in ("case1.zip", "case2.nii", "case4.mha"):
        write_chest(tmp_path / "archive" / name)
    write_images(tmp_path / "archive" / "case3.nii.gz", ".png", DISPLAY)
    rows = {scan.scan_id.split("#")[0].rstrip("/"): scan for scan in ingest()}
    assert [rows[key].status for key in sorted(rows)] == [Status.OK] * 5
    assert reference.volume is not None
    for name in ("case1.zip", "case2.nii", "case4.mha"):
        np.testing.assert_array_equal(rows[name].volume.voxels, reference.volume.voxels)  # type: ignore[union-attr]


# Several scans in a source, strays, damage


def test_masking_blackens_what_is_no_lung_and_refuses_what_has_none(ingest: Ingest, tmp_path: Path) -> None:
    config = VOLUME.model_copy(update={"mask_outside_lung": "outlines"})
    display = ((make_chest().astype(np.float32) + 1350) * 255 / 1500).clip(0, 255).astype(np.uint8)
    wall = np.tile(np.where(np.arange(64) < 32, 60, 235).astype(np.uint8), (24, 64, 1))
    write_chest(tmp_path / "archive" / "a")
    write_images(tmp_path / "archive" / "b", ".png", display)
    write_images(tmp_path / "archive" / "c", ".png", wall)
    plain, masked = ingest(), ingest(Road(config, DecodeConfig()))
    assert [scan.status for scan in plain] == [Status.OK] * 3
    assert [scan.status for scan in masked] == [Status.OK, Status.OK, Status.SKIP_NO_LUNG]
    for before, after in zip(plain[:2], masked[:2], strict=True):
        assert before.volume is not None
        assert after.volume is not None
        is_kept = after.volume.voxels > 0
        np.testing.assert_array_equal(after.volume.voxels[is_kept], before.volume.voxels[is_kept])
        assert 0.1 < is_kept.mean() < 0.6
        assert not is_kept[:, 0].any()
    assert masked[2].volume is None


def test_two_series_in_a_prefix_are_two_scans(ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    write_chest(tmp_path / "elsewhere", SeriesInstanceUID="1.2.3.4.6")
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(tmp_path / "archive" / "a" / f"second-{path.name}")
    scans = ingest()
    assert {scan.scan_id for scan in scans} == {f"a#{_digest(uid)}" for uid in (SERIES_UID, "1.2.3.4.6")}
    assert [scan.status for scan in scans] == [Status.OK, Status.OK]


def test_two_series_of_one_digest_are_one_row_that_says_so(ingest: Ingest, tmp_path: Path) -> None:
    """Scans are told apart by 8 hex digits of their series: the pair was found by trying."""
    uids = [f"1.2.840.113619.2.55.{number}" for number in (33550, 72368)]
    assert len({_digest(uid) for uid in uids}) == 1
    for uid in [*uids, "1.9"]:
        for path in write_chest(tmp_path / uid, SeriesInstanceUID=uid):
            (tmp_path / "archive" / "a").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "archive" / "a" / f"{uid}-{path.name}")
    scans = {scan.scan_id: scan for scan in ingest()}
    both = f"a#{_digest(uids[0])}"
    statuses = {name: scan.status for name, scan in scans.items()}
    assert statuses == {both: Status.BAD_MIXED_SERIES, f"a#{_digest('1.9')}": Status.OK}
    assert (scans[both].facts.num_files, "one digest" in scans[both].status_detail) == (48, True)


@pytest.mark.parametrize("key", mark_slow(["a", "a.zip"], but=["a"]))
def test_a_series_that_kills_its_decoder_costs_the_others_nothing(key: str, ingest: Ingest, tmp_path: Path) -> None:
    """Beside it lie a sound series and slice images."""
    folder, sound_uid = tmp_path / "archive" / "a", "1.2.3.4.6"
    write_crash(folder)
    for path in write_chest(tmp_path / "sound", SeriesInstanceUID=sound_uid):
        path.rename(folder / f"sound-{path.name}")
    for path in write_images(tmp_path / "images", ".png", DISPLAY):
        path.rename(folder / path.name)
    if key == "a.zip":
        shutil.make_archive(str(folder), "zip", folder)
        shutil.rmtree(folder)
    scans = {scan.scan_id: scan for scan in ingest()}
    crashed, sound = (f"{key}#{_digest(uid)}" for uid in (SERIES_UID, sound_uid))
    statuses = {name: scan.status for name, scan in scans.items()}
    assert statuses == {crashed: Status.ERR_DECODER_CRASH, sound: Status.OK, key: Status.OK}
    assert scans[crashed].facts.num_files == 24
    assert scans[crashed].facts.patient_key == scans[sound].facts.patient_key is not None


class ReadingSandbox:
    """A sandbox of which everything is kept that goes into the child."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.sent = b""

    def call(self, *arguments: Any) -> Any:
        self.sent += pickle.dumps(arguments)
        return self._sandbox.call(*arguments)


def test_no_secret_enters_the_child_and_no_identifier_leaves_its_owner(sandbox: Sandbox, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    store = open_store(str(tmp_path / "archive"))
    (source,) = list_sources(store.list_objects())
    reading = ReadingSandbox(sandbox)
    (scan,) = Ingester(store, ROAD, reading).ingest(source)  # type: ignore[arg-type]
    assert ROAD.pseudonym_key is not None
    assert scan.facts.series_key == hmac.new(ROAD.pseudonym_key, SERIES_UID.encode(), sha256).hexdigest()
    assert ROAD.pseudonym_key not in reading.sent
    assert b"patient-1" not in pickle.dumps(scan)


class CountingSandbox:
    """A sandbox that counts the volumes each call brings back."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.num_volumes: list[int] = []

    def call(self, *arguments: Any) -> Any:
        answer = self._sandbox.call(*arguments)
        scans = answer if isinstance(answer, list) else [answer]
        self.num_volumes.append(sum(getattr(scan, "volume", None) is not None for scan in scans))
        return answer


def test_each_of_many_series_has_the_limits_of_a_call_to_itself(sandbox: Sandbox, tmp_path: Path) -> None:
    for index in range(3):
        for path in write_chest(tmp_path / f"{index}", SeriesInstanceUID=f"1.2.3.4.{index}"):
            target = tmp_path / "archive" / "a" / f"{index}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    store = open_store(str(tmp_path / "archive"))
    (source,) = list_sources(store.list_objects())
    counting = CountingSandbox(sandbox)
    scans = Ingester(store, ROAD, counting).ingest(source)  # type: ignore[arg-type]
    assert [scan.status for scan in scans] == [Status.OK] * 3
    assert counting.num_volumes == [0, 1, 1, 1]


def test_strays_beside_the_slices_spoil_nothing(reference: IngestedScan, ingest: Ingest, tmp_path: Path) -> None:
    folder = tmp_path / "archive" / "reference"
    for name in ("LICENSE", "notes", "DICOMDIR", "data.bin"):
        (folder / name).write_bytes(b"not a slice\n" * 20)
    cv2.imwrite(str(folder / "picture.png"), np.zeros((8, 8), np.uint8))
    (scan,) = ingest()
    assert scan.volume is not None
    assert reference.volume is not None
    np.testing.assert_array_equal(scan.volume.voxels, reference.volume.voxels)


def test_without_a_secret_keys_are_null_and_other_secrets_give_other_keys(ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    keys = [
        ingest(Road(VOLUME, DecodeConfig(), secret))[0].facts.patient_key for secret in (None, b"x" * 32, b"y" * 32)
    ]
    assert keys[0] is None
    assert len(set(keys)) == 3
    assert "secret" not in repr(ROAD)


def test_a_slice_in_a_zip_is_named_by_its_place_in_the_zip(ingest: Ingest, tmp_path: Path) -> None:
    paths = write_chest(tmp_path / "loose")
    whole_bytes = paths[3].stat().st_size
    cut(paths[3], 0.8)
    missing_bytes = whole_bytes - paths[3].stat().st_size
    (tmp_path / "archive" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "archive" / "deep" / "a.zip", "w") as file:
        for path in paths:
            file.write(path, f"inside/{path.name}")
    (scan,) = ingest()
    assert scan.status_detail == f"entry 4 of 24: pixel data ends {missing_bytes} bytes early"


IDENTIFYING = {
    "a patient's name": lambda index: f"DOE^JANE 1960-01-01 {index}.dcm",
    "a short name": lambda index: f"DOE{index}.dcm",
    "a patient's number": lambda index: f"{4711000 + index}.dcm",
    "a UID": lambda index: f"1.2.3.{index}",
}


@pytest.mark.parametrize("naming", IDENTIFYING)
@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.8])
def test_a_file_name_that_may_identify_is_not_in_the_row(
    keep: float, is_zipped: bool, naming: str, ingest: Ingest, tmp_path: Path
) -> None:
    folder = tmp_path / "archive" / "a"
    for index, path in enumerate(write_chest(folder)):
        path.rename(folder / f"x{IDENTIFYING[naming](index)}")
    names = sorted(path.rename(folder / path.name[1:]).name for path in folder.iterdir())
    cut(folder / names[2], keep)
    if is_zipped:
        with zipfile.ZipFile(tmp_path / "archive" / "a.zip", "w") as file:
            for name in names:
                file.write(folder / name, f"DOE^JANE/{name}")
        shutil.rmtree(folder)
    (scan,) = ingest()
    assert scan.status.startswith("BAD_")
    assert scan.status_detail.startswith(f"{'entry' if is_zipped else 'file'} 3 of 24: ")
    assert names[2] not in scan.status_detail


def test_a_zip_of_a_hostile_entry_does_not_say_its_name(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    for write in (encrypted(("DOE^JANE/3.dcm", b"x")), zipped(("../DOE^JANE.dcm", b"x"))):
        write(tmp_path / "archive" / "a")
        (scan,) = ingest()
        assert (scan.status, "DOE" in scan.status_detail) == (Status.BAD_ZIP, False)


def test_several_damaged_slices_are_counted_and_the_first_is_named(ingest: Ingest, tmp_path: Path) -> None:
    for path in write_chest(tmp_path / "archive" / "a")[3:5]:
        cut(path, 0.8)
    (scan,) = ingest()
    assert scan.status_detail.startswith("004.dcm: pixel data ends ")
    assert scan.status_detail.endswith("; 2 of 24 slices are damaged")


@pytest.mark.parametrize("pixels", [np.zeros((32, 64), np.uint16), np.zeros((64, 32), np.uint16)])
def test_a_slice_that_decodes_to_another_size_than_its_header_is_named(
    pixels: np.ndarray, ingest: Ingest, tmp_path: Path
) -> None:
    """The codestream has a size of its own, which GDCM believes."""

    def shrink(index: int, dataset: FileDataset) -> None:
        if index == 10:
            dataset.Rows, dataset.Columns, dataset.PixelData = *pixels.shape, pixels.tobytes()
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 64

    write_chest(tmp_path / "archive" / "a", edit=shrink)
    (scan,) = ingest()
    assert (scan.status, scan.status_detail.split(": ")[0]) == (Status.BAD_PIXELS, "022.dcm")


def test_a_damaged_image_spoils_its_folder_also_where_linear_reads_nothing(ingest: Ingest, tmp_path: Path) -> None:
    write_images(tmp_path / "archive" / "a", ".png", DISPLAY.repeat(4, 0))
    cut(tmp_path / "archive" / "a" / "3.png", 0.8)
    (scan,) = ingest()
    assert (scan.status, scan.status_detail) == (Status.BAD_TRUNCATED, "3.png: slice image ends early")


def test_images_above_the_limit_are_refused_before_any_pixel_is_decoded(ingest: Ingest, tmp_path: Path) -> None:
    """A TIFF is decoded to see whether it is whole; a few bytes of it may be gigabytes then."""
    write_images(tmp_path / "archive" / "a", ".tif", DISPLAY)
    garble(tmp_path / "archive" / "a" / "3.tif")
    (damaged,) = ingest()
    assert (damaged.status, damaged.status_detail) == (Status.BAD_PIXELS, "3.tif: slice does not decode")
    (large,) = ingest(Road(VOLUME, DecodeConfig(max_scan_bytes=1000)))
    assert (large.status, large.status_detail) == (Status.BAD_LIMIT, "more than 1000 bytes decoded")


def test_an_unreadable_file_among_several_series_is_a_row_of_its_own(ingest: Ingest, tmp_path: Path) -> None:
    test_two_series_in_a_prefix_are_two_scans(ingest, tmp_path)
    (tmp_path / "archive" / "a" / "broken.dcm").write_text("<html>503</html>")
    statuses = {scan.scan_id: scan.status for scan in ingest()}
    assert statuses.pop("a") is Status.BAD_UNREADABLE
    assert list(statuses.values()) == [Status.OK, Status.OK]


@pytest.mark.slow
def test_a_last_slice_cut_anywhere_spoils_its_series(ingest: Ingest, tmp_path: Path) -> None:
    """Nothing but the cut slice itself tells that the series had one more at its end."""
    path = write_chest(tmp_path / "archive" / "a")[-1]
    data = path.read_bytes()
    body = data.index(SERIES_UID.encode())
    for length in {*range(0, 1000, 20), *range(body - 12, body + 8), *range(1000, len(data), 500), len(data) - 1}:
        path.write_bytes(data[:length])
        (scan,) = ingest()
        assert scan.scan_id == f"a#{_digest(SERIES_UID)}", length
        assert scan.status in (Status.BAD_UNREADABLE, Status.BAD_TRUNCATED), (length, scan.status_detail)
        assert path.name in scan.status_detail


@pytest.mark.parametrize("length", [0, 100, 420])
def test_a_cut_slice_spoils_of_two_series_the_one_it_is_named_like(length: int, ingest: Ingest, tmp_path: Path) -> None:
    test_two_series_in_a_prefix_are_two_scans(ingest, tmp_path)
    os.truncate(tmp_path / "archive" / "a" / "000.dcm", length)
    statuses = {scan.scan_id: scan.status for scan in ingest()}
    assert statuses.pop(f"a#{_digest('1.2.3.4.6')}") is Status.OK
    assert statuses.pop(f"a#{_digest(SERIES_UID)}") in (Status.BAD_UNREADABLE, Status.BAD_TRUNCATED)
    assert statuses == {}


def test_a_cut_slice_spoils_every_series_that_may_have_lost_it(ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    write_chest(tmp_path / "elsewhere", SeriesInstanceUID="1.2.3.4.6")
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(tmp_path / "archive" / "a" / f"1{path.name}")
    os.truncate(tmp_path / "archive" / "a" / "000.dcm", 420)
    assert {scan.status for scan in ingest()} == {Status.BAD_TRUNCATED}


def _cut_in_sequence(path: Path) -> None:
    """Leave a slice that ends between an item of a sequence of undefined length and its end."""
    dataset = pydicom.dcmread(path)
    item = pydicom.Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    item.is_undefined_length_sequence_item = True
    dataset.ReferencedImageSequence = [item]
    dataset["ReferencedImageSequence"].is_undefined_length = True
    dataset.save_as(path)
    os.truncate(path, path.read_bytes().index(b"\x08\x00\x40\x11") + 40)


def test_a_slice_cut_inside_a_sequence_is_no_trouble_of_the_machine(ingest: Ingest, tmp_path: Path) -> None:
    test_two_series_in_a_prefix_are_two_scans(ingest, tmp_path)
    _cut_in_sequence(tmp_path / "archive" / "a" / "000.dcm")
    statuses = {scan.scan_id: scan.status for scan in ingest()}
    assert statuses == {
        f"a#{_digest(SERIES_UID)}": Status.BAD_UNREADABLE,
        f"a#{_digest('1.2.3.4.6')}": Status.OK,
    }


SPOILT_FILES = {"zeros": bytes(9000), "a web page": b"<html>503</html>", "a stub": b"version 1\n", "nothing": b""}
NAMINGS: dict[str, Callable[[int], str]] = {
    "IM0007": lambda index: f"IM{index:04d}",
    "7": lambda index: f"{index}",
    "a UID": lambda index: f"1.2.840.113.{index * 7919}",
    "a UID and .dcm": lambda index: f"1.2.840.113.{index * 7919}.dcm",
    "a suffix of its own": lambda index: f"slice{index}.ct",
}


@pytest.mark.parametrize("content", SPOILT_FILES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_end_slices_that_are_no_dicom_any_more_spoil_their_series(
    naming: str, content: str, ingest: Ingest, tmp_path: Path
) -> None:
    for index, path in enumerate(write_chest(tmp_path / "archive" / "a")):
        renamed = path.rename(path.with_name(NAMINGS[naming](index)))
        if index < 6:
            renamed.write_bytes(SPOILT_FILES[content])
    (scan,) = ingest()
    assert (scan.scan_id, scan.status) == (f"a#{_digest(SERIES_UID)}", Status.BAD_UNREADABLE)
    assert scan.status_detail.endswith("6 of 24 slices are damaged")


@pytest.mark.parametrize("change", [Path.unlink, lambda path: cut(path, 0), lambda path: path.write_bytes(bytes(99))])
def test_thumbnails_of_a_damaged_series_are_still_no_scan(
    change: Callable[[Path], object], ingest: Ingest, tmp_path: Path
) -> None:
    paths = write_chest(tmp_path / "archive" / "a")
    _add_images(tmp_path / "archive" / "a", [f"{index:03d}.jpg" for index in range(24)])
    change(paths[10])
    (scan,) = ingest()
    assert scan.scan_id == f"a#{_digest(SERIES_UID)}"
    assert scan.status.startswith("BAD_")


def test_thumbnails_of_slices_that_are_all_unreadable_are_no_scan(ingest: Ingest, tmp_path: Path) -> None:
    for path in write_chest(tmp_path / "archive" / "a"):
        path.write_bytes(bytes(99))
    _add_images(tmp_path / "archive" / "a", [f"{index:03d}.jpg" for index in range(24)])
    (scan,) = ingest()
    assert (scan.scan_id, scan.status, scan.facts.num_files) == ("a", Status.BAD_UNREADABLE, 24)


def _add_images(folder: Path, names: Sequence[str]) -> None:
    for name, plane in zip(names, DISPLAY, strict=False):
        assert cv2.imwrite(str(folder / name), plane)


IMAGES = [f"{index}.png" for index in range(24)]


def _write_scout_and_images(folder: Path) -> None:
    write_chest(folder, make_chest()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    _add_images(folder, IMAGES)


def test_slice_images_beside_a_scout_are_a_scan_of_their_own(ingest: Ingest, tmp_path: Path) -> None:
    _write_scout_and_images(tmp_path / "archive" / "a")
    rows = {scan.scan_id: (scan.status, scan.facts.num_files) for scan in ingest()}
    assert rows == {f"a#{_digest(SERIES_UID)}": (Status.SKIP_LOCALIZER, 1), "a": (Status.OK, 24)}


def test_so_they_are_in_a_zip(ingest: Ingest, tmp_path: Path) -> None:
    _write_scout_and_images(tmp_path / "loose")
    (tmp_path / "archive").mkdir()
    shutil.make_archive(str(tmp_path / "archive" / "a"), "zip", tmp_path / "loose")
    rows = {scan.scan_id: scan.status for scan in ingest()}
    assert rows == {f"a.zip#{_digest(SERIES_UID)}": Status.SKIP_LOCALIZER, "a.zip": Status.OK}


@pytest.mark.parametrize(
    "names",
    [
        [f"picture{index}.png" for index in range(9)],
        [f"{index:03d}.jpg" for index in range(24)],
        [f"{index:03d}.dcm.jpg" for index in range(24)],
    ],
    ids=["too few for a scan", "one beside each slice", "named after the slice's whole name"],
)
def test_thumbnails_beside_a_series_are_no_scan(names: list[str], ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    _add_images(tmp_path / "archive" / "a", names)
    (scan,) = ingest()
    assert (scan.status, scan.facts.num_files) == (Status.OK, 24)


def test_images_that_share_only_some_names_with_slices_are_a_whole_scan(ingest: Ingest, tmp_path: Path) -> None:
    """Dropping those that do would score a scan with holes."""
    write_chest(tmp_path / "archive" / "a", make_chest()[:12])
    _add_images(tmp_path / "archive" / "a", [f"{index:03d}.png" for index in range(24)])
    assert {scan.scan_id: scan.facts.num_files for scan in ingest()} == {f"a#{_digest(SERIES_UID)}": 12, "a": 24}


def test_an_unreadable_file_spoils_the_only_series_and_not_the_images(ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    _add_images(tmp_path / "archive" / "a", [f"{index}.png" for index in range(24)])
    (tmp_path / "archive" / "a" / "broken.dcm").write_text("<html>503</html>")
    rows = {scan.scan_id: scan.status for scan in ingest()}
    assert rows == {f"a#{_digest(SERIES_UID)}": Status.BAD_UNREADABLE, "a": Status.OK}


def test_no_two_rows_of_a_source_have_one_name(ingest: Ingest, tmp_path: Path) -> None:
    """Two series, images, and a file of which nobody knows to what it belongs."""
    test_two_series_in_a_prefix_are_two_scans(ingest, tmp_path)
    _add_images(tmp_path / "archive" / "a", IMAGES)
    (tmp_path / "archive" / "a" / "broken.dcm").write_text("<html>503</html>")
    scans = ingest()
    assert len({scan.scan_id for scan in scans}) == len(scans) == 3
    rows = {scan.scan_id: (scan.status, scan.facts.num_files) for scan in scans}
    assert rows["a"] == (Status.BAD_UNREADABLE, 25)


def test_a_file_replaced_or_deleted_after_planning_is_no_scan(ingest: Ingest, tmp_path: Path) -> None:
    paths = write_chest(tmp_path / "archive" / "a")
    (scan,) = ingest(between=lambda: paths[0].write_bytes(paths[1].read_bytes() + b"\0"))
    assert (scan.status, scan.status_detail) == (Status.ERR_INPUT_CHANGED, "000.dcm: replaced since it was listed")
    (scan,) = ingest(between=paths[0].unlink)
    assert (scan.status, scan.status_detail) == (Status.ERR_GONE, "000.dcm: deleted since it was listed")


class Meddler:
    """A sandbox that does something to the archive before or after one of its calls."""

    def __init__(self, sandbox: Sandbox, when: str, meddle: Callable[[], object]) -> None:
        self._sandbox, self._when, self._meddle = sandbox, when, meddle

    def call(self, step: Callable[..., Any], *arguments: Any) -> Any:
        self._act("before", step)
        try:
            return self._sandbox.call(step, *arguments)
        finally:
            self._act("after", step)

    def _act(self, side: str, step: Callable[..., Any]) -> None:
        if self._when == f"{side} {step.__name__}":
            self._meddle()


@pytest.mark.parametrize("when", ["before find_scans", "before decode_scan", "after decode_scan"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_source_read_in_place_that_changes_while_it_is_read_is_no_scan(
    when: str, change: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Also where decoding itself failed over it: what was planned was not seen."""
    paths = write_chest(tmp_path / "archive" / "a")
    store = open_store(str(tmp_path / "archive"))
    (source,) = list_sources(store.list_objects())

    def meddle() -> None:
        if change == "deleted":
            paths[4].unlink()
        else:
            paths[4].write_bytes(paths[5].read_bytes())

    (scan,) = Ingester(store, ROAD, Meddler(sandbox, when, meddle)).ingest(source)  # type: ignore[arg-type]
    assert scan.status is (Status.ERR_GONE if change == "deleted" else Status.ERR_INPUT_CHANGED)
    assert scan.volume is None


def test_inside_a_run_the_planned_slices_decide_and_the_next_listing_sees_the_others(
    reference: IngestedScan, ingest: Ingest, sandbox: Sandbox, tmp_path: Path
) -> None:
    folder = tmp_path / "archive" / "reference"
    store = open_store(str(tmp_path / "archive"))
    (planned,) = list_sources(store.list_objects())
    shutil.copy(folder / "000.dcm", folder / "999.dcm")
    (scan,) = Ingester(store, ROAD, sandbox).ingest(planned)
    assert (scan.status, scan.facts.num_files) == (Status.OK, 24)
    np.testing.assert_array_equal(scan.volume.voxels, reference.volume.voxels)  # type: ignore[union-attr]
    (relisted,) = list_sources(store.list_objects())
    assert relisted.input_sha256 != planned.input_sha256
    (again,) = ingest()
    assert again.status is Status.BAD_DUPLICATE_SLICE
    for name in ("000.dcm", "999.dcm"):
        (folder / name).unlink()
    (shorter,) = list_sources(store.list_objects())
    assert len({planned.input_sha256, relisted.input_sha256, shorter.input_sha256}) == 3


@pytest.mark.s3
def test_a_bucket_that_changes_after_planning_gives_no_mixture(
    sandbox: Sandbox, s3: Callable[[], str], tmp_path: Path
) -> None:
    store = open_store(s3() + "/ct")
    for path in write_chest(tmp_path / "a"):
        store.write_bytes(f"a/{path.name}", path.read_bytes())
    (source,) = list_sources(store.list_objects())
    ingester = Ingester(store, ROAD, sandbox)
    (whole,) = ingester.ingest(source)
    assert whole.status is Status.OK
    assert whole.fetch_s > 0

    store.write_bytes("a/024.dcm", store.read_bytes("a/000.dcm"))
    (same,) = ingester.ingest(source)
    assert same.volume is not None
    np.testing.assert_array_equal(same.volume.voxels, whole.volume.voxels)  # type: ignore[union-attr]

    mirrored = bytearray(store.read_bytes("a/005.dcm"))
    mirrored[-4096:] = mirrored[-4096:][::-1]  # as long as before
    store.write_bytes("a/005.dcm", bytes(mirrored))
    (replaced,) = ingester.ingest(source)
    assert (replaced.status, replaced.status_detail) == (
        Status.ERR_INPUT_CHANGED,
        "005.dcm: replaced since it was listed",
    )
    store.delete("a/005.dcm")
    (gone,) = ingester.ingest(source)
    assert (gone.status, gone.status_detail) == (Status.ERR_GONE, "005.dcm: deleted since it was listed")


def test_a_pipe_named_like_a_scan_is_not_opened(ingest: Ingest, tmp_path: Path) -> None:
    """Opening it would wait for a writer until the time limit."""
    (tmp_path / "archive").mkdir()
    os.mkfifo(tmp_path / "archive" / "a.nii")
    (scan,) = ingest()
    assert (scan.status, scan.status_detail) == (Status.ERR_STORAGE, "file 1 of 1: not a regular file")


def test_limits_of_time_and_memory_are_errors_to_retry(ingest: Ingest, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    (source,) = list_sources(open_store(str(tmp_path / "archive")).list_objects())
    hasty = Ingester(open_store(str(tmp_path / "archive")), Road(VOLUME, DecodeConfig(timeout_s=0.001)))
    (slow,) = hasty.ingest(source)
    assert slow.status is Status.ERR_TIMEOUT
    assert slow.decode_s >= 0.001
    (large,) = ingest(Road(VOLUME, DecodeConfig(max_slices=20)))
    assert large.status is Status.BAD_LIMIT


@pytest.mark.parametrize("axes", ["LPS", "SLP", "LSP"])
def test_a_volume_of_too_many_slices_is_refused_before_its_voxels_are_read(
    axes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = sitk.DICOMOrient(sitk.Image((8, 9, 41), sitk.sitkInt16), axes)
    sitk.WriteImage(image, tmp_path / "a.nii")
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda _: pytest.fail("voxels were read"))
    with pytest.raises(ScanError, match="41 slices, at most 40") as caught:
        open_volume(tmp_path / "a.nii", DecodeConfig(max_slices=40))
    assert caught.value.status is Status.BAD_LIMIT


class Remote(LocalStore):
    """A store without local paths stands for S3: everything is copied first."""

    def local_path(self, key: str) -> None:  # type: ignore[override]
        del key

    def fetch(self, item: StoredObject, path: Path) -> None:
        LocalStore(self.root).fetch(item, path)


def test_a_file_that_cannot_be_fetched_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    paths = write_chest(tmp_path / "archive" / "a")
    store = Remote(tmp_path / "archive")
    (source,) = list_sources(store.list_objects())
    os.utime(paths[1], ns=(1, 1))
    (scan,) = Ingester(store, ROAD, sandbox).ingest(source)
    assert (scan.status, scan.status_detail) == (Status.ERR_INPUT_CHANGED, "007.dcm: replaced since it was listed")


def test_a_fetched_source_gives_the_volume_of_one_read_in_place(
    reference: IngestedScan, sandbox: Sandbox, tmp_path: Path
) -> None:
    store = Remote(tmp_path / "archive")
    (source,) = list_sources(store.list_objects())
    (scan,) = Ingester(store, ROAD, sandbox).ingest(source)
    assert scan.volume is not None
    assert reference.volume is not None
    np.testing.assert_array_equal(scan.volume.voxels, reference.volume.voxels)


class LateRemote(Remote):
    """One that takes its time over one file."""

    def fetch(self, item: StoredObject, path: Path) -> None:
        time.sleep(0.5 * item.key.endswith("/000.dcm"))
        super().fetch(item, path)


def test_seconds_of_all_scans_sum_up_to_no_more_than_passed(sandbox: Sandbox, tmp_path: Path) -> None:
    """Of two series, fetched together, each has half."""
    write_chest(tmp_path / "archive" / "a")
    for path in write_chest(tmp_path / "other", SeriesInstanceUID="1.9"):
        path.rename(tmp_path / "archive" / "a" / f"other-{path.name}")
    store = LateRemote(tmp_path / "archive")
    (source,) = list_sources(store.list_objects())
    start_s = time.perf_counter()
    scans = Ingester(store, ROAD, sandbox).ingest(source)
    passed_s = time.perf_counter() - start_s
    assert [scan.status for scan in scans] == [Status.OK, Status.OK]
    assert scans[0].fetch_s == scans[1].fetch_s
    assert 0.5 <= sum(scan.fetch_s for scan in scans) <= sum(scan.fetch_s + scan.decode_s for scan in scans) <= passed_s


class NotedRemote(Remote):
    """One whose `note`, set by a test, hears of every fetch, and may refuse it."""

    note: Callable[[str], object]

    def fetch(self, item: StoredObject, path: Path) -> None:
        type(self).note(item.key)
        super().fetch(item, path)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[NotedRemote, list[Source]]:
    """Three chests in a store that is far away, and an empty folder for what is fetched."""
    for number, name in enumerate("abc"):
        write_chest(tmp_path / "archive" / name, make_chest() + 5 * number)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    store = NotedRemote(tmp_path / "archive")
    return store, list(list_sources(store.list_objects()))


def list_temporary() -> list[str]:
    return [path.name for path in Path(tempfile.gettempdir()).glob("darnet-*")]


class WaitingSandbox:
    """A sandbox that decodes nothing before the next source is fetched, and tells what was by then."""

    def __init__(self, sandbox: Sandbox, fetched: list[str]) -> None:
        self._sandbox, self._fetched = sandbox, fetched
        self.seen: list[str] = []

    def call(self, step: Any, *arguments: Any) -> Any:
        if step is decode_scan:
            following = {"a": "b", "b": "c", "c": "c"}[arguments[0].scan_id[0]]
            deadline_s = time.monotonic() + 30
            while self._fetched.count(following) < len(make_chest()) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            self.seen.append("".join(sorted(set(self._fetched))))
        return self._sandbox.call(step, *arguments)


def test_the_next_source_is_fetched_while_one_is_decoded(
    far: tuple[NotedRemote, list[Source]], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone, and what comes of it is what comes of one source after another."""
    (store, sources), fetched = far, list[str]()
    monkeypatch.setattr(NotedRemote, "note", lambda key: fetched.append(key[0]), raising=False)
    waiting = WaitingSandbox(sandbox, fetched)
    ingester, found = Ingester(store, ROAD, waiting), []  # type: ignore[arg-type]
    for source, following in zip_longest(sources, sources[1:]):
        found += ingester.ingest(source, following)
    assert waiting.seen == ["ab", "abc", "abc"]
    assert len(fetched) == 3 * len(make_chest())
    assert list_temporary() == []
    serial = [scan for source in sources for scan in Ingester(store, ROAD, sandbox).ingest(source)]
    for one, other in zip(found, serial, strict=True):
        assert one.volume is not None
        assert other.volume is not None
        np.testing.assert_array_equal(one.volume.voxels, other.volume.voxels)
        assert (one.scan_id, one.facts, one.fetch_s > 0) == (other.scan_id, other.facts, True)


@pytest.mark.parametrize(
    ("trouble", "ended"),
    [
        (ScanError(Status.ERR_GONE, "gone"), Status.ERR_GONE),
        (OSError(28, "No space left on device"), Status.ERR_STORAGE),
        (CredentialsError("nobody enters"), "nobody enters"),
    ],
)
def test_what_is_wrong_with_a_source_that_is_fetched_ahead_is_told_of_it_alone(
    trouble: Exception,
    ended: str,
    far: tuple[NotedRemote, list[Source]],
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note(key: str) -> None:
        if key.startswith("b/"):
            raise trouble

    store, sources = far
    monkeypatch.setattr(NotedRemote, "note", note, raising=False)
    ingester, found = Ingester(store, ROAD, sandbox), list[str]()
    for source, following in zip_longest(sources, sources[1:]):
        try:
            found += [scan.status for scan in ingester.ingest(source, following)]
        except CredentialsError as error:
            found.append(str(error))
    assert found == [Status.OK, ended, Status.OK]
    assert list_temporary() == []


def test_a_disk_with_room_for_one_source_serves_them_all(
    far: tuple[NotedRemote, list[Source]], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without fetching ahead: each is read again when nothing else lies there."""

    def note(_: str) -> None:
        if len(list_temporary()) > 1:
            raise OSError(28, "No space left on device")

    store, sources = far
    monkeypatch.setattr(NotedRemote, "note", note, raising=False)
    ingester, found = Ingester(store, ROAD, sandbox), list[Status]()
    for source, following in zip_longest(sources, sources[1:]):
        found += [scan.status for scan in ingester.ingest(source, following)]
    assert found == [Status.OK] * 3
    assert list_temporary() == []


def test_what_was_fetched_for_nobody_is_deleted(
    far: tuple[NotedRemote, list[Source]], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (a, b, c) = far
    monkeypatch.setattr(NotedRemote, "note", lambda _: None, raising=False)
    ingester = Ingester(store, ROAD, sandbox)
    ingester.ingest(a, b)
    assert len(list_temporary()) == 1
    (scan,) = ingester.ingest(c, b)  # another than the one before said
    assert (scan.scan_id[0], len(list_temporary())) == ("c", 1)
    ingester.drop_ahead()
    assert list_temporary() == []
    ingester.ingest(a)
    assert list_temporary() == []


# Real scans


@pytest.mark.skipif(not CT_DATA.is_dir(), reason="real CT scans (../shared/data/ct) are not on this machine")
def test_real_chests_are_ok_and_odd_files_all_have_a_coded_row(sandbox: Sandbox) -> None:
    store = open_store(str(CT_DATA))
    sources: dict[str, Source] = {source.key: source for source in list_sources(store.list_objects())}
    ingester = Ingester(store, ROAD, sandbox)
    rows = {key: ingester.ingest(source) for key, source in sources.items()}
    slices = {key: [scan.facts.num_slices for scan in scans if scan.status is Status.OK] for key, scans in rows.items()}
    assert slices == {
        "lidc-idri-0314": [275],
        "lung-pet-ct-dx/A0002-B40f-8mm": [30],
        "odd/pydicom-data": [],
        "odd/wado": [],
        "weasis-chest-rt": [98],
    }
    for key in ("odd/wado", "odd/pydicom-data"):
        assert sum(scan.facts.num_files for scan in rows[key]) == len(sources[key].objects)
        assert all(scan.status.startswith("SKIP_") for scan in rows[key])
