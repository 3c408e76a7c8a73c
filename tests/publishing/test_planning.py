"""A night plans what is selected and not settled, in the archive's order, without ever holding the archive."""

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from darnet.archive import EVERYTHING, Selection, list_sources
from darnet.errors import RunError, StorageError, UsageError
from darnet.publishing import planning
from darnet.publishing.objects import Listing, list_commits
from darnet.publishing.planning import AHEAD_LOOKUPS, LOOKUP_OBJECTS, Survey, plan_night, preview_night, survey_archive
from darnet.publishing.rows import Reason
from darnet.publishing.runs import PlannedSource, RunFolder
from darnet.publishing.scored_keys import read_scored_keys
from darnet.scan import Source, StoredObject
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore
from tests.results_fixtures import MODEL, ORIGIN, WORK, begin_run, make_row, publish_rows, read_plan
from tests.small_disk import MountRefused, mount_small_disk

NIGHT = date(2030, 1, 1)
MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)
MIDNIGHT_S = MIDNIGHT.timestamp()


class ListedStore:
    """An archive that is nothing but a listing; `before_page` may do anything before each object."""

    uri = "/archive"

    def __init__(
        self, objects: Sequence[StoredObject] | Callable[[], Iterator[StoredObject]], before: Any = lambda _: None
    ) -> None:
        self._objects, self._before = objects, before

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        self._before(prefix)
        for item in self._objects if isinstance(self._objects, Sequence) else self._objects():
            if item.key.startswith(prefix):
                yield item


def list_slices(*keys: str, num_slices: int = 2, age_s: float = 1e6) -> list[StoredObject]:
    keys = tuple(f"{key}/{number:03d}.dcm" for key in keys for number in range(num_slices))
    return [StoredObject(key, 10, "v", MIDNIGHT_S - age_s) for key in sorted(keys, key=str.encode)]


def survey(archive: Any, results: Store, selection: Selection = EVERYTHING) -> tuple[list[PlannedSource], Survey]:
    counted = Survey()
    with read_scored_keys(results, MODEL, "1-abc", ORIGIN) as keys:
        return list(survey_archive(archive, keys, selection, MIDNIGHT_S, counted)), counted


def list_keys(planned: Sequence[PlannedSource]) -> list[str]:
    return [item.source.key for item in planned]


def publish_sources(results: Store, *sources: Source, status: str = "OK", **changes: Any) -> None:
    rows = [make_row(item.key, status, input_sha256=item.input_sha256, **changes) for item in sources]
    publish_rows(results, f"run{len(list_commits(results))}", *rows)


def plan(archive: Any, results: Store, selection: Selection = EVERYTHING, night: date = NIGHT) -> RunFolder | None:
    return plan_night(archive, results, WORK, night, selection).folder


# What is planned


def test_what_a_lost_object_of_the_table_held_is_planned_again(local: Store) -> None:
    """Restoring without a copy: only the number stays a gap."""
    archive = ListedStore(list_slices("a", "b", "c"))
    for item in survey(archive, local)[0]:
        publish_sources(local, item.source)
    assert survey(archive, local)[0] == []
    local.delete("predictions/c00000002.parquet")
    (again,) = survey(archive, local)[0]
    assert (again.source.key, again.reason) == ("b", Reason.NEW)
    publish_rows(local, "again", make_row("b", input_sha256=again.source.input_sha256))
    assert [key.removeprefix("predictions/c0000000") for key in list_commits(local)] == [
        "1.parquet",
        "3.parquet",
        "4.parquet",
    ]
    assert survey(archive, local)[0] == []


def test_every_source_is_planned_once_in_the_order_of_the_listing(local: Store) -> None:
    objects = list_slices(*(f"ct/{number:03d}" for number in range(300)))
    planned, counted = survey(ListedStore(objects), local)
    assert [item.source for item in planned] == list(list_sources(objects))
    assert counted == Survey(300, 300, 0, {Reason.NEW: 300})  # type: ignore[arg-type]


