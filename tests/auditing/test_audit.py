"""The audit against hand-made tables with hand-counted leaks, planted faults in images, and the published lists."""

import html
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from darnet.auditing.audit import audit_cohort, describe_duplicates, summarise_audit
from darnet.auditing.features import Duplicate
from darnet.auditing.report import describe_audit, render_audit, write_audit
from darnet.cohort import read_cohort
from darnet.config import TrainConfig, VolumeConfig
from darnet.decode import VolumeStack
from darnet.errors import UsageError
from darnet.phantom import make_phantom
from darnet.scan import DIAGNOSES, Uint8Array
from darnet.settings import PrepareSettings
from darnet.storage import open_store
from darnet.volume import make_standard_volume, resample_mask
from darnet.volumes_folder import write_array, write_facts, write_index
from tests.browser_fixtures import draw_screen, list_requests, read_dom
from tests.places import SHARED

CCII = SHARED / "data" / "ccii" / "scans.csv"
VOLUME = VolumeConfig(shape=(32, 64, 64))

needs_ccii = pytest.mark.skipif(not CCII.is_file(), reason=f"no CC-CCII lists at {CCII}")

# Patients 1 and 4 are in both cohorts: with 2 and 1 test scans. Patient 6 has two diagnoses.
LEAKY = """scan_id,patient_id,diagnosis,paper_cohort
a,1,CP,train
b,1,CP,test
c,1,CP,test
d,2,NCP,train
e,3,NCP,test
f,4,Normal,train
g,4,Normal,test
h,5,Normal,
i,6,CP,train
j,6,NCP,train
"""


def make_settings(out: Path, **changed: Any) -> PrepareSettings:
    return PrepareSettings.model_validate({"cohort": "place/table.csv", "audit": True, "out": str(out)} | changed)


def audit_text(text: str, out: Path, **changed: Any) -> dict[str, Any]:
    """Audit a CSV table, write the files and return what audit.json says."""
    settings = make_settings(out, **changed)
    write_audit(audit_cohort(read_cohort("table.csv", text.encode()), settings), settings.out)
    found: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return found


@pytest.mark.parametrize("column", ["paper_cohort", "cohort"])
def test_a_hand_counted_leak_is_found(column: str, tmp_path: Path) -> None:
    found = audit_text(LEAKY.replace("paper_cohort", column), tmp_path)
    assert found["counts"] == {"train": {"CP": 2, "NCP": 2, "Normal": 1}, "test": {"CP": 2, "NCP": 1, "Normal": 1}}
    assert (found["test_patients"], found["patients_in_both_cohorts"], found["test_scans_of_those"]) == (3, 2, 3)
    assert (found["cohorts_by"], found["test_scans"], found["patients_of_several_diagnoses"]) == (column, 4, 1)
    page = (tmp_path / "audit.html").read_text()
    assert "2 of the 3 test patients (3 of 4 test scans) also have scans in the training cohort" in page
    assert "1 patient with scans of more than one diagnosis" in page
    assert "Research use only" in page
    section = describe_audit(found)
    words = {"paper_cohort": "paper_cohort, as the paper has them", "cohort": "cohort"}[column]
    told = (
        f"By table.csv. 10 scans of 6 patients. Cohorts by the table's column {words}: 2 of the 3 test patients (3 of"
    )
    assert section.text.startswith(told)


LEAKY_PATIENTS = "2 of the 60 test patients (2 of 60 test scans) also have scans in the training cohort."


@pytest.mark.parametrize(
    ("division", "told"),
    [
        (
            "patient",
            f"{LEAKY_PATIENTS} As these settings divide, cohorts dealt on patient level: No patient is in both",
        ),
        ("paper", f"{LEAKY_PATIENTS}\n\n"),
    ],
)
def test_a_report_names_the_cohorts_that_a_leak_is_of(division: str, told: str, tmp_path: Path) -> None:
    """Of 60 patients the first scan is of the paper's test cohort, of two the other is for training, as 30 more are."""
    frame = make_table(90)
    frame["paper_cohort"] = np.where((frame.index % 2 == 1) & (frame["patient_id"] < 2), "train", "")
    frame.loc[frame["patient_id"] >= 60, "paper_cohort"] = "train"
    frame.loc[(frame["paper_cohort"] == "") & (frame.index % 2 == 0), "paper_cohort"] = "test"
    found = audit_text(frame.to_csv(index=False), tmp_path, cohorts={"division": division})
    cohorts = "Cohorts by the table's column paper_cohort, as the paper has them:"
    assert describe_audit(found).text.startswith(f"By table.csv. 180 scans of 90 patients. {cohorts} {told}")


