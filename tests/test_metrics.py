"""Metrics against hand-counted tables, scikit-learn and the authors' published predictions."""

import math

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from darnet.metrics import (
    ECE_BINS,
    accuracy_3class,
    auc_ncp,
    brier_3class,
    compute_all_metrics,
    compute_metrics,
    count_confusion,
    ece_3class,
    f1_ncp,
    measure_reliability,
    measure_scans,
    sensitivity_ncp,
    specificity_ncp,
    trace_roc,
)
from darnet.scan import DIAGNOSES
from tests.places import SHARED

CCII = SHARED / "data" / "ccii"

# Columns CP, NCP, Normal. Called: NCP, NCP, CP, CP, NCP, Normal.
TABLE = np.array([[0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.9, 0.0, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]])
TRUE = np.array([1, 1, 1, 0, 0, 2])


def test_a_hand_counted_table_gives_its_counts() -> None:
    assert accuracy_3class(TABLE, TRUE) == 4 / 6  # right: 1, 2, 4, 6
    assert sensitivity_ncp(TABLE, TRUE) == 2 / 3
    assert specificity_ncp(TABLE, TRUE) == 2 / 3
    assert f1_ncp(TABLE, TRUE) == 2 / 3  # precision 2/3, recall 2/3


def test_a_tie_counts_half_in_the_auc() -> None:
    # NCP scans 0.8, 0.6, 0.4 against 0.0, 0.6, 0.2: of 9 pairs 7 won, 1 tied (0.6, 0.6), 1 lost (0.4, 0.6).
    assert auc_ncp(TABLE, TRUE) == 7.5 / 9


