"""How sure a metric is: probabilities, labels and who is whose enter; intervals leave.

The bootstrap resamples whole patients, since scans of one patient resemble each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from darnet.metrics import NCP_LABEL, LabelArray, count_confusion, measure_reliability, measure_scans, trace_roc
from darnet.scan import FloatArray

NUM_REPLICATES = 2000  # Source: ours; Efron & Tibshirani ask for 1,000 or more for percentile intervals
ALPHA = 0.05  # Source: the field's custom
CHUNK_WEIGHTS = 1 << 20  # replicates times scans that are measured at once: bounds memory, not numbers
MAX_UNDEFINED = 0.05  # share of replicates that may leave a metric undefined


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval; NaN at both ends where it is undefined."""

    low: float
    high: float


UNDEFINED = Interval(math.nan, math.nan)
CALIBRATION = "ece_3class"


@dataclass(frozen=True, slots=True)
class Resampling:
    """Sets of scans drawn with replacement, patient by patient.

    Shape: `weights` (replicates, N): how often each scan is in each set. `clustered_by` is "patient", or "scan" where
    nobody said whose the scans are; `num_clusters` counts them.
    """

    weights: FloatArray
    clustered_by: str
    num_clusters: int

    def measure(self, probabilities: FloatArray, labels: LabelArray) -> dict[str, FloatArray]:
        """Every metric of every set.

        Shape: (N, 3), (N,) -> (replicates,) each.
        """
        chunks = [measure_scans(probabilities, labels, weights) for weights in self._chunks(len(labels))]
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def bound_calibration_shift(self, probabilities: FloatArray, labels: LabelArray) -> float:
        """How far chance moves the gaps between confidence and accuracy, summed over the bins, in 95 of 100 cases.

        The calibration error moves no further, whatever the signs of the gaps. It is the larger of what the sets do and
        of what chance in who is called rightly does: a bin of one scan, or without an error, is alike in every set.
        Shape: (N, 3), (N,).
        """
        gaps = _measure_gaps(probabilities, labels)
        chunks = [_measure_gaps(probabilities, labels, weights) - gaps for weights in self._chunks(len(labels))]
        by_sets = np.quantile(np.concatenate([np.abs(chunk).sum(axis=-1) for chunk in chunks]), 1 - ALPHA)
        return max(float(by_sets), _expect_calibration_shift(probabilities, labels, self.num_clusters))

    def _chunks(self, num_scans: int) -> Iterator[FloatArray]:
        step = max(1, CHUNK_WEIGHTS // max(1, num_scans))
        return (self.weights[start : start + step] for start in range(0, len(self.weights), step))


def resample_scans(
    num_scans: int, patients: Sequence[str] | None, rng: np.random.Generator, num_replicates: int = NUM_REPLICATES
) -> Resampling:
    """Draw as many patients as there are, with replacement, each with all its scans; single scans without patients.

    Source: Field & Welsh 2007, the cluster bootstrap.
    """
    clusters = number_clusters(num_scans, patients)
    num_clusters = int(clusters.max(initial=-1)) + 1
    drawn = rng.multinomial(num_clusters, np.full(num_clusters, 1 / max(1, num_clusters)), num_replicates)
    return Resampling(drawn[:, clusters].astype(float), "scan" if patients is None else "patient", num_clusters)


def take_interval(replicates: FloatArray) -> Interval:
    """The middle 95% of the replicates that define the metric; undefined if more than `MAX_UNDEFINED` do not.

    Shape: (replicates,).
    """
    is_defined = ~np.isnan(replicates)
    if is_defined.mean() < 1 - MAX_UNDEFINED:
        return UNDEFINED
    low, high = np.quantile(replicates[is_defined], [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(low), float(high))


def bootstrap_intervals(probabilities: FloatArray, labels: LabelArray, resampling: Resampling) -> dict[str, Interval]:
    """A percentile interval for every metric but `ece_3class`, which has one by `_bound_calibration_error`.

    Shape:  (N, 3), (N,).
    Source: Efron & Tibshirani 1993, ch. 13. Where no scan is called wrongly it has no width: that says that no error
            was seen, not that none can be.
    """
    replicates = resampling.measure(probabilities, labels)
    shift = resampling.bound_calibration_shift(probabilities, labels)
    error = float(np.abs(_measure_gaps(probabilities, labels)).sum())
    return {name: take_interval(values) for name, values in replicates.items()} | {
        CALIBRATION: _bound_calibration_error(error, shift, 0.0)
    }


def bootstrap_recalls(probabilities: FloatArray, labels: LabelArray, resampling: Resampling) -> list[Interval]:
    """A percentile interval for the share of each class's scans that is called so, in label order.

    Shape: (N, 3), (N,).
    """
    confusion = count_confusion(probabilities, labels, resampling.weights)  # (replicates, 3, 3)
    totals = confusion.sum(axis=-1)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    recalls = np.divide(right, totals, out=np.full(totals.shape, np.nan), where=totals > 0)
    return [take_interval(column) for column in recalls.T]


def bootstrap_differences(
    first: FloatArray, second: FloatArray, labels: LabelArray, resampling: Resampling
) -> dict[str, Interval]:
    """An interval for first minus second in every metric, as `bootstrap_intervals`, both on the same sets.

    Shape: (N, 3), (N, 3), (N,).
    """
    ours, theirs = (resampling.measure(probabilities, labels) for probabilities in (first, second))
    shift = sum(resampling.bound_calibration_shift(probabilities, labels) for probabilities in (first, second))
    errors = [float(np.abs(_measure_gaps(probabilities, labels)).sum()) for probabilities in (first, second)]
    return {name: take_interval(ours[name] - theirs[name]) for name in ours} | {
        CALIBRATION: _bound_calibration_error(errors[0] - errors[1], shift, -1.0)
    }


def measure_cohort_variance(
    first: FloatArray, second: FloatArray, labels: LabelArray, resampling: Resampling
) -> dict[str, float]:
    """How far the choice of test patients may have moved the mean difference of two networks' folds.

    Shape: (folds, N, 3), (folds, N, 3), (N,) -> variance of the mean over the folds of first minus second, by metric;
           NaN where too many sets leave it undefined.
    """
    sums: dict[str, FloatArray] = {}
    for sign, folds in ((1, first), (-1, second)):
        for fold in folds:
            for name, values in resampling.measure(fold, labels).items():
                sums[name] = sums.get(name, np.zeros(len(values))) + sign * values
    return {name: _take_variance(values / len(first)) for name, values in sums.items()}


def bootstrap_roc(
    probabilities: FloatArray, labels: LabelArray, resampling: Resampling, false_rates: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The lower and upper end of the NCP curve's true positive rate at each false positive rate.

    Shape: (N, 3), (N,), (points,) -> (points,), (points,); NaN where undefined.
    """
    is_ncp = labels == NCP_LABEL
    curves = np.empty((len(resampling.weights), len(false_rates)))
    for row, weights in enumerate(resampling.weights):
        curves[row] = np.interp(false_rates, *trace_roc(probabilities[:, NCP_LABEL], is_ncp, weights))
    intervals = [take_interval(column) for column in curves.T]
    return np.array([item.low for item in intervals]), np.array([item.high for item in intervals])


def number_clusters(num_scans: int, patients: Sequence[str] | None) -> LabelArray:
    """Whose each scan is, from 0; shape: (N,)."""
    return np.arange(num_scans) if patients is None else np.unique(patients, return_inverse=True)[1]


def _measure_gaps(probabilities: FloatArray, labels: LabelArray, weights: FloatArray | None = None) -> FloatArray:
    """Confidence minus accuracy of each bin, times its share of the scans.

    Shape: (N, 3), (N,), weights (..., N) -> (..., bins).
    """
    found = measure_reliability(probabilities, labels, weights)
    gaps: FloatArray = np.nan_to_num(found.num_scans * (found.confidence - found.accuracy))
    gaps /= found.num_scans.sum(axis=-1, keepdims=True)
    return gaps


def _expect_calibration_shift(probabilities: FloatArray, labels: LabelArray, num_clusters: int) -> float:
    """What chance in who is called rightly moves the gaps by, summed over the bins, in 95 of 100 cases.

    Each bin's number of right calls is binomial, so that of the sum of its distances from the mean by half-normals;
    as many scans of a patient count as one. Exact in one large bin, wide in several.
    Source: ours; the share of right calls as by Wilson and Agresti-Coull, drawn to 1/2, so that a bin without an error
            has chance too.
    """
    found = measure_reliability(probabilities, labels)
    share = (np.nan_to_num(found.num_scans * found.accuracy) + 1) / (found.num_scans + 2)
    variance = found.num_scans * share * (1 - share)
    mean = math.sqrt(2 / math.pi) * float(np.sqrt(variance).sum())
    reach = float(scipy.stats.norm.ppf(1 - ALPHA / 2)) * math.sqrt((1 - 2 / math.pi) * float(variance.sum()))
    num_scans = max(1, len(labels))
    return (mean + reach) / num_scans * math.sqrt(num_scans / max(1, num_clusters))


def _bound_calibration_error(error: float, reach: float, least: float) -> Interval:
    """The error, or the difference of two, plus and minus what chance moves the bins' gaps by, from `least` to 1.

    Percentiles would not cover: an error that is never negative is raised by chance, and by resampling again.
    Source: ours; the triangle inequality makes it cover, and wide.
    """
    return Interval(max(least, error - reach), min(1.0, error + reach))


def _take_variance(replicates: FloatArray) -> float:
    is_defined = ~np.isnan(replicates)
    return float(replicates[is_defined].var(ddof=1)) if is_defined.mean() >= 1 - MAX_UNDEFINED else math.nan
