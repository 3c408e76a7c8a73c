"""Bundles for tests: any that is written here, and one of five untrained tiny networks whose opinions differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from darnet.bundle import Bundle
from darnet.bundle_writing import TrainedFold, make_bundle, publish_bundles, refuse_existing
from darnet.config import ModelConfig, TrainConfig, VolumeConfig
from darnet.manifest import NETWORKS, BundleSettings, name_model
from darnet.model import build_network

SHAPE = (16, 32, 32)


def write_bundle(out: str, **facts: Any) -> Bundle:
    """Make one bundle and publish it, as a training does; `facts` are those of `make_bundle`."""
    refuse_existing(out)
    bundle, files = make_bundle(**facts)
    publish_bundles(out, [("", files)])
    return bundle


def write_random_bundle(
    out: Path,
    version: str = "untrained",
    shape: tuple[int, int, int] = SHAPE,
    attentions: Mapping[str, bool] | None = None,
    seed: int | None = None,
) -> Bundle:
    """Heads are drawn wide, so that probabilities lie apart; with `seed`, all folds are of it."""
    network = ModelConfig(volume_shape=shape, base_channels=4, **(attentions or {}))
    states = []
    for fold in range(5):
        drawn = fold if seed is None else 100 + 5 * seed + fold
        state = build_network(network, drawn).state_dict()
        state["head.weight"] = torch.randn(state["head.weight"].shape, generator=torch.Generator().manual_seed(drawn))
        states.append(state)
    return write_bundle(
        str(out),
        settings=BundleSettings(volume=VolumeConfig(shape=shape), network=network, train=TrainConfig(seed=seed or 0)),
        folds=[TrainedFold(state, 1, fold if seed is None else seed, {}) for fold, state in enumerate(states)],
        cohort_sha256="0" * 64,
        model_version=version,
        code_version="0",
        trained_on="nothing",
    )


def write_four_bundles(out: Path, shape: tuple[int, int, int] = SHAPE) -> Path:
    """One untrained bundle of each network of Table 3, in a folder."""
    for attentions in NETWORKS:
        name = name_model(ModelConfig(**attentions))
        write_random_bundle(out / name, shape=shape, attentions=attentions)
    return out
