"""Curves and tables as pictures for a light page: arrays of an evaluation enter, matplotlib figures leave."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from darnet.metrics import NCP_LABEL, LabelArray, Reliability
from darnet.page import COLOURS
from darnet.scan import DIAGNOSES, FloatArray

SIZE = (4.8, 4.8)  # inches, of every figure: they stand side by side
SOFT = "#57606a"
CORNER = 0.2  # share of both axes that is enlarged
INSET = (0.47, 0.12, 0.5, 0.5)  # where, in shares of the picture: below any curve better than chance
DASHES = ("-", "--", "-.", ":")  # beside the colour, where curves lie on each other
FEW_IN_BIN = 10  # scans; Source: ours: with fewer the interval covers half the picture
WIDE_RANGE = 50  # times the least value; Source: ours: on a linear axis the lower half would be a line
NUM_COLUMNS = 20  # of a histogram of probabilities


def draw_roc(curve: tuple[FloatArray, FloatArray], band: tuple[FloatArray, FloatArray, FloatArray]) -> Figure:
    """The NCP curve in its band; inside, the upper left corner enlarged, if the curve comes there.

    Shape: `curve` false and true positive rates (T,); `band` false positive rates, lower and upper ends (points,).
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    whole = figure.subplots()
    is_good = np.interp(CORNER, *curve) > 1 - CORNER
    corner = [whole.inset_axes(INSET, xlim=(0, CORNER), ylim=(1 - CORNER, 1.005))] if is_good else []
    for axis in (whole, *corner):
        axis.fill_between(*band, color=COLOURS[0], alpha=0.25, linewidth=0)
        axis.plot(*curve, color=COLOURS[0], linewidth=1.8)
        axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
    whole.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    for axis in corner:
        axis.set(xticks=(0, CORNER), yticks=(1 - CORNER, 1))
    _dress(whole, "1 − specificity", "sensitivity")
    return figure


def draw_rocs(curves: Mapping[str, tuple[FloatArray, FloatArray]]) -> Figure:
    """The NCP curves of several networks; inside, the upper left corner enlarged, if a curve comes there.

    Shape: false and true positive rates (T,) each.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    whole = figure.subplots()
    is_good = any(np.interp(CORNER, *curve) > 1 - CORNER for curve in curves.values())
    corner = [whole.inset_axes(INSET, xlim=(0, CORNER), ylim=(1 - CORNER, 1.005))] if is_good else []
    for axis in (whole, *corner):
        for (name, curve), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
            axis.plot(*curve, color=colour, linewidth=1.8, linestyle=dash, label=name)
        axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
    whole.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    whole.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), frameon=False, fontsize=9)
    for axis in corner:
        axis.set(xticks=(0, CORNER), yticks=(1 - CORNER, 1))
    _dress(whole, "1 − specificity", "sensitivity")
    return figure


def draw_histories(histories: Mapping[str, pd.DataFrame], column: str, label: str) -> Figure:
    """A quantity over the epochs of each network: mean over its folds, within the range of the folds.

    `histories` have one row an epoch and fold, with `epoch`, `fold` and `column`.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for (name, history), colour, dash in zip(histories.items(), COLOURS, DASHES, strict=False):
        by_epoch = history.groupby("epoch")[column]
        epochs, mean = by_epoch.mean().index.to_numpy(float) + 1, by_epoch.mean().to_numpy(float)
        low, high = by_epoch.min().to_numpy(float), by_epoch.max().to_numpy(float)
        axis.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.plot(epochs, mean, color=colour, linewidth=1.8, linestyle=dash, label=name)
    if axis.dataLim.ymin > 0 and axis.dataLim.ymax > WIDE_RANGE * axis.dataLim.ymin:  # one bad epoch flattens the rest
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(histories), frameon=False, fontsize=9)
    _dress(axis, "epoch", label)
    return figure


