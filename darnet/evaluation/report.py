"""An evaluation as people read it: report.html to send to a colleague, tables.csv and tables.tex to build on.

An `Evaluation`, its `Origin` and perhaps a `Comparison` enter; text leaves. "Research use only" stands in all of it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from darnet.charts import draw_confusion, draw_distributions, draw_reliability, draw_roc
from darnet.evaluation.intervals import Interval
from darnet.evaluation.measures import Comparison, Evaluation, Origin, find_warnings
from darnet.evaluation.paper import CITATION, NETWORKS, NUM_TEST_SCANS, TABLE_3
from darnet.evaluation.predictions import LABELS
from darnet.metrics import ECE_BINS, NCP_LABEL, TABLE_2, measure_reliability, trace_roc
from darnet.page import NOTICE, UNDEFINED, Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page

MEANINGS = {
    "accuracy_3class": "share of scans called rightly, three classes",
    "auc_ncp": "area under the ROC curve, NCP against the rest",
    "sensitivity_ncp": "share of NCP scans called NCP",
    "specificity_ncp": "share of other scans not called NCP",
    "f1_ncp": "harmonic mean of sensitivity and precision, NCP",
    "auc_macro": "mean of the three one-against-rest AUCs",
    "sensitivity_macro": "mean of the three sensitivities",
    "specificity_macro": "mean of the three specificities",
    "f1_macro": "mean of the three F1",
    "ece_3class": f"expected calibration error, {ECE_BINS} bins; 0 is best",
    "brier_3class": "Brier score over three classes, 0 to 2; 0 is best",
}
LIMITS = """\
These numbers say how often the model agreed with the labels of this cohort, and how far chance may have moved that. \
They are not a measure of use to patients, and not of how the model does at another hospital, on another scanner, or \
where the classes are otherwise mixed: sensitivity, specificity and AUC may change there, accuracy, F1 and calibration \
will.

The model knows three classes. A scan of anything else gets three probabilities all the same.

The intervals cover chance in the choice of {cluster}s only: not label errors, not the choice of hospital, not another \
training of the same network. DeLong's interval and McNemar's test take every scan as independent of the others; with \
several scans a patient they are too sure. Where no error was seen an interval has no width: that does not mean that \
none can occur. The interval of the calibration error lies high, as resampling adds noise to it.

The decision is the most probable of the three classes, not a threshold that was chosen for a purpose."""


def render_report(evaluation: Evaluation, origin: Origin, comparison: Comparison | None) -> str:
    """The whole of report.html."""
    sections = [
        describe_input(evaluation, origin),
        _describe_metrics(evaluation),
        _describe_paper(evaluation),
        _describe_decisions(evaluation),
        _describe_pictures(evaluation),
        *_describe_folds(evaluation),
        *([] if comparison is None else [_describe_comparison(evaluation, comparison)]),
        Section("What these numbers are and are not", LIMITS.format(cluster=evaluation.clustered_by)),
    ]
    return render_page(f"DARNet evaluation: {origin.subject}", _summarise(evaluation), sections)


def tabulate_metrics(evaluation: Evaluation) -> pd.DataFrame:
    """One row a metric: the ensemble's value, its interval, mean and deviation of the folds, each fold."""
    rows = []
    for name, value in evaluation.metrics.items():
        item = evaluation.intervals[name]
        row = {"metric": name, "value": value, "ci95_low": item.low, "ci95_high": item.high}
        row |= {"folds_mean": evaluation.fold_means[name], "folds_std": evaluation.fold_stds[name]}
        folds = zip(evaluation.predictions.folds, evaluation.fold_metrics, strict=True)
        rows.append(row | {f"fold_{fold}": metrics[name] for fold, metrics in folds if fold is not None})
    return pd.DataFrame(rows)


def render_csv(evaluation: Evaluation) -> str:
    """tables.csv: `tabulate_metrics`, the notice in a column of its own so that every reader of CSV can read it."""
    return tabulate_metrics(evaluation).assign(notice=NOTICE).to_csv(index=False)


def render_tex(evaluation: Evaluation) -> str:
    """tables.tex: the metrics, and Table 3 of the paper with a column for this evaluation; needs booktabs."""
    return render_tables_tex([(tabulate_ensemble(evaluation), "tab:metrics"), (_paper_table(evaluation), "tab:paper")])


def format_metric(mean: float, std: float = math.nan) -> str:
    """Mean ± deviation as the paper prints them; without deviation where there is none."""
    if math.isnan(mean):
        return UNDEFINED
    return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} ± {std:.4f}"


