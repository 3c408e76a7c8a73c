"""Which of many like cases are for every day, and which for the slow tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mark_slow(values: Iterable[Any], *, but: Collection[Any]) -> list[Any]:
    """The values as parameters of a test, all slow but these."""
    return [value if value in but else pytest.param(value, marks=pytest.mark.slow) for value in values]
