"""Parquet objects of a results store: tables go in with the run that made them, and come back so.

Also the numbering of the table's commits.
"""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from darnet import RESEARCH_USE
from darnet.errors import FolderMissing, StorageError, UsageError
from darnet.publishing.origin import Origin
from darnet.publishing.rows import PLAN_SCHEMA, SCHEMA, Rows
from darnet.scan import StoredObject
from darnet.storage import Store

SCHEMA_VERSION = "1"
LISTED_UNTIL = "listed_until"
NOTICE = RESEARCH_USE.lower()  # as every object of a table has had it
ROW_GROUP_ROWS = 16_384  # Source: ours; about 8 MB of rows: a writer holds as many, a reader of few columns skips well
WHOLE_BYTES = 1 << 20  # Source: ours; up to here one request for all is quicker than several for a few columns
HELD_BYTES = 2 << 20  # Source: ours; of small objects ahead of who reads them, at most one object more
PIECE_ROWS = 8_192  # Source: ours; a few MB of key columns and of what Python makes of them
READ_THREADS = 8  # Source: ours; half of the store's connections

PREDICTIONS = "predictions/"
COMMIT_KEY = re.compile(r"predictions/c(\d{8,})\.parquet")
PLAN_KEY = re.compile(r"_runs/([^/]+)/plan\.parquet")
MADE_AGAIN = "delete it, and what is in it is made again"
DIGEST_CHARACTERS = 32
DIGESTED_KEY = re.compile(rf".+-([0-9a-f]{{{DIGEST_CHARACTERS}}})\.parquet")


@dataclass(frozen=True)
class Listing:
    """When a run listed the archive, by the results store's clock, and the last number of the table it knew by then."""

    last_commit: int
    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True)
class Stored:
    """A Parquet object read back, or some of its rows: whose it is, and the asked-for columns.

    `listed_until` is when its run ended listing the archive, `origin` what that run says of its own; None if it does
    not say.
    """

    key: str
    run_id: str
    listed_until: datetime | None
    origin: Origin | None
    rows: Rows

    @property
    def commit(self) -> int:
        """The number of the table's object that this is."""
        return read_commit_number(self.key)


