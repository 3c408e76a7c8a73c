"""The benchmark of depth resampling measures what it says, on a chest small enough to compute by hand."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from darnet.config import VolumeConfig
from darnet.errors import UsageError
from tests.bench.resampling import compare, list_series, main
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import make_chest, write_chest


@pytest.mark.slow
def test_differences_and_decoded_slices_are_those_computed_by_hand(tmp_path: Path) -> None:
    """24 slices to 8: `linear` falls on every third slice exactly, `area` is the mean of three."""
    write_chest(tmp_path / "a")
    (series,) = list_series(tmp_path)
    row = compare(series, VolumeConfig(shape=(8, 32, 32)), repeats=1)
    unit = np.clip((make_chest().astype(np.float64) + 1350) / 1500, 0, 1)[:, 6:58, 6:58]
    planes = 255 * np.stack([cv2.resize(plane, (32, 32), interpolation=cv2.INTER_AREA) for plane in unit])
    expected = np.abs(planes.reshape(8, 3, 32, 32).mean(1) - planes[1::3])
    assert row["mean_difference"] == pytest.approx(expected.mean(), abs=0.05)
    assert row["max_difference"] == pytest.approx(expected.max(), abs=1)
    assert (row["linear_slices_decoded"], row["area_slices_decoded"]) == (8, 24)
    assert min(row[f"{way}_{what}"] for way in ("linear", "area") for what in ("s", "processor_s", "growth_mib")) > 0


@pytest.mark.slow
def test_each_series_has_a_row_a_command_and_its_change_of_probability(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random_bundle(tmp_path / "bundle")
    write_chest(tmp_path / "scans" / "a")
    write_chest(tmp_path / "scans" / "b", make_chest()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    arguments = ["--scans", str(tmp_path / "scans"), "--model", str(tmp_path / "bundle"), "--repeats", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    chest, scout = json.loads(printed.out.splitlines()[-1])["rows"]
    assert sum(chest[f"change_{name}"] for name in ("cp", "ncp", "normal")) == pytest.approx(0, abs=1e-6)
    assert any(chest[f"change_{name}"] for name in ("cp", "ncp", "normal"))
    assert "SKIP_LOCALIZER" in scout["left_out"]
    assert f"make bench-resampling REPEATS=1 SCANS={tmp_path}/scans/a MODEL={tmp_path}/bundle" in printed.err


def test_a_folder_without_a_chest_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chest CT"):
        main(["--scans", str(tmp_path)])
