"""What a training consists of: settings, a volumes table and a cluster's resources enter, networks and folds leave.

No Ray: what runs where is decided here and done in `ray_folds`; and what `ray_score` counts for its actors.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from darnet.config import CohortConfig, ModelConfig, TrainConfig, VolumeConfig, fingerprint
from darnet.cpus import CPU_MARGIN, DECODE_CPUS, WORKER_CPUS
from darnet.errors import ObjectMissing, UsageError
from darnet.manifest import name_model
from darnet.settings import TrainSettings
from darnet.storage import Store
from darnet.volumes_folder import VolumesTable

GROUP_LABEL = "ray.io/node-group"  # on nodes that `ray up` and KubeRay start, of which an autoscaler may add more
CODE_FILE = "code_version"  # in a run's folder, beside its checkpoints
CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts the cluster's file on the head, as JSON


@dataclass(frozen=True, slots=True)
class Places:
    """Where a training reads and writes, as every node finds it: addresses of volumes and runs, and a local folder.

    `cohort_sha256` is that of the volumes the training began with: their place can be prepared anew meanwhile.
    """

    volumes: str
    runs: str
    cache: Path
    cohort_sha256: str


@dataclass(frozen=True, slots=True)
class Training:
    """One network trained with one seed; its bundle is `folder` in what is written, "" where it is all of it."""

    network: ModelConfig
    config: TrainConfig
    folder: str = ""

    @property
    def title(self) -> str:
        """For people."""
        return f"{name_model(self.network)} seed {self.config.seed}"


@dataclass(frozen=True, slots=True)
class FoldTask:
    """What a worker needs to train one fold of one network; `run` is the name its checkpoints are kept under."""

    places: Places
    run: str
    network: ModelConfig
    config: TrainConfig
    fold: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{name_model(self.network)} seed {self.config.seed} fold {self.fold}"


@dataclass(frozen=True, slots=True)
class ClusterRoom:
    """What each node has ("CPU", "GPU"): those that are there, and those an autoscaler may add, `num_more` at most.

    `more` is None where there may be an autoscaler and nobody here knows what it may add.
    """

    nodes: Sequence[Mapping[str, float]]
    more: Sequence[Mapping[str, float]] | None = ()
    num_more: int = 0

    @property
    def all_nodes(self) -> list[Mapping[str, float]]:
        """Both kinds, as far as they are known."""
        return [*self.nodes, *(self.more or ())]

    def count_places(self, *, has_gpus: bool, is_grown: bool) -> int:
        """How many workers fit, node by node; grown, with the nodes that give the most room."""
        return self._count(lambda node: _count_places(node, has_gpus), is_grown=is_grown)

    def count_gpus(self, *, is_grown: bool) -> int:
        """How many GPUs there are; grown, with the nodes that have the most."""
        return self._count(lambda node: int(node.get("GPU", 0.0)), is_grown=is_grown)

    def _count(self, count: Callable[[Mapping[str, float]], int], *, is_grown: bool) -> int:
        more = sorted(map(count, self.more or ()), reverse=True)
        return sum(map(count, self.nodes)) + (sum(more[: self.num_more]) if is_grown else 0)


@dataclass(frozen=True, slots=True)
class GangPlan:
    """How the folds share the cluster: `side_by_side` folds at once, of `workers` each."""

    workers: int
    side_by_side: int
    has_gpus: bool
    title: str
    """For people."""

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """As Ray names them."""
        return {"CPU": WORKER_CPUS, **({"GPU": 1} if self.has_gpus else {})}


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """What Ray counts for each model actor of a night: `num_cpus`, and a GPU where the networks run on GPUs; and
    `decode_cpus` for a source that is read.
    """

    num_cpus: float
    decode_cpus: float
    has_gpus: bool
    title: str
    """For people."""


def choose_networks(settings: TrainSettings, volume: VolumeConfig) -> list[ModelConfig]:
    """The networks of Table 3 that are asked for, or the one of the settings.

    Raises: UsageError as `match_network`.
    """
    network = match_network(settings, volume)
    if not settings.networks:
        return [network]
    attentions = [set(name.split("-")) for name in settings.networks]
    return [
        network.model_copy(update={"depth_attention": "da" in wanted, "channel_attention": "ca" in wanted})
        for wanted in attentions
    ]


def match_division(config: CohortConfig, table: VolumesTable) -> None:
    """Hold the settings that divide a cohort against what divided these volumes, if that was recorded.

    A default says nothing: volumes know how they were divided.
    Raises: UsageError naming what the volumes have otherwise; training divides nothing anew.
    """
    if table.division is None:
        return
    told, default, recorded = (item.model_dump() for item in (config, CohortConfig(), table.division.cohorts.resolved))
    differs = [name for name, value in told.items() if value not in (default[name], recorded[name])]
    if differs:
        given = ", ".join(f"cohorts.{name} is {told[name]}, of the volumes {recorded[name]}" for name in differs)
        raise UsageError(f"{table.place}: {given}; leave it out, or prepare volumes that are divided so")


def choose_trainings(settings: TrainSettings, volume: VolumeConfig) -> list[Training]:
    """Every network with every seed, seed by seed; several seeds have a folder each.

    Raises: UsageError as `match_network`.
    """
    networks, seeds = choose_networks(settings, volume), settings.seeds or (settings.train.seed,)
    names = ["" if len(networks) == len(seeds) == 1 else name_model(network) for network in networks]
    return [
        Training(
            network,
            settings.train.model_copy(update={"seed": seed}),
            f"seed{seed}/{name}" if len(seeds) > 1 else name,
        )
        for seed in seeds
        for network, name in zip(networks, names, strict=True)
    ]


def match_network(settings: TrainSettings, volume: VolumeConfig) -> ModelConfig:
    """The network of the settings, built for the volumes there are.

    Raises: UsageError naming both where the settings ask for other volumes than these.
    """
    if settings.volume not in (VolumeConfig(), volume):
        raise UsageError(f"{settings.volumes} was prepared with {volume}, the settings ask for {settings.volume}")
    shape = settings.network.volume_shape
    if shape not in (ModelConfig().volume_shape, volume.shape):
        raise UsageError(f"{settings.volumes} holds volumes of {volume.shape}, network.volume_shape is {shape}")
    return settings.network.model_copy(update={"volume_shape": volume.shape})


def place_runs(settings: TrainSettings, out: str) -> str:
    """Where checkpoints are kept: where the settings say, or beside the address `out`.

    Raises: UsageError if `out` is a whole bucket: beside it lies another, which may be anybody's.
    """
    if not settings.runs and re.fullmatch(r"s3://[^/]+", out):
        raise UsageError(f"--out {out} is a whole bucket, with no place beside it for checkpoints; give --runs too")
    return settings.runs or f"{out}.runs"


def read_room(nodes: Sequence[Mapping[str, Any]], cluster_file: Path = CLUSTER_FILE) -> ClusterRoom:
    """What the nodes that are alive, as Ray describes them, and the cluster's file say of what can run."""
    here = [node["Resources"] for node in nodes]
    groups = Counter(node["Labels"][GROUP_LABEL] for node in nodes if GROUP_LABEL in node.get("Labels", {}))
    if not groups:
        return ClusterRoom(here)
    try:
        told = json.loads(cluster_file.expanduser().read_text())
        types, head, most = told["available_node_types"], told["head_node_type"], told["max_workers"]
    except (OSError, ValueError, KeyError):
        return ClusterRoom(here, None)
    free = {name: kind.get("max_workers", most) - groups[name] for name, kind in types.items() if name != head}
    names = [name for name, num_nodes in free.items() for _ in range(num_nodes)]
    if not set(groups) <= set(types) or not all(types[name].get("resources") for name in names):
        return ClusterRoom(here, None)  # the file of another cluster, or machines that Ray counts once they are up
    num_workers = groups.total() - groups[head]
    return ClusterRoom(here, [types[name]["resources"] for name in names], max(0, most - num_workers))