def test_several_prefixes_give_what_one_listing_would(local: Store) -> None:
    """Whatever order the threads come in, and whatever is settled already."""
    rng = random.Random(1)
    folders = [f"{year}/{month:02d}" for year in (2024, 2025, 2026) for month in range(1, 13)]
    objects = list_slices(*(f"{folder}/{number}" for folder in folders for number in range(rng.randint(0, 90))))
    sources = list(list_sources(objects))
    publish_sources(local, *rng.sample(sources, 200))
    everything = list_keys(survey(ListedStore(objects), local)[0])
    chosen = rng.sample(folders, 25)

    def dawdle(prefix: str) -> None:
        threading.Event().wait(len(prefix) * rng.random() / 500)

    for prefixes in (chosen, ["2024", "2025/0", "2026"], [*chosen, ""]):
        expected = [key for key in everything if f"{key}/".startswith(tuple(prefixes))]
        found = survey(ListedStore(objects, dawdle), local, Selection(tuple(prefixes)))
        assert list_keys(found[0]) == expected
        assert found[1].reasons == {Reason.NEW: len(expected)}


def test_prefixes_are_listed_at_the_same_time(local: Store) -> None:
    """None of the three listings begins before all have been asked for."""
    together = threading.Barrier(3, timeout=30)
    archive = ListedStore(list_slices("a/1", "b/1", "c/1"), lambda _: together.wait())
    assert list_keys(survey(archive, local, Selection(("c", "a", "b")))[0]) == ["a/1", "b/1", "c/1"]


def test_sources_come_while_the_listing_still_streams(local: Store) -> None:
    """A thousand times what may be held is listed; the first source is there before the second half is asked for."""
    asked = []

    def stream() -> Iterator[StoredObject]:
        for number in range(10 * LOOKUP_OBJECTS):
            asked.append(number)
            yield StoredObject(f"ct/{number:08d}.nii", 1, "v")

    with read_scored_keys(local, MODEL, "1-abc", ORIGIN) as keys:
        found = survey_archive(ListedStore(stream), keys, EVERYTHING, MIDNIGHT_S, Survey())  # type: ignore[arg-type]
        assert next(found).source.key == "ct/00000000.nii"
        most = (AHEAD_LOOKUPS + 2) * LOOKUP_OBJECTS  # one lookup is being read, and one waits for room
        deadline_s = time.monotonic() + 30
        while len(asked) < most and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)
        assert most <= len(asked) <= most + 1
        found.close()
        assert len(asked) <= most + 1


