"""Nothing lost, nothing doubled, whole commits only, whoever else is publishing."""

import hashlib
import itertools
import math
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from darnet.errors import NEVER_GIVEN_UP, PutUncertain, RunError, Status, StorageError
from darnet.publishing import commit, staged
from darnet.publishing.commit import check_rows, publish
from darnet.publishing.objects import list_commits, read_objects
from darnet.publishing.rows import KEY_COLUMNS, SCHEMA, make_table
from darnet.publishing.runs import find_unfinished
from darnet.publishing.staged import StagedRows
from darnet.results import read_predictions
from darnet.scan import StoredObject
from darnet.storage import Store
from tests.results_fixtures import (
    ORIGIN,
    WORK,
    begin_run,
    flip_bit,
    list_commit_numbers,
    make_listing,
    make_row,
    make_source,
    publish_history,
    publish_rows,
    read_statuses,
    stage,
)


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
    assert publish(store, "none", stage([]), make_listing(0), ORIGIN) is None
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
        publish(local, "mine", stage([make_row("a", run_id="other")]), make_listing(0), ORIGIN)
    with pytest.raises(RunError, match="model_sha256"):
        publish_rows(local, "mine", make_row("a"), make_row("b", model_sha256="other"))


OLD, NEW = {"input_sha256": "i" * 64}, {"input_sha256": "j" * 64}


def test_older_bytes_do_not_follow_newer_ones(store: Store) -> None:
    """Night one listed a before it changed, and is overtaken by night two; its other source stands."""
    second = [make_row("a#1", **NEW), make_row("a#2", **NEW), make_row("c")]
    assert publish_rows(store, "two", *second, listing=make_listing(60)) == 1
    first = [make_row("a#1", **OLD), make_row("a#3", "ERR_TIMEOUT", **OLD), make_row("b", **OLD)]
    assert publish_rows(store, "one", *first, listing=make_listing(0, minutes=5)) == 2
    assert read_statuses(store) == {"a#1": "OK", "a#2": "OK", "b": "OK", "c": "OK"}
    frame = read_predictions(store.uri, latest=False)
    assert set(frame.loc[frame["source"] == "a", "input_sha256"]) == {"j" * 64}


def test_a_run_of_nothing_but_older_bytes_publishes_nothing(local: Store) -> None:
    publish_rows(local, "two", make_row("a", **NEW), listing=make_listing(60))
    assert publish_rows(local, "one", make_row("a", **OLD), listing=make_listing(0)) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "row"),
    [
        (make_listing(0, minutes=5), make_listing(6), make_row("a", **NEW)),  # ours saw the source last
        (make_listing(9), make_listing(6, last_commit=1), make_row("a", **NEW)),  # the plan knew of theirs
        (make_listing(9), make_listing(6), make_row("a", "ERR_TIMEOUT", **NEW)),  # nothing is final there
        (make_listing(9), make_listing(6), make_row("a", model_sha256="n" * 64, **NEW)),
        (make_listing(9), make_listing(6), make_row("b", **NEW)),
    ],
)
def test_rows_that_nothing_later_replaces_are_published(local: Store, theirs: Any, ours: Any, row: Any) -> None:
    publish_rows(local, "theirs", row, listing=theirs)
    assert publish_rows(local, "ours", make_row("a", **OLD), listing=ours) == 2


def test_of_two_that_listed_at_once_the_first_to_publish_stands(local: Store) -> None:
    """Nobody knows who saw the source last: the other's bytes, if they are still there, are scored the next night."""
    publish_rows(local, "long", make_row("a", **NEW), listing=make_listing(0, minutes=20))
    assert publish_rows(local, "short", make_row("a", **OLD), listing=make_listing(5, minutes=1)) is None
    assert publish_rows(local, "next", make_row("a", **OLD), listing=make_listing(60, last_commit=1)) == 2


def test_a_race_lost_to_newer_bytes_drops_the_older(local: Store) -> None:
    """The rival's object is read back after the refused put, with its time of listing."""
    newer = lambda: publish_rows(local, "rival", make_row("a", **NEW), listing=make_listing(60))  # noqa: E731
    rivals = iter([newer])
    troubled = TroubledStore(local, [], before_put=lambda: next(rivals, lambda: None)())
    rows = [make_row("a", **OLD), make_row("b", **OLD)]
    assert publish_rows(troubled, "run", *rows, listing=make_listing(0)) == 2
    assert read_predictions(local.uri).set_index("scan_id")["run_id"].to_dict() == {"a": "rival", "b": "run"}


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


