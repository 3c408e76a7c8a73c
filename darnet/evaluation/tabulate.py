"""An evaluation as tables: on a page, as CSV for programs and as LaTeX for a paper.

An `Evaluation` or a `Comparison` enters; tables and text leave, "research use only" in every file.
"""

import math
from collections.abc import Sequence

import pandas as pd

from darnet import NOTICE
from darnet.evaluation.comparisons import MIN_SEEDS, judge_p
from darnet.evaluation.intervals import Interval
from darnet.evaluation.measures import Comparison, Evaluation
from darnet.evaluation.paper import CITATION, NETWORKS, TABLE_3
from darnet.evaluation.predictions import Predictions
from darnet.metrics import ECE_BINS, TABLE_2
from darnet.page import UNDEFINED, Cell, HtmlTable, lay_out_table
from darnet.scan import LABELS

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
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$"}
    | {letter: f"${letter}$" for letter in "<>|"}  # of text in LaTeX's first encoding they are other letters
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def format_metric(mean: float, std: float = math.nan) -> str:
    """Mean ± deviation as the paper prints them; without deviation where there is none."""
    if math.isnan(mean):
        return UNDEFINED
    return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} ± {std:.4f}"


def format_interval(interval: Interval) -> str:
    """Both ends."""
    return UNDEFINED if math.isnan(interval.low) else f"{interval.low:.4f} to {interval.high:.4f}"


def format_difference(difference: float, interval: Interval) -> list[Cell]:
    """A signed difference, its interval, and whether that leaves 0 out."""
    verdict = "shown" if interval.low > 0 or interval.high < 0 else "not shown"
    return [UNDEFINED if math.isnan(difference) else f"{difference:+.4f}", format_interval(interval), verdict]


def format_p(value: float) -> str:
    """As a cell, without a sign where the value is printed."""
    if math.isnan(value):
        return UNDEFINED
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def say_p(value: float) -> str:
    """As a phrase."""
    return f"p {format_p(value)}" if value < 0.0001 else f"p = {format_p(value)}"


def name_ensemble(predictions: Predictions) -> str:
    """Whose mean probability it is, in words."""
    if len(predictions.folds) == 1:
        return "one model"
    seeds = f" ({predictions.num_folds} folds, {predictions.num_seeds} seeds)" if predictions.num_seeds > 1 else ""
    return f"{len(predictions.folds)} fold models{seeds}"


def tabulate_ensemble(evaluation: Evaluation) -> HtmlTable:
    """Every metric of the folds' mean probability with its interval, beside the folds' own if there are several."""
    rows: list[Sequence[Cell]] = []
    has_folds = len(evaluation.fold_metrics) > 1
    for name, value in evaluation.metrics.items():
        folds = [format_metric(evaluation.fold_means[name], evaluation.fold_stds[name])] if has_folds else []
        rows.append([name, value, format_interval(evaluation.intervals[name]), *folds, MEANINGS[name]])
    caption = (
        f"{'Mean probability of ' if has_folds else 'Of '}{name_ensemble(evaluation.predictions)}, with 95% percentile "
        f"bootstrap intervals by {evaluation.clustered_by}"
        + ("; folds: mean ± sample standard deviation of the fold models." if has_folds else ".")
    )
    header = ["metric", "value", "95% interval", *(["folds"] if has_folds else []), "what it is"]
    return HtmlTable(header, rows, caption)


def tabulate_paper(evaluation: Evaluation) -> HtmlTable:
    """Table 3 of the paper with a column for this evaluation."""
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


def tabulate_confusion(evaluation: Evaluation) -> HtmlTable:
    """Which class is called which."""
    rows: list[Sequence[Cell]] = []
    for name, counts, recall in zip(LABELS, evaluation.confusion, evaluation.recalls, strict=True):
        total = counts.sum()
        shares = [f"{count:.0f} ({count / total:.1%})" if total else "0" for count in counts]
        rows.append([f"true {name}", *shares, f"{total:.0f}", format_interval(recall)])
    header = ["", *(f"called {name}" for name in LABELS), "scans", "95% interval of those called rightly"]
    caption = (
        "Confusion matrix: scans, and share of the true class; percentile bootstrap intervals by "
        f"{evaluation.clustered_by} of the shares called rightly."
    )
    return HtmlTable(header, rows, caption)


def tabulate_folds(evaluation: Evaluation) -> list[HtmlTable]:
    """Each fold's model; nothing where there is one model."""
    if len(evaluation.fold_metrics) < 2:
        return []
    means, stds = evaluation.fold_means, evaluation.fold_stds
    rows: list[Sequence[Cell]] = [
        [name, *(metrics[name] for metrics in evaluation.fold_metrics), format_metric(means[name], stds[name])]
        for name in evaluation.metrics
    ]
    header = ["metric", *evaluation.predictions.member_names, "mean ± std"]
    return [HtmlTable(header, rows, "Each fold’s model on the whole cohort.")]


def tabulate_comparison(evaluation: Evaluation, comparison: Comparison) -> HtmlTable:
    """Every metric of two ensembles on the same scans."""
    rows: list[Sequence[Cell]] = [
        [name, value, comparison.second_metrics[name], *format_difference(comparison.differences[name], item)]
        for (name, value), item in zip(evaluation.metrics.items(), comparison.intervals.values(), strict=True)
    ]
    header = ["metric", "this", "other", "difference", "95% interval", "verdict"]
    caption = (
        f"This and the other, {name_ensemble(evaluation.predictions)} and {name_ensemble(comparison.second)}; paired "
        f"95% percentile bootstrap intervals by {evaluation.clustered_by}. Each verdict is of one metric by itself, "
        "not corrected for their number."
    )
    return HtmlTable(header, rows, caption)


