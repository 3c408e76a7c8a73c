"""A run knows what is settled, keeps its plan, and goes on where it was killed."""

import json
import os
import tracemalloc
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from darnet.errors import ObjectMissing, RunError, Status, StorageError, UsageError
from darnet.publishing.commit import check_rows, publish
from darnet.publishing.origin import Origin
from darnet.publishing.rows import Reason, spell_key
from darnet.publishing.runs import PlannedSource, RunFolder, Work, find_unfinished, name_part, sort_unfinished
from darnet.publishing.scored_keys import read_scored_keys
from darnet.scan import Source
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore
from tests.results_fixtures import (
    MODEL,
    ODD_KEYS,
    ORIGIN,
    WORK,
    begin_run,
    flip_bit,
    has_plan,
    make_listing,
    make_row,
    make_source,
    publish_rows,
    read_plan,
    read_statuses,
)

# A plan and its parts


def test_a_plan_comes_back_as_written(store: Store) -> None:
    sources = [make_source(key) for key in ODD_KEYS]
    for number, reason in enumerate(Reason, 1):
        folder = begin_run(store, *sources, reason=reason, night=number)
        assert has_plan(folder)
        assert read_plan(folder) == [PlannedSource(source, reason) for source in sources]
        assert folder.list_planned_sources() == [source.key for source in sources]
        assert not has_plan(RunFolder(store, folder.run_id[:-1]))


def test_a_plan_larger_than_a_batch_keeps_its_order(local: Store) -> None:
    sources = [Source(f"{number:05d}", make_source("x").objects * 100) for number in range(250)]  # 50,000 objects
    folder = begin_run(local, *sources)
    assert folder.list_planned_sources() == [source.key for source in sources]
    assert folder.read_sources(range(250)) == sources


def test_some_sources_are_read_by_their_places(store: Store) -> None:
    """Wherever the plan's row groups end, and in the plan's order."""
    sources = [Source(f"{number:05d}", make_source(str(number)).objects * 4_000) for number in range(9)]  # 3 a group
    folder = begin_run(store, *sources)
    for places in ([4], [8, 0], [2, 3], [1, 5, 6, 7], range(9)):
        assert folder.read_sources(places) == [sources[place] for place in sorted(places)]


def test_a_driver_holds_no_object_of_its_plan(local: Store) -> None:
    """120,000 of them would take some 30 MB of Python's memory alone."""
    sources = [Source(f"{number:05d}", make_source("x").objects * 300) for number in range(200)]
    folder = begin_run(local, *sources)
    del sources
    tracemalloc.start()
    assert len(folder.list_planned_sources()) == 200
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_plan_that_a_node_cannot_see_is_named(local: Store) -> None:
    for folder in (RunFolder(local, "run"), RunFolder(open_store(f"{local.uri}/elsewhere"), "run")):
        with pytest.raises(ObjectMissing, match=r"_runs/run/plan\.parquet: no such object; every node must see"):
            folder.read_sources([0])


def test_the_same_work_has_the_same_id_and_any_other_another(local: Store) -> None:
    def name(*keys: str, version: str = "1", **changes: Any) -> str:
        return begin_run(local, *[make_source(key, version) for key in keys], **changes).run_id

    base = name("a", "b")
    assert base == name("a", "b")
    works = [replace(WORK, **{field: "other"}) for field in Work.__dataclass_fields__]
    others = [name("a"), name("b", "a"), name("a", "b", version="2"), name("a", "b", night=2)]
    others += [name("a", "b", work=work) for work in works]
    assert len({base, *others}) == 1 + 4 + 5
    assert base.startswith("20300101-")


def test_a_record_comes_back_as_written(store: Store) -> None:
    folder = begin_run(store, make_source("a"), night=3)
    record = folder.read_record()
    assert record.run_id == folder.run_id
    assert (record.night, record.work, record.listing) == (date(2030, 1, 3), WORK, make_listing(0))
    told = json.loads(store.read_bytes(folder.locate("run.json")))
    assert (told["origin"]["archive"], told["night"], told["last_commit"]) == ("/archive", "2030-01-03", 0)
    assert told["notice"] == "research use only"


def test_a_run_of_the_same_name_and_other_parameters_is_refused(store: Store) -> None:
    begin_run(store, make_source("a"), run_id="run")
    with pytest.raises(UsageError, match="another night, plan_sha256; move the folder away"):
        begin_run(store, make_source("b"), run_id="run", night=2)
    assert RunFolder(store, "run").list_planned_sources() == ["a"]


