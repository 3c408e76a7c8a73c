"""The gates measure what a hand measures, and hold what a person would hold."""

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.stats

from darnet.config import ScoreConfig
from darnet.publishing.gates import PSI_MIN_SCANS, Verdict, count_names, count_numbers, find_edges, judge, measure_psi
from darnet.publishing.rows import PROBABILITIES, SCHEMA
from darnet.publishing.tally import TALLY_COLUMNS, Tally

CONFIG = ScoreConfig()
INPUTS = {"intensity": "HU", "num_slices": 300, "slice_spacing_mm": 1.0, "pixel_spacing_mm": 0.7}


def make_night(
    night: int, num_scans: int = 600, num_bad: int = 0, num_err: int = 0, num_skip: int = 0, **inputs: Any
) -> pd.DataFrame:
    """Rows of a night: probabilities and lungs by chance, everything else the same for all scans."""
    rng = np.random.default_rng(night)
    frame = pd.DataFrame(rng.dirichlet((1, 1, 1), num_scans), columns=PROBABILITIES)
    frame = frame.assign(
        night=datetime.date(2030, 1, night),
        status="OK",
        prediction="NCP",
        manufacturer="GE",
        lung_fraction=rng.uniform(0.1, 0.3, num_scans),
    )
    frame = frame.assign(**(INPUTS | inputs))
    frame.loc[: num_bad - 1, "status"] = "BAD_TILT"
    frame.loc[num_bad : num_bad + num_err - 1, "status"] = "ERR_TIMEOUT"
    frame.loc[num_scans - num_skip :, "status"] = "SKIP_NO_LUNG"
    return frame


def tally(*frames: pd.DataFrame) -> Tally:
    """The frames as so many pieces of rows."""
    tallied = Tally()
    for frame in frames:
        schema = pa.schema([SCHEMA.field(name).with_nullable(True) for name in TALLY_COLUMNS])
        tallied.add(pa.Table.from_pandas(frame, schema, preserve_index=False))
    return tallied


def judge_night(tonight: pd.DataFrame, num_nights: int = 7) -> Verdict:
    earlier = [make_night(night, num_bad=6) for night in range(1, num_nights + 1)]
    return judge(tally(tonight), tally(*earlier), CONFIG)


def name_breaches(verdict: Verdict) -> list[str]:
    return [measure.gate for measure in verdict.breaches]


def test_psi_is_the_one_worked_out_by_hand() -> None:
    """Shares 10.5, 20.5, 30.5, 40.5 of 102 against quarters: 0.130486 + 0.010699 + 0.008777 + 0.068033."""
    tonight, earlier = np.array([10.0, 20.0, 30.0, 40.0]), np.full(4, 25.0)
    assert measure_psi(tonight, earlier) == pytest.approx(0.217995, abs=2e-6)
    assert measure_psi(earlier, tonight) == pytest.approx(0.217995, abs=2e-6)
    assert measure_psi(earlier, 3 * earlier) == 0


def test_psi_without_the_added_half_is_jeffreys_divergence() -> None:
    tonight, earlier = np.array([4e6, 3e6, 1e6]), np.array([2e6, 3e6, 5e6])
    p, q = tonight / tonight.sum(), earlier / earlier.sum()
    expected = scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p)
    assert measure_psi(tonight, earlier) == pytest.approx(expected, rel=1e-5)


def test_an_empty_bin_is_finite() -> None:
    """(0.5 - 10.5) / 11 * ln(0.5 / 10.5), twice."""
    found = measure_psi(np.array([0.0, 10.0]), np.array([10.0, 0.0]))
    assert found == pytest.approx(2 * 10 / 11 * np.log(21), rel=1e-12)


