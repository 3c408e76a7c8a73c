"""The model bundle: trained folds and the settings they need enter, a folder leaves; and that folder's way back.

A bundle never changes, holds no pickle, and alone rebuilds the ensemble. What is read has passed every digest.
"""

import hashlib
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from darnet.config import ModelConfig, Section, TrainConfig, VolumeConfig, fingerprint
from darnet.errors import ObjectMissing, StorageError, UsageError
from darnet.history import HISTORY_FILE, History, render_history
from darnet.model import DARNet, count_parameters
from darnet.scan import DIAGNOSES, Diagnosis
from darnet.storage import Store, has_object, open_store
from darnet.storage_local import LocalStore

MANIFEST_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"
SHA256_PATTERN = "^[0-9a-f]{64}$"
NETWORKS: tuple[dict[str, bool], ...] = tuple(
    {"depth_attention": depth, "channel_attention": channel} for depth in (False, True) for channel in (False, True)
)
"""The attentions of the networks that are compared, in the order of the paper's Table 3."""


@dataclass(frozen=True, slots=True)
class TrainedFold:
    """What training one fold leaves: weights, how they came about, and the metrics of its validation scans.

    `temperature` is what its logits are divided by; 1 leaves them as they are. `history` has an entry an epoch.
    """

    state: Mapping[str, Tensor]
    world_size: int
    seed: int
    validation: Mapping[str, float]
    temperature: float = 1.0
    history: History = ()


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
    """Seed of its weights, order and augmentation."""
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


Files: TypeAlias = Mapping[str, bytes]
"""A bundle's files by name, the manifest last."""


def name_model(network: ModelConfig) -> str:
    """Name of the network in rows and reports, such as `darnet-da-ca`. Source: ours."""
    attentions = [
        name for name, wanted in (("da", network.depth_attention), ("ca", network.channel_attention)) if wanted
    ]
    return "-".join(["darnet", *(attentions or ["plain"])])


NETWORK_NAMES = tuple(name_model(ModelConfig(**attentions)) for attentions in NETWORKS)


def write_bundle(out: str, **facts: Any) -> Bundle:
    """Make one bundle and publish it; `facts` are those of `make_bundle`.

    Raises: as `make_bundle` and `publish_bundles`.
    """
    refuse_existing(out)
    bundle, files = make_bundle(**facts)
    publish_bundles(out, {"": files})
    return bundle


def make_bundle(
    *,
    settings: BundleSettings,
    folds: Sequence[TrainedFold],
    cohort_sha256: str,
    model_version: str,
    code_version: str,
    trained_on: str,
    tested_on: str = "Not measured on a test cohort yet: `python -m jobs.evaluate` does.",
) -> tuple[Bundle, Files]:
    """A bundle and its files; `trained_on` and `tested_on` are the model card's Markdown on the data, and on how the
    ensemble fared on a test cohort.

    Raises: ValueError if a fold's weights are not of this network.
    """
    blueprint = _build_blueprint(settings.network)
    for trained in folds:
        _check_state(blueprint, trained.state)
    weights = tuple(_serialize(trained.state) for trained in folds)
    records = tuple(_describe_fold(*fold) for fold in zip(range(len(folds)), folds, weights, strict=True))
    history = b"".join(render_history(fold, trained.history) for fold, trained in enumerate(folds))
    manifest = BundleManifest(
        model_name=name_model(settings.network),
        model_version=model_version,
        model_sha256=_digest_model(settings, DIAGNOSES, records),
        preprocessing_version=settings.volume.preprocessing_version,
        code_version=code_version,
        cohort_sha256=cohort_sha256,
        classes=DIAGNOSES,
        settings=settings,
        settings_sha256=fingerprint(settings),
        folds=records,
        history_sha256=hashlib.sha256(history).hexdigest() if history else None,
    )
    files = {record.file: data for record, data in zip(records, weights, strict=True)}
    if history:
        files[HISTORY_FILE] = history
    files[CARD_FILE] = render_model_card(manifest, trained_on, tested_on).encode()
    files[MANIFEST_FILE] = (manifest.model_dump_json(indent=2) + "\n").encode()
    return Bundle(manifest, weights), files