def test_the_first_plan_of_a_run_holds(store: Store) -> None:
    """Of two drivers that begin the same run, whatever each saw."""
    for reason in (Reason.NEW, Reason.RETRY):
        folder = begin_run(store, make_source("a"), reason=reason)
    assert read_plan(folder) == [PlannedSource(make_source("a"), Reason.NEW)]


def test_a_plan_that_somebody_changed_is_refused(local: Store) -> None:
    folder, other = (begin_run(local, make_source(key)) for key in "ab")
    local.write_bytes(folder.locate("plan.parquet"), local.read_bytes(other.locate("plan.parquet")))
    with pytest.raises(UsageError, match=f"--discard {folder.run_id}"):
        folder.list_planned_sources()


# What to finish first


def find_ids(store: Store, work: Work = WORK) -> list[str]:
    return [folder.run_id for folder in find_unfinished(store, work)]


def test_runs_of_the_same_work_that_never_ended_are_finished_first(store: Store) -> None:
    assert find_ids(store) == []
    later, first = (begin_run(store, make_source(key), night=night) for key, night in (("a", 2), ("b", 1)))
    for field in set(Work.__dataclass_fields__) - {"origin"}:
        begin_run(store, make_source("a"), work=replace(WORK, **{field: "other"}))
    for field in Origin.__dataclass_fields__:
        begin_run(store, make_source("a"), work=replace(WORK, origin=replace(ORIGIN, **{field: "other"})))
    assert find_ids(store) == [first.run_id, later.run_id]


def test_a_run_is_finished_on_the_kind_of_device_it_was_begun_on(local: Store) -> None:
    """A preview, which asks no cluster, finds it whatever that is."""
    on_gpus = begin_run(local, make_source("a"), work=replace(WORK, device="gpu"))
    older = begin_run(local, make_source("b"), work=replace(WORK, device=""))  # begun before runs had devices
    assert json.loads(local.read_bytes(on_gpus.locate("run.json")))["device"] == "gpu"
    assert "device" not in json.loads(local.read_bytes(older.locate("run.json")))
    assert older.read_record().work == replace(WORK, device="")
    assert find_ids(local) == []
    assert find_ids(local, replace(WORK, device="gpu")) == [on_gpus.run_id]
    assert set(find_ids(local, replace(WORK, device=""))) == {on_gpus.run_id, older.run_id}


def test_runs_of_other_work_are_named_with_what_they_have_otherwise(local: Store) -> None:
    own, published = (
        begin_run(local, make_source("a")),
        begin_run(local, make_source("b"), work=replace(WORK, device="gpu")),
    )
    publish_rows(local, published.run_id, make_row("b"))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"origin": replace(ORIGIN, archive="/elsewhere")}, "another archive, secret or way of names"),
        ({"model_sha256": "n"}, "another model"),
        ({"preprocessing_version": "2-abc", "device": "gpu"}, "another preprocessing, another device (gpu)"),
        ({"settings_sha256": "t"}, "other settings (score.*)"),
        ({"device": ""}, "another device (unknown)"),
    ]
    expected = {
        begin_run(local, make_source("a"), work=replace(WORK, **change)).run_id: told for change, told in changes
    }
    assert sort_unfinished(local, WORK) == ([own], expected)
    assert sort_unfinished(local, replace(WORK, model_sha256="o"))[0] == []


def test_what_ended_is_not_finished_again(store: Store) -> None:
    published, ended, held, discarded, planless = (begin_run(store, make_source(key)) for key in "abcde")
    publish_rows(store, published.run_id, make_row("a"))
    ended.write_end(None)
    store.write_bytes(held.locate("HELD.json"), b"{}")
    discarded.delete_work()
    store.delete(planless.locate("plan.parquet"))
    assert find_ids(store) == []


def test_a_changed_record_is_refused(local: Store) -> None:
    folder = begin_run(local, make_source("a"))
    told = local.read_bytes(folder.locate("run.json"))
    local.write_bytes(folder.locate("run.json"), told.replace(b"2030-01-01", b"2030-01-02"))
    with pytest.raises(UsageError, match="somebody changed it"):
        find_unfinished(local, WORK)
    local.write_bytes(folder.locate("run.json"), told[:40])
    with pytest.raises(UsageError, match=r"run\.json: damaged"):
        find_unfinished(local, WORK)


# Staged parts


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
    assert sorted(folder.read_parts().keys["source"].to_pylist()) == sorted(map(spell_key, ODD_KEYS))


