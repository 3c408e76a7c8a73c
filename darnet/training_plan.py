"""What a training consists of: settings, a volumes table and a cluster's resources enter, networks and folds leave.

No Ray: what runs where is decided here and done in `ray_train`.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from darnet import __version__
from darnet.bundle import name_model
from darnet.config import ModelConfig, TrainConfig, VolumeConfig, fingerprint
from darnet.dataset import VolumesTable
from darnet.errors import UsageError
from darnet.settings import TrainSettings

MIN_WORKER_CPUS = 1  # folds that share a CPU train slower together than one after another. Source: ours, by the demo


@dataclass(frozen=True, slots=True)
class Places:
    """Where a training reads and writes, as every node finds it: addresses of volumes and runs, and a local folder."""

    volumes: str
    runs: str
    cache: Path


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
class GangPlan:
    """How the folds share the cluster: `side_by_side` folds at once, each of `workers` with these resources."""

    workers: int
    side_by_side: int
    cpus_per_worker: float
    has_gpus: bool


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


def plan_gangs(resources: Mapping[str, float], workers: int, num_gangs: int) -> GangPlan:
    """Share out a cluster: a GPU a worker where there are GPUs, and CPUs so that as many folds as can run at once.

    A worker asks for one CPU at most: more would not make it faster, and whole nodes could stay half empty.
    Source: ours: starting a small fold takes longer than training it, so that folds overlap on shared CPUs.
    Raises: UsageError naming what the cluster lacks; an impossible request would wait for ever.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if 0 < gpus < workers:
        raise UsageError(f"--workers {workers} takes {workers} GPUs at once, the cluster has {gpus:g}")
    if cpus < workers * MIN_WORKER_CPUS:
        raise UsageError(
            f"--workers {workers} takes at least {workers * MIN_WORKER_CPUS:g} CPUs, the cluster has {cpus:g}"
        )
    room = [num_gangs, cpus // (workers * MIN_WORKER_CPUS), *([gpus // workers] if gpus else [])]
    side_by_side = int(min(room))
    share = math.floor(cpus / (workers * side_by_side) * 100) / 100
    return GangPlan(workers, side_by_side, min(1.0, share), gpus > 0)


def name_run(table: VolumesTable, network: ModelConfig, config: TrainConfig, workers: int, fold: int) -> str:
    """A name that changes with all that changes the result: Ray resumes whatever is stored under it."""
    facts = (
        fingerprint(network),
        fingerprint(config),
        table.cohort_sha256,
        table.volume.preprocessing_version,
        str(workers),
        __version__,
    )
    return f"{name_model(network)}-fold{fold}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:16]}"
