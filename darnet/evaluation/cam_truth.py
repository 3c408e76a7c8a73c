"""Class activation maps held against planted disease: maps and truth enter, measures with intervals leave.

A map that peaks in a lesion shows that it can, not why: each measure stands beside what a map that knows nothing but
the lungs would reach, and beside maps of networks whose last stage was drawn anew.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from scipy import ndimage

from darnet.cam import class_activation_maps
from darnet.cam_statistics import find_peak
from darnet.evaluation.comparisons import FoldDifference, compare_folds
from darnet.evaluation.intervals import ALPHA, UNDEFINED, Interval, Resampling, take_interval
from darnet.evaluation.truth import Truth
from darnet.model import DARNet, build_network
from darnet.scan import FloatArray, Uint8Array

NEAR_MM = 20.0  # Source: ours; a cell of the last feature map is 20 to 40 mm wide
MEASURES = {
    "cam_in_lung": "share of the map that lies in the lungs",
    "peak_in_lesion": "share of maps whose peak lies in a lesion (the pointing game)",
    "peak_within_20_mm": "share of maps whose peak lies within 20 mm of a lesion",
    "dice_half_maximum": "Dice overlap of the map at half its maximum with the lesions",
}
CHANGED_BELOW = 0.5  # rank correlation. Source: ours; maps that ignore what was learnt stay near 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over scans with its percentile bootstrap interval."""

    mean: float
    interval: Interval


@dataclass(frozen=True, eq=False, slots=True)
class MeasuredMaps:
    """One network's maps of the same scans, by measure; NaN where one is undefined.

    Shape: `ensemble` (scans,), of the mean map over folds and seeds; `models` (seeds, folds, scans), of each by itself.
    """

    ensemble: Mapping[str, FloatArray]
    models: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class MapDifference:
    """First minus second network in one measure, on the same scans; both intervals are corrected for the number of such
    differences in a report, of all diagnoses, and undefined with fewer than `count_needed_patients`.

    `ensembles` is of these trained networks alone: its interval knows the choice of patients. `models`, of the single
    folds and seeds, knows the luck of a training too, and the verdict rests on it.
    """

    first: str
    second: str
    measure: str
    ensembles: Estimate
    models: FoldDifference

    @property
    def verdict(self) -> str:
        """`shown` where the models' interval leaves 0 out; else, also where there are too few seeds, `not shown`."""
        return self.models.verdict


@dataclass(frozen=True, eq=False, slots=True)
class MapStudy:
    """The maps of several networks on the scans of one diagnosis.

    `measured` is network -> measure; `chance` is measure, see `measure_chance`; `redrawn` is network -> rank
    correlation with the map of the same network after its last stage and head were drawn anew.
    """

    diagnosis: str
    num_scans: int
    measured: Mapping[str, Mapping[str, Estimate]]
    chance: Mapping[str, float]
    differences: Sequence[MapDifference]
    num_comparisons: int
    redrawn: Mapping[str, Estimate]


def measure_map(cam: FloatArray, truth: Truth) -> dict[str, float]:
    """One scan's map against its truth; a map that is nowhere positive points at nothing, and lies nowhere (NaN).

    Shape:  (D, H, W), nowhere negative.
    Source: pointing game, Zhang et al. 2018, "Top-down neural attention"; the others ours.
    """
    if not cam.max() > 0:
        return dict.fromkeys(MEASURES, 0.0) | {"cam_in_lung": math.nan}
    peak = find_peak(cam)
    return {
        "cam_in_lung": float(cam[truth.lung].sum(dtype=np.float64) / cam.sum(dtype=np.float64)),
        "peak_in_lesion": float(truth.lesion[peak]),
        "peak_within_20_mm": float(_measure_distance(truth, peak) <= NEAR_MM),
        "dice_half_maximum": _dice(cam >= cam.max() / 2, truth.lesion),
    }


def measure_chance(truth: Truth) -> dict[str, float]:
    """What ignorance reaches: a map spread evenly over the scan, a peak at any voxel of the lungs, both whole lungs."""
    return {
        "cam_in_lung": float(truth.lung.mean()),
        "peak_in_lesion": float(truth.lesion[truth.lung].mean()),
        "peak_within_20_mm": float((measure_distances(truth)[truth.lung] <= NEAR_MM).mean()),
        "dice_half_maximum": _dice(truth.lung, truth.lesion),
    }


