"""A study as people read it: the paper's tables and figures with this run's numbers beside the printed ones.

A `Study` enters; report.html, tables.csv and tables.tex leave. "Research use only" stands in all of it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from darnet.charts import draw_histories, draw_rocs
from darnet.evaluation.cam_truth import CHANGED_BELOW, MEASURES, MapStudy
from darnet.evaluation.intervals import CONFIDENCE
from darnet.evaluation.measures import Evaluation, find_warnings
from darnet.evaluation.paper import CITATION, NUM_TEST_SCANS, PARAMETERS, TABLE_1, TABLE_3
from darnet.evaluation.report import (
    LIMITS,
    describe_input,
    format_difference,
    format_floats,
    format_interval,
    format_metric,
    format_p,
    picture_calibration,
    picture_confusion,
    render_tables_tex,
    tabulate_ensemble,
    tabulate_metrics,
)
from darnet.evaluation.study import Pair, Study
from darnet.metrics import NCP_LABEL, TABLE_2, trace_roc
from darnet.page import NOTICE, Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page
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


UNMEASURED = (
    "No truth about lesions was given (--truth), so the maps are not measured: a figure of chosen cases shows what "
    "maps can look like, not how often they find disease."
)
MEASURED = (
    "Where lesions are known, maps of the true class are held against them. By chance: a map spread evenly over the "
    "scan, a peak at any voxel of the lungs, and for Dice the whole of both lungs. The intervals cover chance in the "
    "choice of scans, not another training of the same networks; one seed was trained. Phantoms’ lesions are simple: "
    "what holds on them need not hold in patients."
)
CASES_HEADING = "NCP test cases of least, middle and most severity"
CASES_CAPTION = (
    "Left the slice as the network sees it, then under the class map of NCP of each network (mean of its folds), "
    "coloured from none to the map’s own maximum; known lesions are outlined in blue. Three cases are an illustration."
)
DEPTH_PAIRS = (("DA", "ResNet18"), ("DA+CA", "CA"))


def render_study(study: Study) -> str:
    """The whole of report.html."""
    full = study.evaluations[study.full]
    sections = [
        describe_input(full, study.runs[study.full].origin),
        Section("Table 1: the cohorts", PRINTED, [tabulate_cohorts(study)]),
        Section("Table 2: the full network and the baseline", "", [tabulate_full(study)]),
        _describe_networks(study),
        _describe_rocs(study),
        _describe_decisions(study),
        *_describe_training(study),
        *_describe_pairs(study),
        *_describe_cases(study),
        *_describe_maps(study),
        Section(f"All metrics of {study.full}", "", [tabulate_ensemble(full)]),
        Section("What these numbers are and are not", LIMITS.format(cluster=full.clustered_by)),
    ]
    return render_page("DARNet: the paper’s evaluation", _summarise(study), sections)


def render_study_csv(study: Study) -> str:
    """tables.csv: `tabulate_metrics` of every network, the notice in a column of its own."""
    frames = [
        tabulate_metrics(evaluation).assign(network=name, parameters=study.runs[name].num_parameters)
        for name, evaluation in study.evaluations.items()
    ]
    return pd.concat(frames).assign(notice=NOTICE).to_csv(index=False)


def render_study_tex(study: Study) -> str:
    """tables.tex: the paper's three tables and the ensembles; needs booktabs."""
    tables = [
        (tabulate_cohorts(study), "tab:cohorts"),
        (tabulate_full(study), "tab:full"),
        (tabulate_networks(study), "tab:networks"),
        (tabulate_ensembles(study), "tab:ensembles"),
    ]
    return render_tables_tex(tables)


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
    """Table 2: baseline and full network, measured and printed."""
    names = list(dict.fromkeys([next(iter(study.runs)), study.full]))
    header = ["metric", *(f"{source}: {name}" for name in names for source in ("this run", "paper"))]
    rows: list[Sequence[Cell]] = [
        [metric, *(cell for name in names for cell in (_spread(study, name, metric), _print(name, metric)))]
        for metric in TABLE_2
    ]
    caption = "Mean ± sample standard deviation of the fold models on the whole test cohort."
    return HtmlTable(header, rows, caption)


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
        f"Mean ± sample standard deviation of the fold models. Parameters counted: {counted}; the paper prints those "
        "of DA and DA+CA the wrong way round."
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
        f"Ensembles: mean probability of the fold models, 95% percentile intervals of {full.num_replicates} bootstrap "
        f"replicates by {full.clustered_by}, the same for every network."
    )
    return HtmlTable(["", *study.runs], rows, caption)