def format_interval(interval: Interval) -> str:
    """Both ends."""
    return UNDEFINED if math.isnan(interval.low) else f"{interval.low:.4f} to {interval.high:.4f}"


def round_headlines(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Table 2's metrics with four decimals, for a job's summary."""
    return {name: None if math.isnan(metrics[name]) else round(metrics[name], 4) for name in TABLE_2}


def _summarise(evaluation: Evaluation) -> str:
    predictions, metrics = evaluation.predictions, evaluation.metrics
    patients = "" if predictions.num_patients is None else f" of {predictions.num_patients} patients"
    folds = f"Mean probability of {len(predictions.folds)} fold models" if len(predictions.folds) > 1 else "One model"
    accuracy, auc = metrics["accuracy_3class"], metrics["auc_ncp"]
    return (
        f"{folds} on {len(predictions.scan_ids)} scans{patients}: three-class accuracy "
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
        ["folds", ", ".join(fold for fold in predictions.folds if fold is not None) or "none in the table"],
        ["intervals", f"{evaluation.num_replicates} bootstrap replicates, drawn by {evaluation.clustered_by}"],
    ]
    lines = [] if origin.warning else [origin.training]
    lines += [f"Mind: {warning}" for warning in find_warnings(evaluation, origin)]
    return Section("What was evaluated", "\n\n".join(lines), [HtmlTable(["", ""], rows, "Input of this report")])


def _describe_metrics(evaluation: Evaluation) -> Section:
    delong = format_interval(evaluation.auc.interval)
    text = f"The interval of auc_ncp by DeLong's method, which takes all scans as independent, is {delong}."
    return Section("Metrics", text, [tabulate_ensemble(evaluation)])


def tabulate_ensemble(evaluation: Evaluation) -> HtmlTable:
    """Every metric of the folds' mean probability with its interval, beside the folds' own."""
    has_folds = len(evaluation.fold_metrics) > 1
    rows: list[Sequence[Cell]] = [
        [
            name,
            value,
            format_interval(evaluation.intervals[name]),
            format_metric(evaluation.fold_means[name], evaluation.fold_stds[name]) if has_folds else None,
            MEANINGS[name],
        ]
        for name, value in evaluation.metrics.items()
    ]
    caption = (
        f"Of {'the folds’ mean probability' if has_folds else 'one model'}, with percentile bootstrap intervals by "
        f"{evaluation.clustered_by}; folds: mean ± sample standard deviation over the fold models."
    )
    return HtmlTable(["metric", "value", "95% interval", "folds", "what it is"], format_floats(rows), caption)


def _describe_paper(evaluation: Evaluation) -> Section:
    text = (
        f"The right-hand columns are printed in the paper and were not measured here: mean ± standard deviation of "
        f"five fold models on {NUM_TEST_SCANS} CC-CCII scans, more than half of them of patients who also have "
        "scans in training by the authors' lists. They can be set beside this evaluation only if that is of the same "
        "scans."
    )
    return Section("Beside the paper", text, [_paper_table(evaluation)])


def _paper_table(evaluation: Evaluation) -> HtmlTable:
    means, stds = evaluation.fold_means, evaluation.fold_stds
    rows: list[Sequence[Cell]] = [
        [
            name,
            format_metric(means[name], stds[name]),
            *(format_metric(TABLE_3[name][network].mean, TABLE_3[name][network].std) for network in NETWORKS),
        ]
        for name in TABLE_2
    ]
    header = ["metric", "this evaluation", *(f"paper: {network}" for network in NETWORKS)]
    return HtmlTable(header, rows, f"In the form of Table 3 of {CITATION}.")


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
    figures.append(picture_confusion(evaluation))
    return Section("Pictures", "", (), figures)


def picture_calibration(evaluation: Evaluation) -> HtmlFigure:
    """How far probabilities mean what they say."""
    caption = (
        f"Calibration: points on the dotted line mean what they say, with 95% intervals. Expected calibration error "
        f"{evaluation.metrics['ece_3class']:.4f} over {ECE_BINS} bins. Below, scans in each bin, on a scale that is "
        "logarithmic above 1."
    )
    reliability = measure_reliability(evaluation.predictions.probabilities, evaluation.predictions.labels)
    return HtmlFigure(figure_to_svg(draw_reliability(reliability)), caption)


def picture_confusion(evaluation: Evaluation) -> HtmlFigure:
    """Which class is called which."""
    caption = "Confusion matrix: scans, and share of the true class; darker is more."
    return HtmlFigure(figure_to_svg(draw_confusion(evaluation.confusion)), caption)


def _describe_decisions(evaluation: Evaluation) -> Section:
    rows: list[Sequence[Cell]] = []
    for name, counts in zip(LABELS, evaluation.confusion, strict=True):
        total = counts.sum()
        shares = [f"{count:.0f} ({count / total:.1%})" if total else "0" for count in counts]
        rows.append([f"true {name}", *shares, f"{total:.0f}"])
    header = ["", *(f"called {name}" for name in LABELS), "scans"]
    return Section("Decisions", "", [HtmlTable(header, rows, "Confusion matrix: scans, and share of the true class.")])


def _describe_folds(evaluation: Evaluation) -> list[Section]:
    folds = evaluation.predictions.folds
    if len(folds) < 2:
        return []
    rows: list[Sequence[Cell]] = [
        [name, *(metrics[name] for metrics in evaluation.fold_metrics), format_metric(*_spread(evaluation, name))]
        for name in evaluation.metrics
    ]
    header = ["metric", *(f"fold {fold}" for fold in folds), "mean ± std"]
    return [Section("Folds", "", [HtmlTable(header, format_floats(rows), "Each fold's model on the whole cohort.")])]


def _spread(evaluation: Evaluation, name: str) -> tuple[float, float]:
    return evaluation.fold_means[name], evaluation.fold_stds[name]


def _describe_comparison(evaluation: Evaluation, comparison: Comparison) -> Section:
    aucs, decisions = comparison.aucs, comparison.decisions
    text = (
        f"This evaluation against {comparison.second.name} (SHA-256 {comparison.second.sha256}), scan by scan; "
        f"differences are this minus the other.\n\n"
        f"AUC by DeLong's paired test: difference {aucs.difference:+.4f}, 95% interval "
        f"{format_interval(aucs.interval)}, p {format_p(aucs.p_value)}.\n\n"
        f"Decisions by McNemar's exact test: {decisions.num_only_first_right} scans are called rightly here only, "
        f"{decisions.num_only_second_right} by the other only, p {format_p(decisions.p_value)}.\n\n"
        "Both tests take every scan as independent of the others. A difference whose interval holds 0 is not shown; "
        "that is not to say that there is none."
    )
    return Section("Comparison", text, [_comparison_table(evaluation, comparison), *_fold_tables(comparison)])


def _comparison_table(evaluation: Evaluation, comparison: Comparison) -> HtmlTable:
    rows: list[Sequence[Cell]] = [
        [name, value, comparison.second_metrics[name], *format_difference(comparison.differences[name], item)]
        for (name, value), item in zip(evaluation.metrics.items(), comparison.intervals.values(), strict=True)
    ]
    header = ["metric", "this", "other", "difference", "95% interval", "verdict"]
    caption = f"Both ensembles; paired percentile bootstrap by {evaluation.clustered_by}."
    return HtmlTable(header, format_floats(rows), caption)


def _fold_tables(comparison: Comparison) -> list[HtmlTable]:
    if not comparison.folds:
        return []
    rows: list[Sequence[Cell]] = [
        [name, *format_difference(item.mean, item.interval)] for name, item in comparison.folds.items()
    ]
    caption = "Fold by fold: t-interval, raised for the training scans that folds share. A single seed shows little."
    return [HtmlTable(["metric", "mean difference", "95% interval", "verdict"], rows, caption)]


def format_difference(difference: float, interval: Interval) -> list[Cell]:
    """A signed difference, its interval, and whether that leaves 0 out."""
    verdict = "shown" if interval.low > 0 or interval.high < 0 else "not shown"
    return [UNDEFINED if math.isnan(difference) else f"{difference:+.4f}", format_interval(interval), verdict]


def format_p(value: float) -> str:
    """With the sign it is written after p."""
    if math.isnan(value):
        return UNDEFINED
    return "< 0.0001" if value < 0.0001 else f"= {value:.4f}"


def format_floats(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Four decimals, also where LaTeX and not the page shows the cells."""
    return [[format_metric(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]


def render_tables_tex(tables: Sequence[tuple[HtmlTable, str]]) -> str:
    """Tables with their labels as LaTeX; needs booktabs."""
    rendered = [
        pd.DataFrame(table.rows, columns=list(table.header))
        .map(lambda cell: "" if cell is None else str(cell))
        .to_latex(index=False, escape=True, caption=escape_percent(f"{table.caption} {NOTICE}"), label=label)
        for table, label in tables
    ]
    return f"% {NOTICE}\n% \\usepackage{{booktabs}}\n" + "\n".join(rendered).rstrip() + "\n"


def escape_percent(text: str) -> str:
    """Captions are LaTeX already; ours hold no other character that means something there."""
    return text.replace("%", r"\%")
