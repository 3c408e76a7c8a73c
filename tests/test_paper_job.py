"""The paper's evaluation from one command, on phantoms as small as the road allows: what it leaves, how it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT

TINY = (
    *("--volume.shape", "[16,64,64]", "--network.volume-shape", "[16,64,64]", "--network.base-channels", "4"),
    *("--volume.crop", "body", "--train.epochs", "1", "--train.num-folds", "2"),
)


def run(job: str, *arguments: object) -> dict[str, Any]:
    """The job's summary; it runs as a user would run it, in a process of its own."""
    command = [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert summary["exit_code"] == 0, done.stderr[-4000:]
    return summary


@pytest.mark.ray
@pytest.mark.slow
def test_one_command_makes_the_report_and_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    phantoms = tmp_path / "phantoms"
    sizes = ("--train-scans", 4, "--test-scans", 2, "--volume.shape", "[16,64,64]", "--volume.crop", "body")
    run("phantoms", "--out", phantoms, *sizes)
    places = ("--archive", phantoms / "archive", "--cohort", phantoms / "cohort.csv", "--truth", phantoms / "truth")
    study = tmp_path / "study"
    assert len(run("paper", *places, "--out", study, *TINY)["done"]) == 4  # volumes, audit, training, evaluation
    metrics = json.loads((study / "report" / "metrics.json").read_text())
    assert list(metrics["networks"]) == ["ResNet18", "CA", "DA", "DA+CA"]
    assert metrics["cohort_counts"]["test"] == {"CP": 2, "NCP": 2, "Normal": 2}
    assert [maps["diagnosis"] for maps in metrics["activation_maps"]] == ["NCP", "CP"]
    assert (study / "report" / "fig2.png").stat().st_size > 10_000
    assert (study / "audit" / "audit.html").exists()

    bundle = (study / "bundles" / "darnet-da" / "bundle.json").read_bytes()
    (study / "report" / "report.html").unlink()
    assert run("paper", *places, "--out", study, *TINY)["done"] == ["evaluation"]
    assert (study / "report" / "report.html").exists()
    assert (study / "bundles" / "darnet-da" / "bundle.json").read_bytes() == bundle
