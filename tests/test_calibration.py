"""Temperature scaling: a known temperature is found again, and sharpness alone changes."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import softmax

from darnet.calibration import TEMPERATURES, fit_temperature
from darnet.metrics import ece_3class


def _draw(temperature: float, num_scans: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for the labels drawn from them."""
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 2, (num_scans, 3))
    labels = (softmax(truth, axis=1).cumsum(axis=1) < rng.random((num_scans, 1))).sum(axis=1)
    return truth * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    logits, labels = _draw(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    assert ece_3class(softmax(logits / found, axis=1), labels) < 0.01


def test_no_temperature_of_a_grid_is_likelier() -> None:
    logits, labels = _draw(1.7, 300)

    def likelihood(temperature: float) -> float:
        of_labels = np.log(softmax(logits / temperature, axis=1)[np.arange(300), labels]).sum()
        return float(of_labels + scipy.stats.norm.logpdf(np.log(temperature), 0, 0.5))

    best = likelihood(fit_temperature(logits, labels))
    assert best >= max(likelihood(temperature) for temperature in np.geomspace(*TEMPERATURES, 500)) - 1e-9


def test_a_faultless_network_is_not_made_surer() -> None:
    assert fit_temperature(np.eye(3), np.arange(3)) == 1
    assert fit_temperature(np.tile([9.0, 0, 0], (40, 1)), np.zeros(40, int)) == 1


def _measure_brier(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(((softmax(logits, axis=1) - np.eye(3)[labels]) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("sharpness", "num_scans"), [(3, 30), (6, 12), (6, 30), (9, 30)])
def test_other_scans_are_not_worse_off_for_a_temperature(sharpness: float, num_scans: int, temperature: float) -> None:
    """Networks of 82, 97 and 99.7% accuracy, too sure or not, most of the latter without an error in few scans."""
    rng, worsened = np.random.default_rng(5), []

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.normal(0, 1.5, (number, 3)) + sharpness * np.eye(3)[rng.integers(0, 3, number)]
        labels = (softmax(truth, axis=1).cumsum(axis=1) < rng.random((number, 1))).sum(axis=1)
        return truth * temperature, labels

    others, their_labels = draw(4000)
    for _ in range(30):
        found = fit_temperature(*draw(num_scans))
        worsened.append(_measure_brier(others / found, their_labels) - _measure_brier(others, their_labels))
    assert np.mean(worsened) < 0.004
    assert np.max(worsened) < 0.03


def test_no_scans_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="at least one scan"):
        fit_temperature(np.empty((0, 3)), np.empty(0, int))
