"""How closely one worker and two, of the same global batch, follow the same loss curve; and what parts them.

`make bench-workers` runs it on small made-up volumes with gloo on a CPU. Batch norm takes its statistics from a
worker's own scans, so that two workers of two scans normalise otherwise than one of four. torch's SyncBatchNorm, which
mends that, runs on GPUs only: a plain stand-in for it shows here what is left once the statistics are shared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from darnet.config import ModelConfig, TrainConfig
from darnet.model import DARNet
from darnet.terminal import print_table
from darnet.train import Metrics
from tests.gloo_ranks import keep_network, train_with_torch_alone
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank; torch's own is deprecated without a successor that has gradients.

    Each rank's loss depends on each rank's tensor, so the gradient is the sum of all ranks' gradients.
    """

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GatheredBatchNorm(nn.BatchNorm3d):
    """Batch norm over all ranks' scans, by its definition; slow, and right on any device."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, C, D, H, W) -> same."""
        if not self.training:
            return super().forward(x)
        axes, share = (0, 2, 3, 4), x.numel() / x.shape[1]
        total = share * dist.get_world_size()
        mean = SumOverRanks.apply(x.sum(axes)) / total
        centred = x - mean[:, None, None, None]
        variance = SumOverRanks.apply(centred.square().sum(axes)) / total
        with torch.no_grad():
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)  # type: ignore[union-attr]
        scale = self.weight / torch.sqrt(variance + self.eps)
        return centred * scale[:, None, None, None] + self.bias[:, None, None, None]


def gather_batch_norm(network: DARNet) -> DARNet:
    """The same network with `GatheredBatchNorm` in place of every batch norm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.__class__ = GatheredBatchNorm  # same parameters and buffers, another forward
    return network


WAYS: dict[str, Callable[[DARNet], DARNet]] = {"own": keep_network, "shared": gather_batch_norm}


def trace_curves(num_epochs: int, num_scans: int) -> dict[str, list[Metrics]]:
    """Fold 0's history by one worker, and by two with each kind of batch norm."""
    config = TrainConfig(epochs=num_epochs, num_folds=2, learning_rate=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        volumes = make_volumes(Path(folder) / "volumes", num_scans, 2).folder
        curves = {}
        for name, workers, equip in [("one", 1, keep_network), *((way, 2, equip) for way, equip in WAYS.items())]:
            scratch = Path(folder) / name
            scratch.mkdir()
            curves[name] = train_with_torch_alone(volumes, NETWORK, config, workers, scratch, equip)[0].history
    return curves


def compare_curves(curves: dict[str, list[Metrics]]) -> dict[str, dict[str, float]]:
    """By kind of batch norm: the largest distance of two workers from one over all epochs."""
    return {
        way: {
            name: max(abs(one[name] - two[name]) for one, two in zip(curves["one"], curves[way], strict=True))
            for name in ("train_loss", "validation_loss")
        }
        for way in WAYS
    }


def main(arguments: list[str]) -> int:
    """Print the curves and how far they are apart, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--scans", type=int, default=48)
    chosen = parser.parse_args(arguments)
    curves = trace_curves(chosen.epochs, chosen.scans)
    rows = [
        [epoch, *(f"{curves[name][epoch]['train_loss']:.6f}" for name in ("one", *WAYS))]
        for epoch in range(chosen.epochs)
    ]
    header = ["epoch", "1 worker", "2 workers, own batch norm", "2 workers, shared batch norm"]
    print_table("training loss, global batch 4 (made-up volumes)", header, rows)
    print(json.dumps({"scans": chosen.scans, "epochs": chosen.epochs, "largest_distance": compare_curves(curves)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
