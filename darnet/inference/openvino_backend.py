"""The folds' networks in OpenVINO, for Intel-like CPUs: a bundle enters, each fold's answer to a batch leaves.

The only module that knows openvino and nncf, which come with `pip install -c constraints.txt '.[cpu]'`.
"""

import contextlib
import hashlib
import logging
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from darnet.bundle import Bundle, Int8Graph, load_network
from darnet.config import ScoreConfig, digest_json
from darnet.errors import StorageError, UsageError
from darnet.inference.graph import FoldAnswer, ScoringGraph, fold_batch_norm
from darnet.model import DARNet
from darnet.scan import Uint8Array
from darnet.storage import open_store
from darnet.threads import describe_openvino_threads, set_model_threads

GRAPH_REVISION = 1  # raise when the code between weights and compiled network changes what is computed
DEVICE = "CPU"
PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # what is not INT8 stays as it is measured, in float32
COMPILED_FOLDER = "compiled"
TRACED_PLANE = (16, 16)

Graph: TypeAlias = Any
"""An `openvino.Model`."""
Compiled: TypeAlias = Any
"""An `openvino.CompiledModel`."""


class OpenVINOBackend:
    """All folds as one compiled graph, asked for one scan at a time.

    Folds in one graph take as long as one after another, and share the memory for their maps; two scans at once take
    twice as long (`make bench-networks`), so that a scan's numbers need depend on no other.
    """

    forward_scans = 1

    def __init__(self, bundle: Bundle, config: ScoreConfig) -> None:
        """Raises: UsageError if openvino is not installed, if this processor has no bf16 and that is asked for, or if
        others may write to the cache.
        """
        set_model_threads(config.num_threads)
        self._request = _prepare(bundle, config).create_infer_request()
        self._num_folds = len(bundle.manifest.folds)

    def forward(self, volumes: Sequence[Uint8Array]) -> list[FoldAnswer]:
        """See `Backend`."""
        (voxels,) = volumes
        return _ask(self._request, voxels[None], self._num_folds)


def load_openvino() -> Any:
    """The package openvino, without its telemetry: a hospital's machine reports to nobody.

    Raises: UsageError.
    """
    # openvino and nncf do without this package of theirs, which would send what is used, and keep files in the home.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise _refuse_missing("openvino") from error
    return openvino


def load_nncf() -> Any:
    """The package nncf, which quantises. Raises: UsageError."""
    load_openvino()
    try:
        import nncf
    except ImportError as error:
        raise _refuse_missing("nncf") from error
    return nncf


def describe_openvino() -> dict[str, str]:
    """What a compiled network's numbers may depend on beside its settings: version and processor."""
    openvino = load_openvino()
    core = openvino.Core()
    abilities = sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
    name = core.get_property(DEVICE, "FULL_DEVICE_NAME")
    return {"openvino": openvino.__version__, "processor": f"{name} ({' '.join(abilities)})"}


def convert_network(network: DARNet) -> Graph:
    """The network for one scan, with batch norm folded, as a graph with the outputs of `ScoringGraph`.

    It is traced on a scan small in plane, of which weights and layers know nothing: a second in place of ten.
    Shape: (1, D, H, W) uint8 in.
    """
    openvino = load_openvino()
    depth, height, width = network.config.volume_shape
    folded = fold_batch_norm(network)
    folded.config = folded.config.model_copy(update={"volume_shape": (depth, *TRACED_PLANE)})
    example = torch.zeros((1, depth, *TRACED_PLANE), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():  # torch warns of checks of shapes, which need no tracing
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ScoringGraph(folded), example, check_trace=False)
        return openvino.convert_model(traced, input=[openvino.PartialShape([1, depth, height, width])])


