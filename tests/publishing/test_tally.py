"""A tally counts what pandas counts, in whatever pieces the rows come."""

import datetime

import numpy as np
import pandas as pd

from darnet.publishing.rows import PROBABILITIES, make_table
from darnet.publishing.tally import NAMES, NUMBERS, TALLY_COLUMNS, Tally
from tests.nights_fixtures import make_night_rows
from tests.results_fixtures import make_row


def test_a_tally_counts_what_pandas_counts() -> None:
    rows = [row for night in (1, 2, 3) for row in make_night_rows(night, 40)]
    rows += [make_row("no maker", night=3, prediction="CP"), make_row("c", "ERR_TIMEOUT", night=4)]
    tally = Tally()
    for start in range(0, len(rows), 7):
        tally.add(make_table(rows[start : start + 7]).select(TALLY_COLUMNS))
    frame = pd.DataFrame(rows)
    scored = frame[frame["status"] == "OK"]
    assert tally.nights == {datetime.date(2030, 1, 1): 40, datetime.date(2030, 1, 2): 40} | {
        datetime.date(2030, 1, 3): 41,
        datetime.date(2030, 1, 4): 1,
    }
    assert tally.statuses == frame["status"].value_counts().to_dict()
    assert tally.predictions == scored.groupby(["night", "prediction"]).size().to_dict()
    for name in NAMES:
        assert tally.names[name] == scored[name].fillna("").value_counts().to_dict()
    for name in NUMBERS:
        np.testing.assert_array_equal(tally.take_numbers(name), scored[name].to_numpy(np.float64))
    assert (tally.num_rows, tally.num_scored) == (122, len(scored))
    assert tally.count("BAD_") == frame["status"].str.startswith("BAD_").sum()
    assert tally.share("ERR_") == frame["status"].str.startswith("ERR_").mean()
    assert tally.count_class("CP") == (scored["prediction"] == "CP").sum()


def test_a_tally_of_nothing_has_no_shares() -> None:
    tally = Tally()
    assert np.isnan(tally.share("BAD_"))
    assert [tally.take_numbers(name).shape for name in PROBABILITIES] == [(0,)] * 3
