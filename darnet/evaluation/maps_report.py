"""The measured activation maps of a study as people read them: a `Study` enters, a section of its page leaves."""

from collections.abc import Sequence

import pandas as pd

from darnet.evaluation.cam_truth import CHANGED_BELOW, MEASURES, Estimate, MapStudy, count_needed_patients
from darnet.evaluation.comparisons import MIN_SEEDS
from darnet.evaluation.paper import DEPTH_PAIRS
from darnet.evaluation.study import Study
from darnet.evaluation.tabulate import format_difference, format_interval, format_metric, format_p
from darnet.page import Cell, HtmlTable, Section

UNMEASURED = (
    "No truth about lesions was given (--truth), so the maps are not measured: a figure of chosen cases shows what "
    "maps can look like, not how often they find disease."
)
MEASURED = (
    "Where lesions are known, maps of the true class are held against them. By chance: a map spread evenly over the "
    "scan, a peak at any voxel of the lungs, and for Dice the whole of both lungs. The intervals of means "
    "cover chance in the choice of patients, not another training of the same networks; verdicts on differences cover "
    f"both, and need {MIN_SEEDS} training seeds. Phantoms’ lesions are simple: what holds on them "
    "need not hold in patients."
)


def describe_measured_maps(study: Study) -> list[Section]:
    """How far maps lie where disease was planted, or why that is not known."""
    if not study.maps:
        return [Section("Activation maps measured", UNMEASURED)]
    text = [
        MEASURED,
        _doubt_maps(study),
        *dict.fromkeys(_judge_depth_attention(maps) for maps in study.maps),
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
        + ". Means over scans, percentile intervals by patient."
    )
    return HtmlTable(["", "by chance", *maps.measured], rows, caption)


def tabulate_map_differences(maps: MapStudy) -> HtmlTable:
    """What one network's maps have over another's."""
    has_seeds = _count_seeds(maps) >= MIN_SEEDS
    rows: list[Sequence[Cell]] = []
    for item in maps.differences:
        row = [
            f"{item.first} − {item.second}",
            item.measure,
            *format_difference(item.ensembles.mean, item.ensembles.interval)[:2],
        ]
        if has_seeds:
            row += [*format_difference(item.models.mean, item.models.interval)[:2], format_p(item.models.p_value)]
        rows.append([*row, item.verdict if has_seeds else f"{item.verdict} ({_name_seeds(maps)})"])
    header = ["pair", "measure", "ensembles: difference", "95% interval, for these trained networks alone"]
    header += ["fold models: mean difference", "95% interval", "p"] if has_seeds else []
    return HtmlTable([*header, "verdict"], rows, _explain_differences(maps, has_seeds))


def tabulate_maps_csv(maps: MapStudy) -> pd.DataFrame:
    """One row a network and measure, then one a difference from the network in column `minus`; for tables.csv."""
    prefix = f"maps_{maps.diagnosis}_".lower()
    rows = [
        {"metric": prefix + measure, "network": name, "value": item.mean}
        | {"ci95_low": item.interval.low, "ci95_high": item.interval.high, "by_chance": maps.chance.get(measure)}
        for name, measured in maps.measured.items()
        for measure, item in [*measured.items(), *_name_redrawn(maps, name)]
    ]
    rows += [
        {"metric": prefix + item.measure, "network": item.first, "minus": item.second, "value": item.ensembles.mean}
        | {"ci95_low": item.ensembles.interval.low, "ci95_high": item.ensembles.interval.high}
        | {"folds_mean": item.models.mean, "folds_p_bonferroni": item.models.p_value}
        | {"folds_ci95_low": item.models.interval.low, "folds_ci95_high": item.models.interval.high}
        for item in maps.differences
    ]
    return pd.DataFrame(rows)


def _name_redrawn(maps: MapStudy, network: str) -> list[tuple[str, Estimate]]:
    return [("redrawn_rank_correlation", maps.redrawn[network])] if network in maps.redrawn else []


def _explain_differences(maps: MapStudy, has_seeds: bool) -> str:
    caption = (
        f"Differences on the same {maps.diagnosis} scans, t-intervals widened (Bonferroni) for the "
        f"{maps.num_comparisons} differences of maps in this report; undefined with fewer than "
        f"{count_needed_patients(maps.num_comparisons)} patients. Those of the ensembles know the choice of patients, "
        "and not that another training gives other maps"
    )
    if has_seeds:
        return (
            f"{caption}; verdicts rest on the fold models’, paired by fold and seed ({_name_seeds(maps)}): half of "
            "such an interval is the least difference that could be shown here."
        )
    return f"{caption}, so nothing is shown by them: that needs {MIN_SEEDS} training seeds."


def _count_seeds(maps: MapStudy) -> int:
    return min((item.models.num_seeds for item in maps.differences), default=0)


def _name_seeds(maps: MapStudy) -> str:
    num_seeds = _count_seeds(maps)
    return "one seed" if num_seeds == 1 else f"{num_seeds} seeds"


def _judge_depth_attention(maps: MapStudy) -> str:
    """Whether DA helps maps find lesions, in plain words."""
    depth = [item for item in maps.differences if (item.first, item.second) in DEPTH_PAIRS]
    if not depth:
        return "Whether depth attention helps cannot be said without networks with and without it."
    parts = [
        f"{item.measure} {'better' if item.models.mean > 0 else 'worse'} ({item.first} − {item.second})"
        for item in depth
        if item.verdict == "shown"
    ]
    if not parts and _count_seeds(maps) < MIN_SEEDS:
        return (
            f"{maps.diagnosis}: that depth attention helps maps find lesions is not shown, nor can it be with "
            f"{_name_seeds(maps)}: differences may be the luck of a training; {MIN_SEEDS} seeds are needed."
        )
    if not parts:
        return (
            f"{maps.diagnosis}: that depth attention helps maps find lesions is not shown: no difference is shown in "
            "any measure, with channel attention or without. That is not to say that there is none."
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
    alike = [name for name, item in redrawn.items() if not _is_changed(item)]
    told = "their mean rank correlation with the maps before, and its interval, stand in the table"
    if alike:
        return (
            f"Sanity check: of {', '.join(alike)}, it is not shown that maps change (95% interval of the rank "
            f"correlation below {CHANGED_BELOW}) when last stage and head are drawn anew: they may show little of what "
            f"was learnt there; {told}."
        )
    return f"Sanity check: the maps of every network change when last stage and head are drawn anew; {told}."


def _is_changed(item: Estimate) -> bool:
    """Whether the whole interval is of maps that are little alike; an undefined one, of few patients, is not."""
    return max(abs(item.interval.low), abs(item.interval.high)) < CHANGED_BELOW