def _measure_distance(truth: Truth, voxel: tuple[int, int, int]) -> float:
    """As `measure_distances` at one voxel, without those of all others."""
    offsets_mm = (np.argwhere(truth.lesion) - voxel) * truth.spacing_mm
    return math.sqrt(float((offsets_mm**2).sum(axis=1).min()))


def measure_distances(truth: Truth) -> FloatArray:
    """Distance in mm of each voxel to the nearest lesion, 0 inside; shape of the truth, which must hold a lesion."""
    distances_mm: FloatArray = ndimage.distance_transform_edt(~truth.lesion, sampling=truth.spacing_mm)
    return distances_mm


def estimate_mean(values: FloatArray, resampling: Resampling) -> Estimate:
    """Mean over scans; those that leave the value undefined (NaN) are left out of mean and replicates.

    Shape: (scans,).
    """
    return Estimate(_mean_of_defined(values), take_interval(_replicate_means(values, resampling)))


def estimate_difference(values: FloatArray, resampling: Resampling, num_comparisons: int) -> Estimate:
    """Mean of paired differences, as `estimate_mean`, with an interval that holds for all comparisons together.

    It is of the two trained ensembles alone: others of the same networks differ by the luck of their training.
    Student's t by patients on the bootstrap's standard error, at Bonferroni's level: percentiles that far out are too
    narrow with few patients. Undefined with fewer patients than `count_needed_patients`.
    Shape: (scans,).
    """
    num_patients, mean = resampling.num_clusters, _mean_of_defined(values)
    if num_patients < count_needed_patients(num_comparisons):
        return Estimate(mean, UNDEFINED)
    variance = _take_variance(_replicate_means(values, resampling)) * num_patients / (num_patients - 1)
    reach = float(scipy.stats.t.ppf(1 - ALPHA / 2 / num_comparisons, num_patients - 1)) * math.sqrt(variance)
    return Estimate(mean, Interval(mean - reach, mean + reach))


def compare_models(
    first: FloatArray, second: FloatArray, resampling: Resampling, num_comparisons: int
) -> FoldDifference:
    """Two networks paired by seed, fold and scan, as `compare_folds`, for all comparisons together.

    Undefined with fewer patients than `count_needed_patients`, and where a pair has no scan that defines the measure.
    Shape: (seeds, folds, scans) each.
    """
    num_patients, num_scans = resampling.num_clusters, first.shape[-1]
    pairs = (first - second).reshape(-1, num_scans)
    means = np.array([_mean_of_defined(pair) for pair in pairs]).reshape(first.shape[:-1])
    variance = math.nan
    if num_patients >= count_needed_patients(num_comparisons):
        replicates = np.mean([_replicate_means(pair, resampling) for pair in pairs], axis=0)
        variance = _take_variance(replicates) * num_patients / (num_patients - 1)
    return compare_folds(means, np.zeros_like(means), variance, num_comparisons, num_patients - 1)


def count_needed_patients(num_comparisons: int) -> int:
    """So many that all falling on one side is no chance finding among so many comparisons: a sign test's least."""
    return 1 + math.ceil(math.log2(max(1, num_comparisons) / ALPHA))


def _take_variance(replicates: FloatArray) -> float:
    """Of those that are defined; NaN if none is."""
    defined = replicates[~np.isnan(replicates)]
    return float(defined.var()) if len(defined) else math.nan


