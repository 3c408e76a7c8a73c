"""Intervals and tests against slow loops over pairs, hand-summed binomials and cases of known coverage."""

import math
import time

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from darnet.auditing.shortcuts import compare_groups
from darnet.evaluation.comparisons import (
    AucEstimate,
    compare_aucs,
    compare_decisions,
    compare_folds,
    correct_holm,
    delong_auc,
    judge_p,
)
from darnet.evaluation.intervals import (
    bootstrap_differences,
    bootstrap_intervals,
    bootstrap_recalls,
    bootstrap_roc,
    measure_cohort_variance,
    resample_scans,
    take_interval,
)
from darnet.evaluation.paper import TABLE_3
from darnet.metrics import compute_all_metrics


def _draw(seed: int, num_scans: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the labels; rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num_scans)
    logits = rng.normal(0, 1, (num_scans, 3)) + sharpness * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities.round(2), labels


def _win(one: float, other: float) -> float:
    return 1.0 if one > other else 0.5 if one == other else 0.0


def _loop_components(probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[float], list[float]]:
    """DeLong's V10 and V01 as printed: means over all pairs."""
    ncp = [row[1] for row, label in zip(probabilities, labels, strict=True) if label == 1]
    rest = [row[1] for row, label in zip(probabilities, labels, strict=True) if label != 1]
    first = [sum(_win(x, y) for y in rest) / len(rest) for x in ncp]
    second = [sum(_win(x, y) for x in ncp) / len(ncp) for y in rest]
    return first, second


def _loop_covariance(ours: list[float], theirs: list[float]) -> float:
    mean, other_mean = sum(ours) / len(ours), sum(theirs) / len(theirs)
    products = [(one - mean) * (other - other_mean) for one, other in zip(ours, theirs, strict=True)]
    return sum(products) / (len(ours) - 1) / len(ours)


@pytest.mark.parametrize("seed", range(3))
def test_delong_equals_the_loop_over_all_pairs(seed: int) -> None:
    probabilities, labels = _draw(seed, 60)
    first, second = _loop_components(probabilities, labels)
    variance = _loop_covariance(first, first) + _loop_covariance(second, second)
    found = delong_auc(probabilities, labels)
    assert found.auc == pytest.approx(sum(first) / len(first), abs=1e-12)
    assert found.variance == pytest.approx(variance, abs=1e-12)
    assert found.interval.low == pytest.approx(found.auc - 1.959964 * math.sqrt(variance), abs=1e-6)
    assert found.interval.high == pytest.approx(min(1, found.auc + 1.959964 * math.sqrt(variance)), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_paired_test_equals_the_loop_with_covariances(seed: int) -> None:
    first, labels = _draw(seed, 60)
    second = _draw(seed, 60, 0.5)[0]
    ours, theirs = _loop_components(first, labels), _loop_components(second, labels)
    variance = sum(
        _loop_covariance(a, a) + _loop_covariance(b, b) - 2 * _loop_covariance(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )
    found = compare_aucs(first, second, labels)
    z = (sum(ours[0]) / len(ours[0]) - sum(theirs[0]) / len(theirs[0])) / math.sqrt(variance)
    assert found.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=1e-12)
    assert found.difference == pytest.approx(
        roc_auc_score(labels == 1, first[:, 1]) - roc_auc_score(labels == 1, second[:, 1])
    )
    assert found.interval.low + found.interval.high == pytest.approx(2 * found.difference)
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.959964 * math.sqrt(variance), abs=1e-6)


def test_a_model_does_not_differ_from_itself() -> None:
    probabilities, labels = _draw(0, 50)
    assert (compare_aucs(probabilities, probabilities, labels).p_value) == 1
    assert compare_decisions(probabilities, probabilities, labels).p_value == 1
    differences = bootstrap_differences(
        probabilities, probabilities, labels, resample_scans(50, None, np.random.default_rng(0), 100)
    )
    calibration = differences.pop("ece_3class")  # bounded for each model by itself
    assert {(item.low, item.high) for item in differences.values()} == {(0, 0)}
    assert calibration.low < 0 < calibration.high


