"""Who is in the study: which scan is whose, with what diagnosis, in which cohort and fold.

The bytes of a CSV or Parquet table enter; a checked frame of scans, divided into cohorts and folds, leaves.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pandas as pd

from darnet.config import CohortConfig, Section, TrainConfig
from darnet.errors import UsageError
from darnet.scan import LABELS, FloatArray, Source
from darnet.tables import Rule, list_id_rules, read_table, refuse_rows, to_text

NUM_FOLDS = TrainConfig().num_folds
NEEDED_COLUMNS = ("scan_id", "patient_id", "diagnosis")
COHORTS = ("train", "test")
COHORT_COLUMNS = ("cohort", "paper_cohort")
# Findings about a scan that a table may bring: 1, 0, or empty where nobody looked. Source: the lists about CC-CCII.
FLAG_COLUMNS = ("lung_masked", "duplicate_or_noise_slices", "audited", "discard")
WHOLE_COLUMNS = (*FLAG_COLUMNS, "fold")  # numbers that a Parquet table may hold as bools, or as floats for their gaps
ORDER_DEFECTS = ("reversed", "shuffled")


class LeftOut(StrEnum):
    """Why a scan of the table is not used. Source: ours."""

    NOT_IN_COHORT = "NOT_IN_COHORT"  # the table gives it to neither training nor test
    DISCARDED = "DISCARDED"
    SHUFFLED = "SHUFFLED"
    DUPLICATE_SLICES = "DUPLICATE_SLICES"
    NOT_IN_VOLUMES = "NOT_IN_VOLUMES"  # to an audit of volumes, which knows no more; preparing tells why

    @property
    def detail(self) -> str:
        """What in the table and the settings decided it."""
        return {
            LeftOut.NOT_IN_COHORT: "the table puts it in neither cohort",
            LeftOut.DISCARDED: "discard is 1 (cohorts.drop_discarded)",
            LeftOut.SHUFFLED: "order_defect is shuffled (cohorts.drop_shuffled)",
            LeftOut.DUPLICATE_SLICES: "duplicate_or_noise_slices is 1 (cohorts.drop_duplicates)",
            LeftOut.NOT_IN_VOLUMES: "the volumes lack it (their excluded.csv says why)",
        }[self]


class Division(Section):
    """How a cohort table was divided: by which of its columns, or else by which settings."""

    cohorts_by: Literal["patient", "cohort", "paper_cohort"]
    """The table's column that makes the cohorts; `patient` where they were dealt."""
    folds_by: Literal["patient", "fold"]
    """The table's column that makes the folds; `patient` where they were dealt."""
    cohorts: CohortConfig
    """The settings, their defaults spelled out."""
    num_folds: int
    """Folds of the training cohort."""


def read_cohort(name: str, data: bytes, *, num_folds: int = NUM_FOLDS) -> pd.DataFrame:
    """Read a cohort table; `name` tells its format (.csv or .parquet) and stands in every complaint.

    scan_id and patient_id are opaque text: leading zeros stay. Optional columns `cohort` and `paper_cohort` hold train
    or test; an empty cell there is a scan in neither. A `fold` (0-based, below `num_folds`) beside `cohort` is that of
    a training scan. Optional findings are `order_defect` (reversed, shuffled or empty) and the yes-or-no columns of
    `FLAG_COLUMNS` (1, 0 or empty). Every other column is kept as it is.
    Raises: UsageError naming file, row (from 1; a CSV's header counts) and remedy.
    """
    optional = (*COHORT_COLUMNS, "order_defect", *WHOLE_COLUMNS)
    frame = read_table(name, data, "cohort table", NEEDED_COLUMNS, optional)
    for column in (*NEEDED_COLUMNS, *optional):
        if column in frame:
            frame[column] = to_text(name, _to_whole(frame[column]) if column in WHOLE_COLUMNS else frame[column])
    _check_cohort(name, frame)
    if has_folds(frame):
        refuse_rows(name, frame, _rules_of_folds(frame, num_folds))
    return frame.reset_index(drop=True)


