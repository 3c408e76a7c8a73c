"""Which trainings may stand beside each other: their manifests enter, one a network leaves, or a complaint."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from darnet.config import fingerprint
from darnet.errors import UsageError
from darnet.manifest import BundleManifest


def merge_seeds(manifests: Sequence[BundleManifest]) -> BundleManifest:
    """What all folds of a network's trainings are as one ensemble; the trainings differ in their seed alone.

    It names the versions and digests of all, and is the manifest of no bundle on a disk.
    Raises: UsageError if two have the same fold of the same seed, were trained otherwise or by other code, or have
            other folds: their mean would weigh the folds unequally.
    """
    if len(manifests) == 1:
        return manifests[0]
    first, *others = manifests
    for other in others:
        if _digest_but_seed(other) != _digest_but_seed(first):
            raise UsageError(
                f"{first.model_name}: {first.model_version} and {other.model_version} differ in more than train.seed "
                "(settings or cohort); seeds can be compared of the same training only"
            )
        _refuse_other_makers(first, other, f"{first.model_name}: {first.model_version}", other.model_version)
        if _list_folds(other) != _list_folds(first):
            raise UsageError(
                f"{first.model_name}: {first.model_version} has the folds {_list_folds(first)}, {other.model_version} "
                f"{_list_folds(other)}; every seed must have the same"
            )
    folds = tuple(chain.from_iterable(manifest.folds for manifest in manifests))
    if len({(fold.file, fold.seed) for fold in folds}) < len(folds):
        raise UsageError(
            f"two of the bundles are of the same network, {first.model_name}, fold and seed; keep one bundle a seed"
        )
    joined = {
        name: ", ".join(dict.fromkeys(getattr(manifest, name) for manifest in manifests))
        for name in ("model_version", "model_sha256", "settings_sha256")
    }
    return first.model_copy(update={"folds": folds, **joined})


def _refuse_other_makers(first: BundleManifest, second: BundleManifest, one: str, other: str) -> None:
    """Raises: UsageError if two bundles, called `one` and `other`, were made by other code or numbers of workers."""
    if first.code_version != second.code_version:
        raise UsageError(
            f"{one} was trained by code version {first.code_version}, {other} by {second.code_version}: what differs "
            "may be the code; train both with the same"
        )
    if _list_workers(first) != _list_workers(second):
        raise UsageError(
            f"{one} was trained by {_name_workers(first)} a fold, {other} by {_name_workers(second)}, which changes "
            "batch norm; train both with as many (jobs.train --workers)"
        )


def _list_workers(manifest: BundleManifest) -> list[int]:
    return sorted({fold.world_size for fold in manifest.folds})


def _name_workers(manifest: BundleManifest) -> str:
    workers = _list_workers(manifest)
    return f"{' and '.join(map(str, workers))} worker{'' if workers == [1] else 's'}"


def _list_folds(manifest: BundleManifest) -> list[int]:
    return sorted(fold.number for fold in manifest.folds)


def refuse_unlike(manifests: Sequence[BundleManifest]) -> None:
    """Raises: UsageError naming two networks that differ in more than attention: their folds are no pairs."""
    first, *others = manifests
    for other in others:
        _refuse_other_makers(first, other, first.model_name, other.model_name)
        ours, theirs = (_describe_training(manifest) for manifest in (first, other))
        if differs := [name for name, value in ours.items() if value != theirs[name]]:
            raise UsageError(
                f"{first.model_name} and {other.model_name} were not trained alike ({', '.join(differs)}); compare "
                "networks of one training, such as jobs.train --networks makes"
            )


def _describe_training(manifest: BundleManifest) -> dict[str, Any]:
    """What networks must agree in so that their folds can be paired; seeds are compared with the predictions."""
    settings = manifest.settings
    return {
        "cohort": manifest.cohort_sha256,
        "volume": settings.volume,
        "base_channels": settings.network.base_channels,
        **settings.train.model_dump(exclude={"seed"}),
    }


def _digest_but_seed(manifest: BundleManifest) -> str:
    settings = manifest.settings
    train = settings.train.model_copy(update={"seed": 0})
    return fingerprint(settings.model_copy(update={"train": train})) + manifest.cohort_sha256
