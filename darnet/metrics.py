"""Diagnostic metrics: class probabilities and true labels of a set of scans enter, numbers in [0, 1] leave.

Accuracy is over the three classes; the others are COVID-19 (NCP) against the rest. A metric the set leaves undefined
(no NCP scan, say) is NaN, never 0.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from darnet.scan import DIAGNOSES, BoolArray, Diagnosis, FloatArray

LabelArray: TypeAlias = NDArray[np.integer[Any]]

NCP_LABEL = DIAGNOSES.index(Diagnosis.NCP)


def compute_metrics(probabilities: FloatArray, labels: LabelArray) -> dict[str, float]:
    """All metrics of Table 2 under their scoped names.

    Shape: (N, 3), (N,).
    """
    return {
        "accuracy_3class": accuracy_3class(probabilities, labels),
        "auc_ncp": auc_ncp(probabilities, labels),
        "sensitivity_ncp": sensitivity_ncp(probabilities, labels),
        "specificity_ncp": specificity_ncp(probabilities, labels),
        "f1_ncp": f1_ncp(probabilities, labels),
    }


def accuracy_3class(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of scans whose most probable class is the true one; NaN without scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2: its sensitivity and specificity fit a three-class accuracy only.
    """
    return _share(probabilities.argmax(axis=1) == labels)


def auc_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Chance that an NCP scan gets a higher NCP probability than another scan, ties counting half.

    Shape:  (N, 3), (N,).
    Source: paper Table 2, as the Mann-Whitney statistic. NaN unless both kinds of scan are there.
    """
    is_ncp = labels == NCP_LABEL
    num_ncp, num_rest = int(is_ncp.sum()), int((~is_ncp).sum())
    if num_ncp == 0 or num_rest == 0:
        return math.nan
    ranks = rankdata(probabilities[:, NCP_LABEL])
    wins = ranks[is_ncp].sum() - num_ncp * (num_ncp + 1) / 2
    return float(wins / (num_ncp * num_rest))


def sensitivity_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of NCP scans that are called NCP; NaN without NCP scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    return _share(_is_called_ncp(probabilities)[labels == NCP_LABEL])


def specificity_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Share of the other scans that are not called NCP; NaN without other scans.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    return _share(~_is_called_ncp(probabilities)[labels != NCP_LABEL])


def f1_ncp(probabilities: FloatArray, labels: LabelArray) -> float:
    """Harmonic mean of sensitivity and precision; NaN if no scan is NCP and none is called so.

    Shape:  (N, 3), (N,).
    Source: paper Table 2.
    """
    is_ncp, is_called = labels == NCP_LABEL, _is_called_ncp(probabilities)
    num_relevant = int(is_ncp.sum()) + int(is_called.sum())
    if num_relevant == 0:
        return math.nan
    return 2 * int((is_ncp & is_called).sum()) / num_relevant


def _is_called_ncp(probabilities: FloatArray) -> BoolArray:
    """Source: paper Table 2: the decision is the most probable of the three classes, not a threshold."""
    called: BoolArray = probabilities.argmax(axis=1) == NCP_LABEL
    return called


def _share(is_right: BoolArray) -> float:
    return float(is_right.mean()) if is_right.size else math.nan
