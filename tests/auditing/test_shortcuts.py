"""Shortcuts against scikit-learn's AUC, hand-counted ties, loops over patients, and noise that must not be shouted."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from darnet.auditing.shortcuts import (
    MAX_LEVELS,
    Feature,
    compare_groups,
    encode_levels,
    encode_numbers,
    find_shortcuts,
    measure_border,
)
from darnet.scan import DIAGNOSES

LABELS = [str(diagnosis) for diagnosis in DIAGNOSES]


def make_patients(num_patients: int, scans_each: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Diagnoses and patients of scans; a patient's scans share their diagnosis."""
    patients = np.repeat(np.arange(num_patients), scans_each)
    return np.array(LABELS)[patients % 3], patients.astype(str)


def test_a_hand_counted_auc_with_ties() -> None:
    """Of the 6 pairs, 3 are won, 2 tie: (3 + 2 / 2) / 6."""
    values, is_class = np.array([1.0, 1, 2, 0, 1]), np.array([True, False, True, False, False])
    by_hand = np.array([[(a > b) + (a == b) / 2 for b in values[~is_class]] for a in values[is_class]])
    assert by_hand.sum() == 5
    assert compare_groups(values, is_class, np.arange(5)).auc == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_shortcut_has_the_auc_of_scikit_learn_and_comes_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    diagnoses, patients = make_patients(90)
    planted = rng.integers(0, 6, len(diagnoses)) - 3 * (diagnoses == "NCP")
    noise = rng.normal(size=len(diagnoses))
    features = [Feature("noise", "table", noise), Feature("planted", "table", planted.astype(float))]
    first, *others = find_shortcuts(features, diagnoses, patients, seed=0)
    assert (first.feature, first.diagnosis, first.direction) == ("planted", "NCP", "lower")
    assert first.auc == pytest.approx(roc_auc_score(diagnoses == "NCP", -planted), abs=1e-4)
    assert first.low < first.auc < first.high
    assert first.is_beyond_chance
    assert not any(other.is_beyond_chance for other in others if other.feature == "noise")


@pytest.mark.slow
def test_a_shuffled_shortcut_is_not_shouted() -> None:
    """A property of the patient, 5 scans each, dealt at random: one cohort in twenty may be taken in, not more."""
    diagnoses, patients = make_patients(45, scans_each=5)
    shouted = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scalar, level = rng.normal(size=45), rng.integers(0, 4, 45)
        features = [
            Feature("scanner", "table", np.repeat(scalar, 5)),
            Feature("site", "table", np.eye(4)[np.repeat(level, 5)]),
            Feature("histogram", "images", np.repeat(rng.dirichlet(np.ones(16), 45), 5, axis=0)),
        ]
        shouted += any(item.is_beyond_chance for item in find_shortcuts(features, diagnoses, patients, seed))
    assert shouted <= 5


def test_six_scans_told_apart_by_chance_are_not_shouted() -> None:
    diagnoses = np.array(["CP"] * 3 + ["NCP"] * 3)
    (first, _) = find_shortcuts([Feature("luck", "table", np.arange(6.0))], diagnoses, np.arange(6).astype(str), 0)
    assert first.auc == 1
    assert first.low < 0.6
    assert not first.is_beyond_chance


