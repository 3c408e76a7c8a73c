"""The scans that a person should look at are found while scans pass, whoever scores them and in whatever order."""

from typing import Any

import numpy as np
import pytest

from darnet.publishing.nightly_report import NIGHT_COLUMNS, Night
from darnet.publishing.outermost import NUM_LISTED, Outermost
from tests.results_fixtures import make_row, make_table


def make_scan(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Of few values, so that many scans are equal; some without lungs, folds that agree, or a score."""
    if rng.random() < 0.1:
        return make_row(f"scan{number}", "BAD_TILT")
    return make_row(
        f"scan{number}",
        prediction=rng.choice(["CP", "NCP", "Normal"]),
        probability_ncp=rng.integers(20) / 19,
        fold_std_ncp=rng.integers(20) / 80,
        cam_in_lung_fraction=rng.choice([None, *np.arange(10) / 9]),
    )


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_page_lists_was_outermost_when_it_was_scored(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [make_scan(number, rng) for number in range(400)]
    night = Night()
    night.add(make_table(rows).select(NIGHT_COLUMNS))
    actors = [Outermost() for _ in range(3)]
    taken = {row["scan_id"] for row in rng.permutation(np.array(rows)) if actors[rng.integers(3)].take(row)}
    assert len(night.list_scans()) > NUM_LISTED
    assert set(night.list_scans()) <= taken
    assert len(taken) < 300  # three actors of three lists: not just every scan


def test_of_a_rising_probability_every_scan_is_taken_and_of_a_falling_one_ten() -> None:
    rows = [make_row(f"{number:03d}", fold_std_ncp=0.0, probability_ncp=number / 100) for number in range(100)]
    rising, falling = Outermost(), Outermost()
    assert all(rising.take(row) for row in rows)
    assert [falling.take(row) for row in reversed(rows)] == [True] * NUM_LISTED + [False] * 90


def test_a_scan_that_is_scored_twice_takes_one_place() -> None:
    outermost = Outermost()
    for place in range(5):
        row = make_row(f"{place:02d}", fold_std_ncp=0.0, probability_ncp=0.9)
        assert [outermost.take(row), outermost.take(row)] == [True, True]
    lower = [make_row(f"{place:02d}", fold_std_ncp=0.0, probability_ncp=0.8) for place in range(5, 11)]
    assert [outermost.take(row) for row in lower] == [True] * 5 + [False]


def test_a_scan_that_was_not_scored_is_none_to_look_at() -> None:
    assert not Outermost().take(make_row("a", "SKIP_NO_LUNG"))
