"""A night as people read it: its rows, the tally of earlier nights and the gates' verdict in; nightly.html out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.charts import draw_nights, draw_shift
from darnet.errors import STATUS_MEANINGS
from darnet.page import Cell, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page
from darnet.publishing.gates import Measure, Verdict
from darnet.publishing.outermost import choose_outermost
from darnet.publishing.rows import PROBABILITIES, SCHEMA, SECONDS, Rows
from darnet.publishing.tally import TALLY_COLUMNS, Tally
from darnet.scan import DIAGNOSES, FloatArray

NIGHT_COLUMNS = [
    *TALLY_COLUMNS,
    *SECONDS,
    *["run_id", "scan_id", "input_sha256", "status_detail", "model_name", "model_version", "num_bytes"],
    *["fold_std_ncp", "cam_in_lung_fraction", "cam_peak_slice"],
]
NUM_FAILURES = 10  # Source: ours; scans of a status that a person may look at in one morning
LIMITS = """\
The gates compare distributions: they notice that something changed, not what, and not whether the model is right. A \
night of another hospital, scanner or season may be held though all is well, and an error that leaves the shares as \
they are passes.

Scans to look at are the outermost of this night, not findings. A network trained on other scans than these may be \
sure and wrong."""


class Night:
    """A run's rows as its page needs them: their tally, seconds of each stage, and the scans that it lists."""

    def __init__(self) -> None:
        self.tally, self.num_bytes = Tally(), 0
        self.first: dict[str, Any] = {}
        self._seconds: dict[str, list[FloatArray]] = {stage: [] for stage in SECONDS}
        self._listed = SCHEMA.empty_table().select(NIGHT_COLUMNS)

    def introduce(self, rows: Rows) -> None:
        """Learn of any row which run and model this is, also where the page counts none."""
        self.first = self.first or next(iter(rows.slice(0, 1).to_pylist()), {})

    def add(self, rows: Rows) -> None:
        """Take in rows with NIGHT_COLUMNS."""
        self.introduce(rows)
        self.tally.add(rows)
        self.num_bytes += pc.sum(rows["num_bytes"]).as_py() or 0
        for stage, seconds in self._seconds.items():
            seconds.append(rows[stage].drop_null().to_numpy())
        candidates = pa.concat_tables([self._listed, rows])
        self._listed = candidates.take(pa.array(_find_listed(candidates.to_pandas()), pa.int64()))

    @property
    def listed(self) -> pd.DataFrame:
        """The rows that the page names, in their order; what any of its lists chooses of all is chosen of these."""
        frame: pd.DataFrame = self._listed.to_pandas()
        return frame

    def list_scans(self) -> list[str]:
        """The scans that a person should look at, each once."""
        return list(
            dict.fromkeys(scan_id for _, frame in choose_outermost(self.listed) for scan_id in frame["scan_id"])
        )

    def list_rows(self) -> list[dict[str, Any]]:
        """Their rows, NIGHT_COLUMNS of each."""
        is_shown = pc.is_in(self._listed["scan_id"], pa.array(self.list_scans(), pa.string()))
        rows: list[dict[str, Any]] = self._listed.filter(is_shown).to_pylist()
        return rows

    def take_seconds(self, stage: str) -> FloatArray:
        """Of each row that went through a stage, how long it took, s."""
        return np.concatenate([np.empty(0), *self._seconds[stage]])


def _find_listed(rows: pd.DataFrame) -> list[int]:
    chosen = [*(frame for _, frame in choose_outermost(rows)), _choose_failures(rows), *_choose_slowest(rows).values()]
    return sorted({place for frame in chosen for place in frame.index})


def render_nightly(
    tonight: Night, earlier: Tally, verdict: Verdict, pictures: Mapping[str, HtmlFigure] | None = None
) -> str:
    """The whole page of a run; `pictures`, by scan_id, are shown of the scans to look at."""
    sections = [
        _describe_statuses(tonight.tally, earlier),
        _describe_gates(verdict),
        _describe_classes(tonight.tally, earlier),
        _describe_stages(tonight),
        _describe_scans(tonight, pictures or {}),
        _describe_failures(tonight),
        Section("What this page is and is not", LIMITS),
    ]
    return render_page(f"DARNet night of {tonight.first['night']}", _summarise(tonight, earlier, verdict), sections)


def _summarise(tonight: Night, earlier: Tally, verdict: Verdict) -> str:
    first, tally = tonight.first, tonight.tally
    return (
        f"Run {first['run_id']} with {first['model_name']} {first['model_version']}: {tally.num_rows} scans of "
        f"{tonight.num_bytes / 1e9:.2f} GB, {tally.num_scored} of them scored, beside {earlier.num_rows} rows of "
        f"{len(earlier.nights)} earlier nights.\n\nQuality gates: {verdict.describe()}."
    )


