"""The model bundle: a folder enters, the trained ensemble and all it needs leave; `bundle_writing` makes the folder.

A bundle never changes, holds no pickle, and alone rebuilds the ensemble. What is read has passed every digest.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from darnet.config import ModelConfig, ScoreConfig
from darnet.errors import UsageError
from darnet.history import HISTORY_FILE
from darnet.manifest import (
    MANIFEST_FILE,
    BundleManifest,
    FoldRecord,
    read_bundle_file,
    read_whole_manifest,
    select_folds,
)
from darnet.model import DARNet, count_parameters
from darnet.storage import Store

CARD_FILE = "MODEL_CARD.md"


class Int8Graph(NamedTuple):
    """A fold's INT8 graph as files of OpenVINO's format: XML that refers to the numbers beside it."""

    graph: bytes
    weights: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory: the fold files' bytes, verified against the manifest, in its order.

    `int8` has an entry a fold, None where it has no INT8 graph, or is empty where none has.
    """

    manifest: BundleManifest
    weights: tuple[bytes, ...] = field(repr=False)
    int8: tuple[Int8Graph | None, ...] = field(default=(), repr=False)


def read_bundle(store: Store) -> Bundle:
    """Read a bundle and check all of it against its digests.

    Raises: UsageError naming the file that is missing, damaged or changed, and what to do; StorageError.
    """
    manifest = read_whole_manifest(store)
    weights = []
    for record in manifest.folds:
        weights.append(read_bundle_file(store, record.file))
        _check_digest(store, record.file, weights[-1], record.sha256)
        _check_format(store, record.file, weights[-1])
    if manifest.history_sha256 is not None:
        _check_digest(store, HISTORY_FILE, read_bundle_file(store, HISTORY_FILE), manifest.history_sha256)
    int8 = tuple(_read_int8(store, record) for record in manifest.folds)
    return Bundle(manifest, tuple(weights), int8 if any(int8) else ())


def read_model(store: Store, config: ScoreConfig) -> Bundle:
    """The bundle as the settings of scoring ask for it. Raises: as `read_bundle` and `select_model`."""
    return select_model(read_bundle(store), config)


def select_model(bundle: Bundle, config: ScoreConfig) -> Bundle:
    """The bundle with the folds and the precision that are asked for, and with a `model_sha256` of their own.

    Some of the folds, bf16 and INT8 move probabilities visibly: that is another model, and is scored anew. So is bf16
    in another backend, which rounds elsewhere. In fp32, backends and processors stay within 1e-4 of each other, as
    GPU and CPU do: that is the same model, and a night on another machine scores nothing again.
    Raises: UsageError for a fold that the bundle has not, or has not in INT8.
    """
    manifest, places = select_folds(bundle.manifest, config)
    int8 = tuple(bundle.int8[place] for place in places) if bundle.int8 else ()
    return Bundle(manifest, tuple(bundle.weights[place] for place in places), int8)


def load_networks(bundle: Bundle) -> list[DARNet]:
    """The ensemble on the CPU, in evaluation mode, in the order of the folds."""
    return [load_network(bundle, place) for place in range(len(bundle.weights))]


def load_network(bundle: Bundle, place: int) -> DARNet:
    """The network of the fold at this place, as `load_networks`.

    Raises: UsageError naming the file, if it holds no such network's weights.
    """
    network = build_blueprint(bundle.manifest.settings.network).to_empty(device="cpu")
    try:
        # Copied, not assigned: a tensor inside the file's bytes may be aligned so that sums differ in the last bits.
        network.load_state_dict(safetensors.torch.load(bundle.weights[place]), strict=True)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise _refuse_format(bundle.manifest.folds[place].file, " ".join(str(error).split())[:400]) from error
    return network.eval()


def count_network_parameters(network: ModelConfig) -> int:
    """Trained values of one fold's network, counted without making them."""
    return count_parameters(build_blueprint(network))


def build_blueprint(network: ModelConfig) -> DARNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return DARNet(network)


def _read_int8(store: Store, record: FoldRecord) -> Int8Graph | None:
    if record.int8 is None:
        return None
    files = Int8Graph(*(read_bundle_file(store, name) for name in record.int8_files))
    for name, data, sha256 in zip(record.int8_files, files, record.int8.digests, strict=True):
        _check_digest(store, name, data, sha256)
    return files


def _check_digest(store: Store, name: str, data: bytes, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(
            f"{store.uri}/{name}: damaged, or of another model (its digest is not the one in {MANIFEST_FILE}); copy "
            "the bundle again from where it was trained"
        )


def _check_format(store: Store, name: str, data: bytes) -> None:
    """Demand the head of a safetensors file: its length, then what is in it as JSON. A pickle has none."""
    try:
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except ValueError as error:
        raise _refuse_format(f"{store.uri}/{name}", "no such head") from error
    if not isinstance(head, dict):
        raise _refuse_format(f"{store.uri}/{name}", "another head")


def _refuse_format(place: str, reason: str) -> UsageError:
    return UsageError(
        f"{place}: not weights of this network as safetensors ({reason}), though its digest is right; "
        f"whoever wrote {MANIFEST_FILE} meant other bytes: use no such bundle, and copy or train one again"
    )