def test_a_prefix_is_listed_on_while_another_blocks(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answers on only when the second is through, which has several times what one lookup takes."""
    monkeypatch.setattr(planning, "LOOKUP_OBJECTS", 50)
    is_through = threading.Event()

    class BlockingStore(ListedStore):
        def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
            for number, item in enumerate(super().list_objects(prefix)):
                assert prefix != "a" or number < 60 or is_through.wait(5), "the second prefix is not listed on"
                yield item
            if prefix == "b":
                is_through.set()

    objects = [StoredObject(f"{prefix}/{number:03d}.nii", 1, "v") for prefix in "ab" for number in range(200)]
    planned, counted = survey(BlockingStore(objects), local, Selection(("a", "b")))
    assert list_keys(planned) == [item.key for item in objects]
    assert counted.selected == 400


def test_an_error_behind_the_listing_leaves_no_thread_that_waits(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would wait for it at its end, for ever."""
    monkeypatch.setattr(planning, "LOOKUP_OBJECTS", 5)
    archive = ListedStore([StoredObject(f"{number:04d}.nii", 1, "v") for number in range(500)])
    before = set(threading.enumerate())

    def fail() -> str:
        raise RuntimeError("another Python answers")

    with pytest.raises(RuntimeError, match="another Python") as caught:
        plan_night(archive, local, replace(WORK, device=""), NIGHT, EVERYTHING, fail)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before
    del caught  # which kept every frame until now


def test_trouble_in_one_listing_ends_planning(local: Store) -> None:
    def fail(prefix: str) -> None:
        if prefix == "b":
            raise StorageError("the store failed")

    with pytest.raises(StorageError, match="the store failed"):
        survey(ListedStore(list_slices("a/1", "b/1", "c/1"), fail), local, Selection(("a", "b", "c")))


def test_trouble_in_one_listing_ends_the_others(local: Store) -> None:
    """The other one would go on for millions of objects without finding anything."""
    asked, has_begun = [], threading.Event()

    def stream() -> Iterator[StoredObject]:
        for number in range(5_000_000):
            asked.append(number)
            has_begun.set()
            yield StoredObject(f"b/{number:08d}.nii", 1, "v")

    def fail(prefix: str) -> None:
        if prefix == "a":
            has_begun.wait(30)
            raise StorageError("the store failed")

    with pytest.raises(StorageError, match="the store failed"):
        survey(ListedStore(stream, fail), local, Selection(("a", "b"), glob="a*"))
    assert 0 < len(asked) < 5_000_000


def test_an_archive_without_a_source_is_a_mistyped_address(local: Store) -> None:
    archive = ListedStore(list_slices("ct/1"))
    with pytest.raises(UsageError, match=r"nothing in it below xt or 2027 looks like a scan"):
        survey(archive, local, Selection(("xt", "2027")))
    assert survey(archive, local, Selection(("xt", "ct")))[1].listed == 1
    for selection in (Selection(glob="*/torax/*"), Selection(("ct/1/00",))):  # which is within a source
        with pytest.raises(UsageError, match=r"of 1 sources.* none matches"):
            survey(archive, local, selection)
    late = datetime.fromtimestamp(MIDNIGHT_S, UTC)
    assert survey(archive, local, Selection(since=late))[1] == Survey(listed=1)  # a quiet night


@pytest.mark.parametrize(
    ("prefixes", "glob", "empty"),
    [
        (("ct/1", "xt", "mr"), "*", ["xt"]),
        (("ct", "ct/2"), "*", ["ct/2"]),  # within another, which is listed in its place
        (("ct/1/00", "mr"), "*", ["ct/1/00"]),  # within a source
        (("ct", "mr"), "ct/*", ["mr"]),
        (("", "mr", "mr"), "*", []),
        ((), "*", []),
    ],
)
def test_a_prefix_among_others_that_selects_nothing_is_named(
    local: Store, capsys: pytest.CaptureFixture[str], prefixes: tuple[str, ...], glob: str, empty: list[str]
) -> None:
    archive = ListedStore(list_slices("ct/1", "mr/1"))
    for selection in (Selection(prefixes, glob=glob), Selection(prefixes, MIDNIGHT, glob)):  # a quiet night is none
        assert survey(archive, local, selection)[1].describe()["empty_prefixes"] == empty
        told = capsys.readouterr().err
        assert [line for line in told.splitlines() if "selects nothing" in line] == [
            f"prefix {prefix!r} selects nothing; is it right?" for prefix in empty
        ]


def test_only_what_is_selected_and_has_settled_is_planned(local: Store) -> None:
    fresh, old = list_slices("ct/fresh", age_s=60), list_slices("ct/old", "mr/old", age_s=9e5)
    archive = ListedStore(sorted(fresh + old, key=lambda item: item.key))
    planned, counted = survey(archive, local, Selection(settle_s=1800, glob="ct/*"))
    assert list_keys(planned) == ["ct/old"]
    assert (counted.listed, counted.selected, counted.waiting) == (3, 2, 1)
    since = datetime.fromtimestamp(MIDNIGHT_S - 3600, UTC)
    assert list_keys(survey(archive, local, Selection(since=since))[0]) == ["ct/fresh"]


def test_a_settled_source_does_not_wait(local: Store) -> None:
    """Waiting are only those that would be scored."""
    objects = list_slices("a", "b", age_s=60)
    publish_sources(local, next(list_sources(objects)))
    planned, counted = survey(ListedStore(objects), local, Selection(settle_s=1800))
    assert (planned, counted.waiting) == ([], 1)


def test_a_source_of_a_wrong_year_is_scored_and_the_summary_says_so(
    local: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a clock some minutes ahead waits, though it is ahead by more than what sources settle in.

    A log is told the row and no name, which may be a patient's.
    """
    late = list_slices("ct/Doe^Jane", "ct/Roe^Rick", age_s=-2 * 86_400)
    objects = [*list_slices("ahead", age_s=-300), *list_slices("ct/Doe^Ann", age_s=300), *late]
    for prefixes in ((), ("ahead/", "ct/"), ("ct/Doe^A", "ct/Doe^J", "ct/R")):
        planned, counted = survey(ListedStore(objects), local, Selection(prefixes, settle_s=60))
        assert list_keys(planned) == ["ct/Doe^Ann", "ct/Doe^Jane", "ct/Roe^Rick"]
        assert (counted.misdated, counted.first_misdated) == (2, 2)
        told = capsys.readouterr().err
        assert "2 sources are dated more than a day ahead, the first in row 2 of the run's plan.parquet" in told
        assert "^" not in told.replace("prefix 'ct/Doe^A'", "")
    summary = counted.describe()
    assert summary["misdated_sources"] == 2
    assert survey(ListedStore(objects), local)[1].misdated == 0  # nothing settles


# The run


def test_nothing_new_begins_no_run(store: Store) -> None:
    objects = list_slices("a", "b")
    publish_sources(store, *list_sources(objects))
    assert plan(ListedStore(objects), store) is None
    assert list(store.list_objects("_runs/")) == []


def test_a_run_holds_its_plan_and_what_it_was_made_of(store: Store) -> None:
    objects = list_slices("a", "b", "c")
    a, b, c = list_sources(objects)
    publish_sources(store, a)
    publish_sources(store, b, status="ERR_TIMEOUT")
    folder = plan(ListedStore(objects), store, Selection(("a", "b", "c"), settle_s=5))
    assert folder is not None
    assert read_plan(folder) == [PlannedSource(b, Reason.RETRY), PlannedSource(c, Reason.NEW)]
    record = folder.read_record()
    assert (record.run_id, record.work, record.night) == (folder.run_id, WORK, NIGHT)
    assert record.listing.last_commit == 2
    assert record.selection == {"prefixes": ["a", "b", "c"], "since": None, "glob": "*", "settle_s": 5}


def test_a_run_keeps_the_device_that_is_chosen_once_there_is_something_to_score(local: Store) -> None:
    """A night with nothing new asks no cluster."""
    asked: list[str] = []

    def choose() -> str:
        asked.append("gpu")
        return "gpu"

    unplaced, archive = replace(WORK, device=""), ListedStore(list_slices("a"))
    folder = plan_night(archive, local, unplaced, NIGHT, EVERYTHING, choose).folder  # type: ignore[arg-type]
    assert folder is not None
    assert folder.read_record().work == replace(WORK, device="gpu")
    publish_sources(local, *list_sources(list_slices("a")))
    assert plan_night(archive, local, unplaced, NIGHT, EVERYTHING, choose).folder is None  # type: ignore[arg-type]
    assert asked == ["gpu"]


def test_a_listing_lies_between_what_was_written_before_and_after_it(store: Store) -> None:
    """By the store's times, which are the same for all drivers, whatever their own clocks say."""

    def read_time(key: str) -> float:
        store.write_bytes(key, b"")
        return next(item.modified_s for item in store.list_objects(key))

    during: list[float] = []
    archive = ListedStore(list_slices("a"), lambda _: during.append(read_time("during")))
    before_s = read_time("before")
    folder = plan(archive, store)
    assert folder is not None
    listing, after_s = folder.read_record().listing, read_time("after")
    times = [before_s, listing.started_at.timestamp(), *during, listing.ended_at.timestamp(), after_s]
    whole_s = [int(time_s) if store.uri.startswith("s3") else time_s for time_s in times]
    assert whole_s == sorted(whole_s)


class LateStore(LocalStore):
    """A results store whose clock is years ahead of this machine's."""

    def read_clock(self) -> datetime:
        return MIDNIGHT


def test_times_are_the_results_store_s(tmp_path: Path) -> None:
    archive = ListedStore([*list_slices("a", age_s=59), *list_slices("b", age_s=61)])
    folder = plan(archive, LateStore(tmp_path), Selection(settle_s=60))
    assert folder is not None
    assert folder.list_planned_sources() == ["b"]
    assert folder.read_record().listing == Listing(0, MIDNIGHT, MIDNIGHT)


def test_a_run_that_ended_in_vain_is_not_gone_on_from(store: Store) -> None:
    """What was put right meanwhile is tried in the same night: the old run's parts say that it failed."""
    archive = ListedStore(list_slices("a"))
    first = plan(archive, store)
    assert first is not None
    first.write_end(None)
    second = plan(archive, store)
    assert second is not None
    assert second.run_id != first.run_id
    assert second.read_record().run_id == second.run_id
    assert plan(archive, store) == second


def test_after_a_discard_the_same_night_is_a_run_that_an_old_driver_cannot_reach(store: Store) -> None:
    archive = ListedStore(list_slices("a"))
    old = plan(archive, store)
    assert old is not None
    store.write_bytes(old.locate("DISCARDED.json"), b"{}")
    old.delete_work()
    new = plan(archive, store)
    assert new is not None
    assert new.run_id != old.run_id
    old.write_part("p", [make_row("a", run_id=old.run_id)])  # its driver lives on
    assert new.list_staged_sources() == set()
    assert plan(archive, store) == new
    with pytest.raises(RunError, match="discarded"):
        old.refuse_if_discarded()


def test_the_same_night_again_is_the_same_run(local: Store) -> None:
    archive = ListedStore(list_slices("a", "b"))
    first, again, next_night = (plan(archive, local, night=date(2030, 1, day)) for day in (1, 1, 2))
    other = plan(archive, local, Selection(("a",)))
    changed = plan(ListedStore(list_slices("a", "c")), local)
    assert first == again
    assert len({folder.run_id for folder in (first, next_night, other, changed) if folder}) == 4


def test_a_full_temporary_disk_is_named(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of 5,000 names that do not compress, on 32 KiB; and no disk at all."""
    rng = random.Random(0)
    names = sorted(rng.randbytes(24).hex() for _ in range(5_000))
    archive = ListedStore([StoredObject(f"{name}.nii", 10, "v") for name in names])
    try:
        with mount_small_disk(tmp_path / "disk", 32) as disk:
            for place, told in (
                (disk, "cannot write a plan .*; check rights, space"),
                (disk / "gone", "no folder for"),
            ):
                monkeypatch.setattr(tempfile, "tempdir", str(place))
                with pytest.raises(StorageError, match=f"{place}: {told}"):
                    plan(archive, local)
    except MountRefused as refused:
        pytest.skip(str(refused))
    assert list(local.list_objects("_runs/")) == []


def test_what_is_published_during_the_listing_is_not_known_to_the_plan(local: Store) -> None:
    """Else rows of a run that listed the archive after us would count as older than ours."""
    objects = list_slices("a", "b")

    def publish_meanwhile(_: str) -> None:
        publish_sources(local, next(list_sources(objects)))

    folder = plan(ListedStore(objects, publish_meanwhile), local)
    assert folder is not None
    assert folder.read_record().listing.last_commit == 0
    assert folder.list_planned_sources() == ["a", "b"]


# A preview


def test_a_preview_counts_and_says_all_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = open_store(str(tmp_path / "results"))
    objects = [*list_slices("a", "b", "c", "d", "e"), *list_slices("f", age_s=1)]
    a, b, c, d, *_ = list_sources(objects)
    publish_sources(results, a, c)
    publish_sources(results, b, status="ERR_TIMEOUT")
    publish_sources(results, d, model_sha256="n" * 64)
    publish_rows(results, "last", make_row("c", input_sha256="j" * 64))
    begun, other = begin_run(results, b), begin_run(results, a, work=replace(WORK, model_sha256="n" * 64))
    before = sorted(tmp_path.rglob("*"))
    archive = ListedStore([item if item.key[0] != "c" else StoredObject(item.key, 11, "w") for item in objects])
    summary = preview_night(archive, results, WORK, Selection(settle_s=60), lambda: MIDNIGHT)  # type: ignore[arg-type]
    assert summary["reasons"] == {"new": 1, "changed": 1, "other model": 1, "retry": 1}
    assert (summary["planned_sources"], summary["waiting_sources"], summary["listed_sources"]) == (4, 1, 6)
    assert (summary["unfinished_runs"], summary["published"]) == ([begun.run_id], None)
    assert summary["left_behind_runs"] == {other.run_id: "another model"}
    told = capsys.readouterr()
    assert f"run {other.run_id} is unfinished and left as it is: it has another model" in told.err
    assert f"--discard {other.run_id}" in told.err
    assert [json.loads(line) for line in told.out.splitlines()] == [
        {"source": "b", "reason": "retry", "objects": 2, "bytes": 20},
        {"source": "c", "reason": "changed", "objects": 2, "bytes": 22},
        {"source": "d", "reason": "other model", "objects": 2, "bytes": 20},
        {"source": "e", "reason": "new", "objects": 2, "bytes": 20},
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_preview_makes_no_place_for_results(tmp_path: Path) -> None:
    results = open_store(str(tmp_path / "results"))
    archive = ListedStore(list_slices("a"))
    assert preview_night(archive, results, WORK, EVERYTHING, lambda: MIDNIGHT)["planned_sources"] == 1  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
