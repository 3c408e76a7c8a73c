"""A training is planned without a cluster: which networks, how many folds at once, and what may resume what."""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from darnet.config import CohortConfig, ModelConfig, TrainConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.manifest import name_model
from darnet.settings import TrainSettings
from darnet.storage import Store
from darnet.training_plan import (
    ActorPlan,
    ClusterRoom,
    choose_networks,
    claim_runs,
    count_decode_cpus,
    match_division,
    match_network,
    name_run,
    place_networks,
    place_runs,
    plan_actors,
    plan_gangs,
    read_room,
    reserve_cpus,
)
from darnet.volumes_folder import VolumesIndex
from tests.places import ROOT
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
    ("told", "complaint"),
    [
        ({"division": "paper"}, "cohorts.division is paper, of the volumes patient;"),
        (
            {"seed": 6, "drop_shuffled": False},
            "cohorts.seed is 6, of the volumes 5, cohorts.drop_shuffled is False, of",
        ),
        ({"turn_reversed": False}, "cohorts.turn_reversed is False, of the volumes True;"),
        ({"seed": 5, "drop_shuffled": True}, ""),
        ({}, ""),
    ],
)
def test_another_division_than_the_volumes_is_refused(
    index: VolumesIndex, told: dict[str, Any], complaint: str
) -> None:
    """They were dealt by patient with seed 5; a default asks for nothing."""
    with pytest.raises(UsageError, match=complaint) if complaint else contextlib.nullcontext():
        match_division(CohortConfig.model_validate(told), index)
    match_division(CohortConfig.model_validate(told), replace(index, division=None))


