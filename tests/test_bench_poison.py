"""Scans that kill, stall or starve their reader cost themselves alone."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.bench.poison import find_differences, name_kind, run_nights


@pytest.mark.ray
@pytest.mark.slow
def test_poisonous_scans_are_rows_and_change_no_bit_of_the_others(tmp_path: Path) -> None:
    clean, poisoned = run_nights(tmp_path, num_scans=40, num_poisonous=6, timeout_s=15)
    assert {row["status"] for row in clean.values()} == {"OK"}
    ended = Counter((name_kind(row), row["status"]) for row in poisoned.values())
    assert ended == {
        ("sound", "OK"): 34,
        ("crash", "ERR_DECODER_CRASH"): 2,
        ("hang", "ERR_TIMEOUT"): 2,
        ("bomb", "ERR_MEMORY"): 2,
    }
    assert len({row["probability_ncp"] for row in clean.values()}) > 30  # scans all alike would show nothing
    assert find_differences(clean, poisoned) == []
    assert all(row["decode_s"] >= 15 for row in poisoned.values() if row["status"] == "ERR_TIMEOUT")


def test_the_comparison_sees_the_last_bit() -> None:
    clean = {"x": {"source": "x", "probability": 0.1, "cam": None, "fetch_s": 1.0}}
    assert find_differences(clean, {"x": clean["x"] | {"fetch_s": 2.0}}) == []
    changed = clean["x"] | {"probability": 0.1 + sys.float_info.epsilon / 8, "cam": 0.0}
    assert find_differences(clean, {"x": changed}) == ["cam", "probability"]
    assert find_differences(clean, {}) == ["scan_id"]
