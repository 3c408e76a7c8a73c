"""The peers' benchmark takes roads in turn, divides the right way round, and reads what a worker reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from darnet.errors import UsageError
from tests.bench.peer_roads import read_ours, read_ours_in_child
from tests.bench.peers import Way, add_ratios, draw_chart, list_backends, list_scans, measure_in_turn, merge_rows
from tests.ct_fixtures import write_chest
from tests.places import ROOT


def make_way(road: str, code: str) -> Way:
    return Way("reading", "a scan", road, (sys.executable, "-c", code))


def test_roads_are_taken_in_turn_and_give_medians(tmp_path: Path) -> None:
    """Each process notes its turn; the n-th of one road says n seconds."""
    code = (
        "import json, pathlib; path = pathlib.Path({path!r}); path.open('a').write({road!r});"
        "print('noise'); print(json.dumps(dict(seconds=path.read_text().count({road!r}) ** 2)))"
    )
    ways = [make_way(road, code.format(path=str(tmp_path / "turns"), road=road)) for road in "AB"]
    rows = measure_in_turn(ways, 3)
    assert (tmp_path / "turns").read_text() == "ABABAB"
    assert [(row["road"], row["seconds"]) for row in rows] == [("A", 4), ("B", 4)]


def test_a_road_that_fails_is_named_with_its_command() -> None:
    with pytest.raises(UsageError, match=r"(?s)monai, a scan: failed; repeat by .*ZeroDivisionError"):
        measure_in_turn([make_way("monai", "1 / 0")], 1)


def test_ratios_say_how_many_times_as_fast_we_are_on_the_same_scan() -> None:
    rows = [
        {"what": "a", "road": "monai", "seconds": 10.0},
        {"what": "b", "road": "monai", "seconds": 99.0},
        {"what": "a", "road": "ours", "seconds": 2.0},
    ]
    assert [row["times"] for row in add_ratios(rows)] == [{}, {}, {"monai": 5.0}]


def test_our_road_reads_what_a_worker_reads(tmp_path: Path) -> None:
    write_chest(tmp_path / "scan")
    volume = read_ours()(str(tmp_path / "scan"))
    ((scan,),) = read_ours_in_child()(str(tmp_path / "scan"))
    np.testing.assert_array_equal(volume.voxels, scan.volume.voxels)


@pytest.mark.slow
def test_a_reading_prints_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own: this one may have held more before, and its peak would not grow."""
    write_chest(tmp_path / "scan")
    command = [sys.executable, "-m", "tests.bench.peer_roads", "read", "ours", str(tmp_path / "scan")]
    found = json.loads(subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout)
    assert min(found["seconds"], found["first_s"]) > 0
    assert found["growth_mb"] >= 64 * 224 * 224 / 1e6  # the volume at least


def test_plain_torch_is_always_among_the_backends() -> None:
    assert [backend[:2] for backend in list_backends()][:1] == [("torch", "fp32")]


def test_the_chart_has_a_panel_for_each_scan_and_one_for_planning() -> None:
    bars = [
        {"section": "reading", "what": what, "road": road, "seconds": 1.0, "growth_mb": 3.0}
        for what in ("a", "b")
        for road in ("monai", "ours")
    ]
    planned = {"section": "planning", "road": "ours", "nights": 365, "seconds": 1.0, "growth_mb": 40.0}
    curve = [planned | {"what": str(count), "objects": count} for count in (10_000, 100_000)]
    panels = draw_chart([*bars, *curve]).axes
    assert [panel.get_title(loc="left").split(":")[0] for panel in panels] == ["reading", "reading", "planning"]
    assert [patch.get_width() for patch in panels[0].patches] == [1.0, 1.0]


def test_a_folder_without_a_series_is_wrong_use(tmp_path: Path) -> None:
    for name in ("275-slices-JPEG-LS", "98-slices-JPEG-2000", "300-slices-PNG"):
        (tmp_path / "phantoms" / name).mkdir(parents=True)
        (tmp_path / "phantoms" / name / "done").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no DICOM series"):
        list_scans(tmp_path / "empty", tmp_path)


def test_what_is_measured_again_replaces_the_earlier_rows_of_the_same_scan() -> None:
    rows = [{"section": section, "what": what, "n": 1} for section, what in (("reading", "a"), ("road", "a"))]
    merged = merge_rows(rows, [{"section": "reading", "what": what, "n": 2} for what in "ab"])
    assert [(row["section"], row["what"], row["n"]) for row in merged] == [
        ("reading", "a", 2), ("reading", "b", 2), ("road", "a", 1),
    ]  # fmt: skip
