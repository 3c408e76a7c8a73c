"""What a set of predictions is worth: a checked table enters; metrics, their intervals and a comparison leave.

The figures of the ensemble (mean probability over the folds) carry the intervals; those of the single folds are given
as mean and standard deviation, the way of the paper's Tables 2 and 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from darnet import NOTICE
from darnet.errors import UsageError
from darnet.evaluation.comparisons import (
    AucDifference,
    AucEstimate,
    DecisionDifference,
    FoldDifference,
    compare_aucs,
    compare_decisions,
    compare_folds,
    correct_holm,
    delong_auc,
    judge_p,
)
from darnet.evaluation.intervals import (
    Interval,
    Resampling,
    bootstrap_differences,
    bootstrap_intervals,
    bootstrap_recalls,
    bootstrap_roc,
    measure_cohort_variance,
    resample_scans,
)
from darnet.evaluation.predictions import Predictions
from darnet.metrics import ECE_BINS, TABLE_2, compute_all_metrics, count_confusion
from darnet.scan import LABELS, BoolArray, FloatArray

FALSE_RATES = np.linspace(0, 1, 101)  # where the ROC band is measured
FEW_CLUSTERS = 30  # patients or scans of a class. Source: ours; below, percentile intervals are known to be too narrow


@dataclass(frozen=True, slots=True)
class Origin:
    """What the numbers are numbers of: a title, what is known of the model's training, and facts for metrics.json.

    `warning` says what flatters the model, if anything is known to.
    """

    subject: str
    training: str
    facts: Mapping[str, Any]
    warning: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """Metrics of the ensemble with their intervals, and of each fold.

    Shape: `confusion` (3, 3), `recalls` intervals of its diagonal's shares, by row; `roc_band` false positive rates,
           lower and upper true positive rates (points,).
    """

    predictions: Predictions
    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    auc: AucEstimate
    fold_metrics: Sequence[Mapping[str, float]]
    confusion: FloatArray
    recalls: Sequence[Interval]
    roc_band: tuple[FloatArray, FloatArray, FloatArray]
    clustered_by: str
    num_replicates: int

    @property
    def fold_means(self) -> dict[str, float]:
        """Each metric's mean over the folds; NaN where one fold's is undefined."""
        return {name: float(np.mean([fold[name] for fold in self.fold_metrics])) for name in self.metrics}

    @property
    def fold_stds(self) -> dict[str, float]:
        """Each metric's standard deviation over the folds, of a sample (n - 1); NaN with a single fold."""
        if len(self.fold_metrics) < 2:
            return dict.fromkeys(self.metrics, math.nan)
        return {name: float(np.std([fold[name] for fold in self.fold_metrics], ddof=1)) for name in self.metrics}


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """First against second model on the same scans.

    `differences` are first minus second; `folds`, Table 2's metrics, only where both have the same folds and seeds.
    The `p_*`, on which verdicts rest, are corrected by Holm over all comparisons of a report: the clustered tests of
    AUCs, those of decisions, and those of the folds over all metrics. `least_folds` are the least mean differences of
    the folds that would have been shown beside the others, whatever these are.
    """

    second: Predictions
    second_metrics: Mapping[str, float]
    differences: Mapping[str, float]
    intervals: Mapping[str, Interval]
    aucs: AucDifference
    decisions: DecisionDifference
    folds: Mapping[str, FoldDifference]
    p_auc: float
    p_decisions: float
    p_folds: Mapping[str, float]
    least_folds: Mapping[str, float]

    @property
    def clustered_by(self) -> str:
        """What the clustered tests count."""
        return "scan" if self.second.patient_ids is None else "patient"


