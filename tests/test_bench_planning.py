"""The planning benchmark measures what it says: a night in which every source of a listed archive is settled."""

import json

import pytest

from tests.bench.planning import main, measure


@pytest.mark.s3
def test_the_benchmark_lists_every_page_and_finds_nothing_new() -> None:
    """The measured process itself refuses a table that does not settle what boto3 listed."""
    found = measure(2_500, 5, 3)  # two full pages and half of one
    assert found["sources"] == 500
    assert found["growth_mb"] > 0


@pytest.mark.slow
@pytest.mark.s3
def test_a_row_is_repeated_by_its_objects_and_nights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--objects", "1500", "--nights", "2", "--repeats", "3"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["repeats"] == 3
    assert (found["objects"], found["objects_per_source"], found["nights"], found["sources"]) == (1500, 1, 2, 1500)
