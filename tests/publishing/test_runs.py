"""A run knows what is settled, keeps its plan, and goes on where it was killed."""

import os
from pathlib import Path

import pytest

from darnet.errors import Status, UsageError
from darnet.publishing.commit import check_rows, publish
from darnet.publishing.rows import spell_key
from darnet.publishing.runs import PlannedSource, Reason, RunFolder, name_part, read_scored_keys
from darnet.scan import Source
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore
from tests.results_fixtures import MODEL, ODD_KEYS, make_row, make_source, publish_rows, read_statuses

# A plan and its parts


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
