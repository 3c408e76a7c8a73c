"""That the judge of `make chaos` sees what was lost; with the slow tests, a few of its nights."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from darnet.storage import open_store
from tests.bundle_fixtures import write_random_bundle
from tests.chaos.__main__ import run_one
from tests.chaos.hostile_faults import NUM_SOUND, hostile_archive
from tests.chaos.night import ChaosError, Night, Outcome, Site, collect_facts, judge, prepare_site, watch
from tests.chaos.process_faults import kill_workers
from tests.chaos.store_faults import weather
from tests.fault_proxy import FaultProxy
from tests.results_fixtures import make_row, publish_rows


def test_the_judge_sees_what_is_lost_doubled_changed_and_seen_in_part(tmp_path: Path) -> None:
    truth = open_store(str(tmp_path / "truth"), create=True)
    publish_rows(truth, "run", *(make_row(name) for name in "abcd"))
    night = Night(Site(tmp_path, "", FaultProxy(""), collect_facts(truth)), "disturbed", is_remote=False)
    publish_rows(night.results, "one", make_row("a"), make_row("b", "ERR_TIMEOUT"), make_row("c"))
    other = make_row("c", probability_ncp=0.1, probability_cp=0.8, prediction="CP")
    publish_rows(night.results, "two", make_row("b"), other | {"input_sha256": "j" * 64})
    assert judge(night, [0, 0, 2, 3, 5, 5]) == Outcome(
        due=4, lost=1, doubled=1, other=1, partial=1, polls=6, left_running=0
    )
    publish_rows(night.results, "three", make_row("d"))
    assert not judge(night, [0]).is_sound
    publish_rows(night.results, "four", make_row("e"))
    with pytest.raises(ChaosError, match="'e'"):
        judge(night, [0])


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
