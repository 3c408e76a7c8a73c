"""A night as people read it: its rows, those of earlier nights and the gates' verdict in; nightly.html out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from darnet.charts import draw_nights, draw_shift
from darnet.errors import STATUS_MEANINGS, Status
from darnet.page import Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page
from darnet.publishing.gates import GATE_COLUMNS, Measure, Verdict
from darnet.publishing.rows import PROBABILITIES
from darnet.scan import DIAGNOSES, Diagnosis, FloatArray

STAGES = ["fetch_s", "decode_s", "model_s"]
EARLIER_COLUMNS = [*GATE_COLUMNS, "prediction"]
NIGHT_COLUMNS = [
    *EARLIER_COLUMNS,
    *STAGES,
    *["run_id", "scan_id", "input_sha256", "status_detail", "model_name", "model_version", "num_bytes"],
    *["fold_std_ncp", "cam_in_lung_fraction", "cam_peak_slice"],
]
NUM_LISTED = 10  # Source: ours; scans of a kind that a person may look at in one morning
IN_LUNG_FRACTION = 0.5  # Source: ours; below, most of the map lies where no pneumonia can be
LIMITS = """\
The gates compare distributions: they notice that something changed, not what, and not whether the model is right. A \
night of another hospital, scanner or season may be held though all is well, and an error that leaves the shares as \
they are passes.

Scans to look at are the outermost of this night, not findings. A network trained on other scans than these may be \
sure and wrong."""


def render_nightly(
    rows: pd.DataFrame, earlier: pd.DataFrame, verdict: Verdict, pictures: Mapping[str, HtmlFigure] | None = None
) -> str:
    """The whole page of a run, from NIGHT_COLUMNS of its rows and EARLIER_COLUMNS of the others.

    `pictures`, by scan_id, are shown of those that `list_scans` names.
    """
    sections = [
        _describe_statuses(rows, earlier),
        _describe_gates(verdict),
        _describe_classes(rows, earlier),
        _describe_stages(rows),
        _describe_scans(rows, pictures or {}),
        _describe_failures(rows),
        Section("What this page is and is not", LIMITS),
    ]
    return render_page(f"DARNet night of {rows['night'].iloc[0]}", _summarise(rows, earlier, verdict), sections)


def _summarise(rows: pd.DataFrame, earlier: pd.DataFrame, verdict: Verdict) -> str:
    first = rows.iloc[0]
    num_ok = int((rows["status"] == Status.OK.value).sum())
    gigabytes = rows["num_bytes"].sum() / 1e9
    return (
        f"Run {first['run_id']} with {first['model_name']} {first['model_version']}: {len(rows)} scans of "
        f"{gigabytes:.2f} GB, {num_ok} of them scored, beside {len(earlier)} rows of {earlier['night'].nunique()} "
        f"earlier nights.\n\nQuality gates: {verdict.describe()}."
    )


def _describe_statuses(rows: pd.DataFrame, earlier: pd.DataFrame) -> Section:
    tonight, before = (frame["status"].value_counts() for frame in (rows, earlier))
    listed: list[Sequence[Cell]] = [
        [
            str(status),
            int(tonight.get(status.value, 0)),
            _format_share(tonight.get(status.value, 0), len(rows)),
            _format_share(before.get(status.value, 0), len(earlier)),
            meaning,
        ]
        for status, meaning in STATUS_MEANINGS.items()
        if status.value in tonight or status.value in before
    ]
    caption = "How scans ended. SKIP: valid, not ours. BAD: fails again. ERR: is tried again the next night."
    return Section(
        "Scans by status",
        "",
        [HtmlTable(["status", "scans", "tonight", "earlier nights", "what it is"], listed, caption)],
    )


def _describe_gates(verdict: Verdict) -> Section:
    listed: list[Sequence[Cell]] = [
        [
            item.gate,
            *(None if np.isnan(value) else value for value in (item.value, item.limit)),
            _name_result(item, verdict),
            item.detail,
        ]
        for item in verdict.measures
    ]
    text = (
        "PSI, the population stability index, is 0 where tonight's scans are spread like those of the earlier nights. "
        "It is of the scans that are OK."
    )
    caption = "What the quality gates measured: tonight, against the earlier nights."
    return Section("Drift", text, [HtmlTable(["gate", "tonight", "limit", "result", "of"], listed, caption)])


def _hide_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def _name_result(measure: Measure, verdict: Verdict) -> str:
    if np.isnan([measure.value, measure.limit]).any():
        return "not measured"
    within = "above the limit" if measure.is_breach else "within"
    return f"{within}, not judged" if verdict.unjudged else within


def _describe_classes(rows: pd.DataFrame, earlier: pd.DataFrame) -> Section:
    tonight, before = (frame[frame["status"] == Status.OK.value] for frame in (rows, earlier))
    if tonight.empty:
        return Section("Classes and probabilities", "No scan was scored tonight.")
    listed: list[Sequence[Cell]] = [
        [
            str(diagnosis),
            int((tonight["prediction"] == diagnosis).sum()),
            *(_format_share((frame["prediction"] == diagnosis).sum(), len(frame)) for frame in (tonight, before)),
            *(float(frame[column].mean()) for frame in (tonight, before)),
        ]
        for diagnosis, column in zip(DIAGNOSES, PROBABILITIES, strict=True)
    ]
    header = ["predicted", "scans", "tonight", "earlier nights", "mean probability", "earlier nights'"]
    caption = "Classes of the highest probability, and the mean of each class's probability over all scored scans."
    shift = draw_shift(*(frame[PROBABILITIES].to_numpy(dtype=np.float64) for frame in (tonight, before)))
    told = "How the probabilities are spread: tonight filled, earlier nights, if there are any, as a black line."
    figures = [HtmlFigure(figure_to_svg(shift), told), *_draw_history(tonight, before)]
    return Section("Classes and probabilities", "", [HtmlTable(header, listed, caption)], figures)


def _draw_history(tonight: pd.DataFrame, before: pd.DataFrame) -> list[HtmlFigure]:
    """The classes night after night, if there was one before."""
    if before.empty:
        return []
    scored = pd.concat([before, tonight])
    shares = pd.crosstab(scored["night"], scored["prediction"], normalize="index")
    table: FloatArray = shares.reindex(columns=list(DIAGNOSES), fill_value=0).to_numpy(dtype=np.float64)
    figure = draw_nights([str(night) for night in shares.index], table)
    return [
        HtmlFigure(figure_to_svg(figure), "The share of each predicted class, night by night; tonight is the last.")
    ]


def _describe_stages(rows: pd.DataFrame) -> Section:
    listed: list[tuple[float, Sequence[Cell]]] = []
    for stage in STAGES:
        timed = rows[rows[stage].notna()]
        seconds = timed[stage].to_numpy(dtype=np.float64)
        if len(seconds):
            spread = [f"{value:.2f}" for value in np.quantile(seconds, [0.5, 0.95, 1])]
            slowest = str(timed["scan_id"].iloc[int(seconds.argmax())])
            cells: Sequence[Cell] = [stage.removesuffix("_s"), len(seconds), f"{seconds.sum():.1f}", *spread, slowest]
            listed.append((-seconds.sum(), cells))
    header = ["stage", "scans", "sum, s", "median, s", "95%, s", "longest, s", "the longest one"]
    table = HtmlTable(header, [cells for _, cells in sorted(listed, key=lambda pair: pair[0])], "The slowest first.")
    return Section("Stages by time", "Seconds of a worker, not of the clock: workers go side by side.", [table])


def list_scans(rows: pd.DataFrame) -> list[str]:
    """The scans that a person should look at, each once."""
    return list(dict.fromkeys(scan_id for _, frame in _choose_scans(rows) for scan_id in frame["scan_id"]))


def _describe_scans(rows: pd.DataFrame, pictures: Mapping[str, HtmlFigure]) -> Section:
    tables = [_list_scans(caption, frame) for caption, frame in _choose_scans(rows)]
    shown = [pictures[scan_id] for scan_id in list_scans(rows) if scan_id in pictures]
    text = "" if tables else "No scan was scored tonight."
    return Section("Scans to look at", text, tables, shown)


def _choose_scans(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Kinds of outermost scans, each with what is outermost in them; kinds without any are left out."""
    scored = rows[rows["status"] == Status.OK.value]
    is_ill = scored["prediction"] != Diagnosis.NORMAL
    strays = scored[is_ill & (scored["cam_in_lung_fraction"] < IN_LUNG_FRACTION)]
    called, disputed = scored[scored["prediction"] == Diagnosis.NCP], scored[scored["fold_std_ncp"] > 0]
    stray = f"Predicted CP or NCP with less than {IN_LUNG_FRACTION:.0%} of the class map inside the lungs."
    chosen = [
        ("Highest probability of NCP, among those predicted so.", called.nlargest(NUM_LISTED, "probability_ncp")),
        ("The folds' networks disagree most on NCP.", disputed.nlargest(NUM_LISTED, "fold_std_ncp")),
        (stray, strays.nsmallest(NUM_LISTED, "cam_in_lung_fraction")),
    ]
    return [(caption, frame) for caption, frame in chosen if len(frame)]


