"""The benchmark of workers against threads trains the same global batch both ways and tells their ratio."""

import json

import pytest

from tests.bench import ddp


@pytest.mark.slow
def test_both_ways_are_timed_on_the_same_batch(capsys: pytest.CaptureFixture[str]) -> None:
    ddp.main(["--shape", "8", "16", "16", "--base-channels", "4", "--steps", "2", "--repeats", "1"])
    found = json.loads(capsys.readouterr().out)
    seconds = found["step_s"]
    assert set(seconds) == {"2 workers x 1 thread", "1 worker x 2 threads"}
    assert found["ratio"] == seconds["1 worker x 2 threads"] / seconds["2 workers x 1 thread"]
    assert min(seconds.values()) > 0
