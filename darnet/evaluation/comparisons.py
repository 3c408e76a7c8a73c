"""What two models on the same scans show of a difference: in AUC, in decisions, and over their folds and seeds.

DeLong's and McNemar's methods take every scan as independent of the others: with several scans a patient they are too
sure, so that verdicts rest on their clustered forms, which count patients and are the same where each has one scan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from darnet.evaluation.intervals import ALPHA, UNDEFINED, Interval, number_clusters
from darnet.metrics import NCP_LABEL, LabelArray, measure_scans
from darnet.scan import FloatArray

MIN_SEEDS = 3  # of every fold. Source: ours; of fewer, luck and a fold's scans can hardly be told apart


@dataclass(frozen=True, slots=True)
class AucEstimate:
    """An AUC with its variance and interval by DeLong; NaN where undefined."""

    auc: float
    variance: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class AucDifference:
    """First minus second AUC on the same scans; p values are two-sided, the clustered one counts patients."""

    first: AucEstimate
    second: AucEstimate
    difference: float
    interval: Interval
    p_value: float
    clustered_interval: Interval
    clustered_p_value: float


@dataclass(frozen=True, slots=True)
class DecisionDifference:
    """Scans that only one of two models calls rightly; p values are two-sided, the clustered one counts patients."""

    num_only_first_right: int
    num_only_second_right: int
    p_value: float
    clustered_p_value: float


@dataclass(frozen=True, slots=True)
class FoldDifference:
    """First minus second network, mean over pairs of the same fold and seed.

    `p_value` is two-sided, at most 1; NaN where there are too few seeds for a test, or nothing to judge chance by.
    `errors` are the standard errors of the mean that it rests on, each with its degrees of freedom.
    """

    num_pairs: int
    num_seeds: int
    mean: float
    interval: Interval
    p_value: float
    errors: Sequence[tuple[float, float]]

    @property
    def verdict(self) -> str:
        """What this comparison alone shows, before any correction for others beside it."""
        return judge_p(self.p_value)

    def find_least_shown(self, num_comparisons: int) -> float:
        """The least mean difference that would be shown, whatever the others, as one of so many; NaN without a test."""
        return math.nan if math.isnan(self.p_value) else _reach(self.errors, num_comparisons)


def judge_p(p_value: float) -> str:
    """`shown` below 0.05; else, also where p is undefined, `not shown`."""
    return "shown" if p_value < ALPHA else "not shown"


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Raise p values so that among all of them chance alone brings one below 0.05 in at most 5 of 100 cases.

    Undefined ones (NaN) stay, and are not counted: nothing was tested there.
    Source: Holm 1979, step-down.
    """
    order = [place for place in np.argsort(p_values) if not math.isnan(p_values[place])]
    corrected, highest = list(p_values), 0.0
    for step, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - step) * p_values[place]))
        corrected[place] = highest
    return corrected


def delong_auc(probabilities: FloatArray, labels: LabelArray) -> AucEstimate:
    """The NCP AUC with DeLong's interval, cut at 0 and 1; undefined with fewer than two scans of either kind.

    Shape:  (N, 3), (N,).
    Source: DeLong et al. 1988, by midranks as in Sun & Xu 2014; no well-kept library has it. An AUC of 1 has variance
            0: its interval says nothing.
    """
    if not _has_variance(labels):
        return AucEstimate(_mean_auc(probabilities, labels), math.nan, UNDEFINED)
    ncp, rest = _delong_components(probabilities, labels)
    variance = float(ncp.var(ddof=1) / len(ncp) + rest.var(ddof=1) / len(rest))
    return AucEstimate(float(ncp.mean()), variance, _normal_interval(float(ncp.mean()), variance, 0))