def quantize_graph(graph: Graph, volumes: Iterable[Uint8Array]) -> Int8Graph:
    """The graph in INT8, its ranges measured on these volumes, as files of OpenVINO's format.

    Source: post-training quantisation by nncf. Ours: the linear layers of gates and head and the first convolution
            stay in float32, which costs little time; no bias correction. On phantoms' networks nncf's defaults moved
            probabilities by up to 0.54, these by up to 0.05. Weights have half their range in every layer, and not in
            the first alone as by default: without VNNI a processor adds products of bytes up in 16 bits.
    """
    openvino, nncf = load_openvino(), load_nncf()
    nncf.set_log_level(logging.ERROR)  # else it tells of every layer that is left alone
    samples = [voxels[None] for voxels in volumes]
    operations = graph.get_ordered_ops()
    first = next(item.get_friendly_name() for item in operations if item.get_type_name() == "Convolution")
    with contextlib.redirect_stdout(sys.stderr):  # its progress is for people
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(samples),
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(types=["MatMul"], names=[first], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE, disable_bias_correction=True
            ),
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return Int8Graph(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def read_graph(files: Int8Graph) -> Graph:
    """A graph from its files' bytes."""
    graph: Graph = load_openvino().Core().read_model(files.graph, files.weights)
    return graph


def join_graphs(graphs: Sequence[Graph]) -> Graph:
    """Several folds' graphs as one, of one input, and of the outputs of each, one fold's after another's."""
    shared = graphs[0].get_parameters()[0]
    for graph in graphs[1:]:
        graph.get_parameters()[0].output(0).replace(shared.output(0))
    results = [result for graph in graphs for result in graph.get_results()]
    return load_openvino().Model(results, [shared], "folds")


def compile_graph(graph: Graph, config: ScoreConfig) -> Compiled:
    """A graph made ready for this processor, in the precision and with the threads of the settings."""
    return load_openvino().Core().compile_model(graph, DEVICE, _describe_run(config))


def ask_graph(graph: Graph, config: ScoreConfig, volumes: Iterable[Uint8Array]) -> Iterator[FoldAnswer]:
    """The answer to each volume, of batch 1.

    Shape: (D, H, W) each.
    """
    request = compile_graph(graph, config).create_infer_request()
    for voxels in volumes:
        yield _ask(request, voxels[None])[0]


def _refuse_missing(name: str) -> UsageError:
    return UsageError(f"{name} is not installed, and the backend openvino needs it; pip install '.[cpu]'")


def _describe_run(config: ScoreConfig) -> dict[str, Any]:
    """How a network is compiled.

    The precision is always said, or OpenVINO would take bf16 wherever it can.
    """
    return {
        **describe_openvino_threads(config.num_threads),
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[config.precision],
        "PERFORMANCE_HINT": "LATENCY",
    }


def _ask(request: Any, voxels: Uint8Array, num_folds: int = 1) -> list[FoldAnswer]:
    """Each fold's answer, copied out of the request, which the next scan overwrites."""
    results = request.infer([voxels])
    tensors = [results[index].copy() for index in range(len(results))]
    step = len(tensors) // num_folds
    folds = (tensors[start : start + step] for start in range(0, len(tensors), step))
    return [FoldAnswer(fold[0], fold[1], fold[2] if step > 2 else None) for fold in folds]


def _prepare(bundle: Bundle, config: ScoreConfig) -> Compiled:
    """The bundle's folds compiled for this processor, from the cache if they are there."""
    here = describe_openvino()
    if config.precision == "bf16" and "BF16" not in here["processor"]:
        raise UsageError(f"precision bf16: this processor has none, {here['processor']}; use fp32 or int8")
    cache, key = config.cache.expanduser() / COMPILED_FOLDER, _name_compiled(bundle, config, here)
    refuse_shared_cache(cache)
    kept = _read_compiled(cache, key, config)
    if kept is not None:
        return kept
    graphs = [_make_graph(bundle, place, config) for place in range(len(bundle.manifest.folds))]
    compiled = compile_graph(join_graphs(graphs), config)
    _keep_compiled(cache, key, compiled)
    return compiled


def refuse_shared_cache(cache: Path) -> None:
    """Demand that what is compiled there is this user's own: a digest beside a file says nothing of who wrote both.

    Raises: UsageError.
    """
    with contextlib.suppress(OSError):  # where none is yet, or none can be
        found = cache.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{cache}: others may write there, and what is compiled runs as it lies there; delete it, and it "
                "is made anew as this user's own; or name another place with --score.cache"
            )


def _make_graph(bundle: Bundle, place: int, config: ScoreConfig) -> Graph:
    """Of the fold at this place: its INT8 graph, which `select_model` has seen to be there, or its network's."""
    if config.precision != "int8":
        return convert_network(load_network(bundle, place))
    files = bundle.int8[place]
    assert files is not None
    return read_graph(files)


def _name_compiled(bundle: Bundle, config: ScoreConfig, here: dict[str, str]) -> str:
    """A digest of all that the compiled networks are made of and for."""
    folds = bundle.manifest.folds
    facts = {
        "revision": GRAPH_REVISION,
        "network": bundle.manifest.settings.network.model_dump(mode="json"),
        "weights": [fold.sha256 for fold in folds],
        "int8": [fold.int8.digests for fold in folds if fold.int8 is not None] if config.precision == "int8" else [],
        "run": _describe_run(config),
        "torch": torch.__version__,
        **here,
    }
    return digest_json(facts)


def _read_compiled(cache: Path, key: str, config: ScoreConfig) -> Compiled | None:
    """What this machine compiled before, if it is there and whole."""
    store = open_store(str(cache))
    try:
        blob, digest = store.read_bytes(f"{key}.blob"), store.read_bytes(f"{key}.sha256")
    except StorageError:  # none is there, or none can be
        return None
    if hashlib.sha256(blob).hexdigest().encode() != digest:
        return None
    return load_openvino().Core().import_model(blob, DEVICE, _describe_run(config))


def _keep_compiled(cache: Path, key: str, compiled: Compiled) -> None:
    """Beside a digest: of a damaged file OpenVINO would say nothing. Where there is no room we do without."""
    blob = compiled.export_model().getvalue()
    with contextlib.suppress(StorageError, OSError):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = open_store(str(cache))
        store.write_bytes(f"{key}.blob", blob)
        store.write_bytes(f"{key}.sha256", hashlib.sha256(blob).hexdigest().encode())
