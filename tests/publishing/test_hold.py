"""A held run publishes nothing, stops the nights after it, and ends as a person decides."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from darnet.config import GateConfig
from darnet.errors import ExitCode, HeldError, RunError, UsageError
from darnet.job import run_job
from darnet.publishing.commit import publish, read_outlook
from darnet.publishing.gates import Verdict
from darnet.publishing.hold import (
    decide_hold,
    list_held_runs,
    publish_run,
    read_earlier_nights,
    refuse_if_held,
    review_run,
)
from darnet.publishing.objects import make_commit_key
from darnet.publishing.runs import RunFolder, find_unfinished, list_run_files
from darnet.publishing.staged import StagedRows
from darnet.results import read_predictions
from darnet.scan import StoredObject
from darnet.settings import ScoreSettings
from darnet.storage import Store, open_store
from tests.results_fixtures import (
    MINUTES,
    ORIGIN,
    WORK,
    begin_run,
    has_plan,
    list_commit_numbers,
    make_listing,
    make_row,
    make_source,
    publish_rows,
    read_statuses,
    stage,
)

CONFIG = ScoreSettings(archive="a", model="m", results="r").score.model_copy(
    update={"gate_min_scans": 4, "gate_min_nights": 2, "gate_nights": 3}
)


class KillingStore:
    """A real store whose user is killed before one write more than `num_writes`."""

    def __init__(self, real: Store, num_writes: int) -> None:
        self._real, self._num_left = real, num_writes

    def __getattr__(self, name: str) -> Any:
        if name in ("write_bytes", "put_if_absent", "delete"):
            if not self._num_left:
                raise KeyboardInterrupt
            self._num_left -= 1
        return getattr(self._real, name)


def stage_night(store: Store, night: int, *statuses: str) -> tuple[RunFolder, StagedRows]:
    """Plan and parts of a run, as scoring leaves them; its sources are new."""
    keys = [f"{night}-{index}" for index in range(len(statuses))]
    folder = begin_run(store, *map(make_source, keys), run_id=f"run{night}", night=night)
    rows = [
        make_row(key, status, night=night, run_id=folder.run_id) for key, status in zip(keys, statuses, strict=True)
    ]
    folder.write_part("part", rows)
    return folder, folder.read_parts()


def review(folder: RunFolder, rows: StagedRows, config: GateConfig = CONFIG) -> Verdict:
    return review_run(folder, rows, read_outlook(folder.store, rows, make_listing(next(MINUTES))), config)


def read_staged(rows: StagedRows) -> list[dict[str, Any]]:
    return [row for _, piece in rows.stream() for row in piece.to_pylist()]


def hold_night(store: Store) -> RunFolder:
    """Two good nights, and a third of which half is ERR."""
    for night in (1, 2):
        publish_rows(store, f"run{night}", *[make_row(f"{night}-{index}", night=night) for index in range(4)])
    folder, rows = stage_night(store, 3, "OK", "OK", "ERR_TIMEOUT", "ERR_STORAGE")
    with pytest.raises(HeldError, match=r"run run3 of 2030-01-03 .*: share of ERR 0\.500 \(limit 0\.050\)"):
        review(folder, rows)
    return folder


def decide(store: Store, verb: str, run_id: str) -> dict[str, Any]:
    return decide_hold(store, ScoreSettings(results=store.uri, reason="looked at it", **{verb: run_id}))


def test_a_breach_publishes_nothing_and_says_why(store: Store) -> None:
    folder = hold_night(store)
    held = json.loads(store.read_bytes("_runs/run3/HELD.json"))
    assert (held["run_id"], held["night"], held["scans"]) == ("run3", "2030-01-03", 4)
    assert [(item["gate"], item["value"]) for item in held["breaches"]] == [("share of ERR", 0.5)]
    assert held["notice"] == "research use only"
    assert list_commit_numbers(store) == [1, 2]
    assert list_held_runs(folder.store) == ["run3"]


def test_a_hold_stops_later_nights_with_exit_code_3(local: Store, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_if_held(local)
    hold_night(local)

    def work(_: ScoreSettings) -> dict[str, Any]:
        refuse_if_held(local)
        return {}

    arguments = ["--archive", "a", "--model", "m", "--results", local.uri]
    assert run_job("score", ScoreSettings, work, arguments) == ExitCode.HELD == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["exit_code"], summary["held"]) == (3, "run3")
    assert "--accept run3" in summary["error"]


def test_an_accepted_run_is_published_with_its_reason(store: Store) -> None:
    hold_night(store)
    assert decide(store, "accept", "run3")["published"] == 3
    assert read_statuses(store)["3-2"] == "ERR_TIMEOUT"
    accepted = json.loads(store.read_bytes("_runs/run3/ACCEPTED.json"))
    assert (accepted["reason"], accepted["published"]) == ("looked at it", 3)
    assert accepted["breaches"][0]["gate"] == "share of ERR"
    refuse_if_held(store)
    assert find_unfinished(store, WORK) == []


def test_a_discarded_run_leaves_nothing_to_go_on_from(store: Store) -> None:
    folder = hold_night(store)
    assert decide(store, "discard", "run3")["decision"] == "discarded"
    assert list_commit_numbers(store) == [1, 2]
    assert not has_plan(folder)
    assert folder.list_staged_sources() == set()
    assert json.loads(store.read_bytes("_runs/run3/DISCARDED.json"))["reason"] == "looked at it"
    refuse_if_held(store)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["accept", "discard"])
def test_a_decision_killed_at_any_step_is_carried_out_again(tmp_path: Path, verb: str) -> None:
    """Kill it before its first write, its second, ... until it gets through."""
    for num_writes in range(10):
        store = open_store(str(tmp_path / str(num_writes)))
        hold_night(store)
        try:
            decide(KillingStore(store, num_writes), verb, "run3")
        except KeyboardInterrupt:
            with pytest.raises(HeldError):
                refuse_if_held(store)
            decide(store, verb, "run3")
        else:
            break
        assert list_commit_numbers(store) == ([1, 2, 3] if verb == "accept" else [1, 2])
        assert has_plan(RunFolder(store, "run3")) == (verb == "accept")
        refuse_if_held(store)
    assert num_writes > 2


def test_only_held_runs_can_be_decided_on(local: Store) -> None:
    hold_night(local)
    with pytest.raises(UsageError, match="'run2' is not held; held here: run3"):
        decide(local, "accept", "run2")
    decide(local, "discard", "run3")
    with pytest.raises(UsageError, match="held here: none"):
        decide(local, "discard", "run3")


def test_an_unfinished_run_can_be_discarded_and_not_accepted(store: Store) -> None:
    folder = begin_run(store, make_source("a"), make_source("b"))
    folder.write_part("p", [make_row("a", run_id=folder.run_id)])
    with pytest.raises(UsageError, match="is not held"):
        decide(store, "accept", folder.run_id)
    assert decide(store, "discard", folder.run_id)["decision"] == "discarded"
    assert not has_plan(folder)
    assert json.loads(store.read_bytes(folder.locate("DISCARDED.json")))["reason"] == "looked at it"


@pytest.mark.parametrize("num_writes", range(4))
def test_a_discard_killed_at_any_step_is_carried_out_again(local: Store, num_writes: int) -> None:
    folder = begin_run(local, make_source("a"))
    folder.write_part("p", [make_row("a", run_id=folder.run_id)])
    if num_writes < 3:  # the decision, the part, the plan
        with pytest.raises(KeyboardInterrupt):
            decide(KillingStore(local, num_writes), "discard", folder.run_id)
        assert has_plan(folder)
        assert (find_unfinished(local, WORK) == []) == (
            num_writes > 0
        )  # from the decision on, no night goes on with it
    decide(local, "discard", folder.run_id)
    assert find_unfinished(local, WORK) == []


def test_a_discarded_run_is_not_begun_again(local: Store) -> None:
    """The discard is killed after its first write, and a driver that planned the same before begins its run then."""
    folder = begin_run(local, make_source("a"))
    folder.write_part("p", [make_row("a", run_id=folder.run_id)])
    with pytest.raises(KeyboardInterrupt):
        decide(KillingStore(local, 1), "discard", folder.run_id)
    assert begin_run(local, make_source("a")).run_id == folder.run_id
    assert find_unfinished(local, WORK) == []
    with pytest.raises(RunError, match="start the job again, which plans its sources anew"):
        folder.refuse_if_discarded()
    assert json.loads(local.read_bytes(folder.locate("DISCARDED.json")))["reason"] == "looked at it"


def test_a_published_run_cannot_be_discarded(local: Store) -> None:
    folder = begin_run(local, make_source("a"))
    publish_rows(local, folder.run_id, make_row("a"))
    with pytest.raises(UsageError, match="is not held"):
        decide(local, "discard", folder.run_id)


def test_a_held_run_that_another_driver_published_is_accepted_and_not_discarded(local: Store) -> None:
    folder = hold_night(local)
    publish_rows(local, folder.run_id, *read_staged(folder.read_parts()))
    with pytest.raises(UsageError, match=r"in the table already.*--accept"):
        decide(local, "discard", folder.run_id)
    assert list_held_runs(local) == [folder.run_id]
    assert decide(local, "accept", folder.run_id)["published"] == 3
    assert (list_commit_numbers(local), list_held_runs(local)) == ([1, 2, 3], [])


def test_a_run_that_is_published_while_it_is_discarded_is_told_and_not_half_discarded(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hold_night(local)
    rows = read_staged(folder.read_parts())
    write_bytes = type(local).write_bytes

    def publish_then_write(store: Any, key: str, data: bytes) -> None:
        if key.endswith("DISCARDED.json"):
            monkeypatch.undo()
            publish_rows(local, folder.run_id, *rows)
        write_bytes(store, key, data)

    monkeypatch.setattr(type(local), "write_bytes", publish_then_write)
    with pytest.raises(UsageError, match=r"in the table already.*--accept"):
        decide(local, "discard", folder.run_id)
    local.write_bytes(folder.locate("DISCARDED.json"), b"{}")  # as where it was killed before it looked again
    with pytest.raises(UsageError, match=r"in the table already.*--accept"):
        decide(local, "discard", folder.run_id)
    assert decide(local, "accept", folder.run_id)["published"] == 3
    assert (list_commit_numbers(local), list_held_runs(local)) == ([1, 2, 3], [])


def test_an_object_says_which_settings_and_device_made_it(local: Store) -> None:
    folder, rows = stage_night(local, 1, "OK")
    assert publish_run(folder, rows, folder.read_record()) == 1
    stored = pq.read_metadata(pa.BufferReader(local.read_bytes(make_commit_key(1)))).metadata
    assert (stored[b"settings_sha256"], stored[b"device"]) == (b"s" * 64, b"cpu")


def test_a_live_driver_neither_publishes_nor_holds_what_a_person_discarded(store: Store) -> None:
    """It has read its parts before they were taken away, or staged them afterwards."""
    for night in (1, 2):
        publish_rows(store, f"run{night}", *[make_row(f"{night}-{index}", night=night) for index in range(4)])
    folder, rows = stage_night(store, 3, "OK", "OK", "OK", "ERR_TIMEOUT")
    record, rows = folder.read_record(), stage(read_staged(rows))
    decide(store, "discard", folder.run_id)
    for go_on in (lambda: review(folder, rows), lambda: publish_run(folder, rows, record)):
        with pytest.raises(RunError, match=r"run3/DISCARDED\.json: .*start the job again"):
            go_on()
    assert (list_commit_numbers(store), list_held_runs(store)) == ([1, 2], [])
    assert "ENDED.json" not in list_run_files(store)[folder.run_id]


class DecidingStore:
    """A real store whose user discards a run when its driver has begun to read the table."""

    def __init__(self, real: Store, run_id: str) -> None:
        self._real, self._run_id = real, run_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        if prefix.startswith("predictions/") and self._run_id:
            run_id, self._run_id = self._run_id, ""
            decide(self._real, "discard", run_id)
        return self._real.list_objects(prefix)


def test_what_is_discarded_while_its_rows_are_gathered_is_not_published(local: Store) -> None:
    folder = begin_run(local, make_source("a"))
    rows = stage([make_row("a", run_id=folder.run_id)])
    deciding: Any = DecidingStore(local, folder.run_id)
    with pytest.raises(RunError, match="was discarded while it was being scored"):
        publish_run(RunFolder(deciding, folder.run_id), rows, folder.read_record())
    assert list_commit_numbers(local) == []
    assert "ENDED.json" not in list_run_files(local)[folder.run_id]


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"run_id": "run3"}', b'{"run_id": "a", "breaches": [1]}', b"\xff"])
def test_a_damaged_hold_is_named(local: Store, damaged: bytes) -> None:
    folder = hold_night(local)
    local.write_bytes(folder.locate("HELD.json"), damaged)
    for ask in (lambda: refuse_if_held(local), lambda: decide(local, "accept", "run3")):
        with pytest.raises(RunError, match=r"run3/HELD\.json: damaged.*delete it") as caught:
            ask()
        assert not isinstance(caught.value, HeldError)
    local.delete(folder.locate("HELD.json"))
    refuse_if_held(local)


def test_a_good_or_small_run_is_let_through(local: Store) -> None:
    for night in (1, 2):
        publish_rows(local, f"run{night}", *[make_row(f"{night}-{index}", night=night) for index in range(4)])
    assert review(*stage_night(local, 3, "OK", "OK", "OK", "OK")).describe() == "passed"
    small = review(*stage_night(local, 4, "ERR_TIMEOUT"))
    assert small.describe() == "not judged: 1 scans, the gates need 4"
    assert list_held_runs(local) == []


def test_what_an_archive_keeps_back_is_judged_once_and_not_every_night(local: Store) -> None:
    """Half of the archive lies in Glacier, and new scans arrive beside it: only the first night is held."""
    for night in (1, 2):
        publish_rows(local, f"run{night}", *[make_row(f"{night}-{index}", night=night) for index in range(4)])
    folder, rows = stage_night(local, 3, "OK", "OK", *["ERR_ARCHIVED"] * 4)
    with pytest.raises(HeldError):
        review(folder, rows)
    assert decide(local, "accept", "run3")["published"] == 3

    old = [row | {"run_id": "run4", "night": datetime.date(2030, 1, 4)} for row in read_staged(rows)[2:]]
    folder, fresh = stage_night(local, 4, "OK", "OK", "OK", "OK")
    rows = stage([*read_staged(fresh), *old])
    verdict = review(folder, rows)
    assert verdict.describe() == "passed; without 4 scans tried again in vain"
    assert publish(local, "run4", rows, make_listing(9), ORIGIN) == 4
    assert set(read_predictions(local.uri, latest=False)["scan_id"][14:]) == {f"4-{index}" for index in range(4)}

    alone = stage([row | {"run_id": "run5"} for row in old])
    assert review(RunFolder(local, "run5"), alone).num_repeats == 4
    assert publish(local, "run5", alone, make_listing(10), ORIGIN) is None


def test_scans_that_fail_every_night_do_not_hold_the_healthy_ones_beside_them(local: Store) -> None:
    """Forty of them, 7.4% of night 9: of another error they are news of tonight."""
    config = ScoreSettings(archive="a", model="m", results="r").score
    for night in range(1, 9):
        failed = [make_row(f"f{index}", "ERR_TIMEOUT", night=night) for index in range(40 if night == 8 else 0)]
        publish_rows(local, f"run{night}", *[make_row(f"{night}-{index}", night=night) for index in range(30)], *failed)

    def make_night(status: str) -> StagedRows:
        healthy = [make_row(f"9-{index}", night=9, run_id="run9") for index in range(500)]
        return stage([*healthy, *[make_row(f"f{index}", status, night=9, run_id="run9") for index in range(40)]])

    with pytest.raises(HeldError, match=r"share of ERR 0\.074"):
        review(RunFolder(local, "run9"), make_night("ERR_MEMORY"), config)
    rows = make_night("ERR_TIMEOUT")
    verdict = review(RunFolder(local, "run9"), rows, config)
    assert verdict.describe() == "passed; without 40 scans tried again in vain"
    assert publish(local, "run9", rows, make_listing(9), ORIGIN) == 9
    everything = read_predictions(local.uri, latest=False)
    assert (everything["commit"] == 9).sum() == 540  # their nights are counted in the table


def test_page_and_summary_give_up_what_the_table_gives_up(local: Store) -> None:
    for night in (1, 2):
        publish_rows(local, f"run{night}", make_row("a", "ERR_TIMEOUT", night=night), make_row("z", night=night))
    failed = [make_row(name, "ERR_TIMEOUT", night=3, run_id="run3") for name in ("a", "b", "z")]  # z is final already
    rows = stage([*failed, *[make_row(f"3-{index}", night=3, run_id="run3") for index in range(4)]])
    listing = make_listing(next(MINUTES))
    outlook = read_outlook(local, rows, listing)
    assert outlook.statuses == {"OK": 4, "ERR_TIMEOUT": 1, "BAD_GAVE_UP": 1}
    assert outlook.is_repeat.tolist() == [True] + 6 * [False]
    assert outlook.is_settled.tolist() == [False, False, True] + 4 * [False]
    folder = RunFolder(local, "run3")
    review_run(folder, rows, outlook, CONFIG.model_copy(update={"gate_err_share": 1.0}))
    page = local.read_bytes(folder.locate("nightly.html")).decode()
    assert "ERR_TIMEOUT, 3 nights: what happened" in page
    assert "the same ERR of decoding on the same bytes for the third night" in page
    assert publish(local, "run3", rows, make_listing(9), ORIGIN) == 3
    assert read_statuses(local) == {"a": "BAD_GAVE_UP", "b": "ERR_TIMEOUT", "z": "OK"} | {
        f"3-{index}": "OK" for index in range(4)
    }
    publish_rows(local, "run4", make_row("b", "ERR_TIMEOUT", night=4))
    assert read_outlook(local, rows, listing).statuses == outlook.statuses  # by a driver that comes late


def test_a_night_is_not_judged_by_errors_that_the_table_never_gets(local: Store) -> None:
    """Six zips of three series: of each the last failed, and is OK tonight, when the first, final since, times out."""
    for night in (1, 2):
        series = [make_row(f"z{zipped}#{scan}", night=night) for zipped in range(6) for scan in range(2)]
        failed = [make_row(f"z{zipped}#2", "ERR_TIMEOUT", night=night) for zipped in range(6)]
        publish_rows(local, f"run{night}", *series, *failed)
    statuses = ("ERR_TIMEOUT", "OK", "OK")
    rows = stage(
        [
            make_row(f"z{zipped}#{scan}", status, night=3, run_id="run3")
            for zipped in range(6)
            for scan, status in enumerate(statuses)
        ]
    )
    listing = make_listing(next(MINUTES))
    outlook = read_outlook(local, rows, listing)
    assert (outlook.statuses, int(outlook.is_settled.sum())) == ({"OK": 6}, 12)
    verdict = review_run(RunFolder(local, "run3"), rows, outlook, CONFIG)
    assert verdict.describe() == "passed; without 12 scans settled before"
    page = local.read_bytes("_runs/run3/nightly.html").decode()
    assert "6 scans of" in page
    assert "what happened" not in page  # of a scan that failed
    assert publish(local, "run3", rows, listing, ORIGIN) == 3
    assert set(read_statuses(local).values()) == {"OK"}


def test_a_run_that_another_overtook_is_not_judged(local: Store) -> None:
    """It was left behind; its sources changed, and a run that listed them later made their new bytes final."""
    behind = make_listing(next(MINUTES))
    for night in (1, 2):
        publish_rows(local, f"run{night}", *[make_row(f"{index}", night=night) for index in range(4)])
    rows = stage(
        [make_row(f"{index}", "BAD_LIMIT", run_id="old", night=3, input_sha256="j" * 64) for index in range(4)]
    )
    outlook = read_outlook(local, rows, behind)
    assert (outlook.statuses, outlook.is_settled.tolist()) == ({}, 4 * [True])
    verdict = review_run(RunFolder(local, "old"), rows, outlook, CONFIG)
    assert verdict.describe() == "not judged: 0 scans, the gates need 4; without 4 scans settled before"
    assert publish(local, "old", rows, behind, ORIGIN) is None
    assert "run old" in local.read_bytes("_runs/old/nightly.html").decode().lower()


def test_what_was_settled_meanwhile_is_no_repeat(local: Store) -> None:
    """It failed once, is final by now, and fails again in the same way."""
    publish_rows(local, "run1", make_row("a", "ERR_TIMEOUT"))
    publish_rows(local, "run2", make_row("a", night=2))
    outlook = read_outlook(local, stage([make_row("a", "ERR_TIMEOUT", night=3)]), make_listing(next(MINUTES)))
    assert (outlook.is_settled.tolist(), outlook.is_repeat.tolist()) == ([True], [False])


def test_earlier_nights_are_the_last_ones_before_tonight(local: Store) -> None:
    for number, night in enumerate([1, 2, 2, 5, 3, 7, 4]):  # accepted late, and two runs on one night
        publish_rows(local, f"run{number}", make_row(f"{number}", night=night))

    def read_days(night: int, num_nights: int) -> list[int]:
        nights = read_earlier_nights(local, datetime.date(2030, 1, night), num_nights).nights
        return sorted(day.day for day in nights.elements())

    assert read_days(7, 9) == [1, 2, 2, 3, 4, 5]
    assert read_days(5, 3) == [2, 2, 3, 4]
    assert read_days(1, 3) == []


def test_a_decision_needs_a_reason_and_scoring_its_places(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--results", "r", "--accept", "x"], "need a reason"),
        (["--results", "r", "--accept", "x", "--discard", "y", "--reason", "z"], "only one of accept, discard"),
        (["--results", "r", "--archive", "a"], "model: Field required"),
    ):
        assert run_job("score", ScoreSettings, lambda _: {}, arguments) == ExitCode.WRONG_USE
        assert complaint in capsys.readouterr().err
