"""What a study's page says of networks made by hand: which differences are shown, which way, and of whom."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from darnet.evaluation.cam_truth import Estimate, MapDifference, MapStudy
from darnet.evaluation.comparisons import FoldDifference
from darnet.evaluation.intervals import Interval
from darnet.evaluation.maps_report import describe_measured_maps
from darnet.evaluation.measures import Origin
from darnet.evaluation.paper import TABLE_1
from darnet.evaluation.predictions import Predictions
from darnet.evaluation.study import NetworkRun, Study, make_study
from darnet.evaluation.study_report import draw_cases, render_study, render_study_tex, summarise_pairs
from darnet.metrics import TABLE_2
from darnet.report import CamPanel
from darnet.scan import CropBox

ORIGIN = Origin("a study", "Nothing is known of its training.", {})
NUM_SCANS, NUM_FOLDS, NUM_SEEDS = 120, 5, 3


def make_run(name: str, share_right: float, seed: int) -> NetworkRun:
    """Fifteen models that call about such a share of the scans rightly, each scan of a patient of its own."""
    rng = np.random.default_rng(seed)
    labels, num_models = np.arange(NUM_SCANS) % 3, NUM_FOLDS * NUM_SEEDS
    called = (labels + (rng.random((num_models, NUM_SCANS)) > share_right) * rng.integers(1, 3, NUM_SCANS)) % 3
    ids = tuple(f"s{number}" for number in range(NUM_SCANS))
    predictions = Predictions(
        name=name,
        sha256="0" * 64,
        scan_ids=ids,
        patient_ids=ids,
        labels=labels,
        folds=tuple(str(number % NUM_FOLDS) for number in range(num_models)),
        fold_probabilities=0.1 + 0.7 * np.eye(3)[called],
        seeds=tuple(str(number // NUM_FOLDS) for number in range(num_models)),
    )
    return NetworkRun(name, ORIGIN, predictions, 1_000_000, pd.DataFrame())


def study_networks(shares: Mapping[str, float]) -> Study:
    runs = [make_run(name, share, seed) for seed, (name, share) in enumerate(shares.items())]
    return make_study(runs, TABLE_1, seed=0, num_replicates=200)


@pytest.mark.parametrize(("shares", "way"), [((0.4, 0.9), "higher"), ((0.9, 0.4), "lower")])
def test_a_large_difference_of_three_seeds_is_shown_with_its_direction(shares: tuple[float, float], way: str) -> None:
    study = study_networks(dict(zip(("ResNet18", "DA"), shares, strict=True)))
    told = ", ".join(f"{metric} {way}" for metric in TABLE_2)
    assert summarise_pairs(study) == f"Paired by fold and seed, these differences are shown: {told} (DA − ResNet18)."


def test_networks_that_are_alike_show_nothing_in_three_seeds() -> None:
    told = "Paired by fold, no difference between the networks compared is shown in any metric of Table 2."
    assert summarise_pairs(study_networks({"ResNet18": 0.7, "DA": 0.7})) == told


@pytest.mark.parametrize("names", [("ResNet18", "CA", "DA+CA"), ("CA", "DA+CA"), ("DA",)])
def test_networks_are_named_and_every_two_compared(names: Sequence[str]) -> None:
    study = study_networks({name: 0.9 - 0.1 * place for place, name in enumerate(names)})
    assert {(pair.second, pair.first) for pair in study.pairs} == set(itertools.combinations(names, 2))
    page, tables = render_study(study), render_study_tex(study)
    assert f"<h2>Table 2: {' and '.join(dict.fromkeys([names[0], names[-1]]))}</h2>" in page
    assert "the baseline" not in page + tables


def make_maps(differences: Mapping[tuple[str, str, str], tuple[float, float]], num_seeds: int = 3) -> MapStudy:
    """Of (first, second, measure), each with the mean difference of the fold models and its p."""
    return MapStudy(
        diagnosis="NCP",
        num_scans=20,
        measured={},
        chance=dict.fromkeys(("cam_in_lung", "peak_in_lesion", "peak_within_20_mm", "dice_half_maximum"), 0.1),
        differences=[
            MapDifference(
                *names,
                Estimate(mean, Interval(mean - 0.1, mean + 0.1)),
                FoldDifference(5 * num_seeds, num_seeds, mean, Interval(mean - 0.1, mean + 0.1), p_value, ()),
            )
            for names, (mean, p_value) in differences.items()
        ],
        num_comparisons=len(differences),
        redrawn={},
    )


def tell_maps(maps: MapStudy) -> str:
    (section,) = describe_measured_maps(replace(study_networks({"DA": 0.9}), maps=[maps]))
    return section.text


@pytest.mark.parametrize(("mean", "way"), [(0.4, "better"), (-0.4, "worse")])
def test_what_depth_attention_does_to_maps_is_told_with_its_direction_where_it_is_shown(mean: float, way: str) -> None:
    maps = make_maps(
        {
            ("DA", "ResNet18", "peak_in_lesion"): (mean, 0.001),
            ("DA", "ResNet18", "dice_half_maximum"): (-mean, 0.2),
            ("DA+CA", "CA", "peak_in_lesion"): (mean / 2, 0.04),
            ("DA+CA", "CA", "dice_half_maximum"): (mean, 0.06),
            ("DA+CA", "ResNet18", "cam_in_lung"): (-mean, 0.001),  # both attentions at once: not what DA adds
        }
    )
    told = f"peak_in_lesion {way} (DA − ResNet18); peak_in_lesion {way} (DA+CA − CA)"
    rest = "In the other 2 of 4 comparisons a difference is not shown."
    assert f"NCP: with depth attention, {told}. {rest}" in tell_maps(maps)


def test_three_seeds_without_a_difference_of_maps_say_so_and_do_not_deny_it() -> None:
    told = tell_maps(make_maps({("DA", "ResNet18", "peak_in_lesion"): (0.4, 0.2)}))
    assert "NCP: that depth attention helps maps find lesions is not shown: no difference is shown in any" in told
    told = tell_maps(make_maps({("DA", "ResNet18", "peak_in_lesion"): (0.4, float("nan"))}, num_seeds=1))
    assert "is not shown, nor can it be with one seed" in told


@pytest.mark.parametrize(
    ("is_known", "heading", "rest"),
    [
        (True, "NCP test cases of least, middle and most severity", "Left the slice"),
        (False, "NCP test cases of least, middle and highest NCP probability by DA", "How ill these patients are is"),
    ],
)
def test_figure_two_says_by_what_its_cases_were_chosen(is_known: bool, heading: str, rest: str) -> None:
    image = np.zeros((16, 16), np.uint8)
    panel = CamPanel("a case", "DA", image, image / 255, CropBox(4, 0, 0, 16, 16), None)
    study = replace(study_networks({"DA": 0.9}), cases=[[panel]], is_severity_known=is_known)
    assert f"{heading}. {rest}" in render_study(study)
    assert draw_cases(study).get_suptitle().startswith(f"{heading}\n")
