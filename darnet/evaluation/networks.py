"""The networks that are evaluated, as bundles where they lie: places enter; manifests, scores and single models leave.

A bundle of the paper's network holds 700 MB of weights, and a study of three seeds a dozen of them: one bundle is in
memory at a time, and no longer than it is needed. Predictions and class maps are what stays.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from darnet.bundle import load_network, read_model
from darnet.config import ScoreConfig
from darnet.errors import ObjectMissing, UsageError
from darnet.evaluation.paper import MODEL_NAMES
from darnet.evaluation.seeds import merge_seeds
from darnet.history import HISTORY_FILE
from darnet.manifest import BundleManifest
from darnet.model import DARNet
from darnet.score import Ensemble, ScanScore
from darnet.storage import Store
from darnet.volumes_folder import VolumesIndex


@dataclass(frozen=True, eq=False, slots=True)
class StoredNetwork:
    """One network with all its trainings: `places` are their bundles, in the order of the folds in `manifest`.

    `history` has one row an epoch, fold and seed, or none where the bundles keep none.
    """

    places: Sequence[Store]
    manifest: BundleManifest
    history: pd.DataFrame

    @property
    def name(self) -> str:
        """As the paper calls it."""
        return MODEL_NAMES[self.manifest.model_name]

    @property
    def members(self) -> list[tuple[int, int]]:
        """Fold and seed of each of its models."""
        return [(fold.number, fold.seed) for fold in self.manifest.folds]


def read_networks(places: Sequence[Store], config: ScoreConfig) -> list[StoredNetwork]:
    """Which networks these bundles are, in their order; trainings of one network with several seeds are one.

    All of every bundle is read and held against its digests, so that a damaged one is found before hours of scoring.
    Raises: UsageError as `read_model`, `merge_seeds` and `read_history`; StorageError.
    """
    trainings: dict[str, list[tuple[Store, BundleManifest, pd.DataFrame]]] = {}
    for place in places:
        manifest = read_model(place, config).manifest
        history = read_history(place).assign(seed=manifest.folds[0].seed)
        trainings.setdefault(manifest.model_name, []).append((place, manifest, history))
    return [
        StoredNetwork(
            [place for place, _, _ in items],
            merge_seeds([manifest for _, manifest, _ in items]),
            pd.concat([history for _, _, history in items], ignore_index=True),
        )
        for items in trainings.values()
    ]


def read_history(bundle: Store) -> pd.DataFrame:
    """The metrics of every epoch and fold that a bundle keeps of its training; empty where it keeps none.

    Raises: UsageError if the file is damaged.
    """
    try:
        lines = bundle.read_bytes(HISTORY_FILE).decode().splitlines()
        return pd.DataFrame([json.loads(line) for line in lines])
    except ObjectMissing:
        return pd.DataFrame()
    except ValueError as error:
        place = f"{bundle.uri}/{HISTORY_FILE}"
        raise UsageError(f"{place}: not a line of JSON an epoch ({error}); copy the bundle again") from error


def score_cohort(
    places: Sequence[Store], index: VolumesIndex, config: ScoreConfig, device: str, advance: Callable[[int], None]
) -> list[ScanScore]:
    """Score the index's test scans, in the order of its rows, with the models of all these bundles.

    `advance` hears of each batch of each bundle.
    """
    by_bundle = [_score_by_bundle(place, index, config, device, advance) for place in places]
    return [_join_scores(scores) for scores in zip(*by_bundle, strict=True)]


def load_members(places: Sequence[Store], config: ScoreConfig, device: str) -> Iterator[DARNet]:
    """The networks of all these bundles, each made when it is asked for: whoever keeps none has one at a time."""
    for place in places:
        yield from _load_by_bundle(place, config, device)


def _load_by_bundle(place: Store, config: ScoreConfig, device: str) -> Iterator[DARNet]:
    bundle = read_model(place, config)
    for number in range(len(bundle.weights)):
        yield load_network(bundle, number).to(device)


def _score_by_bundle(
    place: Store, index: VolumesIndex, config: ScoreConfig, device: str, advance: Callable[[int], None]
) -> list[ScanScore]:
    ensemble = Ensemble.from_bundle(read_model(place, config), config, device)
    scores = []
    for batch in index.read_batches("test", config.batch_size):
        scores += ensemble.score(list(batch))
        advance(len(batch))
    return scores


def _join_scores(scores: Sequence[ScanScore]) -> ScanScore:
    """What several bundles of as many folds say of one scan, as if they were one."""
    gates = [score.depth_gates for score in scores if score.depth_gates is not None]
    return ScanScore(
        np.concatenate([score.fold_probability for score in scores]),
        np.concatenate([score.fold_class_maps for score in scores]),
        np.mean(gates, axis=0) if gates else None,
        sum(score.model_s for score in scores),
    )
