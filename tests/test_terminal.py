"""The line that tells how far a job is: its pace is that of this start."""

import io
import math
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from darnet.terminal import Meter, _TimeLeftColumn


def make_meter(spent_s: float) -> Meter:
    """Of 400 units, begun so long ago."""
    return Meter("training", 400, Console(file=io.StringIO()), None, started_s=time.monotonic() - spent_s)


def test_what_was_done_before_this_start_counts_as_done_and_not_for_the_pace() -> None:
    meter = make_meter(spent_s=100)
    meter.find(290, {"fold 0": 290})
    assert math.isnan(meter.estimate_left_s())
    assert meter.describe().startswith("training: 290/400, 100 s so far")
    meter.advance(10, {"fold 1": 10})
    assert meter.estimate_left_s() == pytest.approx(1000, rel=0.01)
    assert meter.describe().startswith("training: 300/400, 0.10/s, 1000 s left  fold 0 290  fold 1 10")


def test_the_live_line_tells_the_same_time_left() -> None:
    meter = make_meter(spent_s=100)
    with Progress(console=meter.console) as bar:
        bar.add_task("training", total=400, meter=meter)
        (task,) = bar.tasks
        assert _TimeLeftColumn().render(task).plain == "-:--:--"
        meter.find(300, {})
        meter.advance(20, {})
        assert _TimeLeftColumn().render(task).plain == "0:06:40"
