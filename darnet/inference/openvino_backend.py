"""The folds' networks in OpenVINO, for Intel-like CPUs: a bundle enters, each fold's answer to a batch leaves.

The only module that knows openvino and nncf, which come with `pip install 'darnet[cpu]'`.
"""

import contextlib
import hashlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

from darnet.bundle import Bundle, FoldRecord, Int8Graph, load_network
from darnet.config import ModelConfig, ScoreConfig, digest_json
from darnet.errors import ObjectMissing, StorageError, UsageError
from darnet.inference.graph import FoldAnswer, ScoringGraph, fold_batch_norm
from darnet.model import DARNet
from darnet.scan import Uint8Array
from darnet.storage import open_store
from darnet.threads import set_num_threads

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
    """One compiled network a fold, asked for one scan at a time.

    Two scans at once take twice as long, and five folds in one graph as long as one after another
    (`make bench-networks`); so a scan's numbers depend on no other, and a fold can be left out.
    """

    forward_scans = 1

    def __init__(self, bundle: Bundle, config: ScoreConfig) -> None:
        """Raises: UsageError if openvino is not installed, or this processor has no bf16 and that is asked for."""
        set_num_threads(config.num_threads)
        self._requests = [compiled.create_infer_request() for compiled in _compile_folds(bundle, config)]

    def forward(self, voxels: Uint8Array) -> list[FoldAnswer]:
        """See `Backend`."""
        return [_ask(request, voxels) for request in self._requests]


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
            probabilities by up to 0.54, these by up to 0.05.
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
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return Int8Graph(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def read_graph(files: Int8Graph) -> Graph:
    """A graph from its files' bytes."""
    graph: Graph = load_openvino().Core().read_model(files.graph, files.weights)
    return graph


def compile_graph(graph: Graph, config: ScoreConfig) -> Compiled:
    """A graph made ready for this processor, in the precision and with the threads of the settings."""
    return load_openvino().Core().compile_model(graph, DEVICE, _describe_run(config))


def ask_graph(graph: Graph, config: ScoreConfig, volumes: Iterable[Uint8Array]) -> Iterator[FoldAnswer]:
    """The answer to each volume, of batch 1.

    Shape: (D, H, W) each.
    """
    request = compile_graph(graph, config).create_infer_request()
    for voxels in volumes:
        yield _ask(request, voxels[None])


def _refuse_missing(name: str) -> UsageError:
    return UsageError(f"{name} is not installed, and the backend openvino needs it; pip install 'darnet[cpu]'")


def _describe_run(config: ScoreConfig) -> dict[str, Any]:
    """How a network is compiled.

    The precision is always said, or OpenVINO would take bf16 wherever it can. Threads are not pinned: several actors
    on a machine would all be pinned to its first cores.
    """
    return {
        "INFERENCE_NUM_THREADS": config.num_threads,
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[config.precision],
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


def _ask(request: Any, voxels: Uint8Array) -> FoldAnswer:
    """The outputs are copied out of the request, which the next scan overwrites."""
    results = request.infer([voxels])
    logits, class_maps, *gates = (results[index].copy() for index in range(len(results)))
    return FoldAnswer(logits, class_maps, gates[0] if gates else None)


def _compile_folds(bundle: Bundle, config: ScoreConfig) -> list[Compiled]:
    here = describe_openvino()
    if config.precision == "bf16" and "BF16" not in here["processor"]:
        raise UsageError(f"precision bf16: this processor has none, {here['processor']}; use fp32 or int8")
    network = bundle.manifest.settings.network
    keys = [_name_compiled(network, record, config, here) for record in bundle.manifest.folds]
    cache = config.cache.expanduser() / COMPILED_FOLDER
    compiled = [_read_compiled(cache, key, config) for key in keys]
    for place, key in enumerate(keys):
        if compiled[place] is None:
            compiled[place] = compile_graph(_make_graph(bundle, place, config), config)
            _keep_compiled(cache, key, compiled[place])
    return compiled


def _make_graph(bundle: Bundle, place: int, config: ScoreConfig) -> Graph:
    """Of the fold at this place: its INT8 graph, which `select_model` has seen to be there, or its network's."""
    if config.precision != "int8":
        return convert_network(load_network(bundle, place))
    files = bundle.int8[place]
    assert files is not None
    return read_graph(files)


def _name_compiled(network: ModelConfig, record: FoldRecord, config: ScoreConfig, here: dict[str, str]) -> str:
    """A digest of all that a compiled network is made of and for."""
    facts = {
        "revision": GRAPH_REVISION,
        "network": network.model_dump(mode="json"),
        "weights": record.sha256 if config.precision != "int8" or record.int8 is None else record.int8.digests,
        "run": _describe_run(config),
        "torch": torch.__version__,
        **here,
    }
    return digest_json(facts)


def _read_compiled(cache: Path, key: str, config: ScoreConfig) -> Compiled | None:
    """The network this machine compiled before, if its file is there and whole."""
    try:
        digest, _, blob = open_store(str(cache)).read_bytes(key).partition(b"\n")
    except (ObjectMissing, StorageError):
        return None
    if hashlib.sha256(blob).hexdigest().encode() != digest:
        return None
    return load_openvino().Core().import_model(blob, DEVICE, _describe_run(config))


def _keep_compiled(cache: Path, key: str, compiled: Compiled) -> None:
    """Under a digest of its own: of a damaged file OpenVINO would say nothing. Without room for it we do without."""
    blob = compiled.export_model().getvalue()
    with contextlib.suppress(StorageError):
        open_store(str(cache), create=True).write_bytes(key, hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)
