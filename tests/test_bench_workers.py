"""One worker and two follow the same loss curve but for batch norm: with shared statistics only rounding is left."""

import pytest

from tests.bench.workers import compare_curves, trace_curves


@pytest.mark.slow
def test_shared_batch_norm_leaves_only_rounding_between_one_worker_and_two() -> None:
    curves = trace_curves(num_epochs=2, num_scans=24)
    distances = compare_curves(curves)
    assert distances["shared"]["train_loss"] < 1e-3
    assert distances["shared"]["train_loss"] < distances["own"]["train_loss"] / 5
    assert curves["one"][0]["train_loss"] == pytest.approx(curves["own"][0]["train_loss"], rel=0.1)