def test_the_variance_is_the_bootstrap_s_and_counts_patients_not_scans() -> None:
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(120), rng.integers(1, 8, 120))
    is_class = patients % 3 == 0
    values = rng.normal(size=120)[patients] + 0.2 * is_class + 0.3 * rng.normal(size=len(patients))
    rows = [np.flatnonzero(patients == patient) for patient in range(120)]
    drawn = []
    for _ in range(600):
        chosen = np.concatenate([rows[patient] for patient in rng.integers(0, 120, 120)])
        drawn.append(roc_auc_score(is_class[chosen], values[chosen]))
    clustered = compare_groups(values, is_class, patients)
    assert clustered.variance**0.5 == pytest.approx(np.std(drawn), rel=0.1)
    assert compare_groups(values, is_class, np.arange(len(values))).variance < 0.5 * clustered.variance


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_the_variance_counts_that_a_patient_s_scans_of_both_kinds_go_together(sign: int) -> None:
    """Every patient has scans of the class and of the rest, told apart in some and the wrong way round in others.

    With `sign` -1 both kinds are high in the same patients instead: the covariance is then below 0.
    """
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(80), 12)
    is_class = np.tile(np.arange(12) % 2 == 0, 80)
    of_patient = rng.normal(size=80)[patients]
    values = of_patient * np.where(is_class, 1, -sign) + 0.3 * rng.normal(size=len(patients))
    rows = patients.reshape(80, 12) * 12 + np.arange(12)
    drawn = []
    for _ in range(600):
        chosen = rows[rng.integers(0, 80, 80)].ravel()
        drawn.append(roc_auc_score(is_class[chosen], values[chosen]))
    deviation = compare_groups(values, is_class, patients).variance ** 0.5
    floor = (161 / (12 * 80 * 80)) ** 0.5
    if sign > 0:
        assert deviation == pytest.approx(np.std(drawn), rel=0.1)
        assert deviation > 1.3 * floor
    else:
        assert np.std(drawn) < 0.3 * floor
        assert deviation == pytest.approx(floor, rel=0.01)


def test_a_hand_counted_variance_of_two_patients_with_both_kinds() -> None:
    """Patient 0 has 4 in the class and 1 in the rest, patient 1 has 2 in the class and 3 in the rest. Of the pairs
    (4, 1), (4, 3), (2, 1), (2, 3) three are won: 3 / 4. Shares of pairs won: 4 has 1, 2 has 1/2, 1 has 1, 3 has 1/2.
    So a patient deviates by +-(1/4 / 2) in both kinds: each of the terms, the doubled product too, is 2 / 64 or
    4 / 64, times 2 / (2 - 1) for two patients.
    """
    values, is_class = np.array([4.0, 1, 2, 3]), np.array([True, False, True, False])
    found = compare_groups(values, is_class, np.array([0, 0, 1, 1]))
    assert found.auc == 3 / 4
    assert found.variance == pytest.approx(2 * (2 / 64 + 2 / 64 + 4 / 64))


def test_a_level_or_a_histogram_that_tells_the_class_is_found_on_other_patients() -> None:
    rng = np.random.default_rng(0)
    diagnoses, patients = make_patients(60)
    site = np.where(diagnoses == "CP", "b", rng.choice(["a", "c"], len(diagnoses)))
    levels = encode_levels(site.tolist())
    assert levels is not None
    histogram = rng.dirichlet(np.ones(16), len(diagnoses))
    histogram[diagnoses == "Normal", 3] += 1
    features = [Feature("site", "table", levels), Feature("histogram", "images", histogram)]
    found = {(item.feature, item.diagnosis): item for item in find_shortcuts(features, diagnoses, patients, 0)}
    assert found["site", "CP"].auc == 1
    assert found["site", "CP"].direction == "fitted"
    assert found["histogram", "Normal"].auc > 0.95
    assert found["site", "CP"].is_beyond_chance


def test_a_site_coded_as_a_number_tells_a_diagnosis_without_being_higher_or_lower() -> None:
    """Site 2 exactly where NCP is, 1 or 3 otherwise: as a number its AUC is a coin's."""
    rng = np.random.default_rng(0)
    diagnoses, patients = make_patients(600, scans_each=1)
    site = np.where(diagnoses == "NCP", 2.0, rng.choice([1.0, 3.0], 600))
    assert roc_auc_score(diagnoses == "NCP", site) == pytest.approx(0.5, abs=0.05)
    found = {item.diagnosis: item for item in find_shortcuts([Feature("site", "table", site)], diagnoses, patients, 0)}
    assert (found["NCP"].auc, found["NCP"].direction, found["NCP"].is_beyond_chance) == (1.0, "fitted", True)
    assert len(found) == 3


