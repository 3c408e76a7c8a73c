"""A study as people read it: the paper's tables and figures with this run's numbers beside the printed ones.

A `Study` enters; report.html, tables.csv and tables.tex leave. "Research use only" stands in all of it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from darnet import NOTICE
from darnet.charts import draw_histories, draw_rocs
from darnet.evaluation.comparisons import MIN_SEEDS, judge_p
from darnet.evaluation.maps_report import (
    describe_measured_maps,
    tabulate_map_differences,
    tabulate_maps,
    tabulate_maps_csv,
)
from darnet.evaluation.measures import Evaluation, find_warnings
from darnet.evaluation.paper import CITATION, NUM_TEST_SCANS, OTHER_METHODS, PARAMETERS, TABLE_1, TABLE_3
from darnet.evaluation.report import (
    CALIBRATION_INTERVAL,
    LIMITS,
    describe_input,
    picture_calibration,
    picture_confusion,
)
from darnet.evaluation.study import Pair, Study
from darnet.evaluation.tabulate import (
    format_difference,
    format_interval,
    format_metric,
    format_p,
    name_ensemble,
    render_tables_tex,
    tabulate_confusion,
    tabulate_differences,
    tabulate_ensemble,
    tabulate_fold_differences,
    tabulate_folds,
    tabulate_metrics,
)
from darnet.metrics import NCP_LABEL, TABLE_2, trace_roc
from darnet.page import Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page
from darnet.report import draw_case_figure

HISTORY_PICTURES = (
    ("train_loss", "training loss"),
    ("validation_loss", "validation loss"),
    ("accuracy_3class", "validation accuracy, three classes"),
)
PRINTED = (
    f"Rows and columns named “paper” are printed in {CITATION} and were not measured here: {NUM_TEST_SCANS} CC-CCII "
    "scans, more than half of them of patients who also have scans in training by the authors' lists. They can be set "
    "beside this run only if that is of the same scans."
)


CASES_BY_SEVERITY = "NCP test cases of least, middle and most severity"
CASES_BY_PROBABILITY = "NCP test cases of least, middle and highest NCP probability by {full}"
SEVERITY_UNKNOWN = "How ill these patients are is not known. "
CASES_CAPTION = (
    "Left the slice as the network sees it, then under the class map of NCP of each network (mean of its folds), "
    "coloured from none to the map’s own maximum; known lesions are outlined in blue. Three cases are an illustration."
)


def render_study(study: Study, audit: Sequence[Section] = ()) -> str:
    """The whole of report.html; `audit` tells what is known of the data."""
    full = study.evaluations[study.full]
    sections = [
        describe_input(full, study.runs[study.full].origin),
        Section("Table 1: the cohorts", PRINTED, [tabulate_cohorts(study)]),
        *audit,
        Section(f"Table 2: {' and '.join(_name_ends(study))}", "", [tabulate_full(study), tabulate_others()]),
        _describe_networks(study),
        _describe_rocs(study),
        _describe_decisions(study),
        *_describe_training(study),
        *_describe_pairs(study),
        *_describe_cases(study),
        *describe_measured_maps(study),
        Section(f"All metrics of {study.full}", "", [tabulate_ensemble(full)]),
        Section("What these numbers are and are not", LIMITS.format(cluster=full.clustered_by)),
    ]
    return render_page("DARNet: the paper’s evaluation", _summarise(study), sections)


def render_study_csv(study: Study) -> str:
    """tables.csv: Table 1, `tabulate_metrics` of every network, its differences from that in column `minus`, maps."""
    cohorts = [
        {"metric": f"scans_{cohort}_{name}".lower(), "value": count}
        for cohort, counts in study.counts.items()
        for name, count in counts.items()
    ]
    frames = [pd.DataFrame(cohorts)]
    frames += [
        tabulate_metrics(evaluation).assign(network=name, parameters=study.runs[name].num_parameters)
        for name, evaluation in study.evaluations.items()
    ]
    frames += [
        tabulate_differences(pair.comparison).assign(network=pair.first, minus=pair.second) for pair in study.pairs
    ]
    frames += [tabulate_maps_csv(maps) for maps in study.maps]
    return pd.concat(frames).assign(notice=NOTICE).to_csv(index=False)


def render_study_tex(study: Study) -> str:
    """tables.tex: the paper's three tables, and what it has not; needs booktabs."""
    tables = [
        (tabulate_cohorts(study), "tab:cohorts"),
        (tabulate_full(study), "tab:full"),
        (tabulate_others(), "tab:others"),
        (tabulate_networks(study), "tab:networks"),
        (tabulate_ensembles(study), "tab:ensembles"),
    ]
    for name, evaluation in study.evaluations.items():
        for kind, table in (("confusion", tabulate_confusion(evaluation)), *_name_folds(evaluation)):
            tables.append((replace(table, caption=f"{name}. {table.caption}"), f"tab:{kind}-{name}"))
    if study.pairs:
        tables.append((tabulate_auc_pairs(study.pairs), "tab:auc-pairs"))
        tables.append((tabulate_decision_pairs(study.pairs), "tab:decision-pairs"))
    for pair in study.pairs:
        tables += [(table, f"tab:folds-{pair.first}-{pair.second}") for table in tabulate_fold_pairs(pair)]
    for maps in study.maps:
        tables.append((tabulate_maps(maps), f"tab:maps-{maps.diagnosis}"))
        tables.append((tabulate_map_differences(maps), f"tab:map-differences-{maps.diagnosis}"))
    return render_tables_tex(tables)