def compare_aucs(
    first: FloatArray, second: FloatArray, labels: LabelArray, patients: Sequence[str] | None = None
) -> AucDifference:
    """DeLong's test of two models on the same scans, and its form for clusters; every scan is its own without patients.

    Undefined with fewer than two scans, or two patients, of either kind.
    Shape:  (N, 3), (N, 3), (N,), (N,).
    Source: DeLong et al. 1988; Obuchowski 1997, Biometrics 53, 567, which is DeLong's with one scan a patient. Where
            the difference has no variance p is 1 for equal AUCs, else undefined.
    """
    ours, theirs = delong_auc(first, labels), delong_auc(second, labels)
    difference = ours.auc - theirs.auc
    if not _has_variance(labels):
        return AucDifference(ours, theirs, difference, UNDEFINED, math.nan, UNDEFINED, math.nan)
    pairs = zip(_delong_components(first, labels), _delong_components(second, labels), strict=True)
    ncp, rest = (one - other for one, other in pairs)
    plain = ncp.var(ddof=1) / len(ncp) + rest.var(ddof=1) / len(rest)
    clusters = number_clusters(len(labels), patients)
    clustered = _clustered_variance(ncp, rest, clusters[labels == NCP_LABEL], clusters[labels != NCP_LABEL])
    judged, by_clusters = (_judge_difference(difference, float(variance)) for variance in (plain, clustered))
    return AucDifference(ours, theirs, difference, *judged, *by_clusters)


def compare_decisions(
    first: FloatArray, second: FloatArray, labels: LabelArray, patients: Sequence[str] | None = None
) -> DecisionDifference:
    """McNemar's exact test of two models' three-class decisions on the same scans, and its form for clusters.

    Shape:  (N, 3), (N, 3), (N,), (N,).
    Source: McNemar 1947, as a binomial test of the scans on which only one is right; without any p is 1. Clustered, as
            in Durkalski et al. 2003, by what each patient's scans add up to, one right minus the other, but exact: of
            two models that are alike either sign of a patient's sum is as likely.
    """
    is_right, other_right = (probabilities.argmax(axis=1) == labels for probabilities in (first, second))
    only_first, only_second = is_right & ~other_right, ~is_right & other_right
    counts = int(only_first.sum()), int(only_second.sum())
    p_value = float(scipy.stats.binomtest(counts[0], sum(counts)).pvalue) if sum(counts) else 1.0
    sums = np.bincount(number_clusters(len(labels), patients), only_first.astype(float) - only_second)
    return DecisionDifference(*counts, p_value, _flip_signs(sums.round().astype(int).tolist()))


def compare_folds(
    first: FloatArray,
    second: FloatArray,
    cohort_variance: float = 0.0,
    num_comparisons: int = 1,
    cohort_freedom: float = math.inf,
) -> FoldDifference:
    """A t-interval for the difference of two networks, paired by seed and fold, in one metric.

    A test needs every fold trained with `MIN_SEEDS` seeds. Folds of a seed share nothing that is drawn (first weights,
    order and augmentation are drawn by seed and fold), so every pair is a draw of its own of a training's luck. A fold
    has the same scans under every seed, so that where these move a fold more than luck does, folds are what is counted:
    of both intervals the wider is taken. Folds share most of their training scans, for which both are raised.
    `cohort_variance` is that of the mean difference by the choice of test patients, whom all pairs share, so that their
    spread does not tell it; it was estimated with `cohort_freedom` degrees of freedom. Interval and p hold for
    `num_comparisons` such differences together, by Bonferroni.

    Shape:  (seeds, folds) each -> one value; undefined with a single fold, or where the pairs do not vary.
    Source: Nadeau & Bengio 2003, for repeated folds as in Bouckaert & Frank 2004: variance * (1 / pairs + test share /
            training share), the latter 1 / (folds - 1), with pairs - 1 degrees of freedom, and the same of the folds'
            means as in their own paper; Satterthwaite 1946 for those of a sum of variances; ours: the wider of both,
            and the test patients' variance beside it.
    """
    differences = first - second
    num_seeds, num_folds = differences.shape
    num_pairs, mean = differences.size, float(differences.mean())
    if num_folds < 2 or not differences.var(ddof=1) > np.finfo(float).eps ** 2 or math.isnan(cohort_variance):
        return FoldDifference(num_pairs, num_seeds, mean, UNDEFINED, math.nan, ())
    shared = 1 / (num_folds - 1)
    by_pairs = float(differences.var(ddof=1)) * (1 / num_pairs + shared)
    by_folds = float(differences.mean(axis=0).var(ddof=1)) * (1 / num_folds + shared)
    errors = tuple(
        _add_variances((variance, freedom), (cohort_variance, cohort_freedom))
        for variance, freedom in ((by_pairs, num_pairs - 1), (by_folds, num_folds - 1))
    )
    reach = _reach(errors, num_comparisons)
    p_value = max(2 * float(scipy.stats.t.sf(abs(mean) / error, freedom)) for error, freedom in errors if error > 0)
    p_value = min(1.0, num_comparisons * p_value) if num_seeds >= MIN_SEEDS else math.nan
    interval = Interval(max(-1.0, mean - reach), min(1.0, mean + reach))  # no metric's difference can pass them
    return FoldDifference(num_pairs, num_seeds, mean, interval, p_value, errors)


