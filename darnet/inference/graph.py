"""One fold's network as scoring asks it: standard volumes enter; logits, class maps and mean depth gates leave.

What every backend computes is written here once; a backend decides how.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from darnet.cam import class_activation_maps
from darnet.model import DARNet, FeatureTrace, scale_voxels
from darnet.scan import FloatArray, Uint8Array


class FoldAnswer(NamedTuple):
    """What one fold says of a batch.

    Shape: `logits` (B, classes); `class_maps` (B, classes, d, h, w); `depth_gates` (B, d), mean over channels, None
           without depth attention.
    """

    logits: FloatArray
    class_maps: FloatArray
    depth_gates: FloatArray | None


class Backend(Protocol):
    """The folds' networks behind a forward pass of fixed shape, which makes a scan's numbers depend on it alone."""

    @property
    def forward_scans(self) -> int:
        """Scans of one forward pass."""

    def forward(self, volumes: Sequence[Uint8Array]) -> list[FoldAnswer]:
        """Each fold's answer, in order, to at most `forward_scans` volumes; to fewer, others may follow theirs.

        Shape: (D, H, W) uint8 each; it may be read-only, and lies where the cluster has it.
        """


def explain_trace(network: DARNet, trace: FeatureTrace) -> tuple[Tensor, ...]:
    """Logits, class maps and, with depth attention, mean gates, in float32 whatever the network was run in.

    Shape: (B, classes), (B, classes, d, h, w), (B, d).
    """
    features = trace.features.float()
    logits, class_maps = network.classify(features), class_activation_maps(features, network.head.weight)
    if trace.depth_gates is None:
        return logits, class_maps
    return logits, class_maps, trace.depth_gates.float().mean(dim=1)


class ScoringGraph(nn.Module):
    """The same as one module, for what takes a network apart."""

    def __init__(self, network: DARNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, voxels: Tensor) -> tuple[Tensor, ...]:
        """Shape: (B, D, H, W) uint8 -> see `explain_trace`."""
        return explain_trace(self.network, self.network.trace(scale_voxels(voxels)))


def fold_batch_norm(network: DARNet) -> DARNet:
    """A copy for scoring, in which batch norm has gone into the convolution before it: one map less to read and write.

    The same function but for rounding, which moves a probability by less than 1e-4.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            _fold_pairs(module)
    return folded.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def _fold_pairs(layers: nn.Sequential) -> None:
    """Layers keep their places, so that the rest of the network does not know."""
    for index in range(len(layers) - 1):
        conv, norm = layers[index], layers[index + 1]
        if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
            layers[index], layers[index + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