def tabulate_fold_differences(comparison: Comparison, title: str) -> list[HtmlTable]:
    """Two networks fold by fold, the way the paper's ± are meant to be read; nothing without common folds."""
    if not comparison.folds:
        return []
    rows: list[Sequence[Cell]] = []
    for name, item in comparison.folds.items():
        difference, interval, _ = format_difference(item.mean, item.interval)
        p_value = comparison.p_folds[name]
        tested: list[Cell] = [None, None]
        if not math.isnan(p_value):
            tested = [format_p(p_value), format_metric(comparison.least_folds[name])]
        rows.append([name, difference, interval, *tested, judge_p(p_value)])
    header = ["metric", "mean difference", "95% interval", "p", "least shown", "verdict"]
    return [HtmlTable(header, rows, f"{title} {_explain_pairs(comparison)}")]


def _explain_pairs(comparison: Comparison) -> str:
    item = next(iter(comparison.folds.values()))
    if item.num_seeds == 1:
        return (
            f"{item.num_pairs} folds, for this training seed: another seed may well turn the difference round, so "
            "nothing is tested and no difference is shown."
        )
    told = f"{item.num_pairs} pairs of fold and seed, {item.num_seeds} seeds"
    if item.num_seeds < MIN_SEEDS:
        return f"{told}, too few for a test ({MIN_SEEDS}), so no difference is shown."
    return (
        f"{told}; p is corrected by Holm for all metrics and pairs of networks of this report compared so, the "
        "intervals are not. A smaller difference than the least shown could not be shown here, true or not."
    )


def tabulate_metrics(evaluation: Evaluation) -> pd.DataFrame:
    """One row a metric: the ensemble's value, its interval, mean and deviation of the folds, each fold; then one row a
    cell of the confusion matrix."""
    rows: list[dict[str, str | float]] = []
    for name, value in evaluation.metrics.items():
        item = evaluation.intervals[name]
        row: dict[str, str | float] = {"metric": name, "value": value, "ci95_low": item.low, "ci95_high": item.high}
        row |= {"folds_mean": evaluation.fold_means[name], "folds_std": evaluation.fold_stds[name]}
        folds = zip(evaluation.predictions.member_names, evaluation.fold_metrics, strict=True)
        has_folds = None not in evaluation.predictions.folds
        rows.append(row | {fold.replace(" ", "_"): metrics[name] for fold, metrics in folds if has_folds})
    for true, counts in zip(LABELS, evaluation.confusion, strict=True):
        for called, count in zip(LABELS, counts, strict=True):
            rows.append({"metric": f"scans_{true}_called_{called}".lower(), "value": count})
    return pd.DataFrame(rows)


def tabulate_differences(comparison: Comparison) -> pd.DataFrame:
    """One row a metric, first minus second model: the ensembles', its interval, and the folds' mean with its own.

    The p values, clustered and corrected by Holm, are DeLong's beside `auc_ncp`, McNemar's beside `accuracy_3class`.
    """
    tests = {"auc_ncp": comparison.p_auc, "accuracy_3class": comparison.p_decisions}
    rows = []
    for name, value in comparison.differences.items():
        item = comparison.intervals[name]
        row: dict[str, str | float] = {"metric": name, "value": value, "ci95_low": item.low, "ci95_high": item.high}
        if name in comparison.folds:
            fold = comparison.folds[name]
            row |= {"folds_mean": fold.mean, "folds_ci95_low": fold.interval.low, "folds_ci95_high": fold.interval.high}
            row["folds_p_holm"] = comparison.p_folds[name]
        rows.append(row | ({"p_holm": tests[name]} if name in tests else {}))
    return pd.DataFrame(rows)


def render_csv(evaluation: Evaluation, comparison: Comparison | None) -> str:
    """tables.csv: `tabulate_metrics`, then the differences from the model named in column `minus`; the notice in a
    column of its own so that every reader of CSV can read it."""
    frames = [tabulate_metrics(evaluation)]
    if comparison is not None:
        frames.append(tabulate_differences(comparison).assign(minus=comparison.second.name))
    return pd.concat(frames).assign(notice=NOTICE).to_csv(index=False)


def render_tex(evaluation: Evaluation, comparison: Comparison | None) -> str:
    """tables.tex: every table of the report."""
    tables = [
        (tabulate_ensemble(evaluation), "tab:metrics"),
        (tabulate_paper(evaluation), "tab:paper"),
        (tabulate_confusion(evaluation), "tab:confusion"),
        *((table, "tab:folds") for table in tabulate_folds(evaluation)),
    ]
    if comparison is not None:
        tables.append((tabulate_comparison(evaluation, comparison), "tab:comparison"))
        tables += [(table, "tab:fold-differences") for table in tabulate_fold_differences(comparison, "Fold by fold.")]
    return render_tables_tex(tables)


def render_tables_tex(tables: Sequence[tuple[HtmlTable, str]]) -> str:
    """Tables with their labels as LaTeX, numbers to the right; needs booktabs."""
    rendered = []
    for table, label in tables:
        rows, kinds = lay_out_table(table)
        escaped = [[cell.translate(LATEX) for cell in row] for row in rows]
        rendered.append(
            pd.DataFrame(escaped, columns=[name.translate(LATEX) for name in table.header]).to_latex(
                index=False,
                column_format="".join("r" if kind == "number" else "l" for kind in kinds),
                caption=f"{table.caption} {NOTICE}".translate(LATEX),
                label=label,
            )
        )
    return f"% {NOTICE}\n% \\usepackage{{booktabs}}\n" + "\n".join(rendered).rstrip() + "\n"