def evaluate_predictions(predictions: Predictions, resampling: Resampling) -> Evaluation:
    """Measure the ensemble and each fold."""
    probabilities, labels = predictions.probabilities, predictions.labels
    return Evaluation(
        predictions=predictions,
        metrics=compute_all_metrics(probabilities, labels),
        intervals=bootstrap_intervals(probabilities, labels, resampling),
        auc=delong_auc(probabilities, labels),
        fold_metrics=[compute_all_metrics(fold, labels) for fold in predictions.fold_probabilities],
        confusion=count_confusion(probabilities, labels),
        recalls=bootstrap_recalls(probabilities, labels, resampling),
        roc_band=(FALSE_RATES, *bootstrap_roc(probabilities, labels, resampling, FALSE_RATES)),
        clustered_by=resampling.clustered_by,
        num_replicates=len(resampling.weights),
    )


def resample_predictions(predictions: Predictions, seed: int, num_replicates: int) -> Resampling:
    """Draw the sets that all intervals of an evaluation and its comparison are taken from."""
    rng = np.random.default_rng(seed)
    return resample_scans(len(predictions.scan_ids), predictions.patient_ids, rng, num_replicates)


def compare_predictions(first: Predictions, second: Predictions, resampling: Resampling) -> Comparison:
    """Compare two models scan by scan, as if no other were compared: see `correct_comparisons`.

    Raises: UsageError naming a scan that only one table has, or of which they say another label or patient.
    """
    second = _align(second, first)
    ours, theirs, labels = first.probabilities, second.probabilities, first.labels
    metrics, second_metrics = compute_all_metrics(ours, labels), compute_all_metrics(theirs, labels)
    aucs = compare_aucs(ours, theirs, labels, first.patient_ids)
    decisions = compare_decisions(ours, theirs, labels, first.patient_ids)
    comparison = Comparison(
        second=second,
        second_metrics=second_metrics,
        differences={name: metrics[name] - second_metrics[name] for name in metrics},
        intervals=bootstrap_differences(ours, theirs, labels, resampling),
        aucs=aucs,
        decisions=decisions,
        folds=_compare_folds(first, second, resampling),
        p_auc=aucs.clustered_p_value,
        p_decisions=decisions.clustered_p_value,
        p_folds={},
        least_folds={},
    )
    return correct_comparisons([comparison])[0]


