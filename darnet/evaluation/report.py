"""An evaluation as people read it: report.html to send to a colleague.

An `Evaluation`, its `Origin` and perhaps a `Comparison` enter; text leaves. "Research use only" stands on it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from darnet.charts import FEW_IN_BIN, draw_confusion, draw_distributions, draw_reliability, draw_roc
from darnet.evaluation.comparisons import judge_p
from darnet.evaluation.measures import Comparison, Evaluation, Origin, find_warnings
from darnet.evaluation.paper import NUM_TEST_SCANS
from darnet.evaluation.tabulate import (
    format_difference,
    format_interval,
    format_metric,
    name_ensemble,
    say_p,
    tabulate_comparison,
    tabulate_confusion,
    tabulate_ensemble,
    tabulate_fold_differences,
    tabulate_folds,
    tabulate_paper,
)
from darnet.metrics import ECE_BINS, NCP_LABEL, TABLE_2, measure_reliability, trace_roc
from darnet.page import Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page
from darnet.scan import LABELS

LIMITS = """\
These numbers say how often the model agreed with the labels of this cohort, and how far chance may have moved that. \
They are not a measure of use to patients, and not of how the model does at another hospital, on another scanner, or \
where the classes are otherwise mixed: sensitivity, specificity and AUC may change there, accuracy, F1 and calibration \
will.

The model knows three classes. A scan of anything else gets three probabilities all the same.

The intervals cover chance in the choice of {cluster}s only: not label errors, not the choice of hospital, not another \
training of the same network. DeLong’s interval and the p values so marked take every scan as independent of the \
others: with several scans a patient they are too sure, and no verdict rests on them. Where no error was seen an \
interval has no width: that does not mean that none can occur.

The decision is the most probable of the three classes, not a threshold that was chosen for a purpose."""

CALIBRATION_INTERVAL = (
    "The interval of ece_3class is the error plus and minus what chance moves its bins by: wide, most of all with few "
    "scans, as percentiles of an error that is never negative would lie too high."
)
PRINTED = (
    "The right-hand columns are printed in the paper and were not measured here: mean ± standard deviation of five "
    f"fold models on {NUM_TEST_SCANS} CC-CCII scans, more than half of them of patients who also have scans in "
    "training by the authors’ lists. They can be set beside this evaluation only if that is of the same scans."
)


def render_report(
    evaluation: Evaluation, origin: Origin, comparison: Comparison | None, audit: Sequence[Section] = ()
) -> str:
    """The whole of report.html; `audit` tells what is known of the data."""
    sections = [
        describe_input(evaluation, origin),
        _describe_metrics(evaluation),
        Section("Beside the paper", PRINTED, [tabulate_paper(evaluation)]),
        Section("Decisions", "", [tabulate_confusion(evaluation)]),
        _describe_pictures(evaluation),
        *(Section("Folds", "", [table]) for table in tabulate_folds(evaluation)),
        *([] if comparison is None else [_describe_comparison(evaluation, comparison)]),
        *audit,
        Section("What these numbers are and are not", LIMITS.format(cluster=evaluation.clustered_by)),
    ]
    return render_page(f"DARNet evaluation: {origin.subject}", _summarise(evaluation), sections)


def round_headlines(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Table 2's metrics with four decimals, for a job's summary."""
    return {name: None if math.isnan(metrics[name]) else round(metrics[name], 4) for name in TABLE_2}


def _summarise(evaluation: Evaluation) -> str:
    predictions, metrics = evaluation.predictions, evaluation.metrics
    patients = "" if predictions.num_patients is None else f" of {predictions.num_patients} patients"
    is_mean = len(predictions.folds) > 1
    ensemble = f"Mean probability of {name_ensemble(predictions)}" if is_mean else "One model"
    accuracy, auc = metrics["accuracy_3class"], metrics["auc_ncp"]
    return (
        f"{ensemble} on {len(predictions.scan_ids)} scans{patients}: three-class accuracy "
        f"{format_metric(accuracy)} (95% interval {format_interval(evaluation.intervals['accuracy_3class'])}), AUC for "
        f"COVID-19 pneumonia (NCP) {format_metric(auc)} ({format_interval(evaluation.intervals['auc_ncp'])})."
    )


