"""The loading benchmark tells the pipeline's share of a step, with the threads that training has."""

import json
import time
from pathlib import Path

import cv2
import pytest
import torch

from darnet.config import ModelConfig
from darnet.dataset import VolumeDataset, load_batches
from darnet.scan import Uint8Array
from darnet.threads import set_model_threads
from tests.bench import loading
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

TINY = ["--batches", "2", "--base-channels", "4", "--shape", "8", "16", "16", "--repeats", "2"]
NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)


class SlowDataset(VolumeDataset):
    """Scans that take half a second each to come; a step of this network takes a few hundredths."""

    def read_voxels(self, row: int) -> Uint8Array:
        time.sleep(0.5)
        return super().read_voxels(row)


def test_it_prints_both_shares_of_a_step_on_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    set_model_threads(2)
    try:
        loading.main([*TINY, "--ranks", "1"])
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, 1)
    finally:
        set_model_threads(before)
    printed = capsys.readouterr()
    found = json.loads(printed.out)["1 rank"]
    for way in ("in_step", "ahead", "there"):
        assert 0 < found[f"{way}_wait_s"] < found[f"{way}_step_s"]
    assert found["there_loading_share"] == 0
    shares = f"{found['ahead_wait_share']:.2%} waiting, {found['ahead_loading_share']:.2%} in all"
    assert f"the input pipeline's share of a step is {shares}" in printed.err


def test_ranks_share_each_batch_evenly() -> None:
    whole = loading.share_batches(3, 0, 1)
    first, second = (loading.share_batches(3, rank, 2) for rank in range(2))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == whole
    assert {len(part) for part in first + second} == {len(whole[0]) // 2}


@pytest.mark.slow
def test_two_ranks_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    loading.main([*TINY, "--ranks", "1", "2"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"1 rank", "2 ranks"}
    assert set(found["2 ranks"]) == set(found["1 rank"])


@pytest.mark.parametrize("load", [loading.load_in_step, load_batches])
def test_a_slow_dataset_is_waited_for(tmp_path: Path, load: loading.Load) -> None:
    """Half a second at least for the first of two batches, of which two threads read a scan each."""
    dataset = SlowDataset(make_volumes(tmp_path, 4, 2))
    step_s, wait_s = loading.time_steps(load, dataset, [[0, 1], [2, 3]], NETWORK)
    assert wait_s >= 0.25
    assert wait_s / step_s > 0.3


def test_a_batch_that_is_there_is_not_waited_for(tmp_path: Path) -> None:
    """However slowly it came."""
    dataset = SlowDataset(make_volumes(tmp_path, 4, 2))
    step_s, wait_s = loading.time_steps(loading.load_before, dataset, [[0, 1], [2, 3]], NETWORK)
    assert wait_s / step_s < 0.1
    assert step_s < 0.5


def test_what_loading_takes_is_the_step_beyond_a_batch_that_is_there() -> None:
    """Also where nothing was waited for."""
    steps = {"in_step_step_s": 4.0, "ahead_step_s": 2.5, "there_step_s": 2.0}
    found = loading.add_shares(steps | {"in_step_wait_s": 2.0, "ahead_wait_s": 0.0, "there_wait_s": 0.0})
    assert (found["ahead_wait_share"], found["ahead_loading_share"]) == (0, pytest.approx(0.2))
    assert (found["in_step_wait_share"], found["in_step_loading_share"]) == (0.5, 0.5)
