"""Where a forward pass in OpenVINO goes, and how fast OpenVINO multiplies matrices: the reasons below `make bench`.

    python -m tests.bench.layers BUNDLE PRECISION

compiles the network of a bundle's first fold with OpenVINO's own profile, and prints a JSON line: seconds by kind of
layer and by the primitive that ran it, and those of as many multiplications and additions in products of matrices.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from darnet.bundle import Bundle, load_network, read_bundle
from darnet.inference.openvino_backend import DEVICE, PRECISION_HINTS, convert_network, load_openvino, read_graph
from darnet.storage import open_store
from darnet.terminal import print_table
from darnet.threads import describe_openvino_threads
from tests.bench.peer_roads import MATRIX_SIDE, SHAPE, THREADS, count_operations

PASSES, PRODUCTS = 3, 20  # after one of each that is not counted
SIDES = (384, 512, 768, 1024, MATRIX_SIDE)  # of matrices: of two cores' second caches to more than the last one holds
LEAST_SHARE = 0.01  # of the layers' time; kinds below it are told as one
CONVOLUTION = "Convolution"
Layer = tuple[str, str]  # its kind, and the primitive that ran it
Spent = dict[Layer, tuple[int, float]]  # how many, and their seconds


def measure(bundle: str, precision: str) -> dict[str, Any]:
    """Layers of a pass as (kind, primitive, number, seconds), the longest first, and the products beside it."""
    request = compile_profiled(make_graph(read_bundle(open_store(bundle)), precision), precision)
    volume = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8)
    layers = merge_passes(repeat(request, volume, PASSES))
    products = [(*measure_products(precision, side), side) for side in SIDES]
    fastest_s, primitive, side = min(products, key=lambda item: item[0] / item[2] ** 3)
    return {
        "seconds": sum(seconds for _, seconds in layers.values()),
        "layers": [[*layer, *spent] for layer, spent in layers.items()],
        "products_s": fastest_s * count_operations() / (2 * side**3),
        "products_by": primitive,
        "products_side": side,
    }


def make_graph(bundle: Bundle, precision: str) -> Any:
    """The first fold's network as OpenVINO's model."""
    if precision != "int8":
        return convert_network(load_network(bundle, 0))
    files = bundle.int8[0]
    assert files is not None
    return read_graph(files)


def compile_profiled(graph: Any, precision: str) -> Any:
    """A request to the graph, compiled as scoring has it, with a profile of every layer."""
    asked = {
        **describe_openvino_threads(THREADS),
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": True,
    }
    return load_openvino().Core().compile_model(graph, DEVICE, asked).create_infer_request()


def repeat(request: Any, tensor: Any, times: int) -> list[Spent]:
    """What each of so many passes spent, after one that is not counted."""
    request.infer([tensor])
    passes = []
    for _ in range(times):
        request.infer([tensor])
        passes.append(sum_layers(request.profiling_info))
    return passes


def sum_layers(profile: Sequence[Any]) -> Spent:
    """Layers that ran, by kind and primitive."""
    spent: Spent = {}
    for item in profile:
        if item.status.name != "EXECUTED":
            continue
        layer = item.node_type, item.exec_type
        count, seconds = spent.get(layer, (0, 0.0))
        spent[layer] = count + 1, seconds + item.real_time.total_seconds()
    return spent


def merge_passes(passes: Sequence[Spent]) -> Spent:
    """Medians, the longest first."""
    merged = {layer: (count, median(item[layer][1] for item in passes)) for layer, (count, _) in passes[0].items()}
    return dict(sorted(merged.items(), key=lambda item: -item[1][1]))


def measure_products(precision: str, side: int) -> tuple[float, str]:
    """Seconds of the fastest of some products of square matrices in OpenVINO, and the primitive that ran it.

    One of the matrices is constant, and in INT8 both are quantised as a network's are; the seconds are the product's
    alone, and the shortest, as they are to tell what a processor can do at best.
    """
    matrix = np.random.default_rng(1).random((side, side), np.float32)
    request = compile_profiled(make_product(precision, side), precision)
    passes = repeat(request, matrix, PRODUCTS * (MATRIX_SIDE // side) ** 2)
    (_, primitive), _ = next(iter(merge_passes(passes).items()))  # beside which all else is short
    return min(spent[layer][1] for spent in passes for layer in spent if layer[1] == primitive), primitive


def make_product(precision: str, side: int) -> Any:
    """A model of one product: of its input, and of a constant as weights are.

    Shape: (side, side) float32 in [0, 1] -> same.
    """
    openvino = load_openvino()
    from openvino import opset13 as ops

    given = ops.parameter([side, side], np.float32)
    constant = ops.constant(np.random.default_rng(0).random((side, side), np.float32) * 2 - 1)
    left, right = given, constant
    if precision == "int8":
        left = ops.fake_quantize(given, *_list_edges(0, 1), 256)
        right = ops.fake_quantize(constant, *_list_edges(-1, 1), 255)
    return openvino.Model([ops.matmul(left, right, False, False)], [given], "product")


def _list_edges(low: float, high: float) -> list[Any]:
    """Lower and upper edge, of what enters and of what leaves."""
    return [np.float32(edge) for edge in (low, high, low, high)]


def print_layers(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each way of the network, and why its goal is reached or missed."""
    for row in rows:
        title = f"where a forward pass goes, {row['road'].removeprefix('ours, ')}: by OpenVINO's profile"
        print_table(title, ["layer", "primitive", "number", "s", "share"], list_lines(row))
    for row in rows:
        print(f"{explain_layers(row)}; repeat by `{row['repeat']}`", file=sys.stderr)


