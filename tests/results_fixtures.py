"""Rows as scoring yields them, and places to publish them in, for all tests of the results table."""

import datetime
import itertools
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from darnet.publishing.commit import publish
from darnet.publishing.objects import Listing
from darnet.publishing.origin import Origin
from darnet.publishing.rows import SCHEMA, Reason, make_table
from darnet.publishing.runs import PLAN, PlannedSource, RunFolder, RunRecord, Work, list_run_files, write_plan
from darnet.publishing.staged import StagedRows
from darnet.results import read_predictions
from darnet.scan import Source, StoredObject
from darnet.storage import Store

MODEL = "m" * 64
ORIGIN = Origin("/archive")
WORK = Work(ORIGIN, MODEL, "1-abc", "s" * 64, "cpu")
ODD_KEYS = [
    "a b/ü",
    "日本\U0001f600",
    "caf\udce9/1",
    "\\xe9",
    "\\x5c",
    "\\",
    "\\\udcff",
    "x\\\\xffy",
    "'; DROP",
    "%20",
    ".",
]


def make_row(
    scan_id: str, status: str = "OK", *, run_id: str = "run", night: int = 1, **changes: Any
) -> dict[str, Any]:
    """A row as scoring yields it; `night` is a day of January 2030."""
    is_ok = status == "OK"
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    del row["commit"]
    row |= {
        "run_id": run_id,
        "night": datetime.date(2030, 1, night),
        "scored_at": datetime.datetime(2030, 1, night, 3, tzinfo=datetime.UTC),
        "source": scan_id.split("#")[0],
        "scan_id": scan_id,
        "input_sha256": "i" * 64,
        "num_files": 30,
        "num_bytes": 1000,
        "status": status,
        "status_detail": "" if is_ok else "what happened",
        "model_name": "DARNet",
        "model_version": "1",
        "model_sha256": MODEL,
        "preprocessing_version": "1-abc",
        "code_version": "0.1.0",
    }
    if is_ok:
        row |= {"probability_cp": 0.2, "probability_ncp": 0.7, "probability_normal": 0.1, "prediction": "NCP"}
        row |= {"fold_probability_ncp": [0.6, 0.8], "cam_depth_profile": np.full(4, 0.25, np.float32)}
    return row | changes


def stage(rows: Sequence[Mapping[str, Any]], rows_per_part: int = 1_000) -> StagedRows:
    """Rows of a run as if they had been staged."""
    table = make_table(rows)
    parts = [table.slice(start, rows_per_part) for start in range(0, len(table), rows_per_part)]
    return StagedRows(lambda columns: (part.select(columns) for part in parts))


def make_listing(minute: int, *, minutes: int = 0, last_commit: int = 0) -> Listing:
    """A listing that began so many minutes after midnight of 1 January 2030, and took `minutes`."""
    started_at = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(minutes=minute)
    return Listing(last_commit, started_at, started_at + datetime.timedelta(minutes=minutes))


MINUTES = itertools.count()


def publish_rows(
    store: Store, run_id: str, *rows: Mapping[str, Any], listing: Listing | None = None, origin: Origin = ORIGIN
) -> int | None:
    """Publish as a run does; it has listed the archive after every earlier call, unless `listing` says when."""
    staged = stage([{**row, "run_id": run_id} for row in rows])
    return publish(store, run_id, staged, listing or make_listing(next(MINUTES)), origin, pause=lambda _: None)


def begin_run(
    store: Store,
    *sources: Source,
    run_id: str = "",
    work: Work = WORK,
    night: int = 1,
    reason: Reason = Reason.NEW,
    last_commit: int = 0,
) -> RunFolder:
    """A run with record and plan, under its own id or one that a test wants."""
    with tempfile.TemporaryDirectory() as temporary:
        plan = Path(temporary) / "plan"

        def make_record(plan_sha256: str) -> RunRecord:
            listing = make_listing(0, last_commit=last_commit)
            return RunRecord(datetime.date(2030, 1, night), work, {}, plan_sha256, listing)

        record = write_plan([PlannedSource(source, reason) for source in sources], plan, make_record)
        folder = RunFolder(store, run_id or record.run_id)
        folder.begin(record, plan)
    return folder


def read_plan(folder: RunFolder) -> list[PlannedSource]:
    """The whole plan, as it was listed."""
    table = pq.read_table(pa.BufferReader(folder.store.read_bytes(folder.locate(PLAN))))
    sources = folder.read_sources(range(table.num_rows))
    return [PlannedSource(*pair) for pair in zip(sources, map(Reason, table["reason"].to_pylist()), strict=True)]


def has_plan(folder: RunFolder) -> bool:
    """Whether there is a plan to go on from."""
    return PLAN in list_run_files(folder.store).get(folder.run_id, ())


def read_statuses(store: Store, latest: bool = True) -> dict[str, str]:
    frame = read_predictions(store.uri, latest)
    return dict(zip(frame["scan_id"], frame["status"], strict=True))


def list_commit_numbers(store: Store) -> list[int]:
    return sorted(int(item.key[-16:].strip("c.parquet")) for item in store.list_objects("predictions/c"))


def make_source(key: str, version: str = "1") -> Source:
    return Source(key, (StoredObject(f"{key}/1", 10, version, 5.5), StoredObject(f"{key}/2", 20, version, 6.5)))


def publish_history(store: Store, seed: int) -> list[dict[str, Any]]:
    """Some random nights of a small archive; every row as published."""
    rng = random.Random(seed)
    for night in range(1, 9):
        model = {"model_sha256": rng.choice("mn") * 64}
        rows = []
        for source in rng.sample(["a", "b", "c é", "caf\udce9"], rng.randint(1, 4)):
            bytes_now = {"source": source, "input_sha256": rng.choice("ij") * 64}
            scans = rng.choice([[source], [f"{source}#1"], [f"{source}#1", f"{source}#2"]])
            statuses = ["OK", "OK", "ERR_TIMEOUT", "SKIP_NO_LUNG"]
            rows += [make_row(scan, rng.choice(statuses), night=night, **bytes_now, **model) for scan in scans]
        publish_rows(store, f"run{night}", *rows)
    return [
        row
        for item in store.list_objects("predictions/")
        for row in pq.read_table(pa.BufferReader(store.read_bytes(item.key))).to_pylist()
    ]


def flip_bit(data: bytes, place: int) -> bytes:
    """The same with one bit of one byte the other way."""
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