@pytest.mark.parametrize("labels", [[0, 2, 0, 2], [1, 1, 1, 1], [1, 0, 2, 0]])
def test_delong_is_undefined_with_fewer_than_two_scans_of_a_kind(labels: list[int]) -> None:
    probabilities = _draw(0, 4)[0]
    found = delong_auc(probabilities, np.array(labels))
    assert math.isnan(found.variance)
    assert math.isnan(found.interval.low)
    assert math.isnan(found.auc) == (len(set(labels)) == 1 or 1 not in labels)
    assert math.isnan(compare_aucs(probabilities, probabilities, np.array(labels)).p_value)


def test_delong_holds_the_true_auc_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    truth = float(scipy.stats.norm.cdf(1 / math.sqrt(2)))  # two normals of distance 1
    labels = np.repeat([1, 0], 60)

    def estimate() -> AucEstimate:
        scores = rng.normal(labels == 1, 1)
        return delong_auc(np.stack([-scores, scores, 0 * scores], axis=1), labels)

    intervals = [estimate().interval for _ in range(600)]
    assert 0.92 < np.mean([item.low <= truth <= item.high for item in intervals]) < 0.98


def test_mcnemar_equals_the_sum_of_binomial_terms() -> None:
    # Right: first 0 1 2 3 4 5 6 7 8 and 9 wrong; second wrong on 0 to 6, right on 7, 8, 9.
    labels = np.zeros(10, int)
    first, second = np.tile([0.8, 0.1, 0.1], (10, 1)), np.tile([0.8, 0.1, 0.1], (10, 1))
    first[9], second[:7] = [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]
    found = compare_decisions(first, second, labels)
    assert (found.num_only_first_right, found.num_only_second_right) == (7, 1)
    assert found.p_value == pytest.approx(2 * (math.comb(8, 0) + math.comb(8, 1)) / 2**8)


def _draw_alike(rng: np.random.Generator, num_patients: int, scans_each: int) -> tuple[np.ndarray, ...]:
    """Two networks that are equally good, and each scan's label and patient; a patient's scans are alike."""
    labels = np.repeat(np.arange(num_patients) % 3, scans_each)
    shared = rng.normal(0, 1, (num_patients, 3)) + 1.2 * np.eye(3)[labels[::scans_each]]
    networks = []
    for _ in range(2):
        patient = shared + rng.normal(0, 0.7, (num_patients, 3))
        logits = np.repeat(patient, scans_each, axis=0) + rng.normal(0, 0.3, (len(labels), 3))
        networks.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return *networks, labels, np.repeat([f"p{number}" for number in range(num_patients)], scans_each)


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [45, pytest.param(120, marks=pytest.mark.slow)])
def test_clustered_tests_show_a_difference_that_is_none_in_five_of_a_hundred(num_patients: int) -> None:
    """Four scans a patient; the plain tests show one in a quarter of the studies."""
    rng, shown = np.random.default_rng(8), []
    for _ in range(400):
        first, second, labels, patients = _draw_alike(rng, num_patients, 4)
        aucs = compare_aucs(first, second, labels, patients.tolist())
        decisions = compare_decisions(first, second, labels, patients.tolist())
        tests = (aucs.clustered_p_value, decisions.clustered_p_value, aucs.p_value, decisions.p_value)
        shown.append([p_value < 0.05 for p_value in tests])
    by_patient, plain = np.mean(shown, axis=0)[:2], np.mean(shown, axis=0)[2:]
    assert (by_patient < 0.08).all(), by_patient  # 2.7 standard errors of 400 studies above 0.05
    assert by_patient[0] > 0.02
    assert (plain > 0.12).all(), plain


def test_with_one_scan_a_patient_the_clustered_tests_are_delongs_and_mcnemars() -> None:
    first, labels = _draw(0, 60)
    second = _draw(0, 60, 0.5)[0]
    patients = [f"p{number}" for number in range(60)]
    for whose in (None, patients):
        aucs, decisions = compare_aucs(first, second, labels, whose), compare_decisions(first, second, labels, whose)
        assert aucs.clustered_p_value == pytest.approx(aucs.p_value)
        assert aucs.clustered_interval.low == pytest.approx(aucs.interval.low)
        assert decisions.clustered_p_value == pytest.approx(decisions.p_value)


