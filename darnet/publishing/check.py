"""A results table looked after: its place goes in; what is wrong with it, room, or a copy for others comes out."""

import hashlib
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.errors import FolderMissing, RunError, StorageError, UsageError
from darnet.publishing.hold import list_held_runs
from darnet.publishing.objects import (
    NOTICE,
    Stored,
    list_commit_objects,
    list_commits,
    make_commit_key,
    parse_stored,
    read_commit_number,
    stream_objects,
)
from darnet.publishing.rows import KEY_COLUMNS, MODEL_KEY, SCAN_KEY, SCHEMA, Keys, Rows
from darnet.publishing.runs import DISCARDED, ENDED, RECORD, RUNS, RunFolder, list_run_files
from darnet.results import describe_schema, export_latest
from darnet.settings import ResultsSettings
from darnet.storage import Store, open_store, transfer_all

NUM_NAMED = 5  # Source: ours; faults told in full, of which one usually explains the rest
ROW = "row"  # a column of our own beside the keys


def run_verb(settings: ResultsSettings) -> dict[str, Any]:
    """Check, clean, copy or document a results table; returns the job's summary.

    Raises: UsageError if there is no table; RunError if the check finds it damaged; StorageError.
    """
    if settings.verb == "schema":
        _write_out(settings.out, describe_schema().encode())
        return {"columns": len(SCHEMA), "notice": NOTICE}
    store = open_store(settings.results)
    if not list_commits(store) and (settings.verb != "check" or not _recall_last_number(store)[0]):
        raise UsageError(f"{store.uri}: no results table here (predictions/c00000001.parquet); correct the address")
    if settings.verb == "check":
        return _report_check(store, settings.out)
    if settings.verb == "clean":
        return clean_runs(store, settings.keep_commits)
    assert settings.out is not None
    data, num_scans = export_latest(store, settings.out)
    _write_out(settings.out, data)
    return {"out": settings.out, "scans": num_scans, "notice": NOTICE}


def check_table(store: Store) -> tuple[dict[str, str], list[str]]:
    """Read the whole table: the SHA-256 of each object by its key, and all that is wrong.

    Raises: StorageError if the store itself cannot be read.
    """
    last_number, faults = _recall_last_number(store)  # before the table is listed: a run may be publishing
    keys = list_commits(store)
    faults += _find_gaps([read_commit_number(key) for key in keys], last_number)
    digests: dict[str, str] = {}
    final = [_number_rows(SCHEMA.empty_table())]
    for key in keys:
        data = store.read_bytes(key)
        digests[key] = hashlib.sha256(data).hexdigest()
        try:
            stored = _parse_whole(store, key, data)
        except RunError as error:
            faults.append(str(error))
            continue
        faults += _check_object(stored)
        final.append(_number_rows(stored.rows).filter(pc.invert(pc.starts_with(stored.rows["status"], "ERR_"))))
    return digests, faults + _find_doubles(pa.concat_tables(final))


def _recall_last_number(store: Store) -> tuple[int, list[str]]:
    """The highest number of the table that any run knew of, 0 if there is none, and which runs cannot say it.

    Nothing else tells that the newest object is lost.
    """
    numbers, faults = [0], []

    def recall(run_id: str) -> None:
        try:
            numbers.append(RunFolder(store, run_id).read_last_number())
        except UsageError as error:
            faults.append(str(error))

    transfer_all(recall, [run_id for run_id, names in list_run_files(store).items() if RECORD in names])
    return max(numbers), sorted(faults)


def _find_gaps(numbers: Sequence[int], last_number: int) -> list[str]:
    """Which objects are missing, given the numbers of those that are there, ascending, and the last there should be."""
    faults = []
    for before, after in pairwise([0, *numbers, max([last_number, *numbers]) + 1]):
        first, last = make_commit_key(before + 1), make_commit_key(after - 1)
        if after - before > 1:
            faults.append(f"{first} is missing" if first == last else f"{first} to {last} are missing")
    return faults


def _parse_whole(store: Store, key: str, data: bytes) -> Stored:
    """All of an object, so that a wrong byte in any column is found.

    Raises: StorageError if it is none of ours, or damaged.
    """
    stored = parse_stored(store, key, data)
    if not stored.rows.schema.equals(SCHEMA):
        raise StorageError(f"{store.uri}/{key}: damaged (its columns are not those of a results table)")
    return stored


