"""What an audit looks at besides diagnoses: columns of the table, files, headers and pixels in; features out.

Also the scans that are there twice, and what the images say about the order of their slices.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from darnet.archive import name_format
from darnet.auditing.shortcuts import Feature, encode_levels, measure_border
from darnet.cohort import COHORT_COLUMNS, NEEDED_COLUMNS, find_known_order
from darnet.reading.slice_order import OrderVerdict, judge_order
from darnet.scan import FloatArray, Source
from darnet.storage import Store
from darnet.terminal import show_progress
from darnet.volumes_folder import VolumesIndex, read_voxels

NO_FEATURES = frozenset((*NEEDED_COLUMNS, *COHORT_COLUMNS, "fold"))
FACT_NUMBERS = ("num_slices", "slice_spacing_mm", "pixel_spacing_mm")
FACT_CATEGORIES = ("file_format", "intensity", "manufacturer")


@dataclass(frozen=True)
class Look:
    """What the pixels of one standard volume show: its border, and the order of its slices."""

    border: Mapping[str, FloatArray]
    order: OrderVerdict


@dataclass(frozen=True)
class Duplicate:
    """Scans that are one: `by` says how that was seen (pixels, files, or one source under several names)."""

    by: str
    scan_ids: tuple[str, ...]


def list_table_features(frame: pd.DataFrame) -> tuple[list[Feature], list[str]]:
    """Every further column of a cohort table as a feature; and the columns that are neither numbers nor a category.

    An empty cell is a level of its own in a category, but for an order_defect that nobody looked for.
    """
    features, unread = [], []
    for column in frame.columns:
        cells = frame[column].astype(object).where(frame[column].notna(), "").astype(str)
        if column in NO_FEATURES or cells.nunique() < 2:
            continue
        if column == "order_defect":
            known = zip(cells, find_known_order(frame), strict=True)
            features += _make_category(column, "table", [cell if is_known else None for cell, is_known in known])
            continue
        numbers = pd.to_numeric(cells, errors="coerce")
        if (numbers.notna() | (cells == "")).all():
            features.append(Feature(str(column), "table", numbers.to_numpy(np.float64)))
        elif (levels := encode_levels(cells.tolist())) is not None:
            features.append(Feature(str(column), "table", levels))
        else:
            unread.append(str(column))
    return features, unread


def list_file_features(scan_ids: Sequence[str], sources: Mapping[str, Source]) -> list[Feature]:
    """What a listing alone tells: number, size and format of each scan's files."""
    found = [sources.get(scan_id) for scan_id in scan_ids]
    numbers = {
        "num_files": [None if source is None else len(source.objects) for source in found],
        "bytes_per_file": [None if source is None else source.num_bytes / len(source.objects) for source in found],
    }
    formats = [None if source is None else name_format(source) for source in found]
    features = [Feature(name, "files", np.array(values, np.float64)) for name, values in numbers.items()]
    return features + _make_category("file_format", "files", formats)


def list_fact_features(scan_ids: Sequence[str], facts: pd.DataFrame) -> list[Feature]:
    """What jobs.prepare noted of headers and files; nothing where it noted nothing."""
    if facts.empty:
        return []
    rows = facts.set_index("scan_id").reindex(list(scan_ids))
    features = [Feature(name, "headers", rows[name].to_numpy(np.float64, na_value=np.nan)) for name in FACT_NUMBERS]
    sizes = [
        None if pd.isna(height) else f"{height:.0f} x {width:.0f}"
        for height, width in zip(rows["num_rows"], rows["num_columns"], strict=True)
    ]
    categories = {name: [None if pd.isna(value) else str(value) for value in rows[name]] for name in FACT_CATEGORIES}
    for name, values in (categories | {"image_size": sizes}).items():
        features += _make_category(name, "headers", values)
    return features


def list_image_features(scan_ids: Sequence[str], looks: Mapping[str, Look]) -> list[Feature]:
    """What the borders of the standard volumes look like; NaN for a scan without one."""
    if not looks:
        return []
    features = []
    for name, value in next(iter(looks.values())).border.items():
        unknown = np.full_like(value, np.nan)
        values = [looks[scan_id].border[name] if scan_id in looks else unknown for scan_id in scan_ids]
        features.append(Feature(name, "images", np.array(values)))
    return features


def look_at_volumes(index: VolumesIndex, scan_ids: Iterable[str]) -> dict[str, Look]:
    """Look at the pixels of every standard volume of these scans: about half a second each in full size."""
    wanted = set(scan_ids)
    rows = [row for row, scan_id in enumerate(index.frame["scan_id"]) if scan_id in wanted]
    looks = {}
    with show_progress("looking at volumes", len(rows)) as meter:
        for row in rows:
            voxels = np.asarray(read_voxels(index, row))
            looks[index.frame["scan_id"].iloc[row]] = Look(measure_border(voxels), judge_order(voxels))
            meter.advance(1, {})
    return looks


def find_same_volumes(frame: pd.DataFrame) -> list[Duplicate]:
    """Scans of a volumes folder whose standard volumes have the same bytes."""
    return _group("pixels", zip(frame["scan_id"], frame["sha256"], strict=True))


def find_same_sources(sources: Mapping[str, Source]) -> list[Duplicate]:
    """Rows of the table that mean the very same files; two series of one source are two scans."""
    series = {scan_id: scan_id.partition("#")[2] for scan_id in sources}
    return _group("source", ((name, (source.input_sha256, series[name])) for name, source in sources.items()))


def find_same_files(sources: Mapping[str, Source], store: Store) -> list[Duplicate]:
    """Scans in different places whose files are byte for byte the same, in the order of their names.

    Only what agrees in every file's length is opened, and read on only while it agrees.
    """
    by_key = {source.key: source for source in sources.values()}
    scan_of = {source.key: scan_id for scan_id, source in sources.items()}
    suspects = _group("files", ((key, _list_lengths(source)) for key, source in by_key.items()))
    for first_only in (True, False):
        suspects = [
            part
            for group in suspects
            for part in _group("files", ((key, _digest(by_key[key], store, first_only)) for key in group.scan_ids))
        ]
    return [Duplicate("files", tuple(sorted(scan_of[key] for key in group.scan_ids))) for group in suspects]


def _list_lengths(source: Source) -> tuple[int, ...]:
    return tuple(item.num_bytes for item in sorted(source.objects, key=lambda item: item.key))


def _digest(source: Source, store: Store, first_only: bool) -> str:
    objects = sorted(source.objects, key=lambda item: item.key)
    digest = hashlib.sha256()
    for item in objects[:1] if first_only else objects:
        digest.update(hashlib.sha256(store.read_bytes(item.key)).digest())
    return digest.hexdigest()


def _group(by: str, marked: Iterable[tuple[str, Hashable]]) -> list[Duplicate]:
    """Names that share a mark with another."""
    names = defaultdict(list)
    for name, mark in marked:
        names[mark].append(name)
    return [Duplicate(by, tuple(sorted(group))) for group in names.values() if len(group) > 1]


def _make_category(name: str, origin: str, levels: Sequence[str | None]) -> list[Feature]:
    """A category as a feature, its unknown levels NaN; nothing where all scans are alike or too many differ."""
    is_known = np.array([level is not None for level in levels])
    encoded = encode_levels([level for level in levels if level is not None])
    if encoded is None:
        return []
    values = np.full((len(levels), encoded.shape[1]), np.nan)
    values[is_known] = encoded
    return [Feature(name, origin, values)]
