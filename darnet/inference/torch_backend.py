"""The folds' networks in torch, on a CPU or a GPU: a batch of standard volumes enters, each fold's answer leaves."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from darnet.inference.graph import FoldAnswer, explain_trace, fold_batch_norm
from darnet.model import DARNet, FeatureTrace, scale_voxels
from darnet.scan import Uint8Array
from darnet.threads import set_model_threads

CPU_FORWARD_SCANS = 2


class TorchBackend:
    """A GPU takes a batch at a time, a CPU two scans: it gains nothing from more, and of one scan on one thread torch
    takes a convolution eight times slower. The number of threads of this process is set, since it is part of the
    numbers. With `compiles`, torch.compile makes kernels at the first scans, the same for all folds.
    """

    def __init__(
        self,
        networks: Iterable[DARNet],
        *,
        batch_size: int,
        num_threads: int,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        compiles: bool = False,
    ) -> None:
        set_model_threads(num_threads)
        self._device = torch.device(device)
        self._networks = [fold_batch_norm(network).to(self._device) for network in networks]
        self._trace = torch.compile(_trace, dynamic=False) if compiles else _trace
        self._precision = precision
        self.forward_scans = CPU_FORWARD_SCANS if device == "cpu" else batch_size

    def forward(self, volumes: Sequence[Uint8Array]) -> list[FoldAnswer]:
        """See `Backend`."""
        with torch.inference_mode():
            x = scale_voxels(self._send(volumes))  # (B, 1, D, H, W)
            answers = [self.ask(network, x) for network in self._networks]
        return [_receive(answer) for answer in answers]

    def ask(self, network: DARNet, x: Tensor) -> tuple[Tensor, ...]:
        """One fold's answer on the device; head and maps are in float32, as bf16 would round a logit to two digits.

        Shape: (B, 1, D, H, W) -> see `explain_trace`.
        """
        is_bf16 = self._precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16) if is_bf16 else nullcontext():
            trace = self._trace(network, x)
        return explain_trace(network, trace)

    def _send(self, volumes: Sequence[Uint8Array]) -> Tensor:
        """The bytes go to the device as they are, a quarter of what floats would be, from memory it can read itself.

        Volumes are laid side by side as a pass needs them, the only copy on their way here, and followed by zeros.
        """
        shape = (self.forward_scans, *volumes[0].shape)
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        np.stack(volumes, out=batch.numpy()[: len(volumes)])
        return batch.to(self._device, non_blocking=True)


def _trace(network: DARNet, x: Tensor) -> FeatureTrace:
    return network.trace(x)


def _receive(answer: tuple[Tensor, ...]) -> FoldAnswer:
    logits, class_maps, *gates = (tensor.cpu().numpy() for tensor in answer)
    return FoldAnswer(logits, class_maps, gates[0] if gates else None)
