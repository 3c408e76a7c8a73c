"""The dual-attention 3D ResNet18: a standard volume scaled to [0, 1] enters, class logits leave.

Feature map, depth gates and head can be had apart, so that a class activation map needs no hooks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from darnet.config import ModelConfig

__all__ = [
    "ChannelAttention",
    "DARNet",
    "DepthAttention",
    "FeatureTrace",
    "ModelConfig",
    "ResidualBlock",
    "RowwiseLinear",
    "build_network",
    "count_parameters",
    "scale_voxels",
]

STAGE_WIDTHS = (1, 2, 4, 8)  # times base_channels. Source: ResNet18, paper ref. 8
BLOCKS_PER_STAGE = 2  # Source: ResNet18, paper ref. 8
CHANNEL_REDUCTION = 16  # Source: paper ref. 11
LINEAR_STD = 0.01  # of first weights. Source: authors' code


class FeatureTrace(NamedTuple):
    """What the last block yields.

    Shape: `features` (B, 8 * base_channels, d, h, w); `depth_gates` (B, 8 * base_channels, d), None without DA.
    """

    features: Tensor
    depth_gates: Tensor | None


class RowwiseLinear(nn.Linear):
    """A linear layer that gives a scan the same bits wherever it stands in a batch.

    One product for the whole batch does not: some processors (AVX-512) sum odd rows in another order than even ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, in) -> (B, out)."""
        if self.training:
            return super().forward(x)
        return torch.stack([F.linear(row, self.weight, self.bias) for row in x])


class ChannelAttention(nn.Module):
    """Gate each channel by all channels' means.

    Source: paper ref. 11, in 3D as in paper Fig. 1a.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // CHANNEL_REDUCTION)
        self.squeeze = RowwiseLinear(channels, hidden)
        self.excite = RowwiseLinear(hidden, channels)

    def forward(self, means: Tensor) -> Tensor:
        """Gates in (0, 1) from the means over D, H and W.

        Shape: (B, C) -> (B, C).
        """
        return torch.sigmoid(self.excite(F.relu(self.squeeze(means))))


