"""The results table: rows of scored scans go in, numbered immutable Parquet objects and frames for analysts come out.

Also the work in progress of a run (plan, parts), and what earlier nights already settled.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from darnet.errors import FolderMissing, ObjectMissing, PutUncertain, RunError, Status, StorageError, UsageError
from darnet.scan import DIAGNOSES, BoolArray, Source, StoredObject
from darnet.storage import Store, open_store

SCHEMA_VERSION = "1"
NOTICE = "research use only"
GIVE_UP_NIGHTS = 3  # Source: design: the same ERR on the same bytes for the third night is final
PUT_ATTEMPTS = 6  # Source: ours; with doubling pauses from 0.2 s this spans about 12 s of a store's trouble
ROW_GROUP_ROWS = 65_536  # Source: ours; about 30 MB of rows, so that a reader of few columns skips well
PLAN_BATCH_SOURCES = 1_000  # Source: ours; a source has some hundred objects
READ_THREADS = 8  # Source: ours; half of the store's connections
PROBABILITY_TOLERANCE = 1e-5  # Source: ours; a float32 softmax over three classes sums to 1 within 2e-7

PREDICTIONS = "predictions/"
COMMIT_KEY = re.compile(r"predictions/c(\d{8,})\.parquet")


# Columns


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
        _column("code_version", pa.string(), "Version of the program."),
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
        _nullable("fold_std_ncp", pa.float64(), "Standard deviation of the folds' COVID-19 probabilities."),
        _nullable("cam_class", pa.string(), "Class whose activation map the cam columns describe: the prediction."),
        _nullable("cam_in_lung_fraction", pa.float64(), "Share of the map inside the lungs; null for images."),
        _nullable("cam_left_fraction", pa.float64(), "Share of the map on the patient's left; null for images."),
        _nullable("cam_extent_fraction", pa.float64(), "Share of voxels at half the map's maximum or more."),
        _nullable("cam_peak_slice", pa.int64(), "0-based slice of the map's maximum in the head-first series."),
        _nullable("cam_peak_y", pa.int64(), "0-based row of the map's maximum in the original slice."),
        _nullable("cam_peak_x", pa.int64(), "0-based column of the map's maximum in the original slice."),
        _nullable("cam_depth_profile", pa.list_(pa.float32()), "Share of the map in each of the D input slices."),
        _nullable("depth_gate_profile", pa.list_(pa.float32()), "Last block's depth gates, channel and fold mean."),
        _nullable("lung_fraction", pa.float64(), "Share of the network input that is lung; null for images."),
        _nullable("fetch_s", pa.float64(), "Seconds spent fetching the source."),
        _nullable("decode_s", pa.float64(), "Seconds spent decoding and resampling."),
        _nullable("model_s", pa.float64(), "Seconds spent in the networks; null where they did not run."),
    ]
)
SCAN_KEY = ["source", "scan_id", "input_sha256"]
SOURCE_KEY = ["source", "input_sha256"]
MODEL_KEY = ["model_sha256", "preprocessing_version"]
PROBABILITIES = [f"probability_{diagnosis.lower()}" for diagnosis in DIAGNOSES]

_OBJECT = pa.struct(
    [("key", pa.string()), ("num_bytes", pa.int64()), ("version", pa.string()), ("modified_s", pa.float64())]
)
PLAN_SCHEMA: Any = pa.schema(
    [
        _column("source", pa.string(), "Archive-relative key of the source to score."),
        _column("objects", pa.list_(_OBJECT), "Its objects as listed; fetching demands the same versions."),
        _column("input_sha256", pa.string(), "Digest of the source's keys, versions and sizes."),
        _column("reason", pa.string(), "Why it is scored: new, changed, or retry after an ERR."),
    ]
)


def describe_schema() -> str:
    """The columns as a Markdown table."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    for field in SCHEMA:
        may_be_null = "yes" if field.nullable else "no"
        lines.append(f"| {field.name} | {field.type} | {may_be_null} | {field.metadata[b'description'].decode()} |")
    return "\n".join(lines) + "\n"


