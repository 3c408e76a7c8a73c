"""However slow the networks are, no more decoded scans wait for them than may."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY

from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import RunError
from darnet.ray_backpressure import MAX_WAITING, WaitingScansPolicy, bound_waiting
from darnet.ray_cluster import DecodePlan, decode_planned, iterate_blocks
from darnet.reading.road import Road
from darnet.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")]

NUM_ITEMS, SCANS_PER_ITEM, BATCH_SIZE = 30, 4, 4
NUM_SCANS = NUM_ITEMS * SCANS_PER_ITEM
AT_HAND = 6 * SCANS_PER_ITEM  # of tasks under way, and what an actor has been given besides


class SlowNetwork:
    """Counts the scans that were made and not scored when it takes its next, and waits for all before its first."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        self._folder, self._num_scored, self._patience_s = folder, 0, patience_s

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        end_s = (
            time.monotonic() + self._patience_s
        )  # from its first scans on, which the workers that make them have made
        while (ahead := self._count_made() - self._num_scored) < NUM_SCANS and time.monotonic() < end_s:
            time.sleep(0.05)
        self._patience_s = 0.0
        self._num_scored += len(batch["item"])
        return {"item": batch["item"], "ahead": [ahead] * len(batch["item"])}

    def _count_made(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir())


def run(folder: Path, max_waiting: int | None, patience_s: float) -> tuple[list[int], int]:
    """The scans that came out, and the most that were ahead of the network."""

    def make(row: dict[str, int]) -> Iterator[dict[str, int]]:
        for _ in range(SCANS_PER_ITEM):
            with (folder / str(row["item"])).open("ab") as file:
                file.write(b"s")
            yield row

    folder.mkdir()
    context = DataContext.get_current().copy()
    bound_waiting(context, max_waiting)
    items = [{"item": number} for number in range(NUM_ITEMS)]
    with DataContext.current(context):
        dataset = ray.data.from_items(items, override_num_blocks=NUM_ITEMS).flat_map(make, num_cpus=1)
        pool = ActorPoolStrategy(size=1)
        scored = dataset.map_batches(
            SlowNetwork, fn_constructor_args=(folder, patience_s), batch_size=BATCH_SIZE, compute=pool, num_cpus=0.5
        )
        rows = scored.take_all()
    return sorted(row["item"] for row in rows), max(row["ahead"] for row in rows)


@pytest.mark.usefixtures("ray_cluster")
def test_decoding_pauses_while_as_many_scans_wait_as_may(tmp_path: Path) -> None:
    every = sorted(list(range(NUM_ITEMS)) * SCANS_PER_ITEM)
    scans, most = run(tmp_path / "unbound", None, 60)
    assert scans == every
    assert most == NUM_SCANS  # Ray alone lets them wait
    scans, most = run(tmp_path / "bound", 2 * BATCH_SIZE, 5)
    assert scans == every
    assert most <= 2 * BATCH_SIZE + AT_HAND


@pytest.mark.usefixtures("ray_cluster")
def test_a_night_bounds_what_waits_and_waits_for_machines(tmp_path: Path) -> None:
    """By Ray's default a night ends after half an hour in which its machines with GPUs have not come."""
    road = Road(VolumeConfig(), DecodeConfig())
    dataset = decode_planned([0], lambda _: [], open_store(str(tmp_path)), road, DecodePlan(1, 4, 64))
    assert dataset.context.execution_no_progress_timeout_s == 24 * 60 * 60
    assert dataset.context.get_config(MAX_WAITING) == 64
    assert WaitingScansPolicy in dataset.context.get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)


@pytest.mark.usefixtures("ray_cluster")
def test_a_night_that_stands_still_for_too_long_ends_with_a_reason() -> None:
    context = DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = 2
    with DataContext.current(context):
        dataset = ray.data.from_items([{"a": 1}]).map(lambda row: time.sleep(20) or row)
        with pytest.raises(RunError, match="nothing went on"):
            list(iterate_blocks(dataset))
