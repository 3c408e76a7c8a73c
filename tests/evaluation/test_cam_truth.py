"""Maps against truth: measures counted by hand and by loops, and maps that do and do not depend on what was learnt."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from darnet.config import ModelConfig
from darnet.evaluation.cam_truth import (
    MEASURES,
    Estimate,
    MapStudy,
    MeasuredMaps,
    compare_models,
    correlate_maps,
    estimate_difference,
    estimate_mean,
    map_class,
    measure_chance,
    measure_map,
    redraw_last_stage,
    study_maps,
)
from darnet.evaluation.intervals import Interval, resample_scans
from darnet.evaluation.maps_report import _judge_redrawn
from darnet.evaluation.truth import Truth
from darnet.model import build_network

SHAPE = (4, 6, 8)
SPACING_MM = (10.0, 5.0, 4.0)


def make_truth() -> Truth:
    """Lungs of 2 x 4 x 6 = 48 voxels; in them a lesion of 1 x 2 x 2 = 4."""
    lung, lesion = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    lung[1:3, 1:5, 1:7] = True
    lesion[1, 1:3, 1:3] = True
    return Truth("a", lesion, lung, SPACING_MM)


def make_cam(**voxels: float) -> np.ndarray:
    """A map that is 0 but at voxels named zyx."""
    cam = np.zeros(SHAPE, np.float32)
    for place, value in voxels.items():
        cam[tuple(int(digit) for digit in place[1:])] = value
    return cam


def test_measures_are_what_a_hand_counts() -> None:
    cam = make_cam(v111=4.0, v112=2.0, v236=1.5, v000=0.5)  # two voxels in the lesion, one in lung, one outside
    measured = measure_map(cam, make_truth())
    assert measured == {
        "cam_in_lung": 7.5 / 8,
        "peak_in_lesion": 1.0,
        "peak_within_20_mm": 1.0,
        "dice_half_maximum": 2 * 2 / (2 + 4),
    }


@pytest.mark.parametrize(("place", "near"), [("v127", 1.0), ("v133", 1.0), ("v311", 1.0), ("v157", 0.0)])
def test_a_peak_is_near_within_twenty_mm(place: str, near: float) -> None:
    """Nearest lesion voxels: 5 voxels of 4 mm; 1 of 5 and 1 of 4; 2 slices of 10; 3 of 5 and 5 of 4 = 25 mm."""
    measured = measure_map(make_cam(**{place: 1.0}), make_truth())
    assert (measured["peak_in_lesion"], measured["peak_within_20_mm"]) == (0.0, near)


def test_a_map_that_is_nowhere_positive_finds_nothing_and_lies_nowhere() -> None:
    measured = measure_map(make_cam(), make_truth())
    assert math.isnan(measured.pop("cam_in_lung"))
    assert set(measured.values()) == {0.0}


def test_chance_is_what_a_loop_over_the_lungs_finds() -> None:
    truth, near, inside = make_truth(), 0, 0
    lesion = np.argwhere(truth.lesion) * SPACING_MM
    for voxel in np.argwhere(truth.lung):
        distance = min(math.dist(voxel * np.array(SPACING_MM), other) for other in lesion)
        near += distance <= 20
        inside += distance == 0
    assert measure_chance(truth) == {
        "cam_in_lung": 48 / (4 * 6 * 8),
        "peak_in_lesion": pytest.approx(inside / 48),
        "peak_within_20_mm": pytest.approx(near / 48),
        "dice_half_maximum": 2 * 4 / (48 + 4),
    }
    assert inside == 4
    assert near < 48


def test_a_mean_leaves_undefined_scans_out_and_its_interval_is_the_bootstraps() -> None:
    values = np.array([0.1, np.nan, 0.5, 0.9, 0.3])
    rng = np.random.default_rng(5)
    resampling = resample_scans(5, None, rng, 4000)
    found = estimate_mean(values, resampling)
    assert found.mean == pytest.approx((0.1 + 0.5 + 0.9 + 0.3) / 4)
    drawn = np.random.default_rng(6).choice(values, (4000, 5))
    low, high = np.nanquantile(np.nanmean(drawn[~np.isnan(drawn).all(axis=1)], axis=1), [0.025, 0.975])
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.03)
    assert math.isnan(estimate_mean(np.full(5, np.nan), resampling).mean)


def make_measured(mean: float, rng: np.random.Generator, num_seeds: int = 3, num_scans: int = 20) -> MeasuredMaps:
    """Five folds a seed, whose measures vary a little about the mean."""
    models = {measure: rng.normal(mean, 0.02, (num_seeds, 5, num_scans)) for measure in MEASURES}
    return MeasuredMaps({measure: values.mean(axis=(0, 1)) for measure, values in models.items()}, models)


def test_a_network_that_points_better_is_shown_to_and_equals_are_not() -> None:
    rng, truths = np.random.default_rng(0), [make_truth() for _ in range(20)]
    maps = {name: make_measured(mean, rng) for name, mean in (("good", 0.9), ("bad", 0.2), ("other", 0.9))}
    resampling = resample_scans(20, None, rng, 2000)
    study = study_maps("NCP", maps, truths, [("good", "bad"), ("good", "other")], {}, resampling)
    assert study.measured["bad"]["cam_in_lung"].mean == pytest.approx(0.2, abs=0.01)
    assert study.differences[0].ensembles.mean == pytest.approx(study.differences[0].models.mean)
    verdicts = {(item.second, item.measure): item.verdict for item in study.differences}
    assert [verdicts["bad", measure] for measure in MEASURES] == ["shown"] * 4
    assert [verdicts["other", measure] for measure in MEASURES] == ["not shown"] * 4
    assert study.chance == pytest.approx(measure_chance(truths[0]))


@pytest.mark.parametrize(("num_seeds", "verdict"), [(1, "not shown"), (2, "not shown"), (3, "shown")])
def test_maps_of_few_seeds_show_no_difference_however_sure_the_patients_are(num_seeds: int, verdict: str) -> None:
    rng, truths = np.random.default_rng(0), [make_truth() for _ in range(20)]
    maps = {name: make_measured(mean, rng, num_seeds) for name, mean in (("good", 0.9), ("bad", 0.2))}
    study = study_maps("NCP", maps, truths, [("good", "bad")], {}, resample_scans(20, None, rng, 2000))
    assert {item.verdict for item in study.differences} == {verdict}
    assert study.differences[0].ensembles.interval.low > 0.5


@pytest.mark.parametrize("num_patients", [7, 8])
def test_few_patients_show_no_difference_of_maps_however_many_scans_they_have(num_patients: int) -> None:
    """Among four measures 0.05 / 4 is asked: seven on one side come by chance in 2 of 2^7 cases, eight in 2 of 2^8."""
    rng, truths = np.random.default_rng(0), [make_truth() for _ in range(24)]
    maps = {name: make_measured(mean, rng, num_scans=24) for name, mean in (("good", 0.9), ("bad", 0.2))}
    patients = [f"p{number % num_patients}" for number in range(24)]
    resampling = resample_scans(24, patients, np.random.default_rng(0), 2000)
    study = study_maps("NCP", maps, truths, [("good", "bad")], {}, resampling)
    verdicts = {item.measure: item.verdict for item in study.differences}
    assert verdicts["peak_in_lesion"] == ("shown" if num_patients == 8 else "not shown")
    assert math.isnan(study.differences[0].ensembles.interval.low) == (num_patients == 7)
    assert study.differences[0].ensembles.mean > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [10, 30])
def test_chance_in_patients_seldom_moves_an_interval_off_zero_among_twelve(num_patients: int) -> None:
    """Twelve differences that are none: in 5 of 100 studies at most may one interval leave 0 out."""
    rng, num_shown = np.random.default_rng(5), 0
    for _ in range(200):
        drawn = resample_scans(num_patients, None, rng, 500)
        found = [estimate_difference(rng.normal(size=num_patients), drawn, 12).interval for _ in range(12)]
        num_shown += any(item.low > 0 or item.high < 0 for item in found)
    assert num_shown / 200 < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("by_seed", [0.0, 1.0])
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_luck_of_training_is_seldom_shown_as_a_difference_of_maps(num_seeds: int, by_seed: float) -> None:
    """No difference but luck, of seeds, of trainings and of patients: of 400 comparisons 20 are shown at most by 5%,
    and 31 come by chance then in 1 case of 100. Of these trained networks alone most would be."""
    rng, num_shown, num_certain = np.random.default_rng(7), 0, 0
    for _ in range(400):
        luck = by_seed * rng.normal(size=(num_seeds, 1, 1)) + rng.normal(size=(num_seeds, 5, 1))
        values = luck + 0.5 * rng.normal(size=20) + rng.normal(size=(num_seeds, 5, 20))
        drawn = resample_scans(20, None, rng, 200)
        num_shown += compare_models(values, np.zeros_like(values), drawn, 1).verdict == "shown"
        alone = estimate_difference(values[0].mean(axis=0), drawn, 1).interval
        num_certain += alone.low > 0 or alone.high < 0
    assert num_shown <= 30
    assert num_certain > 100


@pytest.mark.parametrize(("num_seeds", "num_comparisons"), [(3, 1), (3, 24), (5, 1)])
def test_a_real_difference_of_maps_is_shown_through_luck_of_training(num_seeds: int, num_comparisons: int) -> None:
    rng, num_shown = np.random.default_rng(7), 0
    for _ in range(50):
        values = 3.5 + rng.normal(size=(num_seeds, 5, 1)) + rng.normal(size=20) + rng.normal(size=(num_seeds, 5, 20))
        drawn = resample_scans(20, None, rng, 200)
        num_shown += compare_models(values, np.zeros_like(values), drawn, num_comparisons).verdict == "shown"
    assert num_shown > 35


def test_a_model_without_any_map_leaves_the_difference_undefined() -> None:
    values = np.random.default_rng(0).random((3, 5, 20))
    values[1, 2] = np.nan
    drawn = resample_scans(20, None, np.random.default_rng(0), 200)
    found = compare_models(values, np.zeros_like(values), drawn, 1)
    assert math.isnan(found.mean)
    assert found.verdict == "not shown"
    values[1, 2, 3] = 0.5
    assert not math.isnan(compare_models(values, np.zeros_like(values), drawn, 1).p_value)


def test_more_pairs_of_networks_widen_every_difference() -> None:
    rng, truths = np.random.default_rng(0), [make_truth() for _ in range(20)]
    maps = {name: make_measured(0.5, rng) for name in ("one", "other")}
    drawn = resample_scans(20, None, np.random.default_rng(0), 2000)
    widths = []
    for num_pairs in (1, 6):
        (item, *_) = study_maps("NCP", maps, truths, [("one", "other")] * num_pairs, {}, drawn).differences
        intervals = item.ensembles.interval, item.models.interval
        widths.append([interval.high - interval.low for interval in intervals])
        level = 1 - 0.05 / 2 / num_pairs / 4
        reach = max(scipy.stats.t.ppf(level, freedom) * error for error, freedom in item.models.errors)
        assert widths[-1][1] == pytest.approx(2 * reach)
    assert widths[1][0] > 1.1 * widths[0][0]


def test_the_interval_of_a_difference_is_students() -> None:
    """Of 50 independent scans: what scipy says of their mean, at 0.05 / 4."""
    values = np.random.default_rng(1).normal(0.3, 1, 50)
    found = estimate_difference(values, resample_scans(50, None, np.random.default_rng(0), 20_000), 4).interval
    low, high = scipy.stats.t.interval(1 - 0.05 / 4, 49, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


NETWORK = ModelConfig(base_channels=4, volume_shape=(16, 64, 64))


def test_only_last_stage_and_head_are_drawn_anew() -> None:
    network = build_network(NETWORK, 0)
    changed = redraw_last_stage(network, 99).state_dict()
    fresh = build_network(NETWORK, 99).state_dict()
    for name in network.state_dict():
        expected = fresh if name.startswith(("stages.3.", "head.")) else network.state_dict()
        assert torch.equal(changed[name], expected[name]), name
    assert not torch.equal(changed["head.weight"], network.state_dict()["head.weight"])


def test_maps_of_other_weights_differ_and_of_the_same_weights_do_not() -> None:
    voxels = np.random.default_rng(0).integers(0, 256, NETWORK.volume_shape, dtype=np.uint8)
    network = build_network(NETWORK, 5).eval()
    before = map_class(network, voxels, 1)
    same, other = (map_class(redraw_last_stage(network, seed), voxels, 1) for seed in (5, 77))
    assert correlate_maps(before, same) == pytest.approx(1)  # from the seed it had
    assert abs(correlate_maps(before, other)) < 0.9
    assert correlate_maps(before, -before) == pytest.approx(-1)
    assert math.isnan(correlate_maps(before, np.zeros_like(before)))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.2, 0.3, "the maps of every network change"),
        (0.2, 0.6, "of DA, it is not shown that maps change"),
        (-0.7, 0.1, "of DA, it is not shown"),
        (math.nan, math.nan, "of DA, it is not shown"),
    ],
)
def test_the_sanity_check_rests_on_the_interval_and_not_on_the_mean(low: float, high: float, told: str) -> None:
    redrawn = {"DA": Estimate(0.1, Interval(low, high)), "CA": Estimate(0.0, Interval(-0.1, 0.1))}
    assert told in _judge_redrawn([MapStudy("NCP", 12, {}, {}, [], 0, redrawn)])
