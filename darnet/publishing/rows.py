"""What a row of the results table and of a plan is: columns, how keys are spelled, which rows speak of the same scan.

Rows as mappings go in, Arrow tables of exactly the schema come out.
"""

import os
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.errors import RunError
from darnet.scan import DIAGNOSES, BoolArray


def _column(name: str, kind: Any, description: str) -> Any:
    return pa.field(name, kind, nullable=False, metadata={"description": description})


def _nullable(name: str, kind: Any, description: str) -> Any:
    return pa.field(name, kind, nullable=True, metadata={"description": description})


# Probabilities are float64: it holds the fold mean of float32 outputs without a second rounding (and every float32
# exactly), and a threshold typed in SQL compares as written. What one network yields is float32, as it computes.
SCHEMA: Any = pa.schema(
    [
        _column("run_id", pa.string(), "The run that scored this scan."),
        _column("commit", pa.int64(), "Number of the object this row was published in; the latest is the highest."),
        _column("night", pa.date32(), "Date the run was for."),
        _column("scored_at", pa.timestamp("us", "UTC"), "When the row was made."),
        _column("source", pa.string(), "Archive-relative key of the prefix or file that holds the scan."),
        _column("scan_id", pa.string(), "Key of the scan: the source, for DICOM with # and 8 digits of its series."),
        _nullable("patient_key", pa.string(), "HMAC-SHA256 of the patient's identifier; null without a secret."),
        _nullable("series_key", pa.string(), "HMAC-SHA256 of the SeriesInstanceUID; null without a secret."),
        _column("input_sha256", pa.string(), "Digest of the source's keys, versions and sizes."),
        _column("num_files", pa.int64(), "Files the scan was read from."),
        _column("num_bytes", pa.int64(), "Bytes of these files."),
        _column("status", pa.string(), "OK; SKIP_* not ours; BAD_* fails again; ERR_* is tried again next night."),
        _column("status_detail", pa.string(), "What was found, for people; empty if there is nothing to say."),
        _column("model_name", pa.string(), "Network of the bundle."),
        _column("model_version", pa.string(), "Version of the bundle."),
        _column("model_sha256", pa.string(), "Digest over all of the bundle that changes a prediction."),
        _column("preprocessing_version", pa.string(), "Revision and settings between bytes and network input."),
        _column("code_version", pa.string(), "Version of the program that scored, and digest of its sources."),
        _nullable("intensity", pa.string(), "HU, or DISPLAY for 8-bit images without physical unit."),
        _nullable("num_slices", pa.int64(), "Slices of the series."),
        _nullable("slice_spacing_mm", pa.float64(), "Distance of neighbouring slices, mm; null for images."),
        _nullable("pixel_spacing_mm", pa.float64(), "Distance of neighbouring pixels, mm; null for images."),
        _nullable("manufacturer", pa.string(), "Scanner's maker, from a closed list."),
        _nullable("probability_cp", pa.float64(), "Common pneumonia: mean of the folds. Null unless OK."),
        _nullable("probability_ncp", pa.float64(), "COVID-19 pneumonia: mean of the folds. Null unless OK."),
        _nullable("probability_normal", pa.float64(), "Normal: mean of the folds. Null unless OK."),
        _nullable("prediction", pa.string(), "Class of the highest probability: CP, NCP or Normal."),
        _nullable("fold_probability_ncp", pa.list_(pa.float32()), "COVID-19 probability of each fold's network."),
        _nullable("fold_std_ncp", pa.float64(), "Population standard deviation of the folds' probability_ncp."),
        _nullable("cam_class", pa.string(), "Class whose activation map the cam columns describe: the prediction."),
        _nullable("cam_in_lung_fraction", pa.float64(), "Share of the map inside the lungs; null for images."),
        _nullable("cam_left_fraction", pa.float64(), "Share of the map on the patient's left; null for images."),
        _nullable("cam_extent_fraction", pa.float64(), "Share of voxels at half the map's maximum or more."),
        _nullable("cam_peak_slice", pa.int64(), "0-based slice of the map's maximum in the head-first series."),
        _nullable(
            "cam_peak_y",
            pa.int64(),
            "0-based row of the map's maximum, front to back, at the scan's own resolution; of images as stored.",
        ),
        _nullable(
            "cam_peak_x",
            pa.int64(),
            "0-based column of it, patient's right to left, at the scan's own resolution; of images as stored.",
        ),
        _nullable("cam_depth_profile", pa.list_(pa.float32()), "Share of the map in each of the D input slices."),
        _nullable("depth_gate_profile", pa.list_(pa.float32()), "Last block's depth gates, channel and fold mean."),
        _nullable("lung_fraction", pa.float64(), "Share of the network input that is lung; null for images."),
        _nullable("fetch_s", pa.float64(), "Seconds spent fetching: an equal part of its source's."),
        _nullable("decode_s", pa.float64(), "Seconds spent decoding and resampling."),
        _nullable("model_s", pa.float64(), "Seconds spent in the networks; null where they did not run."),
    ]
)
SCAN_KEY = ["source", "scan_id", "input_sha256"]
SOURCE_KEY = ["source", "input_sha256"]
MODEL_KEY = ["model_sha256", "preprocessing_version"]
STAGES = ("fetch", "decode", "model")  # what a scan's time is spent on, each in a column of seconds
SECONDS = [f"{stage}_s" for stage in STAGES]
KEY_COLUMNS = [*SCAN_KEY, *MODEL_KEY, "status", "night", "commit"]


