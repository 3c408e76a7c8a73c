"""The job from its command line: both roads, what they refuse, and what a browser shows of the report."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from darnet import NOTICE
from darnet.auditing.audit import audit_cohort
from darnet.auditing.record import read_audit
from darnet.auditing.report import write_audit
from darnet.bundle import load_networks, read_bundle
from darnet.cohort import read_cohort
from darnet.config import CohortConfig, TrainConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.evaluation.evaluate import run_evaluation
from darnet.job import run_job
from darnet.settings import EvaluateSettings, PrepareSettings
from darnet.storage import open_store
from darnet.volumes_folder import write_index
from tests.browser_fixtures import draw_screen, list_requests, read_dom
from tests.bundle_fixtures import SHAPE, write_random_bundle
from tests.volumes_fixtures import DIVISION, make_cohort

VOLUME = VolumeConfig(shape=SHAPE)
TABLE = """\
scan_id,label,prob_cp,prob_ncp,prob_normal,patient_id
a,CP,0.8,0.1,0.1,p
b,NCP,0.1,0.8,0.1,p
c,Normal,0.1,0.5,0.4,q
d,NCP,0.2,0.7,0.1,r
"""
FILES = {"metrics.json", "tables.csv", "tables.tex", "report.html"}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[dict[str, Any], str]:
    """The job's summary and what it told people."""
    run_job("evaluate", EvaluateSettings, run_evaluation, [str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]), printed.err


def write_table(path: Path, text: str = TABLE) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Ten training scans and seven test scans; patient 3 of training is also the patient of one test scan."""
    frame = make_cohort(tmp_path / "volumes", 10, 2, 7, VOLUME)
    frame.loc[frame["scan_id"] == "scan-012", "patient_id"] = "patient-003"
    write_index(open_store(str(tmp_path / "volumes")), frame, VOLUME, DIVISION)
    return tmp_path / "volumes"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_table_leaves_metrics_tables_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    summary, told = run(capsys, "--predictions", write_table(tmp_path / "t.csv"), "--out", out)
    assert (summary["exit_code"], summary["num_scans"], summary["accuracy_3class"]) == (0, 4, 0.75)
    assert summary["notice"] == NOTICE
    assert {path.name for path in out.iterdir()} == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["accuracy_3class"], metrics["ci95_clustered_by"]) == (0.75, "patient")
    assert (metrics["ci95_seed"], metrics["ci95_replicates"]) == (0, 2000)
    assert "research use only" in told
    assert "accuracy_3class" in told
    assert "0.7500" in told


@pytest.mark.slow
def test_the_same_table_leaves_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.csv")
    for name in ("one", "two"):
        run(capsys, "--predictions", table, "--out", tmp_path / name)
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]


@pytest.mark.slow
def test_the_settings_digest_tells_settings_and_not_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = []
    for name, more in (
        ("one", ()),
        ("two", ("--train.epochs", 3, "--volume.crop", "body", "--score.gate-nights", 9)),  # no number of a table's
        ("other", ("--seed", 7)),
        ("more", ("--replicates", 2001)),
    ):
        table = write_table(tmp_path / f"{name}.csv")
        run(capsys, "--predictions", table, "--out", tmp_path / name, *more)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        digests.append(metrics["settings_sha256"])
        assert metrics["settings_sha256"] in (tmp_path / name / "report.html").read_text()
        assert (metrics["ci95_seed"], metrics["ci95_replicates"]) == (7 * (name == "other"), 2000 + (name == "more"))
    assert len(set(digests)) == 3
    assert digests[0] == digests[1]


def test_a_comparison_is_in_metrics_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_table(tmp_path / "a.csv")
    second = write_table(tmp_path / "b.csv", TABLE.replace("0.1,0.5,0.4", "0.1,0.4,0.5"))
    summary, told = run(capsys, "--predictions", first, "--compare", second, "--out", tmp_path / "out")
    assert summary["comparison"]["accuracy_3class"] == -0.25
    assert f"Against {second} (research use only)" in " ".join(told.split())
    assert re.search(r"accuracy_3class +│ +0\.7500 +│ +1\.0000 +│ +-0\.2500 +│", told)
    comparison = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparison"]
    assert comparison["decisions_mcnemar"] == {"num_only_first_right": 0, "num_only_second_right": 1, "p_value": 1}
    assert comparison["differences"]["accuracy_3class"] == -0.25
    assert comparison["holm"]["decisions_clustered"] == {"p_value": 1, "verdict": "not shown"}
    assert "<h2>Comparison</h2>" in (tmp_path / "out" / "report.html").read_text()


COHORT = [f"{name}{index},{name}{index},{name}" for name in ("CP", "NCP", "Normal") for index in range(30)]


def write_cohort_audit(out: Path) -> Path:
    """An audit with a leak of one patient, and a property that gives the diagnosis away."""
    width = {"CP": 1, "NCP": 2, "Normal": 9}
    rows = [
        f"{row},{'test' if index % 3 == 0 else 'train'},{width[row.rpartition(',')[2]]}"
        for index, row in enumerate(COHORT)
    ]
    table = "\n".join(["scan_id,patient_id,diagnosis,cohort,width", *rows]).replace("CP1,CP1,", "CP1,CP0,", 1)
    settings = PrepareSettings(cohort="cohort.csv", audit=True, out=str(out))
    write_audit(audit_cohort(read_cohort("cohort.csv", table.encode()), settings), settings.out)
    return out


def write_cohort_predictions(path: Path) -> Path:
    """The cohort's test scans, all called CP."""
    rows = [f"{row},0.8,0.1,0.1" for row in COHORT[::3]]
    return write_table(path, "\n".join(["scan_id,patient_id,label,prob_cp,prob_ncp,prob_normal", *rows]))