def test_chance_alone_gives_what_the_docstring_says() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=20_000)
    found = [measure_psi(*count_numbers(rng.normal(size=PSI_MIN_SCANS), before)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(9 * (1 / PSI_MIN_SCANS + 1 / 20_000), rel=0.1)
    assert max(found) < CONFIG.gate_psi


def test_numbers_are_counted_between_the_deciles_of_earlier_nights() -> None:
    before = np.arange(1.0, 101.0)  # deciles 10, 20 ... 90
    tonight = np.array([-5.0, 9.0, 10.0, 19.5, 90.0, 1000.0, np.nan])
    counts, counts_before = count_numbers(tonight, before)
    assert counts.tolist() == [2, 2, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert counts_before.tolist() == [9, 10, 10, 10, 10, 10, 10, 10, 10, 11, 0]


def test_a_usual_number_has_a_bin_of_its_own() -> None:
    """All earlier slices lie 5 mm apart: a shift to 4 mm and one to 6 mm both show."""
    before = np.full(50, 5.0)
    assert len(find_edges(before)) == 2
    for shifted, expected in ((4.0, [9, 0, 0, 0]), (5.0, [0, 9, 0, 0]), (6.0, [0, 0, 9, 0])):
        assert count_numbers(np.full(9, shifted), before)[0].tolist() == expected


def test_names_and_nulls_are_bins() -> None:
    tonight, before = make_night(2, 3), make_night(1, 3)
    tonight["manufacturer"], before["manufacturer"] = ["GE", None, "Canon"], ["GE", "GE", "Siemens"]
    names = [tally(frame).names["manufacturer"] for frame in (tonight, before)]
    assert [counts.tolist() for counts in count_names(*names)] == [[1, 1, 1, 0], [0, 0, 2, 1]]


def test_an_ordinary_night_passes() -> None:
    verdict = judge_night(make_night(8, num_bad=9, num_err=9))
    assert verdict.describe() == "passed"
    values = {measure.gate: measure.value for measure in verdict.measures}
    assert values["share of BAD"] == values["share of ERR"] == 9 / 600
    limits = {measure.gate: measure.limit for measure in verdict.measures}
    assert limits["share of BAD"] == pytest.approx(6 / 600 + 0.05)


@pytest.mark.parametrize(
    ("tonight", "gates"),
    [
        (make_night(8, num_err=31), ["share of ERR"]),  # 5.2%
        (make_night(8, num_err=30), []),
        (make_night(8, num_bad=37), ["share of BAD"]),  # 6.2% after 1%
        (make_night(8, num_bad=35), []),
        (make_night(8, num_skip=151), ["share of SKIP"]),  # 25.2% after none
        (make_night(8, num_skip=150), []),
        (make_night(8, slice_spacing_mm=1.25), ["PSI of slice_spacing_mm"]),
        (make_night(8, manufacturer="Canon"), ["PSI of manufacturer"]),
        (make_night(8, intensity=None), ["PSI of intensity"]),
        (make_night(8, probability_ncp=0.5), ["PSI of probability_ncp"]),
    ],
)
def test_a_night_unlike_the_others_names_its_gate(tonight: pd.DataFrame, gates: list[str]) -> None:
    assert name_breaches(judge_night(tonight)) == gates


def test_small_runs_and_first_nights_are_not_judged() -> None:
    wild = {"num_err": 400, "slice_spacing_mm": 9.0}
    few = judge_night(make_night(8, num_scans=499, **wild))
    assert few.describe() == "not judged: 499 scans, the gates need 500"
    assert few.breaches == ()
    early = judge_night(make_night(8, **wild), num_nights=6)
    assert early.describe() == "not judged: 6 earlier nights, the gates need 7"
    first = judge(tally(make_night(8)), Tally(), CONFIG)
    assert first.describe() == "not judged: 0 earlier nights, the gates need 7"


def test_a_night_in_which_no_lung_is_found_is_held() -> None:
    """None of it is ERR or BAD, none of it can drift, and every row of it would be final."""
    verdict = judge_night(make_night(9, num_skip=600), num_nights=8)
    assert verdict.describe() == (
        "held: share of SKIP 1.000 (limit 0.250; 0.000 on earlier nights); drift not measured: 0 scans against 4752: "
        "too few"
    )


def test_too_few_scored_scans_cannot_drift() -> None:
    tonight = make_night(8, num_bad=450, slice_spacing_mm=9.0)
    verdict = judge_night(tonight)
    assert name_breaches(verdict) == ["share of BAD"]
    assert verdict.describe().endswith("; drift not measured: 150 scans against 4158: too few")
    assert name_breaches(judge_night(tonight.iloc[450 - PSI_MIN_SCANS - 100 :])) == []  # 450 scans: not judged