def test_only_what_a_scan_does_to_its_decoder_is_given_up(local: Store) -> None:
    """Disabled keys, a bucket that moved, a full disk: trouble that may last, and says nothing of a scan."""
    errors = [status for status in Status if status.startswith("ERR_")]
    for night in (1, 2, 3):
        publish_rows(local, f"run{night}", *[make_row(status, status, night=night) for status in errors])
    given_up = {scan for scan, status in read_statuses(local).items() if status == "BAD_GAVE_UP"}
    assert given_up == {"ERR_TIMEOUT", "ERR_DECODER_CRASH", "ERR_MEMORY"}


@pytest.mark.parametrize("status", sorted(NEVER_GIVEN_UP))
def test_what_a_person_must_put_right_is_never_given_up(local: Store, status: str) -> None:
    publish_rows(local, "run1", make_row("a", status, night=1))
    for night in range(2, 6):
        assert publish_rows(local, f"run{night}", make_row("a", status, night=night)) is None
    assert read_statuses(local) == {"a": status}
    publish_rows(local, "run6", make_row("a", night=6))
    assert read_statuses(local) == {"a": "OK"}


NEWS = [
    [make_row("a", "ERR_DENIED")],
    [make_row("a", "ERR_ARCHIVED", input_sha256="j" * 64)],
    [make_row("a", "ERR_ARCHIVED", model_sha256="n" * 64)],
    [make_row("a", "ERR_ARCHIVED"), make_row("a#1", "ERR_TIMEOUT")],
]


@pytest.mark.parametrize("rows", NEWS)
def test_an_error_that_says_anything_new_is_published(local: Store, rows: list[dict[str, Any]]) -> None:
    publish_rows(local, "run1", make_row("a", "ERR_ARCHIVED"))
    assert publish_rows(local, "run2", *rows) == 2


@pytest.mark.parametrize("rows", [NEWS[0], NEWS[1], NEWS[3]])
def test_so_is_the_old_word_after_it(local: Store, rows: list[dict[str, Any]]) -> None:
    """The newest commit of a source tells of all its scans that are not final."""
    publish_rows(local, "run1", make_row("a", "ERR_ARCHIVED"))
    publish_rows(local, "run2", *rows)
    assert publish_rows(local, "run3", make_row("a", "ERR_ARCHIVED", night=2)) == 3
    assert read_statuses(local) == {"a": "ERR_ARCHIVED"}


def test_only_what_repeats_is_left_out(local: Store) -> None:
    publish_rows(local, "run1", make_row("a", "ERR_ARCHIVED"), make_row("b", "ERR_TIMEOUT"))
    again = [make_row("a", "ERR_ARCHIVED", night=2), make_row("b", "ERR_TIMEOUT", night=2), make_row("c", night=2)]
    assert publish_rows(local, "run2", *again) == 2
    frame = read_predictions(local.uri, latest=False)
    assert list(zip(frame["scan_id"], frame["commit"], strict=True)) == [("a", 1), ("b", 1), ("b", 2), ("c", 2)]


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

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
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


def test_a_run_is_asked_for_again_before_every_put(local: Store) -> None:
    """A person may discard it while the store gives no clear answer."""
    folder, troubled = begin_run(local, make_source("a")), TroubledStore(local, ["lost"] * 5)
    folder.write_part("a", [make_row("a", run_id=folder.run_id)])

    def confirm() -> None:
        if len(troubled.puts) == 2:
            raise RunError("discarded")

    with pytest.raises(RunError, match="discarded"):
        publish(troubled, folder.run_id, folder.read_parts(), make_listing(0), ORIGIN, lambda _: None, confirm)
    assert (len(troubled.puts), list_commit_numbers(local)) == (2, [])


def damage(store: Store, key: str) -> None:
    """One bit of a page that nobody reads but who reads all."""
    data = store.read_bytes(key)
    chunk = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(SCHEMA.get_field_index("manufacturer"))
    store.delete(key)
    store.write_bytes(key, flip_bit(data, chunk.data_page_offset + chunk.total_compressed_size - 1))


@dataclass
class DamagingStore(TroubledStore):
    """What it puts arrives with a wrong bit, and it does not say so."""

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        try:
            return super().put_if_absent(key, data)
        finally:
            damage(self.real, key)