def _list_scans(caption: str, frame: pd.DataFrame) -> HtmlTable:
    columns = ["scan_id", "prediction", "probability_ncp", "fold_std_ncp", "cam_in_lung_fraction", "cam_peak_slice"]
    header = ["scan", "predicted", "probability of NCP", "spread of folds", "map in lungs", "peak slice"]
    rows = [[_to_cell(name, value) for name, value in row.items()] for row in frame[columns].to_dict("records")]
    return HtmlTable(header, rows, caption)


def _to_cell(name: Any, value: Any) -> Cell:
    if pd.isna(value):
        return None
    if name == "cam_in_lung_fraction":
        return f"{value:.1%}"
    return int(value) if name == "cam_peak_slice" else value


def _describe_failures(rows: pd.DataFrame) -> Section:
    failed = rows[rows["status"].str.startswith(("BAD_", "ERR_"))]
    if failed.empty:
        return Section("Scans that failed", "None tonight.")
    shown = failed.sort_values(["status", "scan_id"]).groupby("status").head(NUM_LISTED)
    listed = shown[["scan_id", "status", "status_detail"]].to_numpy().tolist()
    caption = f"{len(listed)} of {len(failed)}: the first {NUM_LISTED} of each status. The table has them all."
    return Section("Scans that failed", "", [HtmlTable(["scan", "status", "what was found"], listed, caption)])


def _format_share(num_scans: int, num_all: int) -> str | None:
    return f"{num_scans / num_all:.1%}" if num_all else None
