"""Diagnostic metrics: class probabilities and true labels of a set of scans enter, numbers leave.

Accuracy, `*_macro`, `*_3class` are over the three classes; `*_ncp` is COVID-19 (NCP) against the rest. A metric the set
leaves undefined (no NCP scan, say) is NaN, never 0. A scan can carry a weight, a count of how often it is in the set:
that is how many resampled sets are measured at once, by the same lines that measure one.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from darnet.scan import DIAGNOSES, BoolArray, Diagnosis, FloatArray

LabelArray: TypeAlias = NDArray[np.integer[Any]]

NCP_LABEL = DIAGNOSES.index(Diagnosis.NCP)
NUM_CLASSES = len(DIAGNOSES)
TABLE_2 = ("accuracy_3class", "auc_ncp", "sensitivity_ncp", "specificity_ncp", "f1_ncp")
ECE_BINS = 15  # equal widths over (0, 1]. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks"


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often the called class is right, by the probability it was called with.

    Shape: (..., ECE_BINS) each; `confidence` and `accuracy` are NaN in an empty bin.
    """

    num_scans: FloatArray
    confidence: FloatArray
    accuracy: FloatArray


def compute_metrics(probabilities: FloatArray, labels: LabelArray) -> dict[str, float]:
    """All metrics of Table 2 under their scoped names.

    Shape: (N, 3), (N,).
    """
    metrics = measure_scans(probabilities, labels)
    return {name: float(metrics[name]) for name in TABLE_2}


def compute_all_metrics(probabilities: FloatArray, labels: LabelArray) -> dict[str, float]:
    """Those of Table 2, their macro means over the three classes, and calibration.

    Shape: (N, 3), (N,).
    """
    return {name: float(value) for name, value in measure_scans(probabilities, labels).items()}


def measure_scans(
    probabilities: FloatArray, labels: LabelArray, weights: FloatArray | None = None
) -> dict[str, FloatArray]:
    """Every metric of one set of scans, or of many that differ in how often each scan is in them.

    Shape: (N, 3), (N,), weights (..., N) -> (...) each; without weights every scan counts once.
    """
    confusion = count_confusion(probabilities, labels, weights)
    aucs = [auc_of_class(probabilities, labels, index, weights) for index in range(NUM_CLASSES)]
    sensitivity, specificity, f1 = _rates_of_classes(confusion)
    return {
        "accuracy_3class": _accuracy(confusion),
        "auc_ncp": aucs[NCP_LABEL],
        "sensitivity_ncp": sensitivity[..., NCP_LABEL],
        "specificity_ncp": specificity[..., NCP_LABEL],
        "f1_ncp": f1[..., NCP_LABEL],
        "auc_macro": np.mean(aucs, axis=0),
        "sensitivity_macro": sensitivity.mean(axis=-1),
        "specificity_macro": specificity.mean(axis=-1),
        "f1_macro": f1.mean(axis=-1),
        "ece_3class": _expect_calibration_error(measure_reliability(probabilities, labels, weights)),
        "brier_3class": _brier(probabilities, labels, weights),
    }