def test_what_a_run_left_damaged_in_the_table_is_not_taken_for_done(local: Store) -> None:
    """Nor by who starts it again, though its keys can be read."""
    folder = begin_run(local, make_source("a"))
    row = make_row("a")
    with pytest.raises(StorageError, match=r"c00000001\.parquet: damaged"):
        publish_rows(DamagingStore(local, ["done"]), folder.run_id, row)
    assert [stored.run_id for stored in read_objects(local, list_commits(local), KEY_COLUMNS)] == [folder.run_id]
    with pytest.raises(StorageError, match=r"c00000001\.parquet: damaged"):
        publish_rows(local, folder.run_id, row)
    with pytest.raises(StorageError, match=r"c00000001\.parquet: damaged"):
        find_unfinished(local, WORK)


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
    assert sizes == {50}


@pytest.mark.parametrize("seed", range(8))
def test_every_published_scan_and_key_has_one_final_row(local: Store, seed: int) -> None:
    publish_history(local, seed)
    rows = read_predictions(local.uri, latest=False)
    final = rows[~rows["status"].str.startswith("ERR_")]
    assert not final.duplicated(["source", "scan_id", "input_sha256", "model_sha256"]).any()


# What an object looks like


def shuffle_rows(seed: int, num_rows: int) -> list[dict[str, Any]]:
    """Rows of a run in the order in which some cluster came to finish their sources."""
    keys = [*(f"{number}#a" for number in range(num_rows - 3)), "caf\udce9", "z\U0001f600", "Z"]
    order = sorted(range(num_rows), key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest())
    return [make_row(keys[number], "OK" if number % 3 else "ERR_TIMEOUT", fetch_s=float(number)) for number in order]


