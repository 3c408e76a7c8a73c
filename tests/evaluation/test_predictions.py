"""Predictions tables: each defect is refused by its row, and what is sound arrives where it belongs."""

import io

import numpy as np
import pandas as pd
import pytest

from darnet.errors import UsageError
from darnet.evaluation.predictions import Predictions, read_predictions_table
from tests.places import SHARED

CCII = SHARED / "data" / "ccii"
HEADER = "scan_id,label,prob_cp,prob_ncp,prob_normal"
GOOD = "0.2,0.7,0.1"


def read_csv(*rows: str, header: str = HEADER) -> Predictions:
    return read_predictions_table("t.csv", "\n".join([header, *rows]).encode())


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], r"t\.csv: no rows"),
        ([f"a,CP,{GOOD}", f" ,CP,{GOOD}"], "row 3: scan_id ' ' is empty"),
        ([f"a,CP,{GOOD}", f"b,covid,{GOOD}"], "row 3: label 'covid' is unknown; allowed are CP, NCP, Normal"),
        ([f"a,CP,{GOOD}", "b,CP,0.2,,0.1"], "row 3: prob_ncp '' is not a finite number"),
        ([f"a,CP,{GOOD}", "b,CP,0.2,high,0.1"], "row 3: prob_ncp 'high' is not a finite number"),
        (["a,CP,0.2,nan,0.1"], "row 2: prob_ncp 'nan' is not a finite number"),
        (["a,CP,0.2,0.7,inf"], "row 2: prob_normal 'inf' is not a finite number"),
        ([f"a,CP,{GOOD}", "b,CP,-0.1,1,0.1"], "row 3: prob_cp '-0.1' is negative"),
        (["a,CP,0,1.1,0"], "row 2: prob_ncp '1.1' is above 1"),
        ([f"a,CP,{GOOD}", "b,CP,0.2,0.7,0.102"], "row 3: prob_cp '0.2' and the other two do not add up to 1"),
        ([f"a,CP,{GOOD}", "b,CP,0.2,0.7,0.098"], "row 3: prob_cp '0.2' and the other two do not add up to 1"),
        ([f"a,CP,{GOOD}", f"b,CP,{GOOD}", f"a,CP,{GOOD}"], "row 4: scan_id 'a' is also in an earlier row; keep one"),
        ([f"a,CP,{GOOD}", f"a ,CP,{GOOD}"], "row 3: scan_id 'a ' begins or ends with white space"),
        (["a,CP,0.2,0.7"], "row 2: 4 cells, but the header has 5"),
    ],
)
def test_each_defect_is_refused_by_its_row(rows: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_csv(*rows)


@pytest.mark.parametrize("column", HEADER.split(","))
def test_a_missing_column_is_named(column: str) -> None:
    header = HEADER.replace(column, "other")
    with pytest.raises(UsageError, match=rf"t\.csv: no column {column}; add or rename it"):
        read_csv(f"a,CP,{GOOD}", header=header)


def test_a_column_that_is_nearly_an_optional_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"t\.csv: column 'Patient_id' is nearly patient_id; rename it"):
        read_csv(f"a,CP,{GOOD},1", header=f"{HEADER},Patient_id")