def _add_variances(*parts: tuple[float, float]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of independent terms, each with its variance and their own."""
    variance = sum(part for part, _ in parts)
    doubt = sum(part**2 / freedom for part, freedom in parts)
    return math.sqrt(variance), variance**2 / doubt if doubt > 0 else math.inf


def _reach(errors: Sequence[tuple[float, float]], num_comparisons: int) -> float:
    """Half the widest of some 95% t-intervals, each with its standard error and degrees of freedom."""
    level = 1 - ALPHA / 2 / num_comparisons
    return max(float(scipy.stats.t.ppf(level, freedom)) * error for error, freedom in errors)


def _has_variance(labels: LabelArray) -> bool:
    num_ncp = int((labels == NCP_LABEL).sum())
    return min(num_ncp, len(labels) - num_ncp) >= 2


def _mean_auc(probabilities: FloatArray, labels: LabelArray) -> float:
    return float(measure_scans(probabilities, labels)["auc_ncp"])


def _delong_components(probabilities: FloatArray, labels: LabelArray) -> tuple[FloatArray, FloatArray]:
    """Share of the other kind that each NCP scan, and each other scan, is rightly above or below, ties half.

    Shape: (N, 3), (N,) -> (NCP scans,), (other scans,); both have the AUC as their mean.
    """
    scores, is_ncp = probabilities[:, NCP_LABEL], labels == NCP_LABEL
    ranks, rank = scipy.stats.rankdata(scores), scipy.stats.rankdata
    ncp = (ranks[is_ncp] - rank(scores[is_ncp])) / (~is_ncp).sum()
    rest = 1 - (ranks[~is_ncp] - rank(scores[~is_ncp])) / is_ncp.sum()
    return ncp, rest


def _clustered_variance(
    ncp: FloatArray, rest: FloatArray, ncp_clusters: LabelArray, rest_clusters: LabelArray
) -> float:
    """Variance of the mean of DeLong's components, or their differences, by patients; NaN with fewer than two of a
    kind.

    Shape: (NCP scans,), (other scans,), and whose they are.
    """
    numbers = [len(np.unique(where)) for where in (ncp_clusters, rest_clusters)]
    if min(numbers) < 2:
        return math.nan
    size = 1 + int(max(ncp_clusters.max(), rest_clusters.max()))
    from_ncp = np.bincount(ncp_clusters, ncp - ncp.mean(), size) / len(ncp)
    from_rest = np.bincount(rest_clusters, rest - rest.mean(), size) / len(rest)
    sums = (from_ncp**2).sum(), (from_rest**2).sum(), 2 * (from_ncp * from_rest).sum()
    return float(sum(item * number / (number - 1) for item, number in zip(sums, (*numbers, size), strict=True)))


def _judge_difference(difference: float, variance: float) -> tuple[Interval, float]:
    """Interval and two-sided p of a difference of AUCs."""
    if math.isnan(variance):
        return UNDEFINED, math.nan
    if variance > 0:
        p_value = float(2 * scipy.stats.norm.sf(abs(difference) / math.sqrt(variance)))
    else:
        p_value = 1.0 if difference == 0 else math.nan
    return _normal_interval(difference, max(0.0, variance), -1), p_value


def _flip_signs(sums: Sequence[int]) -> float:
    """Share of all choices of signs whose total is as far from 0 as this one: exact, two-sided."""
    chances = np.ones(1)  # of each total from -reach to reach
    for step in (abs(value) for value in sums if value):
        either = np.zeros(2 * step + 1)
        either[[0, -1]] = 0.5
        chances = np.convolve(chances, either)
    totals = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(totals) >= abs(sum(sums))].sum()))


def _normal_interval(mean: float, variance: float, floor: float) -> Interval:
    """Cut at `floor` and 1, which no AUC or difference of AUCs can pass."""
    reach = float(scipy.stats.norm.ppf(1 - ALPHA / 2)) * math.sqrt(variance)
    return Interval(max(floor, mean - reach), min(1.0, mean + reach))
