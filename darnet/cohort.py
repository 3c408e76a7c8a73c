"""Who is in the study: which scan is whose, with what diagnosis, in which cohort and fold.

The bytes of a CSV or Parquet table enter; a checked frame of scans, divided into cohorts and folds, leaves.
"""

import numpy as np
import pandas as pd

from darnet.errors import UsageError
from darnet.scan import DIAGNOSES, FloatArray
from darnet.tables import read_table, refuse_rows, to_text

NEEDED_COLUMNS = ("scan_id", "patient_id", "diagnosis")
COHORTS = ("train", "test")
LABELS = tuple(str(diagnosis) for diagnosis in DIAGNOSES)


def read_cohort(name: str, data: bytes) -> pd.DataFrame:
    """Read a cohort table; `name` tells its format (.csv or .parquet) and stands in every complaint.

    scan_id and patient_id are opaque text: leading zeros stay. An optional column `cohort` holds train or test; an
    empty cell there is a scan in neither. Every other column is kept as it is.
    Raises: UsageError naming file, row (from 1; a CSV's header counts) and remedy.
    """
    frame = read_table(name, data, "cohort table", NEEDED_COLUMNS)
    for column in (*NEEDED_COLUMNS, "cohort"):
        if column in frame:
            frame[column] = to_text(name, frame[column])
    _check_cohort(name, frame)
    return frame.reset_index(drop=True)


def divide_cohort(frame: pd.DataFrame, *, num_folds: int, seed: int, test_fraction: float = 0.2) -> pd.DataFrame:
    """Give every scan a cohort, and every training scan a fold (0-based; none for test scans), patient by patient.

    A table that brings its own cohorts keeps them: scans in neither are left out, folds divide the training patients.
    A column `fold` is replaced. Rows keep their order; the division depends on their content and the seed alone.
    Raises: UsageError where a diagnosis has fewer training patients than folds, or none in a test cohort made here.
    Source: paper sec. 4.1 (folds on patient level); a test cohort on patient level is ours, the paper's was not.
    """
    rng = np.random.default_rng(seed)
    frame = frame.reset_index(drop=True)
    if has_own_cohorts(frame):
        divided = frame[frame["cohort"].isin(COHORTS)]
    else:
        if not 0 < test_fraction < 1:
            raise UsageError(f"test_fraction {test_fraction} must lie between 0 and 1")
        part = _deal_patients(frame, (1 - test_fraction, test_fraction), rng)
        divided = frame.assign(cohort=part.map(dict(enumerate(COHORTS))))
        _check_patients(divided[divided["cohort"] == "test"], 1, "the test cohort: raise test_fraction")
    training = divided[divided["cohort"] == "train"]
    _check_patients(training, num_folds, f"{num_folds} training folds: ask for fewer folds")
    fold = _deal_patients(training, (1 / num_folds,) * num_folds, rng)
    return divided.assign(fold=fold.astype("Int64")).reset_index(drop=True)


def has_own_cohorts(frame: pd.DataFrame) -> bool:
    """Whether the table says itself which scans are for training and which for test."""
    return "cohort" in frame and bool(frame["cohort"].isin(COHORTS).any())


def find_leaking_patients(frame: pd.DataFrame) -> list[str]:
    """List the patients with scans in both cohorts: what a network learnt of them flatters its test."""
    train, test = (set(frame.loc[frame["cohort"] == cohort, "patient_id"]) for cohort in COHORTS)
    return sorted(train & test)


def count_cohort(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count scans: cohort -> diagnosis -> scans. Source: form of paper Table 1."""
    return {
        cohort: {label: int(((frame["cohort"] == cohort) & (frame["diagnosis"] == label)).sum()) for label in LABELS}
        for cohort in COHORTS
    }


def _check_cohort(name: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming the first row that breaks a rule, and what to do."""
    if frame.empty:
        raise UsageError(f"{name}: no rows below the header; a cohort needs at least one scan")
    rules = [
        ("scan_id", "is empty; name the scan", frame["scan_id"].str.strip() == ""),
        ("scan_id", "is also in an earlier row; keep one of them", frame["scan_id"].duplicated()),
        ("patient_id", "is empty; without it a patient may end in two folds", frame["patient_id"].str.strip() == ""),
        ("diagnosis", f"is unknown; allowed are {', '.join(LABELS)}", ~frame["diagnosis"].isin(LABELS)),
    ]
    if "cohort" in frame:
        remedy = f"is unknown; allowed are {', '.join(COHORTS)}, or empty for neither"
        rules.append(("cohort", remedy, ~frame["cohort"].isin((*COHORTS, ""))))
    refuse_rows(name, frame, rules)


def _check_patients(frame: pd.DataFrame, num_needed: int, purpose: str) -> None:
    """Raises: UsageError naming a diagnosis with fewer patients than needed."""
    for label in LABELS:
        num_patients = frame.loc[frame["diagnosis"] == label, "patient_id"].nunique()
        if num_patients < num_needed:
            raise UsageError(f"{num_patients} patients with {label} are too few for {purpose} or add patients")


def _deal_patients(frame: pd.DataFrame, shares: tuple[float, ...], rng: np.random.Generator) -> "pd.Series[int]":
    """Deal whole patients to parts of the wanted shares; returns each row's part.

    The largest patient first, each to the part that is emptiest in that patient's diagnoses; equals in random order.
    Source: ours; scikit-learn's StratifiedGroupKFold has no unequal shares and would be needed in production.
    """
    counts = pd.crosstab(frame["patient_id"], frame["diagnosis"])
    scans: FloatArray = (counts / counts.sum()).to_numpy()
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts.sum(axis=1).to_numpy()[order], kind="stable")]
    wanted = np.array(shares)
    dealt = np.zeros((len(shares), scans.shape[1]))
    part = np.zeros(len(counts), np.int64)
    for patient in order:
        # What the sum over parts of dealt**2 / wanted grows by; it is least when dealt is in proportion to wanted.
        growth = (scans[patient] * (2 * dealt + scans[patient])).sum(axis=1) / wanted
        fewest = np.lexsort((dealt.sum(axis=1) / wanted, growth.round(12)))
        part[patient] = fewest[0]
        dealt[part[patient]] += scans[patient]
    return frame["patient_id"].map(dict(zip(counts.index, part, strict=True)))
