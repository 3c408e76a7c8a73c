"""What a model said of a test cohort: a predictions table enters, checked probabilities by fold and scan leave.

One row a scan, or one a scan and fold: scan_id, label, prob_cp, prob_ncp, prob_normal, and if known fold, patient_id.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from darnet.errors import UsageError
from darnet.metrics import LabelArray
from darnet.scan import DIAGNOSES, FloatArray
from darnet.tables import Rule, list_id_rules, read_table, refuse_rows, to_text

LABELS = tuple(str(diagnosis) for diagnosis in DIAGNOSES)
PROBABILITIES = tuple(f"prob_{name.lower()}" for name in LABELS)
NEEDED_COLUMNS = ("scan_id", "label", *PROBABILITIES)
OPTIONAL_COLUMNS = ("fold", "patient_id")
SUM_TOLERANCE = 1e-3  # Source: ours; wider than three decimals printed, narrower than any mistake
ROUNDING = 1e-6  # what a mean of single-precision probabilities may lie above 1


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """A checked predictions table, each scan once.

    Shape: `labels` (N,), label order of `DIAGNOSES`; `fold_probabilities` (folds, N, 3). `folds` holds their names,
           or one None where the table has no folds; `patient_ids` is None where it has no patients.
    """

    name: str
    sha256: str
    scan_ids: tuple[str, ...]
    patient_ids: tuple[str, ...] | None
    labels: LabelArray
    folds: tuple[str | None, ...]
    fold_probabilities: FloatArray

    @property
    def probabilities(self) -> FloatArray:
        """The ensemble's: mean over the folds; shape (N, 3)."""
        mean: FloatArray = self.fold_probabilities.mean(axis=0)
        return mean

    @property
    def num_patients(self) -> int | None:
        """Different patients, where the table names them."""
        return None if self.patient_ids is None else len(set(self.patient_ids))


def read_predictions_table(name: str, data: bytes) -> Predictions:
    """Read a predictions table; `name` tells its format (.csv or .parquet) and stands in every complaint.

    Identifiers are opaque text; label is CP, NCP or Normal. Other columns are ignored.
    Raises: UsageError naming file, row (from 1; a CSV's header counts) and remedy.
    """
    frame = read_table(name, data, "predictions table", NEEDED_COLUMNS, OPTIONAL_COLUMNS)
    for column in ("scan_id", "label", *OPTIONAL_COLUMNS):
        if column in frame:
            frame[column] = to_text(name, frame[column])
    if frame.empty:
        raise UsageError(f"{name}: no rows below the header; there is nothing to evaluate")
    numbers = frame[list(PROBABILITIES)].apply(pd.to_numeric, errors="coerce").astype(float)
    refuse_rows(name, frame, [*_rules_of_cells(frame, numbers), *_rules_between_rows(frame)])
    _refuse_gaps(name, frame)
    return _gather(name, hashlib.sha256(data).hexdigest(), frame, numbers)


def _rules_of_cells(frame: pd.DataFrame, numbers: pd.DataFrame) -> list[Rule]:
    """What can be wrong with a row by itself."""
    rules: list[Rule] = [
        ("scan_id", "is empty; name the scan", frame["scan_id"].str.strip() == ""),
        ("label", f"is unknown; allowed are {', '.join(LABELS)}", ~frame["label"].isin(LABELS)),
    ]
    for column, remedy in (("fold", "name the fold"), ("patient_id", "name the patient")):
        if column in frame:
            fault = f"is empty; {remedy}, or leave the whole column out"
            rules.append((column, fault, frame[column].str.strip() == ""))
    rules += list_id_rules(frame, ("scan_id", *OPTIONAL_COLUMNS))
    for column in PROBABILITIES:
        rules += [
            (column, "is not a finite number; give a probability", ~np.isfinite(numbers[column])),
            (column, "is negative; give probabilities, not logits", numbers[column] < 0),
            (column, "is above 1; give probabilities, not logits or per cent", numbers[column] > 1 + ROUNDING),
        ]
    total = numbers.sum(axis=1)
    fault = f"and the other two do not add up to 1 within {SUM_TOLERANCE}; give the softmax of all three classes"
    return [*rules, (PROBABILITIES[0], fault, (total - 1).abs() > SUM_TOLERANCE)]


def _rules_between_rows(frame: pd.DataFrame) -> list[Rule]:
    """What can be wrong with a row beside earlier rows of its scan."""
    has_folds = "fold" in frame
    keys = ["scan_id", "fold"] if has_folds else ["scan_id"]
    fault = "is also in an earlier row" + (" of this fold; keep one" if has_folds else "; keep one, or add column fold")
    rules: list[Rule] = [("scan_id", fault, frame.duplicated(keys))]
    if has_folds:
        rules.append(("fold", "is an earlier fold's number, written otherwise; write it alike", _find_respelt(frame)))
    by_scan = frame.groupby("scan_id")
    for column in ("label", "patient_id"):
        if column in frame:
            fault = "is not what an earlier row says of this scan; correct one of them"
            rules.append((column, fault, frame[column] != by_scan[column].transform("first")))
    return rules


def _find_respelt(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Rows whose fold equals another's as a number but not as text, as 0 and 00 do: two folds of one network."""
    numbers = pd.to_numeric(frame["fold"], errors="coerce")
    first = frame["fold"].groupby(numbers).transform("first")
    return numbers.notna() & (frame["fold"] != first)


def _refuse_gaps(name: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming a fold, and by its row in another fold a scan, that lack each other."""
    if "fold" not in frame:
        return
    first_rows = frame.drop_duplicates("scan_id")
    for fold, rows in frame.groupby("fold", sort=False):
        lacking = first_rows[~first_rows["scan_id"].isin(rows["scan_id"])]
        if len(lacking):
            row, scan = lacking.index[0], lacking.iloc[0]
            more = f" ({len(lacking) - 1} more scans like it)" if len(lacking) > 1 else ""
            raise UsageError(
                f"{name} row {row}: scan_id {scan['scan_id']!r} is in fold {scan['fold']!r} but not in fold {fold!r}; "
                f"every fold must say something of every scan{more}"
            )


def _gather(name: str, sha256: str, frame: pd.DataFrame, numbers: pd.DataFrame) -> Predictions:
    """Lay a checked table out: scans in the order of the table, folds in that of their numbers."""
    scans = frame.drop_duplicates("scan_id")
    groups: dict[str | None, pd.DataFrame] = {None: frame}
    if "fold" in frame:
        groups = {str(fold): rows for fold, rows in frame.groupby("fold")}
    folds = sorted(groups, key=lambda fold: (len(fold or ""), fold))
    in_order = [groups[fold].reset_index().set_index("scan_id").loc[scans["scan_id"], "index"] for fold in folds]
    return Predictions(
        name=name,
        sha256=sha256,
        scan_ids=tuple(scans["scan_id"]),
        patient_ids=tuple(scans["patient_id"]) if "patient_id" in scans else None,
        labels=np.array([LABELS.index(label) for label in scans["label"]], np.int64),
        folds=tuple(folds),
        fold_probabilities=np.stack([numbers.loc[rows].to_numpy() for rows in in_order]),
    )