def correct_comparisons(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p values corrected for standing in one report.

    Source: ours: three families, as each is a table of its own, from which a reader takes what is shown.
    """
    aucs = correct_holm([item.aucs.clustered_p_value for item in comparisons])
    decisions = correct_holm([item.decisions.clustered_p_value for item in comparisons])
    plain = [fold.p_value for item in comparisons for fold in item.folds.values()]
    folds, num_tests = iter(correct_holm(plain)), sum(not math.isnan(p_value) for p_value in plain)
    return [
        replace(
            item,
            p_auc=p_auc,
            p_decisions=p_decisions,
            p_folds={name: next(folds) for name in item.folds},
            least_folds={name: fold.find_least_shown(num_tests) for name, fold in item.folds.items()},
        )
        for item, p_auc, p_decisions in zip(comparisons, aucs, decisions, strict=True)
    ]


def find_warnings(evaluation: Evaluation, origin: Origin) -> list[str]:
    """What a reader of the numbers has to know before believing them."""
    warnings = [origin.warning] if origin.warning else []
    if evaluation.clustered_by == "scan":
        warnings.append(
            "The table has no column patient_id: the intervals take every scan as independent of the others, and are "
            "too narrow if patients have several scans."
        )
    counts = zip(LABELS, count_clusters(evaluation.predictions), strict=True)
    few = [f"{count} {name}" for name, count in counts if count < FEW_CLUSTERS]
    if few:
        warnings.append(f"Few {evaluation.clustered_by}s ({', '.join(few)}): intervals of so few are too narrow.")
    warnings += _warn_of_intervals(evaluation)
    if evaluation.auc.variance == 0:
        warnings.append(
            "All pairs of scans are ranked the same way: the interval of auc_ncp by DeLong has no width and no use."
        )
    undefined = [name for name, value in evaluation.metrics.items() if math.isnan(value)]
    if undefined:
        warnings.append(f"Undefined on this cohort, as a class is absent: {', '.join(undefined)}.")
    return warnings


def count_clusters(predictions: Predictions) -> list[int]:
    """What intervals rest on: the patients of each class, or its scans where nobody knows whose they are."""
    names = np.array(predictions.patient_ids or predictions.scan_ids)
    return [len(np.unique(names[predictions.labels == label])) for label in range(len(LABELS))]


def _warn_of_intervals(evaluation: Evaluation) -> list[str]:
    """Name the metrics whose interval is lacking though they are defined, or has no width."""
    known = {name: item for name, item in evaluation.intervals.items() if not math.isnan(evaluation.metrics[name])}
    lacking = [name for name, item in known.items() if math.isnan(item.low)]
    flat = [name for name, item in known.items() if item.low == item.high]
    warnings = []
    if lacking:
        warnings.append(
            f"No interval for {', '.join(lacking)}: too many resampled sets leave it undefined, as a class rests on "
            f"too few {evaluation.clustered_by}s."
        )
    if flat:
        warnings.append(
            f"The interval of {', '.join(flat)} has no width: no resampled set differed. That does not mean that "
            "another cohort would not."
        )
    return warnings


def describe_evaluation(evaluation: Evaluation, origin: Origin, comparison: Comparison | None) -> dict[str, Any]:
    """What metrics.json says; NaN as None, which JSON has."""
    predictions = evaluation.predictions
    described: dict[str, Any] = {
        "notice": NOTICE,
        "subject": origin.subject,
        **evaluation.metrics,
        **{f"{name}_ci95": [item.low, item.high] for name, item in evaluation.intervals.items()},
        "auc_ncp_ci95_delong": [evaluation.auc.interval.low, evaluation.auc.interval.high],
        "ci95_clustered_by": evaluation.clustered_by,
        "ci95_replicates": evaluation.num_replicates,
        "ece_bins": ECE_BINS,
        "classes": list(LABELS),
        "confusion_matrix": evaluation.confusion.astype(int).tolist(),
        "confusion_matrix_axes": ["true", "called"],
        "confusion_matrix_recalls_ci95": [[item.low, item.high] for item in evaluation.recalls],
        "num_scans": len(predictions.scan_ids),
        "num_patients": predictions.num_patients,
        "num_folds": predictions.num_folds,
        "num_seeds": predictions.num_seeds,
        "seeds": list(dict.fromkeys(predictions.seeds or ())) or None,
        "folds": [
            {"fold": fold, "seed": seed, **metrics}
            for (fold, seed), metrics in zip(predictions.members, evaluation.fold_metrics, strict=True)
        ],
        "folds_mean": evaluation.fold_means,
        "folds_std": evaluation.fold_stds,
        "input": predictions.name,
        "input_sha256": predictions.sha256,
        "training": origin.training,
        **origin.facts,
        "warnings": find_warnings(evaluation, origin),
        "comparison": None if comparison is None else describe_comparison(comparison),
    }
    cleaned: dict[str, Any] = _null_nan(described)
    return cleaned


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """What metrics.json says of two models; NaN as None."""
    aucs, decisions = comparison.aucs, comparison.decisions
    described = {
        "input": comparison.second.name,
        "input_sha256": comparison.second.sha256,
        "metrics": dict(comparison.second_metrics),
        "differences": dict(comparison.differences),
        "differences_ci95": {name: _list_bounds(item) for name, item in comparison.intervals.items()},
        "auc_ncp_delong": {
            "difference": aucs.difference,
            "ci95": _list_bounds(aucs.interval),
            "p_value": aucs.p_value,
        },
        "auc_ncp_clustered": {
            "by": comparison.clustered_by,
            "ci95": _list_bounds(aucs.clustered_interval),
            "p_value": aucs.clustered_p_value,
        },
        "decisions_mcnemar": {
            "num_only_first_right": decisions.num_only_first_right,
            "num_only_second_right": decisions.num_only_second_right,
            "p_value": decisions.p_value,
        },
        "decisions_clustered": {"by": comparison.clustered_by, "p_value": decisions.clustered_p_value},
        "holm": {
            "auc_ncp_clustered": _describe_verdict(comparison.p_auc),
            "decisions_clustered": _describe_verdict(comparison.p_decisions),
        },
        "folds": {name: _describe_folds(comparison, name) for name in comparison.folds},
    }
    cleaned: dict[str, Any] = _null_nan(described)
    return cleaned


def _list_bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _describe_verdict(p_value: float) -> dict[str, Any]:
    """A p value corrected by Holm, and what it shows."""
    return {"p_value": p_value, "verdict": judge_p(p_value)}


def _describe_folds(comparison: Comparison, metric: str) -> dict[str, Any]:
    """The paired difference of a metric, fold by fold."""
    difference = comparison.folds[metric]
    return {
        "mean": difference.mean,
        "ci95": _list_bounds(difference.interval),
        "num_pairs": difference.num_pairs,
        "num_seeds": difference.num_seeds,
        "p_value": difference.p_value,
        "p_value_holm": comparison.p_folds[metric],
        "least_shown": comparison.least_folds[metric],
        "verdict": judge_p(comparison.p_folds[metric]),
    }


def _align(second: Predictions, first: Predictions) -> Predictions:
    """The second table with its scans in the order of the first."""
    place = {scan_id: row for row, scan_id in enumerate(second.scan_ids)}
    for one, other in ((first, second), (second, first)):
        lacking = sorted(set(one.scan_ids) - set(other.scan_ids))
        if lacking:
            raise UsageError(
                f"{other.name}: no scan {lacking[0]!r}, which {one.name} has ({len(lacking)} such scans); a comparison "
                "needs the same scans in both tables"
            )
    rows = [place[scan_id] for scan_id in first.scan_ids]
    _refuse_disagreement(second, first, rows, "label", second.labels[rows] != first.labels)
    if second.patient_ids is not None:
        if first.patient_ids is None:
            raise UsageError(
                f"{first.name}: no column patient_id, which {second.name} has; add it, so that intervals count patients"
            )
        patients = np.array(second.patient_ids)[rows]
        _refuse_disagreement(second, first, rows, "patient_id", patients != np.array(first.patient_ids))
    return replace(
        second,
        scan_ids=first.scan_ids,
        patient_ids=first.patient_ids,
        labels=first.labels,
        fold_probabilities=second.fold_probabilities[:, rows],
        rows=(),  # of no use in another order: all complaints are made
    )


def _refuse_disagreement(
    second: Predictions, first: Predictions, places: Sequence[int], column: str, differs: BoolArray
) -> None:
    """Raises: UsageError naming the first scan of which two tables say something else, by its rows."""
    if differs.any():
        place = int(np.flatnonzero(differs)[0])
        raise UsageError(
            f"{second.name}: scan {first.scan_ids[place]!r} has another {column} than in {first.name} (row "
            f"{second.rows[places[place]]} of the former, row {first.rows[place]} of the latter); correct one of them"
        )


def _compare_folds(first: Predictions, second: Predictions, resampling: Resampling) -> dict[str, FoldDifference]:
    """Pair the models of the same fold and seed; empty where the two have not the same.

    How the test patients' variance was estimated is known as far as the class of fewest goes: a metric may rest on it.
    """
    num_folds = first.num_folds
    if first.members != second.members or num_folds < 2:
        return {}
    ours, theirs = (
        [compute_all_metrics(fold, first.labels) for fold in table.fold_probabilities] for table in (first, second)
    )
    variance = measure_cohort_variance(first.fold_probabilities, second.fold_probabilities, first.labels, resampling)
    freedom = max(1, min(count_clusters(first)) - 1)
    differences: dict[str, FoldDifference] = {}
    for name in TABLE_2:
        one, other = (np.array([fold[name] for fold in folds]).reshape(num_folds, -1).T for folds in (ours, theirs))
        # (seeds, folds): models come fold by fold
        differences[name] = compare_folds(one, other, variance[name], cohort_freedom=freedom)
    return differences


def _null_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _null_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_null_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