def tabulate_auc_pairs(pairs: Sequence[Pair]) -> HtmlTable:
    """The ensembles' AUC, two networks at a time."""
    rows: list[Sequence[Cell]] = []
    for pair in pairs:
        aucs = pair.comparison.aucs
        difference, interval, verdict = format_difference(aucs.difference, aucs.interval)
        rows.append([_name_pair(pair), difference, interval, _format_bare_p(aucs.p_value), verdict, pair.reason])
    header = ["pair", "AUC difference", "95% interval", "p", "verdict", "why these"]
    caption = "Ensembles, scan by scan: DeLong’s paired test of auc_ncp. p is not corrected for the number of pairs."
    return HtmlTable(header, rows, caption)


def tabulate_decision_pairs(pairs: Sequence[Pair]) -> HtmlTable:
    """The ensembles' three-class decisions, two networks at a time."""
    rows: list[Sequence[Cell]] = []
    for pair in pairs:
        decisions = pair.comparison.decisions
        verdict = "shown" if decisions.p_value < 1 - CONFIDENCE else "not shown"
        counts = decisions.num_only_first_right, decisions.num_only_second_right
        rows.append([_name_pair(pair), *counts, _format_bare_p(decisions.p_value), verdict])
    header = ["pair", "only the first right", "only the second right", "p", "verdict"]
    caption = "Ensembles, scan by scan: McNemar’s exact test of the called class."
    return HtmlTable(header, rows, caption)


def tabulate_fold_pairs(pair: Pair) -> HtmlTable:
    """Fold by fold, the way the paper's ± are meant to be read."""
    rows: list[Sequence[Cell]] = [
        [name, *format_difference(pair.comparison.folds[name].mean, pair.comparison.folds[name].interval)]
        for name in TABLE_2
    ]
    caption = f"{_name_pair(pair)} ({pair.reason}), paired by fold."
    return HtmlTable(["metric", "mean difference", "95% interval", "verdict"], format_floats(rows), caption)


def _summarise(study: Study) -> str:
    full, predictions = study.evaluations[study.full], study.runs[study.full].predictions
    shown = []
    for pair in study.pairs:
        names = [name for name in TABLE_2 if name in pair.comparison.folds and _is_shown(pair, name)]
        shown += [f"{_name_pair(pair)} in {', '.join(names)}"] if names else []
    verdict = (
        f"Paired by fold, these differences are shown, for this training seed: {'; '.join(shown)}"
        if shown
        else "Paired by fold, no difference between the networks compared is shown in any metric of Table 2"
    )
    accuracy, auc = full.metrics["accuracy_3class"], full.metrics["auc_ncp"]
    return (
        f"{len(study.runs)} networks of {len(predictions.folds)} folds each on {len(predictions.scan_ids)} test scans. "
        f"{study.full}, mean probability of its folds: three-class accuracy {format_metric(accuracy)} (95% interval "
        f"{format_interval(full.intervals['accuracy_3class'])}), AUC for COVID-19 pneumonia (NCP) {format_metric(auc)} "
        f"({format_interval(full.intervals['auc_ncp'])}).\n\n{verdict}."
    )


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
    return [Section("Training curves", "", (), figures)]


def _describe_pairs(study: Study) -> list[Section]:
    if not study.pairs:
        return []
    text = (
        "AUC is for NCP against the rest. A difference whose interval holds 0 is not shown; that is not to say that "
        "there is none. DeLong’s and McNemar’s tests take every scan as independent of the others.\n\n"
        "Paired by fold, the interval is a t-interval, raised for the training scans that folds share; five folds of "
        "one seed show large differences only. The paper compares means and deviations of its folds and tests none "
        "of its differences."
    )
    by_fold = [tabulate_fold_pairs(pair) for pair in study.pairs if pair.comparison.folds]
    return [
        Section(
            "Networks compared", text, [tabulate_auc_pairs(study.pairs), tabulate_decision_pairs(study.pairs), *by_fold]
        )
    ]


def _describe_cases(study: Study) -> list[Section]:
    if not study.cases:
        return []
    figure = HtmlFigure(figure_to_svg(draw_cases(study)), f"{CASES_HEADING}. {CASES_CAPTION}", is_wide=True)
    return [Section("Figure 2: activation maps", "", (), [figure])]


def draw_cases(study: Study) -> Figure:
    """Figure 2 of the paper."""
    return draw_case_figure(study.cases, CASES_HEADING)


def _describe_maps(study: Study) -> list[Section]:
    if not study.maps:
        return [Section("Activation maps measured", UNMEASURED)]
    text = [
        MEASURED,
        _doubt_maps(study),
        *(_judge_depth_attention(maps) for maps in study.maps),
        _judge_redrawn(study.maps),
    ]
    tables = [table for maps in study.maps for table in (tabulate_maps(maps), tabulate_map_differences(maps))]
    return [Section("Activation maps measured", "\n\n".join(filter(None, text)), tables)]