def publish_bundles(out: str, bundles: Mapping[str, Files]) -> None:
    """Write bundles below `out`, each under its name; under the name "" to `out` itself.

    A local folder appears whole or not at all. In a bucket every bundle does: its manifest, without which it is none,
    comes when the other files of all are there.
    Raises: UsageError if a bundle is there already; StorageError, CredentialsError.
    """
    files = {f"{name}/{file}".lstrip("/"): data for name, held in bundles.items() for file, data in held.items()}
    store = open_store(out)
    if isinstance(store, LocalStore):
        _publish_folder(store.root, files)
        return
    manifests = {key: data for key, data in files.items() if key.rpartition("/")[2] == MANIFEST_FILE}
    for key in files.keys() - manifests.keys():
        store.write_bytes(key, files[key])
    for key, data in manifests.items():
        if not store.put_if_absent(key, data):
            raise _refuse(store.uri)


def refuse_existing(out: str) -> None:
    """Raises: UsageError if `out` is a folder, or holds bundles in a bucket; StorageError, CredentialsError."""
    store = open_store(out)
    if store.root.exists() if isinstance(store, LocalStore) else _list_bundles(store):
        raise _refuse(store.uri)


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
    found = _list_bundles(store)
    if not found:
        raise UsageError(
            f"{store.uri}: no {MANIFEST_FILE} here, nor in {', '.join(NETWORK_NAMES)}; name a bundle that jobs.train "
            "wrote, or a folder of such under these names"
        )
    return found


def load_networks(bundle: Bundle) -> list[DARNet]:
    """The ensemble on the CPU, in evaluation mode, in the order of the folds."""
    return [_load_network(bundle.manifest.settings.network, data) for data in bundle.weights]


def render_model_card(manifest: BundleManifest, trained_on: str, tested_on: str) -> str:
    """The model card, in Markdown, from what the run itself knows."""
    settings = manifest.settings
    switch = {True: "on", False: "off"}
    return MODEL_CARD.format(
        manifest=manifest,
        settings=settings,
        train=settings.train,
        shape=" x ".join(map(str, settings.volume.shape)),
        num_folds=len(manifest.folds),
        depth_attention=switch[settings.network.depth_attention],
        channel_attention=switch[settings.network.channel_attention],
        num_parameters=count_network_parameters(settings.network),
        classes="\n".join(f"{index}. {name}" for index, name in enumerate(manifest.classes)),
        folds=_render_folds(manifest.folds),
        trained_on=trained_on.strip(),
        tested_on=tested_on.strip(),
    )


def _render_folds(folds: Sequence[FoldRecord]) -> str:
    """Markdown table of the folds, one column a metric."""
    names = list(dict.fromkeys(name for fold in folds for name in fold.validation))
    rows = [["file", "seed", "workers", "temperature", *names], ["---"] * (4 + len(names))]
    for fold in folds:
        values = (fold.validation.get(name) for name in names)
        metrics = ["undefined" if value is None else f"{value:.4f}" for value in values]
        rows.append([fold.file, str(fold.seed), str(fold.world_size), f"{fold.temperature:.4g}", *metrics])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _digest_model(settings: BundleSettings, classes: tuple[Diagnosis, ...], folds: Sequence[FoldRecord]) -> str:
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


def _describe_fold(index: int, trained: TrainedFold, data: bytes) -> FoldRecord:
    return FoldRecord(
        file=f"fold{index}.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        world_size=trained.world_size,
        seed=trained.seed,
        # JSON has no NaN, which is what a metric without any scan of a class is.
        validation={name: value if math.isfinite(value) else None for name, value in trained.validation.items()},
        temperature=trained.temperature,
    )


