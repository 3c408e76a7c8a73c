"""Seconds a scan of each way to run the networks on a CPU: `make bench-networks` prints them for the paper's network.

Weights are untrained and scans are noise, which changes no time; what INT8 and bf16 do to trained networks is not seen
here. Ways take turns, and medians are told. INT8's five folds are one graph compiled five times.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from darnet.config import ModelConfig, ScoreConfig
from darnet.inference.graph import ScoringGraph, fold_batch_norm, scale_voxels
from darnet.inference.openvino_backend import (
    compile_graph,
    convert_network,
    describe_openvino,
    load_openvino,
    quantize_graph,
)
from darnet.inference.torch_backend import TorchBackend
from darnet.model import DARNet, build_network
from darnet.terminal import print_table
from darnet.threads import set_num_threads

NUM_FOLDS = 5
Precision = Literal["fp32", "bf16", "int8"]
Way = tuple[str, int, int, Callable[[], Any]]
"""What it is, scans and folds of one call, and the call."""


class AllFolds(nn.Module):
    """Several folds as one graph that share their input."""

    def __init__(self, networks: list[DARNet]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(ScoringGraph(network) for network in networks)

    def forward(self, voxels: Tensor) -> tuple[Tensor, ...]:
        """Shape: (B, D, H, W) uint8 -> the outputs of each fold, one after another."""
        return tuple(tensor for fold in self.folds for tensor in fold(voxels))


def convert_folds(networks: list[DARNet], num_scans: int) -> Any:
    """One OpenVINO graph of all folds, for so many scans at once; see `convert_network`."""
    shape = (num_scans, *networks[0].config.volume_shape)
    small = (*shape[:2], 16, 16)
    folded = [fold_batch_norm(network) for network in networks]
    for network in folded:
        network.config = network.config.model_copy(update={"volume_shape": small[1:]})
    with torch.no_grad():
        traced = torch.jit.trace(AllFolds(folded), torch.zeros(small, dtype=torch.uint8), check_trace=False)
    openvino = load_openvino()
    return openvino.convert_model(traced, input=[openvino.PartialShape(list(shape))])


def list_ways(networks: list[DARNet], num_threads: int) -> list[Way]:
    """Every way, ready to be timed."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 256, (2, *networks[0].config.volume_shape), dtype=np.uint8)
    first = networks[0]
    ways: list[Way] = [(f"torch as trained, {n} at once", n, 1, _run_eagerly(first, voxels[:n])) for n in (1, 2)]
    for precision in ("fp32", "bf16"):
        backend = TorchBackend([first], batch_size=2, num_threads=num_threads, precision=precision)
        ways.append((f"torch {precision}, 2 at once", 2, 1, lambda backend=backend: backend.forward(voxels)))

    def ask(precision: Precision, graphs: list[Any], num_scans: int = 1) -> Callable[[], Any]:
        config = ScoreConfig(backend="openvino", precision=precision, num_threads=num_threads)
        requests = [compile_graph(graph, config).create_infer_request() for graph in graphs]
        return lambda: [request.infer([voxels[:num_scans]]) for request in requests]

    graphs = [convert_network(network) for network in networks]
    int8 = load_openvino().Core().read_model(*quantize_graph(graphs[0], voxels[:1]))
    for precision in ("fp32", "bf16"):
        ways.append((f"openvino {precision}", 1, 1, ask(precision, graphs[:1])))
        ways.append((f"openvino {precision}, 2 at once", 2, 1, ask(precision, [convert_folds([first], 2)], 2)))
        ways.append((f"openvino {precision}, {NUM_FOLDS} folds", 1, NUM_FOLDS, ask(precision, graphs)))
        one_graph = ask(precision, [convert_folds(networks, 1)])
        ways.append((f"openvino {precision}, {NUM_FOLDS} folds in one graph", 1, NUM_FOLDS, one_graph))
    ways.append(("openvino int8", 1, 1, ask("int8", [int8])))
    ways.append((f"openvino int8, {NUM_FOLDS} folds", 1, NUM_FOLDS, ask("int8", [int8] * NUM_FOLDS)))
    return ways


def _run_eagerly(network: DARNet, voxels: np.ndarray) -> Callable[[], Any]:
    """The network with its batch norm, as it comes from training."""

    def run() -> Any:
        with torch.inference_mode():
            return network(scale_voxels(torch.from_numpy(voxels)))

    return run


def measure(ways: list[Way], repeats: int) -> list[float]:
    """Median seconds a scan of each way, after a call that is not counted."""
    spent: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for seconds, (_, num_scans, _, call) in zip(spent, ways, strict=True):
            start_s = time.perf_counter()
            call()
            if turn > 0:
                seconds.append((time.perf_counter() - start_s) / num_scans)
    return [statistics.median(seconds) for seconds in spent]


def main(arguments: list[str]) -> int:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=ModelConfig().volume_shape)
    parser.add_argument("--base-channels", type=int, default=ModelConfig().base_channels)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name begins so, and torch as trained")
    chosen = parser.parse_args(arguments)
    set_num_threads(chosen.threads)
    config = ModelConfig(volume_shape=tuple(chosen.shape), base_channels=chosen.base_channels)
    networks = [build_network(config, fold, 1.0).eval() for fold in range(NUM_FOLDS)]
    ways = [
        way
        for way in list_ways(networks, chosen.threads)
        if way[0].startswith(chosen.only) or way[0] == "torch as trained, 2 at once"
    ]
    seconds = measure(ways, chosen.repeats)
    (eager,) = [s for s, way in zip(seconds, ways, strict=True) if way[0] == "torch as trained, 2 at once"]
    rows = [[name, folds, s, f"{eager * folds / s:.2f}"] for s, (name, _, folds, _) in zip(seconds, ways, strict=True)]
    title = f"{config.volume_shape}, {config.base_channels} channels, {chosen.threads} threads"
    print_table(title, ["way", "folds", "s a scan", "times torch as trained"], rows)
    found = {name: round(s, 4) for s, (name, *_) in zip(seconds, ways, strict=True)}
    print(json.dumps({"repeats": chosen.repeats, "threads": chosen.threads, **describe_openvino(), "seconds": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
