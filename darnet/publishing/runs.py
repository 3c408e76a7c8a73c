"""A run of scoring: its parameters, its plan and what is scored so far, kept so that a killed run can go on.

All of it lies below `_runs/<run_id>/` of the results.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from darnet.archive import batch_by
from darnet.config import digest_json
from darnet.errors import FolderMissing, ObjectMissing, PutUncertain, RunError, UsageError
from darnet.publishing.objects import (
    NOTICE,
    Listing,
    demand_origin,
    demand_whole,
    describe_file,
    digest_object,
    list_commit_objects,
    list_parquet_keys,
    read_objects,
    stream_objects,
    suggest_discard,
    take_rows,
    to_parquet,
)
from darnet.publishing.origin import Origin
from darnet.publishing.rows import PLAN_SCHEMA, Reason, make_table, spell_key, unspell_key
from darnet.publishing.staged import StagedRows
from darnet.scan import Source, StoredObject
from darnet.storage import Store

RUNS = "_runs/"
RECORD, PLAN, HELD, ENDED = "run.json", "plan.parquet", "HELD.json", "ENDED.json"
DISCARDED = "DISCARDED.json"
PLAN_BATCH_OBJECTS = 20_000  # Source: ours; about 10 MB of a plan in memory


@dataclass(frozen=True)
class PlannedSource:
    """A source to score, as it was listed."""

    source: Source
    reason: Reason


@dataclass(frozen=True)
class Work:
    """What a run shares with the one that may finish it: origin, model, and the digest of the settings of scoring.

    `device` ("cpu" or "gpu") is what its networks run on, "" where that is not known yet: last digits depend on it.
    """

    origin: Origin
    model_sha256: str
    preprocessing_version: str
    settings_sha256: str
    device: str = ""


@dataclass(frozen=True)
class RunRecord:
    """The parameters of a run, kept as `run.json`. The times of listing are not part of what it is.

    `attempt` counts the runs of these parameters that ended before and left the table as it was: they tried in vain, or
    were discarded.
    """

    night: date
    work: Work
    selection: Mapping[str, Any]
    plan_sha256: str
    listing: Listing
    attempt: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """What makes it this run, as JSON can hold it."""
        work = asdict(self.work)
        if not self.work.device:
            del work["device"]
        return {
            "night": self.night.isoformat(),
            **work,
            "selection": dict(self.selection),
            "plan_sha256": self.plan_sha256,
            "last_commit": self.listing.last_commit,
            **({"attempt": self.attempt} if self.attempt else {}),
        }

    @property
    def run_id(self) -> str:
        """A name that the same work gets again after a kill, and other work does not.

        The table's last number and `attempt` are part of it, so that trying again what failed is another run.
        """
        return f"{self.night:%Y%m%d}-{digest_json(self.parameters)[:16]}"

    def to_json(self) -> bytes:
        """The whole record as a file."""
        times = {"listed_from": self.listing.started_at.isoformat(), "listed_until": self.listing.ended_at.isoformat()}
        return (json.dumps({**self.parameters, **times, "notice": NOTICE}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises: ValueError, KeyError, TypeError for what `to_json` did not write."""
        told = json.loads(data)
        times = (datetime.fromisoformat(told[name]) for name in ("listed_from", "listed_until"))
        origin = Origin(**told["origin"])
        model_sha256, preprocessing_version = told["model_sha256"], told["preprocessing_version"]
        work = Work(origin, model_sha256, preprocessing_version, told["settings_sha256"], told.get("device", ""))
        listing = Listing(told["last_commit"], *times)
        night = date.fromisoformat(told["night"])
        return cls(night, work, told["selection"], told["plan_sha256"], listing, told.get("attempt", 0))


def write_plan(planned: Iterable[PlannedSource], path: Path, make_record: Callable[[str], RunRecord]) -> RunRecord:
    """Write a plan to a local file as it comes; the record of its run, made of the plan's digest when it is whole."""
    digest = hashlib.sha256()
    with pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for batch in batch_by(planned, lambda item: len(item.source.objects), PLAN_BATCH_OBJECTS):
            rows = [_plan_row(item) for item in batch]
            digest.update("".join(_spell_line(row["source"], row["input_sha256"]) for row in rows).encode())
            writer.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
        record = make_record(digest.hexdigest())
        writer.add_key_value_metadata(describe_file(record.run_id))
    return record


def _spell_line(key: str, input_sha256: str) -> str:
    """What the digest of a plan takes of a source."""
    return f"{key}\0{input_sha256}\n"


