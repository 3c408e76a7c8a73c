"""A table is of one archive, of one way to name scans, and of one secret of patients' keys."""

from dataclasses import replace
from pathlib import Path

import pytest

from darnet.errors import RunError, UsageError
from darnet.pseudonym import PSEUDONYM_VARIABLE, KeyNames, mark_secret
from darnet.publishing.commit import check_rows, publish
from darnet.publishing.hold import decide_hold, list_held_runs
from darnet.publishing.objects import list_commits
from darnet.publishing.origin import Origin
from darnet.publishing.runs import RunFolder, find_unfinished
from darnet.publishing.scored_keys import read_scored_keys
from darnet.settings import ScoreSettings
from darnet.storage import Store
from tests.publishing.test_check import put_object
from tests.results_fixtures import (
    MODEL,
    ORIGIN,
    WORK,
    begin_run,
    list_commit_numbers,
    make_listing,
    make_row,
    make_source,
    publish_rows,
    stage,
)

SECRET, OTHER = "a secret of thirty-two bytes or more", "another one of thirty-two or more"
NAMES, OTHERS = KeyNames(SECRET.encode()), KeyNames(OTHER.encode())
MARK, OTHER_MARK = str(mark_secret(SECRET.encode())), str(mark_secret(OTHER.encode()))
HIDDEN = Origin("/archive", NAMES.scheme, MARK)
KEYED, KEYED_OTHERWISE = (replace(ORIGIN, secret_mark=mark) for mark in (MARK, OTHER_MARK))
MOVED = Origin("/elsewhere", moved_from="/archive")


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PSEUDONYM_VARIABLE, SECRET)


def name_row(key: str, names: KeyNames, run_id: str = "run") -> dict[str, object]:
    return make_row(key, run_id=run_id, source=names.name_source(key)) | {"scan_id": names.name_scan(key)}


def row_of(key: str, origin: Origin) -> dict[str, object]:
    return name_row(key, {NAMES.scheme: NAMES, OTHERS.scheme: OTHERS, "": KeyNames()}[origin.names])


@pytest.mark.parametrize(
    ("first", "second", "refusal"),
    [
        (ORIGIN, ORIGIN, ""),
        (HIDDEN, HIDDEN, ""),
        (ORIGIN, HIDDEN, "by the keys of the archive: score"),
        (HIDDEN, ORIGIN, "by --scan-id hmac: score"),
        (HIDDEN, Origin("/archive", OTHERS.scheme, OTHER_MARK), f"--scan-id hmac and another {PSEUDONYM_VARIABLE}"),
        (KEYED, KEYED, ""),
        (ORIGIN, KEYED, ""),  # nulls claim nothing
        (KEYED, ORIGIN, "this machine has no one"),
        (KEYED, KEYED_OTHERWISE, "this machine has another one"),
        (ORIGIN, replace(ORIGIN, archive="/elsewhere"), "--archive-moved-from /archive"),
        (ORIGIN, MOVED, ""),
    ],
)
def test_a_table_takes_rows_of_one_origin(local: Store, first: Origin, second: Origin, refusal: str) -> None:
    """By a run planned before, by a run that lost its number meanwhile, and when the next one is planned."""
    publish_rows(local, "first", row_of("a", first), origin=first)
    work = replace(WORK, origin=second)
    folder = begin_run(local, make_source("b"), work=work)
    is_of_here = second.names in ("", NAMES.scheme)
    if not refusal:
        with read_scored_keys(local, MODEL, "1-abc", second):
            pass
        assert [found.run_id for found in find_unfinished(local, work)] == [folder.run_id]
        assert publish_rows(local, "second", row_of("b", second), origin=second) == 2
        return
    with pytest.raises(UsageError, match=refusal):
        publish_rows(local, "second", row_of("b", second), origin=second)
    with pytest.raises(UsageError, match=refusal):
        find_unfinished(local, work)
    expected = refusal if is_of_here else "this machine has not"
    with pytest.raises(UsageError, match=expected), read_scored_keys(local, MODEL, "1-abc", second):
        pass
    assert list_commit_numbers(local) == [1]


