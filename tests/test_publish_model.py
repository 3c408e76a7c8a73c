"""No way of meeting spoils the results table; and a store or a program that is wrong is found out."""

from dataclasses import replace
from typing import Any

import pytest

from darnet.errors import PutUncertain
from darnet.publishing import commit
from tests.publish_model import SCENARIOS, PublishModel, walk_all

# Less may go wrong than in the whole model, and with three runs at once nothing: their meetings alone are many.
QUICK = [replace(item, num_faults=int(len(item.runs) == 2), num_crashes=int(len(item.runs) == 2)) for item in SCENARIOS]
NAMES = [scenario.name for scenario in SCENARIOS]
WALKS = [*QUICK[:2], *(pytest.param(item, marks=pytest.mark.slow) for item in QUICK[2:])]


@pytest.mark.parametrize("scenario", WALKS, ids=NAMES)
def test_no_meeting_of_runs_ends_badly(scenario: Any) -> None:
    walk = PublishModel(scenario).walk()
    assert walk.faults == []
    assert walk.num_states > 100
    assert len(walk.ends) >= 2  # either run may come first, so the walk did branch


def test_the_race_ends_as_worked_out_by_hand() -> None:
    """Each run fails where the other does not: whoever comes second adds its final row and drops its ERR."""
    model = PublishModel(QUICK[1])
    ends = [model.read_statuses(table) for table in model.walk().ends]
    first, second = {"a": "OK", "b": "ERR_TIMEOUT"}, {"a": "ERR_TIMEOUT", "b": "OK"}
    assert sorted(ends, key=str) == sorted([[first, {"b": "OK"}], [second, {"a": "OK"}]], key=str)


@pytest.mark.parametrize("scenario", QUICK, ids=NAMES)
def test_a_store_that_puts_blindly_is_found_out(scenario: Any) -> None:
    """What `rclone serve s3` does, which ignores If-None-Match."""
    assert PublishModel(scenario, is_blind=True).walk().faults


def _claim_believing(store: Any, key: str, data: bytes, run_id: str, *_: Any) -> str:
    """A refusal is another's doing, whoever holds the slot."""
    try:
        return run_id if store.put_if_absent(key, data) else "another"
    except PutUncertain:
        return run_id


def _settle_nothing(rows: Any, _: Any) -> Any:
    return rows


@pytest.mark.parametrize(
    ("name", "mutant", "scenario"),
    [
        ("_claim", _claim_believing, QUICK[1]),
        ("_settle", _settle_nothing, QUICK[1]),
        ("_drop_repeats", _settle_nothing, QUICK[NAMES.index("both try again in vain, one finds other trouble")]),
        ("_drop_superseded", _settle_nothing, QUICK[NAMES.index("one listed a source before it changed")]),
        ("_drop_superseded", _settle_nothing, QUICK[NAMES.index("a source changed while both listed")]),
    ],
)
def test_a_program_that_forgets_a_step_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any, scenario: Any
) -> None:
    monkeypatch.setattr(commit, name, mutant)
    assert PublishModel(scenario).walk().faults


@pytest.mark.slow
def test_the_older_of_two_listings_drops_its_source_when_it_comes_second() -> None:
    """Worked out by hand: x saw a before it changed, y after. Whoever is first keeps all; x second keeps b alone."""
    model = PublishModel(QUICK[NAMES.index("one listed a source before it changed")])
    ends = [model.read_statuses(table) for table in model.walk().ends]
    x, y = {"a#1": "OK", "a#2": "ERR_TIMEOUT", "b": "OK"}, {"a#1": "OK", "a#2": "OK", "c": "ERR_TIMEOUT"}
    assert sorted(ends, key=str) == sorted([[x, y], [y, {"b": "OK"}]], key=str)


@pytest.mark.slow
def test_the_whole_model_holds(capsys: pytest.CaptureFixture[str]) -> None:
    walk = walk_all(print)
    assert walk.faults == []
    assert walk.num_states > 40_000
    assert "0 bad" in capsys.readouterr().out.splitlines()[-1]