def _serialize(state: Mapping[str, Tensor]) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(tensors)


def _check_state(blueprint: DARNet, state: Mapping[str, Tensor]) -> None:
    """Raises: ValueError naming the tensors that are missing, unknown, or of another shape or type."""
    expected = {(name, tensor.shape, tensor.dtype) for name, tensor in blueprint.state_dict().items()}
    found = {(name, tensor.shape, tensor.dtype) for name, tensor in state.items()}
    wrong = sorted({name for name, _, _ in expected ^ found})
    if wrong:
        raise ValueError(f"these weights are not of the network {blueprint.config}: {', '.join(wrong)}")


def count_network_parameters(network: ModelConfig) -> int:
    """Trained values of one fold's network, counted without making them."""
    return count_parameters(_build_blueprint(network))


def _build_blueprint(network: ModelConfig) -> DARNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return DARNet(network)


def _load_network(config: ModelConfig, data: bytes) -> DARNet:
    network = _build_blueprint(config).to_empty(device="cpu")
    # Copied, not assigned: a tensor inside the file's bytes may be aligned so that sums differ in the last bits.
    network.load_state_dict(safetensors.torch.load(data), strict=True)
    return network.eval()


def _refuse(place: str) -> UsageError:
    return UsageError(f"{place}: exists already, and a bundle is never overwritten; name another folder")


def _publish_folder(out: Path, files: Files) -> None:
    """Fill a hidden folder beside `out` and rename it, so that no reader meets a part of a bundle."""
    staged = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        store = open_store(str(staged), create=True)
        for name, data in files.items():
            store.write_bytes(name, data)
        staged.rename(out)
    except OSError as error:
        if out.exists():
            raise _refuse(str(out)) from error
        raise StorageError(f"{out}: cannot write the bundle ({error.strerror}); check rights and space") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


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


def _list_bundles(store: Store) -> list[Store]:
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
        or _digest_model(settings, manifest.classes, manifest.folds) != manifest.model_sha256
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


MODEL_CARD = """\
# {manifest.model_name} {manifest.model_version}

**Research use only. Not a medical device: no decision about a patient may rest on it.**

An ensemble of {num_folds} networks that sorts a chest CT scan into three classes; the mean of their probabilities is
the ensemble's. The network follows Shi et al., "Dual-Attention Residual Network for Automatic Diagnosis of COVID-19".

| | |
| --- | --- |
| model_sha256 | `{manifest.model_sha256}` |
| network | attention by depth {depth_attention}, by channel {channel_attention}; {num_parameters:,} parameters |
| code | {manifest.code_version} |
| preprocessing | {manifest.preprocessing_version} |
| cohort_sha256 | `{manifest.cohort_sha256}` |
| input | one scan as {shape} voxels, crop `{settings.volume.crop}`, window {settings.volume.window_hu} HU |
| training | {train.epochs} epochs, learning rate {train.learning_rate}, batch {train.batch_size}, seed {train.seed} |

## Classes

{classes}

NCP is COVID-19 pneumonia, CP other common pneumonia, Normal neither.

## Trained on

{trained_on}

## Folds

{folds}

Each row is measured on the scans that were held out of that fold's training, and that also chose which epoch to keep:
read it as an upper estimate. A temperature other than 1 was fitted on the same scans. The figures printed in the
paper were not measured on these weights and say nothing about them.

## Test cohort

{tested_on}

## Intended use

Research on batches of chest CT: ranking scans, comparing models, studying where a class activation map lies.

## Limits

- It knows three classes. A scan of anything else still gets three probabilities that add up to one.
- Probabilities are calibrated by one temperature a fold at most, and shift with scanner, reconstruction, population
  and prevalence.
- A class activation map shows what the network used, not where disease is.
- It has not been validated on any site or population other than the data named above.
"""