class RacingStore:
    """A real store in which another run takes the first number between our reading and our put."""

    def __init__(self, real: Store, origin: Origin) -> None:
        self._real, self._origin, self._is_won = real, origin, False

    def __getattr__(self, name: str) -> object:
        if name == "put_if_absent" and not self._is_won:
            self._is_won = True
            publish_rows(self._real, "winner", row_of("a", self._origin), origin=self._origin)
        return getattr(self._real, name)


@pytest.mark.parametrize("other", [HIDDEN, KEYED, replace(ORIGIN, archive="/elsewhere")])
def test_two_first_nights_of_two_origins_leave_one(local: Store, other: Origin) -> None:
    store = RacingStore(local, other)
    with pytest.raises(UsageError, match="of its own"):
        publish(store, "run", stage([make_row("doe")]), make_listing(0), ORIGIN)  # type: ignore[arg-type]
    assert list_commit_numbers(local) == [1]


def test_an_object_that_says_nothing_is_judged_by_its_names(local: Store) -> None:
    put_object(local, 1, "before", name_row("a", NAMES))
    with read_scored_keys(local, MODEL, "1-abc", HIDDEN):
        pass
    with pytest.raises(UsageError, match="by --scan-id hmac"):
        publish_rows(local, "run", make_row("b"))
    assert publish_rows(local, "run", name_row("b", NAMES), origin=HIDDEN) == 2


def test_a_moved_archive_is_said_once_and_does_not_come_back(local: Store) -> None:
    publish_rows(local, "one", make_row("a"))
    publish_rows(local, "two", make_row("b"), origin=MOVED)
    assert publish_rows(local, "three", make_row("c"), origin=replace(MOVED, moved_from="")) == 3
    with pytest.raises(UsageError, match="is of the archive /elsewhere"):
        publish_rows(local, "four", make_row("d"))


def test_a_raw_key_is_neither_published_nor_told_where_names_are_digests() -> None:
    rows = stage([name_row("b", NAMES), make_row("doe")])
    with pytest.raises(RunError, match="not named as their run says") as caught:
        check_rows(["doe"], rows, HIDDEN)
    assert "doe" not in str(caught.value)
    with pytest.raises(RunError, match="planned, but has no row") as caught:
        check_rows(["doe"], stage([name_row("b", NAMES)]), HIDDEN)
    assert "doe" not in str(caught.value)


def test_publish_refuses_rows_that_are_not_named_as_their_run_says(local: Store) -> None:
    with pytest.raises(RunError, match="not named as their run says"):
        publish_rows(local, "run", make_row("doe"), origin=HIDDEN)
    assert list_commits(local) == []


def hold_hidden_run(store: Store) -> RunFolder:
    folder = begin_run(store, make_source("doe"), work=replace(WORK, origin=HIDDEN))
    folder.write_part("p", [name_row("doe", NAMES, folder.run_id)])
    store.write_bytes(folder.locate("HELD.json"), b'{"run_id": "r", "night": "2030-01-01", "breaches": []}')
    return folder


def test_a_held_run_of_digests_is_accepted_with_its_secret_only(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hold_hidden_run(local)
    settings = ScoreSettings(results=local.uri, accept=folder.run_id, reason="looked")
    for wrong in ("", OTHER):
        monkeypatch.setenv(PSEUDONYM_VARIABLE, wrong)
        with pytest.raises(UsageError, match="set the one it was scored with"):
            decide_hold(local, settings)
    assert list_held_runs(local) == [folder.run_id]
    monkeypatch.setenv(PSEUDONYM_VARIABLE, SECRET)
    assert decide_hold(local, settings)["published"] == 1
    assert list_held_runs(local) == []


def test_a_run_begun_here_says_so_in_its_record_and_object(local: Store, tmp_path: Path) -> None:
    origin = Origin.here(str(tmp_path), NAMES, "/before/")
    assert origin == Origin(str(tmp_path), f"hmac:{MARK}:", MARK, "/before")
    folder = begin_run(local, make_source("a"), work=replace(WORK, origin=origin))
    assert folder.read_record().work.origin == origin
    assert SECRET not in local.read_bytes(folder.locate("run.json")).decode()
