"""A training's history as files: every epoch once, readable by other programs than ours."""

import json
import struct
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX.proto.event_pb2 import Event

from darnet.history import EVENTS_FILE, render_events, render_files, render_history

HISTORY = [
    {"epoch": 0.0, "train_loss": 1.25, "auc_ncp": float("nan")},
    {"epoch": 1.0, "train_loss": 0.5, "auc_ncp": 0.75},
]


def read_events(data: bytes) -> list[Event]:
    """By the layout of TFRecord: length, its checksum, the event, its checksum."""
    events, start = [], 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        events.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def test_each_line_is_an_epoch_of_a_fold_and_valid_json() -> None:
    lines = render_history(3, HISTORY).decode().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"fold": 3, "epoch": 0, "train_loss": 1.25, "auc_ncp": None},
        {"fold": 3, "epoch": 1, "train_loss": 0.5, "auc_ncp": 0.75},
    ]
    assert render_history(3, []) == b""


def test_tensorboard_finds_every_defined_metric_at_its_epoch(tmp_path: Path) -> None:
    """With TensorBoard's own reader, which checks every record's checksums and looks for the file by its name."""
    (tmp_path / EVENTS_FILE).parent.mkdir()
    (tmp_path / EVENTS_FILE).write_bytes(render_events(HISTORY))
    read = EventAccumulator(str(tmp_path / EVENTS_FILE.rpartition("/")[0])).Reload()
    curves = {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert curves == {"train_loss": [(0, 1.25), (1, 0.5)], "auc_ncp": [(1, 0.75)]}


def test_a_longer_history_goes_on_where_a_reader_has_stopped() -> None:
    """TensorBoard reads on from its place in the file: what was there must keep its place."""
    assert len(render_events(HISTORY)) > len(render_events(HISTORY[:1]))
    (first, second) = (read_events(render_events(HISTORY[:length])) for length in (1, 2))
    assert [len(event.SerializeToString()) for event in first] == [
        len(event.SerializeToString()) for event in second[: len(first)]
    ]


def test_a_folds_files_are_its_lines_and_its_curves() -> None:
    lines, events = render_files(3, HISTORY).values()
    assert lines == render_history(3, HISTORY)
    assert [event.step for event in read_events(events) if event.summary.value] == [0, 1, 1]