def _name_folds(evaluation: Evaluation) -> list[tuple[str, HtmlTable]]:
    return [("folds", table) for table in tabulate_folds(evaluation)]


def tabulate_cohorts(study: Study) -> HtmlTable:
    """Table 1: scans by cohort and diagnosis, beside the paper's."""
    names = list(next(iter(TABLE_1.values())))
    rows: list[Sequence[Cell]] = []
    for source, table in (("this run", study.counts), ("paper", TABLE_1)):
        for cohort in TABLE_1:
            counts = [table[cohort][name] for name in names]
            rows.append([f"{source}: {cohort}", *counts, sum(counts)])
    return HtmlTable(["cohort", *names, "scans"], rows, "Scans by cohort and diagnosis.")


def tabulate_full(study: Study) -> HtmlTable:
    """Table 2: the first and the last network in the order of Table 3, measured and printed."""
    names = _name_ends(study)
    header = ["metric", *(f"{source}: {name}" for name in names for source in ("this run", "paper"))]
    num_scans = len(study.runs[study.full].predictions.scan_ids)
    rows: list[Sequence[Cell]] = [["test scans", *([num_scans, NUM_TEST_SCANS] * len(names))]]
    for metric in TABLE_2:
        pairs = ((_spread(study, name, metric), _print(name, metric)) for name in names)
        rows.append([metric, *itertools.chain.from_iterable(pairs)])
    caption = f"Mean ± sample standard deviation of the fold models on the whole test cohort{_name_seeds(study)}."
    return HtmlTable(header, rows, caption)


def _name_ends(study: Study) -> list[str]:
    """The first and the last network, once where they are one."""
    return list(dict.fromkeys([next(iter(study.runs)), study.full]))


def tabulate_others() -> HtmlTable:
    """The methods that the paper's Table 2 sets beside its own."""
    rows: list[Sequence[Cell]] = []
    for method in OTHER_METHODS:
        printed = [method.metrics.get(metric) for metric in TABLE_2]
        told = [None if value is None else format_metric(value) for value in printed]
        rows.append([method.name, method.num_test_scans, *told])
    caption = (
        f"Methods of others as printed in Table 2 of {CITATION}, with its numbers of references: each on other scans "
        "of CC-CCII, and not one of them run here."
    )
    return HtmlTable(["paper", "test scans", *TABLE_2], rows, caption)


def tabulate_networks(study: Study) -> HtmlTable:
    """Table 3: every network, measured and printed, with its parameters."""
    rows: list[Sequence[Cell]] = [
        ["parameters (millions), this run", *(f"{run.num_parameters / 1e6:.2f}" for run in study.runs.values())],
        ["parameters (millions), paper", *(f"{PARAMETERS[name]:.2f}" for name in study.runs)],
    ]
    for metric in TABLE_2:
        rows.append([f"{metric}, this run", *(_spread(study, name, metric) for name in study.runs)])
        rows.append([f"{metric}, paper", *(_print(name, metric) for name in study.runs)])
    counted = ", ".join(f"{name} {run.num_parameters:,}" for name, run in study.runs.items())
    caption = (
        f"Mean ± sample standard deviation of the fold models{_name_seeds(study)}. Parameters counted: {counted}; the "
        "paper prints those of DA and DA+CA the wrong way round."
    )
    return HtmlTable(["", *study.runs], rows, caption)


def tabulate_ensembles(study: Study) -> HtmlTable:
    """What the folds' mean probability says, with intervals: the paper has nothing like it."""
    rows: list[Sequence[Cell]] = []
    for metric in (*TABLE_2, "ece_3class", "brier_3class"):
        evaluations = study.evaluations.values()
        rows.append([metric, *(format_metric(item.metrics[metric]) for item in evaluations)])
        rows.append(["95% interval", *(format_interval(item.intervals[metric]) for item in evaluations)])
    full = study.evaluations[study.full]
    caption = (
        f"Ensembles: mean probability of the fold models{_name_seeds(study)}, 95% percentile intervals of "
        f"{full.num_replicates} bootstrap replicates by {full.clustered_by}, the same for every network. "
        f"{CALIBRATION_INTERVAL}"
    )
    return HtmlTable(["", *study.runs], rows, caption)


