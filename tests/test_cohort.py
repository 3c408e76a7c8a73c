"""The cohort table against hand-counted tables, the paper's Table 1 and loops over seeds."""

import io
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from darnet.cohort import (
    count_cohort,
    describe_division,
    divide_cohort,
    find_leaking_patients,
    find_left_out,
    find_reversed,
    has_cohorts,
    read_cohort,
    record_division,
)
from darnet.config import CohortConfig
from darnet.errors import UsageError
from tests.places import SHARED

CCII = SHARED / "data" / "ccii" / "scans.csv"
HEADER = "scan_id,patient_id,diagnosis,cohort\n"

NOTE = "scan_id,patient_id,diagnosis,note\n"

needs_ccii = pytest.mark.skipif(not CCII.is_file(), reason=f"no CC-CCII lists at {CCII}")


def read_csv(text: str) -> pd.DataFrame:
    return read_cohort("table.csv", text.encode())


def read_ccii() -> pd.DataFrame:
    return read_cohort("scans.csv", CCII.read_bytes())


def read_ccii_as_printed() -> pd.DataFrame:
    frame = read_ccii()
    return frame.assign(cohort=frame["paper_cohort"])


def make_cohort(seed: int, num_patients: int = 120) -> pd.DataFrame:
    """Patients with 1 to 9 scans; every tenth has scans of several diagnoses."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(num_patients):
        own = ("CP", "NCP", "Normal")[patient % 3]
        for _ in range(rng.integers(1, 10)):
            diagnosis = rng.choice(["CP", "NCP", "Normal"]) if patient % 10 == 0 else own
            rows.append((f"{len(rows):05d}", f"{patient:03d}", str(diagnosis)))
    return pd.DataFrame(rows, columns=["scan_id", "patient_id", "diagnosis"])


def test_identifiers_keep_their_leading_zeros_and_other_columns_stay() -> None:
    frame = read_csv("site,scan_id,patient_id,diagnosis\n07,001,NA,NCP\n,1,0012,Normal\n")
    assert frame.to_dict("list") == {
        "site": ["07", ""],
        "scan_id": ["001", "1"],
        "patient_id": ["NA", "0012"],
        "diagnosis": ["NCP", "Normal"],
    }


def test_parquet_and_csv_of_one_table_are_one_cohort() -> None:
    frame = pd.DataFrame({"scan_id": [10, 11], "patient_id": ["a", "b"], "diagnosis": ["CP", "NCP"]})
    frame["cohort"] = pd.Series(["train", None], dtype="category")
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    from_parquet = read_cohort("s3://bucket/table.PARQUET", buffer.getvalue())
    from_csv = read_csv(HEADER + "10,a,CP,train\n11,b,NCP,\n")
    assert from_parquet.to_dict("list") == from_csv.to_dict("list")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    frame = read_cohort("t.csv", "\ufeffscan_id,patient_id,diagnosis\r\na,b,CP\r\n".encode())
    assert frame.to_dict("list") == {"scan_id": ["a"], "patient_id": ["b"], "diagnosis": ["CP"]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "table.csv: the file is empty"),
        ("scan_id,diagnosis\na,CP\n", r"table.csv: no column patient_id; add or rename it \(columns here: scan_id, d"),
        ("scan_id,patient_id,diagnosis,scan_id\na,1,CP,b\n", "table.csv: column scan_id comes twice"),
        (HEADER, "table.csv: no rows"),
        (HEADER + "a,1,CP,train\nb,1,CP\n", "table.csv row 3: 3 cells, but the header has 4"),
        (HEADER + " ,1,CP,train\n", "table.csv row 2: scan_id ' ' is empty"),
        (HEADER + "a,1,CP,train\nb,1,CP,train\na,2,CP,test\n", "row 4: scan_id 'a' is also in an earlier row"),
        (HEADER + "a,1,CP,train\n\nb,,CP,train\n", "row 4: patient_id '' is empty"),
        (NOTE + 'a,1,CP,"x\ny"\nc,1,covid,\nd,1,ncp,\n', r"row 4: diagnosis 'covid' .* CP, NCP, Normal \(1 more"),
        (HEADER + "a,1,CP,train\nb,1,CP,valid\n", "row 3: cohort 'valid' is unknown; allowed are train, test"),
        (HEADER + "a,1,CP,train\nb,p1 ,CP,train\n", "row 3: patient_id 'p1 ' begins or ends with white space; rem"),
        (HEADER + "a,1,CP,train\n\u00a0b,1,CP,train\n", r"row 3: scan_id '\\xa0b' begins or ends with white space"),
        (HEADER + "a,p\u200b1,CP,train\n", r"row 2: patient_id 'p\\u200b1' holds a character that is not shown"),
        (HEADER + '"a\nb",1,CP,train\n', r"row 3: scan_id 'a\\nb' holds a character that is not shown"),
        (HEADER + "a,1,CP,train\nb,1\0,CP,train\n", "row 3: a cell holds a NUL byte"),
        (HEADER + 'a,1,"CP,train\n', "table.csv: not a CSV file"),
    ],
)
def test_a_wrong_table_is_refused_by_file_and_row(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_csv(text)


@pytest.mark.parametrize(
    ("column", "near"),
    [
        (" discard", "discard"),
        ("Cohort", "cohort"),
        ("Patient_ID", "patient_id"),
        ("FOLD", "fold"),
        ("\u200bscan_id", "scan_id"),
        ("order_defect\t", "order_defect"),
    ],
)
def test_a_column_that_is_nearly_a_known_one_is_refused(column: str, near: str) -> None:
    complaint = re.escape(f"table.csv: column {column!r} is nearly {near}; rename it")
    for header in (f"scan_id,patient_id,diagnosis,{column}", f"{column},patient_id,diagnosis,site"):
        with pytest.raises(UsageError, match=complaint):
            read_csv(header + "\n1,2,CP,x\n")
    assert "sites" in read_csv("scan_id,patient_id,diagnosis,sites\n1,2,CP,x\n")


def test_files_of_other_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cohort\.xlsx: a cohort table is a \.csv or \.parquet"):
        read_cohort("cohort.xlsx", b"PK")
    with pytest.raises(UsageError, match=r"c\.parquet: not a Parquet file"):
        read_cohort("c.parquet", b"scan_id,patient_id\n")
    with pytest.raises(UsageError, match=r"c\.csv: not a CSV file in UTF-8"):
        read_cohort("c.csv", "scan_id,patient_id,diagnosis\nä,b,CP\n".encode("latin-1"))


def test_parquet_complaints_count_rows_from_one_and_refuse_fractional_identifiers() -> None:
    frame = pd.DataFrame({"scan_id": ["a", "b"], "patient_id": ["1", None], "diagnosis": ["CP", "CP"]})
    for patient_ids, complaint in ((["1", None], "row 2: patient_id '' is empty"), ([1.0, None], "patient_id is of")):
        buffer = io.BytesIO()
        frame.assign(patient_id=patient_ids).to_parquet(buffer)
        with pytest.raises(UsageError, match=rf"c\.parquet.*{complaint}"):
            read_cohort("c.parquet", buffer.getvalue())


@pytest.mark.parametrize("seed", range(8))
def test_no_patient_is_in_two_folds_or_cohorts(seed: int) -> None:
    divided = divide_cohort(make_cohort(seed), num_folds=5, seed=seed)
    places: dict[str, set[tuple[str, int | None]]] = {}
    for row in divided.itertuples():
        places.setdefault(row.patient_id, set()).add((row.cohort, None if pd.isna(row.fold) else row.fold))
    assert all(len(place) == 1 for place in places.values())
    assert all((fold is None) == (cohort == "test") for place in places.values() for cohort, fold in place)
    assert {fold for place in places.values() for cohort, fold in place if cohort == "train"} == set(range(5))
    assert find_leaking_patients(divided) == []


@pytest.mark.parametrize("seed", range(8))
def test_folds_and_the_test_cohort_hold_their_share_of_every_diagnosis(seed: int) -> None:
    divided = divide_cohort(make_cohort(seed), num_folds=5, seed=seed)
    counts = count_cohort(divided)
    for label in ("CP", "NCP", "Normal"):
        whole = counts["train"][label] + counts["test"][label]
        assert counts["test"][label] == pytest.approx(0.2 * whole, abs=3)
        in_folds = divided[divided["diagnosis"] == label]["fold"].value_counts()
        assert in_folds.max() - in_folds.min() <= 3


def test_folds_are_no_less_even_than_those_of_scikit_learn() -> None:
    for seed in range(3):
        frame = make_cohort(seed).assign(cohort="train")
        ours = divide_cohort(frame, num_folds=5, seed=seed)
        theirs = np.zeros(len(frame), int)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, rows) in enumerate(splitter.split(frame, frame["diagnosis"], frame["patient_id"])):
            theirs[rows] = fold
        spread_ours = pd.crosstab(ours["fold"], ours["diagnosis"]).std().sum()
        spread_theirs = pd.crosstab(theirs, frame["diagnosis"].to_numpy()).std().sum()
        assert spread_ours <= spread_theirs


def test_the_division_does_not_depend_on_row_order_or_labels() -> None:
    frame = make_cohort(0)
    divided = divide_cohort(frame, num_folds=5, seed=7)
    mixed = frame.sample(frac=1, random_state=3).set_axis([0] * len(frame))
    shuffled = divide_cohort(mixed, num_folds=5, seed=7)
    assert divided.equals(shuffled.sort_values("scan_id", ignore_index=True))
    assert divided["scan_id"].equals(frame["scan_id"])


def test_another_seed_divides_otherwise() -> None:
    frame = make_cohort(0)
    assert not divide_cohort(frame, num_folds=5, seed=0).equals(divide_cohort(frame, num_folds=5, seed=1))


def test_a_table_s_own_cohorts_are_kept_and_scans_in_neither_are_left_out() -> None:
    frame = make_cohort(1)
    patients = frame["patient_id"].unique()
    cohorts = np.random.default_rng(0).choice(["train", "train", "test", ""], len(patients))
    frame["cohort"] = frame["patient_id"].map(dict(zip(patients, cohorts, strict=True)))
    divided = divide_cohort(frame, num_folds=5, seed=0)
    assert has_cohorts(frame, "cohort")
    assert divided.drop(columns="fold").equals(frame[frame["cohort"] != ""].reset_index(drop=True))
    assert divided["fold"].isna().equals(divided["cohort"] == "test")
    assert (divided.groupby("patient_id")["fold"].nunique() <= 1).all()


def test_a_patient_in_both_of_a_table_s_own_cohorts_is_refused_and_only_the_paper_s_leak_is_kept() -> None:
    frame = make_cohort(1)
    frame["cohort"] = "train"
    frame.loc[frame.groupby("patient_id").cumcount() == 1, "cohort"] = "test"
    first = frame[frame["cohort"] == "test"]["patient_id"].min()
    with pytest.raises(UsageError, match=rf"column cohort: \d+ patients are in both cohorts, as {first} with "):
        divide_cohort(frame, num_folds=5, seed=0)
    divided = divide_cohort(frame.rename(columns={"cohort": "paper_cohort"}), num_folds=5, seed=0, division="paper")
    assert first in find_leaking_patients(divided)


def test_an_empty_cohort_column_counts_as_none() -> None:
    frame = make_cohort(1)
    assert not has_cohorts(frame.assign(cohort=""), "cohort")
    expected = divide_cohort(frame, num_folds=5, seed=0)
    assert divide_cohort(frame.assign(cohort=""), num_folds=5, seed=0).equals(expected)


def test_a_diagnosis_with_fewer_patients_than_folds_is_refused() -> None:
    frame = pd.DataFrame(
        {
            "scan_id": [str(number) for number in range(14)],
            "patient_id": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "k", "l", "m"],
            "diagnosis": ["CP"] * 5 + ["NCP"] * 5 + ["Normal"] * 4,
            "cohort": ["train"] * 14,
        }
    )
    with pytest.raises(UsageError, match="3 patients with Normal are too few for 5 training folds"):
        divide_cohort(frame, num_folds=5, seed=0)
    assert divide_cohort(frame, num_folds=3, seed=0).groupby(["fold", "diagnosis"]).ngroups == 9
    with pytest.raises(UsageError, match="0 patients with CP are too few for the test cohort"):
        divide_cohort(frame.drop(columns="cohort"), num_folds=2, seed=0, test_fraction=0.01)
    with pytest.raises(UsageError, match="must lie between"):
        divide_cohort(frame.drop(columns="cohort"), num_folds=2, seed=0, test_fraction=0.0)


def test_counts_have_every_cohort_and_diagnosis() -> None:
    frame = read_csv(HEADER + "a,1,CP,train\nb,1,CP,train\nc,2,NCP,test\nd,2,NCP,train\ne,3,Normal,\n")
    assert count_cohort(frame) == {
        "train": {"CP": 2, "NCP": 1, "Normal": 0},
        "test": {"CP": 0, "NCP": 1, "Normal": 0},
    }
    assert find_leaking_patients(frame) == ["2"]


QUALITY_HEADER = "scan_id,patient_id,diagnosis,paper_cohort,order_defect,duplicate_or_noise_slices,discard\n"
# Patient 1 is in both cohorts; e and g are in neither.
QUALITY_ROWS = """a,1,CP,train,,0,0
b,1,CP,test,reversed,,
c,2,NCP,train,shuffled,1,0
d,3,NCP,test,,1,0
e,4,Normal,,,0,1
f,5,Normal,train,reversed,1,1
g,6,Normal,,,,
"""


def test_each_setting_leaves_out_its_scans_and_no_others() -> None:
    frame = read_csv(QUALITY_HEADER + QUALITY_ROWS)

    def list_left_out(**changed: object) -> dict[str, str]:
        config = CohortConfig(**{"drop_discarded": False, "drop_shuffled": False} | changed)
        reasons = find_left_out(frame, config)
        return dict(zip(frame["scan_id"][reasons != ""], reasons[reasons != ""], strict=True))

    assert list_left_out() == {}
    assert list_left_out(drop_discarded=True) == {"e": "DISCARDED", "f": "DISCARDED"}
    assert list_left_out(drop_shuffled=True) == {"c": "SHUFFLED"}
    duplicates = {"c": "DUPLICATE_SLICES", "d": "DUPLICATE_SLICES", "f": "DUPLICATE_SLICES"}
    assert list_left_out(drop_duplicates=True) == duplicates
    assert list_left_out(division="paper") == {"e": "NOT_IN_COHORT", "g": "NOT_IN_COHORT"}
    assert list_left_out(drop_duplicates=True, drop_shuffled=True)["c"] == "SHUFFLED"
    assert find_reversed(frame) == ["b", "f"]


def test_the_paper_s_division_uses_damaged_scans_as_the_paper_did_unless_told_otherwise() -> None:
    frame = read_csv(QUALITY_HEADER + QUALITY_ROWS.replace("e,4,Normal,,", "e,4,Normal,train,"))

    def list_left_out(**changed: object) -> list[str]:
        reasons = find_left_out(frame, CohortConfig.model_validate(changed))
        return frame["scan_id"][reasons != ""].tolist()

    assert list_left_out() == ["c", "e", "f"]
    assert list_left_out(division="paper") == ["g"]
    assert list_left_out(division="paper", drop_discarded=True) == ["e", "f", "g"]
    assert list_left_out(division="paper", drop_shuffled=True) == ["c", "g"]
    assert list_left_out(drop_discarded=False, drop_shuffled=False) == []


def test_a_table_without_findings_leaves_nothing_out() -> None:
    frame = make_cohort(0)
    assert set(find_left_out(frame, CohortConfig())) == {""}
    assert find_reversed(frame) == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("h,7,CP,train,,0,yes", "row 9: discard 'yes' is unknown; allowed are 0, 1, or empty for not known"),
        ("h,7,CP,train,,2,", "row 9: duplicate_or_noise_slices '2' is unknown"),
        ("h,7,CP,train,backwards,,", "row 9: order_defect 'backwards' is unknown; allowed are reversed, shuffled, or"),
        ("h,7,CP,both,,,", "row 9: paper_cohort 'both' is unknown; allowed are train, test, or empty for neither"),
    ],
)
def test_a_wrong_finding_is_refused_by_row(row: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=rf"table\.csv {complaint}"):
        read_csv(QUALITY_HEADER + QUALITY_ROWS + row + "\n")


def test_findings_in_parquet_may_be_bools_or_numbers_with_gaps() -> None:
    frame = pd.DataFrame({"scan_id": ["a", "b"], "patient_id": ["1", "2"], "diagnosis": ["CP", "NCP"]})
    for column, text in (([True, False], ["1", "0"]), ([1.0, None], ["1", ""]), ([0, 1], ["0", "1"])):
        buffer = io.BytesIO()
        frame.assign(discard=column).to_parquet(buffer)
        assert read_cohort("t.parquet", buffer.getvalue())["discard"].tolist() == text


def test_the_paper_s_division_is_taken_as_printed_and_its_leak_stays() -> None:
    frame = make_cohort(2)
    frame["paper_cohort"] = np.random.default_rng(1).choice(["train", "train", "test", ""], len(frame))
    divided = divide_cohort(frame, num_folds=5, seed=0, division="paper")
    kept = frame[frame["paper_cohort"] != ""]
    assert divided["scan_id"].tolist() == kept["scan_id"].tolist()
    assert divided["cohort"].tolist() == kept["paper_cohort"].tolist()
    assert find_leaking_patients(divided) == sorted(
        patient for patient, rows in kept.groupby("patient_id") if set(rows["paper_cohort"]) == {"train", "test"}
    )
    assert (divided.groupby("patient_id")["fold"].nunique() <= 1).all()


def test_by_default_the_paper_s_column_divides_nothing_and_no_patient_leaks() -> None:
    frame = make_cohort(2).assign(paper_cohort="train")
    divided = divide_cohort(frame, num_folds=5, seed=0)
    assert set(divided["cohort"]) == {"train", "test"}
    assert find_leaking_patients(divided) == []


def test_the_paper_s_division_needs_the_paper_s_column() -> None:
    for frame in (make_cohort(0), make_cohort(0).assign(paper_cohort="")):
        with pytest.raises(UsageError, match="no column paper_cohort with train and test"):
            divide_cohort(frame, num_folds=5, seed=0, division="paper")


def test_a_divided_table_read_again_is_divided_alike() -> None:
    divided = divide_cohort(make_cohort(3), num_folds=5, seed=4)
    again = divide_cohort(divided.drop(columns="fold"), num_folds=5, seed=4)
    pd.testing.assert_frame_equal(again, divided)


FOLDS_HEADER = "scan_id,patient_id,diagnosis,cohort,fold\n"
FOLDS_ROWS = "a,1,CP,train,1\nb,1,CP,train,1\nc,2,CP,train,0\nd,3,CP,test,\ne,4,CP,,\n"


def make_folds(seed: int) -> pd.DataFrame:
    """A table with cohorts and folds of its own, dealt by somebody else."""
    divided = divide_cohort(make_cohort(seed), num_folds=5, seed=seed + 100)
    return divided.assign(fold=(divided["fold"] + 2) % 5, site="x")


def test_a_table_s_own_folds_are_kept_whatever_the_seed_and_in_csv_and_parquet_alike() -> None:
    own = make_folds(0)
    buffer = io.BytesIO()
    own.astype({"fold": "float64"}).to_parquet(buffer)
    for table in (
        own,
        read_cohort("t.csv", own.to_csv(index=False).encode()),
        read_cohort("t.parquet", buffer.getvalue()),
    ):
        pd.testing.assert_frame_equal(divide_cohort(table, num_folds=5, seed=9), own)


def test_folds_of_other_cohorts_are_replaced() -> None:
    own = make_folds(1)
    without = own.drop(columns="fold")
    expected = divide_cohort(without, num_folds=5, seed=3)
    pd.testing.assert_frame_equal(divide_cohort(own.assign(fold=""), num_folds=5, seed=3)[list(expected)], expected)
    paper = own.assign(paper_cohort=np.where(own.index % 3 == 0, "test", "train"))
    fresh = divide_cohort(paper.drop(columns="fold"), num_folds=5, seed=3, division="paper")
    divided = divide_cohort(paper, num_folds=5, seed=3, division="paper")
    pd.testing.assert_frame_equal(divided[list(fresh)], fresh)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("f,1,CP,train,0", "row 7: fold '0' is not that of an earlier scan of this patient"),
        ("f,5,CP,train,2", "row 7: fold '2' is out of range; train.num_folds is 2: 0 to 1"),
        ("f,5,CP,train,00", "row 7: fold '00' is out of range"),
        ("f,5,CP,train,-1", "row 7: fold '-1' is out of range"),
        ("f,5,CP,train,", "row 7: fold '' of a training scan names no fold; name it, or empty the whole column"),
        ("f,5,CP,test,1", "row 7: fold '1' of a scan that is not for training; leave it empty"),
        ("f,5,CP,,1", "row 7: fold '1' of a scan that is not for training"),
    ],
)
def test_a_wrong_fold_is_refused_by_row(row: str, complaint: str) -> None:
    assert len(read_cohort("t.csv", (FOLDS_HEADER + FOLDS_ROWS).encode(), num_folds=2)) == 5
    with pytest.raises(UsageError, match=rf"t\.csv {complaint}"):
        read_cohort("t.csv", (FOLDS_HEADER + FOLDS_ROWS + row + "\n").encode(), num_folds=2)


def test_a_fold_without_scans_is_refused() -> None:
    own = make_folds(2)
    with pytest.raises(UsageError, match="no training scan is in fold 5 of the table"):
        divide_cohort(own, num_folds=6, seed=0)


@needs_ccii
def test_the_published_lists_give_table_1() -> None:
    """Source: paper Table 1."""
    assert count_cohort(read_ccii_as_printed()) == {
        "train": {"CP": 1328, "NCP": 1320, "Normal": 952},
        "test": {"CP": 177, "NCP": 169, "Normal": 126},
    }


@needs_ccii
def test_half_of_the_paper_s_test_patients_are_in_its_training_cohort() -> None:
    frame = read_ccii_as_printed()
    test = frame[frame["cohort"] == "test"]
    leaking = find_leaking_patients(frame)
    assert (len(leaking), test["patient_id"].nunique()) == (231, 436)
    assert (test["patient_id"].isin(leaking).sum(), len(test)) == (255, 472)


@needs_ccii
def test_the_paper_s_cohort_divides_into_even_folds_of_whole_patients() -> None:
    divided = divide_cohort(read_ccii(), num_folds=5, seed=0, division="paper")
    assert len(divided) == 4072
    training = divided[divided["cohort"] == "train"]
    assert (training.groupby("patient_id")["fold"].nunique() == 1).all()
    counts = pd.crosstab(training["fold"], training["diagnosis"])
    assert (counts.max() - counts.min() <= 1).all()


@needs_ccii
def test_the_defects_of_cc_ccii_are_counted_and_its_default_division_leaks_no_patient() -> None:
    """Source: hand counts in the lists: 39 discarded, 61 shuffled, 98 reversed, 106 scans of no cohort."""
    frame = read_ccii()
    reasons = find_left_out(frame, CohortConfig())
    assert reasons.value_counts().to_dict() == {"": 4078, "SHUFFLED": 61, "DISCARDED": 39}
    as_printed = find_left_out(frame, CohortConfig(division="paper"))
    assert as_printed.value_counts().to_dict() == {"": 4072, "NOT_IN_COHORT": 106}
    assert len(find_reversed(frame)) == 98
    divided = divide_cohort(frame[reasons == ""], num_folds=5, seed=0)
    assert len(divided) == 4078
    assert find_leaking_patients(divided) == []
    assert (divided["cohort"] == "test").mean() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("columns", "division", "told"),
    [
        ({}, "patient", "patient: cohorts dealt by patient (seed 7); 2 folds dealt by patient (seed 7)"),
        (
            {"cohort": "train"},
            "patient",
            "patient: cohorts of the table's column cohort; 2 folds dealt by patient (seed 7)",
        ),
        (
            {"cohort": "train", "fold": 0},
            "patient",
            "patient: cohorts of the table's column cohort; 2 folds of the table's column fold",
        ),
        (
            {"cohort": "test", "fold": 0, "paper_cohort": "train"},
            "paper",
            "paper: cohorts of the table's column paper_cohort; 2 folds dealt by patient (seed 7)",
        ),
    ],
)
def test_a_division_is_recorded_with_the_columns_that_made_it(
    columns: dict[str, object], division: str, told: str
) -> None:
    frame = pd.DataFrame({"scan_id": ["a", "b"], "patient_id": ["1", "2"], "diagnosis": ["CP", "CP"], **columns})
    config = CohortConfig.model_validate({"division": division, "drop_duplicates": division == "paper", "seed": 7})
    left_out = {"patient": "discarded, shuffled", "paper": "duplicate or noise slices"}[division]
    recorded = record_division(frame, config, num_folds=2)
    assert describe_division(recorded) == f"{told}; left out for defects: {left_out}"
    unturned = record_division(frame, config.model_copy(update={"turn_reversed": False}), num_folds=2)
    assert describe_division(unturned) == f"{told}; left out for defects: {left_out}; reversed scans as they are stored"
    assert (recorded.cohorts.seed, recorded.num_folds) == (7, 2)


def test_a_recorded_division_keeps_what_its_defaults_meant() -> None:
    """Under other defaults of a later version it must still say what was done."""
    frame = pd.DataFrame({"scan_id": ["a"], "patient_id": ["1"], "diagnosis": ["CP"]})
    recorded = record_division(frame, CohortConfig(), num_folds=2).cohorts
    assert (recorded.drop_discarded, recorded.drop_shuffled, recorded.drop_duplicates) == (True, True, False)