def test_a_seed_beside_seeds_is_refused(index: VolumesIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.seed: give it or --seeds"):
        make_settings(index, tmp_path, train=CONFIG.model_copy(update={"seed": 5}), seeds=(0, 1))


@pytest.mark.parametrize(
    ("nodes", "workers", "side_by_side"),
    [
        ([{"CPU": 2}], 1, 2),
        ([{"CPU": 2}], 2, 1),
        ([{"CPU": 1}, {"CPU": 2}], 1, 3),
        ([{"CPU": 64}], 4, 5),
        ([{"CPU": 16, "GPU": 4}] * 2, 4, 2),
        ([{"CPU": 8, "GPU": 5}], 2, 2),
        ([{"CPU": 5, "GPU": 8}], 4, 1),
        ([{"CPU": 0}, {"CPU": 16}, {"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 1}], 2, 1),
    ],
)
def test_a_cluster_is_shared_out_without_asking_for_more_than_its_nodes_have(
    nodes: list[dict[str, float]], workers: int, side_by_side: int
) -> None:
    plan = plan_gangs(ClusterRoom(nodes), workers, num_gangs=5)
    assert plan.side_by_side == side_by_side
    assert plan.has_gpus == any("GPU" in node for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "device", "told"),
    [
        ([{"CPU": 64, "GPU": 2}], "auto", "takes 4 CPUs and 4 GPUs at once, .* has 64 CPUs and 2 GPUs, room for 2"),
        ([], "auto", "takes 4 CPUs at once; the cluster has 0 CPUs, room for 0"),
        ([{"CPU": 2}], "cpu", "takes 4 CPUs at once; the cluster has 2 CPUs"),
        # In sum enough, in no node: seven of the GPUs have no CPU beside them.
        (
            [{"CPU": 1, "GPU": 8}, {"CPU": 16}],
            "auto",
            "beside a CPU of its own node; .* 17 CPUs and 8 GPUs, room for 1",
        ),
        ([{"CPU": 3.5}, {"CPU": 0.5}], "auto", "room for 3"),
        ([{"CPU": 64}], "gpu", "the cluster has 64 CPUs and 0 GPUs, room for 0"),
    ],
)
def test_what_a_cluster_lacks_is_named(nodes: list[dict[str, float]], device: Any, told: str) -> None:
    with pytest.raises(UsageError, match=f"--workers 4 .*{told}"):
        plan_gangs(ClusterRoom(nodes), 4, 5, device)


def test_the_device_is_the_one_that_is_asked_for() -> None:
    both = ClusterRoom([{"CPU": 4, "GPU": 4}])
    assert [plan_gangs(both, 1, 5, device).has_gpus for device in ("auto", "cpu", "gpu")] == [True, False, True]
    assert "training on CPUs (train.device is auto)" in plan_gangs(ClusterRoom([{"CPU": 4}]), 1, 5).title


@pytest.fixture
def grown(tmp_path: Path) -> Callable[..., ClusterRoom]:
    """The room of cluster.yaml's cluster with these nodes up, as its head knows it."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    file = tmp_path / "ray_bootstrap_config.yaml"

    def read(*names: str, max_workers: int = 17) -> ClusterRoom:
        file.write_text(json.dumps(config | {"max_workers": max_workers}))
        return read_room(
            [describe_node(name, config["available_node_types"][name]["resources"]) for name in names], file
        )

    return read


def describe_node(group: str, resources: dict[str, float]) -> dict[str, Any]:
    """As much of an entry of `ray.nodes()` as counts."""
    return {"Alive": True, "Resources": resources, "Labels": {"ray.io/node-group": group} if group else {}}


def test_gangs_wait_for_nodes_that_an_autoscaler_may_add(grown: Callable[..., ClusterRoom]) -> None:
    plan = plan_gangs(grown("head", "gpu"), 2, 20)
    assert (plan.side_by_side, plan.has_gpus) == (4, True)
    assert "1 workers have room now; the others wait" in plan.title
    without = plan_gangs(grown("head"), 1, 20, "gpu")  # the only spot machine was just reclaimed
    assert (without.side_by_side, without.has_gpus) == (8, True)
    assert plan_gangs(grown("head", "decode"), 1, 500, "cpu").side_by_side == 16 * 16


def test_more_than_an_autoscaler_may_ever_add_is_refused(grown: Callable[..., ClusterRoom]) -> None:
    assert plan_gangs(grown("head", "gpu"), 8, 5).side_by_side == 1
    with pytest.raises(UsageError, match=r"--workers 9 .* with all nodes that its autoscaler may add, room for 8"):
        plan_gangs(grown("head", "gpu"), 9, 5)
    with pytest.raises(UsageError, match=r"--workers 4 .* room for 3"):
        plan_gangs(grown("head", "gpu", "decode", max_workers=4), 4, 5)


def test_where_nobody_knows_what_may_be_added_gangs_wait(tmp_path: Path, grown: Callable[..., ClusterRoom]) -> None:
    grown("head")
    of_kuberay = describe_node("workers", {"CPU": 1})
    for file in (tmp_path / "missing", tmp_path / "ray_bootstrap_config.yaml"):  # the latter is of another cluster
        assert plan_gangs(read_room([of_kuberay], file), 4, 5, "gpu").side_by_side == 5
    started_by_hand = describe_node("", {"CPU": 1})
    with pytest.raises(UsageError, match="room for 1"):
        plan_gangs(read_room([started_by_hand], tmp_path / "ray_bootstrap_config.yaml"), 4, 5)


def test_the_device_is_in_no_digest(index: VolumesIndex) -> None:
    """Models trained before there was this setting are still read, and a training goes on where there is room."""
    on_gpus = CONFIG.model_copy(update={"device": "gpu"})
    assert name_run(index, NETWORK, on_gpus, 2, 0) == name_run(index, NETWORK, CONFIG, 2, 0)
    assert "device" not in on_gpus.model_dump_json()


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


def test_folds_that_other_code_began_are_refused_and_both_codes_named(store: Store) -> None:
    """Those of the same code go on; a person deletes what the message names, and all begin anew."""
    claim_runs(store, ["plain-fold0", "plain-fold1"], "0.1.0+a")
    claim_runs(store, ["plain-fold0", "plain-fold1", "plain-fold2"], "0.1.0+a")
    told = (
        r"code version 0\.1\.0\+a began 2 of these 3 folds, and this is 0\.1\.0\+b: go on with that code; "
        "or delete plain-fold0 and 1 more there, or give jobs.train another --runs"
    )
    for _ in range(2):  # a refusal notes nothing
        with pytest.raises(UsageError, match=told):
            claim_runs(store, ["ca-fold0", "plain-fold0", "plain-fold1"], "0.1.0+b")
    store.delete("plain-fold0/code_version")
    store.delete("plain-fold1/code_version")
    claim_runs(store, ["ca-fold0", "plain-fold0", "plain-fold1"], "0.1.0+b")
    claim_runs(store, ["plain-fold2"], "0.1.0+a")


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


def can_decode_wherever_actors_are(
    nodes: list[dict[str, float]], reserve: float, num_actors: int, has_gpus: bool, decode_cpus: float = 1
) -> bool:
    """Every placement of the actors, one by one: all of them are placed, and what decoding takes is free on some node,
    and on each that has more than one CPU, as it may be the last that is left.
    """
    free = [(node["CPU"], node.get("GPU", 0) if has_gpus else num_actors) for node in nodes]
    for placed in itertools.combinations_with_replacement(range(len(nodes)), num_actors):
        left = [
            (cpus - reserve * placed.count(index), gpus - placed.count(index))
            for index, (cpus, gpus) in enumerate(free)
        ]
        if not all(cpus >= 0 and gpus >= 0 for cpus, gpus in left):
            continue
        can_decode = [cpus >= decode_cpus for cpus, _ in left]
        if not any(can_decode) or not all(can for can, node in zip(can_decode, nodes, strict=True) if node["CPU"] > 1):
            return False
    return sum(min(int(cpus / reserve), gpus) for cpus, gpus in free) >= num_actors


def try_to_plan(
    nodes: list[dict[str, float]], num_actors: int, num_threads: int, has_gpus: bool, decode_threads: int
) -> ActorPlan | None:
    try:
        return plan_actors(
            ClusterRoom(nodes), num_actors, num_threads, has_gpus=has_gpus, decode_threads=decode_threads
        )
    except UsageError:
        return None


@pytest.mark.parametrize("decode_threads", [1, 3])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_actors_leave_cpus_to_decode_however_they_are_placed(
    num_actors: int, num_threads: int, decode_threads: int
) -> None:
    kinds = [
        {"CPU": 0.0},
        {"CPU": 1.0},
        {"CPU": 2.0},
        {"CPU": 3.0},
        {"CPU": 8.0, "GPU": 4.0},
        {"CPU": 16.0, "GPU": 1.0},
    ]
    for nodes in (list(some) for size in (1, 2, 3) for some in itertools.combinations_with_replacement(kinds, size)):
        for has_gpus in (False, True) if sum(node.get("GPU", 0) for node in nodes) >= num_actors else (False,):
            plan = try_to_plan(nodes, num_actors, num_threads, has_gpus, decode_threads)
            if plan is None:
                tried = [hundredths / 100 for hundredths in range(1, 101)]
                assert not any(can_decode_wherever_actors_are(nodes, each, num_actors, has_gpus) for each in tried), (
                    nodes
                )
                continue
            assert can_decode_wherever_actors_are(nodes, plan.num_cpus, num_actors, has_gpus, plan.decode_cpus), nodes
            assert plan.num_cpus <= num_threads
            assert 1 <= plan.decode_cpus <= decode_threads
            assert plan.num_cpus != plan.decode_cpus  # or Ray runs decoding and networks in one operator


@pytest.mark.parametrize(
    ("cpus", "num_actors", "num_threads", "decode_threads", "expected"),
    [
        ([2], 1, 2, 2, (0.99, 1)),  # both cores cannot be decoding's alone
        ([4], 1, 2, 2, (1.99, 2)),
        ([4], 1, 4, 2, (2.99, 1)),  # the network's threads come first
        ([64], 1, 32, 4, (31.99, 4)),
        ([64], 1, 32, 100, (31.99, 32)),
        ([64, 2], 1, 1, 4, (0.99, 1)),  # what the smaller has beside the actor
        ([4, 4], 1, 1, 4, (0.99, 3)),  # either may be lost
        ([64, 0], 1, 1, 4, (0.99, 4)),  # a head that computes nothing
    ],
)
def test_a_source_that_is_read_is_counted_by_its_threads(
    cpus: list[float], num_actors: int, num_threads: int, decode_threads: int, expected: tuple[float, float]
) -> None:
    room = ClusterRoom([{"CPU": count} for count in cpus])
    plan = plan_actors(room, num_actors, num_threads, has_gpus=False, decode_threads=decode_threads)
    assert (plan.num_cpus, plan.decode_cpus) == pytest.approx(expected)
    assert ("threads that read a source count as" in plan.title) is (expected[1] < decode_threads)


def test_a_node_that_may_come_can_decode_too() -> None:
    head, small, large = {"CPU": 0.0}, {"CPU": 2.0}, {"CPU": 16.0}
    grown = ClusterRoom([head, large], [small, small, large], 2)
    assert plan_actors(grown, 1, 1, has_gpus=False, decode_threads=8).decode_cpus == 1
    assert plan_actors(ClusterRoom([head, large], [large], 1), 1, 1, has_gpus=False, decode_threads=8).decode_cpus == 8
    assert plan_actors(ClusterRoom([large], None), 1, 1, has_gpus=False, decode_threads=8).decode_cpus == 1
    assert plan_actors(ClusterRoom([large | {"GPU": 4}]), 4, 1, has_gpus=True, decode_threads=16).decode_cpus == 12


@pytest.mark.parametrize(
    ("cpus", "num_threads", "expected"),
    [([2], 2, 2), ([2], 8, 2), ([16, 4], 8, 4), ([0, 0.5, 16], 8, 8), ([1.5], 4, 1)],
)
def test_where_there_are_no_actors_a_source_takes_what_the_smallest_node_has(
    cpus: list[float], num_threads: int, expected: float
) -> None:
    assert count_decode_cpus(ClusterRoom([{"CPU": count} for count in cpus]), num_threads) == expected


@pytest.mark.parametrize(
    ("cpus", "num_actors", "num_threads", "reserve"),
    [
        ([2], 1, 1, 0.99),
        ([2], 1, 2, 0.99),
        ([2], 2, 1, 0.49),
        ([8], 1, 8, 6.99),
        ([8, 8], 2, 8, 6.99),  # a node each, not half of one
        ([64], 4, 8, 7.99),
        ([1, 1], 1, 1, 0.99),
        ([2, 2, 2], 1, 1, 0.99),
    ],
)
def test_actors_are_counted_by_their_threads_as_far_as_that_goes(
    cpus: list[float], num_actors: int, num_threads: int, reserve: float
) -> None:
    room = ClusterRoom([{"CPU": count} for count in cpus])
    assert reserve_cpus(room, num_actors, num_threads, has_gpus=False) == pytest.approx(reserve)


def test_actors_wait_for_nodes_that_an_autoscaler_adds_rather_than_share_one() -> None:
    node = {"CPU": 16.0}
    grown = [ClusterRoom([node], [node] * 8, 7), ClusterRoom([node], None)]  # None: nobody knows what it may add
    assert [reserve_cpus(room, 4, 8, has_gpus=False) for room in grown] == [pytest.approx(15 / 2 - 0.01)] * 2
    assert reserve_cpus(ClusterRoom([node], [node] * 8, 0), 4, 8, has_gpus=False) == pytest.approx(15 / 4 - 0.01)


def test_actors_wait_for_gpus_that_an_autoscaler_may_add(tmp_path: Path, grown: Callable[..., ClusterRoom]) -> None:
    plan = plan_actors(grown("head", "gpu"), 8, 1, has_gpus=True)
    assert (plan.has_gpus, plan.num_cpus) == (True, 0.99)
    assert "1 of 8 model actors find one now; the others wait" in plan.title
    assert plan_actors(grown("head", "gpu"), 1, 1, has_gpus=True).title == "scoring on GPUs"
    reclaimed = plan_actors(grown("head", "decode"), 8, 1, has_gpus=True)  # the only spot machine
    assert "0 of 8 model actors" in reclaimed.title
    of_kuberay = read_room([describe_node("workers", {"CPU": 16})], tmp_path / "missing")  # nobody knows what may come
    assert plan_actors(of_kuberay, 8, 1, has_gpus=True).num_cpus == 0.99
    # More actors than CPUs, on a node that has a GPU for each.
    assert plan_actors(ClusterRoom([{"CPU": 4, "GPU": 8}]), 8, 1, has_gpus=True).num_cpus < 3 / 8


def test_a_night_on_gpus_is_refused_only_where_none_can_come(tmp_path: Path, grown: Callable[..., ClusterRoom]) -> None:
    cpus, both = ClusterRoom([{"CPU": 4}]), ClusterRoom([{"CPU": 4}, {"CPU": 4, "GPU": 1}])
    assert [place_networks(cpus, device) for device in ("auto", "cpu")] == ["cpu", "cpu"]
    assert [place_networks(both, device) for device in ("auto", "cpu", "gpu")] == ["gpu", "cpu", "gpu"]
    reclaimed = grown("head", "decode")
    of_kuberay = read_room([describe_node("workers", {"CPU": 16})], tmp_path / "missing")
    assert [place_networks(room, "gpu") for room in (reclaimed, of_kuberay)] == ["gpu", "gpu"]
    assert place_networks(reclaimed, "auto") == "cpu"
    with pytest.raises(UsageError, match=r"score\.device is gpu, and the cluster has no GPU .* --score\.device cpu"):
        place_networks(cpus, "gpu")


def test_more_gpus_than_an_autoscaler_may_ever_add_are_refused(grown: Callable[..., ClusterRoom]) -> None:
    told = r"score.num_actors 9: each takes a GPU, .* has 8 GPUs with all nodes that its autoscaler may add; give fewer"
    with pytest.raises(UsageError, match=told):
        plan_actors(grown("head", "gpu"), 9, 1, has_gpus=True)
    with pytest.raises(UsageError, match=r"has 3 GPUs .* more nodes with GPUs \(max_workers of cluster.yaml\)"):
        plan_actors(grown("head", "gpu", "decode", max_workers=4), 4, 1, has_gpus=True)
    with pytest.raises(UsageError, match="has 2 GPUs; give fewer"):
        plan_actors(ClusterRoom([{"CPU": 64, "GPU": 2}]), 3, 1, has_gpus=True)
    assert plan_actors(ClusterRoom([{"CPU": 64, "GPU": 2}]), 3, 1, has_gpus=False).title == "scoring on CPUs"


def test_actors_that_could_never_run_are_refused() -> None:
    for nodes, has_gpus in (([{"CPU": 1.0}] * 2, False), ([{"CPU": 0.0, "GPU": 4.0}, {"CPU": 8.0}], True)):
        with pytest.raises(UsageError, match=r"score.num_actors 2: .* nodes have [01], [18] CPUs: give fewer actors"):
            reserve_cpus(ClusterRoom(nodes), 2, 1, has_gpus=has_gpus)
