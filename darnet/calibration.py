"""Probabilities that mean what they say: validation logits and their true labels enter, one temperature leaves."""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from darnet.metrics import LabelArray
from darnet.scan import FloatArray

TEMPERATURES = (0.05, 20.0)  # Source: ours; networks of this kind end between 1 and 3


def fit_temperature(logits: FloatArray, labels: LabelArray) -> float:
    """The temperature whose division of the logits makes these labels likeliest; decisions stay as they are.

    Fit it on validation scans, never on those it is reported on. Where every scan is called rightly a lower
    temperature is always better: then the answer is the lowest of `TEMPERATURES`.
    Shape:  (N, 3), (N,).
    Raises: ValueError without scans.
    Source: Guo et al. 2017, sec. 4.2.
    """
    if not len(labels):
        raise ValueError("a temperature needs at least one scan")

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