def test_a_source_in_two_parts_counts_once_and_whole(local: Store) -> None:
    folder = RunFolder(local, "run")
    folder.write_part("1", [make_row("a#1"), make_row("a#2"), make_row("b")])
    folder.write_part("2", [make_row("b", "ERR_TIMEOUT"), make_row("a#1", "ERR_TIMEOUT"), make_row("c")])
    rows = folder.read_parts().keys.select(["scan_id", "status"]).to_pylist()
    assert [(row["scan_id"], row["status"]) for row in rows] == [(name, "OK") for name in ("a#1", "a#2", "b", "c")]


def test_a_part_of_which_a_bit_flipped_is_not_read(local: Store) -> None:
    """Every 397th byte, one bit of it: of pages, of their headers and of the footer."""
    folder = RunFolder(local, "run")
    folder.write_part("p", [make_row("a"), make_row("b", "BAD_TILT")])
    (key,) = [item.key for item in local.list_objects()]
    sound = local.read_bytes(key)
    for place in range(0, len(sound), 397):
        local.write_bytes(key, flip_bit(sound, place))
        with pytest.raises(StorageError, match=r"damaged; delete it, and what is in it is made again"):
            folder.read_parts()
        with pytest.raises(StorageError, match="damaged"):
            folder.list_staged_sources()


def test_a_plan_of_which_a_bit_flipped_is_refused(local: Store) -> None:
    """All of it but the reason, which people read."""
    folder = begin_run(local, make_source("a"), make_source("b"))
    key = folder.locate("plan.parquet")
    sound, planned = local.read_bytes(key), folder.read_sources([0, 1])
    refused = 0
    for place in range(0, len(sound), 19):
        local.write_bytes(key, flip_bit(sound, place))
        try:
            assert folder.list_planned_sources() == ["a", "b"]
            assert folder.read_sources([0, 1]) == planned
        except (StorageError, UsageError) as error:
            assert "plan.parquet" in str(error)  # noqa: PT017
            refused += 1
    assert refused > len(sound) // 19 // 4


# A run as a whole


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_of_a_source_scored_twice_the_rows_without_an_error_count(local: Store, names: tuple[str, str]) -> None:
    folder = begin_run(local, make_source("s"))
    folder.write_part(names[0], [make_row("s", "ERR_STORAGE", run_id=folder.run_id)])
    folder.write_part(names[1], [make_row("s", run_id=folder.run_id)])
    assert folder.read_parts().keys["status"].to_pylist() == ["OK"]


def test_a_source_planned_twice_is_not_published(local: Store) -> None:
    folder = begin_run(local, make_source("s"))
    folder.write_part("p", [make_row("s", run_id=folder.run_id)])
    with pytest.raises(RunError, match=r"in row 2 of the run's plan\.parquet is planned twice"):
        check_rows(["s", "s"], folder.read_parts(), ORIGIN)


def test_a_restarted_run_scores_what_is_missing_and_publishes_once(store: Store) -> None:
    folder = begin_run(store, *map(make_source, "abc"), run_id="run")
    folder.write_part(name_part("ab"), [make_row("a"), make_row("b", "BAD_TILT")])
    # Here the first driver dies; what follows knows only the store and the run's name.
    folder = RunFolder(open_store(store.uri), "run")
    missing = set(folder.list_planned_sources()) - folder.list_staged_sources()
    assert missing == {"c"}
    folder.write_part(name_part(missing), [make_row("c")])
    check_rows(folder.list_planned_sources(), folder.read_parts(), ORIGIN)
    assert publish(store, "run", folder.read_parts(), make_listing(0), ORIGIN) == 1
    assert publish(store, "run", folder.read_parts(), make_listing(0), ORIGIN) == 1
    assert read_statuses(store, latest=False) == {"a": "OK", "b": "BAD_TILT", "c": "OK"}


def test_odd_names_on_disk_reach_the_table_and_the_plan(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.nii", "wb"):  # noqa: PTH123
        pass
    (item,) = LocalStore(tmp_path).list_objects()
    results = open_store(str(tmp_path / "results"))
    source = Source(item.key, (item,))
    folder = begin_run(results, source)
    publish_rows(results, "run", make_row(source.key, "BAD_TRUNCATED", input_sha256=source.input_sha256))
    assert folder.read_sources([0]) == [source]
    assert read_statuses(results) == {"caf\\xe9.nii": Status.BAD_TRUNCATED}
    with read_scored_keys(results, MODEL, "1-abc", ORIGIN) as keys:
        assert keys.find_reasons([source]) == [None]
