"""What a model bundle says of itself: `bundle.json` enters, the records of settings, folds and digests leave.

Whoever plans a night needs no more of a bundle than this, and no torch; with a run's name and night it is what all rows
of the run have in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Self

from pydantic import Field, ValidationError, model_validator

from darnet.config import ModelConfig, ScoreConfig, Section, TrainConfig, VolumeConfig, digest_json, fingerprint
from darnet.errors import ObjectMissing, UsageError
from darnet.scan import DIAGNOSES, Diagnosis
from darnet.storage import Store, has_object

MANIFEST_FILE = "bundle.json"
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


class Int8Record(Section):
    """One fold's INT8 graph, and how far its probabilities lay from those in float32 where it was made."""

    graph_sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of `fold<k>.int8.xml`."""
    weights_sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of `fold<k>.int8.bin`."""
    calibration_scans: int = Field(ge=1)
    """Scans of the fold's training that the ranges were measured on."""
    num_scans: int = Field(ge=1)
    """Validation scans of the fold that the differences were measured on."""
    max_difference: float = Field(ge=0, le=1)
    """Largest absolute difference of a probability."""
    mean_difference: float = Field(ge=0, le=1)
    """Mean absolute difference of a probability."""
    changed_predictions: int = Field(ge=0)
    """Scans that the fold alone calls otherwise."""
    openvino: str
    """Version of the package that measured."""
    nncf: str
    """Version of the package that quantised."""
    processor: str
    """What the differences were measured on."""

    @property
    def digests(self) -> tuple[str, str]:
        """Of both files."""
        return self.graph_sha256, self.weights_sha256


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
    int8: Int8Record | None = Field(None, exclude_if=lambda record: record is None)
    """Its INT8 graph, where jobs.quantize made one."""

    @property
    def int8_files(self) -> tuple[str, str]:
        """Names of the INT8 graph's files inside the bundle."""
        return f"fold{self.number}.int8.xml", f"fold{self.number}.int8.bin"

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
    """Version of the code that trained it, with a digest of its sources."""
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


@dataclass(frozen=True)
class RunFacts:
    """What all rows of a run have in common."""

    run_id: str
    night: date
    model: BundleManifest
    code_version: str


class _PredictionFacts(Section):
    """All of what changes a prediction; its fingerprint is `model_sha256`."""

    volume: VolumeConfig
    preprocessing_version: str
    network: ModelConfig
    classes: tuple[Diagnosis, ...]
    weights_sha256: tuple[str, ...]
    temperatures: tuple[float, ...]


def name_model(network: ModelConfig) -> str:
    """Name of the network in rows and reports, such as `darnet-da-ca`. Source: ours."""
    attentions = [
        name for name, wanted in (("da", network.depth_attention), ("ca", network.channel_attention)) if wanted
    ]
    return "-".join(["darnet", *(attentions or ["plain"])])


NETWORK_NAMES = tuple(name_model(ModelConfig(**attentions)) for attentions in NETWORKS)


def read_manifest(store: Store, config: ScoreConfig) -> BundleManifest:
    """The manifest of `bundle.read_model`, for who plans: whoever loads the weights holds them against it.

    Raises: UsageError as `bundle.read_model`, for what the manifest alone can tell; StorageError.
    """
    return select_folds(read_whole_manifest(store), config)[0]


def read_whole_manifest(store: Store) -> BundleManifest:
    """As it is written, with all folds and in float32. Raises: as `read_manifest`."""
    return _parse_manifest(read_bundle_file(store, MANIFEST_FILE), f"{store.uri}/{MANIFEST_FILE}")


def read_bundle_file(store: Store, name: str) -> bytes:
    """One file of a bundle. Raises: UsageError if it is missing; StorageError."""
    try:
        return store.read_bytes(name)
    except ObjectMissing as error:
        remedy = "name a folder that jobs.train wrote, or copy the bundle again, whole"
        raise UsageError(f"{store.uri}/{name}: missing from the model bundle; {remedy}") from error


def select_folds(manifest: BundleManifest, config: ScoreConfig) -> tuple[BundleManifest, list[int]]:
    """What the settings choose, as `bundle.select_model`, and the places of its folds."""
    missing = sorted(set(config.folds) - {record.number for record in manifest.folds})
    if missing:
        numbers = ", ".join(str(record.number) for record in manifest.folds)
        raise UsageError(f"folds {', '.join(map(str, missing))}: not in the model bundle, whose folds are {numbers}")
    places = [place for place, record in enumerate(manifest.folds) if not config.folds or record.number in config.folds]
    if len(places) == len(manifest.folds) and config.precision == "fp32":
        return manifest, places
    folds = tuple(manifest.folds[place] for place in places)
    return manifest.model_copy(update={"folds": folds, **_name_selection(manifest, folds, config)}), places


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


def list_bundles(store: Store) -> list[Store]:
    """As `find_bundles`, and none where the folder holds none."""
    if has_object(store, MANIFEST_FILE):
        return [store]
    folders = [item.key.rpartition("/")[0] for item in store.list_objects() if item.key.endswith(f"/{MANIFEST_FILE}")]
    whole = [folder for folder in folders if not folder.startswith(".") and "/." not in folder]  # not being written
    named = [folder for folder in whole if folder.rpartition("/")[2] in NETWORK_NAMES]
    order = {name: rank for rank, name in enumerate(NETWORK_NAMES)}
    return [store.child(folder) for folder in sorted(named, key=lambda path: order[path.rpartition("/")[2]])]


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


def _name_selection(manifest: BundleManifest, folds: Sequence[FoldRecord], config: ScoreConfig) -> dict[str, str]:
    """Digest and version of a selected model. Of folds alone, the digest is that of a bundle that has no others."""
    model_sha256 = digest_model(manifest.settings, manifest.classes, folds)
    words = [manifest.model_version]
    if len(folds) < len(manifest.folds):
        words.append("folds " + ",".join(str(record.number) for record in folds))
    if config.precision != "fp32":
        words.append(config.precision)
        digests = _list_int8_digests(folds) if config.precision == "int8" else []
        model_sha256 = digest_json([model_sha256, config.backend, config.precision, digests])
    return {"model_sha256": model_sha256, "model_version": " ".join(words)}


def _list_int8_digests(folds: Sequence[FoldRecord]) -> list[tuple[str, str]]:
    """Raises: UsageError naming a fold without an INT8 graph."""
    for record in folds:
        if record.int8 is None:
            raise UsageError(
                f"precision int8: fold {record.number} of the model bundle has no INT8 graph; make a bundle that has, "
                "with python -m jobs.quantize --model BUNDLE --volumes VOLUMES --out BUNDLE2"
            )
    return [record.int8.digests for record in folds if record.int8 is not None]


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
