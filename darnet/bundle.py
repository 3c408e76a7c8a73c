"""The model bundle: a folder enters, the trained ensemble and all it needs leave; `bundle_writing` makes the folder.

A bundle never changes, holds no pickle, and alone rebuilds the ensemble. What is read has passed every digest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator

from darnet.config import ModelConfig, Section, TrainConfig, VolumeConfig, fingerprint
from darnet.errors import ObjectMissing, UsageError
from darnet.history import HISTORY_FILE
from darnet.model import DARNet, count_parameters
from darnet.scan import DIAGNOSES, Diagnosis
from darnet.storage import Store, has_object

MANIFEST_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"
SHA256_PATTERN = "^[0-9a-f]{64}$"
NETWORKS: tuple[dict[str, bool], ...] = tuple(
    {"depth_attention": depth, "channel_attention": channel} for depth in (False, True) for channel in (False, True)
)
"""The attentions of the networks that are compared, in the order of the paper's Table 3."""


class BundleSettings(Section):
    """The settings a model carries with it; building one checks that they fit each other."""

    volume: VolumeConfig
    """How a scan becomes the network's input."""
    network: ModelConfig
    """The network of every fold."""
    train: TrainConfig
    """How the folds were trained."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.volume.shape != self.network.volume_shape:
            raise ValueError(
                f"volume.shape {self.volume.shape} is not network.volume_shape {self.network.volume_shape}"
            )
        if self.network.num_classes != len(DIAGNOSES):
            raise ValueError(f"network.num_classes is {self.network.num_classes}; there are {len(DIAGNOSES)} diagnoses")
        return self


class FoldRecord(Section):
    """One fold's weights and how they came about."""

    file: str = Field(pattern=r"^fold\d+\.safetensors$")
    """Name inside the bundle."""
    sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of the file."""
    world_size: int = Field(ge=1)
    """DDP workers that trained it."""
    seed: int
    """What its weights, order and augmentation were drawn by, together with its number."""
    validation: dict[str, float | None]
    """Metrics on the fold's validation scans; null where one is undefined."""
    temperature: float = Field(1.0, gt=0)
    """What the fold's logits are divided by, fitted on its validation scans; 1 where none was asked for."""

    @property
    def number(self) -> int:
        """Which fold of the training cohort was held out."""
        return int(self.file.removeprefix("fold").removesuffix(".safetensors"))


class BundleManifest(Section):
    """What `bundle.json` says."""

    model_name: str
    """Kind of network, from its attention modules."""
    model_version: str = Field(min_length=1)
    """Which training this is."""
    model_sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest over all of what changes a prediction."""
    preprocessing_version: str
    """Revision and settings of the road from bytes to network input."""
    code_version: str
    """Version of the code that trained it."""
    cohort_sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of the cohort table it was trained on."""
    classes: tuple[Diagnosis, ...]
    """Diagnoses in the order of the network's outputs."""
    settings: BundleSettings
    """Everything needed to rebuild the input and the network, and to train again."""
    settings_sha256: str = Field(pattern=SHA256_PATTERN)
    """Fingerprint of `settings`."""
    folds: tuple[FoldRecord, ...] = Field(min_length=1)
    """The ensemble, in order."""
    history_sha256: str | None = Field(None, pattern=SHA256_PATTERN)
    """Digest of `metrics.jsonl`, the metrics of every epoch and fold; null where none were kept."""


class _PredictionFacts(Section):
    """All of what changes a prediction; its fingerprint is `model_sha256`."""

    volume: VolumeConfig
    preprocessing_version: str
    network: ModelConfig
    classes: tuple[Diagnosis, ...]
    weights_sha256: tuple[str, ...]
    temperatures: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory: `weights` are the fold files' bytes, verified against the manifest, in its order."""

    manifest: BundleManifest
    weights: tuple[bytes, ...] = field(repr=False)


def name_model(network: ModelConfig) -> str:
    """Name of the network in rows and reports, such as `darnet-da-ca`. Source: ours."""
    attentions = [
        name for name, wanted in (("da", network.depth_attention), ("ca", network.channel_attention)) if wanted
    ]
    return "-".join(["darnet", *(attentions or ["plain"])])


NETWORK_NAMES = tuple(name_model(ModelConfig(**attentions)) for attentions in NETWORKS)


def read_bundle(store: Store) -> Bundle:
    """Read a bundle and check all of it against its digests.

    Raises: UsageError naming the file that is missing, damaged or changed, and what to do; StorageError.
    """
    manifest = _parse_manifest(_read_file(store, MANIFEST_FILE), f"{store.uri}/{MANIFEST_FILE}")
    weights = []
    for record in manifest.folds:
        weights.append(_read_file(store, record.file))
        _check_digest(store, record.file, weights[-1], record.sha256)
    if manifest.history_sha256 is not None:
        _check_digest(store, HISTORY_FILE, _read_file(store, HISTORY_FILE), manifest.history_sha256)
    return Bundle(manifest, tuple(weights))