@dataclass(frozen=True)
class RunFolder:
    """Record, plan and parts of one run, below `_runs/<run_id>/` of the results; what a killed run leaves."""

    store: Store
    run_id: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id):
            raise UsageError(f"run id {self.run_id!r}: use up to 100 letters, digits, dots, dashes, underscores")

    def begin(self, record: RunRecord, plan: Path) -> None:
        """Fix what this run is and what it scores, in this order; a plan that is there already stays.

        Raises: UsageError if a run of this name and other parameters is there.
        """
        if not self._put(self.locate(RECORD), record.to_json()):
            found = self.read_record().parameters
            if wrong := sorted(name for name, value in record.parameters.items() if found.get(name) != value):
                raise UsageError(
                    f"{self.store.uri}/{self.locate(RECORD)}: another run of this name is here, with another "
                    f"{', '.join(wrong)}; move the folder away, or score for another --night"
                )
        self._put(self._plan_key, plan)

    def _put(self, key: str, data: bytes | Path) -> bool:
        """Whether this call, and nobody before, made this object. Twice after a lost answer: it may say no wrongly."""
        try:
            return self.store.put_if_absent(key, data)
        except PutUncertain:
            return self.store.put_if_absent(key, data)

    def read_record(self) -> RunRecord:
        """The run's parameters.

        Raises: UsageError if they cannot be read.
        """
        key = self.locate(RECORD)
        try:
            return RunRecord.from_json(self.store.read_bytes(key))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.store.uri}/{key}: damaged ({error}); move its folder away, and its sources are planned anew"
            ) from error

    def list_planned_sources(self) -> list[str]:
        """Keys of the planned sources, in the plan's order.

        Raises: UsageError if the plan is not the one of the run's record.
        """
        digest, keys = hashlib.sha256(), []
        for piece in stream_objects(self.store, [self._find_plan()], ["source", "input_sha256"]):
            columns = [piece.rows[name].to_pylist() for name in ("source", "input_sha256")]
            digest.update("".join(map(_spell_line, *columns)).encode())
            keys += [unspell_key(text) for text in columns[0]]
        if digest.hexdigest() != self.read_record().plan_sha256:
            raise UsageError(
                f"{self.store.uri}/{self._plan_key}: not the plan this run was begun with; "
                f"{suggest_discard(self.store, self.run_id)}"
            )
        return keys

    def read_sources(self, places: Sequence[int]) -> list[Source]:
        """Some of the planned sources, as they were listed, by their places in the plan; holds no others.

        Raises: ObjectMissing if the plan is gone, or not to be seen from this machine; StorageError.
        """
        return [_read_source(row) for row in take_rows(self.store, self._find_plan(), places).to_pylist()]

    def _find_plan(self) -> StoredObject:
        with suppress(FolderMissing):
            for item in self.store.list_objects(self._plan_key):
                if item.key == self._plan_key:
                    return item
        raise ObjectMissing(
            f"{self.store.uri}/{self._plan_key}: no such object; every node must see the place of the results"
        )

    def write_part(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stage all rows of some sources under the name that `name_part` gives them; again is harmless.

        Its key ends in its digest, so that bytes that changed meanwhile are not published.
        """
        data = to_parquet(make_table(rows), self.run_id)
        self.store.write_bytes(f"{self._parts}{name}-{digest_object(data)}.parquet", data)

    def read_parts(self) -> StagedRows:
        """All rows staged so far."""
        keys = list_parquet_keys(self.store, self._parts)
        return StagedRows(lambda columns: (part.rows for part in read_objects(self.store, keys, columns)))

    def list_staged_sources(self) -> set[str]:
        """Keys of the sources that need no scoring any more in this run."""
        staged: set[str] = set()
        for part in read_objects(self.store, list_parquet_keys(self.store, self._parts), ["source"]):
            staged.update(unspell_key(text) for text in part.rows["source"].unique().to_pylist())
        return staged

    @property
    def is_over(self) -> bool:
        """Whether the run was brought to an end, or discarded: its name is taken for good.

        A driver of it may live on and stage what it scores; a run of the same work must not find that.
        """
        return self._has(ENDED) or self._has(DISCARDED)

    def _has(self, name: str) -> bool:
        key = self.locate(name)
        with suppress(FolderMissing):
            return any(item.key == key for item in self.store.list_objects(key))
        return False

    def write_end(self, published: int | None) -> None:
        """Note that the run is over, and under which number it is in the table, if it is: nobody need go on from it."""
        self.store.write_bytes(self.locate(ENDED), json.dumps({"published": published, "notice": NOTICE}).encode())

    def refuse_if_discarded(self) -> None:
        """Raises: RunError if a person has decided meanwhile that nothing of this run counts."""
        key = self.locate(DISCARDED)
        with suppress(ObjectMissing):
            self.store.read_bytes(key)
            raise RunError(
                f"{self.store.uri}/{key}: the run was discarded while it was being scored (the reason stands there), "
                "and nothing of it is published; start the job again, which plans its sources anew"
            )

    def read_last_number(self) -> int:
        """The highest number of the table that this run knew of: it was there when the run planned, or is its own.

        Raises: UsageError if what the run left cannot be read.
        """
        key, published = self.locate(ENDED), 0
        try:
            published = int(json.loads(self.store.read_bytes(key))["published"] or 0)
        except ObjectMissing:  # not ended, or killed before it could say so
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.store.uri}/{key}: damaged ({error}); move its folder away") from error
        return max(published, self.read_record().listing.last_commit)

    def delete_work(self) -> int:
        """Remove parts and plan, all that a restart would go on from; the number of objects."""
        keys = list_parquet_keys(self.store, self.locate(""))  # "parts/" before "plan": killed, it can be found again
        for key in keys:
            self.store.delete(key)
        return len(keys)

    def locate(self, name: str) -> str:
        """Key of another object of this run."""
        return f"{RUNS}{self.run_id}/{name}"

    @property
    def _plan_key(self) -> str:
        return self.locate(PLAN)

    @property
    def _parts(self) -> str:
        return self.locate("parts/")


def list_run_files(store: Store) -> dict[str, set[str]]:
    """Of each run that left anything, the names of its objects; `parts/...` are left out."""
    found: dict[str, set[str]] = {}
    try:
        for item in store.list_objects(RUNS):
            run_id, _, name = item.key.removeprefix(RUNS).partition("/")
            if name and "/" not in name:
                found.setdefault(run_id, set()).add(name)
    except FolderMissing:
        pass
    return found


def list_open_runs(store: Store) -> list[RunFolder]:
    """Runs of whatever work that were begun, and of which nothing in their folders says that they are over."""
    over = {HELD, ENDED, DISCARDED}
    files = sorted(list_run_files(store).items())
    return [RunFolder(store, run_id) for run_id, names in files if {RECORD, PLAN} <= names and not over & names]


def find_unfinished(store: Store, work: Work) -> list[RunFolder]:
    """Runs of this work, on any device if that is not known yet, that were begun and not brought to an end, the oldest
    first.

    Raises: UsageError if the record of one is of another run, or if the table takes no rows of this work's origin.
    """
    return sort_unfinished(store, work)[0]


def sort_unfinished(store: Store, work: Work) -> tuple[list[RunFolder], dict[str, str]]:
    """As `find_unfinished`, and beside these the runs of other work by their ids, with what they have otherwise.

    Those are nobody's to finish but who began them.
    Raises: as `find_unfinished`.
    """
    begun = [(folder, folder.read_record()) for folder in list_open_runs(store)]
    if not begun:
        return [], {}
    differences = {folder.run_id: _spell_difference(record.work, work) for folder, record in begun}
    ours = [(folder, record) for folder, record in begun if not differences[folder.run_id]]
    table = stream_objects(store, list_commit_objects(store), [])
    published = {stored.run_id: stored.key for stored in (demand_origin(table, work.origin) if ours else table)}
    others = {run_id: told for run_id, told in differences.items() if told and run_id not in published}
    for folder, record in ours:
        if record.run_id != folder.run_id:
            raise UsageError(
                f"{store.uri}/{folder.locate(RECORD)}: says what run {record.run_id} would say; somebody changed it. "
                f"Move {RUNS}{folder.run_id} away, and its sources are planned anew"
            )
        if folder.run_id in published:  # and its driver ended before it could say so
            demand_whole(store, published[folder.run_id])
    ours.sort(key=lambda item: item[1].listing.started_at)
    return [folder for folder, _ in ours if folder.run_id not in published], others


def _spell_difference(theirs: Work, ours: Work) -> str:
    """What another run's work has otherwise, "" if nothing; a device that is not known yet is none of it."""
    ours = replace(ours, device=ours.device or theirs.device)
    words = {
        "origin": "another archive, secret or way of names",
        "model_sha256": "another model",
        "preprocessing_version": "another preprocessing",
        "settings_sha256": "other settings (score.*)",
        "device": f"another device ({theirs.device or 'unknown'})",
    }
    return ", ".join(told for name, told in words.items() if getattr(theirs, name) != getattr(ours, name))


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


def _read_source(row: Mapping[str, Any]) -> Source:
    """What `_plan_row` wrote of a source."""
    objects = tuple(StoredObject(**item | {"key": unspell_key(item["key"])}) for item in row["objects"])
    return Source(unspell_key(row["source"]), objects)