def _mean_of_defined(values: FloatArray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _replicate_means(values: FloatArray, resampling: Resampling) -> FloatArray:
    """Shape: (scans,) -> (replicates,), NaN in a set without any defined value."""
    is_defined = ~np.isnan(values)
    weights = resampling.weights[:, is_defined]
    totals = weights.sum(axis=1)
    means: FloatArray = np.full(len(totals), np.nan)
    np.divide(weights @ values[is_defined], totals, out=means, where=totals > 0)
    return means


def study_maps(
    diagnosis: str,
    maps: Mapping[str, MeasuredMaps],
    truths: Sequence[Truth],
    pairs: Sequence[tuple[str, str]],
    redrawn: Mapping[str, Estimate],
    resampling: Resampling,
    *,
    num_studies: int = 1,
) -> MapStudy:
    """Every network's measured maps of the same scans, and the pairs' differences, corrected for as many studies beside
    each other in a report."""
    chance = tabulate_measures([measure_chance(truth) for truth in truths])
    num_comparisons = len(pairs) * len(MEASURES) * num_studies
    return MapStudy(
        diagnosis=diagnosis,
        num_scans=len(truths),
        measured={
            name: {measure: estimate_mean(column, resampling) for measure, column in item.ensemble.items()}
            for name, item in maps.items()
        },
        chance={measure: float(column.mean()) for measure, column in chance.items()},
        differences=[
            MapDifference(
                first,
                second,
                measure,
                estimate_difference(
                    maps[first].ensemble[measure] - maps[second].ensemble[measure], resampling, num_comparisons
                ),
                compare_models(maps[first].models[measure], maps[second].models[measure], resampling, num_comparisons),
            )
            for first, second in pairs
            for measure in MEASURES
        ],
        num_comparisons=num_comparisons,
        redrawn=redrawn,
    )


def redraw_last_stage(network: DARNet, seed: int) -> DARNet:
    """The same network with its last stage and head as before any training; all before them stays as it was learnt.

    Source: Adebayo et al. 2018, "Sanity checks for saliency maps".
    """
    fresh, changed = build_network(network.config, seed), copy.deepcopy(network)
    last = f"stages.{len(network.stages) - 1}."
    state = changed.state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.startswith((last, "head.")):
            state[name].copy_(tensor)
    return changed.eval()


@torch.inference_mode()
def map_class(network: DARNet, voxels: Uint8Array, label: int) -> FloatArray:
    """One fold's class map of one standard volume.

    Shape: (D, H, W) -> (d, h, w).
    """
    device = next(network.parameters()).device
    batch = torch.from_numpy(voxels)[None, None].to(device, torch.float32) / 255
    maps = class_activation_maps(network.features(batch), network.head.weight)  # (1, classes, d, h, w)
    class_map: FloatArray = maps[0, label].cpu().numpy()
    return class_map


def correlate_maps(one: FloatArray, other: FloatArray) -> float:
    """Spearman's rank correlation over the cells of two class maps; NaN where a map is the same everywhere.

    Shape: (d, h, w) each.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(one.ravel(), other.ravel()).statistic)


def describe_maps(study: MapStudy) -> dict[str, Any]:
    """What metrics.json says of the maps; NaN as None."""
    return {
        "diagnosis": study.diagnosis,
        "num_scans": study.num_scans,
        "chance": dict(study.chance),
        "networks": {
            name: {measure: _describe(item) for measure, item in measured.items()}
            for name, measured in study.measured.items()
        },
        "differences": [
            {"first": item.first, "second": item.second, "measure": item.measure, "verdict": item.verdict}
            | {"ensembles": _describe(item.ensembles), "folds": _describe_models(item.models)}
            for item in study.differences
        ],
        "redrawn_rank_correlation": {name: _describe(item) for name, item in study.redrawn.items()},
    }


def _describe(estimate: Estimate) -> dict[str, Any]:
    values = [estimate.mean, estimate.interval.low, estimate.interval.high]
    mean, low, high = (None if math.isnan(value) else value for value in values)
    return {"mean": mean, "ci95": [low, high]}


def _describe_models(item: FoldDifference) -> dict[str, Any]:
    p_value = None if math.isnan(item.p_value) else item.p_value
    counts = {"num_pairs": item.num_pairs, "num_seeds": item.num_seeds, "p_value_bonferroni": p_value}
    return _describe(Estimate(item.mean, item.interval)) | counts


def tabulate_measures(rows: Sequence[Mapping[str, float]]) -> dict[str, FloatArray]:
    """One mapping a scan, as `measure_map` gives; measure -> (scans,)."""
    return {measure: np.array([row[measure] for row in rows]) for measure in MEASURES}


def _dice(one: Any, other: Any) -> float:
    total = int(one.sum() + other.sum())
    return float(2 * (one & other).sum() / total) if total else math.nan
