"""What an analyst reads: frame, SQL and a loop by hand agree on the latest rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from darnet.publishing import objects
from darnet.publishing.rows import SCHEMA
from darnet.results import LATEST_SQL, read_predictions, read_rows
from darnet.storage import Store
from darnet.storage_local import LocalStore
from tests.results_fixtures import make_row, publish_history, publish_rows, read_statuses


def test_a_missing_table_is_an_empty_frame_with_all_columns(store: Store) -> None:
    for latest in (True, False):
        frame = read_predictions(store.uri, latest)
        assert list(frame.columns) == SCHEMA.names
        assert len(frame) == 0


def test_latest_forgets_a_scan_that_left_its_source(local: Store) -> None:
    publish_rows(local, "one", make_row("a#1"), make_row("a#2"), make_row("b"))
    publish_rows(local, "two", make_row("a#1", input_sha256="j" * 64))
    assert read_statuses(local) == {"a#1": "OK", "b": "OK"}
    assert len(read_predictions(local.uri, latest=False)) == 4


def test_latest_keeps_finals_of_earlier_commits_of_the_same_bytes(local: Store) -> None:
    publish_rows(local, "one", make_row("a#1"), make_row("a#2", "ERR_TIMEOUT"))
    publish_rows(local, "two", make_row("a#1"), make_row("a#2", "ERR_MEMORY"))
    assert read_statuses(local) == {"a#1": "OK", "a#2": "ERR_MEMORY"}
    assert sorted(read_predictions(local.uri)["commit"]) == [1, 2]


def test_as_of_a_night_nothing_later_counts(local: Store) -> None:
    publish_rows(local, "one", make_row("a", "ERR_TIMEOUT", night=1), make_row("b", night=1))
    publish_rows(local, "two", make_row("a", night=3), make_row("c", night=3))
    statuses = {
        day: read_predictions(local.uri, as_of=date(2030, 1, day)).set_index("scan_id")["status"].to_dict()
        for day in range(4)
        if day
    }
    assert statuses[1] == statuses[2] == {"a": "ERR_TIMEOUT", "b": "OK"}
    assert statuses[3] == {"a": "OK", "b": "OK", "c": "OK"}
    assert read_predictions(local.uri, as_of=date(2029, 12, 31)).empty


def find_latest_by_hand(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    latest = []
    for source in {row["source"] for row in rows}:
        mine = [row for row in rows if row["source"] == source]
        last = max(mine, key=lambda row: row["commit"])
        same = [row for row in mine if all(row[name] == last[name] for name in ("input_sha256", "model_sha256"))]
        for scan in {row["scan_id"] for row in same}:
            numbers = [
                row["commit"]
                for row in same
                if row["scan_id"] == scan and (row["commit"] == last["commit"] or row["status"][:3] != "ERR")
            ]
            latest += [(scan, max(numbers))] if numbers else []
    return sorted(latest)


@pytest.mark.parametrize("seed", range(4))
def test_frame_duckdb_and_a_loop_agree_on_the_latest_rows(local: Store, seed: int) -> None:
    rows = publish_history(local, seed)
    frame = read_predictions(local.uri)
    assert list(zip(frame["scan_id"], frame["commit"], strict=True)) == find_latest_by_hand(rows)
    with duckdb.connect() as connection:
        connection.execute(LATEST_SQL.replace("RESULTS", local.uri))
        queried = connection.sql("FROM latest()").arrow().read_all()
    assert queried.column_names == SCHEMA.names
    columns = [name for name in SCHEMA.names if name != "scored_at"]  # DuckDB names UTC otherwise
    pd.testing.assert_frame_equal(queried.select(columns).to_pandas(), frame[columns], check_dtype=False)


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
def test_frame_and_duckdb_agree_on_what_counted_on_any_day(
    local: Store, whole_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the keys of an object come."""
    monkeypatch.setattr(objects, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(objects, "PIECE_ROWS", 2)
    publish_history(local, 0)
    columns = [name for name in SCHEMA.names if name != "scored_at"]
    with duckdb.connect() as connection:
        connection.execute(LATEST_SQL.replace("RESULTS", local.uri))
        for day in (1, 4, 7):
            queried = connection.sql(f"FROM latest(day := DATE '2030-01-{day:02d}')").arrow().read_all()
            frame = read_predictions(local.uri, as_of=date(2030, 1, day))
            pd.testing.assert_frame_equal(queried.select(columns).to_pandas(), frame[columns], check_dtype=False)
            every = connection.sql(f"FROM predictions WHERE night <= DATE '2030-01-{day:02d}' ORDER BY commit").arrow()
            frame = read_predictions(local.uri, latest=False, as_of=date(2030, 1, day))
            pd.testing.assert_frame_equal(
                every.read_all().select(columns).to_pandas(), frame[columns], check_dtype=False
            )


def test_up_to_a_commit_nothing_changes_while_a_night_of_an_earlier_date_is_published(local: Store) -> None:
    """As of its date, that night counts: it was held, and accepted after the next one."""
    publish_rows(local, "one", make_row("a", "ERR_TIMEOUT", night=1), make_row("b", night=1))
    publish_rows(local, "three", make_row("c", night=3))
    columns = ["scan_id", "status"]

    def read() -> list[list[tuple[str, str]]]:
        with duckdb.connect() as connection:
            connection.execute(LATEST_SQL.replace("RESULTS", local.uri))
            asked = ("day := DATE '2030-01-02'", "last_commit := 2", "day := DATE '2030-01-02', last_commit := 2")
            queried = [connection.sql(f"SELECT scan_id, status FROM latest({told})").fetchall() for told in asked]
        day = date(2030, 1, 2)
        settings: list[dict[str, Any]] = [{"as_of": day}, {"last_commit": 2}, {"as_of": day, "last_commit": 2}]
        frames = [read_predictions(local.uri, **setting)[columns] for setting in settings]
        assert [list(frame.itertuples(index=False, name=None)) for frame in frames] == queried
        return queried

    first = [("a", "ERR_TIMEOUT"), ("b", "OK")]
    assert read() == [first, [*first, ("c", "OK")], first]
    publish_rows(local, "two", make_row("a", night=2))
    assert read() == [[("a", "OK"), ("b", "OK")], [*first, ("c", "OK")], first]
    assert len(read_predictions(local.uri, latest=False, last_commit=1)) == 2
    assert read_predictions(local.uri, last_commit=0).empty


@dataclass(frozen=True)
class WatchedStore(LocalStore):
    """Notes what Arrow holds when an object is read."""

    held: list[int] = field(default_factory=list)

    def read_bytes(self, key: str) -> bytes:
        self.held.append(pa.total_allocated_bytes())
        return super().read_bytes(key)


def test_of_rows_that_do_not_count_only_keys_are_held(tmp_path: Path) -> None:
    """Rows of 80 kB, of which the last night's alone is the latest."""
    store = WatchedStore(tmp_path)
    for night in range(1, 13):
        row = make_row("a", night=night, input_sha256=f"{night:064d}", cam_depth_profile=[0.5] * 20_000)
        publish_rows(store, f"run{night}", row)
    before = pa.total_allocated_bytes()
    store.held.clear()
    assert read_rows(store)["commit"].to_pylist() == [12]
    assert max(store.held) - before < 4 * 80_000
