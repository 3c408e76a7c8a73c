"""Rows in; the scans that a person should look at first out: of each kind the outermost.

The night's page lists them, and while scans are scored a picture is kept of each that it may come to list.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from darnet.errors import Status
from darnet.scan import Diagnosis

NUM_LISTED = 10  # Source: ours; scans of a kind that a person may look at in one morning
IN_LUNG_FRACTION = 0.5  # Source: ours; below, most of the map lies where no pneumonia can be
_NUMBERS = ["probability_ncp", "fold_std_ncp", "cam_in_lung_fraction"]
OUTERMOST_COLUMNS = ["scan_id", "status", "prediction", *_NUMBERS]


def choose_outermost(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Kinds of outermost scans, each with its scans, the outermost first; of equal ones, the first by `scan_id`.

    Of rows with OUTERMOST_COLUMNS; kinds without any are left out. What is chosen of all is chosen of any of them.
    """
    scored = rows[rows["status"] == Status.OK.value].sort_values("scan_id", kind="stable")
    is_ill = scored["prediction"] != Diagnosis.NORMAL
    strays = scored[is_ill & (scored["cam_in_lung_fraction"] < IN_LUNG_FRACTION)]
    called, disputed = scored[scored["prediction"] == Diagnosis.NCP], scored[scored["fold_std_ncp"] > 0]
    stray = f"Predicted CP or NCP with less than {IN_LUNG_FRACTION:.0%} of the class map inside the lungs."
    chosen = [
        ("Highest probability of NCP, among those predicted so.", called.nlargest(NUM_LISTED, "probability_ncp")),
        ("The folds' networks disagree most on NCP.", disputed.nlargest(NUM_LISTED, "fold_std_ncp")),
        (stray, strays.nsmallest(NUM_LISTED, "cam_in_lung_fraction")),
    ]
    return [(caption, frame) for caption, frame in chosen if len(frame)]


class Outermost:
    """Rows that come one by one, of which those are kept that are the outermost so far."""

    def __init__(self) -> None:
        self._kept = pd.DataFrame(columns=OUTERMOST_COLUMNS).astype(dict.fromkeys(_NUMBERS, float))

    def take(self, row: Mapping[str, Any]) -> bool:
        """Whether this row is among the outermost of all so far, and so may be of all that come."""
        new = pd.DataFrame([{name: row[name] for name in OUTERMOST_COLUMNS}]).astype(dict.fromkeys(_NUMBERS, float))
        kept = self._kept[self._kept["scan_id"] != row["scan_id"]]  # scored again, it takes no second place
        rows = new if kept.empty else pd.concat([kept, new], ignore_index=True)
        places = {place for _, frame in choose_outermost(rows) for place in frame.index}
        self._kept = rows.loc[sorted(places)].reset_index(drop=True)
        return len(rows) - 1 in places
