"""A night's phases are told by its marks, files and rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.bench.phases import PHASES, explain_phases, find_phases, list_phases, print_phases
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import write_chest
from tests.places import ROOT


def make_night(folder: Path) -> pd.DataFrame:
    """Planned at 16 s, staged at 41 and published at 43; rows of two batches, of which each scan takes 4 s."""
    for name, at_s in (("_runs/a/plan", 16), ("_runs/a/parts/0", 40), ("_runs/a/parts/1", 41), ("predictions/c1", 43)):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at_s, at_s))
    made_s = [38, 29, 29.5]  # as rows come, in no order
    return pd.DataFrame({"scored_at": pd.to_datetime(made_s, unit="s", utc=True), "model_s": [4.0] * 3})


def test_phases_are_told_by_marks_files_and_rows(tmp_path: Path) -> None:
    marks = {"begun": 10.0, "imported": 12.0, "ray_up": 15.0, "ended": 48.0}
    found = find_phases(tmp_path, make_night(tmp_path), marks, batch_size=2)
    expected = {"imports": 2, "ray_starts": 3, "plan": 1, "first_batch": 5, "networks": 17, "staging": 3}
    expected |= {"publishing": 2, "ray_ends": 5}
    assert found == pytest.approx({f"{name}_s": seconds for name, seconds in expected.items()})
    assert tuple(expected) == PHASES


def test_the_shortest_night_of_each_road_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    named = {"section": "road", "road": "ours, x int8", "repeats": 1, "repeat": "again", "wall_s": 40.0}
    seconds = dict(zip((f"{name}_s" for name in PHASES), (2, 3, 1, 5, 17, 3, 2, 5), strict=True))
    rows = [named | {"scans": 36, "what": "b"} | seconds, named | {"scans": 12, "what": "a"} | seconds]
    (row,) = list_phases([*rows, named | {"road": "monai", "scans": 12}], "phases")
    assert (row["scans"], row["seconds"]) == (12, 40)
    told = explain_phases(row)
    assert told == "ours, x int8: 21 s beside its networks, 38% of them Ray's alone: 3 ray starts + 5 ray ends"
    print_phases([row])
    assert "x int8, 12" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_night_s_phases_follow_one_another(tmp_path: Path) -> None:
    """None of a real one is negative, so that each ends where it is said to, and its networks take some time."""
    write_random_bundle(tmp_path / "bundle")
    for name in "abc":
        write_chest(tmp_path / "archive" / name)
    night = ["road", "ours", str(tmp_path / "bundle"), str(tmp_path / "archive"), "torch", "fp32"]
    command = [sys.executable, "-m", "tests.bench.peer_roads", *night]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    phases = {name: found[f"{name}_s"] for name in PHASES}
    assert min(phases.values()) >= 0, phases
    assert min(phases["networks"], phases["ray_starts"], phases["first_batch"], phases["ray_ends"]) > 0
