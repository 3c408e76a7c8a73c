"""The results table: nothing lost, nothing doubled, whole commits only, whoever else is publishing."""

import datetime
import math
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from darnet.errors import PutUncertain, RunError, Status, StorageError, UsageError
from darnet.results import (
    SCHEMA,
    PlannedSource,
    Reason,
    RunFolder,
    check_rows,
    describe_schema,
    find_last_commit,
    make_table,
    name_part,
    publish,
    read_predictions,
    read_scored_keys,
    spell_key,
    unspell_key,
)
from darnet.scan import Source, StoredObject
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore

MODEL = "m" * 64
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


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A results place where nothing is yet, once of each kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "results"))
    return open_store(request.getfixturevalue("s3")() + "/results")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "results"))


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


def publish_rows(store: Store, run_id: str, *rows: Mapping[str, Any]) -> int | None:
    return publish(store, run_id, make_table([{**row, "run_id": run_id} for row in rows]), pause=lambda _: None)


def read_statuses(store: Store, latest: bool = True) -> dict[str, str]:
    frame = read_predictions(store.uri, latest)
    return dict(zip(frame["scan_id"], frame["status"], strict=True))


def list_commit_numbers(store: Store) -> list[int]:
    return sorted(int(item.key[-16:].strip("c.parquet")) for item in store.list_objects("predictions/c"))


# Columns


def test_every_column_is_described_and_survives_parquet(local: Store) -> None:
    publish_rows(local, "run", make_row("a"))
    schema = pq.read_schema(local.local_path("predictions/c00000001.parquet"))
    assert schema.equals(SCHEMA)
    for column in schema:
        assert len(column.metadata[b"description"]) > 10
        assert f"| {column.name} |" in describe_schema()
    assert schema.metadata[b"run_id"] == b"run"
    assert schema.metadata[b"notice"] == b"research use only"


def test_columns_are_those_of_the_design() -> None:
    listed = """
    run_id commit night scored_at source scan_id patient_key series_key input_sha256 num_files num_bytes
    status status_detail model_name model_version model_sha256 preprocessing_version code_version intensity
    num_slices slice_spacing_mm pixel_spacing_mm manufacturer probability_cp probability_ncp
    probability_normal prediction fold_probability_ncp fold_std_ncp cam_class cam_in_lung_fraction
    cam_left_fraction cam_extent_fraction cam_peak_slice cam_peak_y cam_peak_x cam_depth_profile
    depth_gate_profile lung_fraction fetch_s decode_s model_s"""
    assert SCHEMA.names == listed.split()


def test_probabilities_are_stored_to_the_last_bit(local: Store) -> None:
    values = [float(np.float32(0.1)), 1 / 3, math.nextafter(0.5, 1)]
    names = ["probability_cp", "probability_ncp", "probability_normal"]
    folds = np.array([0.1, 1 / 3], np.float32)
    changes = {**dict(zip(names, values, strict=True)), "fold_probability_ncp": folds}
    publish_rows(local, "run", make_row("a", **changes))
    row = read_predictions(local.uri).iloc[0]
    assert [row[name] for name in names] == values
    assert row["fold_probability_ncp"].tobytes() == folds.tobytes()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda row: row.pop("night"), "night"),
        (lambda row: row.update(probability=1.0), "probability"),
        (lambda row: row.update(source=None), "source"),
        (lambda row: row.update(model_sha256=None), "model_sha256"),
        (lambda row: row.update(num_slices="many"), "num_slices"),
    ],
)
def test_a_wrong_row_names_its_column(spoil: Callable[[dict[str, Any]], Any], named: str) -> None:
    row = make_row("a")
    spoil(row)
    with pytest.raises(RunError, match=rf"column {named}\b"):
        make_table([make_row("b"), row])


@pytest.mark.parametrize("key", ODD_KEYS)
def test_spelling_is_utf8_and_reversible(key: str) -> None:
    assert unspell_key(spell_key(key).encode().decode()) == key


def test_no_two_keys_are_spelled_alike() -> None:
    pieces = ["\\", "x", "5", "c", "f", "\udcff", "\udc80", "é"]
    rng = random.Random(0)
    keys = {"".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(20_000)}
    assert len({spell_key(key) for key in keys}) == len(keys)
    assert all(unspell_key(spell_key(key)) == key for key in keys)


