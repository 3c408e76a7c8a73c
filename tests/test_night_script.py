"""The script that cron starts, with a `ray` and a `sleep` that only write down what they were told."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from darnet.errors import CredentialsError, HeldError, RunError, StorageError, UsageError
from darnet.job import run_job
from darnet.settings import ScoreSettings
from tests.places import ROOT

FLAGS = ["--archive", "a", "--model", "m", "--results", "r", "--glob", "*/thorax 1/*"]
ERRORS = {
    1: RunError("the cluster gave up"),
    2: UsageError("no such setting"),
    3: HeldError("held", {}),
    4: StorageError("no answer"),
    5: CredentialsError("refused"),
}
RAY = """#!/bin/sh
folder=$(dirname "$0")
number=$(($(cat "$folder/number") + 1))
echo $number > "$folder/number"
echo "$RAY_API_SERVER_ADDRESS $PWD" >> "$folder/places"
printf '%s\\n' "$@" > "$folder/flags$number"
sed "s/SUBMISSION/$4/" "$folder/told$number"
exit "$(cat "$folder/ended$number")"
"""
# By Ray's dashboard/modules/job/cli.py and job_manager.py.
UNTOLD = {
    "killed": "Job submitted\n",
    "stopped": "Job submitted\nJob 'SUBMISSION' was stopped\n",
    "broken off": "Job submitted\nStatus for job 'SUBMISSION': RUNNING\n",
    "used": "ValueError: Job with submission_id SUBMISSION already exists. Please use a different submission_id.\n",
}
SLEEP = '#!/bin/sh\necho "$1" >> "$(dirname "$0")/slept"\n'


def tell(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a job that ends so leaves in its log, by the code of every job."""

    def work(_: ScoreSettings) -> Mapping[str, Any]:
        if code:
            raise ERRORS[code]
        return {"published": 7, "finished_first": [{"job": "score", "exit_code": 4}]}

    assert run_job("score", ScoreSettings, work, FLAGS) == code
    summary = capsys.readouterr().out
    return f"Job submitted\n(decode pid=7) a worker's line\rprogress {summary}a line that came later\n"


def run_night(
    folder: Path, ends: list[int | str], capsys: pytest.CaptureFixture[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script's end after submissions that end with a job's code, or as `UNTOLD` says without a summary."""
    for number, end in enumerate(ends, 1):
        told = tell(end, capsys) if isinstance(end, int) else UNTOLD[end]
        failed = f"Job failed\nStatus message: failed with exit code {end}, last available logs:\n{told}"
        is_well = end in (0, "stopped", "broken off")  # to `ray job submit`
        (folder / f"told{number}").write_text(told if is_well else told + failed)
        (folder / f"ended{number}").write_text("0" if is_well else "1")
    (folder / "number").write_text("0")
    for name, text in (("ray", RAY), ("sleep", SLEEP)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder), **variables}
    command = [str(ROOT / "jobs" / "night.sh"), *FLAGS]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([0], 0),
        ([2], 2),
        ([3], 3),
        ([5], 5),
        ([4, 0], 0),
        ([4, 4, 4], 4),
        ([1, 3], 3),
        (["killed", 0], 0),
        (["killed", 4, "killed"], 1),
        (["stopped"], 1),
        (["broken off", 3], 3),
        (["used", "used", 0], 0),
        (["used", 4, 4, 4], 4),
    ],
)
def test_a_night_is_tried_again_only_if_it_may_pass_another_time(
    ends: list[int | str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_night(tmp_path, ends, capsys)
    assert done.returncode == code
    assert (tmp_path / "number").read_text() == f"{len(ends)}\n"
    slept = tmp_path / "slept"
    assert (slept.read_text().split() if slept.exists() else []) == ["600"] * (len(ends) - ends.count("used") - 1)


def test_each_attempt_has_an_id_of_its_own_and_all_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_night(tmp_path, [4, 0], capsys)
    for number in (1, 2):
        submit, *flags = (tmp_path / f"flags{number}").read_text().split("\n--\n")
        verb, night = submit.splitlines()[:2], submit.splitlines()[3]
        assert verb == ["job", "submit"]
        assert night.startswith("night-20")
        assert night.endswith(f"-a{number}")
        assert flags == ["\n".join(["python", "-m", "jobs.score", *FLAGS, ""])]
        assert submit.splitlines()[4:] == ["--working-dir", "."]
    assert (tmp_path / "places").read_text() == f"http://127.0.0.1:8265 {ROOT}\n" * 2
    assert done.stdout.count("Job submitted\n") == 3  # each attempt's log is passed on, the first one's with its end
    assert not list(tmp_path.glob("tmp.*"))


def test_the_cluster_may_be_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_night(tmp_path, [0], capsys, RAY_API_SERVER_ADDRESS="http://head:8265")
    assert (tmp_path / "places").read_text() == f"http://head:8265 {ROOT}\n"