def _check_object(stored: Stored) -> list[str]:
    """What is wrong with one object by itself."""
    faults = []
    if stored.rows["commit"].unique().to_pylist() != [stored.commit]:
        faults.append(f"{stored.key}: its rows carry another number")
    if stored.rows["run_id"].unique().to_pylist() != [stored.run_id]:
        faults.append(f"{stored.key}: its rows are not all of run {stored.run_id}")
    scans = stored.rows.group_by(["source", "scan_id"]).aggregate([([], "count_all")])
    if len(scans) < stored.rows.num_rows:
        faults.append(f"{stored.key}: a scan has two rows")
    return faults


def _number_rows(rows: Rows) -> Keys:
    """Keys of an object's rows, with their numbers in it from 1."""
    return rows.select(KEY_COLUMNS).append_column(ROW, pa.array(np.arange(1, rows.num_rows + 1)))


def _find_doubles(final: Keys) -> list[str]:
    """Which scans have several final rows, by the last of them: their names may be patients'."""
    counts = [([], "count_all"), ("commit", "last"), (ROW, "last")]
    counted = final.group_by([*SCAN_KEY, *MODEL_KEY], use_threads=False).aggregate(counts)  # else none is the last
    doubles = counted.filter(pc.greater(counted["count_all"], 1))
    return [
        f"{make_commit_key(row['commit_last'])}: the scan in row {row['row_last']} has {row['count_all']} final rows"
        for row in doubles.to_pylist()
    ]


def _report_check(store: Store, out: str | None) -> dict[str, Any]:
    digests, faults = check_table(store)
    lines = [f"{digest}  {key}\n" for key, digest in digests.items()]
    _write_out(out, "".join(lines).encode())
    for fault in faults:
        print(f"wrong: {fault}", file=sys.stderr)
    if faults:
        raise RunError(f"{store.uri}: {_name_faults(faults)}; restore the named objects from a copy")
    return {"objects": len(digests), "held": list_held_runs(store)}


def _name_faults(faults: Sequence[str]) -> str:
    """The first faults in full, and how many more there are."""
    more = f" and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
    return "; ".join(faults[:NUM_NAMED]) + more


def clean_runs(store: Store, keep_commits: int) -> dict[str, Any]:
    """Remove plan and parts of the runs that at least `keep_commits` later objects follow; reports and decisions stay.

    So goes the work of runs that ended with nothing to publish, or were discarded. Other work that was never published
    is left alone and counted: it may be a run in progress, which may end and be published while this goes on.
    Raises: StorageError, CredentialsError; what was removed until then stays so, and the same call goes on.
    """
    found = _list_runs_with_work(store)
    files = list_run_files(store)  # before the table, that knows what ended by now
    objects = list_commit_objects(store)
    num_later = {item.key: index for index, item in enumerate(reversed(objects))}
    published = {stored.run_id: num_later[stored.key] for stored in stream_objects(store, objects, [])}
    is_ended = {run_id: bool({ENDED, DISCARDED} & names) for run_id, names in files.items()}
    over = [
        run_id
        for run_id in found
        if (published[run_id] >= keep_commits if run_id in published else is_ended.get(run_id, False))
    ]
    num_removed = sum(RunFolder(store, run_id).delete_work() for run_id in over)
    unpublished = [run_id for run_id in found if run_id not in published and run_id not in over]
    return {"cleaned_runs": len(over), "removed_objects": num_removed, "unpublished_runs": unpublished}


def _list_runs_with_work(store: Store) -> list[str]:
    try:
        keys = [item.key for item in store.list_objects(RUNS)]
    except FolderMissing:
        return []
    return sorted({key.split("/")[1] for key in keys if key.endswith(".parquet")})


def _write_out(place: str | None, data: bytes) -> None:
    """Write to a file here or in a store, or to the screen where none is given."""
    if place is None:
        sys.stdout.write(data.decode())
        return
    folder, _, name = place.rpartition("/")
    if not name:
        raise UsageError(f"{place}: give the name of a file")
    open_store(folder or ".", create=True).write_bytes(name, data)