def list_lines(row: Mapping[str, Any]) -> list[list[Any]]:
    """A line for each kind and primitive of some weight, and one for all others."""
    whole_s = row["seconds"]
    heavy = [layer for layer in row["layers"] if layer[3] >= LEAST_SHARE * whole_s]
    light = [layer for layer in row["layers"] if layer not in heavy]
    rest = [["all else", "", sum(layer[2] for layer in light), float(sum(layer[3] for layer in light))]]
    return [[*layer, f"{layer[3] / whole_s:.1%}"] for layer in [*heavy, *(rest if light else [])]]


def explain_layers(row: Mapping[str, Any]) -> str:
    """What the goal beside eager torch is owed to: convolutions, and what products of matrices would allow."""
    ((peer, least),) = row["goals"].items()
    times, eager_s, products_s = row["times"][peer], row["eager_s"], row["products_s"]
    convolutions = [layer for layer in row["layers"] if layer[0] == CONVOLUTION]
    by_winograd = sum("winograd" in layer[1].lower() for layer in convolutions)
    share = sum(layer[3] for layer in convolutions) / row["seconds"]
    allowed = f"with which a pass would be {eager_s / products_s:.3g} x {peer}"
    if products_s > row["seconds"]:
        allowed = "more than its layers: no floor"
    return (
        f"{row['road']}: {times:.3g} x {peer}, at least {least:g}: {'reached' if times >= least else 'missed'}; "
        f"convolutions take {share:.0%} of its layers' {row['seconds']:.3g} s, "
        f"{'some' if by_winograd else 'none'} of them by a primitive named after Winograd; as many operations in "
        f"OpenVINO's fastest product of matrices, of {row['products_side']} ({row['products_by']}), take "
        f"{products_s:.3g} s, {allowed}"
    )


def profile_network(
    measure_way: Callable[[str], dict[str, Any]], rows: Sequence[dict[str, Any]], what: str
) -> list[dict[str, Any]]:
    """The layers of each way in OpenVINO that has a goal; `measure_way` takes its precision."""
    (eager,) = [row for row in rows if row["road"] == "eager torch"]
    found = []
    for row in rows:
        backend, _, precision = row["road"].removeprefix("ours, ").partition(" ")
        if backend == "openvino" and row["goals"]:
            kept = {name: row[name] for name in ("section", "road", "goals", "times")}
            found.append(kept | {"what": what, "repeats": 1, "eager_s": eager["seconds"]} | measure_way(precision))
    return found


def main(arguments: list[str]) -> int:
    """Measure and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("precision", choices=tuple(PRECISION_HINTS))
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given.bundle, given.precision)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
