"""A scored scan in; for some of them, a PNG of CT above its class map out, and thumbnails for the night's page.

There is no text in a picture, and no metadata: what it shows is said by the row that its name is made of.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from darnet.cam_statistics import find_peak
from darnet.config import CamChoice
from darnet.errors import RunError, UsageError
from darnet.page import HtmlFigure
from darnet.publishing.outermost import Outermost
from darnet.publishing.rows import PROBABILITIES, name_probability, spell_key
from darnet.scan import FloatArray, StandardVolume, Uint8Array
from darnet.storage import Store

NUM_COLUMNS = 5  # slices of a picture, head to feet; the middle one holds the peak
STEPS = 16  # of the whole scan: so far apart are they
PANEL = 256  # pixels of a slice's longer side
GAP = 4
GROUND = (0x18, 0x14, 0x11)  # blue, green, red; told apart from the black of air
OPACITY = 0.6  # of the map's maximum. Source: as the CAM figures of `report`
JPEG_QUALITY = 85
IMAGE_COLUMNS = ["run_id", "scan_id", "input_sha256", "prediction", *PROBABILITIES, "cam_peak_slice"]  # of a row


@dataclass(frozen=True)
class CamImages:
    """Pictures of chosen scans in a store, each at `<run_id>/<digest>.png`."""

    store: Store
    choice: CamChoice

    def check(self, archive: Store, results: Store, prefixes: Sequence[str] = ("",)) -> None:
        """Say at once, and not at the end of a night, that the place cannot be reached, or is archive's or results'.

        Of an archive counts what lies below the `prefixes` that a night lists.
        Raises: UsageError, StorageError, CredentialsError.
        """
        place = f"{self.store.uri}/"
        listed = [f"{archive.uri}/{prefix}" for prefix in prefixes or ("",)]
        if any(place.startswith(prefix) for prefix in listed):
            raise UsageError(
                f"--cam-images {self.store.uri} lies in --archive {archive.uri}, and the next night would score the "
                "pictures; give them a separate prefix"
            )
        if f"{self.store.uri}/".startswith(f"{results.uri}/"):
            raise UsageError(
                f"--cam-images {self.store.uri} lies in --results {results.uri}, whose readers would see the pictures; "
                "give them a separate prefix"
            )
        next(iter(self.store.list_objects()), None)

    def wants(self, row: Mapping[str, Any], outermost: Outermost) -> bool:
        """Whether a picture is kept of a row just made: it is chosen, or the night's page may come to list it.

        `outermost` has taken the rows before it.
        """
        row = _spell(row)
        may_be_listed = row["cam_peak_slice"] is not None and outermost.take(row)
        return may_be_listed or is_chosen(row, self.choice)

    def write(self, row: Mapping[str, Any], volume: StandardVolume, cam: FloatArray) -> None:
        """Draw and keep the picture of a row just made. A store that refuses it stops no night.

        Shape: cam (D, H, W) as the volume.
        """
        with suppress(RunError):  # `describe` counts what is there
            self.store.write_bytes(name_image(_spell(row)), _encode(draw_montage(volume, cam), ".png"))

    def describe(self, run_id: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Of a run's rows, how many are chosen, and of how many of these there is a picture."""
        named = {name_image(row) for row in rows if is_chosen(row, self.choice)}
        told = {"place": self.store.uri, "chosen": len(named)}
        try:
            return told | {"written": sum(item.key in named for item in self.store.list_objects(f"{run_id}/"))}
        except RunError as error:
            return told | {"error": str(error)}

    def read_thumbnails(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, HtmlFigure]:
        """By scan_id, the peak's slice beside its map, of those rows that have a picture."""
        figures = {}
        for row in rows:
            with suppress(RunError):
                picture = make_thumbnail(self.store.read_bytes(name_image(row)))
                figures[row["scan_id"]] = HtmlFigure(picture, _describe(row))
        return figures