def make_table(rows: Sequence[Mapping[str, Any]]) -> Any:
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
        if field.name in ("source", "scan_id"):
            values = [spell_key(value) for value in values]
        column = pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise RunError(f"results row: column {field.name}: {error}") from error
    if column.null_count and not field.nullable:
        raise RunError(f"results row: column {field.name} may not be null")
    return column


def spell_key(key: str) -> str:
    r"""A key as the table spells it: bytes that are not UTF-8 become `\xNN`, so that any file name has a row.

    A backslash that would read as such an escape becomes `\x5c`; all other keys stay as they are.
    """
    return re.sub(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})", lambda found: rf"\x{os.fsencode(found[0])[0]:02x}", key)


def unspell_key(text: str) -> str:
    """The key that `spell_key` wrote so."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: os.fsdecode(bytes.fromhex(found[1])), text)


# Parquet objects of a store


@dataclass(frozen=True)
class _Stored:
    """A Parquet object read back: whose it is, and the asked-for columns."""

    key: str
    run_id: str
    rows: Any

    @property
    def commit(self) -> int:
        found = COMMIT_KEY.fullmatch(self.key)
        assert found is not None
        return int(found[1])


def _to_parquet(table: Any, run_id: str) -> bytes:
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata(_describe_file(run_id))
    pq.write_table(described, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _describe_file(run_id: str) -> dict[str, str]:
    return {"run_id": run_id, "schema_version": SCHEMA_VERSION, "notice": NOTICE}


def _open_parquet(store: Store, key: str) -> tuple[Any, str]:
    """An object of ours as a ParquetFile, and the run that wrote it.

    Raises: ObjectMissing; StorageError if something else lies there.
    """
    data = store.read_bytes(key)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        metadata = file.schema_arrow.metadata or {}
        if metadata[b"schema_version"].decode() != SCHEMA_VERSION:
            raise UsageError(
                f"{store.uri}/{key}: schema version is not {SCHEMA_VERSION}; use the program that wrote it"
            )
        return file, metadata[b"run_id"].decode()
    except (pa.ArrowException, KeyError) as error:
        raise StorageError(f"{store.uri}/{key}: not a results file of ours; move it away") from error


def _read_stored(store: Store, key: str, columns: list[str] | None = None) -> _Stored:
    file, run_id = _open_parquet(store, key)
    return _Stored(key, run_id, file.read(columns))


def _read_all(store: Store, keys: Sequence[str], columns: list[str] | None = None) -> Iterator[_Stored]:
    """Read objects in the order of `keys`, a few at once, never more than those in memory."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(keys), READ_THREADS):
            yield from pool.map(lambda key: _read_stored(store, key, columns), keys[start : start + READ_THREADS])


def _list_keys(store: Store, prefix: str) -> list[str]:
    """Keys of finished Parquet objects; none if the store's folder does not exist yet."""
    try:
        return [item.key for item in store.list_objects(prefix) if item.key.endswith(".parquet")]
    except FolderMissing:
        return []


def _list_commits(store: Store) -> list[str]:
    keys = [key for key in _list_keys(store, PREDICTIONS) if COMMIT_KEY.fullmatch(key)]
    return sorted(keys, key=lambda key: (len(key), key))


def find_last_commit(store: Store) -> int:
    """The highest number of the table; 0 if it has no object yet."""
    commits = _list_commits(store)
    found = COMMIT_KEY.fullmatch(commits[-1]) if commits else None
    return int(found[1]) if found else 0


def _commit_key(number: int) -> str:
    return f"{PREDICTIONS}c{number:08d}.parquet"


# A run's work in progress


class Reason(StrEnum):
    """Why a source is scored tonight."""

    NEW = "new"
    CHANGED = "changed"
    RETRY = "retry"


@dataclass(frozen=True)
class PlannedSource:
    """A source to score, as it was listed."""

    source: Source
    reason: Reason


