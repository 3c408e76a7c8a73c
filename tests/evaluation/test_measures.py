"""Evaluations against hand counts, the authors' published predictions and what their tables say to a reader."""

import csv
import io
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np
import pytest

from darnet.errors import UsageError
from darnet.evaluation.measures import (
    Comparison,
    Evaluation,
    Origin,
    compare_predictions,
    describe_evaluation,
    evaluate_predictions,
    find_warnings,
    resample_predictions,
)
from darnet.evaluation.paper import NETWORKS, TABLE_3
from darnet.evaluation.predictions import Predictions, read_predictions_table
from darnet.evaluation.report import render_csv, render_report, render_tex
from darnet.metrics import TABLE_2, compute_all_metrics
from darnet.page import NOTICE
from tests.places import SHARED

ORIGIN = Origin("some model", "Nothing is known of its training.", {"model_version": "7"})
HEADER = "scan_id,label,prob_cp,prob_ncp,prob_normal"
# Two folds of four scans. Called: fold 0 CP NCP NCP Normal, fold 1 CP NCP Normal CP; mean CP NCP Normal Normal.
FOLDS = """\
a,CP,0.8,0.1,0.1,0,p
b,NCP,0.1,0.8,0.1,0,p
c,Normal,0.1,0.5,0.4,0,q
d,CP,0.1,0.1,0.8,0,r
a,CP,0.6,0.2,0.2,1,p
b,NCP,0.2,0.6,0.2,1,p
c,Normal,0.2,0.1,0.7,1,q
d,CP,0.5,0.1,0.4,1,r
"""


def read_folds() -> Predictions:
    return read_predictions_table("folds.csv", f"{HEADER},fold,patient_id\n{FOLDS}".encode())


def draw_table(seed: int, num_scans: int = 90, name: str = "t.csv") -> Predictions:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1, 1, 1], num_scans)
    labels = np.random.default_rng(0).integers(0, 3, num_scans)
    rows = [
        f"s{number},{('CP', 'NCP', 'Normal')[label]},{','.join(map(repr, values.tolist()))}"
        for number, (label, values) in enumerate(zip(labels, probabilities, strict=True))
    ]
    return read_predictions_table(name, "\n".join([HEADER, *rows]).encode())


def evaluate(predictions: Predictions) -> Evaluation:
    return evaluate_predictions(predictions, resample_predictions(predictions, 0, 200))


def compare(first: Predictions, second: Predictions) -> Comparison:
    return compare_predictions(first, second, resample_predictions(first, 0, 200))


def test_folds_are_spread_and_the_ensemble_is_of_mean_probabilities() -> None:
    evaluation = evaluate(read_folds())
    assert [metrics["accuracy_3class"] for metrics in evaluation.fold_metrics] == [2 / 4, 4 / 4]
    assert evaluation.fold_means["accuracy_3class"] == 0.75
    assert evaluation.fold_stds["accuracy_3class"] == pytest.approx(math.sqrt(2 * 0.25**2 / 1))
    assert evaluation.metrics["accuracy_3class"] == 3 / 4
    assert evaluation.confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_patients_are_what_is_resampled_where_the_table_names_them() -> None:
    described = describe_evaluation(evaluate(read_folds()), ORIGIN, None)
    assert (described["ci95_clustered_by"], described["num_patients"], described["num_scans"]) == ("patient", 3, 4)
    alone = evaluate(draw_table(1))
    described = describe_evaluation(alone, ORIGIN, None)
    assert (described["ci95_clustered_by"], described["num_patients"], described["num_scans"]) == ("scan", None, 90)
    assert "patient_id" in find_warnings(alone, ORIGIN)[0]


def test_metrics_json_has_the_scoped_names_with_intervals_that_hold_them() -> None:
    described = describe_evaluation(evaluate(draw_table(1)), ORIGIN, None)
    for name in compute_all_metrics(np.empty((0, 3)), np.empty(0, int)):
        low, high = described[f"{name}_ci95"]
        assert 0 <= low <= high
        assert low <= described[name] <= high or name == "ece_3class"
    low, high = described["auc_ncp_ci95_delong"]
    assert low < described["auc_ncp"] < high
    assert described["notice"] == NOTICE
    assert described["model_version"] == "7"
    assert len(described["input_sha256"]) == 64