def test_copies_of_scans_change_no_clustered_p() -> None:
    first, labels = _draw(0, 40)
    second = _draw(0, 40, 0.5)[0]
    patients = [f"p{number // 3}" for number in range(40)]
    copied = [np.repeat(values, 5, axis=0) for values in (first, second, labels)]
    whose = np.repeat(patients, 5).tolist()
    assert compare_aucs(*copied, whose).clustered_p_value == pytest.approx(
        compare_aucs(first, second, labels, patients).clustered_p_value
    )
    assert compare_decisions(*copied, whose).clustered_p_value == pytest.approx(
        compare_decisions(first, second, labels, patients).clustered_p_value
    )


def test_the_clustered_auc_variance_is_that_of_the_audit() -> None:
    """Against a second network that knows nothing, whose components are all 1/2, it is that of the first alone."""
    first, labels = _draw(5, 90, 0.0)  # of a variance above the floor that the audit has besides
    patients = [f"p{number // 2}" for number in range(90)]
    found = compare_aucs(first, np.full((90, 3), 1 / 3), labels, patients)
    groups = np.unique(patients, return_inverse=True)[1]
    known = compare_groups(first[:, 1], labels == 1, groups)
    assert found.difference == pytest.approx(known.auc - 0.5)
    reach = found.clustered_interval.high - found.difference
    assert reach == pytest.approx(1.959964 * math.sqrt(known.variance), rel=1e-5)


def test_the_clustered_decision_test_equals_scipys_over_all_signs() -> None:
    first, labels = _draw(5, 36)
    second = _draw(5, 36, 0.6)[0]
    patients = np.repeat(np.arange(12), 3)
    sums = np.bincount(patients, (first.argmax(axis=1) == labels).astype(float) - (second.argmax(axis=1) == labels))
    expected = scipy.stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    found = compare_decisions(first, second, labels, [str(number) for number in patients])
    assert found.clustered_p_value == pytest.approx(expected.pvalue)
    assert 0 < found.clustered_p_value < 1


def test_one_patient_of_a_kind_shows_no_difference_of_aucs() -> None:
    first, labels = _draw(1, 30)
    patients = ["one" if label == 1 else f"p{number}" for number, label in enumerate(labels)]
    found = compare_aucs(first, _draw(1, 30, 0.2)[0], labels, patients)
    assert math.isnan(found.clustered_p_value)
    assert not math.isnan(found.p_value)


def test_two_wrong_decisions_of_different_kind_are_not_discordant() -> None:
    first, second = np.array([[0.8, 0.1, 0.1]]), np.array([[0.1, 0.8, 0.1]])
    found = compare_decisions(first, second, np.array([2]))
    assert (found.num_only_first_right, found.num_only_second_right, found.p_value) == (0, 0, 1)


@pytest.mark.slow
def test_the_bootstrap_holds_a_known_share_about_as_often_as_it_says() -> None:
    """Accuracy of 150 independent scans that are right with probability 0.8."""
    rng = np.random.default_rng(5)
    labels = np.zeros(150, int)
    is_covered = []
    for _ in range(300):
        probabilities = np.where((rng.random(150) < 0.8)[:, None], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8])
        item = bootstrap_intervals(probabilities, labels, resample_scans(150, None, rng, 300))["accuracy_3class"]
        is_covered.append(item.low <= 0.8 <= item.high)
    assert 0.90 < np.mean(is_covered) < 0.98


