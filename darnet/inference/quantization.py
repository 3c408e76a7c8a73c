"""INT8 for a trained bundle: bundle and volumes enter, the same bundle with an INT8 graph a fold leaves.

Each fold's ranges are measured on scans of its training, and what INT8 changes on its validation scans, whose pixels
took part in neither. The test cohort is left alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from darnet.bundle import Bundle, Int8Graph, load_network, read_bundle
from darnet.bundle_writing import add_int8_graphs, publish_bundles, refuse_existing
from darnet.config import ScoreConfig
from darnet.errors import HeldError, UsageError
from darnet.inference.openvino_backend import (
    Graph,
    ask_graph,
    convert_network,
    describe_openvino,
    load_nncf,
    quantize_graph,
    read_graph,
)
from darnet.manifest import FoldRecord, Int8Record
from darnet.scan import FloatArray, Uint8Array
from darnet.storage import Store
from darnet.terminal import show_progress
from darnet.volumes_folder import VolumesIndex, read_voxels

Rows: TypeAlias = NDArray[np.int64]

CALIBRATION_SCANS = 32  # a fold, at most. Source: ours; ranges of batch-normed maps settle within a dozen
MEASURED_SCANS = 64  # a fold, at most. Source: ours; ten minutes a fold on two cores
# Of one probability of one fold on any measured scan. Source: ours; above it a scan called with 0.55 could be called
# otherwise, and by what is seen of five folds' spread, INT8 would no longer be the smaller uncertainty.
MAX_DIFFERENCE = 0.05


def quantize_bundle(
    model: Store, index: VolumesIndex, out: str, config: ScoreConfig, bound: float = MAX_DIFFERENCE
) -> Bundle:
    """Make a bundle with INT8 graphs, measure what they change, and publish it.

    Both networks are run with the threads of `config`; while nncf measures ranges, OpenVINO takes what it likes.

    Raises: HeldError if a probability of a fold moves by more than `bound`; UsageError if the volumes are not those
        the bundle was trained on, or darnet[cpu] is not installed; as `read_bundle` and `publish_bundles`.
    """
    refuse_existing(out)
    bundle = read_bundle(model)
    _check_cohort(bundle, index)
    graphs, records = [], []
    with show_progress("quantising", len(bundle.manifest.folds)) as meter:
        for place in range(len(bundle.manifest.folds)):
            files, record = quantize_fold(bundle, place, index, config)
            graphs.append(files)
            records.append(record)
            meter.advance(1, {})
    _refuse_above(bound, bundle.manifest.folds, records)
    quantized, written = add_int8_graphs(bundle, model, graphs, records)
    publish_bundles(out, [("", written)])
    return quantized


def quantize_fold(bundle: Bundle, place: int, index: VolumesIndex, config: ScoreConfig) -> tuple[Int8Graph, Int8Record]:
    """One fold's INT8 graph and its differences to the same graph in float32, at the fold's temperature."""
    fold = bundle.manifest.folds[place]
    calibration = _draw(index.select_training(fold.number), CALIBRATION_SCANS, fold.seed)
    held_out = _draw(index.select_validation(fold.number), MEASURED_SCANS, fold.seed)
    graph = convert_network(load_network(bundle, place))
    files = quantize_graph(graph, _read(index, calibration))
    exact = _measure(graph, index, held_out, fold, config)
    rounded = _measure(read_graph(files), index, held_out, fold, config)
    difference = np.abs(rounded - exact)
    here = describe_openvino()
    record = Int8Record(
        graph_sha256=hashlib.sha256(files.graph).hexdigest(),
        weights_sha256=hashlib.sha256(files.weights).hexdigest(),
        calibration_scans=len(calibration),
        num_scans=len(held_out),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        changed_predictions=int((rounded.argmax(axis=1) != exact.argmax(axis=1)).sum()),
        nncf=load_nncf().__version__,
        **here,
    )
    return files, record


def _measure(graph: Graph, index: VolumesIndex, rows: Rows, fold: FoldRecord, config: ScoreConfig) -> FloatArray:
    """Probabilities of the rows; shape (N, classes)."""
    exact = config.model_copy(update={"precision": "fp32"})  # of all that the graph itself has not in INT8
    logits = [answer.logits[0] for answer in ask_graph(graph, exact, _read(index, rows))]
    probability: FloatArray = softmax(np.stack(logits) / np.float32(fold.temperature), axis=1)
    return probability


def _read(index: VolumesIndex, rows: Rows) -> Iterator[Uint8Array]:
    return (np.array(read_voxels(index, int(row))) for row in rows)


def _draw(rows: Rows, limit: int, seed: int) -> Rows:
    """At most `limit` of the rows, the same ones every time, in order."""
    chosen: Rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
    return chosen


def _check_cohort(bundle: Bundle, index: VolumesIndex) -> None:
    """Raises: UsageError: with another cohort, scans of a fold's training could be taken for held-out ones."""
    if index.cohort_sha256 != bundle.manifest.cohort_sha256:
        raise UsageError(
            f"{index.place}: not the volumes that the bundle was trained on (cohort_sha256 {index.cohort_sha256[:12]}, "
            f"the bundle has {bundle.manifest.cohort_sha256[:12]}); name the folder that jobs.train was given"
        )
    if index.volume.preprocessing_version != bundle.manifest.preprocessing_version:
        raise UsageError(
            f"{index.place}: prepared as {index.volume.preprocessing_version}, but the bundle was trained on "
            f"volumes of {bundle.manifest.preprocessing_version}; run jobs.prepare with the bundle's volume settings"
        )


def _refuse_above(bound: float, folds: Sequence[FoldRecord], records: Sequence[Int8Record]) -> None:
    """Raises: HeldError naming the fold that INT8 changes most."""
    fold, worst = max(zip(folds, records, strict=True), key=lambda pair: pair[1].max_difference)
    if worst.max_difference > bound:
        raise HeldError(
            f"INT8 moves a probability of fold {fold.number} by {worst.max_difference:.4f} on {worst.num_scans} "
            f"validation scans, more than {bound:g}: nothing is written; score with fp32 or bf16",
            {"int8": [record.model_dump(mode="json") for record in records]},
        )
