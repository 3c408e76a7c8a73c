"""Evaluations against hand counts, the authors' published predictions and what their tables say to a reader."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from darnet import NOTICE
from darnet.errors import UsageError
from darnet.evaluation.measures import (
    Comparison,
    Evaluation,
    Origin,
    compare_predictions,
    correct_comparisons,
    describe_comparison,
    describe_evaluation,
    evaluate_predictions,
    find_warnings,
    resample_predictions,
)
from darnet.evaluation.paper import NETWORKS, OTHER_METHODS, TABLE_3
from darnet.evaluation.predictions import Predictions, read_predictions_table
from darnet.evaluation.report import render_report
from darnet.evaluation.tabulate import render_csv, render_tables_tex, render_tex
from darnet.metrics import TABLE_2, compute_all_metrics
from darnet.page import HtmlTable
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
        assert 0 <= low <= described[name] <= high
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
    backwards = replace(
        second,
        name="b.csv",
        scan_ids=second.scan_ids[::-1],
        labels=second.labels[::-1],
        fold_probabilities=second.fold_probabilities[:, ::-1],
    )
    found, turned = compare(first, second), compare(first, backwards)
    assert (found.aucs, found.decisions, found.differences) == (turned.aucs, turned.decisions, turned.differences)
    right, other_right = (table.probabilities.argmax(axis=1) == table.labels for table in (first, second))
    assert found.decisions.num_only_first_right == sum(right & ~other_right)
    assert found.differences["accuracy_3class"] == pytest.approx(right.mean() - other_right.mean())
    assert found.intervals["accuracy_3class"] == turned.intervals["accuracy_3class"]


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


@pytest.mark.parametrize(
    ("column", "changed"), [("label", "b,Normal,0.8,0.1,0.1,p"), ("patient_id", "b,CP,0.8,0.1,0.1,z")]
)
def test_a_disagreement_of_two_tables_is_refused_by_both_rows(column: str, changed: str) -> None:
    rows = ["a,NCP,0.8,0.1,0.1,q", "b,CP,0.8,0.1,0.1,p", "c,CP,0.8,0.1,0.1,r"]
    tables = [
        read_predictions_table(name, "\n".join([f"{HEADER},patient_id", *lines]).encode())
        for name, lines in (("a.csv", rows), ("b.csv", [changed, rows[2], rows[0]]))
    ]
    complaint = rf"b\.csv: scan 'b' has another {column} than in a\.csv \(row 2 of the former, row 3 of the latter\)"
    with pytest.raises(UsageError, match=complaint):
        compare(*tables)


def test_patients_that_only_the_second_table_names_are_asked_for() -> None:
    row = "a,CP,0.8,0.1,0.1"
    without = read_predictions_table("a.csv", f"{HEADER}\n{row}".encode())
    named = read_predictions_table("b.csv", f"{HEADER},patient_id\n{row},p".encode())
    with pytest.raises(UsageError, match=r"a\.csv: no column patient_id, which b\.csv has; add it"):
        compare(without, named)
    assert compare(named, without).second.patient_ids == ("p",)


def test_few_patients_are_warned_of_however_many_scans_they_have() -> None:
    """40 scans of each class, but the NCP ones of 2 patients: a third of resampled sets lack one of them or both."""
    rows = [
        f"{label}{number},{label},{probabilities},{label}{number % 2 if label == 'NCP' else number}"
        for label, probabilities in (("CP", "0.8,0.1,0.1"), ("NCP", "0.1,0.8,0.1"), ("Normal", "0.3,0.3,0.4"))
        for number in range(40)
    ]
    evaluation = evaluate(read_predictions_table("t.csv", "\n".join([f"{HEADER},patient_id", *rows]).encode()))
    warnings = find_warnings(evaluation, ORIGIN)
    assert any("Few patients (2 NCP)" in text for text in warnings)
    assert any("accuracy_3class" in text and "no width" in text for text in warnings)


def test_a_metric_without_interval_is_warned_of() -> None:
    """One NCP patient of four: 0.75^4 = 32% of the sets lack him and leave his sensitivity undefined."""
    rows = "\n".join(f"s{row},{'NCP' if row < 5 else 'CP'},0.6,0.4,0,p{max(0, row - 4)}" for row in range(8))
    table = read_predictions_table("t.csv", f"{HEADER},patient_id\n{rows}\n".encode())
    (warning,) = [text for text in find_warnings(evaluate(table), ORIGIN) if text.startswith("No interval")]
    assert "sensitivity_ncp" in warning
    assert "accuracy_3class" not in warning


def make_runs(name: str, seeds: Sequence[int], shift: float, num_scans: int = 60) -> Predictions:
    """Three folds a seed; each is a little off by chance, and all of them by `shift` towards the truth."""
    labels = np.arange(num_scans) % 3
    rows = []
    for seed in seeds:
        for fold in range(3):
            rng = np.random.default_rng((fold, seed, len(name)))
            logits = rng.normal(0, 0.3, (num_scans, 3)) + np.random.default_rng(1).normal(0, 1, (num_scans, 3))
            values = np.exp(logits + (1 + shift) * np.eye(3)[labels])
            for number, (label, row) in enumerate(zip(labels, values / values.sum(1, keepdims=True), strict=True)):
                told = ",".join(map(repr, row.tolist()))
                rows.append(f"s{number},{('CP', 'NCP', 'Normal')[label]},{told},{fold},{seed},p{number // 2}")
    return read_predictions_table(name, "\n".join([f"{HEADER},fold,seed,patient_id", *rows]).encode())


def test_several_seeds_are_paired_by_fold_and_seed() -> None:
    first, second = make_runs("one.csv", (0, 1, 2, 3), 3.0, 120), make_runs("other.csv", (1, 0, 3, 2), 0.0, 120)
    found = compare(first, second)
    described = describe_comparison(found)["folds"]["accuracy_3class"]
    assert (described["num_pairs"], described["num_seeds"], described["verdict"]) == (12, 4, "shown")
    differences = [
        (one.argmax(axis=1) == first.labels).mean() - (other.argmax(axis=1) == first.labels).mean()
        for one, other in zip(first.fold_probabilities, second.fold_probabilities, strict=True)
    ]
    assert described["mean"] == pytest.approx(np.mean(differences))
    assert 0 < found.intervals["accuracy_3class"].low < found.differences["accuracy_3class"]
    assert found.differences["accuracy_3class"] < found.intervals["accuracy_3class"].high
    assert described["p_value"] <= described["p_value_holm"] <= 5 * described["p_value"]
    same = describe_evaluation(evaluate(first), ORIGIN, None)
    assert (same["seeds"], same["num_seeds"], same["num_folds"], len(same["folds"])) == (
        ["0", "1", "2", "3"],
        4,
        3,
        12,
    )
    assert [(fold["fold"], fold["seed"]) for fold in same["folds"]][2:5] == [("0", "2"), ("0", "3"), ("1", "0")]
    assert 0 < described["least_shown"] < described["mean"]
    page = render_report(evaluate(first), ORIGIN, found)
    assert "12 pairs of fold and seed, 4 seeds; p is corrected by Holm" in page
    assert "The p of AUC and of decisions are each of one test by itself." in page  # those by fold are not
    assert "Each p" not in page


def test_one_seed_shows_nothing_and_the_report_says_for_this_training_seed() -> None:
    first, second = make_runs("one.csv", [0], 3.0), make_runs("other.csv", [0], 0.0)
    found = compare(first, second)
    described = describe_comparison(found)["folds"]["accuracy_3class"]
    assert (described["num_pairs"], described["num_seeds"]) == (3, 1)
    assert (described["p_value"], described["verdict"]) == (None, "not shown")
    assert "3 folds, for this training seed: another seed may" in render_report(evaluate(first), ORIGIN, found)


@pytest.mark.slow
def test_two_seeds_show_nothing_and_the_report_says_how_many_are_asked_for() -> None:
    first, second = make_runs("one.csv", (0, 1), 3.0), make_runs("other.csv", (0, 1), 0.0)
    found = compare(first, second)
    assert {item["verdict"] for item in describe_comparison(found)["folds"].values()} == {"not shown"}
    assert "6 pairs of fold and seed, 2 seeds, too few for a test (3)" in render_report(evaluate(first), ORIGIN, found)


def test_no_verdict_rests_on_a_p_that_takes_a_patients_scans_as_independent() -> None:
    """Eight scans of one patient that only the first calls rightly: McNemar sees 2 in 2^8, a patient counts once."""
    rows = [f"s{number},CP,{{}},p" for number in range(8)] + ["n,NCP,0.1,0.8,0.1,q", "o,Normal,0.1,0.1,0.8,r"]
    first, second = (
        read_predictions_table(name, "\n".join([f"{HEADER},patient_id", *(row.format(cells) for row in rows)]).encode())
        for name, cells in (("one.csv", "0.8,0.1,0.1"), ("other.csv", "0.1,0.1,0.8"))
    )
    described = describe_comparison(compare(first, second))
    assert described["decisions_mcnemar"]["p_value"] == 2 / 2**8
    assert described["decisions_clustered"] == {"by": "patient", "p_value": 1}
    assert described["holm"]["decisions_clustered"] == {"p_value": 1, "verdict": "not shown"}
    page = render_report(evaluate(first), ORIGIN, compare(first, second))
    assert "counts patients, p = 1.0000: not shown. Scans taken as independent, p = 0.0078." in page


@pytest.mark.slow
def test_other_seeds_are_not_paired_and_the_report_says_so() -> None:
    first, second = make_runs("one.csv", [0], 3.0), make_runs("other.csv", [1], 0.0)
    found = compare(first, second)
    assert found.folds == {}
    assert "not compared fold by fold, as they have not the same folds and seeds" in render_report(
        evaluate(first), ORIGIN, found
    )


def test_several_comparisons_of_a_report_are_corrected_together() -> None:
    first = make_runs("one.csv", (0, 1, 2), 1.0)
    alone = [compare(first, make_runs(name, (0, 1, 2), shift)) for name, shift in (("a.csv", 0.0), ("bb.csv", 0.7))]
    one, other = correct_comparisons(alone)
    low, high = sorted([alone[0].aucs.clustered_p_value, alone[1].aucs.clustered_p_value])
    assert {one.p_auc, other.p_auc} == {min(1, 2 * low), max(min(1, 2 * low), high)}
    assert min(one.p_folds[name] for name in TABLE_2) > min(alone[0].p_folds[name] for name in TABLE_2)


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
    assert any(row[:5] == ["true CP", "1 (50.0%)", "0 (0.0%)", "1 (50.0%)", "2"] for row in rows)
    assert any(row[:1] + row[-1:] == ["true CP", "0.0000 to 1.0000"] for row in rows)
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
    rows = list(csv.DictReader(io.StringIO(render_csv(evaluation, None))))
    names = [row["metric"] for row in rows]
    assert names[: len(evaluation.metrics)] == list(evaluation.metrics)
    assert {name: float(row["value"]) for name, row in zip(names, rows, strict=True)}["scans_cp_called_normal"] == 1
    assert float(rows[0]["value"]) == 0.75
    assert (float(rows[0]["fold_0"]), float(rows[0]["fold_1"])) == (0.5, 1)
    assert {row["notice"] for row in rows} == {NOTICE}
    tex = render_tex(evaluation, None)
    assert tex.count(NOTICE) == 5
    assert r"accuracy\_3class & 0.7500 ± 0.3536 & 0.9250 ± 0.0219 & " in tex
    assert r"95\% interval" in tex
    assert r"true CP & 1 (50.0\%) & 0 (0.0\%) & 1 (50.0\%) & 2 & 0.0000 to 1.0000 \\" in tex
    assert r"\begin{tabular}{lrrrrr}" in tex  # Table 3: names to the left, numbers to the right


def test_a_comparison_is_in_the_tables_too() -> None:
    first, second = make_runs("one.csv", (0, 1), 3.0), make_runs("oth_r.csv", (0, 1), 0.0)
    evaluation, found = evaluate(first), compare(first, second)
    rows = csv.DictReader(io.StringIO(render_csv(evaluation, found)))
    (row,) = [row for row in rows if row["minus"] == "oth_r.csv" and row["metric"] == "auc_ncp"]
    assert float(row["value"]) == pytest.approx(found.aucs.difference)
    assert float(row["p_holm"]) == pytest.approx(found.aucs.clustered_p_value)
    assert float(row["folds_mean"]) == pytest.approx(found.folds["auc_ncp"].mean)
    tex = render_tex(evaluation, found)
    assert r"\label{tab:comparison}" in tex
    assert r"\label{tab:fold-differences}" in tex
    bare = tex.replace(r"\%", "").replace(r"\_", "").replace(r"\#", "").replace("$-$", "").replace("$<$", "")
    lines = [line for line in bare.splitlines() if not line.startswith(("%", r"\label"))]
    assert not [line for line in lines if set("%_#$−") & set(line)]  # what LaTeX would stumble over


def test_latex_prints_every_letter_of_a_name_as_it_is() -> None:
    """Each in the spelling of the LaTeX manual; < > | are other letters in the encoding that LaTeX starts with."""
    table = HtmlTable(["a<b"], [["<0.05 & 5% #1 _x_ ~ ^ \\ {y} $ | >"]], "p < 0.05")
    tex = render_tables_tex([(table, "tab:x")])
    cell = r"$<$0.05 \& 5\% \#1 \_x\_ \textasciitilde{} \textasciicircum{} \textbackslash{} \{y\} \$ $|$ $>$ \\"
    assert cell in tex.splitlines()
    assert r"a$<$b \\" in tex
    assert r"\caption{p $<$ 0.05 " in tex


@pytest.mark.slow
def test_a_report_without_folds_has_no_column_of_them() -> None:
    rows = Cells(render_report(evaluate(draw_table(1)), ORIGIN, None)).rows
    assert ["metric", "value", "95% interval", "what it is"] in rows
    rows = Cells(render_report(evaluate(read_folds()), ORIGIN, None)).rows
    assert ["metric", "value", "95% interval", "folds", "what it is"] in rows


def test_the_papers_numbers_fit_each_other() -> None:
    """F1 of DA+CA follows from its sensitivity, its specificity and Table 1's counts of 169 NCP among 472 scans."""
    assert tuple(TABLE_3) == ("auc_ncp", "accuracy_3class", "sensitivity_ncp", "specificity_ncp", "f1_ncp")
    assert set(TABLE_3) == set(TABLE_2)
    assert all(set(method.metrics) <= set(TABLE_2) for method in OTHER_METHODS)
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