def test_patients_of_many_like_scans_widen_the_interval_as_they_should() -> None:
    """Nine copies of a scan tell no more than one: clustering knows it, drawing single scans is 3 times too sure."""
    probabilities, labels = _draw(1, 60)
    copies, copied_labels = np.repeat(probabilities, 9, axis=0), np.repeat(labels, 9)
    patients = [f"p{number // 9}" for number in range(540)]
    widths = {}
    for name, (values, truth, whose) in {
        "single": (probabilities, labels, None),
        "patient": (copies, copied_labels, patients),
        "scan": (copies, copied_labels, None),
    }.items():
        drawn = resample_scans(len(truth), whose, np.random.default_rng(0), 2000)
        item = bootstrap_intervals(values, truth, drawn)["accuracy_3class"]
        widths[name] = item.high - item.low
    assert widths["patient"] == pytest.approx(widths["single"], rel=0.1)
    assert widths["single"] / widths["scan"] == pytest.approx(3, rel=0.15)


def test_a_patient_is_drawn_with_all_scans_or_not_at_all() -> None:
    patients = ["b", "a", "b", "c"]
    drawn = resample_scans(4, patients, np.random.default_rng(0), 50)
    assert drawn.clustered_by == "patient"
    assert (drawn.weights[:, 0] == drawn.weights[:, 2]).all()
    assert (drawn.weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert resample_scans(4, None, np.random.default_rng(0), 50).clustered_by == "scan"


def test_intervals_depend_on_the_seed_alone() -> None:
    probabilities, labels = _draw(2, 80)
    first, again, other = (
        bootstrap_intervals(probabilities, labels, resample_scans(80, None, np.random.default_rng(seed), 200))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    point = compute_all_metrics(probabilities, labels)
    assert all(first[name].low <= point[name] <= first[name].high for name in point)


def test_a_metric_that_too_many_sets_leave_undefined_has_no_interval() -> None:
    values = np.linspace(0, 1, 101)
    values[:5] = np.nan
    assert not math.isnan(take_interval(values).low)
    values[:6] = np.nan
    assert math.isnan(take_interval(values).low)


def test_the_roc_band_holds_the_curve() -> None:
    probabilities, labels = _draw(3, 200)
    rates = np.linspace(0, 1, 11)
    low, high = bootstrap_roc(probabilities, labels, resample_scans(200, None, np.random.default_rng(0), 300), rates)
    assert (low <= high).all()
    assert (low[-1], high[-1]) == (1, 1)
    assert 0.05 < (high - low)[3] < 0.4


def test_two_thousand_sets_of_472_scans_take_seconds() -> None:
    probabilities, labels = _draw(4, 472)
    start_s = time.perf_counter()
    bootstrap_intervals(probabilities, labels, resample_scans(472, None, np.random.default_rng(0)))
    assert time.perf_counter() - start_s < 5


SECOND = np.array([[0.88, 0.91, 0.90, 0.90, 0.92], [0.90, 0.89, 0.90, 0.91, 0.93], [0.88, 0.90, 0.91, 0.92, 0.93]])
FIRST = (
    np.array([[0.02, 0.01, 0.01, 0.03, 0.02], [0.01, 0.01, 0.03, 0.01, 0.02], [0.02, 0.03, 0.01, 0.02, 0.01]]) + SECOND
)
T_14 = 2.144787  # Student's t of 14 degrees of freedom at 0.975


def test_fold_differences_equal_the_t_interval_of_all_pairs_with_the_raised_variance() -> None:
    differences = [0.02, 0.01, 0.01, 0.03, 0.02, 0.01, 0.01, 0.03, 0.01, 0.02, 0.02, 0.03, 0.01, 0.02, 0.01]
    mean = sum(differences) / 15
    variance = sum((value - mean) ** 2 for value in differences) / 14
    error = math.sqrt(variance * (1 / 15 + 1 / 4))
    found = compare_folds(FIRST, SECOND)
    assert (found.num_pairs, found.num_seeds, found.mean) == (15, 3, pytest.approx(mean))
    assert found.interval.low == pytest.approx(mean - T_14 * error)
    assert found.interval.high == pytest.approx(mean + T_14 * error)
    assert found.find_least_shown(1) == pytest.approx(T_14 * error)
    assert (found.verdict, compare_folds(FIRST - 0.01, SECOND).verdict) == ("shown", "not shown")
    assert compare_folds(SECOND, FIRST).mean == pytest.approx(-mean)
    at_the_edge = compare_folds(FIRST - mean + found.find_least_shown(1), SECOND)
    assert at_the_edge.p_value == pytest.approx(0.05)


def test_the_choice_of_test_patients_widens_the_interval_by_its_own_degrees_of_freedom() -> None:
    """As Welch's test of two samples adds two variances, which scipy knows."""
    differences = (FIRST - SECOND).ravel()
    scaled = differences.mean() + (differences - differences.mean()) * math.sqrt(15 * (1 / 15 + 1 / 4))  # same error
    others = np.random.default_rng(0).normal(0, 0.05, 40)
    known = scipy.stats.ttest_ind(scaled, others, equal_var=False)
    reach = np.ptp(known.confidence_interval(0.95)) / 2
    found = compare_folds(FIRST, SECOND, others.var(ddof=1) / 40, cohort_freedom=39).interval
    mean = differences.mean()
    assert (found.low, found.high) == (pytest.approx(mean - reach), pytest.approx(mean + reach))


def test_folds_whose_scans_matter_more_than_luck_make_the_t_interval_of_their_means_with_the_raised_variance() -> None:
    shifted = FIRST + 0.2 + np.array([0.1, -0.1, 0.0, 0.05, -0.05])
    means = (shifted - SECOND).mean(axis=0)
    found = compare_folds(shifted, SECOND)
    raised = means.mean() + (means - means.mean()) * math.sqrt(5 * (1 / 5 + 1 / 4))
    expected = scipy.stats.ttest_1samp(raised, 0)
    interval = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(
    ("shape", "why"),
    [((1, 1), "one fold"), ((1, 5), "one seed"), ((1, 10), "one seed, many folds"), ((2, 5), "two seeds")],
)
def test_too_few_seeds_show_nothing(shape: tuple[int, int], why: str) -> None:
    first = 0.9 + 0.001 * np.random.default_rng(0).normal(size=shape)
    found = compare_folds(first, np.full(shape, 0.1))
    assert found.verdict == "not shown", why
    assert (found.num_pairs, found.num_seeds) == (shape[0] * shape[1], shape[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("fold_effect", [0.0, 1.0, 5.0])
def test_the_fold_interval_covers_whatever_seeds_of_a_fold_have_in_common(num_seeds: int, fold_effect: float) -> None:
    """1,000 studies without a difference; `fold_effect` is in deviations of a pair, and moves a fold of all seeds.

    As in Nadeau & Bengio's model any two folds correlate by a test fold's share of the scans, 1/5.
    """
    rng, zeros = np.random.default_rng(4), np.zeros((num_seeds, 5))
    by_fold = math.sqrt(4 / 5) * rng.normal(size=(1000, 1, 5)) + math.sqrt(1 / 5) * rng.normal(size=(1000, 1, 1))
    pairs = rng.normal(size=(1000, num_seeds, 5)) + fold_effect * by_fold
    intervals = [compare_folds(0.005 * item, zeros).interval for item in pairs]
    assert np.mean([item.low <= 0 <= item.high for item in intervals]) > 0.935


def _draw_study(rng: np.random.Generator, shift: float, num_seeds: int = 3) -> list[float]:
    """Holm's p values of 30 comparisons, the first of which differs by `shift`.

    Every pair deviates by itself by 0.01, as the paper's folds do; 436 test patients move all of them alike.
    """
    cohort_error = 0.25 / math.sqrt(436)
    p_values = []
    for number in range(30):  # six pairs of networks in five metrics
        pairs = shift * (number == 0) + rng.normal(0, 0.01, (num_seeds, 5)) + rng.normal(0, cohort_error)
        found = compare_folds(pairs, np.zeros_like(pairs), cohort_error**2, cohort_freedom=125)
        p_values.append(found.p_value)
    return correct_holm(p_values)


def test_three_seeds_show_a_difference_of_eight_points_among_thirty_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(6)
    assert np.mean([_draw_study(rng, 0.08)[0] < 0.05 for _ in range(30)]) > 0.9
    assert np.mean([min(_draw_study(rng, 0.0)) < 0.05 for _ in range(60)]) <= 0.05


def test_three_seeds_mostly_show_five_points_and_hardly_ever_what_the_paper_claims_of_depth_attention() -> None:
    claimed = TABLE_3["accuracy_3class"]["DA"].mean - TABLE_3["accuracy_3class"]["ResNet18"].mean
    assert claimed == pytest.approx(0.016, abs=5e-4)
    rng = np.random.default_rng(7)
    assert 0.6 < np.mean([_draw_study(rng, 0.05)[0] < 0.05 for _ in range(60)]) < 0.95
    assert np.mean([_draw_study(rng, claimed)[0] < 0.05 for _ in range(60)]) < 0.1


def test_many_seeds_hardly_show_it_either_on_as_many_patients() -> None:
    """The choice of patients stays, however often a network is trained."""
    rng = np.random.default_rng(8)
    assert np.mean([_draw_study(rng, 0.016, num_seeds=20)[0] < 0.05 for _ in range(60)]) < 0.1


def test_no_interval_of_folds_passes_what_a_difference_can_be() -> None:
    item = compare_folds(np.array([[0.9, 0.1], [0.1, 0.8]]), np.array([[0.1, 0.2], [0.9, 0.1]])).interval
    assert (item.low, item.high) == (-1, 1)


def test_pairs_that_do_not_vary_show_nothing() -> None:
    found = compare_folds(np.full((3, 5), 0.93), np.full((3, 5), 0.91))
    assert found.mean == pytest.approx(0.02)
    assert math.isnan(found.interval.low)
    assert found.verdict == "not shown"


def test_the_fold_interval_holds_the_truth_only_with_the_chance_of_the_test_cohort() -> None:
    """1,000 studies of 5 seeds x 5 folds on one cohort each, whose patients move all pairs alike."""
    rng = np.random.default_rng(3)
    is_covered: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(1000):
        pairs = 0.01 + rng.normal(0, 0.03) + rng.normal(0, 0.01, (1, 5)) + rng.normal(0, 0.01, (5, 5))
        for is_told in is_covered:
            item = compare_folds(pairs, np.zeros((5, 5)), 0.03**2 * is_told).interval
            is_covered[is_told].append(item.low <= 0.01 <= item.high)
    assert np.mean(is_covered[True]) > 0.94
    assert np.mean(is_covered[False]) < 0.7


def test_the_cohort_variance_of_an_accuracy_is_the_binomial_one() -> None:
    """Two folds each; the first network is right on 80 of 100 scans, the second on none: p (1 - p) / n."""
    right, wrong = [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]
    labels = np.zeros(100, int)
    first = np.stack([[right] * 80 + [wrong] * 20] * 2)
    second = np.stack([[wrong] * 100] * 2)
    drawn = resample_scans(100, None, np.random.default_rng(0), 4000)
    found = measure_cohort_variance(first, second, labels, drawn)
    assert found["accuracy_3class"] == pytest.approx(0.8 * 0.2 / 100, rel=0.1)
    assert math.isnan(found["auc_ncp"])  # no NCP scan at all
    assert (
        measure_cohort_variance(first, first[::-1], labels, drawn)["accuracy_3class"] == 0
    )  # errors of the same scans


def test_holm_equals_the_steps_by_hand() -> None:
    # In order 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, never below the one before.
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.7, 0.6]) == [1, 1]
    untested, tested = correct_holm([math.nan, 0.03])
    assert math.isnan(untested)
    assert tested == 0.03
    assert correct_holm([]) == []


def test_holm_keeps_false_findings_rare() -> None:
    rng = np.random.default_rng(0)
    tests = rng.random((2000, 6))  # p values of differences that are none
    assert np.mean([min(row) < 0.05 for row in tests]) > 0.2
    assert np.mean([min(correct_holm(row.tolist())) < 0.05 for row in tests]) < 0.065


def test_a_verdict_needs_a_p_below_5_per_cent() -> None:
    assert [judge_p(value) for value in (0.049, 0.05, math.nan)] == ["shown", "not shown", "not shown"]


def test_bootstrap_differences_are_first_minus_second() -> None:
    """The first is right wherever the second is, and on 30 scans more."""
    labels = np.arange(120) % 3
    first = np.eye(3)[labels] * 0.7 + 0.1
    second = first.copy()
    second[:30] = np.roll(second[:30], 1, axis=1)
    drawn = resample_scans(120, None, np.random.default_rng(0), 300)
    item = bootstrap_differences(first, second, labels, drawn)["accuracy_3class"]
    assert 0.1 < item.low < 0.25 < item.high < 0.4
    item = bootstrap_differences(first, second, labels, drawn)["brier_3class"]
    assert item.high < 0


@pytest.mark.parametrize("off", [0.0, 0.05, 0.15])
def test_the_interval_of_the_calibration_error_covers_where_percentiles_do_not(off: float) -> None:
    """Called with 0.45 to 0.95, right with probability less by `off`: that is the true error."""
    rng = np.random.default_rng(2)
    covered, covered_by_percentiles = [], []
    for _ in range(60):
        called = rng.choice([0.45, 0.55, 0.65, 0.75, 0.85, 0.95], 150)
        rest = (1 - called) / 2
        is_right = rng.random(150) < called - off
        probabilities = np.where(
            is_right[:, None], np.stack([called, rest, rest], 1), np.stack([rest, rest, called], 1)
        )
        labels, drawn = np.zeros(150, int), resample_scans(150, None, rng, 200)
        item = bootstrap_intervals(probabilities, labels, drawn)["ece_3class"]
        covered.append(item.low <= off <= item.high)
        percentiles = take_interval(drawn.measure(probabilities, labels)["ece_3class"])
        covered_by_percentiles.append(percentiles.low <= off <= percentiles.high)
    assert np.mean(covered) > 0.9
    assert off > 0.1 or np.mean(covered_by_percentiles) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [15, 36, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("off", "scans_each"), [(0.0, 1), (0.05, 1), (0.1, 1), (0.05, 3)])
def test_the_calibration_error_is_covered_in_few_scans_of_a_sure_network(
    num_patients: int, off: float, scans_each: int
) -> None:
    """Called with 0.7 to 1, mostly near 0.96, right with probability less by `off`; a patient's scans are alike."""
    rng = np.random.default_rng(3)
    num_scans, is_covered = num_patients * scans_each, []
    patients = [str(scan // scans_each) for scan in range(num_scans)]
    for _ in range(80):
        called = np.repeat(1 - 0.3 * rng.beta(1, 6, num_patients), scans_each)
        is_right = np.repeat(rng.random(num_patients), scans_each) < called - off
        rest = (1 - called) / 2
        probabilities = np.where(
            is_right[:, None], np.stack([called, rest, rest], 1), np.stack([rest, rest, called], 1)
        )
        drawn = resample_scans(num_scans, patients, rng, 100)
        item = bootstrap_intervals(probabilities, np.zeros(num_scans, int), drawn)["ece_3class"]
        is_covered.append(item.low <= off <= item.high)
    assert np.mean(is_covered) > 0.9


def test_a_recalls_interval_is_that_of_its_classs_own_share() -> None:
    """NCP's is `sensitivity_ncp`; where half of a class's 40 scans are called rightly, near what a binomial says."""
    labels = np.repeat([0, 1, 2], 40)
    called = labels.copy()
    called[20:40] = 1
    called[60:65] = 2
    probabilities = np.eye(3)[called]
    drawn = resample_scans(120, None, np.random.default_rng(0), 4000)
    found = bootstrap_recalls(probabilities, labels, drawn)
    assert found[1] == bootstrap_intervals(probabilities, labels, drawn)["sensitivity_ncp"]
    low, high = scipy.stats.norm.interval(0.95, 0.5, 0.5 / np.sqrt(40))
    assert (found[0].low, found[0].high) == pytest.approx((low, high), abs=0.03)
    assert (found[2].low, found[2].high) == (1, 1)