# pyarrow has no types that mypy could check, so these say to people alone what a table holds.
Rows: TypeAlias = Any
"""Arrow table with columns of `SCHEMA`, one row a scan: all of them, or those that were asked for."""
Keys: TypeAlias = Any
"""Arrow table with `KEY_COLUMNS`: source, scan_id, input_sha256, model_sha256, preprocessing_version, status, night and
commit. Those of other runs' commits may have `is_later` (bool) besides: the commit's run listed the archive later."""
PlacedKeys: TypeAlias = Any
"""Arrow table of a run's own rows: source, scan_id, input_sha256, status and night (`staged.ROW_KEY`), `place` (int64),
the row's number in the run, and `is_given_up` (bool): its ERR is one night too many."""


def name_probability(diagnosis: str) -> str:
    """The column that has a diagnosis's probability."""
    return f"probability_{diagnosis.lower()}"


PROBABILITIES = [name_probability(diagnosis) for diagnosis in DIAGNOSES]


class Reason(StrEnum):
    """Why a source is scored: never seen, other bytes than before, before under another model only, or after an ERR."""

    NEW = "new"
    CHANGED = "changed"
    OTHER_MODEL = "other model"
    RETRY = "retry"


_OBJECT = pa.struct(
    [("key", pa.string()), ("num_bytes", pa.int64()), ("version", pa.string()), ("modified_s", pa.float64())]
)
PLAN_SCHEMA: Any = pa.schema(
    [
        _column("source", pa.string(), "Archive-relative key of the source to score."),
        _column("objects", pa.list_(_OBJECT), "Its objects as listed; fetching demands the same versions."),
        _column("input_sha256", pa.string(), "Digest of the source's keys, versions and sizes."),
        _column("reason", pa.string(), f"Why it is scored: {', '.join(Reason)} after an ERR."),
    ]
)


def make_table(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows as an Arrow table of exactly `SCHEMA`. `commit` is 0 until `publish` sets it, and may be left out.

    Raises: RunError naming a column that is unknown, missing, of another type, or null where it may not be.
    """
    names = set(SCHEMA.names)
    for row in rows:
        if wrong := sorted((row.keys() - names) | (names - {"commit"} - row.keys())):
            raise RunError(f"results row: unknown or missing column {', '.join(wrong)}")
    return pa.table([_make_column(field, rows) for field in SCHEMA], schema=SCHEMA)


def _make_column(field: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    values = [row.get("commit", 0) if field.name == "commit" else row[field.name] for row in rows]
    try:
        if field.name in ("source", "scan_id", "status_detail"):  # all three may hold a file's name
            values = [spell_key(value) for value in values]
        column = pa.array(values, field.type)
    except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:
        raise RunError(f"results row: column {field.name}: {error}") from error
    if column.null_count and not field.nullable:
        raise RunError(f"results row: column {field.name} may not be null")
    return column


def spell_key(key: str) -> str:
    r"""A key as the table spells it: bytes that are not UTF-8 become `\xNN`, so that any file name has a row.

    A backslash that would read as such an escape becomes `\x5c`; all other keys stay as they are.
    """
    if key.isascii() and "\\" not in key:
        return key
    return re.sub(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})", lambda found: rf"\x{os.fsencode(found[0])[0]:02x}", key)


def unspell_key(text: str) -> str:
    """The key that `spell_key` wrote so."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: os.fsdecode(bytes.fromhex(found[1])), text)


def select_model(rows: Rows, model_sha256: str, preprocessing_version: str) -> Rows:
    """The rows under one model and preprocessing; they have `MODEL_KEY` at least."""
    return rows.filter(is_of_model(rows, model_sha256, preprocessing_version))


def is_of_model(rows: Rows, model_sha256: str, preprocessing_version: str) -> Any:
    """An Arrow column: whether each row is under one model and preprocessing."""
    is_model = pc.equal(rows["model_sha256"], model_sha256)
    return pc.and_(is_model, pc.equal(rows["preprocessing_version"], preprocessing_version))


def is_error(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row of a frame is to be tried again."""
    return frame["status"].str.startswith("ERR_")


def is_among(frame: pd.DataFrame, others: pd.DataFrame, columns: list[str]) -> BoolArray:
    """Whether each row of a frame agrees in these columns with any row of the other."""
    return pd.MultiIndex.from_frame(frame[columns]).isin(pd.MultiIndex.from_frame(others[columns]))
