"""Seconds a scan of each way to run the networks on a CPU: `make bench-networks` prints them for the paper's network.

Weights are untrained and scans are noise, which changes no time; what INT8 and bf16 do to trained networks is not seen
here. Ways take turns, and medians are told. INT8's five folds are the same one five times.
"""

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from darnet.bundle import Int8Graph
from darnet.config import ModelConfig, ScoreConfig
from darnet.inference.graph import ScoringGraph, fold_batch_norm
from darnet.inference.openvino_backend import (
    compile_graph,
    convert_network,
    describe_openvino,
    join_graphs,
    load_openvino,
    quantize_graph,
    read_graph,
)
from darnet.inference.torch_backend import TorchBackend
from darnet.model import DARNet, build_network, scale_voxels
from darnet.terminal import print_table
from darnet.threads import set_model_threads

NUM_FOLDS = 5
BASELINE = "torch as trained, 2 at once"  # what scoring did before it had backends
SAME_FOLDS = "openvino int8, 5 folds"
Precision = Literal["fp32", "bf16", "int8"]
Way = tuple[str, int, int, Callable[[], Callable[[], Any]]]
"""What it is, scans and folds of one call, and what makes the call ready."""


def convert_two_scans(network: DARNet) -> Any:
    """As `convert_network`, for two scans at once."""
    depth, height, width = network.config.volume_shape
    folded = fold_batch_norm(network)
    folded.config = folded.config.model_copy(update={"volume_shape": (depth, 16, 16)})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.zeros((2, depth, 16, 16), dtype=torch.uint8)
        traced = torch.jit.trace(ScoringGraph(folded), example, check_trace=False)
    openvino = load_openvino()
    return openvino.convert_model(traced, input=[openvino.PartialShape([2, depth, height, width])])


def list_ways(networks: list[DARNet], num_threads: int) -> list[Way]:
    """Every way, to be made ready."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 256, (2, *networks[0].config.volume_shape), dtype=np.uint8)
    first = networks[0]

    def run_torch(precision: Literal["fp32", "bf16"], folds: list[DARNet]) -> Callable[[], Any]:
        backend = TorchBackend(folds, batch_size=2, num_threads=num_threads, precision=precision)
        return lambda: backend.forward(voxels)

    def ask(precision: Precision, graphs: list[Any], num_scans: int = 1) -> Callable[[], Any]:
        config = ScoreConfig(backend="openvino", precision=precision, num_threads=num_threads)
        requests = [compile_graph(graph, config).create_infer_request() for graph in graphs]
        return lambda: [request.infer([voxels[:num_scans]]) for request in requests]

    def convert() -> list[Any]:
        return [convert_network(network) for network in networks]

    @functools.cache
    def quantize() -> Int8Graph:
        return quantize_graph(convert_network(first), voxels[:1])

    def join_int8() -> list[Any]:
        return [join_graphs([read_graph(quantize()) for _ in networks])]

    return [
        ("torch as trained, 1 at once", 1, 1, lambda: _run_eagerly(first, voxels[:1])),
        (BASELINE, 2, 1, lambda: _run_eagerly(first, voxels)),
        ("torch fp32, 2 at once", 2, 1, lambda: run_torch("fp32", [first])),
        ("torch fp32, 5 folds, 2 at once", 2, NUM_FOLDS, lambda: run_torch("fp32", networks)),
        ("torch bf16, 2 at once", 2, 1, lambda: run_torch("bf16", [first])),
        ("openvino fp32", 1, 1, lambda: ask("fp32", [convert_network(first)])),
        ("openvino fp32, 2 at once", 2, 1, lambda: ask("fp32", [convert_two_scans(first)], 2)),
        ("openvino fp32, 5 folds", 1, NUM_FOLDS, lambda: ask("fp32", [join_graphs(convert())])),
        ("openvino bf16", 1, 1, lambda: ask("bf16", [convert_network(first)])),
        ("openvino bf16, 2 at once", 2, 1, lambda: ask("bf16", [convert_two_scans(first)], 2)),
        ("openvino bf16, 5 folds", 1, NUM_FOLDS, lambda: ask("bf16", [join_graphs(convert())])),
        ("openvino bf16, 5 folds one after another", 1, NUM_FOLDS, lambda: ask("bf16", convert())),
        ("openvino int8", 1, 1, lambda: ask("int8", [read_graph(quantize())])),
        (SAME_FOLDS, 1, NUM_FOLDS, lambda: ask("int8", join_int8())),
    ]


def _run_eagerly(network: DARNet, voxels: np.ndarray) -> Callable[[], Any]:
    """The network with its batch norm, as it comes from training."""

    def run() -> Any:
        with torch.inference_mode():
            return network(scale_voxels(torch.from_numpy(voxels)))

    return run


def measure(ways: list[Way], repeats: int) -> list[float]:
    """Median seconds a scan of each way, after a call that is not counted."""
    calls = [make() for *_, make in ways]
    spent: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for seconds, call, (_, num_scans, *_) in zip(spent, calls, ways, strict=True):
            start_s = time.perf_counter()
            call()
            if turn > 0:
                seconds.append((time.perf_counter() - start_s) / num_scans)
        print(f"turn {turn} of {repeats} done", file=sys.stderr)
    return [statistics.median(seconds) for seconds in spent]


def main(arguments: list[str]) -> int:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=ModelConfig().volume_shape)
    parser.add_argument("--base-channels", type=int, default=ModelConfig().base_channels)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name begins so, and the baseline")
    chosen = parser.parse_args(arguments)
    set_model_threads(chosen.threads)
    config = ModelConfig(volume_shape=tuple(chosen.shape), base_channels=chosen.base_channels)
    networks = [build_network(config, fold, 1.0).eval() for fold in range(NUM_FOLDS)]
    has_bf16 = "BF16" in describe_openvino()["processor"]  # else it is put together from float32, five times as slow
    ways = [
        way
        for way in list_ways(networks, chosen.threads)
        if way[0] == BASELINE or (way[0].startswith(chosen.only) and (has_bf16 or "bf16" not in way[0]))
    ]
    seconds = measure(ways, chosen.repeats)
    (eager,) = [s for s, way in zip(seconds, ways, strict=True) if way[0] == BASELINE]
    rows = [[name, folds, s, f"{eager * folds / s:.2f}"] for s, (name, _, folds, _) in zip(seconds, ways, strict=True)]
    title = f"{config.volume_shape}, {config.base_channels} channels, {chosen.threads} threads"
    print_table(title, ["way", "folds", "s a scan", "times torch as trained"], rows)
    if any(name == SAME_FOLDS for name, *_ in ways):
        print(f"{SAME_FOLDS}: one graph five times, as one fold alone was quantised", file=sys.stderr)
    found = {name: round(s, 4) for s, (name, *_) in zip(seconds, ways, strict=True)}
    print(json.dumps({"repeats": chosen.repeats, "threads": chosen.threads, **describe_openvino(), "seconds": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
