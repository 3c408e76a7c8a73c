"""DDP ranks by torch alone: what training on a cluster is compared with. Imports no Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from darnet.config import ModelConfig, TrainConfig
from darnet.model import DARNet
from darnet.train import FoldResult, Gang, build_start, fit_fold
from darnet.volumes_folder import read_index


def keep_network(network: DARNet) -> DARNet:
    """The network as it is."""
    return network


def train_with_torch_alone(
    volumes: Path,
    network: ModelConfig,
    config: TrainConfig,
    workers: int,
    scratch: Path,
    equip: Callable[[DARNet], DARNet] = keep_network,
) -> list[FoldResult]:
    """All folds, one after the other, in `workers` processes of this machine; `equip` changes networks beforehand."""
    arguments = (volumes, network, config, workers, scratch, equip)
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=workers, start_method="spawn")
    states = [torch.load(scratch / f"fold{fold}.pt", weights_only=True) for fold in range(config.num_folds)]
    return [FoldResult(fold, *state) for fold, state in enumerate(states)]


def run_rank(
    rank: int,
    volumes: Path,
    network: ModelConfig,
    config: TrainConfig,
    workers: int,
    scratch: Path,
    equip: Callable[[DARNet], DARNet],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'meeting'}", rank=rank, world_size=workers)

    def gather(item: Any) -> list[Any]:
        items = [None] * workers
        dist.all_gather_object(items, item)
        return items

    for fold in range(config.num_folds):
        wrapped = DistributedDataParallel(equip(build_start(network, config, fold)))
        gang = Gang(rank, workers, gather, torch.device("cpu"))
        result = fit_fold(wrapped, read_index(volumes), fold, config, lambda *_: None, gang)
        if rank == 0:
            torch.save((result.state, result.metrics, result.history), scratch / f"fold{fold}.pt")
    dist.destroy_process_group()
