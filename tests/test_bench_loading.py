"""The loading benchmark tells the pipeline's share of a step, with the threads that training has."""

import json

import cv2
import pytest
import torch

from darnet.threads import set_num_threads
from tests.bench import loading


def test_it_prints_the_input_pipeline_s_share_of_a_step_on_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    set_num_threads(2)
    try:
        loading.main(["--batches", "2", "--base-channels", "4", "--shape", "8", "16", "16", "--repeats", "2"])
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, 1)
    finally:
        set_num_threads(before)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    for way in ("in_step", "ahead"):
        assert 0 < found[f"{way}_wait_s"] < found[f"{way}_step_s"]
        assert 0 < found[f"{way}_wait_share"] < 1
    assert "the input pipeline's share of a training step" in printed.err
