"""What predicts the diagnosis without a look at the lungs: properties of scans in, AUCs with intervals out.

A network learns whatever tells the classes apart: a black background, the number of slices, the scanner. Every property
is judged by how well it alone tells one diagnosis from the others, and by whether chance could have done it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from darnet.scan import DIAGNOSES, BoolArray, FloatArray, Uint8Array

BORDER_SHARE = 32  # the border is this part of the width, all round each slice: 7 voxels of 224
NUM_BINS = 16
MAX_LEVELS = 20  # a text column with more values is a name or a date, and no class of scans
NUM_QUANTILES = 10  # parts of equal size that other numbers are cut into
NUM_PARTS = 5
RIDGE = 0.1  # times the number of scans, on standardised columns
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Feature:
    """One property of every scan.

    Shape: `values` (N,) numbers, or (N, K) for a category or a histogram; NaN where it is not known.
    """

    name: str
    origin: str  # table, files or images
    values: FloatArray


@dataclass(frozen=True)
class Shortcut:
    """How well one feature alone tells one diagnosis from the others.

    `auc` is of the better direction; where that is `fitted`, it is of scores fitted on other patients, so that it may
    lie below 0.5. `low` and `high` bound it with 95% confidence. `is_beyond_chance` holds where not even one of all
    comparisons made would reach as far by chance, with the same confidence.
    """

    feature: str
    origin: str
    diagnosis: str
    direction: str  # higher, lower or fitted
    auc: float
    low: float
    high: float
    is_beyond_chance: bool
    num_scans: int
    num_patients: int


@dataclass(frozen=True)
class Comparison:
    """An AUC with its variance."""

    auc: float
    variance: float


def find_shortcuts(
    features: Sequence[Feature], diagnoses: Sequence[str], patients: Sequence[str], seed: int
) -> list[Shortcut]:
    """Judge every feature against every diagnosis, the strongest first; features without spread are left out.

    Numbers are judged twice, as they are and fitted (`encode_numbers`): a scanner's number, or a count that is in the
    middle for one diagnosis, has no direction. Both are comparisons that luck had; one of them is told.
    Shape: N diagnoses and patients, as the features.
    """
    labels, groups = np.asarray(diagnoses), np.unique(np.asarray(patients), return_inverse=True)[1]
    judged = []
    for feature in features:
        is_known = np.atleast_1d(np.isfinite(feature.values).reshape(len(labels), -1).all(axis=1))
        values = feature.values[is_known]
        forms = [values] if values.ndim == 2 or (fitted := encode_numbers(values)) is None else [values, fitted]
        for diagnosis in DIAGNOSES:
            found = [
                _judge(form, labels[is_known] == diagnosis, groups[is_known], np.random.default_rng(seed))
                for form in forms
            ]
            judged.append((feature, str(diagnosis), groups[is_known], [item for item in found if item is not None]))
    num_comparisons = sum(len(found) for *_, found in judged)
    reach = float(norm.ppf(1 - (1 - CONFIDENCE) / 2 / max(num_comparisons, 1)))
    shortcuts = [
        _choose_form([_describe(feature, diagnosis, known, *item, reach) for item in found])
        for feature, diagnosis, known, found in judged
        if found
    ]
    return sorted(shortcuts, key=lambda item: (not item.is_beyond_chance, -item.auc, item.feature, item.diagnosis))


def _choose_form(forms: Sequence[Shortcut]) -> Shortcut:
    """Of one feature's forms the plainest, unless a later one tells the diagnosis surely better."""
    chosen = forms[0]
    for item in forms[1:]:
        if (item.is_beyond_chance and not chosen.is_beyond_chance) or item.low > chosen.auc:
            chosen = item
    return chosen


def _describe(
    feature: Feature,
    diagnosis: str,
    groups: NDArray[np.integer[Any]],
    direction: str,
    comparison: Comparison,
    reach: float,
) -> Shortcut:
    """A comparison as numbers for people; `reach` is how many standard errors chance goes in any of all comparisons."""
    deviation = comparison.variance**0.5
    margin = float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    return Shortcut(
        feature=feature.name,
        origin=feature.origin,
        diagnosis=diagnosis,
        direction=direction,
        auc=round(comparison.auc, 4),
        low=round(max(comparison.auc - margin, 0.0), 4),
        high=round(min(comparison.auc + margin, 1.0), 4),
        is_beyond_chance=comparison.auc - reach * deviation > 0.5,
        num_scans=len(groups),
        num_patients=len(np.unique(groups)),
    )


