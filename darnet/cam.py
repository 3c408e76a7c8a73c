"""Class activation maps: a feature map and the head's weights enter, a map of each class leaves.

The map says what the logit was made of, voxel by voxel of the last feature map; it proves nothing about disease.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from darnet.scan import FloatArray


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Split each class's logit over the last feature map: the spatial mean of a map plus the bias is the logit.

    Shape:  features (B, C, d, h, w), weight (K, C) of the head -> (B, K, d, h, w).
    Source: paper sec. 4.5, ref. 27.
    """
    return torch.einsum("bcdhw,kc->bkdhw", features, weight)


def upsample_cam(class_map: Tensor, shape: tuple[int, int, int]) -> FloatArray:
    """Keep what speaks for the class and stretch it over the network input.

    Shape:  (d, h, w) -> (D, H, W) float32.
    Source: paper sec. 4.5 (up-sampled); ReLU first and trilinear with align_corners=False, ours.
    """
    positive = F.relu(class_map.detach().float().cpu())
    stretched = F.interpolate(positive[None, None], size=shape, mode="trilinear", align_corners=False)
    array: FloatArray = stretched[0, 0].numpy()
    return array
