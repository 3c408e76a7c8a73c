"""A short, repeatable form of `make fuzz`, and every source that it ever found to break a rule."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from darnet.errors import Status
from tests import fuzz as fuzz_module
from tests.fuzz import FINDINGS, SEEDS, Fuzzer, Tally, fuzz, make_seed, measure, read_finding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """One child for all, as in a worker."""
    fuzzer = Fuzzer(tmp_path_factory.mktemp("archive"))
    yield fuzzer
    fuzzer.close()


def test_no_mutated_scan_breaks_a_rule_of_the_road(fuzzer: Fuzzer) -> None:
    fuzzer.tally = Tally()
    fuzz(fuzzer, number=0, count=30)
    tally = fuzzer.tally
    assert (tally.findings, tally.num_parent_errors) == (set(), 0)
    assert tally.num_executions == 30
    assert tally.statuses.total() >= 24
    assert len(tally.statuses) > 3  # mutations that are all refused for one reason would try nothing


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_mutated_is_sound(name: str, fuzzer: Fuzzer) -> None:
    (scan,) = fuzzer.run(make_seed(name))
    assert scan.status is Status.OK, scan.status_detail
    assert measure(make_seed(name), scan.scan_id) is not None  # by another reader


def test_a_source_that_another_reader_cannot_read_is_kept(
    fuzzer: Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: object) -> None:
        raise KeyError("Rows")

    monkeypatch.setattr(fuzzer, "run", read)
    monkeypatch.setattr(fuzzer, "tally", Tally())
    monkeypatch.setattr(fuzz_module, "FINDINGS", tmp_path)
    fuzz(fuzzer, number=0, count=1)
    (kept,) = tmp_path.iterdir()
    assert fuzzer.tally.findings == {f"{kept.name}: KeyError of another reader"}
    assert read_finding(kept)


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*.zip")), ids=lambda path: path.stem)
def test_what_once_broke_a_rule_breaks_none(path: Path, fuzzer: Fuzzer) -> None:
    assert fuzzer.run(read_finding(path))