def test_what_a_cohort_leaves_undefined_is_null_and_warned_of() -> None:
    table = read_predictions_table("t.csv", f"{HEADER}\na,CP,0.8,0.1,0.1\nb,CP,0.1,0.1,0.8\n".encode())
    described = describe_evaluation(evaluate(table), ORIGIN, None)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert (described["auc_ncp"], described["auc_ncp_ci95"], described["auc_ncp_ci95_delong"]) == (
        None,
        [None, None],
        [None, None],
    )
    assert described["accuracy_3class"] == 0.5
    assert any("Undefined" in text and "auc_ncp" in text for text in described["warnings"])
    assert any("Few scans (2 CP, 0 NCP, 0 Normal)" in text for text in described["warnings"])
    assert "undefined" in render_report(evaluate(table), ORIGIN, None)


def test_a_faultless_ranking_is_warned_of() -> None:
    rows = "\n".join(
        f"s{row},{'NCP' if row < 3 else 'CP'},{1 - 0.9 * (row < 3)},{0.9 * (row < 3)},0" for row in range(9)
    )
    table = read_predictions_table("t.csv", f"{HEADER}\n{rows}\n".encode())
    assert any("DeLong" in text for text in find_warnings(evaluate(table), ORIGIN))


def test_a_comparison_meets_scan_by_scan_in_any_order() -> None:
    first, second = draw_table(1), draw_table(2)
    backwards = Predictions(
        "b.csv",
        second.sha256,
        second.scan_ids[::-1],
        None,
        second.labels[::-1],
        second.folds,
        second.fold_probabilities[:, ::-1],
    )
    found, turned = compare(first, second), compare(first, backwards)
    assert (found.aucs, found.decisions, found.intervals) == (turned.aucs, turned.decisions, turned.intervals)
    right, other_right = (table.probabilities.argmax(axis=1) == table.labels for table in (first, second))
    assert found.decisions.num_only_first_right == sum(right & ~other_right)
    assert found.differences["accuracy_3class"] == pytest.approx(right.mean() - other_right.mean())


def test_a_comparison_of_other_scans_or_labels_is_refused() -> None:
    first = draw_table(1)
    with pytest.raises(UsageError, match=r"short\.csv: no scan 's89', which t\.csv has \(1 such scans\)"):
        compare(first, draw_table(2, 89, "short.csv"))
    with pytest.raises(UsageError, match=r"t\.csv: no scan 's90', which long\.csv has"):
        compare(first, draw_table(2, 91, "long.csv"))
    text = f"{HEADER}\na,CP,0.8,0.1,0.1\n"
    with pytest.raises(UsageError, match=r"b\.csv: scan 'a' has another label than in a\.csv"):
        compare(
            read_predictions_table("a.csv", text.encode()),
            read_predictions_table("b.csv", text.replace("CP,", "NCP,").encode()),
        )


def test_folds_are_paired_where_both_tables_have_the_same() -> None:
    folds = read_folds()
    comparison = compare(folds, folds)
    assert {item.num_pairs for item in comparison.folds.values()} == {2}
    assert {item.verdict for item in comparison.folds.values()} == {"not shown"}
    assert compare(draw_table(1), draw_table(2)).folds == {}


