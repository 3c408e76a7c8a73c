"""The benchmark of networks times what it says: each backend's one fold and its five, in every way."""

import json

import numpy as np
import pytest

from darnet.config import ModelConfig
from darnet.model import build_network
from tests.bench import networks

SMALL = ModelConfig(volume_shape=(16, 32, 32), base_channels=8)


@pytest.mark.slow
def test_five_folds_are_timed_in_both_backends(capsys: pytest.CaptureFixture[str]) -> None:
    networks.main(["--shape", "16", "32", "32", "--base-channels", "8", "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr()
    seconds = json.loads(printed.out)["seconds"]
    one, five = "torch fp32, 2 at once", "torch fp32, 5 folds, 2 at once"
    assert {one, five, "openvino fp32", "openvino fp32, 5 folds", "openvino int8", networks.SAME_FOLDS} <= set(seconds)
    assert "one graph five times" in printed.err


@pytest.mark.parametrize("way", ["torch fp32, 5 folds, 2 at once", "openvino fp32, 5 folds"])
def test_five_folds_are_five_networks(way: str) -> None:
    """Each gives an answer of its own to the same scan."""
    drawn = [build_network(SMALL, fold, 1.0).eval() for fold in range(networks.NUM_FOLDS)]
    ((_, num_scans, num_folds, make),) = [item for item in networks.list_ways(drawn, 1) if item[0] == way]
    found = make()()
    logits = list_torch(found) if way.startswith("torch") else list_openvino(found)
    assert (num_folds, len(logits)) == (networks.NUM_FOLDS, networks.NUM_FOLDS)
    assert all(item.shape == (num_scans, 3) for item in logits)
    assert len({item.tobytes() for item in logits}) == networks.NUM_FOLDS


def list_torch(answers: list) -> list[np.ndarray]:
    return [answer.logits for answer in answers]


def list_openvino(results: list) -> list[np.ndarray]:
    """Of one request, whose outputs are each fold's one after another."""
    (result,) = results
    return [result[index] for index in range(0, len(result), len(result) // networks.NUM_FOLDS)]