def divide_cohort(
    frame: pd.DataFrame, *, num_folds: int, seed: int, division: str = "patient", test_fraction: float = 0.2
) -> pd.DataFrame:
    """Give every scan a cohort, and every training scan a fold (0-based; none for test scans), patient by patient.

    A table that brings its own cohorts keeps them, and `paper` takes those of its column `paper_cohort`: scans in
    neither are left out, of the paper's a patient in both stays in both, folds divide the training patients. A column
    `fold` is kept where it belongs to these cohorts, else replaced. Rows keep their order; the division depends on
    their content and the seed alone, and dividing a divided table again changes nothing, under any seed.
    Raises: UsageError where a diagnosis has fewer training patients than folds, or none in a test cohort made here;
            where a fold of the table's own holds no scan; where `paper` is asked of a table without such a column, and
            any other division of one that has a patient in both cohorts.
    Source: paper sec. 4.1 (folds on patient level); a test cohort on patient level is ours, the paper's was not.
    """
    frame = frame.reset_index(drop=True)
    own = name_own_cohorts(frame, division)
    keeps_folds = _has_own_folds(frame, own)
    if own is not None:
        divided = frame.assign(cohort=frame[own])[frame[own].isin(COHORTS)]
        if division == "patient":
            _refuse_leak(divided)
    else:
        if not 0 < test_fraction < 1:
            raise UsageError(f"test_fraction {test_fraction} must lie between 0 and 1")
        part = _deal_patients(frame, (1 - test_fraction, test_fraction), np.random.default_rng(seed))
        divided = frame.assign(cohort=part.map(dict(enumerate(COHORTS))))
        _check_patients(divided[divided["cohort"] == "test"], 1, "the test cohort: raise test_fraction")
    training = divided[divided["cohort"] == "train"]
    _check_patients(training, num_folds, f"{num_folds} training folds: ask for fewer folds")
    if keeps_folds:
        fold = _keep_folds(training, num_folds)
    else:
        fold = _deal_patients(training, (1 / num_folds,) * num_folds, np.random.default_rng(seed))
    return divided.assign(fold=fold.astype("Int64")).reset_index(drop=True)


def _refuse_leak(frame: pd.DataFrame) -> None:
    """Raises: UsageError naming a patient of both cohorts, by a scan in each."""
    if leaking := find_leaking_patients(frame):
        scans = frame[frame["patient_id"] == leaking[0]].drop_duplicates("cohort")
        pairs = zip(scans["scan_id"], scans["cohort"], strict=True)
        told = " and ".join(f"{scan_id} for {cohort}" for scan_id, cohort in pairs)
        raise UsageError(
            f"column cohort: {len(leaking)} patients are in both cohorts, as {leaking[0]} with {told}: what a network "
            "learns of them flatters its test. Correct the column; or leave it out, and patients are dealt; or name it "
            "paper_cohort and set cohorts.division to paper, which keeps such a leak and tells of it, keeps discarded "
            "scans too, and deals the folds anew"
        )


def record_division(frame: pd.DataFrame, config: CohortConfig, *, num_folds: int) -> Division:
    """What `divide_cohort` does with this table under these settings.

    Raises: UsageError as `name_own_cohorts`.
    """
    own = name_own_cohorts(frame, config.division)
    return Division.model_validate(
        {
            "cohorts_by": own or "patient",
            "folds_by": "fold" if _has_own_folds(frame, own) else "patient",
            "cohorts": config.resolved,
            "num_folds": num_folds,
        }
    )


def list_other_settings(told: Mapping[str, Mapping[str, Any]], division: Division) -> list[str]:
    """Settings, with their section, that `told` gives another value than a recorded division has."""
    cohorts: dict[str, Any] = division.cohorts.resolved.model_dump(mode="json")
    pairs: list[tuple[str, dict[str, Any]]] = [("train", {"num_folds": division.num_folds}), ("cohorts", cohorts)]
    return [
        f"{section}.{name}"
        for section, values in pairs
        for name, value in values.items()
        if told[section].get(name) != value
    ]


def describe_division(division: Division | None) -> str:
    """A division in one sentence; None is one that nobody recorded."""
    if division is None:
        return "not recorded: prepared by an earlier version"
    config, dealt = division.cohorts, f"dealt by patient (seed {division.cohorts.seed})"
    cohorts, folds = (
        dealt if column == "patient" else f"of the table's column {column}"
        for column in (division.cohorts_by, division.folds_by)
    )
    drops = {
        "discarded": config.is_discarded_dropped,
        "shuffled": config.is_shuffled_dropped,
        "duplicate or noise slices": config.drop_duplicates,
    }
    left_out = ", ".join(name for name, is_dropped in drops.items() if is_dropped) or "nothing"
    told = f"{config.division}: cohorts {cohorts}; {division.num_folds} folds {folds}; left out for defects: {left_out}"
    return told if config.turn_reversed else f"{told}; reversed scans as they are stored"


