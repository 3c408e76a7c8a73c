"""A run of scoring: what earlier nights settled goes in; what to score, and what is scored so far, come out.

Plan and parts lie below `_runs/<run_id>/` of the results, so that a killed run can go on.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from darnet.errors import PutUncertain, UsageError
from darnet.publishing.objects import (
    describe_file,
    list_commits,
    list_parquet_keys,
    open_parquet,
    read_objects,
    read_stored,
    to_parquet,
)
from darnet.publishing.rows import (
    KEY_COLUMNS,
    PLAN_SCHEMA,
    SCAN_KEY,
    SCHEMA,
    SOURCE_KEY,
    make_table,
    select_model,
    spell_key,
    unspell_key,
)
from darnet.scan import Source, StoredObject
from darnet.storage import Store

RUNS = "_runs/"
PLAN_BATCH_SOURCES = 1_000  # Source: ours; a source has some hundred objects


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


# What earlier nights settled


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
    troubled = [SCHEMA.empty_table().select(KEY_COLUMNS)]
    for stored in read_objects(store, list_commits(store), KEY_COLUMNS):
        rows = select_model(stored.rows, model_sha256, preprocessing_version)
        errors = rows.filter(pc.starts_with(rows["status"], "ERR_"))
        is_troubled = pc.is_in(rows["source"], errors["source"])
        troubled.append(rows.filter(is_troubled))
        done.difference_update(_digest_sources(errors))
        done.update(_digest_sources(rows.filter(pc.invert(is_troubled))))
        known.update(_digest(key) for key in rows["source"].unique().to_pylist())
    pending = _select_pending(pa.concat_tables(troubled), done)
    return ScoredKeys(frozenset(done), frozenset(_digest_sources(pending)), frozenset(known), pending)


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


# Work in progress


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
        return self._plan_key in list_parquet_keys(self.store, self._plan_key)

    def write_plan(self, planned: Iterable[PlannedSource]) -> None:
        """Fix what this run scores; a plan that is there already stays. `read_plan` tells which one holds."""
        sink = pa.BufferOutputStream()
        sources = iter(planned)
        with pq.ParquetWriter(
            sink, PLAN_SCHEMA.with_metadata(describe_file(self.run_id)), compression="zstd"
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
        for batch in open_parquet(self.store, self._plan_key)[0].iter_batches(PLAN_BATCH_SOURCES):
            for row in batch.to_pylist():
                yield _planned_source(row)

    def list_planned_sources(self) -> list[str]:
        """Keys of the planned sources."""
        rows = read_stored(self.store, self._plan_key, ["source"]).rows
        return [unspell_key(text) for text in rows["source"].to_pylist()]

    def write_part(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stage all rows of some sources under the name that `name_part` gives them; again is harmless."""
        self.store.write_bytes(f"{self._parts}{name}.parquet", to_parquet(make_table(rows), self.run_id))

    def read_parts(self) -> Any:
        """All staged rows. A source staged twice, by a worker that outlived its driver, counts once and whole."""
        seen: set[str] = set()
        tables = [SCHEMA.empty_table()]
        for part in read_objects(self.store, list_parquet_keys(self.store, self._parts)):
            fresh = set(part.rows["source"].to_pylist()) - seen
            tables.append(part.rows.filter(pc.is_in(part.rows["source"], pa.array(sorted(fresh), pa.string()))))
            seen |= fresh
        return pa.concat_tables(tables)

    def list_staged_sources(self) -> set[str]:
        """Keys of the sources that need no scoring any more in this run."""
        staged: set[str] = set()
        for part in read_objects(self.store, list_parquet_keys(self.store, self._parts), ["source"]):
            staged.update(unspell_key(text) for text in part.rows["source"].unique().to_pylist())
        return staged

    def delete_work(self) -> int:
        """Remove plan and parts, all that a restart would go on from; the number of objects."""
        keys = list_parquet_keys(self.store, self.locate(""))
        for key in keys:
            self.store.delete(key)
        return len(keys)

    def locate(self, name: str) -> str:
        """Key of another object of this run."""
        return f"{RUNS}{self.run_id}/{name}"

    @property
    def _plan_key(self) -> str:
        return self.locate("plan.parquet")

    @property
    def _parts(self) -> str:
        return self.locate("parts/")


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