def _spell(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row just made, its scan named as in the table."""
    return {**row, "scan_id": spell_key(row["scan_id"])}


def is_chosen(row: Mapping[str, Any], choice: CamChoice) -> bool:
    """Whether the choice is for the scan of this row of the table; the same answer whenever it is asked."""
    if row["cam_peak_slice"] is None or row["prediction"] not in choice.predictions:
        return False
    low, high = choice.probability
    if not low <= row[name_probability(row["prediction"])] <= high:
        return False
    draw = hashlib.sha256(row["scan_id"].encode()).digest()[:8]
    return int.from_bytes(draw) < choice.share * 2**64


def name_image(row: Mapping[str, Any]) -> str:
    """`<run_id>/<SHA-256 in hex of input_sha256 followed by scan_id>.png`: nobody reads a patient's name from it.

    The digest of a file name alone could be found by trying names; input_sha256 holds ETags or times as well.
    """
    digest = hashlib.sha256(f"{row['input_sha256']}{row['scan_id']}".encode())
    return f"{row['run_id']}/{digest.hexdigest()}.png"


def draw_montage(volume: StandardVolume, cam: FloatArray) -> Uint8Array:
    """Slices around the peak, head to feet, above the same slices under the map; black where the scan has ended.

    As a radiologist looks at them: from the feet, the patient's right on the left, front upwards, in the shape of the
    body and in the window of the network input. Colours are inferno, from nothing to the whole map's maximum.

    Shape: cam (D, H, W) as the volume -> (rows, columns, 3), blue, green, red.
    """
    depth = len(cam)
    step = max(1, depth // STEPS)
    peak = find_peak(cam)[0]
    shares = cam / cam.max()
    size = _find_panel_size(volume)
    columns = []
    for place in range(NUM_COLUMNS):
        index = peak + (place - NUM_COLUMNS // 2) * step
        pair: Uint8Array = np.zeros((2, size[1], size[0], 3), np.uint8)
        if 0 <= index < depth:
            pair[0] = cv2.cvtColor(
                cv2.resize(volume.voxels[index], size, interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2BGR
            )
            pair[1] = _overlay(pair[0], cv2.resize(shares[index], size, interpolation=cv2.INTER_LINEAR))
        columns.append(_join(pair, axis=0))
    return _join(columns, axis=1)


def make_thumbnail(picture: bytes) -> bytes:
    """Of a PNG of `draw_montage`, the middle slice beside its map, as JPEG.

    Raises: RunError if it is no picture.
    """
    montage = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    if montage is None:
        raise RunError("a picture of a scan does not decode")
    height = (montage.shape[0] - GAP) // 2
    width = (montage.shape[1] - GAP * (NUM_COLUMNS - 1)) // NUM_COLUMNS
    left = NUM_COLUMNS // 2 * (width + GAP)
    middle: Uint8Array = np.asarray(montage[:, left : left + width], np.uint8)
    return _encode(_join([middle[:height], middle[-height:]], axis=1), ".jpg", cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)


def _describe(row: Mapping[str, Any]) -> str:
    probability = row[name_probability(row["prediction"])]
    return (
        f"{row['scan_id']}: slice {int(row['cam_peak_slice'])} (the first is 0), bare and under the map of "
        f"{row['prediction']}, probability {probability:.4f}. The patient's right is on the left."
    )


def _find_panel_size(volume: StandardVolume) -> tuple[int, int]:
    """Width and height in pixels of a slice in the shape of the body; pixels of display images count as square."""
    _, height, width = volume.voxels.shape
    if volume.spacing_mm is None:
        extents = float(volume.crop.width), float(volume.crop.height)
    else:
        extents = width * volume.spacing_mm[2], height * volume.spacing_mm[1]
    scale = PANEL / max(extents)
    return max(1, round(extents[0] * scale)), max(1, round(extents[1] * scale))


def _overlay(image: Uint8Array, shares: FloatArray) -> Uint8Array:
    """An image under the map in colour, more opaque where the map is stronger."""
    shares = shares.clip(0, 1)
    colours = cv2.applyColorMap(np.rint(255 * shares).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity = OPACITY * shares[..., None]
    return np.rint((1 - opacity) * image + opacity * colours).astype(np.uint8)


def _join(parts: Iterable[Uint8Array], axis: int) -> Uint8Array:
    """Pictures beside or below each other, with a gap between them."""
    spaced: list[Uint8Array] = []
    for part in parts:
        shape = list(part.shape)
        shape[axis] = GAP
        spaced += [np.broadcast_to(np.array(GROUND, np.uint8), shape), part]
    return np.concatenate(spaced[1:], axis=axis)


def _encode(picture: Uint8Array, suffix: str, *settings: int) -> bytes:
    is_done, data = cv2.imencode(suffix, picture, settings)
    assert is_done, "OpenCV encodes what it was built for"
    return data.tobytes()