def describe_excluded(excluded: Mapping[str, int] | None) -> str:
    """Scans of a table that its volumes lack, counted by reason; None are those that nobody recorded."""
    if excluded is None:
        return "not recorded: prepared by an earlier version"
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(excluded.items()))
    return f"{told} (excluded.csv beside the volumes names each)" if told else "no scan of the table"


def name_own_cohorts(frame: pd.DataFrame, division: str) -> str | None:
    """The column by which the table itself says which scans are for training and which for test, if one counts.

    Raises: UsageError where `paper` is asked of a table that does not say what the paper did.
    """
    if division == "paper":
        if not has_cohorts(frame, "paper_cohort"):
            raise UsageError(
                "cohorts.division is paper, but the table has no column paper_cohort with train and test; "
                "add it, or set cohorts.division to patient"
            )
        return "paper_cohort"
    return "cohort" if has_cohorts(frame, "cohort") else None


def has_cohorts(frame: pd.DataFrame, column: str) -> bool:
    """Whether a column of this name says which scans are for training and which for test."""
    return column in frame and bool(frame[column].isin(COHORTS).any())


def _has_own_folds(frame: pd.DataFrame, own: str | None) -> bool:
    """Whether the table's folds belong to the cohorts of its column `own`."""
    return own is not None and has_folds(frame) and bool(frame["cohort"].equals(frame[own]))


def has_folds(frame: pd.DataFrame) -> bool:
    """Whether the table's column `fold` divides the training scans of its column `cohort`."""
    if not has_cohorts(frame, "cohort") or "fold" not in frame:
        return False
    return bool((frame["fold"].notna() & ~frame["fold"].isin([""])).any())


def find_left_out(frame: pd.DataFrame, config: CohortConfig) -> "pd.Series[str]":
    """Say of each row why it is not used, as a `LeftOut`; empty where it is.

    A finding is told before a mere absence from both cohorts: who reads a written division again learns the same.
    Raises: UsageError as `name_own_cohorts`.
    """
    reason = pd.Series("", frame.index, dtype=object)
    own = name_own_cohorts(frame, config.division)
    rules: list[tuple[LeftOut, bool, str, str]] = [
        (LeftOut.NOT_IN_COHORT, own is not None, own or "", ""),
        (LeftOut.DUPLICATE_SLICES, config.drop_duplicates, "duplicate_or_noise_slices", "1"),
        (LeftOut.SHUFFLED, config.is_shuffled_dropped, "order_defect", "shuffled"),
        (LeftOut.DISCARDED, config.is_discarded_dropped, "discard", "1"),
    ]
    for why, is_on, column, value in rules:
        if is_on and column in frame:
            reason[frame[column] == value] = why
    return reason


