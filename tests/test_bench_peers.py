"""The peers' benchmark takes roads in turn, divides the right way round, and reads what a worker reads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from darnet.bundle_writing import add_int8_graphs, make_bundle
from darnet.config import ModelConfig
from darnet.errors import UsageError
from darnet.inference.graph import fold_batch_norm
from darnet.inference.openvino_backend import convert_network, quantize_graph
from darnet.model import build_network
from darnet.phantom import make_phantom
from darnet.phantoms.canvas import acquire
from darnet.phantoms.files import write_dicom, write_slice_images
from darnet.threads import set_model_threads
from darnet.volume import apply_window
from tests.bench.peer_roads import (
    augment_ours,
    count_operations,
    find_pace,
    read_children,
    read_ours,
    read_ours_in_child,
)
from tests.bench.peers import (
    BARE,
    BUNDLE_CODE,
    LAYERS,
    ONE_MORE,
    PHANTOM_CODE,
    SERIAL,
    Row,
    Way,
    add_ratios,
    choose_lengths,
    clear_others,
    count_whole_processes,
    describe_growth,
    describe_road,
    draw_chart,
    explain_goal,
    explain_profile,
    explain_reading,
    find_one_more,
    list_backends,
    list_scans,
    locate_phantoms,
    measure_in_turn,
    merge_rows,
    name_makers,
    parse_settings,
    plan_images,
    plan_reading,
    plan_road,
    print_section,
    profile_road,
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


def test_of_spilled_bytes_the_most_is_told(tmp_path: Path) -> None:
    """A night of three that spilled has spilled."""
    path = tmp_path / "turns"
    code = (
        f"import json, pathlib; path = pathlib.Path({str(path)!r}); path.open('a').write('x');"
        "print(json.dumps(dict(seconds=1, spilled_mb=7.0 * (path.stat().st_size == 2))))"
    )
    (row,) = measure_in_turn([make_way("ours", code)], 3)
    assert row["spilled_mb"] == 7.0
    assert describe_road(row) == "; at most 7 MB spilled"


def test_one_thread_has_the_goals_of_two(tmp_path: Path) -> None:
    """A night reads on one thread unless it is told otherwise."""
    scans = {"275 slices JPEG-LS": "a", "98 slices JPEG 2000": "b"}
    ways = {(way.what, way.road): way for way in [*plan_reading(scans), *plan_images(tmp_path)]}
    for what in (*scans, "300 slices PNG"):
        assert ways[what, SERIAL].goals == ways[what, "ours"].goals != {}
        assert ways[what, SERIAL].limits == ways[what, "ours"].limits
        assert "ours-serial" in ways[what, SERIAL].command
    assert ways["275 slices JPEG-LS", SERIAL].goals["monai"] == 6.0


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
    spent = [{**row, "processor_s": 2 * row["seconds"]} for row in rows[:1]]
    (_, ours) = add_ratios([*spent, {**rows[2], "processor_s": 2.5, "decoding_s": 1.0}])
    assert ours["times_cpu"] == {"monai": 8.0}


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
        (locate_phantoms(tmp_path) / name).mkdir(parents=True)
        (locate_phantoms(tmp_path) / name / "done").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no DICOM series"):
        list_scans(tmp_path / "empty", tmp_path)


def test_what_is_kept_is_named_by_all_that_makes_it() -> None:
    name = name_makers(("model", "bundle"), choose_lengths, {"channels": 64}, "1.0")
    assert name == name_makers(("model", "bundle"), choose_lengths, {"channels": 64}, "1.0")
    others = (
        name_makers(("model",), choose_lengths, {"channels": 64}, "1.0"),
        name_makers(("model", "bundle"), clear_others, {"channels": 64}, "1.0"),
        name_makers(("model", "bundle"), choose_lengths, {"channels": 32}, "1.0"),
        name_makers(("model", "bundle"), choose_lengths, {"channels": 64}, "1.1"),
    )
    assert name not in others
    assert len(set(others)) == 4


def test_the_modules_that_make_what_is_kept_are_named() -> None:
    """By where the functions live that peers.py calls."""
    for makers, modules in (
        ((make_bundle, add_int8_graphs, build_network, convert_network, quantize_graph, fold_batch_norm), BUNDLE_CODE),
        ((make_phantom, write_dicom, write_slice_images, acquire, apply_window), PHANTOM_CODE),
    ):
        assert {maker.__module__.removeprefix("darnet.") for maker in makers} <= set(modules)


def test_what_other_code_made_is_deleted(tmp_path: Path) -> None:
    """And nothing of anybody else."""
    new, old, trained = "0" * 16, "f" * 16, "plain"
    for name in (new, f"{old}/fp32", trained):
        (tmp_path / "bundle" / name).mkdir(parents=True)
        (tmp_path / "bundle" / name / "bundle.json").touch()
    (tmp_path / "bundle" / "bundle.json").touch()
    clear_others(tmp_path / "bundle" / new)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {new, trained, "bundle.json"}
    assert (tmp_path / "bundle" / new / "bundle.json").exists()
    clear_others(tmp_path / "none" / new)


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
    assert (lengths["ours, openvino fp32"], lengths["ours, openvino int8"]) == ([12, 4], [12, 36])
    others = [way.goals for way in ways if way.what.startswith(("4 scans", "36 scans"))]
    assert others == [{}] * (len(lengths) - 1)  # of each of ours one; a processor may have bf16 too
    for count in (4, 12, 36):
        links = sorted((tmp_path / f"archive-{count}").iterdir())
        assert [link.resolve().name for link in links] == list("ab" * (count // 2))
    beside = {way.road: way.command for way in ways if way.road.startswith("ours, network beside reading, openvino")}
    assert beside["ours, network beside reading, openvino int8"][-1] == "2"
    assert beside["ours, network beside reading, openvino int8, its one thread"][-1] == "1"
    (reading,) = [way for way in ways if way.road == "ours, reading alone"]
    assert reading.command[-1] == str((tmp_path / "archive-12").resolve())


@pytest.mark.parametrize("num_series", range(1, 7))
def test_both_nights_have_every_series_as_often(num_series: int) -> None:
    shorter, whole, longer = choose_lengths(num_series)
    assert whole >= 12
    assert 3 <= shorter < whole < longer
    assert [length % num_series for length in (shorter, whole, longer)] == [0, 0, 0]


def test_three_real_series_make_nights_of_three_scans_twelve_and_thirty_six() -> None:
    assert choose_lengths(3) == (3, 12, 36)


def make_roads() -> list[Row]:
    """A night of 10 s and 3 s a scan; MONAI's of 5 s a scan."""
    named = {"section": "road", "goals": {}, "repeats": 1, "times": {}}
    roads = [
        named | {"what": f"{scans} scans", "road": "ours, x int8", "scans": scans, "repeat": f"road {scans}"}
        | {"wall_s": 10.0 + 3 * scans, "seconds": 1.0, "processor_s": 20.0 + 4 * scans}
        | {"fetch_s": 0.25, "spilled_mb": 0.0}
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
    assert ours["times"] == {"monai": 5 / 3, BARE: pytest.approx(0.8)}
    assert ours["goals"] == {BARE: 0.9}
    assert monai["goals"] == {}
    assert describe_road(ours) == "of two lengths of the road; start-up and end 10.0 s"
    assert describe_road(found["12 scans", "ours, x int8"]) == "fetch 0.25 s a scan; at most 0 MB spilled"
    assert describe_road(found["a scan's floor", "ours, network alone, x int8"]) == ""


def make_stages(network_s: float, lungs_s: float, whole_s: float) -> list[Row]:
    """Two cores, of which the network takes both; bytes 0.1 s of a core a scan, headers 0.1, pixels 0.2, child 0.1."""
    named = {"section": "road", "goals": {}, "repeats": 3, "times": {}, "repeat": "again"}
    reading_s = 0.3 + lungs_s + 0.1
    floors = {"network alone, x int8": 2 * network_s, "reading alone": reading_s, "bytes alone": 0.1}
    floors["network beside reading, x int8"] = 2 * 1.25 * network_s
    stages = {"headers_s": 0.1, "pixels_s": 0.2, "lungs_s": lungs_s, "statistics_s": 0.05}
    beside = named | stages | {"what": "a scan beside the network", "road": "ours, on one thread", "seconds": 1.0}
    more = {"seconds": whole_s, "processor_s": 2 * whole_s - 0.5, "bare_s": network_s, "start_up_s": 9.0}
    return [
        *(
            named | {"what": "a scan's floor", "road": f"ours, {name}", "seconds": seconds / 2, "processor_s": seconds}
            for name, seconds in floors.items()
        ),
        beside | {"processor_s": 1.0},
        named | more | {"what": ONE_MORE, "road": "ours, x int8"},
        named | {"what": ONE_MORE, "road": "monai", "seconds": 5.0, "processor_s": 9.0},
    ]


def test_the_profile_adds_up_the_stages_and_shares_them_among_the_cores() -> None:
    (row,) = profile_road(make_stages(network_s=2.0, lungs_s=0.35, whole_s=2.5), num_cores=2)
    expected = {"bytes": 0.1, "decode": 0.3, "lungs": 0.35, "child": 0.1, "network": 4.0, "statistics": 0.05}
    assert row["stages"] == pytest.approx(expected)
    assert row["sum"] == pytest.approx(4.8)  # without the bytes, which decoding reads
    assert row["floor_s"] == pytest.approx(2.4)
    assert (row["whole"], row["idle"]) == pytest.approx((4.5, 0.5))
    assert (row["share"], row["best_share"], row["beside_s"]) == pytest.approx((0.8, 2 / 2.4, 2.5))
    assert row["goal"] is None


def test_the_profile_says_what_a_missed_goal_is_owed_to() -> None:
    def explain(network_s: float, lungs_s: float, whole_s: float) -> str:
        (row,) = profile_road(make_stages(network_s, lungs_s, whole_s), num_cores=2)
        return explain_profile(row)

    assert explain(8.0, 0.3, 8.5).endswith("0.94 of the bare network, at least 0.9: reached")
    costly = explain(2.0, 0.5, 2.6)
    assert "the other stages take 0.95 s of a core a scan, most of it lungs" in costly
    assert "2 cores leave 0.44 s; without any other loss 0.81 could be reached" in costly
    lossy = explain(8.0, 0.3, 10.0)
    assert "leave room for 0.96: network and reading side by side without Ray take 10 s a scan, 0.80 of" in lossy
    assert "beside the stages the road took 2.75 s of a core a scan" in lossy
    assert lossy.endswith("left cores idle for 0.50 s")


def test_a_missed_goal_beside_a_peer_is_told_with_what_would_reach_it() -> None:
    """Twelve scans: MONAI's 120 s against 60; the network alone 24, all stages 28.8, with start and end 37.8."""
    rows = make_stages(network_s=2.0, lungs_s=0.35, whole_s=2.5)
    named = {"section": "road", "what": "12 scans", "repeats": 1, "scans": 12}
    rows += [
        named | {"road": "monai", "seconds": 120.0, "goals": {}, "times": {}},
        named | {"road": "ours, x int8", "seconds": 60.0, "goals": {"monai": 3.0}, "times": {"monai": 2.0}},
    ]
    (row,) = profile_road(rows, num_cores=2)
    told = explain_goal(row)
    assert told.startswith("ours, x int8: 2 x monai in 12 scans, at least 3: missed; would be, of the network alone 5,")
    assert told.endswith("all stages on cores never idle 4.17, those with start and end 3.17")
    row["goal"]["least"] = 2.0
    assert "at least 2: reached" in explain_goal(row)


def test_a_missed_reading_is_told_with_what_decoding_alone_would_reach(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"what": "275", "road": SERIAL, "seconds": 2.0, "goals": {"monai": 6.0, "plain": 3.5}, "decoding_s": 1.5}
    row |= {"times": {"monai": 5.0, "plain": 4.0}, "repeats": 3, "repeat": "again", "headers_s": 0.2}
    row |= {"times_cpu": {"monai": 7.0, "plain": 4.0}}
    told = "5 x monai of 6: missed, 7 by processors' seconds; decoding the slices that count alone would be 6.67"
    assert explain_reading(row) == told
    print_section("reading", [row | {"section": "reading"}], (0.0, 0.0))
    printed = capsys.readouterr().err
    assert told in printed
    assert "decoding 1.5, headers 0.2 s a scan" in printed
    assert explain_reading(row | {"goals": {"plain": 3.5}}) == ""


def test_the_road_s_table_ends_with_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_stages(network_s=2.0, lungs_s=0.5, whole_s=2.6)
    print_section("road", [*add_ratios(rows), *profile_road(rows, 2)], (0.0, 0.0))
    printed = capsys.readouterr().err
    table, profile = printed.split("where a scan's time goes")
    assert "0.769 x" in table
    assert "statistics" in profile
    assert "most of it lungs" in profile


def test_the_network_s_table_ends_with_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """As the road's ends with the phases of its nights; neither is a line of the table, or a panel of the chart."""
    named = {"section": "network", "what": "a forward pass", "repeats": 1, "repeat": "again", "seconds": 2.0}
    ours = named | {"road": "ours, openvino fp32", "goals": {"eager torch": 1.5}}
    table = add_ratios([named | {"road": "eager torch", "goals": {}, "seconds": 5.0}, ours])
    told = {"layers": [["Convolution", "brgconv", 20, 1.5]], "products_s": 1.25, "products_by": "brgemm"} | {
        "products_side": 512
    }
    rows = [*table, table[1] | {"what": LAYERS, "eager_s": 5.0} | told]
    print_section("network", rows, (0.0, 0.0))
    before, after = capsys.readouterr().err.split(LAYERS)
    assert "brgconv" not in before
    assert "brgconv" in after
    assert "which a pass would be 4 x eager torch" in after
    assert len(draw_chart(rows).axes) == 1


def test_a_limit_is_told_beside_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    named = {"section": "reading", "what": "a scan", "repeats": 1, "repeat": "again"}
    ours = named | {
        "road": "ours",
        "seconds": 1.0,
        "growth_mb": 25.0,
        "goals": {"b": 3.0},
        "limits": {"growth_mb": 150},
    }
    print_section("reading", add_ratios([named | {"road": "b", "seconds": 4.0, "goals": {}}, ours]), (0.0, 0.0))
    assert "3 x b, at most 150 MB" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("last_mb", "told"), [(9.018, "1e+02 bytes more for each, so that it is not flat"), (9.0, "0")]
)
def test_growth_is_told_for_the_table_of_most_nights(last_mb: float, told: str) -> None:
    """A hundred times the objects, 120 times the seconds; 180 objects more than before for 18 kB more, or none."""
    figures = ((2, 2.0, 1.0, 365), (20, 24.0, 9.0, 365), (200, 240.0, last_mb, 365), (200, 99.0, 99.0, 10))
    rows = [dict(zip(("objects", "seconds", "growth_mb", "nights"), row, strict=True)) for row in figures]
    expected = f"100 times the objects take 120 times the seconds; of memory the last 10 times took {told}"
    assert describe_growth(rows).startswith(expected)
    assert describe_growth(rows).endswith("not flat") == (last_mb > 9)


def test_every_section_is_taken_three_times_unless_told_otherwise() -> None:
    assert parse_settings([]).repeats == 3
    assert parse_settings(["--repeats", "5"]).repeats == 5


def test_an_unknown_section_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="rode is none of"):
        parse_settings(["--only", "reading,rode"])


def test_our_augmentation_is_timed_on_one_thread_as_training_has_it() -> None:
    before = torch.get_num_threads()
    set_model_threads(2)
    try:
        augment_ours()
        assert cv2.getNumThreads() == 1
    finally:
        set_model_threads(before)


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


def test_operations_are_those_of_every_convolution() -> None:
    """Of an output voxel two for each weight that makes it; gates and head, which are not counted here, have few."""
    counted = 0

    def count(layer: torch.nn.Conv3d, _: Any, output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output[0, 0].numel() * layer.weight.numel()

    network = build_network(ModelConfig(), 0).to("meta").eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_hook(count)
    network(torch.zeros((1, 1, *network.config.volume_shape), device="meta"))
    assert count_operations() == pytest.approx(counted, rel=1e-3)