def _name_seeds(study: Study) -> str:
    num_seeds = study.runs[study.full].predictions.num_seeds
    return f", over {num_seeds} training seeds" if num_seeds > 1 else ", for this training seed"


def tabulate_auc_pairs(pairs: Sequence[Pair]) -> HtmlTable:
    """The ensembles' AUC, two networks at a time."""
    rows: list[Sequence[Cell]] = []
    for pair in pairs:
        aucs, p_value = pair.comparison.aucs, pair.comparison.p_auc
        difference, interval, _ = format_difference(aucs.difference, aucs.clustered_interval)
        judged = format_p(p_value), judge_p(p_value), format_p(aucs.p_value)
        rows.append([_name_pair(pair), difference, interval, *judged])
    header = ["pair", "AUC difference", "95% interval", "p", "verdict", "plain p"]
    return HtmlTable(
        header, rows, f"Ensembles: DeLong’s paired test of auc_ncp {_explain_p(pairs)} The intervals are not corrected."
    )


def tabulate_decision_pairs(pairs: Sequence[Pair]) -> HtmlTable:
    """The ensembles' three-class decisions, two networks at a time."""
    rows: list[Sequence[Cell]] = []
    for pair in pairs:
        decisions, p_value = pair.comparison.decisions, pair.comparison.p_decisions
        counts = decisions.num_only_first_right, decisions.num_only_second_right
        rows.append([_name_pair(pair), *counts, format_p(p_value), judge_p(p_value), format_p(decisions.p_value)])
    header = ["pair", "only the first right", "only the second right", "p", "verdict", "plain p"]
    return HtmlTable(header, rows, f"Ensembles: McNemar’s exact test of the called class {_explain_p(pairs)}")


def _explain_p(pairs: Sequence[Pair]) -> str:
    return (
        f"in its form that counts {pairs[0].comparison.clustered_by}s, p corrected by Holm for the number of pairs "
        f"({len(pairs)}). The plain p is not corrected, and of scans taken as independent.{_whose_training(pairs)}"
    )


def _whose_training(pairs: Sequence[Pair]) -> str:
    num_seeds = min(pair.comparison.second.num_seeds for pair in pairs)
    return " For this training seed: another one gives other networks." if num_seeds == 1 else ""


def tabulate_fold_pairs(pair: Pair) -> list[HtmlTable]:
    """Two networks fold by fold."""
    return tabulate_fold_differences(pair.comparison, f"{_name_pair(pair)}, paired by fold.")


def _summarise(study: Study) -> str:
    full, predictions = study.evaluations[study.full], study.runs[study.full].predictions
    accuracy, auc = full.metrics["accuracy_3class"], full.metrics["auc_ncp"]
    return (
        f"{len(study.runs)} networks, each of {name_ensemble(predictions)}, on {len(predictions.scan_ids)} test scans. "
        f"{study.full}, mean probability of its folds: three-class accuracy {format_metric(accuracy)} (95% interval "
        f"{format_interval(full.intervals['accuracy_3class'])}), AUC for COVID-19 pneumonia (NCP) {format_metric(auc)} "
        f"({format_interval(full.intervals['auc_ncp'])}).\n\n{summarise_pairs(study)}"
    )


def summarise_pairs(study: Study) -> str:
    """What is shown fold by fold, and which way."""
    shown = []
    for pair in study.pairs:
        names = [
            f"{name} {'higher' if pair.comparison.folds[name].mean > 0 else 'lower'}"
            for name, p_value in pair.comparison.p_folds.items()
            if judge_p(p_value) == "shown"
        ]
        shown += [f"{', '.join(names)} ({_name_pair(pair)})"] if names else []
    if shown:
        return f"Paired by fold and seed, these differences are shown: {'; '.join(shown)}."
    told = "Paired by fold, no difference between the networks compared is shown in any metric of Table 2"
    if study.runs[study.full].predictions.num_seeds < MIN_SEEDS:
        return f"{told}: with fewer than {MIN_SEEDS} training seeds none can be."
    return f"{told}."


def _describe_networks(study: Study) -> Section:
    return Section(
        "Table 3: the networks",
        "\n\n".join(_warn(name, study.evaluations[name], study) for name in study.runs).strip(),
        [tabulate_networks(study), tabulate_ensembles(study)],
    )


