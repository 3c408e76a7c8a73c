"""A training is planned without a cluster: which networks, how many folds at once, and what may resume what."""

from dataclasses import replace
from pathlib import Path

import pytest

from darnet.bundle import name_model
from darnet.config import ModelConfig, TrainConfig, VolumeConfig
from darnet.dataset import VolumesIndex
from darnet.errors import UsageError
from darnet.settings import TrainSettings
from darnet.training_plan import MIN_WORKER_CPUS, choose_networks, match_network, name_run, place_runs, plan_gangs
from tests.volumes_fixtures import SMALL_VOLUME, make_volumes

NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)
CONFIG = TrainConfig(epochs=6, num_folds=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VolumesIndex:
    return make_volumes(tmp_path_factory.mktemp("plan") / "volumes", num_train=6, num_folds=2)


def make_settings(index: VolumesIndex, out: Path, **changed: object) -> TrainSettings:
    values = {"volumes": str(index.folder), "out": str(out), "train": CONFIG, "network": NETWORK}
    return TrainSettings.model_validate(values | changed)


@pytest.mark.parametrize(
    ("resources", "workers", "side_by_side", "cpus_per_worker"),
    [
        ({"CPU": 2}, 1, 2, 1.0),
        ({"CPU": 2}, 2, 1, 1.0),
        ({"CPU": 3}, 1, 3, 1.0),
        ({"CPU": 64}, 4, 5, 1.0),
        ({"CPU": 32, "GPU": 8}, 4, 2, 1.0),
        ({"CPU": 8, "GPU": 5}, 2, 2, 1.0),
        ({"CPU": 5, "GPU": 8}, 4, 1, 1.0),
    ],
)
def test_a_cluster_is_shared_out_without_asking_for_more_than_it_has(
    resources: dict[str, float], workers: int, side_by_side: int, cpus_per_worker: float
) -> None:
    plan = plan_gangs(resources, workers, num_gangs=5)
    assert (plan.side_by_side, plan.cpus_per_worker) == (side_by_side, cpus_per_worker)
    assert plan.has_gpus == ("GPU" in resources)
    gangs = workers * side_by_side
    assert gangs * cpus_per_worker <= resources["CPU"]
    assert not plan.has_gpus or gangs <= resources["GPU"]


def test_a_cluster_without_enough_gpus_or_cpus_is_named() -> None:
    with pytest.raises(UsageError, match="--workers 4 takes 4 GPUs at once, the cluster has 2"):
        plan_gangs({"CPU": 64, "GPU": 2}, 4, 5)
    with pytest.raises(UsageError, match=f"--workers 4 takes at least {4 * MIN_WORKER_CPUS:g} CPUs, the cluster has 0"):
        plan_gangs({}, 4, 5)


def test_a_run_is_resumed_only_by_the_same_training(index: VolumesIndex) -> None:
    names = {
        name_run(index, NETWORK, CONFIG, 2, 0),
        name_run(index, NETWORK, CONFIG, 2, 1),
        name_run(index, NETWORK, CONFIG, 1, 0),
        name_run(index, NETWORK, CONFIG.model_copy(update={"epochs": 7}), 2, 0),
        name_run(index, NETWORK.model_copy(update={"channel_attention": False}), CONFIG, 2, 0),
        name_run(replace(index, cohort_sha256="0" * 64), NETWORK, CONFIG, 2, 0),
        name_run(replace(index, volume=VolumeConfig(shape=(8, 32, 32), crop="body")), NETWORK, CONFIG, 2, 0),
    }
    assert len(names) == 7
    assert name_run(index, NETWORK, CONFIG, 2, 0) in names


def test_the_network_is_built_for_the_volumes_there_are(index: VolumesIndex, tmp_path: Path) -> None:
    unasked = ModelConfig(base_channels=4)
    assert match_network(make_settings(index, tmp_path, network=unasked), SMALL_VOLUME) == NETWORK
    other = ModelConfig(volume_shape=(16, 32, 32))
    with pytest.raises(UsageError, match=r"\(8, 32, 32\), network.volume_shape is \(16, 32, 32\)"):
        match_network(make_settings(index, tmp_path, network=other), SMALL_VOLUME)
    with pytest.raises(UsageError, match=r"the settings ask for .*crop='body'"):
        match_network(make_settings(index, tmp_path, volume=VolumeConfig(crop="body")), SMALL_VOLUME)


def test_the_networks_of_table_3_are_trained_by_name(index: VolumesIndex, tmp_path: Path) -> None:
    assert choose_networks(make_settings(index, tmp_path), SMALL_VOLUME) == [NETWORK]
    asked = ("plain", "ca", "da", "da-ca")
    networks = choose_networks(make_settings(index, tmp_path, networks=asked), SMALL_VOLUME)
    assert [name_model(network) for network in networks] == [f"darnet-{name}" for name in asked]
    assert {network.base_channels for network in networks} == {4}
    with pytest.raises(ValueError, match="name each once"):
        make_settings(index, tmp_path, networks=("ca", "ca"))


def test_checkpoints_lie_beside_the_bundle_but_never_in_another_bucket(index: VolumesIndex, tmp_path: Path) -> None:
    settings = make_settings(index, tmp_path)
    assert place_runs(settings, "s3://bucket/model") == "s3://bucket/model.runs"
    assert place_runs(settings, "/data/model") == "/data/model.runs"
    with pytest.raises(UsageError, match=r"--out s3://bucket is a whole bucket, .* give --runs too"):
        place_runs(settings, "s3://bucket")
    assert place_runs(make_settings(index, tmp_path, runs="s3://other/runs"), "s3://bucket") == "s3://other/runs"
