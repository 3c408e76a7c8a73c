"""Parquet objects of a results store: tables go in with the run that made them, and come back so.

Also the numbering of the table's commits.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from darnet.errors import FolderMissing, StorageError, UsageError
from darnet.storage import Store

SCHEMA_VERSION = "1"
NOTICE = "research use only"
ROW_GROUP_ROWS = 65_536  # Source: ours; about 30 MB of rows, so that a reader of few columns skips well
READ_THREADS = 8  # Source: ours; half of the store's connections

PREDICTIONS = "predictions/"
COMMIT_KEY = re.compile(r"predictions/c(\d{8,})\.parquet")


@dataclass(frozen=True)
class Stored:
    """A Parquet object read back: whose it is, and the asked-for columns."""

    key: str
    run_id: str
    rows: Any

    @property
    def commit(self) -> int:
        found = COMMIT_KEY.fullmatch(self.key)
        assert found is not None
        return int(found[1])


def to_parquet(table: Any, run_id: str) -> bytes:
    """A table as a whole object of this run."""
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata(describe_file(run_id))
    pq.write_table(described, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def describe_file(run_id: str) -> dict[str, str]:
    """What every object of ours says of itself in its metadata."""
    return {"run_id": run_id, "schema_version": SCHEMA_VERSION, "notice": NOTICE}


def open_parquet(store: Store, key: str) -> tuple[Any, str]:
    """An object of ours as a ParquetFile, and the run that wrote it.

    Raises: ObjectMissing; StorageError if something else lies there.
    """
    return _parse_parquet(store, key, store.read_bytes(key))


def parse_stored(store: Store, key: str, data: bytes, columns: list[str]) -> Stored:
    """Some columns of an object whose bytes are here already.

    Raises: StorageError if it is none of ours, or damaged.
    """
    file, run_id = _parse_parquet(store, key, data)
    try:
        return Stored(key, run_id, file.read(columns))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{store.uri}/{key}: damaged ({error}); restore it from a copy") from error


def _parse_parquet(store: Store, key: str, data: bytes) -> tuple[Any, str]:
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


def read_stored(store: Store, key: str, columns: list[str] | None = None) -> Stored:
    """Read one object, or some of its columns.

    Raises: ObjectMissing; StorageError if something else lies there.
    """
    file, run_id = open_parquet(store, key)
    return Stored(key, run_id, file.read(columns))


def read_objects(store: Store, keys: Sequence[str], columns: list[str] | None = None) -> Iterator[Stored]:
    """Read objects in the order of `keys`, a few at once, never more than those in memory."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(keys), READ_THREADS):
            yield from pool.map(lambda key: read_stored(store, key, columns), keys[start : start + READ_THREADS])


def list_parquet_keys(store: Store, prefix: str) -> list[str]:
    """Keys of finished Parquet objects; none if the store's folder does not exist yet."""
    try:
        return [item.key for item in store.list_objects(prefix) if item.key.endswith(".parquet")]
    except FolderMissing:
        return []


def list_commits(store: Store) -> list[str]:
    """Keys of the table's objects, by their numbers."""
    keys = [key for key in list_parquet_keys(store, PREDICTIONS) if COMMIT_KEY.fullmatch(key)]
    return sorted(keys, key=lambda key: (len(key), key))


def find_last_commit(store: Store) -> int:
    """The highest number of the table; 0 if it has no object yet."""
    commits = list_commits(store)
    found = COMMIT_KEY.fullmatch(commits[-1]) if commits else None
    return int(found[1]) if found else 0


def make_commit_key(number: int) -> str:
    """Key of the table's object of this number."""
    return f"{PREDICTIONS}c{number:08d}.parquet"
