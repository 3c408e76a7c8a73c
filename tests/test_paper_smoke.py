"""`make paper-smoke`: it runs today's code, and what it runs makes the whole report, four networks of five folds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from darnet.bundle import read_bundle
from darnet.manifest import find_bundles
from darnet.storage import open_store
from tests.places import ROOT

BIN = "$(BIN)/python -m "
SOURCES = ("jobs/paper-smoke.toml", "jobs/phantoms.py", "jobs/paper.py", "darnet/phantoms/chest.py", "darnet/report.py")
PHANTOMS, STUDY = ".paper/phantoms/cohort.csv", ".paper/study/report/report.html"
VOLUMES = ".paper/study/volumes/volumes.json"  # of an unfinished study
LONG_AGO, DAY_S = 1_700_000_000, 86_400


def list_commands(folder: str) -> list[list[str]]:
    """The phantoms and the study, with all they make below `folder`."""
    config, phantoms = ("--config", "jobs/paper-smoke.toml"), f"{folder}/phantoms"
    places = ("--archive", f"{phantoms}/archive", "--cohort", f"{phantoms}/cohort.csv", "--truth", f"{phantoms}/truth")
    return [
        ["jobs.phantoms", *config, "--train-scans", "30", "--out", phantoms],
        ["jobs.paper", *config, *places, "--out", f"{folder}/study"],
    ]


def read_recipe() -> str:
    """What make tells the shell, line by line; `$(BIN)` stays."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (recipe,) = re.findall(r"^paper-smoke:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    return re.sub(r"^\t@", "", recipe, flags=re.MULTILINE).replace("$$", "$")


def test_the_long_test_runs_the_commands_of_the_makefile() -> None:
    told = [shlex.split(each) for each in re.findall(rf"{re.escape(BIN)}([^;\n]*)", read_recipe())]
    assert told == list_commands(".paper")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Sources of the first day, with compiled ones that are always new."""
    for name in SOURCES:
        write(tmp_path / name, 0)
    for name in ("darnet/__pycache__/report.cpython-311.pyc", "darnet/phantoms/__pycache__/chest.cpython-311.pyc"):
        write(tmp_path / name, 100)
    return tmp_path


def write(path: Path, day: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (LONG_AGO + day * DAY_S,) * 2)


def run_recipe(checkout: Path) -> list[str]:
    """Run the target with jobs that do nothing; which were run."""
    recipe = re.sub(rf"{re.escape(BIN)}(\S+)", r"echo ran \1", read_recipe())
    for line in recipe.splitlines():  # make starts a shell for each
        done = subprocess.run(["bash", "-c", line], cwd=checkout, capture_output=True, text=True, check=True)
        assert done.stderr == "", line
        with (checkout / "told").open("a") as file:
            file.write(done.stdout)
    return re.findall(r"^ran (\S+)", (checkout / "told").read_text(), re.MULTILINE)


@pytest.mark.parametrize("changed", SOURCES)
@pytest.mark.parametrize("left", [STUDY, VOLUMES])
def test_whatever_older_code_made_is_made_anew(checkout: Path, changed: str, left: str) -> None:
    """Phantoms too: what crops a volume crops the truth beside them."""
    for day, name in ((1, PHANTOMS), (2, left), (3, changed)):
        write(checkout / name, day)
    assert run_recipe(checkout) == ["jobs.phantoms", "jobs.paper"]
    assert not (checkout / ".paper/study").exists()


@pytest.mark.parametrize("left", [STUDY, VOLUMES])
def test_what_todays_code_made_is_kept_and_goes_on(checkout: Path, left: str) -> None:
    for day, name in ((1, PHANTOMS), (2, left)):
        write(checkout / name, day)
    assert run_recipe(checkout) == ["jobs.paper"]
    assert (checkout / left).exists()


def test_without_phantoms_they_are_made(checkout: Path) -> None:
    assert run_recipe(checkout) == ["jobs.phantoms", "jobs.paper"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_papers_whole_evaluation_runs_on_phantoms_and_ends_in_the_report(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for command in list_commands(str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    report = (tmp_path / "study" / "report" / "report.html").read_text()
    for heading in ("Table 1: ", "Table 2: ", "Table 3: ", "Figure 2: "):
        assert f"<h2>{heading}" in report, heading
    for network in ("ResNet18", "CA", "DA", "DA+CA"):
        assert f">{network}</th>" in report, network
    bundles = [read_bundle(place).manifest for place in find_bundles(open_store(str(tmp_path / "study" / "bundles")))]
    assert {bundle.model_name for bundle in bundles} == {"darnet-plain", "darnet-ca", "darnet-da", "darnet-da-ca"}
    assert sum(len(bundle.folds) for bundle in bundles) == 20