def test_an_audit_of_another_version_is_refused_in_a_report() -> None:
    with pytest.raises(UsageError, match=r"run jobs\.prepare --audit again"):
        describe_audit({"counts": {}})


def test_a_cohort_too_small_to_divide_is_audited_all_the_same(tmp_path: Path) -> None:
    found = audit_text(LEAKY, tmp_path)
    assert "too few" in found["division"]["fault"]
    assert not (tmp_path / "division.csv").exists()
    with pytest.raises(UsageError, match=r"no cohorts of its own, and none can be made: .* too few"):
        audit_text(LEAKY.replace("paper_cohort", "note"), tmp_path)
    with pytest.raises(UsageError, match="no column paper_cohort"):
        audit_text(LEAKY.replace("paper_cohort", "note"), tmp_path, cohorts={"division": "paper"})


def make_table(num_patients: int = 60) -> pd.DataFrame:
    """Two scans a patient; `hospital` tells CP in 50 of 60 cases, `age` nothing, `name` is no property."""
    patients = np.repeat(np.arange(num_patients), 2)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"scan_id": [f"s{number:03d}" for number in range(len(patients))], "patient_id": patients})
    frame["diagnosis"] = np.array([str(diagnosis) for diagnosis in DIAGNOSES])[patients % 3]
    is_cp = (frame["diagnosis"] == "CP") ^ (rng.random(len(frame)) < 1 / 6)
    frame["hospital"] = np.where(is_cp, "north", rng.choice(["south", "east"], len(frame)))
    frame["age"] = rng.integers(20, 90, num_patients)[patients]
    frame["kvp"] = rng.integers(90, 121, len(frame)) + np.where(frame["diagnosis"] == "Normal", 8, 0)
    frame["name"] = [f"n{number}" for number in range(len(frame))]
    return frame


def test_a_planted_column_is_found_with_its_exact_auc_and_an_idle_one_is_not_shouted(tmp_path: Path) -> None:
    frame = make_table()
    found = audit_text(frame.to_csv(index=False), tmp_path)
    shortcuts = {(item["feature"], item["diagnosis"]): item for item in found["shortcuts"]}
    truth = roc_auc_score(frame["diagnosis"] == "Normal", frame["kvp"])
    assert shortcuts["kvp", "Normal"]["auc"] == pytest.approx(max(truth, 1 - truth), abs=1e-4)
    assert found["shortcuts"][0]["feature"] == "hospital"
    assert shortcuts["hospital", "CP"]["is_beyond_chance"]
    assert not any(shortcuts["age", diagnosis]["is_beyond_chance"] for diagnosis in ("CP", "NCP", "Normal"))
    assert found["unread_columns"] == ["name"]
    assert "hospital tells CP with an AUC of" in (tmp_path / "audit.html").read_text()


def test_a_shuffled_column_is_no_shortcut(tmp_path: Path) -> None:
    frame = make_table()
    frame["hospital"] = np.random.default_rng(5).permutation(frame["hospital"])
    frame["kvp"] = np.random.default_rng(6).permutation(frame["kvp"])
    found = audit_text(frame.to_csv(index=False), tmp_path)
    assert not any(item["is_beyond_chance"] for item in found["shortcuts"])
    assert "No property of the scans that was looked at is a strong shortcut" in (tmp_path / "audit.html").read_text()