def find_bundles(store: Store) -> list[Store]:
    """The bundle that a folder is, or those of the compared networks that lie in it at any depth, in the order of
    Table 3: the same network in several places is the same network with several seeds.

    Raises: UsageError if the folder is neither.
    """
    found = list_bundles(store)
    if not found:
        raise UsageError(
            f"{store.uri}: no {MANIFEST_FILE} here, nor in {', '.join(NETWORK_NAMES)}; name a bundle that jobs.train "
            "wrote, or a folder of such under these names"
        )
    return found


def load_networks(bundle: Bundle) -> list[DARNet]:
    """The ensemble on the CPU, in evaluation mode, in the order of the folds."""
    return [_load_network(bundle.manifest.settings.network, data) for data in bundle.weights]


def digest_model(settings: BundleSettings, classes: tuple[Diagnosis, ...], folds: Sequence[FoldRecord]) -> str:
    """Digest over all of what changes a prediction; metrics, names and training settings are not among it."""
    facts = _PredictionFacts(
        volume=settings.volume,
        preprocessing_version=settings.volume.preprocessing_version,
        network=settings.network,
        classes=classes,
        weights_sha256=tuple(fold.sha256 for fold in folds),
        temperatures=tuple(fold.temperature for fold in folds),
    )
    return fingerprint(facts)


def count_network_parameters(network: ModelConfig) -> int:
    """Trained values of one fold's network, counted without making them."""
    return count_parameters(build_blueprint(network))


def build_blueprint(network: ModelConfig) -> DARNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return DARNet(network)


def _load_network(config: ModelConfig, data: bytes) -> DARNet:
    network = build_blueprint(config).to_empty(device="cpu")
    # Copied, not assigned: a tensor inside the file's bytes may be aligned so that sums differ in the last bits.
    network.load_state_dict(safetensors.torch.load(data), strict=True)
    return network.eval()


def _check_digest(store: Store, name: str, data: bytes, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(
            f"{store.uri}/{name}: damaged, or of another model (its digest is not the one in {MANIFEST_FILE}); copy "
            "the bundle again from where it was trained"
        )


def _read_file(store: Store, name: str) -> bytes:
    try:
        return store.read_bytes(name)
    except ObjectMissing as error:
        remedy = "name a folder that jobs.train wrote, or copy the bundle again, whole"
        raise UsageError(f"{store.uri}/{name}: missing from the model bundle; {remedy}") from error


def list_bundles(store: Store) -> list[Store]:
    """As `find_bundles`, and none where the folder holds none."""
    if has_object(store, MANIFEST_FILE):
        return [store]
    folders = [item.key.rpartition("/")[0] for item in store.list_objects() if item.key.endswith(f"/{MANIFEST_FILE}")]
    whole = [folder for folder in folders if not folder.startswith(".") and "/." not in folder]  # not being written
    named = [folder for folder in whole if folder.rpartition("/")[2] in NETWORK_NAMES]
    order = {name: rank for rank, name in enumerate(NETWORK_NAMES)}
    return [store.child(folder) for folder in sorted(named, key=lambda path: order[path.rpartition("/")[2]])]


def _parse_manifest(text: bytes, place: str) -> BundleManifest:
    """Raises: UsageError if the manifest is damaged, contradicts itself, or asks for other code than this."""
    try:
        manifest = BundleManifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise UsageError(f"{place}: not a bundle this code can read ({wrong}); copy the bundle again") from error
    settings = manifest.settings
    if fingerprint(settings) != manifest.settings_sha256:
        raise _refuse_edited(place, "settings", manifest)
    if manifest.preprocessing_version != settings.volume.preprocessing_version:
        raise UsageError(
            f"{place}: trained on volumes of preprocessing {manifest.preprocessing_version}, this code makes "
            f"{settings.volume.preprocessing_version}; use code version {manifest.code_version} or train again"
        )
    if (
        manifest.classes != DIAGNOSES
        or digest_model(settings, manifest.classes, manifest.folds) != manifest.model_sha256
    ):
        raise _refuse_edited(place, "classes or folds", manifest)
    if manifest.model_name != name_model(settings.network):
        raise _refuse_edited(place, "model_name", manifest)
    return manifest


def _refuse_edited(place: str, part: str, manifest: BundleManifest) -> UsageError:
    return UsageError(
        f"{place}: its {part} are not what was trained; the file was edited, or written by other code "
        f"({manifest.code_version}); copy the bundle again or train again"
    )