def _doubt_maps(study: Study) -> str:
    """Name the networks whose maps explain nothing, as they were not shown to know NCP from the rest."""
    intervals = {name: item.intervals["auc_ncp"] for name, item in study.evaluations.items()}
    doubtful = [name for name, interval in intervals.items() if not interval.low > 0.5]
    if not doubtful:
        return ""
    return (
        f"Mind: {', '.join(doubtful)}: not shown to tell NCP from the rest better than chance (the interval of auc_ncp "
        "reaches 0.5). Where a network has not learnt, its maps say little, and so does a comparison with them."
    )


def tabulate_maps(maps: MapStudy) -> HtmlTable:
    """Each measure of each network, beside what ignorance reaches."""
    rows: list[Sequence[Cell]] = []
    for measure in MEASURES:
        estimates = [measured[measure] for measured in maps.measured.values()]
        rows.append([measure, format_metric(maps.chance[measure]), *(format_metric(item.mean) for item in estimates)])
        rows.append(["95% interval", None, *(format_interval(item.interval) for item in estimates)])
    if maps.redrawn:
        rows.append(["redrawn: rank correlation", None, *(format_metric(item.mean) for item in maps.redrawn.values())])
        rows.append(["95% interval", None, *(format_interval(item.interval) for item in maps.redrawn.values())])
    caption = (
        f"Maps of {maps.diagnosis} on the {maps.num_scans} {maps.diagnosis} test scans with known lesions: "
        + "; ".join(f"{name} is the {meaning}" for name, meaning in MEASURES.items())
        + ". Means over scans, percentile intervals by scan."
    )
    return HtmlTable(["", "by chance", *maps.measured], rows, caption)


def tabulate_map_differences(maps: MapStudy) -> HtmlTable:
    """What one network's maps have over another's."""
    rows: list[Sequence[Cell]] = [
        [
            f"{item.first} − {item.second}",
            item.measure,
            *format_difference(item.estimate.mean, item.estimate.interval),
        ]
        for item in maps.differences
    ]
    caption = (
        f"Differences on the same {maps.diagnosis} scans, paired bootstrap by scan, not corrected for their number."
    )
    return HtmlTable(["pair", "measure", "mean difference", "95% interval", "verdict"], rows, caption)


def _judge_depth_attention(maps: MapStudy) -> str:
    """Whether DA helps maps find lesions, in plain words."""
    depth = [item for item in maps.differences if (item.first, item.second) in DEPTH_PAIRS]
    if not depth:
        return f"{maps.diagnosis}: whether depth attention helps cannot be said without networks with and without it."
    parts = [
        f"{item.measure} {'better' if item.estimate.mean > 0 else 'worse'} ({item.first} − {item.second})"
        for item in depth
        if item.verdict == "shown"
    ]
    if not parts:
        return (
            f"{maps.diagnosis}: that depth attention helps maps find lesions is not shown; no measure differs by more "
            "than chance, with channel attention or without."
        )
    rest = len(depth) - len(parts)
    return (
        f"{maps.diagnosis}: with depth attention, {'; '.join(parts)}. In the other {rest} of {len(depth)} comparisons "
        "a difference is not shown."
    )


def _judge_redrawn(studies: Sequence[MapStudy]) -> str:
    """Whether the maps depend on what was learnt."""
    redrawn = {name: item for maps in studies for name, item in maps.redrawn.items()}
    if not redrawn:
        return ""
    alike = [name for name, item in redrawn.items() if not abs(item.mean) < CHANGED_BELOW]
    told = "their mean rank correlation with the maps before stands in the table"
    if alike:
        return (
            f"Sanity check: of {', '.join(alike)}, maps stay alike (rank correlation {CHANGED_BELOW} or more, or none) "
            f"after last stage and head were drawn anew: they show little of what was learnt there; {told}."
        )
    return f"Sanity check: the maps of every network change when last stage and head are drawn anew; {told}."


def _spread(study: Study, name: str, metric: str) -> str:
    evaluation = study.evaluations[name]
    return format_metric(evaluation.fold_means[metric], evaluation.fold_stds[metric])


def _is_shown(pair: Pair, metric: str) -> bool:
    return pair.comparison.folds[metric].verdict == "shown"


def _name_pair(pair: Pair) -> str:
    return f"{pair.first} − {pair.second}"


def _format_bare_p(value: float) -> str:
    """As a cell: without a sign where the value is printed."""
    return format_p(value).removeprefix("= ")


def _print(name: str, metric: str) -> str:
    printed = TABLE_3[metric][name]
    return format_metric(printed.mean, printed.std)
