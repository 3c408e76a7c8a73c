"""Networks of a study as bundles on a disk: few are in memory at once, and several bundles count as one."""

import gc
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darnet.bundle import Bundle
from darnet.config import ModelConfig, ScoreConfig
from darnet.errors import UsageError
from darnet.evaluation.networks import load_members, read_networks, score_cohort
from darnet.manifest import name_model
from darnet.model import DARNet
from darnet.storage import Store, open_store
from darnet.volumes_folder import VolumesIndex, read_index, write_index
from tests.bundle_fixtures import write_random_bundle
from tests.volumes_fixtures import SMALL_VOLUME, make_cohort

pytestmark = pytest.mark.slow

CONFIG = ScoreConfig(batch_size=2)
NETWORKS = ({"depth_attention": False, "channel_attention": False}, {"depth_attention": True})
NUM_TEST = 3


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Two networks of two seeds each."""
    home = tmp_path_factory.mktemp("networks")
    stores = []
    for attentions, seed in itertools.product(NETWORKS, (0, 1)):
        place = home / f"seed{seed}" / name_model(ModelConfig(**attentions))
        write_random_bundle(place, f"v{seed}", SMALL_VOLUME.shape, attentions, seed)
        stores.append(open_store(str(place)))
    return stores


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VolumesIndex:
    folder = tmp_path_factory.mktemp("volumes")
    write_index(open_store(str(folder)), make_cohort(folder, 4, 2, NUM_TEST), SMALL_VOLUME)
    return read_index(folder)


def count_live(kind: type[Any]) -> int:
    return sum(issubclass(type(item), kind) for item in gc.get_objects())


def test_bundles_of_one_network_are_one_and_none_stays_in_memory(places: list[Store]) -> None:
    before = count_live(Bundle)
    networks = read_networks(places, CONFIG)
    assert count_live(Bundle) == before
    assert [network.name for network in networks] == ["ResNet18", "DA+CA"]
    assert [network.places for network in networks] == [places[:2], places[2:]]
    assert networks[0].members == [(fold, seed) for seed in (0, 1) for fold in range(5)]


@pytest.mark.slow
def test_while_scans_are_scored_the_networks_of_one_bundle_are_in_memory_and_no_bundle(
    places: list[Store], index: VolumesIndex
) -> None:
    before = count_live(Bundle), count_live(DARNet)
    live, done = [], []

    def advance(num_scans: int) -> None:
        live.append((count_live(Bundle) - before[0], count_live(DARNet) - before[1]))
        done.append(num_scans)

    score_cohort(places[:2], index, CONFIG, "cpu", advance)
    assert live == [(0, 5)] * 4
    assert done == [2, 1, 2, 1]
    assert count_live(DARNet) == before[1]


def test_models_are_made_one_after_another(places: list[Store]) -> None:
    before = count_live(DARNet)
    live = [count_live(DARNet) - before for _ in load_members(places[:2], CONFIG, "cpu")]
    assert live == [1] * 10


def test_two_bundles_say_what_each_says_alone(places: list[Store], index: VolumesIndex) -> None:
    together = score_cohort(places[2:], index, CONFIG, "cpu", lambda _: None)
    alone = [score_cohort([place], index, CONFIG, "cpu", lambda _: None) for place in places[2:]]
    assert len(together) == NUM_TEST
    for joined, first, second in zip(together, *alone, strict=True):
        assert np.array_equal(joined.fold_probability, [*first.fold_probability, *second.fold_probability])
        assert np.array_equal(joined.fold_class_maps, [*first.fold_class_maps, *second.fold_class_maps])
        assert joined.depth_gates == pytest.approx((first.depth_gates + second.depth_gates) / 2)


def test_a_damaged_bundle_is_found_before_any_is_scored(places: list[Store], tmp_path: Path) -> None:
    write_random_bundle(tmp_path / "darnet-da", attentions=NETWORKS[1])
    (tmp_path / "darnet-da" / "fold4.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"fold4\.safetensors: damaged"):
        read_networks([*places, open_store(str(tmp_path / "darnet-da"))], CONFIG)