# A run's work in progress


def make_source(key: str, version: str = "1") -> Source:
    return Source(key, (StoredObject(f"{key}/1", 10, version, 5.5), StoredObject(f"{key}/2", 20, version, 6.5)))


def test_a_plan_comes_back_as_written(store: Store) -> None:
    folder = RunFolder(store, "run-1")
    assert not folder.has_plan()
    planned = [PlannedSource(make_source(key), reason) for key in ODD_KEYS for reason in Reason]
    folder.write_plan(iter(planned))
    assert folder.has_plan()
    assert list(folder.read_plan()) == planned
    assert folder.list_planned_sources() == [item.source.key for item in planned]
    assert not RunFolder(store, "run").has_plan()


def test_the_first_plan_of_a_run_holds(store: Store) -> None:
    first, second = ([PlannedSource(make_source(key), Reason.NEW)] for key in "ab")
    RunFolder(store, "run").write_plan(first)
    RunFolder(store, "run").write_plan(second)
    assert list(RunFolder(store, "run").read_plan()) == first


def test_an_empty_plan_is_a_plan(store: Store) -> None:
    RunFolder(store, "run").write_plan([])
    assert RunFolder(store, "run").has_plan()
    assert list(RunFolder(store, "run").read_plan()) == []


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_run_id_cannot_name_another_place(local: Store, run_id: str) -> None:
    with pytest.raises(UsageError):
        RunFolder(local, run_id)


def test_part_names_depend_on_the_sources_only() -> None:
    assert name_part(ODD_KEYS) == name_part(reversed(ODD_KEYS))
    assert name_part(["a", "b"]) != name_part(["a"])
    assert name_part(["a", "b"]) != name_part(["ab"])


def test_parts_gather_what_was_staged(store: Store) -> None:
    folder = RunFolder(store, "run")
    assert folder.list_staged_sources() == set()
    assert folder.read_parts().num_rows == 0
    for key in ODD_KEYS:
        for _ in range(2):  # a repeated task
            folder.write_part(name_part([key]), [make_row(key)])
    assert folder.list_staged_sources() == set(ODD_KEYS)
    assert sorted(folder.read_parts()["source"].to_pylist()) == sorted(map(spell_key, ODD_KEYS))


def test_a_source_in_two_parts_counts_once_and_whole(local: Store) -> None:
    folder = RunFolder(local, "run")
    folder.write_part("1", [make_row("a#1"), make_row("a#2"), make_row("b")])
    folder.write_part("2", [make_row("b", "ERR_TIMEOUT"), make_row("a#1", "ERR_TIMEOUT"), make_row("c")])
    rows = folder.read_parts().select(["scan_id", "status"]).to_pylist()
    assert [(row["scan_id"], row["status"]) for row in rows] == [(name, "OK") for name in ("a#1", "a#2", "b", "c")]


# Publishing


def test_commits_are_numbered_from_one_and_rows_carry_the_number(store: Store) -> None:
    assert publish_rows(store, "one", make_row("a"), make_row("b", "BAD_TILT")) == 1
    assert publish_rows(store, "two", make_row("c")) == 2
    frame = read_predictions(store.uri)
    assert list(zip(frame["scan_id"], frame["commit"], frame["run_id"], strict=True)) == [
        ("a", 1, "one"),
        ("b", 1, "one"),
        ("c", 2, "two"),
    ]


def test_nothing_new_publishes_nothing(store: Store) -> None:
    assert publish(store, "none", make_table([])) is None
    publish_rows(store, "one", make_row("a"))
    assert publish_rows(store, "two", make_row("a", probability_ncp=0.6)) is None
    assert list_commit_numbers(store) == [1]


def test_a_restart_after_a_lost_acknowledgement_finds_its_commit(store: Store) -> None:
    publish_rows(store, "one", make_row("a"))
    publish_rows(store, "two", make_row("b"))
    assert publish_rows(store, "one", make_row("a")) == 1
    assert list_commit_numbers(store) == [1, 2]


