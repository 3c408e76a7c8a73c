"""That the judge of `make chaos` sees what was lost; with the slow tests, a few of its nights."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from darnet.storage import open_store
from tests.bench import kills
from tests.bundle_fixtures import write_random_bundle
from tests.chaos.__main__ import COUNTS, run_one, sum_up
from tests.chaos.hostile_faults import NUM_SOUND, hostile_archive
from tests.chaos.machine_faults import driver_ahead
from tests.chaos.night import (
    ChaosError,
    Night,
    Outcome,
    Site,
    TableReader,
    collect_facts,
    judge,
    prepare_site,
    watch,
)
from tests.chaos.process_faults import kill_workers
from tests.chaos.store_faults import conflict, etags_alone, lost_acknowledgement, weather
from tests.fault_proxy import FaultProxy
from tests.night_jobs import UNREADABLE, PollingReader
from tests.results_fixtures import make_row, publish_rows
from tests.small_disk import MountRefused


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """A disturbed one, whose truth is four rows, with a table of two objects."""
    truth = open_store(str(tmp_path / "truth"), create=True)
    publish_rows(truth, "run", *(make_row(name) for name in "abcd"))
    night = Night(Site(tmp_path, "", FaultProxy(""), collect_facts(truth)), "disturbed", is_remote=False)
    publish_rows(night.results, "one", make_row("a"), make_row("b", "ERR_TIMEOUT"), make_row("c"))
    other = make_row("c", probability_ncp=0.1, probability_cp=0.8, prediction="CP")
    publish_rows(night.results, "two", make_row("b"), other | {"input_sha256": "j" * 64})
    return night


def test_the_judge_sees_what_is_lost_doubled_changed_and_seen_in_part(night: Night) -> None:
    assert judge(night, [0, 0, 2, 3, 5, 5]) == Outcome(
        due=4, lost=1, doubled=1, other=1, partial=1, polls=6, left_running=0
    )
    publish_rows(night.results, "three", make_row("d"))
    assert not judge(night, [6]).is_sound
    publish_rows(night.results, "four", make_row("e"))
    with pytest.raises(ChaosError, match="'e'"):
        judge(night, [7])


def test_a_reader_that_did_not_see_the_whole_table_in_the_end_has_seen_nothing(night: Night) -> None:
    for counts, seen in (([], "no"), ([0, 3], "3"), ([5, UNREADABLE], "-1")):
        with pytest.raises(ChaosError, match=f"last look saw {seen} rows of 5"):
            judge(night, counts)


def test_an_object_that_cannot_be_read_is_a_night_seen_in_part(night: Night) -> None:
    path = night.folder / "predictions" / "c00000002.parquet"
    sound = path.read_bytes()
    reader = TableReader(night.results, night.look)
    reader.start()
    path.write_bytes(sound[: len(sound) // 2])
    while UNREADABLE not in reader.counts:
        assert reader.is_alive()
        time.sleep(0.01)
    path.write_bytes(sound)
    counts = reader.stop()
    assert counts[-1] == 5
    assert path.name in reader.refusal
    assert judge(night, counts).partial == counts.count(UNREADABLE) > 0
    night.is_table_damaged = True  # by the fault itself
    assert judge(night, counts).partial == 0


@pytest.mark.parametrize("kind", [TableReader, PollingReader])
def test_a_reader_that_died_is_told(kind: Any, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "_count", lambda _: 1 // 0)
    reader = kind(night.results, night.look) if kind is TableReader else kind(night.results)
    reader.start()
    with pytest.raises((ChaosError, RuntimeError), match=r"after 0 polls: ZeroDivisionError"):
        reader.stop()


def test_the_judge_of_kills_sees_a_torn_object_and_a_blind_reader(night: Night) -> None:
    results = night.folder
    rows = kills.read_rows(results)
    reader = PollingReader(results)
    (results / "predictions" / "c00000003.parquet").write_bytes(b"PAR1 and no more")
    reader.start()
    while UNREADABLE not in reader.counts:
        assert reader.is_alive()
        time.sleep(0.01)
    (results / "predictions" / "c00000003.parquet").unlink()
    seen = reader.stop()
    *_, partial = kills.judge(rows, rows, seen)
    assert partial == seen.count(UNREADABLE) > 0
    for blind in ([], [0, 0], [0, len(rows), UNREADABLE]):
        with pytest.raises(RuntimeError, match="rows at the end, and there are 5"):
            kills.judge(rows, rows, blind)


@pytest.mark.parametrize("fault", [conflict, etags_alone, lost_acknowledgement, weather])
def test_a_fault_of_the_store_that_never_happened_is_told(
    fault: Callable[[Night], str], night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Night, "run", lambda *_, **__: {"published": 1, "statuses": {"OK": 1}}
    )  # and no request is made
    night.site.proxy.done.update(["lost", "flipped", "ConditionalRequestConflict"])  # of the fault before
    with pytest.raises(ChaosError, match="the proxy never did"):
        fault(night)


@pytest.mark.parametrize(("again", "told"), [(None, "not one of"), (2, "published 2 too")])
def test_a_driver_whose_clock_was_right_and_one_that_publishes_twice_are_told(
    again: int | None, told: str, night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter([1, again])
    monkeypatch.setattr(Night, "run", lambda *_, **__: {"published": next(numbers)})  # the rows are of January 2030
    with pytest.raises(ChaosError, match=told):
        driver_ahead(night)


def test_a_training_has_blanks_for_what_nobody_looked_for_and_the_last_line_names_what_was_not_tried() -> None:
    def refuse() -> tuple[Outcome, str]:
        raise MountRefused("not allowed here")

    trained = run_one("trained", lambda: (Outcome(2, None, None, 0, None, None, 0, (0,)), ""))
    assert [trained[name] for name in COUNTS] == [2, "", "", 0, "", "", 0]
    assert trained["verdict"] == "yes"
    lines = [trained, run_one("full", refuse), run_one("lost", lambda: (Outcome(2, 1, 0, 0, 0, 9, 0), ""))]
    assert sum_up(["trained", "full", "lost", "late"], lines) == {
        "faults": 2,
        "failed": ["lost"],
        "skipped": ["full", "late"],
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fault", [kill_workers, weather])
def test_a_night_under_faults_loses_nothing(
    fault: Callable[[Night], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers die; or a fifth of all answers is SlowDown, a twentieth 500, others cut, flipped, late or none."""
    with prepare_site(tmp_path) as site, capsys.disabled():
        night = Night(site, "disturbed", fault is weather)
        line = run_one(fault.__name__, functools.partial(watch, night, fault))
    assert (line["verdict"], line["due"]) == ("yes", 6), line["remark"]
    assert line["polls"] > 20


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_all_hostile_scans_change_no_bit_of_a_night_and_end_no_worker(tmp_path: Path) -> None:
    site = Site(tmp_path, "", FaultProxy(""))
    write_random_bundle(Path(site.model))
    outcome, remark = watch(Night(site, "hostile", is_remote=False), hostile_archive)
    print(remark)
    assert outcome == Outcome(NUM_SOUND, 0, 0, 0, 0, outcome.polls, 0), remark
