"""What Shi et al. print about their data and networks, as data: nothing enters, numbers leave.

Source: paper Tables 1 to 3: CC-CCII test cohort of 472 scans, mean and standard deviation over five fold models. None
of it was measured here. Table 3 prints the parameters of DA and DA+CA the wrong way round; its metrics are as printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

CITATION = "Shi et al., Dual-Attention Residual Network for Automatic Diagnosis of COVID-19"
NUM_TEST_SCANS = 472


TABLE_1 = {
    "train": {"NCP": 1320, "CP": 1328, "Normal": 952},
    "test": {"NCP": 169, "CP": 177, "Normal": 126},
}
"""Cohort -> diagnosis -> scans."""


@dataclass(frozen=True, slots=True)
class PrintedMetric:
    """Mean and standard deviation over the five folds, as printed."""

    mean: float
    std: float


NETWORKS = ("ResNet18", "CA", "DA", "DA+CA")
MODEL_NAMES = dict(zip(("darnet-plain", "darnet-ca", "darnet-da", "darnet-da-ca"), NETWORKS, strict=True))
"""What the paper calls each of our models."""
DEPTH_PAIRS = (("DA", "ResNet18"), ("DA+CA", "CA"))
"""What depth attention adds, without and with channel attention. Source: sec. 4.4 and 4.5"""
PARAMETERS = dict(zip(NETWORKS, (33.15, 33.24, 35.24, 35.15), strict=True))
"""Millions, as printed: DA and DA+CA the wrong way round."""
_PRINTED = {
    "auc_ncp": ((0.9890, 0.0045), (0.9930, 0.0014), (0.9892, 0.0027), (0.9900, 0.0016)),
    "accuracy_3class": ((0.9250, 0.0219), (0.9385, 0.0113), (0.9407, 0.0095), (0.9470, 0.0054)),
    "sensitivity_ncp": ((0.9124, 0.0597), (0.9373, 0.0123), (0.9243, 0.0164), (0.9373, 0.0090)),
    "specificity_ncp": ((0.9881, 0.0098), (0.9908, 0.0118), (0.9901, 0.0040), (0.9828, 0.0137)),
    "f1_ncp": ((0.9429, 0.0288), (0.9648, 0.0126), (0.9518, 0.0074), (0.9526, 0.0072)),
}
TABLE_3 = {
    metric: {network: PrintedMetric(*values) for network, values in zip(NETWORKS, row, strict=True)}
    for metric, row in _PRINTED.items()
}
"""Metric -> network -> what is printed."""


@dataclass(frozen=True, slots=True)
class OtherMethod:
    """A column of Table 2 that is of other people's method, on other scans of CC-CCII; what has none is not printed."""

    name: str
    num_test_scans: int
    metrics: Mapping[str, float]


OTHER_METHODS = (
    OtherMethod(
        "Zhang et al. 2020 [25]",
        389,
        {"auc_ncp": 0.9797, "accuracy_3class": 0.9249, "sensitivity_ncp": 0.9493, "specificity_ncp": 0.9113},
    ),
    OtherMethod(
        "Jin et al. 2020 [12]", 3784, {"auc_ncp": 0.9212, "sensitivity_ncp": 0.7799, "specificity_ncp": 0.9355}
    ),
    OtherMethod(
        "He et al. 2020 [10]",
        798,
        {
            "auc_ncp": 0.9400,
            "accuracy_3class": 0.8863,
            "sensitivity_ncp": 0.8609,
            "specificity_ncp": 0.9435,
            "f1_ncp": 0.8814,
        },
    ),
)
"""In the order of Table 2; the paper does not say of each over which classes its accuracy was taken."""
