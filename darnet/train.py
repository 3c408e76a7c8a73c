"""One fold's training as one rank sees it: network, index and settings enter, the best weights and metrics leave.

Whether other ranks exist is known through `Gang` only, and whether the network is wrapped does not matter.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from darnet.calibration import fit_temperature
from darnet.config import ModelConfig, TrainConfig
from darnet.dataset import Augmentation, VolumeDataset, load_batches
from darnet.errors import RunError, UsageError
from darnet.metrics import compute_metrics
from darnet.model import DARNet, build_network
from darnet.scan import DIAGNOSES, FloatArray
from darnet.volumes_folder import VolumesIndex, VolumesTable

Metrics: TypeAlias = dict[str, float]
Rows: TypeAlias = NDArray[np.int64]


class Best(TypedDict):
    """The epoch that won so far: weights on the CPU, and its metrics."""

    network: dict[str, Tensor]
    metrics: Metrics


class FoldState(TypedDict):
    """All that an exact resume needs. Tensors are the live ones: whoever keeps a state copies or saves it."""

    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    best: Best | None
    history: list[Metrics]


@dataclass(frozen=True, slots=True)
class FoldResult:
    """The network a fold has chosen, the validation metrics it was chosen for, and those of every epoch."""

    fold: int
    state: dict[str, Tensor]
    metrics: Metrics
    history: list[Metrics]

    @property
    def temperature(self) -> float:
        """What the chosen epoch's logits are divided by; 1 where none was fitted."""
        return self.metrics.get("temperature", 1.0)


@dataclass(frozen=True, slots=True)
class Gang:
    """The ranks that train one fold together, as one of them sees it.

    `gather` returns each rank's item, in rank order, to every rank; `device` is this rank's own.
    """

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any]]
    device: torch.device


ALONE = Gang(0, 1, lambda item: [item], torch.device("cpu"))

Report: TypeAlias = Callable[[int, Metrics, FoldState], None]


@dataclass(frozen=True, slots=True)
class _Learner:
    """What changes while a fold is trained."""

    network: nn.Module
    optimizer: Adam
    scheduler: LambdaLR

    @property
    def module(self) -> nn.Module:
        """The network itself, without DDP's wrapping."""
        network = self.network
        return cast(nn.Module, network.module) if isinstance(network, DistributedDataParallel) else network

    def save(self, best: Best | None, history: list[Metrics]) -> FoldState:
        return FoldState(
            network=self.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            best=best,
            history=list(history),
        )

    def load(self, state: FoldState) -> None:
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def fit_fold(
    network: nn.Module,
    index: VolumesIndex,
    fold: int,
    config: TrainConfig,
    report: Report,
    gang: Gang = ALONE,
    resume: FoldState | None = None,
) -> FoldResult:
    """Train one fold and choose the epoch with the best validation accuracy; `report` is called after each epoch.

    `resume` is a reported state: training goes on after its epoch and ends in the same bits as if never interrupted.
    Batch norm's statistics are each rank's own in training, rank 0's in validation and in the result.
    Source: paper sec. 4.2 (Adam, cosine annealing, cross-entropy); choice by accuracy, authors' code.
    Raises: UsageError if the gang or the fold does not fit the settings; RunError if the loss is no longer finite.
    """
    check_fold(index, fold, config, gang.world_size)
    optimizer = build_optimizer(network, config, gang.device)
    learner = _Learner(network, optimizer, LambdaLR(optimizer, lambda epoch: scale_rate(epoch, config)))
    best, history = None, list[Metrics]()
    if resume is not None:
        learner.load(resume)
        best, history = resume["best"], list(resume["history"])
    for epoch in range(len(history), config.epochs):
        metrics = _run_epoch(learner, index, fold, epoch, config, gang)
        best = _choose(best, metrics, learner.module)
        history.append(metrics)
        report(epoch, metrics, learner.save(best, history))
    return make_result(fold, learner.save(best, history))


def build_optimizer(network: nn.Module, config: TrainConfig, device: torch.device) -> Adam:
    """Adam; on a GPU its fused form, one kernel a step for all weights. Source: paper sec. 4.2; fused, ours: speed."""
    return Adam(network.parameters(), lr=config.learning_rate, fused=device.type == "cuda" or None)


def build_start(network: ModelConfig, config: TrainConfig, fold: int) -> DARNet:
    """The network that a fold's training starts from.

    Source: ours: weights are drawn by (seed, fold). Were they a seed's alone, its folds would share their luck, and
    fewer seeds than there seem to be would tell networks apart.
    """
    drawn = np.random.SeedSequence((config.seed, fold)).generate_state(1)
    return build_network(network, int(drawn[0]), config.head_init_std)