class Cells(HTMLParser):
    """Rows of cells of every table on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "tr":
            self.rows.append([])
        self._is_in_cell = tag in ("td", "th")
        if self._is_in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_in_cell = self._is_in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_in_cell:
            self.rows[-1][-1] += data


def test_the_report_shows_metrics_folds_papers_numbers_and_comparison() -> None:
    folds = read_folds()
    page = render_report(evaluate(folds), ORIGIN, compare(folds, folds))
    rows = Cells(page).rows
    assert ["metric", "fold 0", "fold 1", "mean ± std"] in rows
    assert ["accuracy_3class", "0.5000", "1.0000", "0.7500 ± 0.3536"] in rows
    printed = [f"{value.mean:.4f} ± {value.std:.4f}" for value in TABLE_3["accuracy_3class"].values()]
    assert ["accuracy_3class", "0.7500 ± 0.3536", *printed] in rows
    assert ["true CP", "1 (50.0%)", "0 (0.0%)", "1 (50.0%)", "2"] in rows
    assert any(row[:1] + row[-1:] == ["auc_ncp", "not shown"] for row in rows)
    assert ORIGIN.training in page
    assert page.count(NOTICE) == 2


def test_a_report_without_comparison_or_folds_has_no_empty_sections() -> None:
    page = render_report(evaluate(draw_table(1)), ORIGIN, None)
    assert "<h2>Comparison</h2>" not in page
    assert "<h2>Folds</h2>" not in page


def test_a_hostile_scan_or_file_name_stays_text() -> None:
    table = read_predictions_table("<b>x</b>.csv", f"{HEADER},fold\na,CP,0.8,0.1,0.1,<i>0</i>\n".encode())
    page = render_report(evaluate(table), Origin("<u>s</u>", "<s>t</s>", {"<a>": "<em>"}), None)
    assert not [tag for tag in ("<b>", "<i>", "<u>", "<s>", "<a>", "<em>") if tag in page]


def test_tables_carry_every_metric_and_the_notice() -> None:
    evaluation = evaluate(read_folds())
    rows = list(csv.DictReader(io.StringIO(render_csv(evaluation))))
    assert [row["metric"] for row in rows] == list(evaluation.metrics)
    assert float(rows[0]["value"]) == 0.75
    assert (float(rows[0]["fold_0"]), float(rows[0]["fold_1"])) == (0.5, 1)
    assert {row["notice"] for row in rows} == {NOTICE}
    tex = render_tex(evaluation)
    assert tex.count(NOTICE) == 3
    assert r"accuracy\_3class & 0.7500 ± 0.3536 & 0.9250 ± 0.0219 & " in tex
    assert r"95\% interval" in tex


def test_the_papers_numbers_fit_each_other() -> None:
    """F1 of DA+CA follows from its sensitivity, its specificity and Table 1's counts of 169 NCP among 472 scans."""
    assert tuple(TABLE_3) == ("auc_ncp", "accuracy_3class", "sensitivity_ncp", "specificity_ncp", "f1_ncp")
    assert set(TABLE_3) == set(TABLE_2)
    for network in NETWORKS:
        hits = 169 * TABLE_3["sensitivity_ncp"][network].mean
        false_alarms = 303 * (1 - TABLE_3["specificity_ncp"][network].mean)
        assert TABLE_3["f1_ncp"][network].mean == pytest.approx(2 * hits / (hits + 169 + false_alarms), abs=0.0055)


def _find(rows: Sequence[Sequence[str]], name: str) -> Sequence[str]:
    return next(row for row in rows if row[0] == name)


CCII = SHARED / "data" / "ccii"
PUBLISHED = {
    "v1.1": {"accuracy_3class": 0.9258, "sensitivity_ncp": 0.9231, "specificity_ncp": 0.9967, "f1_ncp": 0.9571},
    "v4.1": {"accuracy_3class": 0.9131, "sensitivity_ncp": 0.8994, "specificity_ncp": 0.9670, "f1_ncp": 0.9184},
}
PUBLISHED["v1.1"]["auc_ncp"], PUBLISHED["v4.1"]["auc_ncp"] = 0.9888, 0.9859


@pytest.mark.skipif(not CCII.is_dir(), reason=f"{CCII} is absent")
@pytest.mark.parametrize("version", PUBLISHED)
def test_the_authors_predictions_give_their_published_numbers(version: str) -> None:
    name = f"predictions_{version}.csv"
    evaluation = evaluate(read_predictions_table(name, (CCII / name).read_bytes()))
    described = describe_evaluation(evaluation, ORIGIN, None)
    assert {metric: round(described[metric], 4) for metric in TABLE_2} == PUBLISHED[version]
    rows = Cells(render_report(evaluation, ORIGIN, None)).rows
    assert {metric: float(_find(rows, metric)[1]) for metric in TABLE_2} == PUBLISHED[version]