def test_the_audit_of_the_data_is_told_where_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = write_cohort_audit(tmp_path / "audit")
    places = ("--predictions", write_cohort_predictions(tmp_path / "t.csv"), "--out", tmp_path / "out")
    run(capsys, *places, "--audit", audit)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By cohort.csv. 90 scans of 89 patients. Cohorts " in page
    assert ": 1 of the 30 test patients (1 of 30 test scans) also have scans in the training cohort." in page
    assert "lower in CP" in page
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["audit"] == f"{audit}/audit.json"
    assert metrics["audit_sha256"] == hashlib.sha256((audit / "audit.json").read_bytes()).hexdigest()
    summary, told = run(capsys, *places, "--audit", tmp_path / "nowhere")
    assert summary["exit_code"] == 2
    assert "nowhere/audit.json: no such file; name a folder that jobs.prepare --audit wrote" in told


def test_an_audit_of_other_scans_or_diagnoses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = write_cohort_audit(tmp_path / "audit")
    table = write_cohort_predictions(tmp_path / "t.csv")
    for name, changed in (
        ("scan", ("NCP0,NCP0,NCP,", "new,NCP0,NCP,")),
        ("label", ("NCP0,NCP0,NCP,", "NCP0,NCP0,CP,")),
    ):
        other = write_table(tmp_path / f"{name}.csv", table.read_text().replace(*changed))
        summary, _ = run(capsys, "--predictions", other, "--out", tmp_path / "out", "--audit", audit)
        assert summary["exit_code"] == 2
        scan_id, _, diagnosis = changed[1].strip(",").split(",")
        assert (
            f"audit.json: of another cohort than {name}.csv: it has no scan '{scan_id}' with {diagnosis};"
            in (summary["error"])
        )
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "audit.json: damaged, or not written by this version"),
        (lambda text: text[:0] + "[1]", "audit.json: damaged, or not written by this version"),
        (lambda text: text.replace('"cohort_sha256"', '"another"'), "audit.json: damaged, or not written by this"),
        (lambda text: text.replace('"num_folds": 5', '"num_folds": 4'), "its scans are not those of its digest"),
    ],
)
def test_a_damaged_audit_is_refused_in_words(
    spoil: Callable[[str], str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_cohort_audit(tmp_path / "audit") / "audit.json"
    assert spoil(file.read_text()) != file.read_text()
    file.write_text(spoil(file.read_text()))
    places = ("--predictions", write_cohort_predictions(tmp_path / "t.csv"), "--out", tmp_path / "out")
    summary, _ = run(capsys, *places, "--audit", tmp_path / "audit")
    assert summary["exit_code"] == 2
    assert complaint in summary["error"]


def test_an_audit_of_other_patients_cohorts_or_folds_is_refused(tmp_path: Path) -> None:
    """The same scans and diagnoses, whatever else was said of them when they were audited."""
    frame = pd.DataFrame({"scan_id": [f"s{n:02d}" for n in range(36)], "diagnosis": ["CP", "NCP", "Normal"] * 12})
    frame = frame.assign(
        patient_id=[f"p{n}" for n in range(36)],
        cohort=["train"] * 24 + ["test"] * 12,
        fold=[str(n // 3 % 2) for n in range(24)] + [""] * 12,
    )
    settings = PrepareSettings(cohort="c.csv", audit=True, out=str(tmp_path), train=TrainConfig(num_folds=2))
    write_audit(audit_cohort(read_cohort("c.csv", frame.to_csv(index=False).encode()), settings), settings.out)
    record = read_audit("audit.json", (tmp_path / "audit.json").read_bytes())

    def check(**changed: object) -> None:
        record.check("volumes", frame.assign(**changed).to_numpy().tolist())

    check()
    record.check("table", frame[["scan_id", "diagnosis", "patient_id"]].to_numpy().tolist())
    with pytest.raises(UsageError, match=r"no scan 's18' with CP of the same patient \(17 more scans like it\)"):
        check(patient_id=[f"p{n % 18}" for n in range(36)])
    with pytest.raises(UsageError, match="no scan 's23' with Normal of the same patient in cohort test"):
        check(cohort=["train"] * 23 + ["test"] * 13)
    with pytest.raises(UsageError, match="no scan 's00' with CP of the same patient in cohort train in fold 1"):
        check(fold=["1", *frame["fold"][1:]])


@pytest.mark.slow
def test_an_audit_of_another_division_than_the_volumes_is_refused(
    tmp_path: Path, model: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.read_parquet(volumes / "cohort.parquet")[["scan_id", "patient_id", "diagnosis", "cohort"]]
    cohort = read_cohort("cohort.csv", rows.to_csv(index=False).encode(), num_folds=2)
    places = ("--model", model, "--volumes", volumes, "--out", tmp_path / "out", "--audit", tmp_path / "audit")
    for seed, code in ((DIVISION.cohorts.seed, 0), (DIVISION.cohorts.seed + 1, 2)):
        settings = PrepareSettings(
            cohort="cohort.csv",
            audit=True,
            out=str(tmp_path / "audit"),
            cohorts=CohortConfig(seed=seed),
            train=TrainConfig(num_folds=2),
        )
        write_audit(audit_cohort(cohort, settings), settings.out)
        summary, _ = run(capsys, *places)
        assert summary["exit_code"] == code
    assert f"was divided otherwise than {volumes} (cohorts.seed)" in summary["error"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either predictions, or model and volumes"),
        (["--predictions", "t.csv", "--model", "m", "--volumes", "v"], "give either predictions, or model and volumes"),
        (["--model", "m"], "model and volumes belong together"),
        (["--predictions", "/nowhere/t.csv"], "/nowhere/t.csv: no such file"),
        (["--predictions", "/nowhere/t.csv", "--replicates", "100"], "replicates"),
    ],
)
def test_wrong_use_says_what_to_do(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, told = run(capsys, *arguments, "--out", tmp_path / "out")
    assert summary["exit_code"] == 2
    assert complaint in told


def test_a_defect_in_a_table_ends_the_job_with_file_and_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.csv", TABLE.replace("0.7", "1.7"))
    summary, _ = run(capsys, "--predictions", table, "--out", tmp_path / "out")
    assert summary["exit_code"] == 2
    assert summary["error"].startswith("t.csv row 5: prob_ncp '1.7' is above 1")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_bundle_is_measured_on_the_test_cohort_fold_by_fold(
    tmp_path: Path, model: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary, told = run(capsys, "--model", model, "--volumes", volumes, "--out", out)
    assert (summary["exit_code"], summary["num_scans"]) == (0, 7)
    assert {path.name for path in out.iterdir()} == FILES | {"predictions.parquet"}
    assert "scoring the test cohort, darnet-da-ca: 7/7" in told

    table = pd.read_parquet(out / "predictions.parquet")
    assert sorted(table["scan_id"].unique()) == [f"scan-{number:03d}" for number in range(10, 17)]
    assert len(table) == 5 * 7
    assert table.groupby("fold")["seed"].unique().map(list).to_dict() == {fold: [fold] for fold in range(5)}
    row = table[(table["fold"] == 3) & (table["scan_id"] == "scan-012")].iloc[0]
    assert (row["patient_id"], row["label"]) == ("patient-003", "CP")
    frame = pd.read_parquet(volumes / "cohort.parquet").set_index("scan_id")
    voxels = np.load(volumes / frame.loc["scan-012", "array"]).astype(np.float32) / 255
    network = load_networks(read_bundle(open_store(str(model))))[3]
    with torch.inference_mode():
        expected = network(torch.from_numpy(voxels)[None, None]).softmax(dim=1)[0].numpy()
    assert row[["prob_cp", "prob_ncp", "prob_normal"]].to_numpy(float) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_bundle_does_not_differ_from_its_own_predictions(
    tmp_path: Path, model: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    run(capsys, "--model", model, "--volumes", volumes, "--out", first)
    places = ("--model", model, "--volumes", volumes, "--out", again)
    run(capsys, *places, "--compare", first / "predictions.parquet")
    comparison = json.loads((again / "metrics.json").read_text())["comparison"]
    assert set(comparison["differences"].values()) == {0}
    assert comparison["decisions_mcnemar"]["p_value"] == 1
    assert {fold["verdict"] for fold in comparison["folds"].values()} == {"not shown"}


@pytest.mark.slow
def test_patients_that_the_network_knows_are_warned_of(
    tmp_path: Path, model: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(capsys, "--model", model, "--volumes", volumes, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    leak = "1 of 7 test patients (1 of 7 test scans) also have scans in the training cohort"
    assert leak in metrics["warnings"][0]
    assert "another cohort" in metrics["warnings"][0]  # this bundle's digest is no cohort's at all
    assert leak in (out / "report.html").read_text()
    assert metrics["division"].startswith("patient: cohorts of the table's column cohort; 2 folds dealt by patient")
    assert "2 folds dealt by patient (seed 5)" in (out / "report.html").read_text()
    assert (metrics["num_patients"], metrics["num_folds"]) == (7, 5)
    assert metrics["model_version"] == read_bundle(open_store(str(model))).manifest.model_version


@pytest.mark.slow
def test_a_cohort_of_strangers_is_not_warned_of(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = tmp_path / "strangers"
    digest = write_index(open_store(str(volumes)), make_cohort(volumes, 10, 2, 7, VOLUME), VOLUME)
    manifest = json.loads((model / "bundle.json").read_text())
    (model / "bundle.json").write_text(json.dumps(manifest | {"cohort_sha256": digest}))
    run(capsys, "--model", model, "--volumes", volumes, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["training"] == "No patient of the test cohort has a scan in the training cohort."
    assert not [text for text in metrics["warnings"] if "training" in text]


def test_volumes_of_other_preprocessing_or_without_test_scans_are_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = VolumeConfig(shape=SHAPE, crop="body")
    for name, volume, num_test, complaint in (
        ("other", other, 2, "was trained on volumes of"),
        ("untested", VOLUME, 0, "no scan is in the test cohort"),
    ):
        folder = tmp_path / name
        write_index(open_store(str(folder)), make_cohort(folder, 10, 2, num_test, volume), volume)
        summary, _ = run(capsys, "--model", model, "--volumes", folder, "--out", tmp_path / "out")
        assert summary["exit_code"] == 2
        assert complaint in summary["error"]


@pytest.mark.slow
@pytest.mark.s3
def test_tables_come_from_and_reports_go_to_a_bucket(
    s3: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3()
    open_store(bucket).write_bytes("in/t.csv", TABLE.encode())
    run(capsys, "--predictions", f"{bucket}/in/t.csv", "--out", f"{bucket}/out")
    run(capsys, "--predictions", write_table(tmp_path / "t.csv"), "--out", tmp_path / "out")
    for name in FILES:
        assert open_store(f"{bucket}/out").read_bytes(name) == (tmp_path / "out" / name).read_bytes()
    summary, _ = run(capsys, "--predictions", f"{bucket}/in/none.csv", "--out", f"{bucket}/out")
    assert summary["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.s3
def test_bundle_and_volumes_come_from_a_bucket_too(
    s3: Callable[[], str], tmp_path: Path, model: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, cache = s3(), tmp_path / "cache"
    for folder in (model, volumes):
        for item in open_store(str(folder)).list_objects():
            open_store(f"{bucket}/{folder.name}").write_bytes(item.key, (folder / item.key).read_bytes())
    places = ("--model", f"{bucket}/bundle", "--volumes", f"{bucket}/volumes", "--cache", cache)
    run(capsys, *places, "--out", f"{bucket}/out")
    run(capsys, "--model", model, "--volumes", volumes, "--out", tmp_path / "out")
    for name in FILES:
        assert open_store(f"{bucket}/out").read_bytes(name) == (tmp_path / "out" / name).read_bytes()
    assert len(list(cache.glob("*/volumes.json"))) == 1


@pytest.mark.browser
def test_a_browser_shows_the_report_and_asks_the_network_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "t.csv")
    run(capsys, "--predictions", table, "--compare", table, "--out", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    dom = read_dom(page)
    assert '<th scope="row" class="text">accuracy_3class</th>' in dom
    assert '<td class="number">0.7500</td>' in dom
    assert dom.count("<img") == 3
    assert list_requests(page) == []


@pytest.mark.slow
@pytest.mark.browser
def test_pictures_are_drawn_and_the_page_fits_a_phone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib.image

    run(capsys, "--predictions", write_table(tmp_path / "t.csv"), "--out", tmp_path / "out")
    for width, height in ((1000, 3600), (500, 5600)):
        picture = tmp_path / "screen.png"
        draw_screen(tmp_path / "out" / "report.html", picture, width, height)
        pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
        assert pixels.shape[:2] == (height, width)
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # the histograms' columns
            assert (np.abs(pixels - colour).max(axis=2) < 3).sum() > 100
        assert (pixels[:, -8:] > 200).mean() > 0.99  # nothing runs off the right edge


@pytest.mark.slow
@pytest.mark.browser
def test_a_page_that_does_ask_the_network_is_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>x</title><img src='http://127.0.0.1:9/x.png'>")
    assert list_requests(page) == ["http://127.0.0.1:9/x.png"]
