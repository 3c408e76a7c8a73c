"""The benchmark of a driver's memory measures what it says: a planned night, scored to its end."""

import pytest

from tests.bench.first_night import measure, measure_staged


@pytest.mark.ray
@pytest.mark.slow
def test_the_benchmark_scores_every_planned_source() -> None:
    """The measured process itself refuses another ending than that of sources of which nothing is left."""
    found = measure(30, 3)
    assert (found["planned_sources"], found["objects_per_source"]) == (30, 3)
    assert found["growth_mb"] > 0


@pytest.mark.slow
def test_the_benchmark_publishes_what_is_staged() -> None:
    """One that was held, or not judged against the earlier nights, would measure less; one ended before, nothing."""
    found = measure_staged(600, 9, repeats=2)
    assert (found["planned_sources"], found["earlier_nights"], found["repeats"]) == (600, 9, 2)
    assert found["growth_mb"] > 0
