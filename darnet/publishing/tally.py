"""Rows of the table go in piece by piece; what gates and page need of a night, or of many, stays: a tally."""

from collections import Counter
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.errors import Status
from darnet.publishing.rows import PROBABILITIES, Rows
from darnet.scan import FloatArray

NAMES = ["manufacturer", "intensity"]
NUMBERS = [*PROBABILITIES, "num_slices", "slice_spacing_mm", "pixel_spacing_mm", "lung_fraction"]
TALLY_COLUMNS = ["night", "status", "prediction", *NAMES, *NUMBERS]


class Tally:
    """Counts of rows and, of those that are OK, of names, and the numbers themselves: 56 bytes a scan.

    `nights` and `statuses` count all rows, `predictions` (night, class) and `names` those that are OK.
    """

    def __init__(self) -> None:
        self.nights: Counter[date] = Counter()
        self.statuses: Counter[str] = Counter()
        self.predictions: Counter[tuple[date, str]] = Counter()
        self.names: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
        self._numbers: dict[str, list[FloatArray]] = {name: [] for name in NUMBERS}

    def add(self, rows: Rows) -> None:
        """Count in rows with TALLY_COLUMNS."""
        self.nights.update(_count(rows["night"]))
        self.statuses.update(_count(rows["status"]))
        scored = rows.filter(pc.equal(rows["status"], Status.OK.value))
        for row in scored.group_by(["night", "prediction"]).aggregate([([], "count_all")]).to_pylist():
            self.predictions[row["night"], row["prediction"]] += row["count_all"]
        for name in NAMES:
            self.names[name].update(_count(scored[name].fill_null("")))
        for name in NUMBERS:
            self._numbers[name].append(scored[name].cast(pa.float64()).to_numpy())

    @property
    def num_rows(self) -> int:
        """Rows of any status."""
        return self.statuses.total()

    @property
    def num_scored(self) -> int:
        """Rows that are OK."""
        return self.statuses[Status.OK.value]

    def count(self, beginning: str) -> int:
        """Rows whose status begins so."""
        return sum(number for status, number in self.statuses.items() if status.startswith(beginning))

    def share(self, beginning: str) -> float:
        """Their share of all rows; NaN of none."""
        return self.count(beginning) / self.num_rows if self.num_rows else np.nan

    def count_class(self, diagnosis: str) -> int:
        """Scans that are predicted to be of a class."""
        return sum(number for (_, predicted), number in self.predictions.items() if predicted == diagnosis)

    def take_numbers(self, name: str) -> FloatArray:
        """A number of each row that is OK, NaN for null.

        Shape: (num_scored,)
        """
        return np.concatenate([np.empty(0), *self._numbers[name]])


def _count(column: Any) -> dict[Any, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}
