"""A training's metrics epoch by epoch, for people and their tools: a fold's history enters, files leave.

`metrics.jsonl` has one JSON object a line, TensorBoard's event file the same numbers as curves. Both are written anew
after every epoch: what a restart repeats is in them once.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

HISTORY_FILE = "metrics.jsonl"
EVENTS_FILE = "tensorboard/events.out.tfevents.0000000000.darnet"  # TensorBoard knows files by the middle of the name

History: TypeAlias = Sequence[Mapping[str, float]]


def render_files(fold: int, history: History) -> dict[str, bytes]:
    """All files of a fold's history by name."""
    return {HISTORY_FILE: render_history(fold, history), EVENTS_FILE: render_events(history)}


def render_history(fold: int, history: History) -> bytes:
    """One line an epoch; null where a metric is undefined, as JSON has no NaN."""
    lines = [
        json.dumps({"fold": fold, **{name: _clean(name, value) for name, value in metrics.items()}})
        for metrics in history
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def render_events(history: History) -> bytes:
    """TensorBoard's event file; undefined metrics have no point."""
    from tensorboardX.event_file_writer import EventFileWriter  # here, since importing it sets an environment variable
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    with tempfile.TemporaryDirectory() as folder:
        writer = EventFileWriter(folder)
        for metrics in history:
            points = {name: value for name, value in metrics.items() if name != "epoch" and math.isfinite(value)}
            for name, value in points.items():
                event = Event(summary=scalar(name, value), step=int(metrics["epoch"]))
                writer.add_event(event)
        writer.close()
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def _clean(name: str, value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if name == "epoch" else value