def read_ccii_with_patients(version: str) -> Predictions:
    """The authors' predictions beside their own list of patients."""
    table = pd.read_csv(CCII / f"predictions_{version}.csv", dtype=str)
    patients = pd.read_csv(CCII / "scans.csv", dtype=str)[["scan_id", "patient_id"]]
    text = table.merge(patients, on="scan_id", how="left").to_csv(index=False)
    return read_predictions_table(f"{version}.csv", text.encode())


@pytest.mark.skipif(not CCII.is_dir(), reason=f"{CCII} is absent")
def test_the_authors_two_networks_are_compared_by_patient_delong_and_mcnemar() -> None:
    first, second = read_ccii_with_patients("v1.1"), read_ccii_with_patients("v4.1")
    described = describe_evaluation(evaluate(first), ORIGIN, None)
    assert (described["ci95_clustered_by"], described["num_patients"]) == ("patient", 436)
    assert {metric: round(described[metric], 4) for metric in TABLE_2} == PUBLISHED["v1.1"]
    found = describe_comparison(compare(first, second))
    is_ncp = first.labels == 1
    aucs = [roc_auc_score(is_ncp, table.probabilities[:, 1]) for table in (first, second)]
    assert found["auc_ncp_delong"]["difference"] == pytest.approx(aucs[0] - aucs[1])
    right, other = (table.probabilities.argmax(axis=1) == table.labels for table in (first, second))
    only, only_other = int((right & ~other).sum()), int((~right & other).sum())
    assert found["decisions_mcnemar"] == {
        "num_only_first_right": only,
        "num_only_second_right": only_other,
        "p_value": pytest.approx(scipy.stats.binomtest(only, only + only_other).pvalue),
    }
    low, high = found["differences_ci95"]["auc_ncp"]
    assert low < found["auc_ncp_delong"]["difference"] < high
