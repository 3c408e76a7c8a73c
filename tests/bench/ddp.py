"""Two workers of one thread against one of two, at the same global batch: `make bench-ddp` prints seconds a step.

Workers are processes of this machine that meet by gloo, as Ray's do on CPUs. The network has the paper's blocks with
fewer channels and voxels, and random scans are there before the clock starts: nothing is read or augmented. Ways take
turns (A B A B), each time in fresh processes after a step that is not counted, and medians are told.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from darnet.config import ModelConfig, TrainConfig
from darnet.model import build_network
from darnet.terminal import print_table
from darnet.threads import set_model_threads
from darnet.train import ALONE, build_optimizer, train_steps

DISTRIBUTED, ALL_THREADS = "2 workers x 1 thread", "1 worker x 2 threads"
WAYS = {DISTRIBUTED: (2, 1), ALL_THREADS: (1, 2)}  # workers, threads of each


@dataclass(frozen=True)
class Steps:
    """What every way trains: so many steps of a global batch."""

    network: ModelConfig
    batch_size: int
    num_steps: int


def run_worker(rank: int, num_workers: int, num_threads: int, steps: Steps, scratch: Path) -> None:
    """Train this worker's share of every batch; worker 0 leaves the seconds of a step in `scratch`."""
    set_model_threads(num_threads)
    network: nn.Module = build_network(steps.network, 0)
    if num_workers > 1:
        meeting = f"file://{scratch / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers)
        network = DistributedDataParallel(network)
    share = steps.batch_size // num_workers
    generator = torch.Generator().manual_seed(rank)
    volumes = torch.rand((share, 1, *steps.network.volume_shape), generator=generator)
    batch = volumes, torch.arange(share) % steps.network.num_classes
    optimizer = build_optimizer(network, TrainConfig(), ALONE.device)
    train_steps(network, optimizer, [batch], ALONE.device)
    _meet(num_workers)
    start_s = time.perf_counter()
    train_steps(network, optimizer, [batch] * steps.num_steps, ALONE.device)
    _meet(num_workers)
    if rank == 0:
        (scratch / "step_s").write_text(str((time.perf_counter() - start_s) / steps.num_steps))
    if num_workers > 1:
        dist.destroy_process_group()


def _meet(num_workers: int) -> None:
    if num_workers > 1:
        dist.barrier()


def measure_once(way: str, steps: Steps) -> float:
    """Seconds of a step, in fresh processes."""
    num_workers, num_threads = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_workers, num_threads, steps, Path(folder))
        torch.multiprocessing.start_processes(run_worker, arguments, nprocs=num_workers, start_method="spawn")
        return float((Path(folder) / "step_s").read_text())


def measure(steps: Steps, repeats: int) -> dict[str, float]:
    """Median seconds of a step, by way."""
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            taken[way].append(measure_once(way, steps))
            print(f"{repeat + 1}/{repeats} {way}: {taken[way][-1]:.3f} s a step", file=sys.stderr)
    return {way: median(seconds) for way, seconds in taken.items()}


def main(arguments: list[str]) -> int:
    """Print the table, the ratio and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 112, 112))
    parser.add_argument("--base-channels", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4, help="scans of all workers together")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    network = ModelConfig(volume_shape=tuple(chosen.shape), base_channels=chosen.base_channels)
    found = measure(Steps(network, chosen.batch_size, chosen.steps), chosen.repeats)
    ratio = found[ALL_THREADS] / found[DISTRIBUTED]
    title = f"a step of {chosen.batch_size} scans of {network.volume_shape}, {network.base_channels} channels"
    print_table(f"{title}, medians of {chosen.repeats}", ["way", "s a step"], [[*item] for item in found.items()])
    print(f"{DISTRIBUTED}: {ratio:.2f} times as fast as {ALL_THREADS}", file=sys.stderr)
    print(json.dumps({"repeats": chosen.repeats, "step_s": found, "ratio": ratio}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
