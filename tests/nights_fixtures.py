"""Weeks of nights as an archive of a hospital might yield them, for the gates and the page that shows them."""

from typing import Any

import numpy as np

from darnet.publishing.rows import PROBABILITIES
from darnet.scan import DIAGNOSES
from tests.results_fixtures import make_row

TROUBLES = ["SKIP_LOCALIZER", "SKIP_NO_LUNG", "BAD_MISSING_SLICE", "ERR_TIMEOUT"]


def make_night_rows(night: int, num_scans: int, *, shift: float = 0.0) -> list[dict[str, Any]]:
    """Rows of one night of January 2030, one scan in ten of them not scored; `shift` moves probabilities to NCP."""
    rng = np.random.default_rng(night)
    rows = []
    for index in range(num_scans):
        name = f"2030-01-{night:02d}/ct/{index:05d}#{index:08x}"
        status = rng.choice(TROUBLES) if rng.random() < 0.1 else "OK"
        row = make_row(name, str(status), run_id=f"run{night}", night=night, num_bytes=60_000_000)
        row |= {"fetch_s": rng.gamma(2, 0.4), "decode_s": rng.gamma(3, 0.5)}
        rows.append(row | (_score(rng, shift) if status == "OK" else {}))
    return rows


def _score(rng: np.random.Generator, shift: float) -> dict[str, Any]:
    probability = rng.dirichlet((0.4, 0.3 + shift, 0.6))
    folds = np.clip(probability[1] + rng.normal(0, 0.08, 5), 0, 1)
    return {
        **dict(zip(PROBABILITIES, probability.tolist(), strict=True)),
        "prediction": str(DIAGNOSES[int(probability.argmax())]),
        "fold_probability_ncp": folds.tolist(),
        "fold_std_ncp": float(folds.std()),
        "cam_in_lung_fraction": float(rng.beta(6, 3)),
        "cam_peak_slice": int(rng.integers(0, 300)),
        "manufacturer": str(rng.choice(["GE", "Siemens", "Philips"])),
        "intensity": "HU",
        "num_slices": int(rng.integers(250, 350)),
        "slice_spacing_mm": 1.0,
        "pixel_spacing_mm": float(rng.normal(0.7, 0.05)),
        "lung_fraction": float(rng.normal(0.2, 0.03)),
        "model_s": float(rng.gamma(2, 0.3)),
    }