class DepthAttention(nn.Module):
    """Gate each slice of each channel by all slices' means.

    Source: paper sec. 3.2 eq. 1-2; the hidden width D from the authors' code, which the parameter count confirms.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.channels, self.depth = channels, depth
        self.squeeze = RowwiseLinear(channels * depth, depth)
        self.excite = RowwiseLinear(depth, channels * depth)

    def forward(self, means: Tensor) -> Tensor:
        """Gates of eq. 2, in (0, 1), from the means over H and W, eq. 1.

        Shape:  (B, C, D) -> (B, C, D).
        Raises: ValueError if C or D is not what the layers were built for.
        """
        if means.shape[1:] != (self.channels, self.depth):
            raise ValueError(
                f"depth attention is built for {self.channels} channels of depth {self.depth}, got {tuple(means.shape)}"
            )
        gates = torch.sigmoid(self.excite(F.relu(self.squeeze(means.flatten(1)))))  # (B, C * D)
        return gates.view(-1, self.channels, self.depth)  # (B, C, D)


class ResidualBlock(nn.Module):
    """Two convolutions, then the attentions that are asked for, then the shortcut and ReLU.

    Source: paper Fig. 1 and sec. 3.1; DA before CA from the authors' code.
    """

    def __init__(self, in_channels: int, channels: int, depth: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv3d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm3d(channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm3d(channels),
        )
        self.depth_attention = DepthAttention(channels, depth) if config.depth_attention else None
        self.channel_attention = ChannelAttention(channels) if config.channel_attention else None
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm3d(channels)
            )

    def trace(self, x: Tensor) -> FeatureTrace:
        """Output and depth gates; shape as `forward`."""
        residual: Tensor = self.residual(x)  # (B, channels, depth, h, w)
        residual, depth_gates = self._attend(residual)
        return FeatureTrace(F.relu(residual + self.shortcut(x), inplace=True), depth_gates)

    def _attend(self, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale by both gates at once: CA needs the means of what DA leaves, not the map itself.

        The large map is read twice and written once, whichever attentions there are.
        """
        if self.depth_attention is None and self.channel_attention is None:
            return residual, None
        means = residual.mean(dim=(3, 4))  # (B, channels, depth)
        depth_gates, gates = None, torch.ones_like(means)
        if self.depth_attention is not None:
            gates = depth_gates = self.depth_attention(means)
        if self.channel_attention is not None:
            gates = gates * self.channel_attention((means * gates).mean(dim=2))[..., None]
        return residual * gates[..., None, None], depth_gates

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, in_channels, D, H, W) -> (B, channels, depth, h, w): each axis over the stride, rounded up."""
        return self.trace(x).features

    def recompute(self, x: Tensor) -> Tensor:
        """As `forward`, but of all maps only the input is kept for the backward pass, which computes the rest again."""
        features: Tensor = checkpoint(self, x, use_reentrant=False, context_fn=self._recompute_contexts)
        return features

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _hold_statistics(self)


class DARNet(nn.Module):
    """3D ResNet18 with the attentions of `config`; without either it is the paper's baseline.

    Source: paper sec. 3.1 (one downsampling fewer than ResNet18: no max-pool, and the stem keeps the depth).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_blocks = False  # gradient checkpointing in training; changes no value
        base = config.base_channels
        self.stem = nn.Sequential(
            nn.Conv3d(1, base, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
            nn.BatchNorm3d(base),
            nn.ReLU(inplace=True),
        )
        stages = []
        in_channels, depth = base, config.volume_shape[0]
        for index, width in enumerate(STAGE_WIDTHS):
            stride = 1 if index == 0 else 2
            depth = -(-depth // stride)
            stages.append(_build_stage(in_channels, width * base, depth, stride, config))
            in_channels = width * base
        self.stages = nn.Sequential(*stages)
        self.head = RowwiseLinear(in_channels, config.num_classes)
        if not self.head.weight.is_meta:  # nothing to fill there, and torch loads its compiler (2 s) to pretend
            self.apply(_initialize)
        # The layout that small 3D convolutions are fastest in; the values are the same.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def trace(self, x: Tensor) -> FeatureTrace:
        """Last feature map, and the depth gates of the block that made it.

        Shape:  (B, 1, D, H, W) in [0, 1] -> see `FeatureTrace`; d is D / 8, h and w are H / 16 and W / 16, rounded up.
        Raises: ValueError on any other shape than the one the network is built for.
        """
        if x.dim() != 5 or x.shape[1:] != (1, *self.config.volume_shape):
            depth, height, width = self.config.volume_shape
            raise ValueError(f"the network takes (B, 1, {depth}, {height}, {width}), got {tuple(x.shape)}")
        *blocks, last = (module for module in self.modules() if isinstance(module, ResidualBlock))
        x = self.stem(x)  # (B, base, D, H / 2, W / 2)
        is_saving = self.recomputes_blocks and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = block.recompute(x) if is_saving else block(x)
        return last.trace(x)  # (B, 8 * base, d, h, w)

    def features(self, x: Tensor) -> Tensor:
        """Shape: (B, 1, D, H, W) -> (B, 8 * base_channels, d, h, w)."""
        return self.trace(x).features

    def classify(self, features: Tensor) -> Tensor:
        """Logits from a feature map: global average, then one linear layer.

        Shape: (B, 8 * base_channels, d, h, w) -> (B, num_classes).
        """
        logits: Tensor = self.head(features.mean(dim=(2, 3, 4)))  # (B, num_classes)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, 1, D, H, W) -> logits (B, num_classes)."""
        return self.classify(self.features(x))


def build_network(config: ModelConfig, seed: int, head_std: float = LINEAR_STD) -> DARNet:
    """Network with initial weights that depend on the arguments alone; the global random state is left as it was.

    `head_std` is the standard deviation of the head's weights.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the GPUs too, which fork_rng does not put back here.
        torch.default_generator.manual_seed(seed)
        network = DARNet(config)
    with torch.no_grad():
        network.head.weight *= head_std / LINEAR_STD
    return network


@contextmanager
def _hold_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm inside moves copies of its running statistics: the first pass has already moved the real ones."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, own in zip(norms, buffers, strict=True):
        for name, buffer in own.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            for name, buffer in own.items():
                setattr(norm, name, buffer)


def scale_voxels(voxels: Tensor) -> Tensor:
    """Shape: (B, D, H, W) uint8 -> (B, 1, D, H, W) float32 in [0, 1], on the same device."""
    return voxels.unsqueeze(1).float() / 255


def count_parameters(network: nn.Module) -> int:
    """Number of trained values; running statistics of batch norm are not among them."""
    return sum(parameter.numel() for parameter in network.parameters())


def _build_stage(in_channels: int, channels: int, depth: int, stride: int, config: ModelConfig) -> nn.Sequential:
    """Blocks of one stage; the first takes the stride and the new width."""
    first = ResidualBlock(in_channels, channels, depth, stride, config)
    rest = [ResidualBlock(channels, channels, depth, 1, config) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(first, *rest)


def _initialize(module: nn.Module) -> None:
    """Source: paper sec. 4.2 (Kaiming normal, biases 0); fan-out and the linear layers' N(0, 0.01), authors' code."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=LINEAR_STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