FOLDS = f"{HEADER},fold,patient_id"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([f"a,CP,{GOOD},,1"], "row 2: fold '' is empty"),
        ([f"a,CP,{GOOD},0, "], "row 2: patient_id ' ' is empty"),
        ([f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},0,1"], "row 3: scan_id 'a' is also in an earlier row of this fold"),
        ([f"a,CP,{GOOD},0,1", f"a,NCP,{GOOD},1,1"], "row 3: label 'NCP' is not what an earlier row says of this scan"),
        ([f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},1,2"], "row 3: patient_id '2' is not what an earlier row says"),
        ([f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},00,1"], "row 3: fold '00' is an earlier fold's number, written otherwise"),
        ([f"a,CP,{GOOD},x,1", f"a,CP,{GOOD},1,1", f"a,CP,{GOOD},1.0,1"], r"row 4: fold '1\.0' is an earlier fold's"),
        ([f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},0 ,1"], "row 3: fold '0 ' begins or ends with white space"),
        ([f"a,CP,{GOOD},0,1", f"b,CP,{GOOD},0,1\t"], "row 3: patient_id '1.t' holds a character that is not shown"),
        (
            [f"a,CP,{GOOD},0,1", f"b,CP,{GOOD},0,1", f"a,CP,{GOOD},1,1"],
            "row 3: scan_id 'b' is in fold '0' but not in fold '1'",
        ),
        (
            [f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},1,1", f"b,CP,{GOOD},1,1", f"c,CP,{GOOD},1,1"],
            r"row 4: scan_id 'b' is in fold '1' but not in fold '0'.*\(1 more scans",
        ),
    ],
)
def test_defects_between_folds_are_refused_by_their_row(rows: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_csv(*rows, header=FOLDS)


SEEDS = f"{HEADER},fold,seed"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([f"a,CP,{GOOD},0,"], "row 2: seed '' is empty; name the seed"),
        (
            [f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},0,1"],
            "row 3: scan_id 'a' is also in an earlier row of this fold and seed",
        ),
        ([f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},0,01"], "row 3: seed '01' is an earlier seed's number, written otherwise"),
        (
            [f"a,CP,{GOOD},0,1", f"b,CP,{GOOD},0,1", f"a,CP,{GOOD},0,2"],
            "row 3: scan_id 'b' is in fold '0' of seed '1' but not in fold '0' of seed '2'",
        ),
        (
            [f"a,CP,{GOOD},0,1", f"a,CP,{GOOD},0,2", f"a,CP,{GOOD},1,1"],
            "row 4: fold '1' begins here with seed '1' and has 1 seeds, but fold '0' has 2",
        ),
    ],
)
def test_defects_between_seeds_are_refused(rows: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_csv(*rows, header=SEEDS)


def test_seeds_without_folds_are_refused() -> None:
    with pytest.raises(UsageError, match=r"t\.csv: column seed without column fold; add it"):
        read_csv(f"a,CP,{GOOD},1", header=f"{HEADER},seed")


def test_models_are_in_the_order_of_folds_then_of_seeds() -> None:
    rows = {("1", "10"): 0.1, ("0", "2"): 0.2, ("1", "2"): 0.3, ("0", "10"): 0.4}
    table = read_csv(
        *(f"a,CP,{1 - value},{value},0,{fold},{seed}" for (fold, seed), value in rows.items()), header=SEEDS
    )
    assert table.members == [("0", "2"), ("0", "10"), ("1", "2"), ("1", "10")]
    assert table.fold_probabilities[:, 0, 1].tolist() == [0.2, 0.4, 0.3, 0.1]
    assert table.probabilities[0] == pytest.approx([0.75, 0.25, 0])
    assert (table.num_folds, table.num_seeds) == (2, 2)
    assert table.member_names[0] == "fold 0 seed 2"


def test_a_seed_that_is_another_in_each_fold_is_one_training_of_each() -> None:
    table = read_csv(f"a,CP,{GOOD},0,0", f"a,CP,{GOOD},1,1", header=SEEDS)
    assert (table.num_folds, table.num_seeds, table.member_names) == (2, 1, ["fold 0", "fold 1"])


def test_folds_in_any_order_of_rows_meet_scan_by_scan() -> None:
    table = read_csv(
        "b,NCP,0.1,0.8,0.1,10,007",
        "a,CP,0.6,0.2,0.2,2,7",
        "a,CP,0.8,0.1,0.1,10,7",
        "b,NCP,0.3,0.4,0.3,2,007",
        header=FOLDS,
    )
    assert table.scan_ids == ("b", "a")
    assert table.patient_ids == ("007", "7")
    assert (table.folds, table.num_patients, table.labels.tolist()) == (("2", "10"), 2, [1, 0])
    assert table.fold_probabilities[0].tolist() == [[0.3, 0.4, 0.3], [0.6, 0.2, 0.2]]
    assert table.fold_probabilities[1].tolist() == [[0.1, 0.8, 0.1], [0.8, 0.1, 0.1]]
    assert table.probabilities == pytest.approx(np.array([[0.2, 0.6, 0.2], [0.7, 0.15, 0.15]]))


def test_parquet_reads_as_csv_does() -> None:
    frame = pd.DataFrame({"scan_id": ["a", "b"], "label": ["CP", "Normal"], "patient_id": [1, 2]})
    frame[["prob_cp", "prob_ncp", "prob_normal"]] = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]], np.float32)
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    table = read_predictions_table("t.parquet", buffer.getvalue())
    assert (table.scan_ids, table.patient_ids, table.folds) == (("a", "b"), ("1", "2"), (None,))
    assert table.probabilities.tolist() == [[0.5, 0.25, 0.25], [0, 0, 1]]
    frame["prob_cp"] = [0.5, None]
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    with pytest.raises(UsageError, match=r"t\.parquet row 2: prob_cp nan is not a finite number"):
        read_predictions_table("t.parquet", buffer.getvalue())


@pytest.mark.parametrize("printed", ["0.333,0.333,0.333", "0.334,0.334,0.333"])
def test_three_printed_decimals_are_near_enough_to_one(printed: str) -> None:
    """Of three thirds, and of 0.3336, 0.3336 and 0.3328."""
    assert read_csv(f"a,CP,{printed}").scan_ids == ("a",)


@pytest.mark.skipif(not CCII.is_dir(), reason=f"{CCII} is absent")
def test_the_authors_tables_are_sound() -> None:
    table = read_predictions_table("v.csv", (CCII / "predictions_v1.1.csv").read_bytes())
    assert np.bincount(table.labels).tolist() == [177, 169, 126]