def to_parquet(table: Any, run_id: str) -> bytes:
    """A small table as a whole object of this run."""
    sink = pa.BufferOutputStream()
    with open_writer(sink, table.schema, describe_file(run_id)) as writer:
        writer.write_table(table, ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def open_writer(sink: Any, schema: Any, description: Mapping[str, str]) -> Any:
    """A Parquet writer of an object of ours. Each page has a checksum, which every reader of ours looks at."""
    return pq.ParquetWriter(sink, schema.with_metadata(description), compression="zstd", write_page_checksum=True)


def describe_commit(run_id: str, listed_until: datetime, origin: Origin, facts: Mapping[str, str]) -> dict[str, str]:
    """What an object of the table says of its run in its metadata; `facts` are for people, and no program's."""
    return {**facts, **describe_file(run_id), LISTED_UNTIL: listed_until.isoformat(), **origin.to_metadata()}


def describe_file(run_id: str) -> dict[str, str]:
    """What every object of ours says of itself in its metadata."""
    return {"run_id": run_id, "schema_version": SCHEMA_VERSION, "notice": NOTICE}


def open_parquet(store: Store, key: str) -> tuple[Any, str]:
    """An object of ours as a ParquetFile, and the run that wrote it.

    Raises: ObjectMissing; StorageError if something else lies there, or other bytes than its key has the digest of.
    """
    data = store.read_bytes(key)
    named = DIGESTED_KEY.fullmatch(key)
    if named is not None and digest_object(data) != named[1]:
        raise StorageError(f"{store.uri}/{key}: damaged; {MADE_AGAIN}")
    return _parse_parquet(store, key, pa.BufferReader(data))


def digest_object(data: bytes) -> str:
    """What an object's key may end in. Page checksums leave the footer out, which says what the pages mean."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARACTERS]


def parse_stored(store: Store, key: str, data: bytes, columns: list[str] | None = None) -> Stored:
    """An object whose bytes are here already, or some of its columns.

    Raises: StorageError if it is none of ours, or damaged.
    """
    file, run_id = _parse_parquet(store, key, pa.BufferReader(data))
    with explain_damage(store, key):
        return _describe(file, key, run_id, file.read(columns))


@contextmanager
def explain_damage(store: Store, key: str) -> Iterator[None]:
    """Turn what a Parquet reader says of damaged pages into a StorageError that names the object."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise StorageError(f"{store.uri}/{key}: damaged ({error}); {suggest_remedy(store, key)}") from error


def suggest_remedy(store: Store, key: str) -> str:
    """What to do about an object that cannot be read as what it is. A store may have answered with other bytes once."""
    if planned := PLAN_KEY.fullmatch(key):
        return f"try again, and if it stays so, {suggest_discard(store, planned[1])}"
    if DIGESTED_KEY.fullmatch(key):
        return MADE_AGAIN
    return "try again, and if it stays so, restore it from a copy" if COMMIT_KEY.fullmatch(key) else "move it away"


def suggest_discard(store: Store, run_id: str) -> str:
    """How to go on without a run whose plan is no use any more."""
    call = f"python -m jobs.score --results {store.uri} --discard {run_id} --reason WHY"
    return f"say {call}, and its sources are planned anew"


def _describe(file: Any, key: str, run_id: str, rows: Rows) -> Stored:
    metadata = file.metadata.metadata
    told = metadata.get(LISTED_UNTIL.encode())
    listed_until = None if told is None else datetime.fromisoformat(told.decode())
    return Stored(key, run_id, listed_until, Origin.from_metadata(metadata), rows)


def _parse_parquet(store: Store, key: str, source: Any) -> tuple[Any, str]:
    try:
        file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        metadata = file.metadata.metadata or {}
        if metadata[b"schema_version"].decode() != SCHEMA_VERSION:
            raise UsageError(
                f"{store.uri}/{key}: schema version is not {SCHEMA_VERSION}; use the program that wrote it"
            )
        if not any(file.schema_arrow.equals(schema) for schema in (SCHEMA, PLAN_SCHEMA)):
            raise ValueError("other columns than ours")
        return file, metadata[b"run_id"].decode()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        remedy = suggest_remedy(store, key)
        raise StorageError(f"{store.uri}/{key}: cannot be read as a results file of ours; {remedy}") from error


def read_stored(store: Store, key: str, columns: list[str] | None = None) -> Stored:
    """Read one object, or some of its columns.

    Raises: ObjectMissing; StorageError if something else lies there.
    """
    file, run_id = open_parquet(store, key)
    with explain_damage(store, key):
        return _describe(file, key, run_id, file.read(columns))


def read_objects(store: Store, keys: Sequence[str], columns: list[str] | None = None) -> Iterator[Stored]:
    """Read objects in the order of `keys`, a few at once, never more than those in memory."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(keys), READ_THREADS):
            yield from pool.map(lambda key: read_stored(store, key, columns), keys[start : start + READ_THREADS])


def stream_objects(store: Store, items: Sequence[StoredObject], columns: list[str]) -> Iterator[Stored]:
    """Read some columns of objects in their order, a large object in several pieces and nothing else of it.

    Small ones are read ahead while those before them are looked at.
    Raises: StorageError, as `read_stored`.
    """
    rest = deque(items)
    ahead = deque[tuple[StoredObject, Future[Stored] | None]]()
    held_bytes = 0
    with ThreadPoolExecutor(READ_THREADS) as pool:
        while rest or ahead:
            while rest and len(ahead) < READ_THREADS and held_bytes < HELD_BYTES:
                item = rest.popleft()
                is_small = item.num_bytes <= WHOLE_BYTES
                ahead.append((item, pool.submit(read_stored, store, item.key, columns) if is_small else None))
                held_bytes += item.num_bytes if is_small else 0
            item, small = ahead.popleft()
            if small is None:
                yield from _stream_object(store, item, columns)
            else:
                yield small.result()
                held_bytes -= item.num_bytes


def _stream_object(store: Store, item: StoredObject, columns: list[str]) -> Iterator[Stored]:
    with store.open_range_reader(item) as reader:
        file, run_id = _parse_parquet(store, item.key, reader)
        for group in range(file.num_row_groups):  # one at a time: all of them at once would fetch ahead
            batches = file.iter_batches(PIECE_ROWS, [group], columns)
            while (rows := _read_batch(store, item.key, batches)) is not None:
                with explain_damage(store, item.key):
                    piece = _describe(file, item.key, run_id, rows)
                yield piece


def demand_whole(store: Store, key: str) -> None:
    """Read an object of the table to its end, page by page; a key without an object is none of its business.

    A driver that finds its own run in the table may have put it damaged: what it takes for done must be readable.
    Raises: StorageError, as `read_stored`.
    """
    items = [item for item in list_commit_objects(store) if item.key == key]
    for _ in stream_objects(store, items, SCHEMA.names):
        pass


def demand_origin(table: Iterable[Stored], origin: Origin) -> Iterator[Stored]:
    """Pass the table's objects on in their order, as long as a run of this origin may add to them.

    Raises: UsageError as `Origin.refuse_object` and, at the end, `Origin.refuse_archive`.
    """
    newest = None
    for stored in table:
        is_read = "source" in stored.rows.column_names
        origin.refuse_object(stored.origin, stored.rows["source"][:1].to_pylist() if is_read else ())
        newest = stored.origin
        yield stored
    origin.refuse_archive(newest)


def take_rows(store: Store, item: StoredObject, places: Sequence[int]) -> Rows:
    """Rows of an object by their places in it, in the object's order; of the others, no more than lie in their groups.

    Raises: ObjectMissing; StorageError, as `read_stored`.
    """
    wanted = np.sort(np.asarray(places, np.int64))
    with store.open_range_reader(item) as reader:
        file, _ = _parse_parquet(store, item.key, reader)
        num_rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(num_rows)
        groups = np.searchsorted(ends, wanted, side="right")
        with explain_damage(store, item.key):
            return pa.concat_tables(
                file.read_row_group(group).take(wanted[groups == group] - (ends[group] - num_rows[group]))
                for group in np.unique(groups).tolist()
            )


def _read_batch(store: Store, key: str, batches: Iterator[Any]) -> Rows | None:
    """The next batch as a table; None when there is none."""
    with explain_damage(store, key):
        batch = next(batches, None)
        return None if batch is None else pa.Table.from_batches([batch])


def list_parquet_keys(store: Store, prefix: str) -> list[str]:
    """Keys of finished Parquet objects; none if the store's folder does not exist yet."""
    try:
        return [item.key for item in store.list_objects(prefix) if item.key.endswith(".parquet")]
    except FolderMissing:
        return []


def list_commits(store: Store) -> list[str]:
    """Keys of the table's objects, by their numbers."""
    return [item.key for item in list_commit_objects(store)]


def list_commit_objects(store: Store) -> list[StoredObject]:
    """The table's objects, by their numbers."""
    try:
        found = [item for item in store.list_objects(PREDICTIONS) if COMMIT_KEY.fullmatch(item.key)]
    except FolderMissing:
        return []
    return sorted(found, key=lambda item: (len(item.key), item.key))


def read_commit_number(key: str) -> int:
    """The number in the key of one of the table's objects."""
    found = COMMIT_KEY.fullmatch(key)
    assert found is not None
    return int(found[1])


def make_commit_key(number: int) -> str:
    """Key of the table's object of this number."""
    return f"{PREDICTIONS}c{number:08d}.parquet"