def describe_input(evaluation: Evaluation, origin: Origin) -> Section:
    """What the numbers are numbers of, and what to know before believing them."""
    predictions = evaluation.predictions
    counts = evaluation.confusion.sum(axis=1)
    rows: list[Sequence[Cell]] = [
        ["predictions", predictions.name],
        ["SHA-256", predictions.sha256],
        *([name, str(value)] for name, value in origin.facts.items()),
        ["scans", ", ".join(f"{count:.0f} {name}" for name, count in zip(LABELS, counts, strict=True))],
        ["patients", "not in the table" if predictions.num_patients is None else str(predictions.num_patients)],
        ["folds", ", ".join(dict.fromkeys(fold for fold in predictions.folds if fold)) or "none in the table"],
        ["seeds", ", ".join(dict.fromkeys(predictions.seeds or ())) or "not in the table"],
        ["intervals", f"{evaluation.num_replicates} bootstrap replicates, drawn by {evaluation.clustered_by}"],
    ]
    lines = [] if origin.warning else [origin.training]
    lines += [f"Mind: {warning}" for warning in find_warnings(evaluation, origin)]
    return Section("What was evaluated", "\n\n".join(lines), [HtmlTable(["", ""], rows, "Input of this report")])


def _describe_metrics(evaluation: Evaluation) -> Section:
    delong = format_interval(evaluation.auc.interval)
    text = f"The interval of auc_ncp by DeLong’s method, which takes all scans as independent, is {delong}."
    return Section("Metrics", f"{text} {CALIBRATION_INTERVAL}", [tabulate_ensemble(evaluation)])


def _describe_pictures(evaluation: Evaluation) -> Section:
    probabilities, labels = evaluation.predictions.probabilities, evaluation.predictions.labels
    figures = []
    if not math.isnan(evaluation.metrics["auc_ncp"]):
        curve = trace_roc(probabilities[:, NCP_LABEL], labels == NCP_LABEL, np.ones(len(labels)))
        caption = (
            f"ROC curve for NCP against the rest. AUC {evaluation.metrics['auc_ncp']:.4f}, 95% interval "
            f"{format_interval(evaluation.intervals['auc_ncp'])}; at each point the band holds 95% of resampled "
            "curves; dotted is chance. The inset of a good curve is its upper left corner."
        )
        figures.append(HtmlFigure(figure_to_svg(draw_roc(curve, evaluation.roc_band)), caption))
    figures.append(picture_calibration(evaluation))
    caption = "Probability of NCP among the scans of each true class; counts on a scale that is logarithmic above 1."
    figures.append(HtmlFigure(figure_to_svg(draw_distributions(probabilities, labels)), caption))
    return Section("Pictures", "", (), figures)


def picture_calibration(evaluation: Evaluation) -> HtmlFigure:
    """How far probabilities mean what they say."""
    caption = (
        f"Calibration: points on the dotted line mean what they say, with 95% intervals; pale ones are of fewer than "
        f"{FEW_IN_BIN} scans. Expected calibration error {format_metric(evaluation.metrics['ece_3class'])} over "
        f"{ECE_BINS} bins. Below, scans in each bin, on a scale that is logarithmic above 1."
    )
    reliability = measure_reliability(evaluation.predictions.probabilities, evaluation.predictions.labels)
    return HtmlFigure(figure_to_svg(draw_reliability(reliability)), caption)


def picture_confusion(evaluation: Evaluation) -> HtmlFigure:
    """Which class is called which."""
    caption = "Confusion matrix: scans, and share of the true class; darker is more."
    return HtmlFigure(figure_to_svg(draw_confusion(evaluation.confusion)), caption)


def _describe_comparison(evaluation: Evaluation, comparison: Comparison) -> Section:
    aucs, decisions, by = comparison.aucs, comparison.decisions, comparison.clustered_by
    difference, interval, _ = format_difference(aucs.difference, aucs.clustered_interval)
    text = (
        f"This evaluation against {comparison.second.name} (SHA-256 {comparison.second.sha256}), scan by scan; "
        f"differences are this minus the other.\n\n"
        f"AUC by DeLong’s paired test in its form that counts {by}s: difference {difference}, 95% interval {interval}, "
        f"{say_p(comparison.p_auc)}: {judge_p(comparison.p_auc)}. Scans taken as independent, {say_p(aucs.p_value)}."
        "\n\n"
        f"Decisions by McNemar’s exact test: {decisions.num_only_first_right} scans are called rightly here only, "
        f"{decisions.num_only_second_right} by the other only; in its form that counts {by}s, "
        f"{say_p(comparison.p_decisions)}: {judge_p(comparison.p_decisions)}. Scans taken as independent, "
        f"{say_p(decisions.p_value)}.\n\n"
        "The p of AUC and of decisions are each of one test by itself. A difference whose interval holds 0 is not "
        "shown; that is not to say that there is none."
    )
    by_fold = tabulate_fold_differences(comparison, "Fold by fold.")
    if not by_fold and max(len(evaluation.fold_metrics), len(comparison.second.folds)) > 1:
        text += "\n\nThey are not compared fold by fold, as they have not the same folds and seeds."
    return Section("Comparison", text, [tabulate_comparison(evaluation, comparison), *by_fold])
