"""Temperature scaling: a known temperature is found again, and sharpness alone changes."""

import numpy as np
import pytest
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


def test_no_temperature_of_a_grid_makes_the_labels_likelier() -> None:
    logits, labels = _draw(1.7, 300)

    def likelihood(temperature: float) -> float:
        return float(np.log(softmax(logits / temperature, axis=1)[np.arange(300), labels]).mean())

    best = likelihood(fit_temperature(logits, labels))
    assert best >= max(likelihood(temperature) for temperature in np.geomspace(*TEMPERATURES, 500)) - 1e-12


def test_a_faultless_network_gets_the_lowest_temperature() -> None:
    assert fit_temperature(np.eye(3), np.arange(3)) == pytest.approx(TEMPERATURES[0], rel=1e-3)


def test_no_scans_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="at least one scan"):
        fit_temperature(np.empty((0, 3)), np.empty(0, int))