def _describe_statuses(tonight: Tally, earlier: Tally) -> Section:
    listed: list[Sequence[Cell]] = [
        [
            str(status),
            tonight.statuses[status],
            _format_share(tonight.statuses[status], tonight.num_rows),
            _format_share(earlier.statuses[status], earlier.num_rows),
            meaning,
        ]
        for status, meaning in STATUS_MEANINGS.items()
        if status in tonight.statuses or status in earlier.statuses
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


def _name_result(measure: Measure, verdict: Verdict) -> str:
    if np.isnan([measure.value, measure.limit]).any():
        return "not measured"
    within = "above the limit" if measure.is_breach else "within"
    return f"{within}, not judged" if verdict.unjudged else within


def _describe_classes(tonight: Tally, earlier: Tally) -> Section:
    if not tonight.num_scored:
        return Section("Classes and probabilities", "No scan was scored tonight.")
    both = (tonight, earlier)
    probabilities = [np.column_stack([tally.take_numbers(name) for name in PROBABILITIES]) for tally in both]
    listed: list[Sequence[Cell]] = [
        [
            str(diagnosis),
            tonight.count_class(diagnosis),
            *(_format_share(tally.count_class(diagnosis), tally.num_scored) for tally in both),
            *(float(values[:, label].mean()) if len(values) else None for values in probabilities),
        ]
        for label, diagnosis in enumerate(DIAGNOSES)
    ]
    header = ["predicted", "scans", "tonight", "earlier nights", "mean probability", "earlier nights'"]
    caption = "Classes of the highest probability, and the mean of each class's probability over all scored scans."
    told = "How the probabilities are spread: tonight filled, earlier nights, if there are any, as a black line."
    figures = [HtmlFigure(figure_to_svg(draw_shift(*probabilities)), told), *_draw_history(tonight, earlier)]
    return Section("Classes and probabilities", "", [HtmlTable(header, listed, caption)], figures)


def _draw_history(tonight: Tally, earlier: Tally) -> list[HtmlFigure]:
    """The classes night after night, if there was one before."""
    if not earlier.num_scored:
        return []
    counts = earlier.predictions + tonight.predictions
    nights = sorted({night for night, _ in counts})
    table: FloatArray = np.array([[counts[night, diagnosis] for diagnosis in DIAGNOSES] for night in nights], float)
    figure = draw_nights([str(night) for night in nights], table / table.sum(axis=1, keepdims=True))
    return [
        HtmlFigure(figure_to_svg(figure), "The share of each predicted class, night by night; tonight is the last.")
    ]


def _describe_stages(tonight: Night) -> Section:
    listed: list[tuple[float, Sequence[Cell]]] = []
    for stage, slowest in _choose_slowest(tonight.listed).items():
        seconds = tonight.take_seconds(stage)
        spread = [f"{value:.2f}" for value in np.quantile(seconds, [0.5, 0.95, 1])]
        longest = str(slowest["scan_id"].item())
        cells: Sequence[Cell] = [stage.removesuffix("_s"), len(seconds), f"{seconds.sum():.1f}", *spread, longest]
        listed.append((-seconds.sum(), cells))
    header = ["stage", "scans", "sum, s", "median, s", "95%, s", "longest, s", "the longest one"]
    table = HtmlTable(header, [cells for _, cells in sorted(listed, key=lambda pair: pair[0])], "The slowest first.")
    return Section("Stages by time", "Seconds of a worker, not of the clock: workers go side by side.", [table])


def _choose_slowest(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of each stage that any row went through, the first of those that took longest."""
    return {stage: rows.loc[[rows[stage].idxmax()]] for stage in SECONDS if rows[stage].notna().any()}


def _describe_scans(tonight: Night, pictures: Mapping[str, HtmlFigure]) -> Section:
    tables = [_list_scans(caption, frame) for caption, frame in choose_outermost(tonight.listed)]
    shown = [pictures[scan_id] for scan_id in tonight.list_scans() if scan_id in pictures]
    text = "" if tables else "No scan was scored tonight."
    return Section("Scans to look at", text, tables, shown)


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


def _describe_failures(tonight: Night) -> Section:
    shown = _choose_failures(tonight.listed)
    if shown.empty:
        return Section("Scans that failed", "None tonight.")
    listed = shown[["scan_id", "status", "status_detail"]].to_numpy().tolist()
    num_failed = tonight.tally.count("BAD_") + tonight.tally.count("ERR_")
    caption = f"{len(listed)} of {num_failed}: the first {NUM_FAILURES} of each status. The table has them all."
    return Section("Scans that failed", "", [HtmlTable(["scan", "status", "what was found"], listed, caption)])


def _choose_failures(rows: pd.DataFrame) -> pd.DataFrame:
    failed = rows[rows["status"].str.startswith(("BAD_", "ERR_"))]
    return failed.sort_values(["status", "scan_id"]).groupby("status").head(NUM_FAILURES)


def _format_share(num_scans: int, num_all: int) -> str | None:
    return f"{num_scans / num_all:.1%}" if num_all else None