def test_a_count_that_is_in_the_middle_for_one_diagnosis_is_found_in_parts_of_equal_size() -> None:
    rng = np.random.default_rng(1)
    diagnoses, patients = make_patients(300, scans_each=2)
    slices = rng.normal(100, 30, len(diagnoses))
    slices[diagnoses == "NCP"] = rng.normal(100, 5, (diagnoses == "NCP").sum())
    found = {
        item.diagnosis: item
        for item in find_shortcuts([Feature("slices", "table", slices.round())], diagnoses, patients, 0)
    }
    assert roc_auc_score(diagnoses == "NCP", slices) == pytest.approx(0.5, abs=0.05)
    truth = roc_auc_score(diagnoses == "NCP", -np.abs(slices - 100))
    assert found["NCP"].auc == pytest.approx(truth, abs=0.08)
    assert found["NCP"].is_beyond_chance


def test_the_plain_direction_is_told_where_parts_tell_no_more() -> None:
    rng = np.random.default_rng(2)
    diagnoses, patients = make_patients(120)
    values = rng.normal(size=len(diagnoses)) + 1.5 * (diagnoses == "CP")
    found = {item.diagnosis: item for item in find_shortcuts([Feature("x", "table", values)], diagnoses, patients, 0)}
    assert found["CP"].direction == "higher"
    assert found["CP"].auc == pytest.approx(roc_auc_score(diagnoses == "CP", values), abs=1e-4)


def test_numbers_become_one_column_a_value_or_ten_of_equal_size() -> None:
    few = encode_numbers(np.array([3.0, -1, 7, 3]))
    assert few is not None
    assert few.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    many = encode_numbers(np.random.default_rng(0).permutation(100).astype(float))
    assert many is not None
    assert many.sum(axis=0).tolist() == [10] * 10
    assert encode_numbers(np.array([0.0, 1, 1])) is None
    assert encode_numbers(np.array([])) is None


def test_scans_without_a_value_are_left_out_of_its_auc() -> None:
    diagnoses, patients = make_patients(30, scans_each=1)
    values = np.where(diagnoses == "CP", 1.0, 0.0)
    values[:9] = np.nan
    found = find_shortcuts([Feature("x", "table", values)], diagnoses, patients, 0)
    assert {(item.num_scans, item.num_patients) for item in found} == {(21, 21)}
    assert found[0].auc == 1


def test_a_constant_feature_or_a_lonely_diagnosis_is_no_shortcut() -> None:
    diagnoses, patients = make_patients(30)
    assert find_shortcuts([Feature("x", "table", np.ones(90))], diagnoses, patients, 0) == []
    assert find_shortcuts([Feature("x", "table", np.arange(3.0))], ["CP"] * 3, ["1", "2", "3"], 0) == []


def test_names_and_dates_are_no_category() -> None:
    assert encode_levels(["a"] * 5) is None
    assert encode_levels([str(number) for number in range(MAX_LEVELS + 1)]) is None
    levels = encode_levels(["b", "a", "b"])
    assert levels is not None
    assert levels.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_the_border_is_the_outermost_thirty_second_of_each_slice() -> None:
    voxels = np.full((2, 64, 64), 200, np.uint8)
    voxels[0, :2] = 0  # 2 rows of 64; the border is 2 voxels wide: 64 * 64 - 60 * 60 = 496 of each slice
    voxels[:, 2:-2, 2:-2] = 77
    border = measure_border(voxels)
    assert border["border_zero_share"] == pytest.approx(128 / 992)
    assert border["border_mean"] == pytest.approx(200 * (1 - 128 / 992))
    assert border["border_histogram"][[0, 12]].tolist() == pytest.approx([128 / 992, 1 - 128 / 992])
    assert border["zero_share"] == pytest.approx(128 / (2 * 64 * 64))
