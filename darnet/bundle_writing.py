"""Trained folds and the settings they need enter, a model bundle leaves, in a folder or a bucket."""

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from torch import Tensor

from darnet import NOTICE
from darnet.bundle import CARD_FILE, Bundle, Int8Graph, build_blueprint, count_network_parameters
from darnet.config import fingerprint
from darnet.errors import PutUncertain, StorageError, UsageError
from darnet.history import HISTORY_FILE, History, render_history
from darnet.manifest import (
    MANIFEST_FILE,
    BundleManifest,
    BundleSettings,
    FoldRecord,
    Int8Record,
    digest_model,
    list_bundles,
    name_model,
)
from darnet.model import DARNet
from darnet.scan import DIAGNOSES
from darnet.storage import Store, has_object, open_store
from darnet.storage_local import LocalStore

VERSION_DIGITS = 8  # Source: ours; the chance that any two of 1,000 bundles of a day share them is 1 in 8,600

Files: TypeAlias = Mapping[str, bytes]
"""A bundle's files by name, the manifest last."""


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

    `model_version`, the day of training, is followed in the bundle by the first digits of the model's digest: networks
    and seeds trained in one job have one day.
    Raises: ValueError if a fold's weights are not of this network.
    """
    blueprint = build_blueprint(settings.network)
    for trained in folds:
        _check_state(blueprint, trained.state)
    weights = tuple(_serialize(trained.state) for trained in folds)
    records = tuple(_describe_fold(*fold) for fold in zip(range(len(folds)), folds, weights, strict=True))
    history = b"".join(render_history(fold, trained.history) for fold, trained in enumerate(folds))
    model_sha256 = digest_model(settings, DIAGNOSES, records)
    manifest = BundleManifest(
        model_name=name_model(settings.network),
        model_version=f"{model_version}-{model_sha256[:VERSION_DIGITS]}",
        model_sha256=model_sha256,
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
    files[MANIFEST_FILE] = _render_manifest(manifest)
    return Bundle(manifest, weights), files


def add_int8_graphs(
    bundle: Bundle, model: Store, graphs: Sequence[Int8Graph], records: Sequence[Int8Record]
) -> tuple[Bundle, Files]:
    """The bundle of `model` with an INT8 graph a fold, and the files of that bundle; the model is the same in float32.

    Raises: StorageError.
    """
    pairs = zip(bundle.manifest.folds, records, strict=True)
    folds = tuple(fold.model_copy(update={"int8": record}) for fold, record in pairs)
    manifest = bundle.manifest.model_copy(update={"folds": folds})
    kept = [CARD_FILE] if manifest.history_sha256 is None else [CARD_FILE, HISTORY_FILE]
    files = {fold.file: data for fold, data in zip(folds, bundle.weights, strict=True)}
    files |= {name: model.read_bytes(name) for name in kept}
    files[CARD_FILE] += _render_int8(folds).encode()
    for fold, graph in zip(folds, graphs, strict=True):
        files |= dict(zip(fold.int8_files, graph, strict=True))
    files[MANIFEST_FILE] = _render_manifest(manifest)
    return Bundle(manifest, bundle.weights, tuple(graphs)), files


def publish_bundles(out: str, bundles: Iterable[tuple[str, Files]]) -> None:
    """Write bundles below `out`, each under its name, as they come; under the name "" to `out` itself.

    A local folder appears whole or not at all. In a bucket every bundle does: its manifest, without which it is none,
    comes when the other files of all are there. Nothing there is replaced but a model card: what a killed publishing of
    the same networks left is gone on with.
    Raises: UsageError if another bundle, or a part of one, is there already; StorageError, CredentialsError.
    """
    # One bundle at a time: four networks of three seeds hold 8 GB of weights.
    files = ((f"{name}/{file}".lstrip("/"), data) for name, held in bundles for file, data in held.items())
    store = open_store(out)
    if isinstance(store, LocalStore):
        _publish_folder(store.root, files)
        return
    manifests = {}
    for key, data in files:
        file = key.rpartition("/")[2]
        if file == MANIFEST_FILE:
            manifests[key] = data
        elif file == CARD_FILE:  # says the day it was written
            store.write_bytes(key, data)
        elif _put_once(store, key, data) != data:
            raise _refuse(store.uri)
    for key, data in manifests.items():
        if _name_networks(_put_once(store, key, data)) != _name_networks(data):
            raise _refuse(store.uri)


def _put_once(store: Store, key: str, data: bytes) -> bytes:
    """Create an object unless there is one; what is there then, also where the store's answer got lost."""
    try:
        if store.put_if_absent(key, data):
            return data
    except PutUncertain:
        if not has_object(store, key):
            raise
    return store.read_bytes(key)


