"""A bundle of five untrained tiny networks whose opinions differ."""

from pathlib import Path

import torch

from darnet.bundle import Bundle, BundleSettings, TrainedFold, write_bundle
from darnet.config import ModelConfig, TrainConfig, VolumeConfig
from darnet.model import build_network

SHAPE = (16, 32, 32)


def write_random_bundle(out: Path, version: str = "untrained", shape: tuple[int, int, int] = SHAPE) -> Bundle:
    """Heads are drawn wide, so that probabilities lie apart."""
    network = ModelConfig(volume_shape=shape, base_channels=4)
    states = []
    for fold in range(5):
        state = build_network(network, fold).state_dict()
        state["head.weight"] = torch.randn(state["head.weight"].shape, generator=torch.Generator().manual_seed(fold))
        states.append(state)
    return write_bundle(
        out,
        settings=BundleSettings(volume=VolumeConfig(shape=shape), network=network, train=TrainConfig()),
        folds=[TrainedFold(state, 1, fold, {}) for fold, state in enumerate(states)],
        cohort_sha256="0" * 64,
        model_version=version,
        code_version="0",
        trained_on="nothing",
    )