def test_rows_of_another_run_or_of_two_models_are_refused(local: Store) -> None:
    with pytest.raises(RunError, match="run_id"):
        publish(local, "mine", make_table([make_row("a", run_id="other")]))
    with pytest.raises(RunError, match="model_sha256"):
        publish_rows(local, "mine", make_row("a"), make_row("b", model_sha256="other"))


def test_what_another_run_made_final_is_left_out(store: Store) -> None:
    publish_rows(store, "one", make_row("a#1"), make_row("a#2", "ERR_TIMEOUT"), make_row("b"))
    publish_rows(store, "two", make_row("a#1", "BAD_TILT"), make_row("a#2"), make_row("b", "ERR_STORAGE"))
    frame = read_predictions(store.uri, latest=False)
    assert sorted(zip(frame["scan_id"], frame["status"], frame["commit"], strict=True)) == [
        ("a#1", "OK", 1),
        ("a#2", "ERR_TIMEOUT", 1),
        ("a#2", "OK", 2),
        ("b", "OK", 1),
    ]


def test_a_source_that_is_done_gets_no_error_row_from_a_slower_run(local: Store) -> None:
    publish_rows(local, "fast", make_row("a#1"), make_row("a#2"))
    assert publish_rows(local, "slow", make_row("a", "ERR_STORAGE")) is None


@pytest.mark.parametrize(
    "change", [{"input_sha256": "j" * 64}, {"model_sha256": "n" * 64}, {"preprocessing_version": "2-abc"}]
)
def test_other_bytes_or_another_model_are_scored_anew(local: Store, change: dict[str, str]) -> None:
    publish_rows(local, "one", make_row("a"))
    assert publish_rows(local, "two", make_row("a", **change)) == 2


def test_the_third_night_of_the_same_error_is_final(store: Store) -> None:
    for night in (1, 2):
        publish_rows(store, f"run{night}", make_row("a", "ERR_TIMEOUT", night=night))
        assert read_statuses(store) == {"a": "ERR_TIMEOUT"}
    publish_rows(store, "run3", make_row("a", "ERR_TIMEOUT", night=3), make_row("b", "ERR_TIMEOUT", night=3))
    assert read_statuses(store) == {"a": "BAD_GAVE_UP", "b": "ERR_TIMEOUT"}
    detail = read_predictions(store.uri).set_index("scan_id")["status_detail"]
    assert detail["a"] == "ERR_TIMEOUT, 3 nights: what happened"
    assert detail["b"] == "what happened"
    assert publish_rows(store, "run4", make_row("a", "ERR_TIMEOUT", night=4)) is None


@pytest.mark.parametrize(
    "third",
    [
        make_row("a", "ERR_TIMEOUT", night=2),  # a second run of the same night
        make_row("a", "ERR_MEMORY", night=3),
        make_row("a", "ERR_TIMEOUT", night=3, input_sha256="j" * 64),
        make_row("a", "ERR_TIMEOUT", night=3, model_sha256="n" * 64),
    ],
)
def test_only_the_same_error_on_the_same_bytes_on_three_nights_gives_up(local: Store, third: dict[str, Any]) -> None:
    for night in (1, 2):
        publish_rows(local, f"run{night}", make_row("a", "ERR_TIMEOUT", night=night))
    publish_rows(local, "run3", third)
    assert read_statuses(local) == {"a": third["status"]}