def _name_networks(manifest: bytes) -> tuple[Any, ...]:
    """What tells one training's bundle from another's; the day of writing does not."""
    fields = json.loads(manifest)
    return tuple(fields.get(name) for name in ("model_sha256", "settings_sha256", "cohort_sha256"))


def refuse_existing(out: str, names: Sequence[str] = ("",)) -> None:
    """Refuse a place where bundles of these names cannot be published ("" is `out` itself).

    In a bucket, some of several may be there: a killed publishing goes on.
    Raises: UsageError if `out` is a folder, or holds all of them or others in a bucket; StorageError, CredentialsError.
    """
    store = open_store(out)
    if isinstance(store, LocalStore):
        if store.root.exists():
            raise _refuse(store.uri)
        return
    present, wanted = (
        {place.uri for place in list_bundles(store)},
        {f"{store.uri}/{name}".rstrip("/") for name in names},
    )
    if present >= wanted or not present <= wanted:
        raise _refuse(store.uri)


def render_model_card(manifest: BundleManifest, trained_on: str, tested_on: str) -> str:
    """The model card, in Markdown, from what the run itself knows."""
    settings = manifest.settings
    switch = {True: "on", False: "off"}
    return MODEL_CARD.format(
        notice=NOTICE,
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


def _render_manifest(manifest: BundleManifest) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def _render_int8(folds: Sequence[FoldRecord]) -> str:
    """The model card's section on INT8: what it changes, fold by fold."""
    rows = [["fold", "scans", "largest difference of a probability", "mean", "changed predictions"], ["---"] * 5]
    for fold, record in ((fold, fold.int8) for fold in folds if fold.int8 is not None):
        differences = f"{record.max_difference:.4f}", f"{record.mean_difference:.5f}"
        rows.append([str(fold.number), str(record.num_scans), *differences, str(record.changed_predictions)])
    return "\n## INT8\n\n" + INT8_TEXT + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _render_folds(folds: Sequence[FoldRecord]) -> str:
    """Markdown table of the folds, one column a metric."""
    names = list(dict.fromkeys(name for fold in folds for name in fold.validation if name != "temperature"))
    rows = [["file", "seed", "workers", "temperature", *names], ["---"] * (4 + len(names))]
    for fold in folds:
        values = (fold.validation.get(name) for name in names)
        metrics = ["undefined" if value is None else f"{value:.4f}" for value in values]
        rows.append([fold.file, str(fold.seed), str(fold.world_size), f"{fold.temperature:.4g}", *metrics])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


def _refuse(place: str) -> UsageError:
    return UsageError(f"{place}: exists already, and a bundle is never overwritten; name another folder")


def _publish_folder(out: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Fill a hidden folder beside `out` and rename it, so that no reader meets a part of a bundle."""
    staged = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        store = open_store(str(staged), create=True)
        for name, data in files:
            store.write_bytes(name, data)
        staged.rename(out)
    except OSError as error:
        if out.exists():
            raise _refuse(str(out)) from error
        raise StorageError(f"{out}: cannot write the bundle ({error.strerror}); check rights and space") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


INT8_TEXT = """\
Each fold can also be run in INT8 (`--precision int8`), which is another model in the results. Its ranges were measured
on scans of the fold's training, what it changes on validation scans, against the same network in float32:

"""

MODEL_CARD = """\
# {manifest.model_name} {manifest.model_version}

**{notice}**

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
read it as an upper estimate. No interval is given; chance in the choice of these scans is not accounted for. A
temperature other than 1 was fitted on the same scans. The figures printed in the paper were not measured on these
weights and say nothing about them.

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