def test_an_object_does_not_depend_on_who_finished_first(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts; its row groups follow the keys' bytes, and all but the last are full."""
    monkeypatch.setattr(commit, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr(commit, "OPEN_GROUPS", 3)
    monkeypatch.setattr(staged, "PIECE_ROWS", 5)
    found = []
    for seed, rows_per_part in ((1, 1), (2, 3), (3, 100)):
        store = local.child(str(seed))
        assert publish(store, "run", stage(shuffle_rows(seed, 29), rows_per_part), make_listing(0), ORIGIN) == 1
        found.append(store.read_bytes("predictions/c00000001.parquet"))
    assert found[0] == found[1] == found[2]
    file = pq.ParquetFile(pa.BufferReader(found[0]))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [8, 8, 8, 5]
    rows = file.read().to_pylist()
    assert [row["scan_id"] for row in rows] == sorted((row["scan_id"] for row in rows), key=lambda key: key.encode())
    expected = make_table([row | {"commit": 1} for row in shuffle_rows(4, 29)]).to_pylist()
    assert sorted(rows, key=lambda row: row["scan_id"]) == sorted(expected, key=lambda row: row["scan_id"])


def test_rows_that_are_left_out_or_given_up_lie_in_any_group(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(staged, "PIECE_ROWS", 5)
    for night in (1, 2):
        again = [make_row(f"{number:02d}", "ERR_MEMORY", night=night) for number in range(0, 20, 5)]
        done = [make_row(f"{number:02d}", night=night) for number in range(1, 20, 3)]
        assert publish_rows(local, f"run{night}", *again, *done) == night
    third = stage([make_row(f"{number:02d}", "ERR_MEMORY", run_id="run3", night=3) for number in range(20)], 3)
    assert publish(local, "run3", third, make_listing(60, last_commit=2), ORIGIN) == 3
    rows = pq.read_table(pa.BufferReader(local.read_bytes("predictions/c00000003.parquet"))).to_pylist()
    expected = {f"{number:02d}": "ERR_MEMORY" for number in range(20) if number % 3 != 1}
    expected |= {f"{number:02d}": "BAD_GAVE_UP" for number in (0, 5, 15)}
    assert {row["scan_id"]: row["status"] for row in rows} == expected
    assert {row["status_detail"] for row in rows if row["status"] == "BAD_GAVE_UP"} == {
        "ERR_MEMORY, 3 nights: what happened"
    }


def test_an_object_of_many_groups_opens_no_more_files_at_once(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the system allows a process: sixty of them for sixty rows would be more."""
    monkeypatch.setattr(commit, "ROW_GROUP_ROWS", 1)
    monkeypatch.setattr(commit, "OPEN_GROUPS", 7)
    keys = [f"{number:02d}" for number in range(60)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    room_for_30 = next(limit for limit in itertools.count() if len(set(range(limit)) - opened) == 30)
    resource.setrlimit(resource.RLIMIT_NOFILE, (room_for_30, limits[1]))
    try:
        assert publish_rows(local, "run", *[make_row(key, fetch_s=float(key)) for key in reversed(keys)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    file = pq.ParquetFile(pa.BufferReader(local.read_bytes("predictions/c00000001.parquet")))
    assert file.num_row_groups == 60
    assert file.read()["scan_id"].to_pylist() == keys
    assert file.read()["fetch_s"].to_pylist() == [float(key) for key in keys]


def test_no_room_for_the_object_on_this_machine_is_a_storage_error(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="gone: no folder for temporary files"):
        publish_rows(local, "run", make_row("a"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert publish_rows(local, "run", make_row("a")) == 1


def test_more_parts_take_no_more_memory(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 1.6 kB, no more are held when a part is read, however many have been checked and written before."""
    monkeypatch.setattr(commit, "ROW_GROUP_ROWS", 32)
    monkeypatch.setattr(staged, "PIECE_ROWS", 32)
    row = make_row("a") | {"cam_depth_profile": [0.5] * 400, "run_id": "run"}

    def find_peak(num_parts: int) -> int:
        keys, held = [f"{number:03d}" for number in range(num_parts)], []

        def read(columns: list[str]) -> Iterator[Any]:
            for key in keys:
                held.append(pa.total_allocated_bytes())
                yield make_table([row | {"source": key, "scan_id": f"{key}#{scan}"} for scan in range(8)]).select(
                    columns
                )

        rows = StagedRows(read)
        check_rows(keys, rows, ORIGIN)
        assert publish(local.child(str(num_parts)), "run", rows, make_listing(0), ORIGIN) == 1
        return max(held) - held[0]

    assert find_peak(120) - find_peak(30) < 90 * 8 * 1600 / 5


# The gate before publishing


def test_sound_rows_pass() -> None:
    rows = [make_row("a#1"), make_row("a#2", "ERR_TIMEOUT"), make_row("caf\udce9", "SKIP_NO_LUNG")]
    check_rows(["a", "caf\udce9"], stage(rows), ORIGIN)
    check_rows([], stage([]), ORIGIN)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([make_row("a")], "row 2 of the run's plan.parquet is planned, but has no row"),
        ([make_row("a"), make_row("b"), make_row("c")], "row 3 of .* names, has rows, but was not planned"),
        ([make_row("a"), make_row("b"), make_row("b")], "row 3 of .* names, has a scan twice"),
        ([make_row("a"), make_row("b", "FINE")], "row 2 of .* names, has an unknown status"),
        ([make_row("a"), make_row("b", model_sha256="n")], "row 2 of .* names, has another model"),
        ([make_row("a"), make_row("b", probability_cp=None)], "row 2 of .* names, is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=math.nan)], "row 2 of .* names, is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=math.inf)], "row 2 of .* names, is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=0.21)], "row 2 of .* names, is OK, but"),
        ([make_row("a"), make_row("b", probability_cp=-0.2, probability_normal=0.5)], "row 2 of .* names, is OK, but"),
        ([make_row("a"), make_row("b", prediction="CP")], "row 2 of .* names, predicts another class"),
        ([make_row("a"), make_row("b", prediction=None)], "row 2 of .* names, predicts another class"),
        ([make_row("a"), make_row("b", "BAD_TILT", probability_ncp=0.5)], "row 2 of .* names, has a probability"),
        ([make_row("a"), make_row("b", "SKIP_NO_LUNG", prediction="CP")], "row 2 of .* names, has a probability"),
    ],
)
def test_unsound_rows_are_told_by_their_number(rows: list[dict[str, Any]], complaint: str) -> None:
    """A log is told no name, which may be a patient's; a person what to do."""
    start = f"^results rows are wrong: the source in {complaint}.*; nothing is published; .*say --discard$"
    with pytest.raises(RunError, match=start) as caught:
        check_rows(["a", "b"], stage(rows), ORIGIN, "say --discard")
    assert ("start the same night again" in str(caught.value)) == ("has no row" in complaint)


def test_a_row_that_is_wrong_is_counted_among_all_that_were_staged() -> None:
    """Also those of a source that another part has without an error, and that count for nothing."""
    rows = [make_row("a", "ERR_TIMEOUT"), make_row("a"), make_row("b", "FINE"), make_row("c", "FINE")]
    with pytest.raises(RunError, match=r"row 3 of .* has an unknown status \(and 1 more\)") as caught:
        check_rows(["a", "b", "c"], stage(rows, rows_per_part=1), ORIGIN)
    assert "'" not in str(caught.value).replace("run's", "")