def accuracy_3class(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of scans whose most probable class is the true one; NaN without scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2: its sensitivity and specificity fit a three-class accuracy only.
    """
    return float(_accuracy(count_confusion(probabilities, labels)))


def auc_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Chance that an NCP scan gets a higher NCP probability than another scan, ties counting half.

    Shape:  (N, 3), (N,).
    Source: paper Table 2, as the Mann-Whitney statistic. NaN unless both kinds of scan are there.
    """
    return float(auc_of_class(probabilities, labels, NCP_LABEL))


def sensitivity_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of NCP scans that are called NCP; NaN without NCP scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    return float(_rates_of_classes(count_confusion(probabilities, labels))[0][NCP_LABEL])


def specificity_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of the other scans that are not called NCP; NaN without other scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    return float(_rates_of_classes(count_confusion(probabilities, labels))[1][NCP_LABEL])


def f1_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Harmonic mean of sensitivity and precision; NaN if no scan is NCP and none is called so.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    return float(_rates_of_classes(count_confusion(probabilities, labels))[2][NCP_LABEL])


def ece_3class(probabilities: FloatArray, labels: LabelArray) -> float:
    """Expected calibration error: mean distance of confidence from accuracy over `ECE_BINS` bins, weighted by scans.

    Shape:  (N, 3), (N,).
    Source: Guo et al. 2017; confidence is the probability of the called class. It is never negative, so that chance
            alone keeps it above 0.
    """
    return float(_expect_calibration_error(measure_reliability(probabilities, labels)))


def brier_3class(probabilities: FloatArray, labels: LabelArray) -> float:
    """Squared distance of the probabilities from the truth, summed over classes, mean over scans: 0 to 2.

    Shape:  (N, 3), (N,).
    Source: Brier 1950, in its original form for several classes.
    """
    return float(_brier(probabilities, labels))


def count_confusion(probabilities: FloatArray, labels: LabelArray, weights: FloatArray | None = None) -> FloatArray:
    """Count scans by true class (rows) and called class (columns).

    Shape:  (N, 3), (N,), weights (..., N) -> (..., 3, 3).
    Source: paper Table 2: the decision is the most probable of the three classes, the first of equals, no threshold.
    """
    cells = labels * NUM_CLASSES + probabilities.argmax(axis=1)
    counts: FloatArray = _weigh(weights, len(labels)) @ np.eye(NUM_CLASSES**2)[cells]
    return counts.reshape(*counts.shape[:-1], NUM_CLASSES, NUM_CLASSES)


def auc_of_class(
    probabilities: FloatArray, labels: LabelArray, index: int, weights: FloatArray | None = None
) -> FloatArray:
    """The AUC of one class against the others.

    Shape: (N, 3), (N,), weights (..., N) -> (...).
    """
    positive, negative = _count_by_score(probabilities[:, index], labels == index, _weigh(weights, len(labels)))
    num_lower = negative.cumsum(axis=-1) - negative
    wins = (positive * (num_lower + negative / 2)).sum(axis=-1)
    return _divide(wins, positive.sum(axis=-1) * negative.sum(axis=-1))


def trace_roc(scores: FloatArray, is_positive: BoolArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Shape: (N,), (N,), (N,) -> (T,), (T,); both rising, NaN where one kind of scan is absent.
    """
    positive, negative = _count_by_score(scores, is_positive, weights)
    rates = [np.append(0, kind[::-1].cumsum()) for kind in (negative, positive)]
    false_rate, true_rate = (_divide(rate, np.broadcast_to(rate[-1], rate.shape)) for rate in rates)
    return false_rate, true_rate


def measure_reliability(
    probabilities: FloatArray, labels: LabelArray, weights: FloatArray | None = None
) -> Reliability:
    """Sort scans into `ECE_BINS` bins, closed above, by the probability of their called class.

    Shape: (N, 3), (N,), weights (..., N).
    """
    confidence = probabilities.max(axis=1, initial=0)
    is_right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, ECE_BINS + 1)
    members = np.eye(ECE_BINS)[np.digitize(confidence, edges[1:-1], right=True)]  # (N, bins)
    weights = _weigh(weights, len(labels))
    num_scans = weights @ members
    means = [_divide(weights @ (members * value[:, None]), num_scans) for value in (confidence, is_right)]
    return Reliability(num_scans, *means)


def _weigh(weights: FloatArray | None, num_scans: int) -> FloatArray:
    return np.ones(num_scans) if weights is None else weights


def _count_by_score(scores: FloatArray, is_positive: BoolArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weight of the positive and of the negative scans at each different score, the lowest first: (..., T) each."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    kinds = (weights[..., order] * kind[order] for kind in (is_positive, ~is_positive))
    positive, negative = (np.add.reduceat(kind, starts, axis=-1) for kind in kinds)
    return positive, negative


def _accuracy(confusion: FloatArray) -> FloatArray:
    return _divide(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum(axis=(-2, -1)))


def _rates_of_classes(confusion: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sensitivity, specificity and F1 of each class against the others: (..., 3, 3) -> (..., 3) each."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    num_true, num_called = confusion.sum(axis=-1), confusion.sum(axis=-2)
    num_scans = num_true.sum(axis=-1, keepdims=True)
    num_others = num_scans - num_true
    num_rejected = num_others - (num_called - hits)
    return _divide(hits, num_true), _divide(num_rejected, num_others), _divide(2 * hits, num_true + num_called)


def _expect_calibration_error(reliability: Reliability) -> FloatArray:
    gaps = np.abs(reliability.confidence - reliability.accuracy)
    error = np.nansum(reliability.num_scans * gaps, axis=-1)
    return _divide(error, reliability.num_scans.sum(axis=-1))


def _brier(probabilities: FloatArray, labels: LabelArray, weights: FloatArray | None = None) -> FloatArray:
    distance = ((probabilities - np.eye(NUM_CLASSES)[labels]) ** 2).sum(axis=1)
    weights = _weigh(weights, len(labels))
    return _divide(weights @ distance, weights.sum(axis=-1))


def _divide(numerator: Any, denominator: Any) -> FloatArray:
    """NaN where there is nothing to divide by."""
    top, bottom = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio: FloatArray = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
    return ratio