def plan_gangs(
    room: ClusterRoom, workers: int, num_gangs: int, device: Literal["auto", "cpu", "gpu"] = "auto"
) -> GangPlan:
    """Share out a cluster: a CPU a worker and, on GPUs, one of the same node; as many folds as can run at once.

    A gang may lie on any nodes, as under Ray Train's strategy PACK, which prefers one node and insists on none.
    Raises: UsageError naming what the cluster lacks; an impossible request would wait for ever.
    """
    has_gpus = choose_gpus(room, device)
    now = room.count_places(has_gpus=has_gpus, is_grown=False)
    places = room.count_places(has_gpus=has_gpus, is_grown=True)
    if places < workers and room.more is not None:
        raise UsageError(_describe_lack(room, workers, places, has_gpus))
    side_by_side = num_gangs if room.more is None else min(num_gangs, places // workers)
    title = f"training on {'GPUs' if has_gpus else 'CPUs'} (train.device is {device})"
    if now < side_by_side * workers:
        title += f": {now} workers have room now; the others wait for nodes that an autoscaler adds"
    return GangPlan(workers, side_by_side, has_gpus, title)


def choose_gpus(room: ClusterRoom, device: Literal["auto", "cpu", "gpu"]) -> bool:
    """Whether the networks run on GPUs there, by `train.device` or `score.device`."""
    return device == "gpu" or (device == "auto" and any(node.get("GPU", 0) > 0 for node in room.nodes))


def place_networks(room: ClusterRoom, device: Literal["auto", "cpu", "gpu"]) -> Literal["cpu", "gpu"]:
    """What the networks of a night run on, by `score.device`.

    Raises: UsageError if that is gpu, and there is no GPU that an autoscaler could not add either.
    """
    if device == "gpu" and room.more is not None and not room.count_gpus(is_grown=True):
        raise UsageError(
            "score.device is gpu, and the cluster has no GPU and no autoscaler that may add one; give it nodes with "
            "GPUs (cluster.yaml), or say --score.device cpu"
        )
    return "gpu" if choose_gpus(room, device) else "cpu"


def _count_places(node: Mapping[str, float], has_gpus: bool) -> int:
    cpus, gpus = (node.get(name, 0.0) for name in ("CPU", "GPU"))
    return int(min(cpus // WORKER_CPUS, gpus) if has_gpus else cpus // WORKER_CPUS)


def _describe_lack(room: ClusterRoom, workers: int, places: int, has_gpus: bool) -> str:
    kinds = {"CPU": WORKER_CPUS, **({"GPU": 1} if has_gpus else {})}
    asked = " and ".join(f"{workers * each:g} {kind}s" for kind, each in kinds.items())
    there = " and ".join(f"{sum(node.get(kind, 0) for node in room.all_nodes):g} {kind}s" for kind in kinds)
    beside = ", each GPU beside a CPU of its own node" if has_gpus else ""
    grown = " with all nodes that its autoscaler may add" if room.more else ""
    return (
        f"--workers {workers} takes {asked} at once{beside}; the cluster has {there}{grown}, room for {places} workers"
    )


def plan_actors(
    room: ClusterRoom, num_actors: int, num_threads: int, *, has_gpus: bool, decode_threads: int = 1
) -> ActorPlan:
    """Place the model actors of a night: on GPUs one each, which those wait for that an autoscaler must add first.

    Raises: UsageError naming what the cluster lacks, and as `reserve_cpus`; an impossible request would wait for ever.
    """
    now, most = (room.count_gpus(is_grown=is_grown) for is_grown in (False, True))
    if has_gpus and room.more is not None and most < num_actors:
        grown = " with all nodes that its autoscaler may add" if room.more else ""
        raise UsageError(
            f"score.num_actors {num_actors}: each takes a GPU, and the cluster has {most} GPUs{grown}; give fewer "
            "actors, or let the cluster have more nodes with GPUs (max_workers of cluster.yaml)"
        )
    title = f"scoring on {'GPUs' if has_gpus else 'CPUs'}"
    if has_gpus and now < num_actors:
        title += f": {now} of {num_actors} model actors find one now; the others wait for nodes that an autoscaler adds"
    num_cpus = reserve_cpus(room, num_actors, num_threads, has_gpus=has_gpus)
    decode_cpus = count_decode_cpus(room, decode_threads, num_actors, num_cpus, has_gpus=has_gpus)
    if decode_cpus < decode_threads:
        title += (
            f"; the {decode_threads} threads that read a source count as {decode_cpus:g}: no more fit on every node"
        )
    return ActorPlan(num_cpus, decode_cpus, has_gpus, title)


def count_decode_cpus(
    room: ClusterRoom, num_threads: int, num_actors: int = 0, reserve: float = 1.0, *, has_gpus: bool = False
) -> float:
    """CPUs that Ray counts for a source that is read: one for each thread, as far as every node has them.

    That is each that has a CPU, beside as many of the actors, at `reserve` each, as it may be given: a source for which
    too much is counted is never read there, and it may be the last node that is left. One CPU where nobody knows what
    nodes may come.
    """
    if room.more is None:
        return DECODE_CPUS
    decode_cpus = num_threads * DECODE_CPUS
    for node in room.all_nodes:
        cpus = _count_cpus(node)
        num_here = min(int(cpus / reserve), int(node.get("GPU", 0)) if has_gpus else num_actors, num_actors)
        if cpus >= DECODE_CPUS:
            decode_cpus = min(decode_cpus, (cpus - num_here * reserve) // DECODE_CPUS * DECODE_CPUS)
    return max(decode_cpus, DECODE_CPUS)


def reserve_cpus(room: ClusterRoom, num_actors: int, num_threads: int, *, has_gpus: bool) -> float:
    """CPUs that Ray counts for each model actor: those of its threads, or what leaves one to decode on every node.

    Ray places actors as it likes and decodes only where a CPU is free, so that a night whose actors can take all of
    them waits for ever; a node may be the last that is left. The actor has its threads whatever is counted for it.

    Raises: UsageError if whatever is counted the actors do not fit, or can take the last CPU of every node.
    """
    nodes = [*room.nodes, *_list_more(room, num_actors, has_gpus=has_gpus)]
    most = num_threads - CPU_MARGIN
    wholes = {_count_cpus(node) - kept for node in nodes for kept in (DECODE_CPUS, 0.0)}
    shares = (cpus / (place + 1) - CPU_MARGIN for cpus in wholes for place in range(num_actors))
    for reserve in sorted({most, *(share for share in shares if 0 < share < most)}, reverse=True):
        if _leaves_room(reserve, nodes, num_actors, has_gpus=has_gpus):
            return round(reserve, 4)  # Ray counts no finer
    there = ", ".join(f"{_count_cpus(node):g}" for node in nodes)
    beside = " and a GPU" if has_gpus else ""
    raise UsageError(
        f"score.num_actors {num_actors}: each takes some of a CPU{beside}, and decoding a whole CPU beside them; the "
        f"cluster's nodes have {there} CPUs: give fewer actors, or larger nodes"
    )


def _list_more(room: ClusterRoom, num_actors: int, *, has_gpus: bool) -> list[Mapping[str, float]]:
    """The best of the nodes that an autoscaler may add; where nobody knows them, as many like the best as it takes."""

    def rank(node: Mapping[str, float]) -> tuple[float, float]:
        return node.get("GPU", 0.0) if has_gpus else 0.0, _count_cpus(node)

    if room.more is None:
        best = max(room.nodes, key=rank)
        return [best if not has_gpus or best.get("GPU", 0.0) else {**best, "GPU": 1.0}] * num_actors
    return sorted(room.more, key=rank, reverse=True)[: room.num_more]


def _leaves_room(reserve: float, nodes: Sequence[Mapping[str, float]], num_actors: int, *, has_gpus: bool) -> bool:
    """Whether the actors fit and, wherever they are, decoding does too: on each node that has more than its one CPU,
    and on one node at least.
    """
    num_places, num_blocking = 0, 0
    can_block_all = True
    for node in nodes:
        cpus = _count_cpus(node)
        places = min(int(cpus / reserve), int(node.get("GPU", 0)) if has_gpus else num_actors, num_actors)
        num_places += places
        if cpus < DECODE_CPUS:
            continue
        blocking = int((cpus - DECODE_CPUS) / reserve) + 1  # so many actors are in decoding's way
        if blocking <= places and cpus > DECODE_CPUS:
            return False
        num_blocking += blocking
        can_block_all &= blocking <= places
    return num_places >= num_actors and not (can_block_all and num_blocking <= num_actors)


def _count_cpus(node: Mapping[str, float]) -> float:
    return node.get("CPU", 0.0)


def name_run(table: VolumesTable, network: ModelConfig, config: TrainConfig, workers: int, fold: int) -> str:
    """A name that changes with all that changes the result but the code: Ray resumes whatever is stored under it."""
    facts = (
        fingerprint(network),
        fingerprint(config),
        table.cohort_sha256,
        table.volume.preprocessing_version,
        str(workers),
    )
    return f"{name_model(network)}-fold{fold}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:16]}"


def claim_runs(runs: Store, names: Sequence[str], code: str) -> None:
    """Note in the folders of these runs the code that trains them, before any has a checkpoint.

    Raises: UsageError if other code began one: its network would be of neither, and no other could be compared with it.
    """
    begun = {name: _read_code(runs.child(name)) for name in names}
    others = {name: found for name, found in begun.items() if found not in ("", code)}
    if others:
        first, *more = others
        raise UsageError(
            f"{runs.uri}: code version {others[first]} began {len(others)} of these {len(names)} folds, and this is "
            f"{code}: go on with that code; or delete {first}{f' and {len(more)} more' if more else ''} there, or give "
            "jobs.train another --runs, and this code trains them from the start"
        )
    for name in names:
        runs.child(name).write_bytes(CODE_FILE, code.encode())


def _read_code(run: Store) -> str:
    """The code that began a run, "" where it has not begun."""
    try:
        return run.read_bytes(CODE_FILE).decode()
    except ObjectMissing:
        return ""
