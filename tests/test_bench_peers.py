"""The peers' benchmark takes roads in turn, divides the right way round, and reads what a worker reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from darnet.errors import UsageError
from tests.bench.peer_roads import find_pace, read_children, read_ours, read_ours_in_child
from tests.bench.peers import (
    ONE_MORE,
    Row,
    Way,
    add_ratios,
    count_whole_processes,
    describe_road,
    draw_chart,
    find_one_more,
    list_backends,
    list_scans,
    measure_in_turn,
    merge_rows,
    plan_road,
)
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


@pytest.mark.slow
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


def test_the_road_has_two_lengths_of_ours_and_floors_over_the_archive(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    ways = list(plan_road({name: str(tmp_path / name) for name in "ab"}, tmp_path / "bundle", tmp_path))
    lengths: dict[str, list[int]] = {}
    for way in ways:
        if way.what.endswith("the whole road"):
            lengths.setdefault(way.road, []).append(int(way.what.split()[0]))
    assert lengths["monai"] == [12]
    assert lengths["ours, openvino fp32"] == [12, 4]
    assert lengths["ours, openvino int8"] == [12, 36]
    assert next(way.goals for way in ways if way.what.startswith("36")) == {}
    for count in (4, 12, 36):
        links = sorted((tmp_path / f"archive-{count}").iterdir())
        assert [link.resolve().name for link in links] == list("ab" * (count // 2))
    (reading,) = [way for way in ways if way.road == "ours, reading alone"]
    assert reading.command[-1] == str((tmp_path / "archive-12").resolve())


def make_roads() -> list[Row]:
    """A night of 10 s and 3 s a scan; MONAI's of 5 s a scan."""
    named = {"section": "road", "goals": {}, "repeats": 1, "times": {}}
    roads = [
        named | {"what": f"{scans} scans", "road": "ours, x int8", "scans": scans, "repeat": f"road {scans}"}
        | {"wall_s": 10.0 + 3 * scans, "seconds": 1.0, "processor_s": 20.0 + 4 * scans, "fetch_s": 0.25}
        for scans in (12, 36)
    ]  # fmt: skip
    peer = {
        "wall_s": 80.0,
        "seconds": 70.0,
        "one_more_s": 5.0,
        "processor_s": 120.0,
        "scans": 12,
        "repeat": "road monai",
    }
    alone = named | {
        "what": "a scan's floor",
        "road": "ours, network alone, x int8",
        "seconds": 2.4,
        "repeat": "network",
    }
    return count_whole_processes([alone, named | peer | {"what": "12 scans", "road": "monai"}, *roads])


def test_a_scan_more_is_the_difference_of_two_lengths_and_every_ratio_is_of_the_printed_seconds() -> None:
    rows = make_roads()
    rows = add_ratios([*rows, *find_one_more(rows)])
    found = {(row["what"], row["road"]): row for row in rows}
    assert found["12 scans", "ours, x int8"]["seconds"] == 46.0
    assert found["12 scans", "ours, x int8"]["times"] == {"monai": 80 / 46}
    ours, monai = found[ONE_MORE, "ours, x int8"], found[ONE_MORE, "monai"]
    assert (ours["seconds"], ours["processor_s"], ours["start_up_s"], ours["repeat"]) == (
        3,
        4,
        10,
        "road 12 && road 36",
    )
    assert (monai["seconds"], monai["processor_s"]) == (5, 10)
    assert ours["times"] == {"monai": 5 / 3}
    assert describe_road(ours, rows) == "of two lengths of the road; start-up and end 10.0 s; 0.80 of the network alone"
    assert describe_road(found["12 scans", "ours, x int8"], rows) == "fetch 0.25 s a scan"
    assert describe_road(found["a scan's floor", "ours, network alone, x int8"], rows) == ""


def test_the_pace_of_a_loader_is_counted_once_it_works_ahead() -> None:
    assert find_pace([100.0, 110.0, 112.0, 114.0]) == 2.0


def test_the_processors_of_children_are_counted_while_they_run_and_when_they_ended() -> None:
    """One child and its own child, each a tenth of a second of work."""
    work = "import time\nwhile time.process_time() < {}: pass\n"
    grandchild = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work.format(0.1)!r}])\n"
    before_s = read_children()
    code = grandchild + work.format(0.1) + "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running_s = read_children() - before_s
        child.communicate(b"\n")
    assert running_s > 0.15
    assert read_children() - before_s >= running_s
