"""What a row is: the columns of the design, every bit kept, every file name spelled."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from darnet.errors import RunError
from darnet.publishing.rows import SCHEMA, make_table, spell_key, unspell_key
from darnet.results import describe_schema, read_predictions
from darnet.storage import Store
from tests.results_fixtures import (
    ODD_KEYS,
    make_row,
    publish_rows,
)


def test_every_column_is_described_and_survives_parquet(local: Store) -> None:
    publish_rows(local, "run", make_row("a"))
    schema = pq.read_schema(local.local_path("predictions/c00000001.parquet"))
    assert schema.equals(SCHEMA)
    for column in schema:
        assert len(column.metadata[b"description"]) > 10
        assert f"| {column.name} |" in describe_schema()
    assert schema.metadata[b"run_id"] == b"run"
    assert schema.metadata[b"notice"] == b"research use only"


def test_columns_are_those_of_the_design() -> None:
    listed = """
    run_id commit night scored_at source scan_id patient_key series_key input_sha256 num_files num_bytes
    status status_detail model_name model_version model_sha256 preprocessing_version code_version intensity
    num_slices slice_spacing_mm pixel_spacing_mm manufacturer probability_cp probability_ncp
    probability_normal prediction fold_probability_ncp fold_std_ncp cam_class cam_in_lung_fraction
    cam_left_fraction cam_extent_fraction cam_peak_slice cam_peak_y cam_peak_x cam_depth_profile
    depth_gate_profile lung_fraction fetch_s decode_s model_s"""
    assert SCHEMA.names == listed.split()


def test_probabilities_are_stored_to_the_last_bit(local: Store) -> None:
    values = [float(np.float32(0.1)), 1 / 3, math.nextafter(0.5, 1)]
    names = ["probability_cp", "probability_ncp", "probability_normal"]
    folds = np.array([0.1, 1 / 3], np.float32)
    changes = {**dict(zip(names, values, strict=True)), "fold_probability_ncp": folds}
    publish_rows(local, "run", make_row("a", **changes))
    row = read_predictions(local.uri).iloc[0]
    assert [row[name] for name in names] == values
    assert row["fold_probability_ncp"].tobytes() == folds.tobytes()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda row: row.pop("night"), "night"),
        (lambda row: row.update(probability=1.0), "probability"),
        (lambda row: row.update(source=None), "source"),
        (lambda row: row.update(model_sha256=None), "model_sha256"),
        (lambda row: row.update(num_slices="many"), "num_slices"),
    ],
)
def test_a_wrong_row_names_its_column(spoil: Callable[[dict[str, Any]], Any], named: str) -> None:
    row = make_row("a")
    spoil(row)
    with pytest.raises(RunError, match=rf"column {named}\b"):
        make_table([make_row("b"), row])


@pytest.mark.parametrize("key", ODD_KEYS)
def test_spelling_is_utf8_and_reversible(key: str) -> None:
    assert unspell_key(spell_key(key).encode().decode()) == key


def test_a_detail_may_name_a_file_that_is_not_utf8() -> None:
    row = make_row("a", "BAD_TRUNCATED", status_detail="caf\udce9.dcm: ends early")
    assert make_table([row])["status_detail"].to_pylist() == ["caf\\xe9.dcm: ends early"]


def test_no_two_keys_are_spelled_alike() -> None:
    pieces = ["\\", "x", "5", "c", "f", "\udcff", "\udc80", "é"]
    rng = random.Random(0)
    keys = {"".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(20_000)}
    assert len({spell_key(key) for key in keys}) == len(keys)
    assert all(unspell_key(spell_key(key)) == key for key in keys)