def _warn(name: str, evaluation: Evaluation, study: Study) -> str:
    """What one network has to be warned of beyond what the full network has, which stands at the top."""
    known = find_warnings(study.evaluations[study.full], study.runs[study.full].origin)
    new = [text for text in find_warnings(evaluation, study.runs[name].origin) if text not in known]
    return f"Mind, {name}: {' '.join(new)}" if new else ""


def _describe_rocs(study: Study) -> Section:
    curves = {}
    for name, evaluation in study.evaluations.items():
        probabilities, labels = evaluation.predictions.probabilities, evaluation.predictions.labels
        curves[name] = trace_roc(probabilities[:, NCP_LABEL], labels == NCP_LABEL, np.ones(len(labels)))
    aucs = "; ".join(
        f"{name} {format_metric(item.metrics['auc_ncp'])} ({format_interval(item.intervals['auc_ncp'])})"
        for name, item in study.evaluations.items()
    )
    caption = f"ROC curves for NCP against the rest, mean probability of the folds. AUC with 95% interval: {aucs}."
    return Section("ROC curves", "", (), [HtmlFigure(figure_to_svg(draw_rocs(curves)), caption)])


def _describe_decisions(study: Study) -> Section:
    figures = []
    for name, evaluation in study.evaluations.items():
        for figure in (picture_confusion(evaluation), picture_calibration(evaluation)):
            figures.append(HtmlFigure(figure.picture, f"{name}. {figure.caption}"))
    return Section("Decisions and calibration", "", (), figures)


def _describe_training(study: Study) -> list[Section]:
    histories = {name: run.history for name, run in study.runs.items() if len(run.history)}
    if not histories:
        return [Section("Training curves", "The bundles keep no history of their training, so there are none.")]
    figures = [
        HtmlFigure(
            figure_to_svg(draw_histories(histories, column, label)),
            f"{label[0].upper()}{label[1:]} by epoch: mean over the folds, in the range of the folds.",
        )
        for column, label in HISTORY_PICTURES
        if all(column in history for history in histories.values())
    ]
    return [Section("Training curves", _name_missing_histories(study), (), figures)]


def _name_missing_histories(study: Study) -> str:
    """Which networks' curves are drawn of a part of their fold models; nothing if all are there."""
    lacking = []
    for name, run in study.runs.items():
        num_found = len(run.history[["fold", "seed"]].drop_duplicates()) if len(run.history) else 0
        if num_found < len(run.predictions.members):
            lacking.append(f"{name}: {num_found} of {len(run.predictions.members)}")
    if not lacking:
        return ""
    return f"The bundles do not keep every fold model's history, and curves are of those kept ({'; '.join(lacking)})."


def _describe_pairs(study: Study) -> list[Section]:
    if not study.pairs:
        return []
    text = (
        "Every two networks are compared. AUC is for NCP against the rest. A difference whose interval holds 0 is not "
        "shown; that is not to say that there is none. DeLong’s and McNemar’s tests as they are take every scan as "
        "independent of the others; a verdict rests on their forms that count patients, where the table names them.\n\n"
        "Paired by fold and seed, the interval is a t-interval, raised for the training scans that folds share and for "
        "the choice of test patients, whom all folds share. Every pair counts as a draw of a training’s luck, but a "
        "fold has the same scans under every seed: where these matter more than luck, folds count alone. A test needs "
        f"{MIN_SEEDS} seeds. The paper compares means and deviations of its folds and tests none of its differences."
    )
    by_fold = [table for pair in study.pairs for table in tabulate_fold_pairs(pair)]
    return [
        Section(
            "Networks compared", text, [tabulate_auc_pairs(study.pairs), tabulate_decision_pairs(study.pairs), *by_fold]
        )
    ]


def _describe_cases(study: Study) -> list[Section]:
    if not study.cases:
        return []
    caption = f"{_head_cases(study)}. {'' if study.is_severity_known else SEVERITY_UNKNOWN}{CASES_CAPTION}"
    figure = HtmlFigure(figure_to_svg(draw_cases(study)), caption, is_wide=True)
    return [Section("Figure 2: activation maps", "", (), [figure])]


def draw_cases(study: Study) -> Figure:
    """Figure 2 of the paper."""
    return draw_case_figure(study.cases, _head_cases(study))


def _head_cases(study: Study) -> str:
    return CASES_BY_SEVERITY if study.is_severity_known else CASES_BY_PROBABILITY.format(full=study.full)


def _spread(study: Study, name: str, metric: str) -> str:
    evaluation = study.evaluations[name]
    return format_metric(evaluation.fold_means[metric], evaluation.fold_stds[metric])


def _name_pair(pair: Pair) -> str:
    return f"{pair.first} − {pair.second}"


def _print(name: str, metric: str) -> str:
    printed = TABLE_3[metric][name]
    return format_metric(printed.mean, printed.std)
