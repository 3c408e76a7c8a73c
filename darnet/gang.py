"""One rank of the gang that trains a fold: its task and a process group of torch's enter, the trained fold leaves.

No Ray: who starts the ranks, and wraps their networks for DDP, is the business of `ray_folds` and
`ray_rank`.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from darnet.train import FoldResult, FoldState, Gang, Metrics, Report, build_start, equip_network, fit_fold
from darnet.training_plan import FoldTask
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesIndex

# While a node copies 13 GB of volumes its ranks answer nobody, nor does rank 0 while it uploads a checkpoint.
# Source: ours: CC-CCII at 1 MB/s, and half as long again.
MEETING_LIMIT = timedelta(hours=6)


def train_rank(
    task: FoldTask,
    device: torch.device,
    prepare: Callable[[nn.Module], nn.Module],
    report: Report,
    resume: FoldState | None,
    open_index: Callable[[str, Path, str], VolumesIndex] = open_volumes,
) -> FoldResult:
    """Train a fold together with the other ranks of the default process group; `prepare` wraps the network for DDP.

    Raises: as `fit_fold` and `open_index`; RuntimeError if another rank is gone.
    """
    meeting = dist.new_group(timeout=MEETING_LIMIT, backend="gloo")
    index = open_index(task.places.volumes, task.places.cache, task.places.cohort_sha256)
    # The default group's collectives soon find a rank that is gone. They must not begin while some still copy volumes;
    # a rank that dies meanwhile ends the wait: by its lost connection, or by Ray, which ends the gang.
    dist.monitored_barrier(meeting, MEETING_LIMIT)

    def report_together(epoch: int, metrics: Metrics, state: FoldState) -> None:
        """Ray holds the other ranks back only until they know the checkpoint's name, not until rank 0 has stored it."""
        report(epoch, metrics, state)
        dist.monitored_barrier(meeting, MEETING_LIMIT)

    gang = Gang(dist.get_rank(), dist.get_world_size(), _gather, device)
    network = equip_network(build_start(task.network, task.config, task.fold), task.config, device)
    return fit_fold(prepare(network), index, task.fold, task.config, report_together, gang, resume)


def _gather(item: Any) -> list[Any]:
    """Every rank's item, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