@dataclass
class TroubledStore:
    """A real store whose first conditional puts end as `ends` says: done or lost, and never acknowledged."""

    real: Store
    ends: list[str]
    puts: list[str] = field(default_factory=list)
    before_put: Callable[[], object] = lambda: None

    @property
    def uri(self) -> str:
        return self.real.uri

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        return self.real.list_objects(prefix)

    def read_bytes(self, key: str) -> bytes:
        return self.real.read_bytes(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.before_put()
        self.puts.append(key)
        end = self.ends.pop(0) if self.ends else "answered"
        is_created = end != "lost" and self.real.put_if_absent(key, data)
        if end != "answered":
            raise PutUncertain(end)
        return is_created

    def fetch(self, item: StoredObject, path: Path) -> None:
        self.real.fetch(item, path)

    def local_path(self, key: str) -> Path | None:
        return self.real.local_path(key)

    def write_bytes(self, key: str, data: bytes) -> None:
        self.real.write_bytes(key, data)

    def delete(self, key: str) -> None:
        self.real.delete(key)

    def child(self, prefix: str) -> Store:
        return self.real.child(prefix)


@pytest.mark.parametrize(
    ("ends", "num_puts"), [(["done"], 1), (["lost"], 2), (["lost", "lost", "done"], 3), (["lost"] * 5, 6)]
)
def test_an_unacknowledged_put_ends_in_exactly_one_commit(store: Store, ends: list[str], num_puts: int) -> None:
    troubled = TroubledStore(store, list(ends))
    assert publish_rows(troubled, "run", make_row("a")) == 1
    assert troubled.puts == ["predictions/c00000001.parquet"] * num_puts
    assert list_commit_numbers(store) == [1]


def test_a_store_that_never_answers_ends_the_run(local: Store) -> None:
    with pytest.raises(StorageError, match="no clear answer"):
        publish_rows(TroubledStore(local, ["lost"] * 6), "run", make_row("a"))


def test_the_slot_taken_by_another_run_is_not_taken_for_ours(local: Store) -> None:
    rivals = iter([lambda: publish_rows(local, "rival", make_row("a"), make_row("r"))])
    troubled = TroubledStore(local, ["done"], before_put=lambda: next(rivals, lambda: None)())
    assert publish_rows(troubled, "run", make_row("a"), make_row("b")) == 2
    frame = read_predictions(local.uri, latest=False)
    assert list(zip(frame["scan_id"], frame["run_id"], frame["commit"], strict=True)) == [
        ("a", "rival", 1),
        ("r", "rival", 1),
        ("b", "run", 2),
    ]


def test_a_lost_race_with_nothing_left_publishes_nothing(local: Store) -> None:
    rivals = iter([lambda: publish_rows(local, "rival", make_row("a"))])
    troubled = TroubledStore(local, [], before_put=lambda: next(rivals, lambda: None)())
    assert publish_rows(troubled, "run", make_row("a")) is None
    assert list_commit_numbers(local) == [1]


def test_a_foreign_file_in_the_table_stops_the_run(local: Store) -> None:
    local.write_bytes("predictions/c00000001.parquet", b"not Parquet")
    with pytest.raises(StorageError, match=r"c00000001\.parquet: not a results file"):
        publish_rows(local, "run", make_row("a"))


def test_the_last_commit_is_the_highest_number(store: Store) -> None:
    assert find_last_commit(store) == 0
    for number in (1, 2, 3):
        assert publish_rows(store, f"run{number}", make_row(str(number))) == number
        assert find_last_commit(store) == number


def test_other_files_beside_the_commits_are_left_alone(local: Store) -> None:
    local.write_bytes("predictions/README.txt", b"")
    local.write_bytes("predictions/.c00000009.parquet.tmp", b"")
    local.write_bytes("predictions/copy/c00000009.parquet", b"")
    assert publish_rows(local, "run", make_row("a")) == 1
    assert read_statuses(local) == {"a": "OK"}


def start_together(*works: Callable[[], object]) -> list[BaseException]:
    """Run all at once in threads; what they raised."""
    barrier = threading.Barrier(len(works))
    raised: list[BaseException] = []

    def work_on(work: Callable[[], object]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work_on, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_racing_runs_leave_no_gap_and_no_second_final_row(store: Store) -> None:
    def publish_series(name: str) -> None:
        for night in range(1, 4):
            scans = [f"shared{night}", f"shared{night + 1}", f"{name}{night}"]
            publish_rows(store, f"{name}-{night}", *[make_row(scan, night=night) for scan in scans])

    assert start_together(*[lambda name=name: publish_series(name) for name in ("x", "y", "z")]) == []
    numbers = list_commit_numbers(store)
    assert numbers == list(range(1, len(numbers) + 1))
    everything = read_predictions(store.uri, latest=False)
    expected = {f"shared{number}" for number in range(1, 5)}
    expected |= {f"{name}{night}" for name in "xyz" for night in range(1, 4)}
    assert sorted(everything["scan_id"]) == sorted(expected)
    assert everything.groupby("commit")["run_id"].nunique().eq(1).all()


def test_one_run_published_by_two_drivers_is_one_commit(store: Store) -> None:
    numbers: list[int | None] = []
    works = [lambda: numbers.append(publish_rows(store, "run", make_row("a"), make_row("b")))] * 2
    assert start_together(*works) == []
    assert numbers == [1, 1]
    assert list_commit_numbers(store) == [1]


def test_a_reader_never_sees_half_a_commit(store: Store) -> None:
    stop = threading.Event()
    sizes: set[int] = set()

    def poll() -> None:
        while not stop.is_set():
            frame = read_predictions(store.uri, latest=False)
            sizes.update(frame.groupby("commit").size())

    def publish_many() -> None:
        try:
            for number in range(8):
                publish_rows(store, f"run{number}", *[make_row(f"{number}/{scan}") for scan in range(50)])
        finally:
            stop.set()

    assert start_together(poll, publish_many) == []
    assert len(read_predictions(store.uri)) == 400
    assert sizes <= {50}


def test_a_restarted_run_scores_what_is_missing_and_publishes_once(store: Store) -> None:
    folder = RunFolder(store, "run")
    folder.write_plan([PlannedSource(make_source(key), Reason.NEW) for key in "abc"])
    folder.write_part(name_part("ab"), [make_row("a"), make_row("b", "BAD_TILT")])
    # Here the first driver dies; what follows knows only the store and the run's name.
    folder = RunFolder(open_store(store.uri), "run")
    missing = set(folder.list_planned_sources()) - folder.list_staged_sources()
    assert missing == {"c"}
    folder.write_part(name_part(missing), [make_row("c")])
    check_rows(folder.list_planned_sources(), folder.read_parts())
    assert publish(store, "run", folder.read_parts()) == 1
    assert publish(store, "run", folder.read_parts()) == 1
    assert read_statuses(store, latest=False) == {"a": "OK", "b": "BAD_TILT", "c": "OK"}


# What is settled


def find_reasons(store: Store, *sources: Source) -> list[Reason | None]:
    scored = read_scored_keys(store, MODEL, "1-abc")
    return [scored.find_reason(source) for source in sources]


def test_reasons_follow_what_was_published(store: Store) -> None:
    a, b, c = (make_source(key) for key in ("a", "b", "caf\udce9"))
    assert find_reasons(store, a, b, c) == [Reason.NEW] * 3
    of = {source.key: {"source": source.key, "input_sha256": source.input_sha256} for source in (a, b, c)}
    rows = [make_row("a#1", **of["a"]), make_row("a#2", "ERR_TIMEOUT", **of["a"]), make_row("b", "BAD_TILT", **of["b"])]
    publish_rows(store, "one", *rows, make_row("c", **of[c.key]))
    assert find_reasons(store, a, b, c) == [Reason.RETRY, None, None]
    assert find_reasons(store, make_source("a", "2"), make_source("b", "2")) == [Reason.CHANGED] * 2
    publish_rows(store, "two", make_row("a#1", **of["a"]), make_row("a#2", **of["a"]))
    assert find_reasons(store, a, b) == [None, None]
    assert read_scored_keys(store, MODEL, "1-abc").pending.num_rows == 0
    other_model = read_scored_keys(store, "other", "1-abc")
    assert other_model.find_reason(a) is Reason.NEW


def test_pending_tells_final_scans_and_error_nights(local: Store) -> None:
    for night in (1, 2):
        rows = [make_row("a#1"), make_row("a#2", "ERR_TIMEOUT", night=night), make_row("b")]
        publish_rows(local, f"run{night}", *rows)
    pending = read_scored_keys(local, MODEL, "1-abc").pending.to_pylist()
    found = sorted((row["scan_id"], row["status"], row["num_nights"]) for row in pending)
    assert found == [("a#1", "OK", 1), ("a#2", "ERR_TIMEOUT", 2)]


def test_a_source_error_does_not_outlive_its_scans(local: Store) -> None:
    source = make_source("a")
    publish_rows(local, "one", make_row("a", "ERR_STORAGE", input_sha256=source.input_sha256))
    publish_rows(local, "two", *[make_row(f"a#{number}", input_sha256=source.input_sha256) for number in "12"])
    assert find_reasons(local, source) == [None]
    assert read_statuses(local) == {"a#1": "OK", "a#2": "OK"}


# Reading


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


# The README offers this query to analysts; it must mean what read_predictions means.
LATEST_SQL = """
WITH rows AS (FROM read_parquet('{results}/predictions/*.parquet')),
newest AS (
    SELECT source, max(commit) AS newest_commit, arg_max(input_sha256, commit) AS input_sha256,
           arg_max(model_sha256, commit) AS model_sha256,
           arg_max(preprocessing_version, commit) AS preprocessing_version
    FROM rows GROUP BY source)
SELECT rows.* FROM rows JOIN newest USING (source, input_sha256, model_sha256, preprocessing_version)
WHERE NOT starts_with(status, 'ERR_') OR commit = newest_commit
QUALIFY row_number() OVER (PARTITION BY source, scan_id ORDER BY commit DESC) = 1
ORDER BY source, scan_id
"""


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


@pytest.mark.parametrize("seed", range(8))
def test_frame_duckdb_and_a_loop_agree_on_the_latest_rows(local: Store, seed: int) -> None:
    rows = publish_history(local, seed)
    frame = read_predictions(local.uri)
    assert list(zip(frame["scan_id"], frame["commit"], strict=True)) == find_latest_by_hand(rows)
    with duckdb.connect() as connection:
        queried = connection.sql(LATEST_SQL.format(results=local.uri)).arrow().read_all()
    assert queried.column_names == SCHEMA.names
    columns = [name for name in SCHEMA.names if name != "scored_at"]  # DuckDB names UTC otherwise
    pd.testing.assert_frame_equal(queried.select(columns).to_pandas(), frame[columns], check_dtype=False)


@pytest.mark.parametrize("seed", range(8))
def test_every_published_scan_and_key_has_one_final_row(local: Store, seed: int) -> None:
    publish_history(local, seed)
    rows = read_predictions(local.uri, latest=False)
    final = rows[~rows["status"].str.startswith("ERR_")]
    assert not final.duplicated(["source", "scan_id", "input_sha256", "model_sha256"]).any()


# The gate before publishing


def test_sound_rows_pass() -> None:
    rows = [make_row("a#1"), make_row("a#2", "ERR_TIMEOUT"), make_row("caf\udce9", "SKIP_NO_LUNG")]
    check_rows(["a", "caf\udce9"], make_table(rows))
    check_rows([], make_table([]))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([make_row("a")], "'b' planned, but has no row"),
        ([make_row("a"), make_row("b"), make_row("c")], "'c' has rows, but was not planned"),
        ([make_row("a"), make_row("b"), make_row("b")], "'b' has a scan twice"),
        ([make_row("a"), make_row("b", "FINE")], "'b' has an unknown status"),
        ([make_row("a"), make_row("b", model_sha256="n")], "'b' has another model"),
        ([make_row("a"), make_row("b", probability_cp=None)], "'b' is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=math.nan)], "'b' is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=math.inf)], "'b' is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=0.21)], "'b' is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=-0.2, probability_normal=0.5)], "'b' is OK, but"),
        ([make_row("a"), make_row("b", prediction="CP")], "'b' predicts another class"),
        ([make_row("a"), make_row("b", prediction=None)], "'b' predicts another class"),
        ([make_row("a"), make_row("b", "BAD_TILT", probability_ncp=0.5)], "'b' has a probability"),
        ([make_row("a"), make_row("b", "SKIP_NO_LUNG", prediction="CP")], "'b' has a probability"),
    ],
)
def test_unsound_rows_name_their_source(rows: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(RunError, match=complaint):
        check_rows(["a", "b"], make_table(rows))


def test_odd_names_on_disk_reach_the_table_and_the_plan(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.nii", "wb"):  # noqa: PTH123
        pass
    (item,) = LocalStore(tmp_path).list_objects()
    results = open_store(str(tmp_path / "results"))
    source = Source(item.key, (item,))
    RunFolder(results, "run").write_plan([PlannedSource(source, Reason.NEW)])
    publish_rows(results, "run", make_row(source.key, "BAD_TRUNCATED", input_sha256=source.input_sha256))
    assert [planned.source for planned in RunFolder(results, "run").read_plan()] == [source]
    assert read_statuses(results) == {"caf\\xe9.nii": Status.BAD_TRUNCATED}
    assert find_reasons(results, source) == [None]