def test_an_order_defect_nobody_looked_for_is_not_none(tmp_path: Path) -> None:
    """NCP alone was not audited: by that, not by the order of slices, it differs."""
    frame = make_table()
    frame["audited"] = np.where(frame["diagnosis"] == "NCP", "0", "1")
    frame["order_defect"] = np.where(frame["audited"] == "1", np.resize(["", "", "reversed"], len(frame)), "")
    shortcuts = audit_text(frame.to_csv(index=False), tmp_path)["shortcuts"]
    told = [(item["diagnosis"], item["num_scans"]) for item in shortcuts if item["feature"] == "order_defect"]
    assert sorted(told) == [("CP", 80), ("Normal", 80)]
    frame["audited"] = "1"
    shortcuts = audit_text(frame.to_csv(index=False), tmp_path)["shortcuts"]
    assert {item["num_scans"] for item in shortcuts if item["feature"] == "order_defect"} == {120}


def read_text_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_the_division_is_written_down_and_read_back_as_a_table_makes_it_again(tmp_path: Path) -> None:
    frame = make_table().assign(discard=["1", *["0"] * 119], order_defect=["", "reversed", *[""] * 118], reason="mine")
    found = audit_text(frame.to_csv(index=False), tmp_path)
    division = read_text_table(tmp_path / "division.csv")
    assert list(division.columns) == [*frame.columns, "cohort", "fold"]
    pd.testing.assert_frame_equal(division[list(frame.columns)], frame.astype(str))
    assert (division["cohort"].iloc[0], division["fold"].iloc[0]) == ("", "")
    assert set(division.loc[division["cohort"] == "train", "fold"]) == set("01234")
    assert division.groupby("patient_id")["cohort"].agg(lambda cells: len(set(cells) - {""})).max() == 1
    excluded = read_text_table(tmp_path / "excluded.csv")
    assert excluded[["scan_id", "status"]].to_numpy().tolist() == [["s000", "DISCARDED"]]
    assert (found["left_out"], found["reversed_scans"]) == ({"DISCARDED": 1}, 1)
    assert "stored in reverse, and turned when prepared: 1." in (tmp_path / "audit.html").read_text()
    audit_text(frame.to_csv(index=False), tmp_path / "unturned", cohorts={"turn_reversed": False})
    assert (
        "in reverse, and used so (cohorts.turn_reversed is false): 1."
        in (tmp_path / "unturned" / "audit.html").read_text()
    )
    again = audit_text((tmp_path / "division.csv").read_text(), tmp_path / "again", cohorts={"seed": 77})
    assert again["counts"] == found["division"]["counts"]
    assert (again["left_out"], again["reversed_scans"]) == ({"DISCARDED": 1}, 1)
    for name in ("division.csv", "excluded.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_audit_says_what_its_division_was_made_with(tmp_path: Path) -> None:
    table = make_table().to_csv(index=False)
    told = audit_text(table, tmp_path / "a", train={"num_folds": 4}, cohorts={"seed": 3, "test_fraction": 0.3})
    settings = told["division_settings"]
    assert settings["train"] == {"num_folds": 4}
    told_cohorts = tuple(settings["cohorts"][name] for name in ("division", "test_fraction", "seed"))
    assert told_cohorts == ("patient", 0.3, 3)
    assert (settings["cohorts"]["drop_discarded"], settings["cohorts"]["drop_shuffled"]) == (True, True)
    assert settings["sha256"] in (tmp_path / "a" / "audit.html").read_text()
    digests = [
        audit_text(table, tmp_path / name, **changed)["division_settings"]["sha256"]
        for name, changed in (("b", {"cohorts": {"seed": 3}}), ("c", {"cohorts": {"seed": 3}}), ("d", {}))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_trainings_of_other_seeds_share_one_division_and_another_seed_of_the_cohorts_makes_another(
    tmp_path: Path,
) -> None:
    table = make_table().to_csv(index=False)
    changes = {"a": {}, "b": {"train": {"seed": 1}}, "c": {"cohorts": {"seed": 1}}}
    for name, changed in changes.items():
        audit_text(table, tmp_path / name, **changed)
    first, same, other = ((tmp_path / name / "division.csv").read_bytes() for name in changes)
    assert first == same != other


def test_a_division_of_an_earlier_audit_does_not_outlive_one_that_cannot_divide(tmp_path: Path) -> None:
    audit_text(make_table().to_csv(index=False), tmp_path)
    assert (tmp_path / "division.csv").exists()
    audit_text(LEAKY, tmp_path)
    assert not (tmp_path / "division.csv").exists()


@needs_ccii
def test_what_is_known_of_cc_ccii_is_found(tmp_path: Path) -> None:
    """Source: paper Table 1; hand counts in the published lists; scikit-learn for the AUC."""
    found = audit_text(CCII.read_text(), tmp_path)
    assert found["counts"] == {
        "train": {"NCP": 1320, "CP": 1328, "Normal": 952},
        "test": {"NCP": 169, "CP": 177, "Normal": 126},
    }
    assert (found["test_patients"], found["patients_in_both_cohorts"], found["test_scans_of_those"]) == (436, 231, 255)
    assert found["findings"]["lung_masked"]["Normal"] == {"found": 606, "known": 966}
    shortcuts = {(item["feature"], item["diagnosis"]): item for item in found["shortcuts"]}
    masked, slices = shortcuts["lung_masked", "Normal"], shortcuts["slices", "NCP"]
    assert (masked["direction"], slices["direction"]) == ("higher", "fitted")
    whole = pd.read_csv(CCII)
    plain = roc_auc_score(whole["diagnosis"] == "NCP", whole["slices"])
    assert slices["low"] > max(plain, 1 - plain) + 0.05  # NCP is in the middle
    frame = pd.read_csv(CCII, dtype={"lung_masked": "Int64"}).dropna(subset="lung_masked")
    auc = roc_auc_score(frame["diagnosis"] == "Normal", frame["lung_masked"].astype(int))
    assert masked["auc"] == pytest.approx(auc, abs=1e-4)
    assert found["division"]["patients_in_both_cohorts"] == 0
    assert "lung_masked tells Normal" in (tmp_path / "audit.html").read_text()
    assert "606 of 966 (63%)" in (tmp_path / "audit.html").read_text()
    paper = audit_text(CCII.read_text(), tmp_path / "paper", cohorts={"division": "paper"})
    assert paper["division"]["counts"] == paper["counts"] == found["counts"]
    assert (paper["division"]["test_scans"], paper["division"]["patients_in_both_cohorts"]) == (472, 231)
    assert sum(paper["division"]["counts"]["train"].values()) == 3600


def make_display(number: int) -> tuple[Uint8Array, np.ndarray]:
    """The standard volume of a phantom and its lung, on one grid."""
    phantom = make_phantom(DIAGNOSES[number % 3], 300 + number, shape=(36, 96, 96))
    stack = VolumeStack(phantom.voxels_hu.astype(np.float32), phantom.spacing_mm)
    volume = make_standard_volume(stack, VOLUME)
    return volume.voxels, resample_mask(phantom.lung, volume.crop, VOLUME.shape)


MASKED, REVERSED, SHUFFLED, COPY, ORIGINAL = set(range(2, 24, 3)) - {2}, 3, 4, 6, 10


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms, 8 of each diagnosis; all Normal ones but one masked, one scan reversed, one shuffled, one a copy."""
    folder = tmp_path_factory.mktemp("audit") / "volumes"
    rows, facts = [], []
    for number in range(24):
        voxels, lung = make_display(ORIGINAL if number == COPY else number)
        if number in MASKED:
            voxels = np.where(lung, voxels, 0).astype(np.uint8)
        if number == REVERSED:
            voxels = voxels[::-1]
        if number == SHUFFLED:
            voxels = voxels[np.random.default_rng(0).permutation(len(voxels))]
        array, sha256 = write_array(open_store(str(folder)), f"s{number:02d}", voxels)
        diagnosis, cohort = str(DIAGNOSES[number % 3]), "test" if number < 6 else "train"
        rows.append([f"s{number:02d}", f"p{number:02d}", diagnosis, cohort, None if number < 6 else number % 2])
        rows[-1] += [array, sha256]
        facts.append(
            {"scan_id": f"s{number:02d}", "file_format": "jpg" if diagnosis == "NCP" else "png", "intensity": "DISPLAY"}
            | {"manufacturer": None, "num_slices": 36 + number, "num_rows": 96, "num_columns": 96}
            | {"slice_spacing_mm": None, "pixel_spacing_mm": None}
        )
    columns = ["scan_id", "patient_id", "diagnosis", "cohort", "fold", "array", "sha256"]
    write_facts(open_store(str(folder)), pd.DataFrame(facts))
    write_index(open_store(str(folder)), pd.DataFrame(rows, columns=columns).astype({"fold": "Int64"}), VOLUME)
    return folder


@pytest.fixture(scope="module")
def seen(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    table = pd.read_parquet(volumes / "cohort.parquet")[["scan_id", "patient_id", "diagnosis", "cohort"]]
    out = tmp_path_factory.mktemp("seen")
    found = audit_text(table.to_csv(index=False), out, volumes=str(volumes), train={"num_folds": 2})
    return found | {"page": (out / "audit.html").read_text()}


@pytest.mark.slow
@pytest.mark.s3
def test_volumes_in_a_bucket_are_audited_like_those_here(
    s3: Callable[[], str], seen: dict[str, Any], volumes: Path, tmp_path: Path
) -> None:
    bucket = s3()
    for item in open_store(str(volumes)).list_objects():
        open_store(f"{bucket}/volumes").write_bytes(item.key, (volumes / item.key).read_bytes())
    table = pd.read_parquet(volumes / "cohort.parquet")[["scan_id", "patient_id", "diagnosis", "cohort"]]
    places = {"volumes": f"{bucket}/volumes", "out": f"{bucket}/audit", "cache": tmp_path / "cache"}
    settings = make_settings(tmp_path).model_copy(update=places | {"train": TrainConfig(num_folds=2)})
    audit = audit_cohort(read_cohort("table.csv", table.to_csv(index=False).encode()), settings)
    assert write_audit(audit, settings.out)["audit"] == f"{bucket}/audit/audit.html"
    found = json.loads(open_store(settings.out).read_bytes("audit.json"))
    assert found == {name: value for name, value in seen.items() if name != "page"}


def test_masked_scans_are_a_shortcut_found_in_the_pixels(seen: dict[str, Any]) -> None:
    """7 of 8 Normal scans have a black border and no other scan: AUC (7 + 1 / 2) / 8."""
    shortcuts = {(item["feature"], item["diagnosis"]): item for item in seen["shortcuts"]}
    black = shortcuts["border_zero_share", "Normal"]
    assert (black["direction"], black["auc"]) == ("higher", pytest.approx(15 / 16))
    assert black["is_beyond_chance"]
    assert shortcuts["file_format", "NCP"]["auc"] == 1
    assert not any(shortcuts["num_slices", diagnosis]["is_beyond_chance"] for diagnosis in ("CP", "NCP", "Normal"))
    assert "black border tells Normal" in seen["page"]


def test_a_copy_under_another_patient_and_cohort_is_found(seen: dict[str, Any]) -> None:
    (found,) = seen["duplicates"]
    assert found == {
        "by": ["pixels"],
        "scan_ids": ["s06", "s10"],
        "patients": ["p06", "p10"],
        "diagnoses": ["CP", "NCP"],
        "cohorts": ["train"],
    }
    assert "1 under several patients, 1 under several diagnoses, 0 in both cohorts" in seen["page"]


def test_reversed_and_shuffled_scans_are_found_and_no_others(seen: dict[str, Any]) -> None:
    found = [(item["scan_id"], item["order"]) for item in seen["slice_order"]["findings"]]
    assert found == [("s03", "feet first"), ("s04", "shuffled")]
    assert sum(seen["slice_order"]["counts"]["head first"].values()) == 22


def test_the_division_of_volumes_is_theirs_and_not_that_of_the_table(volumes: Path, tmp_path: Path) -> None:
    """One scan of the table was not usable, and moves others when the table is dealt anew."""
    prepared = pd.read_parquet(volumes / "cohort.parquet")
    table = prepared[["scan_id", "patient_id", "diagnosis"]]
    table = pd.concat([table, pd.DataFrame([["s24", "p24", "NCP"]], columns=table.columns)])
    found = audit_text(table.to_csv(index=False), tmp_path, volumes=str(volumes), train={"num_folds": 2})
    division = read_text_table(tmp_path / "division.csv").set_index("scan_id")
    assert list(division.loc["s24", ["cohort", "fold"]]) == ["", ""]
    for column in ("cohort", "fold"):
        known = prepared.set_index("scan_id")[column].astype("string").fillna("")
        assert division.loc[known.index, column].tolist() == known.tolist()
    excluded = read_text_table(tmp_path / "excluded.csv")
    assert excluded[["scan_id", "status"]].to_numpy().tolist() == [["s24", "NOT_IN_VOLUMES"]]
    assert (found["division"]["test_scans"], found["left_out"]) == (6, {"NOT_IN_VOLUMES": 1})


def test_volumes_of_another_division_than_is_asked_for_are_refused(volumes: Path, tmp_path: Path) -> None:
    other = tmp_path / "volumes"
    shutil.copytree(volumes, other)
    declared = json.loads((other / "volumes.json").read_text())
    declared["division"] = {"cohorts_by": "patient", "folds_by": "patient", "cohorts": {"seed": 7}, "num_folds": 2}
    (other / "volumes.json").write_text(json.dumps(declared))
    table = pd.read_parquet(volumes / "cohort.parquet")[["scan_id", "patient_id", "diagnosis"]].to_csv(index=False)
    settings = {"volumes": str(other), "train": {"num_folds": 2}}
    with pytest.raises(UsageError, match=r"prepared with other settings \(cohorts\.seed\); audit with those"):
        audit_text(table, tmp_path, **settings)
    found = audit_text(table, tmp_path, cohorts={"seed": 7}, **settings)
    assert (found["cohorts_by"], found["test_scans"]) == ("patient", 6)


def test_a_folder_or_archive_without_the_table_s_scans_is_refused(volumes: Path, tmp_path: Path) -> None:
    for place in ({"volumes": str(volumes)}, {"archive": str(volumes)}):
        with pytest.raises(UsageError, match="no scan of the table is there"):
            audit_text(LEAKY, tmp_path, **place)


def test_files_that_are_the_same_and_rows_that_mean_the_same_source_are_found(tmp_path: Path) -> None:
    """Copies byte for byte under other names; the same lengths alone are no copy."""
    archive = tmp_path / "archive"
    contents = {"a": "12 34 56", "b": "12 34 56", "d": "12 34 59", "e": "92 34 56", "CP/1/c": "5 5 5"}
    for folder, files in contents.items():
        (archive / folder).mkdir(parents=True)
        for number, content in enumerate(files.split()):
            (archive / folder / f"{number}.png").write_text(content)
    table = LEAKY.replace("c,1,CP,test", "c,1,CP,test\nCP/1/c,7,NCP,train")  # the source CC-CCII's layout gives c
    found = audit_text(table, tmp_path / "out", archive=str(archive))
    assert [(item["by"], item["scan_ids"]) for item in found["duplicates"]] == [
        (["source"], ["CP/1/c", "c"]),
        (["files"], ["a", "b"]),
    ]
    series = LEAKY.replace("d,2,NCP", "d#0123abcd,2,NCP").replace("e,3,NCP", "d#4567cdef,3,NCP")
    assert [item["scan_ids"] for item in audit_text(series, tmp_path / "b", archive=str(archive))["duplicates"]] == [
        ["a", "b"]
    ]
    features = {item["feature"] for item in found["shortcuts"] if item["origin"] == "files"}
    assert features == {"bytes_per_file"}  # all scans have three files of one format
    assert found["looked_at"] == ["table", "archive"]


UNSEEN = "Slice order, borders and pixel duplicates were not looked at: give --volumes."


@pytest.mark.parametrize("has_archive", [False, True])
def test_an_audit_without_volumes_says_everywhere_what_it_did_not_look_at(
    has_archive: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scan_id in "abcdefghij":
        (tmp_path / "archive" / scan_id).mkdir(parents=True)
        (tmp_path / "archive" / scan_id / "1.png").write_text(scan_id)
    found = audit_text(LEAKY, tmp_path, **{"archive": str(tmp_path / "archive")} if has_archive else {})
    assert found["not_looked_at"] == ["slice order", "borders", "pixel duplicates"]
    assert UNSEEN in found["told"]
    assert capsys.readouterr().err == f"{UNSEEN}\n"
    page = (tmp_path / "audit.html").read_text()
    assert UNSEEN in page.partition("<h2")[0]
    assert "standard volume" not in page
    assert UNSEEN in describe_audit(found).text


def test_an_audit_of_volumes_says_no_such_thing(seen: dict[str, Any]) -> None:
    assert seen["not_looked_at"] == []
    assert "not looked at" not in seen["page"] + seen["told"]


def test_a_column_of_any_name_is_on_the_page_as_it_is_written(tmp_path: Path) -> None:
    """What a drawing library would take for mathematics, or has no letters for; too long; markup."""
    names = [r"dose $\frac$", "\u5242\u91cf \U0001f600", "n" * 300, "<b>&amp;", "{{ 1 }} %s {0}"]
    frame = make_table()
    for name in names:
        frame[name] = frame["kvp"]
    audit_text(frame.to_csv(index=False), tmp_path)
    page = html.unescape((tmp_path / "audit.html").read_text())
    for name in names:
        assert f'<th scope="row" class="text long">{name}</th>' in page
    assert "<th><b>&" not in (tmp_path / "audit.html").read_text()


def test_the_page_tells_how_many_shortcuts_it_leaves_out(tmp_path: Path) -> None:
    frame = make_table()
    for number in range(20):
        frame[f"more{number}"] = frame["kvp"]
    found = audit_text(frame.to_csv(index=False), tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert len(found["shortcuts"]) == 69
    assert "the strongest 60 of 69, all in audit.json" in page
    assert page.count('<span class="bar"') == 60


def test_copies_seen_in_several_ways_are_one_group(tmp_path: Path) -> None:
    """By files a, b and c, d; by pixels a, b and b, e: two groups, of which the first is seen both ways."""
    cohort = read_cohort("table.csv", LEAKY.encode())
    seen = [("files", "ab"), ("files", "cd"), ("pixels", "ab"), ("pixels", "be")]
    duplicates = [Duplicate(by, tuple(scan_ids)) for by, scan_ids in seen]
    described = describe_duplicates(duplicates, cohort, None)
    assert sorted((item["scan_ids"], item["by"]) for item in described) == [
        (["a", "b", "e"], ["files", "pixels"]),
        (["c", "d"], ["files"]),
    ]
    audit = replace(audit_cohort(cohort, make_settings(tmp_path)), duplicates=described)
    assert "2 groups of scans that are one and the same" in render_audit(audit)


def test_the_same_audit_gives_the_same_page(tmp_path: Path) -> None:
    cohort = read_cohort("table.csv", make_table().to_csv(index=False).encode())
    audit = audit_cohort(cohort, make_settings(tmp_path))
    assert render_audit(audit) == render_audit(audit_cohort(cohort, make_settings(tmp_path)))
    assert json.loads(json.dumps(summarise_audit(audit))) == summarise_audit(audit)


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_audit_on_a_screen_and_a_phone(seen: dict[str, Any], tmp_path: Path) -> None:
    import matplotlib.image

    page = tmp_path / "audit.html"
    page.write_text(seen["page"])
    dom = read_dom(page)
    assert dom.count("<img") == 0
    assert '<td class="number">0.938</td>' in dom
    assert list_requests(page) == []
    for width, height in ((1000, 5000), (500, 8000)):
        draw_screen(page, tmp_path / "screen.png", width, height)
        pixels = (matplotlib.image.imread(tmp_path / "screen.png")[..., :3] * 255).round().astype(int)
        assert pixels.shape[:2] == (height, width)
        for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # bars of NCP and Normal
            assert (np.abs(pixels - colour).max(axis=2) < 3).sum() > 100
        assert (pixels[:, -8:] > 200).mean() > 0.99  # nothing runs off the right edge