def find_known_order(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether it is known of each scan what its order_defect is; empty is none only where somebody looked.

    That is where `audited` is 1, or in every scan of a table without such a column.
    """
    is_audited = frame["audited"] == "1" if "audited" in frame else pd.Series(True, frame.index)
    return is_audited | (frame["order_defect"] != "")


def find_reversed(frame: pd.DataFrame) -> list[str]:
    """List the scans whose slices the table knows to be stored in reverse order."""
    return frame.loc[frame["order_defect"] == "reversed", "scan_id"].tolist() if "order_defect" in frame else []


def find_leaking_patients(frame: pd.DataFrame) -> list[str]:
    """List the patients with scans in both cohorts: what a network learnt of them flatters its test."""
    train, test = (set(frame.loc[frame["cohort"] == cohort, "patient_id"]) for cohort in COHORTS)
    return sorted(train & test)


def has_leak(frame: pd.DataFrame) -> bool:
    """Whether training knows a patient, or under another name a standard volume, of the test cohort."""
    return bool(find_leaking_patients(frame)) or count_leaking_volumes(frame) > 0


def count_leaking_volumes(frame: pd.DataFrame) -> int:
    """Test scans whose standard volume is that of a training scan, voxel by voxel (column sha256)."""
    is_test = frame["cohort"] == "test"
    known = frame.loc[frame["cohort"] == "train", "sha256"]
    return int(frame.loc[is_test, "sha256"].isin(known).sum())


def tell_leak(frame: pd.DataFrame) -> str:
    """One sentence, without its full stop, on patients and standard volumes of the test cohort that are in training."""
    leaking, test = find_leaking_patients(frame), frame[frame["cohort"] == "test"]
    told = "No patient of the test cohort has a scan in the training cohort"
    if leaking:
        num_scans = int(test["patient_id"].isin(leaking).sum())
        told = (
            f"{len(leaking)} of {test['patient_id'].nunique()} test patients ({num_scans} of {len(test)} test scans) "
            "also have scans in the training cohort"
        )
    if num_volumes := count_leaking_volumes(frame):
        told += f"; the standard volumes of {num_volumes} of {len(test)} test scans are also those of training scans"
    return told


def count_cohort(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count scans: cohort -> diagnosis -> scans. Source: form of paper Table 1."""
    return {
        cohort: {label: int(((frame["cohort"] == cohort) & (frame["diagnosis"] == label)).sum()) for label in LABELS}
        for cohort in COHORTS
    }


def match_cohort(cohort: pd.DataFrame, sources: Iterable[Source]) -> dict[str, Source]:
    """The source of each scan_id that has one.

    A scan_id is the source's key, or the key with # and the series' digits, or the last part of
    `diagnosis/patient_id/scan_id`, the layout of CC-CCII.
    """
    wanted = defaultdict(list)
    columns = (cohort[name].astype(str) for name in ("scan_id", "patient_id", "diagnosis"))
    for scan_id, patient_id, diagnosis in zip(*columns, strict=True):
        for key in (scan_id, scan_id.rpartition("#")[0], f"{diagnosis}/{patient_id}/{scan_id}"):
            wanted[key].append(scan_id)
    matched: dict[str, Source] = {}
    for source in sources:
        for scan_id in wanted.get(source.key, ()):
            matched.setdefault(scan_id, source)
    return matched


def _to_whole(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Turn bools, and the floats that pandas makes of whole numbers with gaps, into whole numbers."""
    is_float = pd.api.types.is_float_dtype(column.dtype) and bool((column.dropna() % 1 == 0).all())
    return column.astype("Int64") if is_float or pd.api.types.is_bool_dtype(column.dtype) else column


def _check_cohort(name: str, frame: pd.DataFrame) -> None:
    """Raises: UsageError naming the first row that breaks a rule, and what to do."""
    if frame.empty:
        raise UsageError(f"{name}: no rows below the header; a cohort needs at least one scan")
    rules = [
        ("scan_id", "is empty; name the scan", frame["scan_id"].str.strip() == ""),
        ("patient_id", "is empty; without it a patient may end in two folds", frame["patient_id"].str.strip() == ""),
        *list_id_rules(frame, ("scan_id", "patient_id")),
        ("scan_id", "is also in an earlier row; keep one of them", frame["scan_id"].duplicated()),
        ("diagnosis", f"is unknown; allowed are {', '.join(LABELS)}", ~frame["diagnosis"].isin(LABELS)),
    ]
    optional = [
        (COHORT_COLUMNS, COHORTS, "for neither"),
        (("order_defect",), ORDER_DEFECTS, "for none"),
        (FLAG_COLUMNS, ("0", "1"), "for not known"),
    ]
    for columns, allowed, meaning in optional:
        remedy = f"is unknown; allowed are {', '.join(allowed)}, or empty {meaning}"
        rules += [(column, remedy, ~frame[column].isin((*allowed, ""))) for column in columns if column in frame]
    refuse_rows(name, frame, rules)


def _rules_of_folds(frame: pd.DataFrame, num_folds: int) -> list[Rule]:
    """What can be wrong with a fold that the table brings: a leak between folds, or a scan in none or no such fold."""
    is_training, is_empty = frame["cohort"] == "train", frame["fold"] == ""
    allowed = [str(number) for number in range(num_folds)]
    first = frame[is_training].groupby("patient_id")["fold"].first()
    is_moved = is_training & (frame["fold"] != frame["patient_id"].map(first))
    remedy = "or empty the whole column to have folds made"
    out_of_range = f"is out of range; train.num_folds is {num_folds}: 0 to {num_folds - 1}"
    return [
        ("fold", f"of a training scan names no fold; name it, {remedy}", is_training & is_empty),
        ("fold", "of a scan that is not for training; leave it empty", ~is_training & ~is_empty),
        ("fold", out_of_range, ~frame["fold"].isin(["", *allowed])),
        ("fold", f"is not that of an earlier scan of this patient; a patient has one fold, {remedy}", is_moved),
    ]


def _keep_folds(training: pd.DataFrame, num_folds: int) -> "pd.Series[int]":
    """The table's own folds.

    Raises: UsageError naming a fold without scans: its network would have nothing to be chosen by.
    """
    folds = pd.to_numeric(training["fold"]).astype("Int64")
    lacking = sorted(set(range(num_folds)) - set(folds))
    if lacking:
        raise UsageError(
            f"no training scan is in fold {lacking[0]} of the table's column fold; "
            "set train.num_folds to what it holds, or empty the column to have folds made"
        )
    return folds


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
