"""Metrics against hand-counted tables, scikit-learn and the authors' published predictions."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from darnet.metrics import accuracy_3class, auc_ncp, compute_metrics, f1_ncp, sensitivity_ncp, specificity_ncp
from darnet.scan import DIAGNOSES

CCII = Path(__file__).parents[2] / "shared" / "data" / "ccii"

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
    assert all(math.isnan(value) for value in compute_metrics(np.empty((0, 3)), np.empty(0, int)).values())


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
