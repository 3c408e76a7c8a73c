"""Whether a night is like the nights before it: this run's rows and those of earlier nights in, a verdict out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from darnet.config import GateConfig
from darnet.publishing.tally import NAMES, NUMBERS, Tally
from darnet.scan import FloatArray

NUM_BINS = 10  # Source: as usual for this index, the deciles of the population that one compares with
PSEUDO_COUNT = 0.5  # Source: ours (Jeffreys' prior); an empty bin would make the index infinite
DRIFT = "PSI of "
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

    `num_repeats` scans are left out: they were tried again, and ended in an ERR that the table has of them already; and
    `num_settled`, of which it has the last word and takes no more.
    """

    measures: tuple[Measure, ...]
    unjudged: str
    num_repeats: int = 0
    num_settled: int = 0

    @property
    def breaches(self) -> tuple[Measure, ...]:
        """The gates that hold the run; none if it is not judged."""
        return () if self.unjudged else tuple(measure for measure in self.measures if measure.is_breach)

    @property
    def unmeasured(self) -> str:
        """Why nobody knows whether tonight's scans drifted; empty if it was measured."""
        return next((item.detail for item in self.measures if item.gate.startswith(DRIFT) and np.isnan(item.value)), "")

    def describe(self) -> str:
        """One line for a summary."""
        left_out = f"; without {self.num_repeats} scans tried again in vain" if self.num_repeats else ""
        left_out += f"; without {self.num_settled} scans settled before" if self.num_settled else ""
        if self.unjudged:
            return f"not judged: {self.unjudged}{left_out}"
        breaches = "; ".join(measure.describe() for measure in self.breaches)
        drift = f"; drift not measured: {self.unmeasured}" if self.unmeasured else ""
        return (f"held: {breaches}" if breaches else "passed") + drift + left_out


def judge(tonight: Tally, earlier: Tally, config: GateConfig) -> Verdict:
    """Hold a run's rows against those of earlier nights."""
    measures = (
        _measure_err(tonight, config),
        _measure_rise("BAD", config.gate_bad_rise, tonight, earlier),
        _measure_rise("SKIP", config.gate_skip_rise, tonight, earlier),
        *_measure_drift(tonight, earlier, config),
    )
    return Verdict(measures, _find_reason_not_to_judge(tonight.num_rows, len(earlier.nights), config))


def _find_reason_not_to_judge(num_scans: int, num_nights: int, config: GateConfig) -> str:
    if num_scans < config.gate_min_scans:
        return f"{num_scans} scans, the gates need {config.gate_min_scans}"
    if num_nights < config.gate_min_nights:
        return f"{num_nights} earlier nights, the gates need {config.gate_min_nights}"
    return ""


def _measure_err(tonight: Tally, config: GateConfig) -> Measure:
    detail = f"{tonight.count('ERR_')} of {tonight.num_rows} scans"
    return Measure("share of ERR", tonight.share("ERR_"), config.gate_err_share, detail)


def _measure_rise(kind: str, rise: float, tonight: Tally, earlier: Tally) -> Measure:
    before = earlier.share(f"{kind}_")
    detail = f"{before:.3f} on earlier nights" if earlier.num_rows else "no earlier night"
    return Measure(f"share of {kind}", tonight.share(f"{kind}_"), before + rise, detail)


def _measure_drift(tonight: Tally, earlier: Tally, config: GateConfig) -> list[Measure]:
    """The index of each probability and input, among scans that are OK: only these did the network see."""
    detail = f"{tonight.num_scored} scans against {earlier.num_scored}"
    is_enough = min(tonight.num_scored, earlier.num_scored) >= min(PSI_MIN_SCANS, config.gate_min_scans)
    return [
        Measure(
            f"{DRIFT}{name}",
            measure_psi(*_count_bins(name, tonight, earlier)) if is_enough else np.nan,
            config.gate_psi,
            detail if is_enough else f"{detail}: too few",
        )
        for name in [*NUMBERS, *NAMES]
    ]


def _count_bins(name: str, tonight: Tally, earlier: Tally) -> tuple[FloatArray, FloatArray]:
    if name in NUMBERS:
        return count_numbers(tonight.take_numbers(name), earlier.take_numbers(name))
    return count_names(tonight.names[name], earlier.names[name])


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


def count_numbers(tonight: FloatArray, earlier: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Both counted over the same bins, those of the deciles of the earlier ones; NaN is the last bin.

    A bin begins at its decile and holds it; the outermost are open. A number that is more than one decile, such as a
    hospital's usual slice spacing, has a bin of its own, so that a shift to either side of it shows.

    Shape:  (N,), (M,) -> (bins,), (bins,).
    """
    edges = find_edges(earlier[~np.isnan(earlier)])
    return _count(tonight, edges), _count(earlier, edges)


def count_names(tonight: Mapping[str, int], earlier: Mapping[str, int]) -> tuple[FloatArray, FloatArray]:
    """Counts of both over the same bins, a name each, in the order of the names; none at all is a name, and empty.

    Shape:  (bins,), (bins,).
    """
    names = sorted({"", *tonight, *earlier})
    counts, counts_before = (
        np.array([counted.get(name, 0) for name in names], np.float64) for counted in (tonight, earlier)
    )
    return counts, counts_before


def find_edges(values: FloatArray) -> FloatArray:
    """Where the bins of a column begin: at its deciles, and right behind a decile that comes more than once."""
    if not len(values):
        return values
    shares = np.arange(1, NUM_BINS) / NUM_BINS
    deciles, times = np.unique(np.quantile(values, shares, method="inverted_cdf"), return_counts=True)
    return np.unique(np.concatenate([deciles, np.nextafter(deciles[times > 1], np.inf)]))


def _count(values: FloatArray, edges: FloatArray) -> FloatArray:
    """Counts of each bin, NaN last."""
    bins = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    return np.bincount(bins, minlength=len(edges) + 2).astype(np.float64)