def equip_network(network: DARNet, config: TrainConfig, device: torch.device) -> DARNet:
    """Give a network what training needs of it besides values, which stay; before DDP wraps it.

    Raises: UsageError for synchronised batch norm on a CPU.
    """
    check_device(config, has_gpu=device.type != "cpu")
    network.recomputes_blocks = config.gradient_checkpointing
    if not config.channels_last_3d:  # in which every network is built
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if config.sync_batchnorm:
        network = cast(DARNet, nn.SyncBatchNorm.convert_sync_batchnorm(network))  # type: ignore[no-untyped-call]
    if config.compile:
        network.compile()  # in place: the names of the weights stay
    return network


def check_device(config: TrainConfig, *, has_gpu: bool) -> None:
    """Raises: UsageError for synchronised batch norm on a CPU."""
    if config.sync_batchnorm and not has_gpu:
        raise UsageError("train.sync_batchnorm needs GPUs: torch has it for no other device; leave it out on CPUs")


def scale_rate(epoch: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by in an epoch: a straight climb to 1, then half a cosine down to 0.

    Source: paper sec. 4.2 (cosine annealing); the climb is Goyal et al. 2017, and off by default.
    """
    if epoch < config.warmup_epochs:
        return (epoch + 1) / (config.warmup_epochs + 1)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def weigh_classes(index: VolumesTable, fold: int, config: TrainConfig) -> Tensor | None:
    """What a scan's loss is multiplied by, by class, 1 on average over the fold's training scans; None for 1 each.

    Shape:  (classes,) float32.
    Raises: UsageError naming a class without training scans.
    """
    if config.class_weights == "none":
        return None
    counts = np.bincount(index.labels[index.select_training(fold)], minlength=len(DIAGNOSES))
    if not counts.all():
        absent = DIAGNOSES[int(counts.argmin())]
        raise UsageError(f"fold {fold} has no training scan with {absent}: train.class_weights cannot be balanced")
    return torch.tensor(counts.sum() / (len(DIAGNOSES) * counts), dtype=torch.float32)


def make_result(fold: int, state: FoldState) -> FoldResult:
    """What a fold's last state says of it."""
    best = state["best"]
    assert best is not None, "a fold has at least one epoch"
    return FoldResult(fold, best["network"], best["metrics"], state["history"])


def check_fold(index: VolumesTable, fold: int, config: TrainConfig, world_size: int) -> None:
    """Raises: UsageError naming what does not fit: workers and batch, folds and index, scans and batch or classes."""
    if config.batch_size % world_size:
        raise UsageError(f"{world_size} workers do not divide a batch of {config.batch_size} (train.batch_size)")
    if index.num_folds != config.num_folds:
        raise UsageError(f"{index.place} has {index.num_folds} folds, train.num_folds is {config.num_folds}")
    num_training, num_validation = len(index.select_training(fold)), len(index.select_validation(fold))
    if num_training < config.batch_size or num_validation == 0:
        raise UsageError(
            f"fold {fold} has {num_training} training and {num_validation} validation scans; "
            f"a batch takes {config.batch_size}, validation at least one"
        )
    weigh_classes(index, fold, config)


def list_batches(rows: Rows, fold: int, epoch: int, config: TrainConfig, gang: Gang) -> list[list[int]]:
    """This rank's share of every step of an epoch; scans left over from the last full batch sit this epoch out.

    Source: ours: the order depends on (seed, fold, epoch) alone, so the scans of a step do not depend on the gang.
    """
    order = np.random.default_rng((config.seed, fold, epoch)).permutation(rows)
    share = config.batch_size // gang.world_size
    end = len(order) // config.batch_size * config.batch_size
    starts = range(gang.rank * share, end, config.batch_size)
    return [order[start : start + share].tolist() for start in starts]


def train_steps(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    class_weights: Tensor | None = None,
    amp: bool = False,
) -> list[float]:
    """One step of the optimiser a batch; returns this rank's losses.

    Weighed losses are added up over the number of scans, not of weights, so that the mean over ranks is that of one.
    Raises: RunError at the first loss that is not finite.
    """
    network.train()
    weights = None if class_weights is None else class_weights.to(device)
    losses = []
    for volumes, labels in batches:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = network(volumes.to(device))
        loss = F.cross_entropy(logits.float(), labels.to(device), weight=weights, reduction="none").mean()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise RunError(
                f"the loss became {losses[-1]} at step {len(losses)} of the epoch; lower train.learning_rate"
            )
        with _leave_out_onednn(is_left_out=amp and device.type == "cpu"):
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


@contextmanager
def _leave_out_onednn(*, is_left_out: bool) -> Iterator[None]:
    """In bfloat16 its weight gradients of 3D convolutions hold memory that nobody wrote (torch 2.13, oneDNN 3.12)."""
    backend: Any = torch.backends.mkldnn
    was_enabled = backend.enabled
    backend.enabled = was_enabled and not is_left_out
    try:
        yield
    finally:
        backend.enabled = was_enabled


def evaluate(
    network: nn.Module,
    index: VolumesIndex,
    rows: Rows,
    batch_size: int,
    gang: Gang,
    temperature_scaling: bool = False,
) -> Metrics:
    """Metrics over `rows`, un-augmented; every rank infers its share, and each scan counts once.

    With `temperature_scaling` also the temperature that fits these rows; the metrics are those without it, so that it
    does not change which epoch is chosen.
    """
    own = rows[gang.rank :: gang.world_size]
    shares = gang.gather((own, infer_logits(network, VolumeDataset(index), own, batch_size, gang.device)))
    gathered = np.concatenate([share[0] for share in shares])
    order = np.argsort(gathered)
    assert np.array_equal(gathered[order], np.sort(rows)), "each scan is inferred by exactly one rank"
    logits, labels = np.concatenate([share[1] for share in shares])[order], index.labels[gathered[order]]
    log_probabilities = log_softmax(logits, axis=1)
    temperature = {"temperature": fit_temperature(logits, labels)} if temperature_scaling else {}
    loss = -float(log_probabilities[np.arange(len(labels)), labels].mean())
    return {"validation_loss": loss, **compute_metrics(np.exp(log_probabilities), labels), **temperature}


@torch.no_grad()
def infer_logits(
    network: nn.Module, dataset: VolumeDataset, rows: Rows, batch_size: int, device: torch.device
) -> FloatArray:
    """Shape: (len(rows), classes) float64."""
    network.eval()
    batches = [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
    loaded = load_batches(dataset, batches, device)
    logits = [network(volumes).cpu().double().numpy() for volumes, _ in loaded]
    return np.concatenate([np.empty((0, 3)), *logits])


def _run_epoch(
    learner: _Learner,
    index: VolumesIndex,
    fold: int,
    epoch: int,
    config: TrainConfig,
    gang: Gang,
) -> Metrics:
    """Train and validate once; the same metrics on every rank."""
    rate = float(learner.scheduler.get_last_lr()[0])
    dataset = VolumeDataset(index, Augmentation(config.augment, config.seed, fold, epoch))
    batches = list_batches(index.select_training(fold), fold, epoch, config, gang)
    losses = train_steps(
        learner.network,
        learner.optimizer,
        load_batches(dataset, batches, gang.device),
        gang.device,
        weigh_classes(index, fold, config),
        config.amp,
    )
    learner.scheduler.step()
    _share_buffers(learner.module, gang)
    share = config.batch_size // gang.world_size
    rows = index.select_validation(fold)
    validation = evaluate(learner.module, index, rows, share, gang, config.temperature_scaling)
    train_loss = float(np.mean(gang.gather(float(np.mean(losses)))))
    return {"epoch": epoch, "learning_rate": rate, "train_loss": train_loss, **validation}


def _share_buffers(module: nn.Module, gang: Gang) -> None:
    """Give every rank rank 0's batch norm statistics, so that all validate the network that is saved."""
    buffers = dict(module.named_buffers())
    own = {name: buffer.cpu() for name, buffer in buffers.items()} if gang.rank == 0 else None
    shared = gang.gather(own)[0]
    for name, buffer in buffers.items():
        buffer.copy_(shared[name])


def _choose(best: Best | None, metrics: Metrics, module: nn.Module) -> Best:
    """The better of two epochs: by accuracy, then validation loss, then the later one.

    Source: authors' code; how ties are broken is ours.
    """
    if best is not None and _rank_epoch(metrics) < _rank_epoch(best["metrics"]):
        return best
    weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    return Best(network=weights, metrics=metrics)


def _rank_epoch(metrics: Metrics) -> tuple[float, float]:
    return metrics["accuracy_3class"], -metrics["validation_loss"]
