"""Pictures of CT and class map: what is in them, which scans have one, and that nothing else can be read from them."""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from darnet.cam_images import CamImages, draw_montage, is_chosen, make_thumbnail, name_image
from darnet.config import CamChoice
from darnet.errors import RunError, StorageError, UsageError
from darnet.publishing.outermost import Outermost
from darnet.scan import CropBox, FloatArray, Intensity, StandardVolume
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from tests.results_fixtures import make_row

SHAPE = (32, 40, 60)


def make_volume(**changes: Any) -> StandardVolume:
    """Every slice has a grey value of its own; a bright square lies in front, on the patient's right."""
    voxels = np.repeat(np.arange(SHAPE[0], dtype=np.uint8) * 3, SHAPE[1] * SHAPE[2]).reshape(SHAPE)
    voxels[:, :8, :12] = 250
    volume = StandardVolume(voxels, Intensity.HU, (5.0, 3.0, 2.0), CropBox(32, 0, 0, 80, 120))
    return replace(volume, **changes)


def make_cam(peak: tuple[int, int, int] = (16, 30, 45)) -> FloatArray:
    """A blunt cone in the back of the patient's left, two voxels wide at half height."""
    distance = np.sqrt(sum((axis - place) ** 2 for axis, place in zip(np.indices(SHAPE), peak, strict=True)))
    return (7 * (1 - distance / 6)).clip(0).astype(np.float32)


