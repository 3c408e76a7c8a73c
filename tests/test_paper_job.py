"""The paper's evaluation from one command, on phantoms as small as the road allows: what it leaves, how it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import darnet.ray_folds
import jobs.paper
from darnet.errors import UsageError
from darnet.scan import DIAGNOSES
from darnet.settings import PaperSettings
from darnet.storage import has_object, open_store
from tests.places import ROOT
from tests.volumes_fixtures import make_volumes

TINY = (
    *("--volume.shape", "[16,64,64]", "--network.volume-shape", "[16,64,64]", "--network.base-channels", "4"),
    *("--volume.crop", "body", "--train.epochs", "1", "--train.num-folds", "2"),
)


Head: TypeAlias = tuple[str, dict[str, str]]


def run(job: str, *arguments: object, head: Head | None = None) -> dict[str, Any]:
    """The job's summary; it runs as a user would run it, in a process of its own, or submitted to a cluster's head."""
    command, environment = [sys.executable], dict(os.environ)
    if head is not None:
        ray, environment = head
        command = [ray, "job", "submit", "--working-dir", str(ROOT), "--", "python"]
    command += ["-m", f"jobs.{job}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith('{"job"')]
    assert told, (done.stdout[-2000:], done.stderr[-4000:])
    summary: dict[str, Any] = json.loads(told[-1])
    assert summary["exit_code"] == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return summary


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("place", ["submitted", pytest.param("s3", marks=pytest.mark.s3)])
def test_one_command_makes_the_report_and_resumes_where_it_was_stopped(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    phantoms = tmp_path / "phantoms"
    sizes = ("--train-scans", 4, "--test-scans", 2, "--volume.shape", "[16,64,64]", "--volume.crop", "body")
    run("phantoms", "--out", phantoms, *sizes)
    places = ("--archive", phantoms / "archive", "--cohort", phantoms / "cohort.csv", "--truth", phantoms / "truth")
    head = request.getfixturevalue("head_node") if place == "submitted" else None
    study = open_store(str(tmp_path / "study") if head else request.getfixturevalue("s3")() + "/study")
    settings = (*TINY, "--cache", tmp_path / "cache", "--seeds", "0,1")
    summary = run("paper", *places, "--out", study.uri, *settings, head=head)
    assert len(summary["done"]) == 4  # volumes, audit, training, report
    metrics = json.loads(study.read_bytes("report/metrics.json"))
    assert summary["accuracy_3class"] == pytest.approx(metrics["accuracy_3class"], abs=1e-3)
    assert list(metrics["networks"]) == ["ResNet18", "CA", "DA", "DA+CA"]
    seeds = [sorted(set(network["seeds"])) for network in metrics["networks"].values()]
    assert seeds == [["0", "1"]] * 4
    assert metrics["cohort_counts"]["test"] == {"CP": 2, "NCP": 2, "Normal": 2}
    assert [maps["diagnosis"] for maps in metrics["activation_maps"]] == ["NCP", "CP"]
    assert len(study.read_bytes("report/fig2.png")) > 10_000
    assert has_object(study, "audit/audit.html")
    assert "The audit of the data" in study.read_bytes("report/report.html").decode()

    bundle = study.read_bytes("bundles/seed1/darnet-da/bundle.json")
    study.delete("report/report.html")
    assert run("paper", *places, "--out", study.uri, *settings, head=head)["done"] == ["evaluation"]
    assert has_object(study, "report/report.html")
    assert study.read_bytes("bundles/seed1/darnet-da/bundle.json") == bundle


def start(folder: Path, name: str, **changed: Any) -> None:
    """A study of 36 patients whose scans, all named so, are not in the archive."""
    (folder / "archive").mkdir(exist_ok=True)
    table = folder / "cohort.csv"
    rows = [f"{name}{number},p{number},{DIAGNOSES[number % 3]}\n" for number in range(36)]
    table.write_text("scan_id,patient_id,diagnosis\n" + "".join(rows))
    places = {"archive": str(folder / "archive"), "cohort": str(table), "out": str(folder / "study")}
    jobs.paper.work(PaperSettings.model_validate(places | changed))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two CPUs, without Ray."""
    monkeypatch.setattr(jobs.paper, "connect", lambda: None)
    monkeypatch.setattr(darnet.ray_folds, "list_nodes", lambda: [{"Resources": {"CPU": 2.0}}])


@pytest.mark.ray
@pytest.mark.usefixtures("room")
def test_a_study_without_volumes_takes_another_table_and_one_with_them_does_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with pytest.raises(UsageError, match="no scan of the cohort is usable"):
            start(tmp_path, name)
    (tmp_path / "study" / "volumes" / "volumes.json").touch()
    with pytest.raises(UsageError, match=r"volumes and folds began with other settings \(cohort_sha256;"):
        start(tmp_path, "c")


@pytest.mark.ray
@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"workers": 4}, "--workers 4 takes 4 CPUs at once; the cluster has 2 CPUs"),
        ({"train": {"device": "gpu"}}, "the cluster has 2 CPUs and 0 GPUs"),
        ({"train": {"sync_batchnorm": True}}, "train.sync_batchnorm needs GPUs"),
    ],
)
def test_a_training_that_can_never_run_is_refused_before_anything_is_made(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        start(tmp_path, "a", **changed)
    assert list((tmp_path / "study").iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("room")
def test_a_wrong_place_of_the_truth_is_told_of_before_training(tmp_path: Path) -> None:
    make_volumes(tmp_path / "study" / "volumes", num_train=8, num_folds=2, num_test=3)
    (tmp_path / "study" / "audit").mkdir()
    (tmp_path / "study" / "audit" / "excluded.csv").touch()
    truth = tmp_path / "truth"
    truth.mkdir()
    with pytest.raises(UsageError, match="truth: nothing is here"):
        start(tmp_path, "a", truth=str(truth))
    (truth / "of-another-scan.npz").touch()
    with pytest.raises(UsageError, match="no truth of any test scan"):
        start(tmp_path, "a", truth=str(truth))
