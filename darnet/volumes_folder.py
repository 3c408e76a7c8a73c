"""The volumes folder: standard volumes and their cohort table, written once.

Written and declared in any store; arrays are read from a local folder only, where they can be memory-mapped.
`<volumes>/arrays/` holds one memory-mapped uint8 array a scan, `cohort.parquet` one row a scan, `facts.parquet` what
an audit wants to know of it besides its pixels, and `volumes.json`, written last, what all were made with.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError

from darnet.cohort import COHORTS, Division
from darnet.config import VolumeConfig
from darnet.errors import ObjectMissing, UsageError
from darnet.scan import DIAGNOSES, Uint8Array
from darnet.storage import Store, open_store

COHORT_FILE = "cohort.parquet"
FACTS_FILE = "facts.parquet"
VOLUMES_FILE = "volumes.json"
ARRAYS_FOLDER = "arrays"
COLUMNS = ("scan_id", "patient_id", "diagnosis", "cohort", "fold", "array", "sha256")


@dataclass(frozen=True, eq=False, slots=True)
class VolumesTable:
    """The tables of a volumes folder, checked; `frame` has the columns of `COLUMNS`, one row a scan.

    `division` and `excluded`, the scans of the table that are not in it by the reason, are None where they were not
    recorded.
    """

    place: str
    frame: pd.DataFrame
    volume: VolumeConfig
    cohort_sha256: str
    division: Division | None
    excluded: Mapping[str, int] | None

    @property
    def labels(self) -> NDArray[np.int64]:
        """Shape: (rows of the frame,), label order of `DIAGNOSES`."""
        order = {str(diagnosis): label for label, diagnosis in enumerate(DIAGNOSES)}
        return np.array([order[name] for name in self.frame["diagnosis"]], np.int64)

    @property
    def num_folds(self) -> int:
        """Folds of the training cohort; 0 where it is empty."""
        return int(self.frame["fold"].max()) + 1 if self.frame["fold"].notna().any() else 0

    def select_training(self, fold: int) -> NDArray[np.int64]:
        """Rows the network of this fold learns from: the training cohort's other folds."""
        return np.flatnonzero((self.frame["fold"] != fold).fillna(False))

    def select_validation(self, fold: int) -> NDArray[np.int64]:
        """Rows that choose the network of this fold."""
        return np.flatnonzero((self.frame["fold"] == fold).fillna(False))


@dataclass(frozen=True, eq=False, slots=True)
class VolumesIndex(VolumesTable):
    """A volumes folder on this machine, of which the arrays were checked too."""

    folder: Path

    def read_batches(self, cohort: str, batch_size: int) -> Iterator[Uint8Array]:
        """The volumes of a cohort, in the order of its rows.

        Shape: (n, D, H, W), n <= batch_size.
        """
        arrays = self.frame.loc[self.frame["cohort"] == cohort, "array"].tolist()
        for start in range(0, len(arrays), batch_size):
            yield np.stack([np.load(self.folder / name) for name in arrays[start : start + batch_size]])


