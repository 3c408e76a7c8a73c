"""Whether a night is like the nights before it: this run's rows and those of earlier nights in, a verdict out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from darnet.config import GateConfig
from darnet.errors import Status
from darnet.publishing.rows import PROBABILITIES, is_error
from darnet.scan import FloatArray

INPUTS = ["manufacturer", "intensity", "num_slices", "slice_spacing_mm", "pixel_spacing_mm", "lung_fraction"]
GATE_COLUMNS = ["night", "status", *INPUTS, *PROBABILITIES]
NUM_BINS = 10  # Source: as usual for this index, the deciles of the population that one compares with
PSEUDO_COUNT = 0.5  # Source: ours (Jeffreys' prior); an empty bin would make the index infinite
PSI_MIN_SCANS = 200  # Source: ours; chance alone then gives 0.05 on average, and above 0.25 once in ten million


@dataclass(frozen=True)
class Measure:
    """One gate: what was measured tonight, and the most that passes. NaN, for what cannot be known, passes."""

    gate: str
    value: float
    limit: float
    detail: str

    @property
    def is_breach(self) -> bool:
        """Whether a judged run is held for it."""
        return self.value > self.limit

    def describe(self) -> str:
        """One line for people."""
        return f"{self.gate} {self.value:.3f} (limit {self.limit:.3f}; {self.detail})"


@dataclass(frozen=True)
class Verdict:
    """What the gates say of a run: they measure every one, and judge it unless `unjudged` gives a reason not to.

    `num_repeats` scans are left out: they were tried again, and ended as the table says already.
    """

    measures: tuple[Measure, ...]
    unjudged: str
    num_repeats: int = 0

    @property
    def breaches(self) -> tuple[Measure, ...]:
        """The gates that hold the run; none if it is not judged."""
        return () if self.unjudged else tuple(measure for measure in self.measures if measure.is_breach)

    def describe(self) -> str:
        """One line for a summary."""
        repeats = f"; without {self.num_repeats} scans tried again in vain" if self.num_repeats else ""
        if self.unjudged:
            return f"not judged: {self.unjudged}{repeats}"
        breaches = "; ".join(measure.describe() for measure in self.breaches)
        return (f"held: {breaches}" if breaches else "passed") + repeats


def judge(rows: pd.DataFrame, earlier: pd.DataFrame, config: GateConfig) -> Verdict:
    """Hold a run's rows against those of earlier nights; both with `GATE_COLUMNS`."""
    measures = (_measure_err(rows, config), _measure_bad(rows, earlier, config), *_measure_drift(rows, earlier, config))
    return Verdict(measures, _find_reason_not_to_judge(len(rows), earlier["night"].nunique(), config))


def _find_reason_not_to_judge(num_scans: int, num_nights: int, config: GateConfig) -> str:
    if num_scans < config.gate_min_scans:
        return f"{num_scans} scans, the gates need {config.gate_min_scans}"
    if num_nights < config.gate_min_nights:
        return f"{num_nights} earlier nights, the gates need {config.gate_min_nights}"
    return ""


def _measure_err(rows: pd.DataFrame, config: GateConfig) -> Measure:
    is_err = is_error(rows)
    return Measure("share of ERR", _share(is_err), config.gate_err_share, f"{is_err.sum()} of {len(rows)} scans")


def _measure_bad(rows: pd.DataFrame, earlier: pd.DataFrame, config: GateConfig) -> Measure:
    tonight, before = (_share(frame["status"].str.startswith("BAD_")) for frame in (rows, earlier))
    detail = f"{before:.3f} on earlier nights" if len(earlier) else "no earlier night"
    return Measure("share of BAD", tonight, before + config.gate_bad_rise, detail)


def _measure_drift(rows: pd.DataFrame, earlier: pd.DataFrame, config: GateConfig) -> list[Measure]:
    """The index of each probability and input, among scans that are OK: only these did the network see."""
    tonight, before = (frame[frame["status"] == Status.OK.value] for frame in (rows, earlier))
    detail = f"{len(tonight)} scans against {len(before)}"
    is_enough = min(len(tonight), len(before)) >= min(PSI_MIN_SCANS, config.gate_min_scans)
    return [
        Measure(
            f"PSI of {name}",
            measure_psi(*count_bins(tonight[name], before[name])) if is_enough else np.nan,
            config.gate_psi,
            detail if is_enough else f"{detail}: too few",
        )
        for name in [*PROBABILITIES, *INPUTS]
    ]


def _share(is_so: "pd.Series[bool]") -> float:
    return float(is_so.mean()) if len(is_so) else np.nan


def measure_psi(tonight: FloatArray, earlier: FloatArray) -> float:
    """Population stability index of two histograms over the same bins; 0 if their shares agree.

    Sum over bins of (p - q) ln(p / q), each share taken as (count + 0.5) / (total + 0.5 bins); bins that are empty on
    both sides do not count. Without any shift it is about (bins - 1)(1 / scans tonight + 1 / scans earlier).

    Shape:  (bins,) counts.
    Source: Siddiqi, Credit Risk Scorecards (2006); the added half ours.
    """
    is_used = (tonight > 0) | (earlier > 0)
    raised = [counts[is_used] + PSEUDO_COUNT for counts in (tonight, earlier)]
    p, q = (counts / counts.sum() for counts in raised)
    return float(((p - q) * np.log(p / q)).sum())


def count_bins(tonight: "pd.Series[Any]", earlier: "pd.Series[Any]") -> tuple[FloatArray, FloatArray]:
    """Both columns counted over the same bins: names as they are, numbers by the deciles of the earlier ones.

    A bin begins at its decile and holds it; the outermost are open. A number that is more than one decile, such as a
    hospital's usual slice spacing, has a bin of its own, so that a shift to either side of it shows. Null is a bin.
    """
    if pd.api.types.is_numeric_dtype(earlier.dtype):
        edges = find_edges(earlier.dropna().to_numpy(dtype=np.float64))
        return _count(tonight, edges), _count(earlier, edges)
    names = sorted({"", *tonight.dropna(), *earlier.dropna()})
    return _count_names(tonight, names), _count_names(earlier, names)


def find_edges(values: FloatArray) -> FloatArray:
    """Where the bins of a column begin: at its deciles, and right behind a decile that comes more than once."""
    if not len(values):
        return values
    shares = np.arange(1, NUM_BINS) / NUM_BINS
    deciles, times = np.unique(np.quantile(values, shares, method="inverted_cdf"), return_counts=True)
    return np.unique(np.concatenate([deciles, np.nextafter(deciles[times > 1], np.inf)]))


def _count_names(column: "pd.Series[Any]", names: Sequence[str]) -> FloatArray:
    counts: FloatArray = np.array([(column.fillna("") == name).sum() for name in names], dtype=np.float64)
    return counts


def _count(column: "pd.Series[Any]", edges: FloatArray) -> FloatArray:
    """Counts of each bin, nulls last."""
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    bins = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    return np.bincount(bins, minlength=len(edges) + 2).astype(np.float64)