def split(montage: np.ndarray, num_columns: int = 5, gap: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The panels of both rows."""
    height, width = (montage.shape[0] - gap) // 2, (montage.shape[1] - 4 * gap) // num_columns
    columns = [montage[:, place * (width + gap) :][:, :width].astype(int) for place in range(num_columns)]
    return [column[:height] for column in columns], [column[-height:] for column in columns]


def test_slices_around_the_peak_stand_head_to_feet_in_radiological_convention() -> None:
    above, _ = split(draw_montage(make_volume(), make_cam()))
    for panel, index in zip(above, (12, 14, 16, 18, 20), strict=True):
        assert (np.ptp(panel, axis=2) == 0).all()  # grey
        assert (panel[-20:] == 3 * index).all()
        assert (panel[5:30, 5:30] == 250).all()  # front and the patient's right: above and on the left
        assert (panel[5:30, -30:] == 3 * index).all()


def test_the_map_is_coloured_where_it_lies_and_nowhere_else() -> None:
    _, below = split(draw_montage(make_volume(), make_cam()))
    middle = below[2]
    colour = np.ptp(middle, axis=2)
    rows, columns = np.nonzero(colour > 60)
    share = (rows.mean() + 0.5) / middle.shape[0], (columns.mean() + 0.5) / middle.shape[1]
    assert np.abs(np.array(share) - ((30 + 0.5) / 40, (45 + 0.5) / 60)).max() < 0.02
    assert (middle[..., 2] - middle[..., 0]).max() > 80  # the hottest of inferno is yellow: red above blue
    far = np.ones(colour.shape, np.bool_)
    far[int(0.5 * len(far)) :, int(0.6 * far.shape[1]) :] = False
    assert (colour[far] == 0).all()
    assert colour.max() > np.ptp(below[0], axis=2).max()  # two steps of two slices away the cone is lower


def test_a_slice_has_the_shape_of_the_body() -> None:
    """60 columns of 2 mm by 40 rows of 3 mm are a square; without spacing, the cropped pixels count as square."""
    above, _ = split(draw_montage(make_volume(), make_cam()))
    assert above[0].shape[:2] == (256, 256)
    display = make_volume(intensity=Intensity.DISPLAY, spacing_mm=None)
    above, _ = split(draw_montage(display, make_cam()))
    assert above[0].shape[:2] == (171, 256)


def test_beyond_the_end_of_the_scan_is_black_and_the_peak_stays_in_the_middle() -> None:
    above, below = split(draw_montage(make_volume(), make_cam((31, 30, 45))))
    assert [int(panel[-1, 0, 0]) for panel in above[:3]] == [3 * 27, 3 * 29, 3 * 31]
    assert max(panel.max() for panel in [*above[3:], *below[3:]]) == 0


def write_image(store: LocalStore, **changes: Any) -> bytes:
    """The picture of a row, as a run leaves it."""
    row = make_row("ct/Doe^Jane", cam_peak_slice=16, **changes)
    CamImages(store, CamChoice()).write(row, make_volume(), make_cam())
    (item,) = store.list_objects()
    return store.read_bytes(item.key)


def test_a_picture_holds_pixels_and_nothing_else(tmp_path: Path) -> None:
    data = write_image(LocalStore(tmp_path))
    place, kinds = 8, []
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        kinds.append(kind)
        place += length + 12
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded, draw_montage(make_volume(), make_cam()))


def test_a_pictures_name_follows_from_its_row_and_holds_no_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_image(store, run_id="20300101-0a")
    (item,) = store.list_objects()
    assert item.key == f"20300101-0a/{hashlib.sha256(b'i' * 64 + b'ct/Doe^Jane').hexdigest()}.png"


def test_a_name_that_is_not_utf8_has_the_picture_of_its_published_row(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    CamImages(store, CamChoice()).write(make_row("caf\udce9", cam_peak_slice=16), make_volume(), make_cam())
    (item,) = store.list_objects()
    assert item.key == name_image(make_row(r"caf\xe9"))


def choose(choice: CamChoice, **changes: Any) -> bool:
    return is_chosen(make_row("a", cam_peak_slice=3, **changes), choice)


def test_class_and_range_choose_the_scan() -> None:
    cp = {"prediction": "CP", "probability_cp": 0.9, "probability_ncp": 0.05}
    assert choose(CamChoice())
    assert not choose(CamChoice(), **cp)
    assert choose(CamChoice(predictions=("CP", "Normal")), **cp)
    assert choose(CamChoice(probability=(0.7, 0.7)))  # of make_row; both ends belong to the range
    assert not choose(CamChoice(probability=(0.71, 1)))
    assert not choose(CamChoice(probability=(0, 0.69)))
    assert not choose(CamChoice(predictions=("CP",), probability=(0, 0.5)), **cp)  # of the predicted class
    assert not is_chosen(make_row("a", "BAD_TILT"), CamChoice())
    assert not is_chosen(make_row("a", cam_peak_slice=None), CamChoice())  # a map that is nowhere positive


def test_a_picture_is_kept_of_what_is_chosen_and_of_what_the_page_may_list(tmp_path: Path) -> None:
    rows = [make_row(f"{place:02d}", cam_peak_slice=3, probability_ncp=1 - place / 100) for place in range(20)]
    for share, num_wanted in ((0, 10), (1, 20)):
        images, outermost = CamImages(LocalStore(tmp_path), CamChoice(share=share)), Outermost()
        wanted = [images.wants(row | {"fold_std_ncp": 0.0}, outermost) for row in rows]
        assert wanted == [True] * num_wanted + [False] * (20 - num_wanted)
    images = CamImages(LocalStore(tmp_path), CamChoice(share=0))
    assert not images.wants(make_row("a", cam_peak_slice=None), Outermost())


def test_a_share_is_that_of_the_scans_the_same_each_time_and_part_of_a_larger_one() -> None:
    rows = [make_row(f"scan{index}", cam_peak_slice=3) for index in range(4000)]
    drawn = {
        share: {row["scan_id"] for row in rows if is_chosen(row, CamChoice(share=share))} for share in (0, 0.1, 0.5, 1)
    }
    assert drawn[0.1] == {
        row["scan_id"]
        for row in rows
        if int(hashlib.sha256(row["scan_id"].encode()).hexdigest()[:16], 16) / 2**64 < 0.1
    }
    assert drawn[0] < drawn[0.1] < drawn[0.5] < drawn[1]
    assert abs(len(drawn[0.1]) - 400) < 100  # five standard deviations
    assert len(drawn[1]) == 4000


def test_a_range_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(ValueError, match="the lower first"):
        CamChoice(probability=(0.9, 0.1))


def test_a_thumbnail_is_the_middle_slice_beside_its_map(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    above, below = split(cv2.imdecode(np.frombuffer(write_image(store), np.uint8), cv2.IMREAD_COLOR))
    row = make_row("ct/Doe^Jane", cam_peak_slice=16.0)
    images = CamImages(store, CamChoice())
    thumbnails = images.read_thumbnails([row, make_row("another")])
    assert list(thumbnails) == ["ct/Doe^Jane"]
    figure = thumbnails["ct/Doe^Jane"]
    assert "slice 16 (the first is 0)" in figure.caption
    assert "NCP, probability 0.7000" in figure.caption
    assert isinstance(figure.picture, bytes)
    small = cv2.imdecode(np.frombuffer(figure.picture, np.uint8), cv2.IMREAD_COLOR).astype(int)
    width = above[2].shape[1]
    assert small.shape == (above[2].shape[0], 2 * width + 4, 3)
    for part, panel in ((small[:, :width], above[2]), (small[:, width + 4 :], below[2])):
        assert np.abs(part - panel).mean() < 3  # JPEG
    with pytest.raises(RunError, match="does not decode"):
        make_thumbnail(b"no picture")


class Full(LocalStore):
    """A store without room."""

    def write_bytes(self, key: str, data: bytes) -> None:
        raise StorageError(f"{key} of {len(data)} bytes: no room")


def test_a_store_without_room_costs_the_pictures_and_is_told(tmp_path: Path) -> None:
    images = CamImages(Full(tmp_path), CamChoice())
    row = make_row("a", cam_peak_slice=16)
    images.write(row, make_volume(), make_cam())
    rows = [row, make_row("b", "BAD_TILT"), make_row("c", cam_peak_slice=2)]
    assert images.describe("run", rows) == {"place": str(tmp_path), "chosen": 2, "written": 0}
    CamImages(LocalStore(tmp_path), CamChoice()).write(row, make_volume(), make_cam())
    assert images.describe("run", rows)["written"] == 1
    gone = CamImages(LocalStore(tmp_path / "gone"), CamChoice())
    assert "no such folder" in gone.describe("run", rows)["error"]
    with pytest.raises(RunError):
        gone.check(LocalStore(tmp_path / "archive"), LocalStore(tmp_path / "results"))


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("s3://a/results", "lies in --results"),
        ("s3://a/results/cam", "lies in --results"),
        ("s3://a/ct", "lies in --archive .* the next night would score"),
        ("s3://a/ct/cam", "lies in --archive .* the next night would score"),
        ("s3://a/results-cam", ""),
        ("s3://a/ct-cam", ""),
        ("s3://a", ""),
    ],
)
def test_pictures_lie_neither_in_the_results_nor_in_the_archive(place: str, complaint: str, tmp_path: Path) -> None:
    """What lists the pictures' place is a folder here; only its address counts."""

    class Named(LocalStore):
        uri = place

    images, stores = (
        CamImages(Named(tmp_path), CamChoice()),
        [open_store(f"s3://a/{name}") for name in ("ct", "results")],
    )
    if not complaint:
        images.check(*stores)
        return
    with pytest.raises(UsageError, match=f"{complaint}.*; give them a separate prefix"):
        images.check(*stores)


def test_pictures_may_lie_in_an_archive_beside_the_prefixes_that_are_scored(tmp_path: Path) -> None:
    images, results = CamImages(LocalStore(tmp_path / "pictures"), CamChoice()), LocalStore(tmp_path / "results")
    (tmp_path / "pictures").mkdir()
    images.check(LocalStore(tmp_path), results, ["ct/"])
    for prefixes in (["ct/", "pic"], [""], ["pictures/"]):
        with pytest.raises(UsageError, match="lies in --archive"):
            images.check(LocalStore(tmp_path), results, prefixes)