def compare_groups(values: FloatArray, is_class: BoolArray, groups: NDArray[np.integer[Any]]) -> Comparison:
    """AUC of `values` for a class, ties counting half; its variance counts patients, not scans.

    The variance is Obuchowski's for clustered data, and never less than that of a worthless feature in as many
    patients: where few scans are told apart by chance, the former would be 0.
    Shape:  (N,) each; both kinds of scan must be there.
    Source: Obuchowski 1997, Biometrics 53, 567; the floor is the variance of the Mann-Whitney statistic with ties.
    """
    num_class, num_rest = int(is_class.sum()), int((~is_class).sum())
    ranks = rankdata(values)
    in_class = (ranks[is_class] - rankdata(values[is_class])) / num_rest
    in_rest = 1 - (ranks[~is_class] - rankdata(values[~is_class])) / num_class
    auc = float(in_class.mean())
    size = int(groups.max()) + 1
    from_class = np.bincount(groups[is_class], in_class - auc, size) / num_class
    from_rest = np.bincount(groups[~is_class], in_rest - auc, size) / num_rest
    in_groups = [len(np.unique(groups[where])) for where in (is_class, ~is_class, slice(None))]
    terms = ((from_class**2).sum(), (from_rest**2).sum(), 2 * (from_class * from_rest).sum())
    clustered = sum(term * number / max(number - 1, 1) for term, number in zip(terms, in_groups, strict=True))
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    untied = 1 - (ties**3 - ties).sum() / max(float(len(values)) ** 3 - len(values), 1)
    floor = untied * (in_groups[0] + in_groups[1] + 1) / (12 * in_groups[0] * in_groups[1])
    return Comparison(auc, float(max(clustered, floor)))


def encode_levels(levels: Sequence[str]) -> FloatArray | None:
    """A category as columns of 0 and 1, one a level; None where it has no or too many levels."""
    names, codes = np.unique(np.asarray(levels, dtype=str), return_inverse=True)
    if not 2 <= len(names) <= MAX_LEVELS:
        return None
    return np.eye(len(names))[codes]


def encode_numbers(values: FloatArray) -> FloatArray | None:
    """Numbers as columns of 0 and 1: one a value where there are at most MAX_LEVELS, else one a part of equal size.

    None where fewer than three are left: two have a direction, and nothing besides.
    Shape: (N,) -> (N, K).
    """
    edges = np.unique(values)
    if len(edges) > MAX_LEVELS:
        edges = np.unique(np.quantile(values, np.arange(NUM_QUANTILES) / NUM_QUANTILES))
    if len(edges) < 3:
        return None
    return np.eye(len(edges))[np.searchsorted(edges, values, side="right") - 1]


def measure_border(voxels: Uint8Array) -> dict[str, FloatArray]:
    """What the margin of a standard volume looks like, where no lung is.

    Shape: (D, H, W) -> numbers, and a histogram of NUM_BINS shares.
    """
    width = max(1, voxels.shape[2] // BORDER_SHARE)
    is_border = np.ones(voxels.shape[1:], np.bool_)
    is_border[width:-width, width:-width] = False
    border = voxels[:, is_border]
    histogram = np.histogram(border, NUM_BINS, (0, 256))[0] / border.size
    return {
        "border_zero_share": np.asarray((border == 0).mean()),
        "border_mean": np.asarray(border.mean()),
        "border_histogram": histogram,
        "zero_share": np.asarray((voxels == 0).mean()),
    }


def _judge(
    values: FloatArray, is_class: BoolArray, groups: NDArray[np.integer[Any]], rng: np.random.Generator
) -> tuple[str, Comparison] | None:
    """Direction and AUC of one feature for one class; None where there is nothing to compare."""
    if is_class.all() or not is_class.any() or (values == values[:1]).all():
        return None
    if values.ndim == 2:
        fitted = _compare_fitted(values, is_class, groups, rng)
        return None if fitted is None else ("fitted", fitted)
    judged = compare_groups(values, is_class, groups)
    if judged.auc < 0.5:
        return "lower", Comparison(1 - judged.auc, judged.variance)
    return "higher", judged


def _compare_fitted(
    values: FloatArray, is_class: BoolArray, groups: NDArray[np.integer[Any]], rng: np.random.Generator
) -> Comparison | None:
    """AUC of scores that were fitted on other patients; None where the patients are too few.

    Scans are compared within a part only: the class rates of the others differ from part to part, the other way round.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    has_class = np.bincount(groups, is_class) > 0
    has_rest = np.bincount(groups, ~is_class) > 0
    num_parts = min(NUM_PARTS, int(has_class.sum()) // 2, int((has_rest & ~has_class).sum()) // 2)
    if num_parts < 2:
        return None
    order = np.lexsort((rng.random(len(has_class)), has_class))
    part = (np.argsort(order) % num_parts)[groups]
    judged = []
    for number in range(num_parts):
        here = part == number
        scores = _fit_ridge(values[~here], is_class[~here], values[here])
        judged.append(compare_groups(scores, is_class[here], groups[here]))
    variance = sum(item.variance for item in judged) / num_parts**2
    return Comparison(float(np.mean([item.auc for item in judged])), variance)


def _fit_ridge(known: FloatArray, is_class: BoolArray, unknown: FloatArray) -> FloatArray:
    """Scores by ridge regression on standardised columns; for a category these are shrunk class rates."""
    centre, scale = known.mean(axis=0), known.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    columns = (known - centre) / scale
    penalty = RIDGE * len(known) * np.eye(columns.shape[1])
    weights = np.linalg.solve(columns.T @ columns + penalty, columns.T @ (is_class - is_class.mean()))
    # Equal rows must have equal scores to the last bit, or they would be ranked by rounding.
    scores: FloatArray = ((unknown - centre) / scale @ weights).round(9)
    return scores