def draw_reliability(reliability: Reliability) -> Figure:
    """Accuracy against confidence of each bin that holds a scan, with Wilson's 95% intervals, above its scans.

    Bins of fewer than `FEW_IN_BIN` scans are pale.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    is_full = reliability.num_scans > 0
    num_scans, confidence, accuracy = (
        values[is_full] for values in (reliability.num_scans, reliability.confidence, reliability.accuracy)
    )
    low, high = np.array([_wilson(share * total, total) for share, total in zip(accuracy, num_scans, strict=True)]).T
    axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":", label="calibrated")
    reach = np.clip([accuracy - low, high - accuracy], 0, 1)
    for is_drawn, alpha in ((num_scans >= FEW_IN_BIN, 1.0), (num_scans < FEW_IN_BIN, 0.3)):
        places = confidence[is_drawn], accuracy[is_drawn], reach[:, is_drawn]
        axis.errorbar(*places, color=COLOURS[0], alpha=alpha, marker="o", markersize=4, linestyle="", capsize=2)
    axis.set(xlim=(0.3, 1.02), ylim=(-0.02, 1.02))
    axis.legend(loc="lower right", frameon=False)
    _dress(axis, "", "share called rightly")
    below.bar(confidence, num_scans, width=0.03, color=COLOURS[0])
    below.set_yscale("symlog", linthresh=1)
    below.set_ylim(bottom=0)
    _dress(below, "probability of the called class", "scans")
    return figure


def draw_confusion(confusion: FloatArray) -> Figure:
    """Counts and shares of the row, darker where the share is larger.

    Shape: (3, 3), true class by called class.
    """
    names = [str(diagnosis) for diagnosis in DIAGNOSES]
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros_like(confusion), where=totals > 0)
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        ink = "white" if shares[row, column] > 0.5 else "black"
        text = f"{count:.0f}\n{shares[row, column]:.1%}"
        axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=11)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="called", ylabel="true")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def draw_distributions(probabilities: FloatArray, labels: LabelArray) -> Figure:
    """How the NCP probability is spread among the scans of each true class.

    Shape: (N, 3), (N,).
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes: Sequence[Axes] = figure.subplots(len(DIAGNOSES), 1, sharex=True)
    for label, axis in enumerate(axes):
        values = probabilities[labels == label, NCP_LABEL]
        axis.hist(values, bins=np.linspace(0, 1, NUM_COLUMNS + 1).tolist(), color=COLOURS[label])
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=0)
        axis.set_title(f"true class {DIAGNOSES[label]}: {len(values)} scans", fontsize=10, loc="left")
        _dress(axis, "", "scans")
    axes[-1].set_xlabel("probability of NCP")
    return figure


def draw_shift(tonight: FloatArray, earlier: FloatArray) -> Figure:
    """How each class's probability is spread among tonight's scans, filled, and among those of earlier nights, a line.

    Shape: (N, 3), (M, 3); shares of the scans, so that nights of any size lie over each other.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes: Sequence[Axes] = figure.subplots(len(DIAGNOSES), 1, sharex=True)
    bins = np.linspace(0, 1, NUM_COLUMNS + 1)
    for label, axis in enumerate(axes):
        axis.stairs(_share_bins(tonight[:, label], bins), bins, fill=True, color=COLOURS[label], alpha=0.6)
        if len(earlier):
            axis.stairs(_share_bins(earlier[:, label], bins), bins, color="black", linewidth=1.2)
        axis.set_title(f"probability of {DIAGNOSES[label]}", fontsize=10, loc="left")
        _dress(axis, "", "share")
    return figure


def _share_bins(values: FloatArray, bins: FloatArray) -> FloatArray:
    shares: FloatArray = np.histogram(values, bins)[0] / len(values)
    return shares


def draw_nights(nights: Sequence[str], shares: FloatArray) -> Figure:
    """The share of each class among the scans of each night, the last one marked.

    Shape: (nights, 3).
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for label, name in enumerate(DIAGNOSES):
        axis.plot(shares[:, label], color=COLOURS[label], linewidth=1.8, marker=".", label=str(name))
        axis.plot(len(nights) - 1, shares[-1, label], color=COLOURS[label], marker="o", markersize=8)
    step = max(1, len(nights) // 5)
    axis.set_xticks(range(len(nights))[::-step], nights[::-step], rotation=30, ha="right")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="upper left", frameon=False, ncols=3)
    _dress(axis, "night", "share of the scored scans")
    return figure


def _wilson(num_right: float, num_scans: float) -> tuple[float, float]:
    from scipy.stats import binomtest  # here: it takes long to import, and a night draws nothing that needs it

    interval = binomtest(round(num_right), round(num_scans)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _dress(axis: Axes, across: str, upwards: str) -> None:
    axis.set(xlabel=across, ylabel=upwards)
    axis.spines[["top", "right"]].set_visible(False)