def write_array(store: Store, scan_id: str, voxels: Uint8Array) -> tuple[str, str]:
    """Store one standard volume whole or not at all; returns its file name within the folder and the file's SHA-256.

    Another content gets another name: what was prepared under other settings stays what it was.
    Shape: (D, H, W) uint8.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(voxels), allow_pickle=False)
    sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
    name = f"{ARRAYS_FOLDER}/{hashlib.sha256(scan_id.encode()).hexdigest()[:16]}-{sha256[:16]}.npy"
    store.write_bytes(name, buffer.getvalue())
    return name, sha256


def write_index(
    store: Store,
    frame: pd.DataFrame,
    volume: VolumeConfig,
    division: Division | None = None,
    excluded: Mapping[str, int] | None = None,
) -> str:
    """Store the cohort table, then the file that declares the folder complete; returns the cohort's digest.

    `division` is how the table came by its cohorts and folds, `excluded` counts by reason the scans that are not in
    it, if that is known.

    Raises: UsageError naming the first row that is wrong.
    """
    _check_columns(store.uri, frame)
    frame = frame[list(COLUMNS)].astype({"fold": "Int64"}).sort_values("scan_id", ignore_index=True)
    _check_rows(store.uri, frame)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    store.write_bytes(COHORT_FILE, buffer.getvalue())
    cohort_sha256 = digest_cohort(frame)
    declared = {
        "volume": volume.model_dump(mode="json"),
        "preprocessing_version": volume.preprocessing_version,
        "cohort_sha256": cohort_sha256,
        "division": None if division is None else division.model_dump(mode="json"),
        "excluded": None if excluded is None else dict(excluded),
    }
    store.write_bytes(VOLUMES_FILE, json.dumps(declared, indent=2).encode())
    return cohort_sha256


def write_facts(store: Store, facts: pd.DataFrame) -> None:
    """Store what is known of each scan besides its pixels: one row a scan, `scan_id` first. No part of the cohort."""
    buffer = io.BytesIO()
    facts.to_parquet(buffer, index=False)
    store.write_bytes(FACTS_FILE, buffer.getvalue())


def read_facts(store: Store) -> pd.DataFrame:
    """What `write_facts` stored; only `scan_id`, and no row, where the folder has none."""
    try:
        return pd.read_parquet(io.BytesIO(store.read_bytes(FACTS_FILE)))
    except ObjectMissing:
        return pd.DataFrame({"scan_id": pd.Series([], dtype=str)})


def read_voxels(index: VolumesIndex, row: int) -> Uint8Array:
    """The standard volume of a row of the index, memory-mapped.

    Shape: (D, H, W) uint8.
    """
    voxels: Uint8Array = np.load(index.folder / index.frame["array"].iloc[row], mmap_mode="r")
    return voxels


def read_table(store: Store) -> VolumesTable:
    """Read and check the tables of a volumes folder, and no array.

    Raises: UsageError naming the file or row: a file that is missing, unfinished or from other preprocessing, an
            unknown diagnosis or cohort, a patient in two folds; StorageError.
    """
    place, text = f"{store.uri}/{VOLUMES_FILE}", _read_needed(store, VOLUMES_FILE)
    volume, declared_sha256, division, excluded = _parse_declaration(place, text)
    frame = pd.read_parquet(io.BytesIO(_read_needed(store, COHORT_FILE)))
    _check_columns(store.uri, frame)
    _check_rows(store.uri, frame)
    cohort_sha256 = digest_cohort(frame)
    if declared_sha256 != cohort_sha256:
        place = f"{store.uri}/{COHORT_FILE}"
        raise UsageError(f"{place} is not the table {VOLUMES_FILE} declares; run jobs.prepare again")
    return VolumesTable(store.uri, frame, volume, cohort_sha256, division, excluded)


def read_index(folder: Path) -> VolumesIndex:
    """Read and check a volumes folder on this machine.

    Raises: UsageError as `read_table`, and naming an array that is missing, damaged or of another shape.
    """
    table = read_table(open_store(str(folder)))
    for name in table.frame["array"]:
        _check_array(folder / name, table.volume.shape)
    return VolumesIndex(
        table.place, table.frame, table.volume, table.cohort_sha256, table.division, table.excluded, folder
    )


def digest_cohort(frame: pd.DataFrame) -> str:
    """SHA-256 of who is in which cohort and fold with which pixels; neither file names nor row order matter.

    Source: ours: it goes into the bundle, as what a network was trained on.
    """
    relevant = frame[["scan_id", "patient_id", "diagnosis", "cohort", "fold", "sha256"]].sort_values("scan_id")
    rows = relevant.astype({"fold": "object"}).to_numpy().tolist()
    text = json.dumps([[None if pd.isna(value) else value for value in row] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_needed(store: Store, name: str) -> bytes:
    try:
        return store.read_bytes(name)
    except ObjectMissing as error:
        raise UsageError(f"{store.uri}/{name}: no such file; jobs.prepare writes it") from error


def _check_columns(place: str, frame: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{place}/{COHORT_FILE}: no column {', '.join(missing)}")


def _check_rows(place: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming the first row that breaks a rule."""
    is_train = frame["cohort"] == "train"
    rules: list[tuple[str, pd.Series[bool]]] = [
        ("a scan in two rows", frame["scan_id"].duplicated()),
        ("an unknown diagnosis", ~frame["diagnosis"].isin([str(diagnosis) for diagnosis in DIAGNOSES])),
        ("an unknown cohort", ~frame["cohort"].isin(COHORTS)),
        ("a training scan without a fold", is_train & frame["fold"].isna()),
        ("a test scan with a fold", ~is_train & frame["fold"].notna()),
        ("a negative fold", (frame["fold"] < 0).fillna(False)),
        ("a patient in two folds", frame.groupby("patient_id")["fold"].transform("nunique") > 1),
    ]
    for fault, is_wrong in rules:
        if is_wrong.any():
            row = frame[is_wrong].iloc[0]
            facts = ", ".join(f"{name} {row[name]}" for name in ("patient_id", "diagnosis", "cohort", "fold"))
            raise UsageError(f"{place}/{COHORT_FILE}: {fault}: scan_id {row['scan_id']} ({facts})")


def _parse_declaration(place: str, text: bytes) -> tuple[VolumeConfig, str, Division | None, Mapping[str, int] | None]:
    """What volumes.json says, checked; settings that this code would carry out otherwise are refused."""
    try:
        declared = json.loads(text)
        volume = VolumeConfig.model_validate(declared["volume"])
        version, cohort_sha256 = declared["preprocessing_version"], str(declared["cohort_sha256"])
        recorded = declared.get("division")
        division = None if recorded is None else Division.model_validate(recorded)
        counts = declared.get("excluded")
        excluded = None if counts is None else {str(name): int(count) for name, count in counts.items()}
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UsageError(f"{place}: not written by jobs.prepare: {error}") from error
    if version != volume.preprocessing_version:
        raise UsageError(
            f"{place}: prepared as {version}, this code prepares {volume.preprocessing_version}; run jobs.prepare again"
        )
    return volume, cohort_sha256, division, excluded


def _check_array(path: Path, shape: tuple[int, int, int]) -> None:
    """Raises: UsageError unless the file's header says uint8 of this shape and the file is as long as that takes."""
    try:
        voxels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if voxels.shape != shape or voxels.dtype != np.uint8:
        raise UsageError(f"{path}: {voxels.dtype} of shape {voxels.shape}, expected uint8 of shape {shape}")
