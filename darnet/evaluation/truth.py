"""Where the disease of a scan lies, if somebody knows: masks on the standard grid enter, files leave; and back.

One compressed NumPy file a scan, without pickle, named by the digest of its scan_id.
"""

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from darnet.errors import ObjectMissing, UsageError
from darnet.scan import BoolArray
from darnet.storage import Store


@dataclass(frozen=True, eq=False, slots=True)
class Truth:
    """What is known of one scan.

    Shape: `lesion` and `lung` (D, H, W) on the grid of the standard volume; lung includes lesion.
    Units: `spacing_mm` (z, y, x) of that grid.
    """

    scan_id: str
    lesion: BoolArray
    lung: BoolArray
    spacing_mm: tuple[float, float, float]

    @property
    def lesion_share(self) -> float:
        """Share of the lungs that is lesion; NaN without lungs."""
        return float(self.lesion.sum() / self.lung.sum()) if self.lung.any() else float("nan")


def write_truth(store: Store, truth: Truth) -> None:
    """Store what is known of one scan, in place of what was known before."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        scan_id=np.array(truth.scan_id),
        lesion=truth.lesion,
        lung=truth.lung,
        spacing_mm=np.array(truth.spacing_mm),
    )
    store.write_bytes(name_truth(truth.scan_id), buffer.getvalue())


def read_truths(store: Store, scan_ids: Iterable[str], shape: tuple[int, int, int]) -> dict[str, Truth]:
    """What is known of these scans, by scan_id; scans that nothing is known of are left out.

    Raises: UsageError naming the file that is damaged, of another scan or grid, or that none of the scans has any.
    """
    found: dict[str, Truth] = {}
    for scan_id in scan_ids:
        try:
            data = store.read_bytes(name_truth(scan_id))
        except ObjectMissing:
            continue
        found[scan_id] = _parse(f"{store.uri}/{name_truth(scan_id)}", data, scan_id, shape)
    if not found:
        raise UsageError(f"{store.uri}: no truth of any test scan; name the folder that was written with this archive")
    return found


def refuse_empty(store: Store) -> None:
    """Raises: UsageError where nothing is; StorageError."""
    if not any(True for _ in store.list_objects()):
        raise UsageError(f"{store.uri}: nothing is here; name the folder of lesion masks that belongs to this archive")


def name_truth(scan_id: str) -> str:
    """A file name that any scan_id fits in."""
    return f"{hashlib.sha256(scan_id.encode()).hexdigest()[:16]}.npz"


def _parse(place: str, data: bytes, scan_id: str, shape: tuple[int, int, int]) -> Truth:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            truth = Truth(
                str(stored["scan_id"]),
                stored["lesion"].astype(np.bool_),
                stored["lung"].astype(np.bool_),
                tuple(stored["spacing_mm"].tolist()),
            )
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{place}: not a truth file ({error}); write the truth again") from error
    if truth.scan_id != scan_id:
        raise UsageError(f"{place}: the truth of {truth.scan_id!r}, not of {scan_id!r}; write the truth again")
    if not truth.lesion.shape == truth.lung.shape == shape:
        raise UsageError(
            f"{place}: masks of {truth.lesion.shape} and {truth.lung.shape}, but the volumes are {shape}; write the "
            "truth again with the volume settings of jobs.prepare"
        )
    return truth
