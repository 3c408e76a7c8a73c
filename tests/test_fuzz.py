"""A short, repeatable form of `make fuzz`, and every source that it ever found to break a rule."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, seed, settings

from darnet.errors import Status
from darnet.scan import IngestedScan
from tests import fuzz as fuzz_module
from tests.fuzz import (
    FINDINGS,
    HOSTILE,
    PYDICOM,
    SEEDS,
    Files,
    Fuzzer,
    Tally,
    fuzz,
    make_seed,
    measure,
    mutate_sources,
    read_finding,
)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """One child for all, as in a worker."""
    fuzzer = Fuzzer(tmp_path_factory.mktemp("archive"))
    yield fuzzer
    fuzzer.close()


@pytest.mark.slow
def test_no_mutated_scan_breaks_a_rule_of_the_road(fuzzer: Fuzzer) -> None:
    fuzzer.tally = Tally()
    fuzz(fuzzer, number=0, count=30)
    tally = fuzzer.tally
    assert (tally.findings, tally.num_parent_errors) == (set(), 0)
    assert tally.num_executions == 30
    assert tally.statuses.total() >= 24
    assert len(tally.statuses) > 3  # mutations that are all refused for one reason would try nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_what_is_mutated_is_sound(name: str, fuzzer: Fuzzer) -> None:
    (scan,) = fuzzer.run(make_seed(name))
    assert scan.status is Status.OK, scan.status_detail
    assert measure(make_seed(name), scan.scan_id) is not None  # by another reader


@pytest.mark.slow
def test_hostile_sources_and_real_files_are_mutated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def note(name: str) -> Files:
        drawn.add(name)
        return {name: b""}

    monkeypatch.setattr(fuzz_module, "make_seed", note)

    @seed(0)
    @settings(max_examples=300, database=None, suppress_health_check=list(HealthCheck))
    @given(mutate_sources())
    def draw(_: Files) -> None:
        pass

    draw()
    assert len(HOSTILE) >= 70
    assert not HOSTILE.keys() & (SEEDS.keys() | PYDICOM.keys())
    assert min(len(drawn & names.keys()) for names in (SEEDS, HOSTILE, PYDICOM)) > 10


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "detail", ["decoder died: SIGSEGV", "decoder gave an answer that none may give", "unexpected X"]
)
def test_whatever_a_crash_is_called_it_breaks_a_rule(
    detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = Fuzzer(tmp_path / "archive")
    crash = IngestedScan("a", Status.ERR_DECODER_CRASH, detail)
    monkeypatch.setattr(fuzzer, "_ingester", SimpleNamespace(ingest=lambda _: [crash]))
    monkeypatch.setattr(fuzz_module, "FINDINGS", tmp_path / "findings")
    fuzz(fuzzer, number=0, count=1)
    assert [told.partition(": ")[2] for told in fuzzer.tally.findings] == [detail]
    assert fuzzer.tally.statuses == {Status.ERR_DECODER_CRASH: 1}


FOUND = sorted(FINDINGS.glob("*.zip"))


def test_findings_are_kept() -> None:
    assert FOUND, "tests/findings is gone, and what broke a rule before is tried no more"


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_once_broke_a_rule_breaks_none(path: Path, fuzzer: Fuzzer) -> None:
    assert all(scan.status.is_final for scan in fuzzer.run(read_finding(path)))
