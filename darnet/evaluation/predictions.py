"""What a model said of a test cohort: a predictions table enters, checked probabilities by fold and scan leave.

One row a scan, or one a scan and fold: scan_id, label, prob_cp, prob_ncp, prob_normal, and if known fold, patient_id.
With column seed, what each training was seeded with, the same fold may come once a seed: a row a scan, fold and seed.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from darnet.errors import UsageError
from darnet.metrics import LabelArray
from darnet.scan import LABELS, FloatArray
from darnet.tables import Rule, list_id_rules, read_table, refuse_rows, to_text

PROBABILITIES = tuple(f"prob_{name.lower()}" for name in LABELS)
NEEDED_COLUMNS = ("scan_id", "label", *PROBABILITIES)
OPTIONAL_COLUMNS = ("fold", "seed", "patient_id")
SUM_TOLERANCE = 1.5e-3  # Source: ours; three decimals printed may be 0.001 off, and no mistake is as small
ROUNDING = 1e-6  # what a mean of single-precision probabilities may lie above 1


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """A checked predictions table, each scan once.

    Shape: `labels` (N,), label order of `DIAGNOSES`; `fold_probabilities` (folds, N, 3). `folds` holds their names,
           or one None where the table has no folds; a fold that was trained with several seeds is there once a seed.
           `patient_ids` and `seeds` are None where it has none. `rows` (N,) is where each scan first stands in the
           table, for complaints.
    """

    name: str
    sha256: str
    scan_ids: tuple[str, ...]
    patient_ids: tuple[str, ...] | None
    labels: LabelArray
    folds: tuple[str | None, ...]
    fold_probabilities: FloatArray
    seeds: tuple[str, ...] | None = None
    rows: tuple[int, ...] = ()

    @property
    def members(self) -> list[tuple[str | None, str | None]]:
        """Fold and seed of each model of the ensemble."""
        return list(zip(self.folds, self.seeds or [None] * len(self.folds), strict=True))

    @property
    def member_names(self) -> list[str]:
        """What tells these models apart: the fold, and the seed too where a fold was trained with several."""
        return [f"fold {fold}" + (f" seed {seed}" if self.num_seeds > 1 else "") for fold, seed in self.members]

    @property
    def num_folds(self) -> int:
        """Different folds; one where the table has none."""
        return len(set(self.folds))

    @property
    def num_seeds(self) -> int:
        """Trainings of each fold; of the fold that has fewest."""
        return min(Counter(self.folds).values())

    @property
    def probabilities(self) -> FloatArray:
        """The ensemble's: mean over the folds, of all seeds; shape (N, 3)."""
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
    if "seed" in frame and "fold" not in frame:
        raise UsageError(f"{name}: column seed without column fold; add it, alike in all rows if there is one")
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
    for column in OPTIONAL_COLUMNS:
        if column in frame:
            fault = f"is empty; name the {column.removesuffix('_id')}, or leave the whole column out"
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
    of_what = " of this fold" if "fold" in frame else ""
    of_what += " and seed" if "seed" in frame else ""
    fault = "is also in an earlier row" + (f"{of_what}; keep one" if of_what else "; keep one, or add column fold")
    rules: list[Rule] = [("scan_id", fault, frame.duplicated(["scan_id", *_name_member_columns(frame)]))]
    for column in _name_member_columns(frame):
        fault = f"is an earlier {column}'s number, written otherwise; write it alike"
        rules.append((column, fault, _find_respelt(frame[column])))
    by_scan = frame.groupby("scan_id")
    for column in ("label", "patient_id"):
        if column in frame:
            fault = "is not what an earlier row says of this scan; correct one of them"
            rules.append((column, fault, frame[column] != by_scan[column].transform("first")))
    return rules


def _name_member_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that tell one model of the ensemble from the others."""
    return [column for column in ("fold", "seed") if column in frame]


def _find_respelt(names: "pd.Series[str]") -> "pd.Series[bool]":
    """Rows whose fold equals another's as a number but not as text, as 0 and 00 do: two folds of one network."""
    numbers = pd.to_numeric(names, errors="coerce")
    first = names.groupby(numbers).transform("first")
    return numbers.notna() & (names != first)


def _refuse_gaps(name: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming a fold, and by its row in another fold a scan, that lack each other."""
    if "fold" not in frame:
        return
    first_rows = frame.drop_duplicates("scan_id")
    for _, rows in frame.groupby(_name_member_columns(frame), sort=False):
        lacking = first_rows[~first_rows["scan_id"].isin(rows["scan_id"])]
        if len(lacking):
            row, scan = lacking.index[0], lacking.iloc[0]
            more = f" ({len(lacking) - 1} more scans like it)" if len(lacking) > 1 else ""
            raise UsageError(
                f"{name} row {row}: scan_id {scan['scan_id']!r} is in {_name_member(scan)} but not in "
                f"{_name_member(rows.iloc[0])}; every fold must say something of every scan{more}"
            )
    _refuse_missing_seeds(name, frame)


def _refuse_missing_seeds(name: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming a fold without a seed that another fold has: what is averaged would weigh folds."""
    if "seed" not in frame:
        return
    members = frame.drop_duplicates(["fold", "seed"])
    trainings = members["fold"].value_counts(sort=False)
    if trainings.min() < trainings.max():
        fewest, most = str(trainings.idxmin()), str(trainings.idxmax())
        row, seed = next((row, seed) for row, fold, seed in members[["fold", "seed"]].itertuples() if fold == fewest)
        raise UsageError(
            f"{name} row {row}: fold {fewest!r} begins here with seed {seed!r} and has {trainings.min()} seeds, but "
            f"fold {most!r} has {trainings.max()}; give every fold as many seeds"
        )


def _name_member(row: "pd.Series[Any]") -> str:
    return " of ".join(f"{column} {row[column]!r}" for column in ("fold", "seed") if column in row)


def _gather(name: str, sha256: str, frame: pd.DataFrame, numbers: pd.DataFrame) -> Predictions:
    """Lay a checked table out: scans in the order of the table, folds in that of their numbers, then of their seeds."""
    scans = frame.drop_duplicates("scan_id")
    columns = _name_member_columns(frame)
    groups: dict[tuple[str, ...], pd.DataFrame] = {(): frame}
    if columns:
        groups = {tuple(map(str, member)): rows for member, rows in frame.groupby(columns)}
    members = sorted(groups, key=lambda member: [(len(part), part) for part in member])
    in_order = [groups[member].reset_index().set_index("scan_id").loc[scans["scan_id"], "index"] for member in members]
    return Predictions(
        name=name,
        sha256=sha256,
        scan_ids=tuple(scans["scan_id"]),
        patient_ids=tuple(scans["patient_id"]) if "patient_id" in scans else None,
        labels=np.array([LABELS.index(label) for label in scans["label"]], np.int64),
        folds=tuple(member[0] if member else None for member in members),
        fold_probabilities=np.stack([numbers.loc[rows].to_numpy() for rows in in_order]),
        seeds=tuple(member[1] for member in members) if "seed" in columns else None,
        rows=tuple(scans.index),
    )
