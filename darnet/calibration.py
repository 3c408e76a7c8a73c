"""Probabilities that mean what they say: validation logits and their true labels enter, one temperature leaves."""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from darnet.metrics import LabelArray
from darnet.scan import FloatArray

TEMPERATURES = (0.05, 20.0)  # Source: ours; networks of this kind end between 1 and 3
# Of the natural logarithm of the temperature, before a scan is seen. Source: ours: two in three networks within 0.6 and
# 1.6. Without it few scans call for extremes.
PRIOR_STD = 0.5


def fit_temperature(logits: FloatArray, labels: LabelArray) -> float:
    """The temperature whose division of the logits is likeliest given these labels; decisions stay as they are.

    Fit it on validation scans, never on those it is reported on. Where every scan is called rightly the labels are the
    likelier the lower the temperature, whatever the network: then it is never below 1, as no error was seen that could
    tell how sure the network may be.
    Shape:  (N, 3), (N,).
    Raises: ValueError without scans.
    Source: Guo et al. 2017, sec. 4.2; ours: the prior. Platt's smoothed targets (1999) take all certainty from a good
            network whose classes have few scans: for 30 scans they raised the Brier score of others by 0.05.
    """
    if not len(labels):
        raise ValueError("a temperature needs at least one scan")

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].sum()) + (log_temperature / PRIOR_STD) ** 2 / 2

    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    is_faultless = bool((logits.argmax(axis=1) == labels).all())
    return max(1.0, math.exp(float(found.x))) if is_faultless else math.exp(float(found.x))