def test_auc_equals_the_count_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 5, (60, 3)) / 4
    labels = rng.integers(0, 3, 60)
    pairs = [
        float(one > other) + 0.5 * float(one == other)
        for one in probabilities[labels == 1, 1]
        for other in probabilities[labels != 1, 1]
    ]
    assert auc_ncp(probabilities, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_all_metrics_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1, 1, 1], 80).round(2)
    labels = rng.integers(0, 3, 80)
    called, is_ncp = probabilities.argmax(axis=1), labels == 1
    expected = {
        "accuracy_3class": sklearn_metrics.accuracy_score(labels, called),
        "auc_ncp": sklearn_metrics.roc_auc_score(is_ncp, probabilities[:, 1]),
        "sensitivity_ncp": sklearn_metrics.recall_score(is_ncp, called == 1),
        "specificity_ncp": sklearn_metrics.recall_score(~is_ncp, called != 1),
        "f1_ncp": sklearn_metrics.f1_score(is_ncp, called == 1),
    }
    assert compute_metrics(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_a_set_without_ncp_leaves_auc_and_sensitivity_undefined() -> None:
    labels = np.array([0, 0, 0, 0, 0, 2])
    assert math.isnan(auc_ncp(TABLE, labels))
    assert math.isnan(sensitivity_ncp(TABLE, labels))
    assert specificity_ncp(TABLE, labels) == 3 / 6
    assert f1_ncp(TABLE, labels) == 0  # NCP was called, so it is defined: nothing found is right


def test_a_set_of_ncp_alone_leaves_auc_and_specificity_undefined() -> None:
    labels = np.ones(6, int)
    assert math.isnan(auc_ncp(TABLE, labels))
    assert math.isnan(specificity_ncp(TABLE, labels))
    assert sensitivity_ncp(TABLE, labels) == 3 / 6


def test_f1_is_undefined_where_ncp_neither_is_nor_is_called() -> None:
    assert math.isnan(f1_ncp(TABLE[3:4], np.array([0])))


def test_an_empty_set_has_no_metrics() -> None:
    assert all(math.isnan(value) for value in compute_all_metrics(np.empty((0, 3)), np.empty(0, int)).values())


ORACLE = {
    "v1.1": (0.9258, 0.9888, 0.9231, 0.9967, 0.9571),
    "v4.1": (0.9131, 0.9859, 0.8994, 0.9670, 0.9184),
}


@pytest.mark.skipif(not CCII.is_dir(), reason=f"{CCII} is absent")
@pytest.mark.parametrize("version", ORACLE)
def test_the_authors_predictions_give_their_published_numbers(version: str) -> None:
    table = pd.read_csv(CCII / f"predictions_{version}.csv")
    probabilities = table[["prob_cp", "prob_ncp", "prob_normal"]].to_numpy()
    labels = table["label"].map({str(name): label for label, name in enumerate(DIAGNOSES)}).to_numpy()
    names = ("accuracy_3class", "auc_ncp", "sensitivity_ncp", "specificity_ncp", "f1_ncp")
    found = compute_metrics(probabilities, labels)
    assert found == pytest.approx(dict(zip(names, ORACLE[version], strict=True)), abs=5e-5)


@pytest.mark.parametrize("seed", range(5))
def test_macro_means_and_brier_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1, 1, 1], 90)
    labels, called = rng.integers(0, 3, 90), probabilities.argmax(axis=1)
    specificities = [sklearn_metrics.recall_score(labels != label, called != label) for label in range(3)]
    expected = {
        "auc_macro": sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "sensitivity_macro": sklearn_metrics.balanced_accuracy_score(labels, called),
        "specificity_macro": np.mean(specificities),
        "f1_macro": sklearn_metrics.f1_score(labels, called, average="macro"),
        "brier_3class": sklearn_metrics.brier_score_loss(labels, probabilities, scale_by_half=False),
    }
    found = compute_all_metrics(probabilities, labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_confusion_and_roc_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet([1, 1, 1], 70).round(1), rng.integers(0, 3, 70)
    expected = sklearn_metrics.confusion_matrix(labels, probabilities.argmax(axis=1))
    assert count_confusion(probabilities, labels).tolist() == expected.tolist()
    false_rate, true_rate = trace_roc(probabilities[:, 1], labels == 1, np.ones(70))
    wanted = sklearn_metrics.roc_curve(labels == 1, probabilities[:, 1], drop_intermediate=False)
    assert np.allclose(false_rate, wanted[0], atol=1e-12)
    assert np.allclose(true_rate, wanted[1], atol=1e-12)


def test_a_hand_counted_table_gives_its_calibration() -> None:
    # Confidences 0.8, 0.6, 0.5, 0.9, 0.6, 0.7; right: yes, yes, no, yes, no, yes. Bins of 1/15 part them all but 0.6.
    gaps = [1 * abs(1 - 0.8), 2 * abs(1 / 2 - 0.6), 1 * abs(0 - 0.5), 1 * abs(1 - 0.9), 1 * abs(1 - 0.7)]
    assert ece_3class(TABLE, TRUE) == pytest.approx(sum(gaps) / 6)
    squares = [0.06, 0.26, 0.5 + 0.36 - 0.24, 0.02, 0.64 + 0.36 + 0.04, 0.14]
    assert brier_3class(TABLE, TRUE) == pytest.approx(sum(squares) / 6)


def test_calibration_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(4)
    probabilities, labels = rng.dirichlet([1, 1, 1], 500), rng.integers(0, 3, 500)
    error = 0.0
    for number in range(ECE_BINS):
        low, high = number / ECE_BINS, (number + 1) / ECE_BINS
        inside = [index for index, row in enumerate(probabilities) if low < max(row) <= high]
        if inside:
            accuracy = sum(int(probabilities[index].argmax() == labels[index]) for index in inside) / len(inside)
            confidence = sum(max(probabilities[index]) for index in inside) / len(inside)
            error += len(inside) / 500 * abs(accuracy - confidence)
    assert ece_3class(probabilities, labels) == pytest.approx(error)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    certain = np.eye(3)
    assert (ece_3class(certain, np.arange(3)), brier_3class(certain, np.arange(3))) == (0, 0)
    assert (ece_3class(certain, np.array([1, 2, 0])), brier_3class(certain, np.array([1, 2, 0]))) == (1, 2)


def test_a_weight_is_a_scan_counted_so_often() -> None:
    rng = np.random.default_rng(7)
    probabilities, labels = rng.dirichlet([1, 1, 1], 40).round(2), rng.integers(0, 3, 40)
    weights = rng.integers(0, 4, (6, 40))
    found = measure_scans(probabilities, labels, weights.astype(float))
    for row, counts in enumerate(weights):
        repeated = compute_all_metrics(np.repeat(probabilities, counts, axis=0), np.repeat(labels, counts))
        assert {name: values[row] for name, values in found.items()} == pytest.approx(repeated, abs=1e-12)


def test_a_macro_mean_is_undefined_where_one_class_is_absent() -> None:
    labels = np.array([0, 1, 1, 0, 0, 0])
    found = compute_all_metrics(TABLE, labels)
    assert math.isnan(found["auc_macro"])
    assert math.isnan(found["sensitivity_macro"])
    assert not math.isnan(found["specificity_macro"])


def test_a_bin_is_closed_above() -> None:
    thirds = np.full((1, 3), 1 / 3)  # the upper edge of the fifth of fifteen bins
    assert measure_reliability(thirds, np.array([0])).num_scans.tolist() == [0] * 4 + [1] + [0] * 10