@dataclass(frozen=True)
class RunFolder:
    """Plan and parts of one run, below `_runs/<run_id>/` of the results; what a killed run leaves to its restart."""

    store: Store
    run_id: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id):
            raise UsageError(f"run id {self.run_id!r}: use up to 100 letters, digits, dots, dashes, underscores")

    def has_plan(self) -> bool:
        """Whether this run was begun before."""
        return self._plan_key in _list_keys(self.store, self._plan_key)

    def write_plan(self, planned: Iterable[PlannedSource]) -> None:
        """Fix what this run scores; a plan that is there already stays. `read_plan` tells which one holds."""
        sink = pa.BufferOutputStream()
        sources = iter(planned)
        with pq.ParquetWriter(
            sink, PLAN_SCHEMA.with_metadata(_describe_file(self.run_id)), compression="zstd"
        ) as writer:
            while batch := list(islice(sources, PLAN_BATCH_SOURCES)):
                writer.write_table(pa.Table.from_pylist([_plan_row(item) for item in batch], schema=PLAN_SCHEMA))
        try:
            self.store.put_if_absent(self._plan_key, sink.getvalue().to_pybytes())
        except PutUncertain:
            if not self.has_plan():
                raise

    def read_plan(self) -> Iterator[PlannedSource]:
        """The plan, one source at a time."""
        for batch in _open_parquet(self.store, self._plan_key)[0].iter_batches(PLAN_BATCH_SOURCES):
            for row in batch.to_pylist():
                yield _planned_source(row)

    def list_planned_sources(self) -> list[str]:
        """Keys of the planned sources."""
        rows = _read_stored(self.store, self._plan_key, ["source"]).rows
        return [unspell_key(text) for text in rows["source"].to_pylist()]

    def write_part(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stage all rows of some sources under the name that `name_part` gives them; again is harmless."""
        self.store.write_bytes(f"{self._parts}{name}.parquet", _to_parquet(make_table(rows), self.run_id))

    def read_parts(self) -> Any:
        """All staged rows. A source staged twice, by a worker that outlived its driver, counts once and whole."""
        seen: set[str] = set()
        tables = [SCHEMA.empty_table()]
        for part in _read_all(self.store, _list_keys(self.store, self._parts)):
            fresh = set(part.rows["source"].to_pylist()) - seen
            tables.append(part.rows.filter(pc.is_in(part.rows["source"], pa.array(sorted(fresh), pa.string()))))
            seen |= fresh
        return pa.concat_tables(tables)

    def list_staged_sources(self) -> set[str]:
        """Keys of the sources that need no scoring any more in this run."""
        staged: set[str] = set()
        for part in _read_all(self.store, _list_keys(self.store, self._parts), ["source"]):
            staged.update(unspell_key(text) for text in part.rows["source"].unique().to_pylist())
        return staged

    @property
    def _plan_key(self) -> str:
        return f"_runs/{self.run_id}/plan.parquet"

    @property
    def _parts(self) -> str:
        return f"_runs/{self.run_id}/parts/"


def name_part(sources: Iterable[str]) -> str:
    """Name of the part that holds these sources, the same in any order and on any machine."""
    return hashlib.sha256("\n".join(sorted(map(spell_key, sources))).encode()).hexdigest()[:32]


def _plan_row(planned: PlannedSource) -> dict[str, Any]:
    objects = [
        {
            "key": spell_key(item.key),
            "num_bytes": item.num_bytes,
            "version": item.version,
            "modified_s": item.modified_s,
        }
        for item in planned.source.objects
    ]
    source = planned.source
    return {
        "source": spell_key(source.key),
        "objects": objects,
        "input_sha256": source.input_sha256,
        "reason": planned.reason,
    }


def _planned_source(row: Mapping[str, Any]) -> PlannedSource:
    objects = tuple(StoredObject(**item | {"key": unspell_key(item["key"])}) for item in row["objects"])
    return PlannedSource(Source(unspell_key(row["source"]), objects), Reason(row["reason"]))


# What earlier nights settled

_KNOWN_COLUMNS = [*SCAN_KEY, *MODEL_KEY, "status", "night", "commit"]


@dataclass(frozen=True)
class ScoredKeys:
    """What the table says of sources under one model and preprocessing, as digests: millions of them fit.

    `done` and `retry` hold (source, input_sha256), `known` holds sources. `pending` has one row for each source,
    scan_id, input_sha256 and status of the sources to retry, with `num_nights`, on how many nights it was seen.
    """

    done: frozenset[bytes]
    retry: frozenset[bytes]
    known: frozenset[bytes]
    pending: Any

    def find_reason(self, source: Source) -> Reason | None:
        """Why to score this source tonight; None if every one of its scans has a final row."""
        key = spell_key(source.key)
        pair = _digest(key, source.input_sha256)
        if pair in self.done:
            return None
        if pair in self.retry:
            return Reason.RETRY
        return Reason.CHANGED if _digest(key) in self.known else Reason.NEW


def read_scored_keys(store: Store, model_sha256: str, preprocessing_version: str) -> ScoredKeys:
    """What is settled under this model and preprocessing, commit after commit.

    A source is done if its newest commit holds no ERR row: a commit tells of all its scans that were not final.
    """
    done: set[bytes] = set()
    known: set[bytes] = set()
    troubled = [SCHEMA.empty_table().select(_KNOWN_COLUMNS)]
    for stored in _read_all(store, _list_commits(store), _KNOWN_COLUMNS):
        rows = _select_model(stored.rows, model_sha256, preprocessing_version)
        errors = rows.filter(pc.starts_with(rows["status"], "ERR_"))
        is_troubled = pc.is_in(rows["source"], errors["source"])
        troubled.append(rows.filter(is_troubled))
        done.difference_update(_digest_sources(errors))
        done.update(_digest_sources(rows.filter(pc.invert(is_troubled))))
        known.update(_digest(key) for key in rows["source"].unique().to_pylist())
    pending = _select_pending(pa.concat_tables(troubled), done)
    return ScoredKeys(frozenset(done), frozenset(_digest_sources(pending)), frozenset(known), pending)


def _select_model(rows: Any, model_sha256: str, preprocessing_version: str) -> Any:
    is_model = pc.equal(rows["model_sha256"], model_sha256)
    return rows.filter(pc.and_(is_model, pc.equal(rows["preprocessing_version"], preprocessing_version)))


def _select_pending(rows: Any, done: set[bytes]) -> Any:
    pairs = zip(rows["source"].to_pylist(), rows["input_sha256"].to_pylist(), strict=True)
    open_rows = rows.filter(pa.array([_digest(*pair) not in done for pair in pairs], pa.bool_()))
    counted = open_rows.group_by([*SCAN_KEY, "status"]).aggregate([("night", "count_distinct")])
    return counted.select([*SCAN_KEY, "status", "night_count_distinct"]).rename_columns(
        [*SCAN_KEY, "status", "num_nights"]
    )


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def _digest_sources(rows: Any) -> Iterator[bytes]:
    pairs = rows.group_by(SOURCE_KEY).aggregate([])
    return map(_digest, pairs["source"].to_pylist(), pairs["input_sha256"].to_pylist())


# Publishing


def publish(store: Store, run_id: str, rows: Any, pause: Callable[[float], None] = time.sleep) -> int | None:
    """Make a run's rows the next object of the table; its number, or None if they hold nothing new.

    Rows that another run made final meanwhile are left out; the third night of the same ERR becomes BAD_GAVE_UP.
    A run that was published before, but never heard of it, gets its number and publishes nothing.

    Raises: RunError if the rows are not of this run, one model and one preprocessing; StorageError, CredentialsError.
    """
    if not rows.num_rows:
        return None
    for name, expected in (("run_id", run_id), *((name, rows[name][0].as_py()) for name in MODEL_KEY)):
        if rows[name].unique().to_pylist() != [expected]:
            raise RunError(f"publish: rows of more than one {name}, or not of {expected}")
    known = [SCHEMA.empty_table().select(_KNOWN_COLUMNS)]
    number = 1
    for stored in _read_all(store, _list_commits(store), _KNOWN_COLUMNS):
        if stored.run_id == run_id:
            return stored.commit
        known.append(_select_related(stored.rows, rows))
        number = stored.commit + 1
    while True:
        settled = _settle(rows, pa.concat_tables(known))
        if not settled.num_rows:
            return None
        key = _commit_key(number)
        if _claim(store, key, _to_parquet(_finish(settled, number), run_id), run_id, pause) == run_id:
            return number
        known.append(_select_related(_read_stored(store, key, _KNOWN_COLUMNS).rows, rows))
        number += 1


def _claim(store: Store, key: str, data: bytes, run_id: str, pause: Callable[[float], None]) -> str:
    """Put until somebody holds this key; the run that does.

    Reads the holder after a refusal too: a repeated request may have been refused because of its own first try.
    """
    for attempt in range(PUT_ATTEMPTS):
        try:
            if store.put_if_absent(key, data):
                return run_id
        except PutUncertain:
            pass
        try:
            return _open_parquet(store, key)[1]
        except ObjectMissing:
            pause(0.2 * 2**attempt)
    raise StorageError(f"{store.uri}/{key}: no clear answer to {PUT_ATTEMPTS} puts; start the same run again later")


def _select_related(past: Any, rows: Any) -> Any:
    """Of another commit, the rows that concern our sources under our model and preprocessing."""
    model_key = (rows[name][0].as_py() for name in MODEL_KEY)
    return _select_model(past.filter(pc.is_in(past["source"], rows["source"])), *model_key)


def _settle(rows: Any, known: Any) -> Any:
    """Our rows without what is final already, and with the last ERR of too many turned final."""
    if not known.num_rows:
        return rows
    mine = rows.select([*SCAN_KEY, "status", "night"]).to_pandas()
    past = known.to_pandas()
    is_settled = _is_among(mine, past[~_is_error(past)], SCAN_KEY) | _is_among(mine, _done_sources(past), SOURCE_KEY)
    kept = rows.filter(pa.array(~is_settled))
    return _give_up(kept, _count_nights(mine[~is_settled], past) >= GIVE_UP_NIGHTS)


def _is_error(frame: pd.DataFrame) -> "pd.Series[bool]":
    return frame["status"].str.startswith("ERR_")


def _is_among(frame: pd.DataFrame, others: pd.DataFrame, columns: list[str]) -> BoolArray:
    """Whether each row of a frame agrees in these columns with any row of the other."""
    return pd.MultiIndex.from_frame(frame[columns]).isin(pd.MultiIndex.from_frame(others[columns]))


def _done_sources(past: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sources whose newest commit holds no ERR."""
    is_newest = past["commit"] == past.groupby(SOURCE_KEY)["commit"].transform("max")
    return past[~_is_among(past, past[is_newest & _is_error(past)], SOURCE_KEY)]


def _count_nights(mine: pd.DataFrame, past: pd.DataFrame) -> Any:
    """For each of our rows, tonight included, on how many nights this scan ended in this ERR; 0 if it did not."""
    columns = [*SCAN_KEY, "status"]
    both = pd.concat([past, mine])[[*columns, "night"]]
    counts = both[_is_error(both)].groupby(columns)["night"].nunique().rename("num_nights").reset_index()
    return mine.merge(counts, how="left", on=columns)["num_nights"].fillna(0).to_numpy()


def _give_up(rows: Any, is_last: Any) -> Any:
    reasons = pc.binary_join_element_wise(rows["status"], rows["status_detail"], f", {GIVE_UP_NIGHTS} nights: ")
    for name, replacement in (("status_detail", reasons), ("status", Status.BAD_GAVE_UP.value)):
        column = pc.if_else(pa.array(is_last), replacement, rows[name])
        rows = rows.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return rows


def _finish(rows: Any, number: int) -> Any:
    """The rows as published: numbered, and in an order that does not depend on who finished first."""
    numbered = rows.set_column(
        SCHEMA.get_field_index("commit"), SCHEMA.field("commit"), pa.array(np.full(rows.num_rows, number))
    )
    return numbered.sort_by([("source", "ascending"), ("scan_id", "ascending")])


# Reading


def read_predictions(uri: str, latest: bool = True) -> pd.DataFrame:
    """The results table as a frame: one row for each (source, scan_id) as last scored, or every row ever published.

    Latest means, for each source, the bytes, model and preprocessing of its newest commit: of these the final rows,
    and the ERR rows of that commit only, since the source was tried again as a whole. In DuckDB:

        WITH rows AS (FROM read_parquet('RESULTS/predictions/*.parquet')),
        newest AS (
            SELECT source, max(commit) AS newest_commit, arg_max(input_sha256, commit) AS input_sha256,
                   arg_max(model_sha256, commit) AS model_sha256,
                   arg_max(preprocessing_version, commit) AS preprocessing_version
            FROM rows GROUP BY source)
        SELECT rows.* FROM rows JOIN newest USING (source, input_sha256, model_sha256, preprocessing_version)
        WHERE NOT starts_with(status, 'ERR_') OR commit = newest_commit
        QUALIFY row_number() OVER (PARTITION BY source, scan_id ORDER BY commit DESC) = 1
        ORDER BY source, scan_id

    Raises: StorageError, CredentialsError; a table without any object is an empty frame.
    """
    store = open_store(uri)
    tables = [stored.rows for stored in _read_all(store, _list_commits(store))]
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    if latest:
        table = table.take(pa.array(_find_latest(table)))
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _find_latest(table: Any) -> Any:
    """Indices of the latest rows, ordered by source and scan."""
    keys = table.select(_KNOWN_COLUMNS).to_pandas()
    is_newest = keys["commit"] == keys.groupby("source")["commit"].transform("max")
    is_current = _is_among(keys, keys[is_newest], [*SOURCE_KEY, *MODEL_KEY])
    valid = keys[is_current & (is_newest | ~_is_error(keys))]
    ordered = valid.sort_values(["source", "scan_id", "commit"])
    return ordered.drop_duplicates(["source", "scan_id"], keep="last").index.to_numpy()


# The gate before publishing


def check_rows(planned_sources: Iterable[str], table: Any) -> None:
    """Demand of a run's rows that nothing was lost, doubled or made up.

    Raises: RunError naming a source that is without rows, not planned, has a scan twice, an unknown status,
        probabilities that are none, or another model than the rest.
    """
    planned = {spell_key(key) for key in planned_sources}
    frame = table.select(["source", "scan_id", "status", "model_sha256", "prediction", *PROBABILITIES]).to_pandas()
    found = set(frame["source"])
    _demand_none("planned, but has no row", planned - found)
    _demand_none("has rows, but was not planned", found - planned)
    _demand_none("has a scan twice", frame.loc[frame.duplicated(["source", "scan_id"]), "source"])
    _demand_none("has an unknown status", frame.loc[~frame["status"].isin(list(Status)), "source"])
    _demand_none(
        "has another model than the first row", frame.loc[pd.factorize(frame["model_sha256"])[0] > 0, "source"]
    )
    _check_probabilities(frame)


def _check_probabilities(frame: pd.DataFrame) -> None:
    is_ok = frame["status"] == Status.OK.value
    scored, others = frame[is_ok], frame[~is_ok]
    given = others[[*PROBABILITIES, "prediction"]].notna().any(axis=1)
    _demand_none("has a probability or a prediction without being OK", others.loc[given, "source"])
    probability = scored[PROBABILITIES].to_numpy(dtype=np.float64)
    is_sound = np.isfinite(probability).all(axis=1) & (probability >= 0).all(axis=1)
    is_sound &= np.abs(probability.sum(axis=1) - 1) <= PROBABILITY_TOLERANCE
    _demand_none("is OK, but its probabilities do not sum to 1", scored.loc[~is_sound, "source"])
    labels = np.array(DIAGNOSES)[:, None] == scored["prediction"].to_numpy()
    is_highest = (labels.T & (probability == probability.max(axis=1, initial=0, keepdims=True))).any(axis=1)
    _demand_none("predicts another class than its highest probability", scored.loc[~is_highest, "source"])


def _demand_none(complaint: str, sources: Iterable[str]) -> None:
    if offending := sorted(set(sources)):
        more = f" (and {len(offending) - 1} more)" if len(offending) > 1 else ""
        raise RunError(f"results rows are wrong: source {offending[0]!r} {complaint}{more}; nothing is published")
