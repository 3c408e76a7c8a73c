"""The training loop of one fold without Ray: it learns, repeats itself, resumes exactly, and splits over ranks."""

import io
import math
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import DataLoader

from darnet.config import AugmentConfig, ModelConfig, TrainConfig
from darnet.dataset import Augmentation, VolumeDataset
from darnet.errors import RunError, UsageError
from darnet.model import build_network
from darnet.storage import open_store
from darnet.train import (
    ALONE,
    FoldResult,
    FoldState,
    Gang,
    Metrics,
    build_optimizer,
    build_start,
    check_fold,
    equip_network,
    evaluate,
    fit_fold,
    infer_logits,
    list_batches,
    make_result,
    scale_rate,
    train_steps,
    weigh_classes,
)
from darnet.volumes_folder import VolumesIndex, read_index, write_index
from tests.volumes_fixtures import SMALL_VOLUME, make_cohort, make_volumes

NETWORK = ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape)
QUICK = TrainConfig(epochs=3, num_folds=2, learning_rate=3e-3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VolumesIndex:
    return make_volumes(tmp_path_factory.mktemp("volumes"), num_train=24, num_folds=2, num_test=3)


def save(state: FoldState) -> bytes:
    """As a checkpoint on disk: what is trained on after this cannot change it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def fit(index: VolumesIndex, config: TrainConfig, resume: bytes | None = None) -> tuple[FoldResult, list[bytes]]:
    """Train fold 0 alone; returns the state after each epoch too."""
    states: list[bytes] = []

    def keep(epoch: int, metrics: Metrics, state: FoldState) -> None:
        assert epoch == len(state["history"]) - 1
        assert state["history"][-1] == metrics
        states.append(save(state))

    start = None if resume is None else torch.load(io.BytesIO(resume), weights_only=True)
    result = fit_fold(build_network(NETWORK, seed=0), index, 0, config, keep, resume=start)
    return result, states


@pytest.fixture(scope="module")
def whole(index: VolumesIndex) -> tuple[FoldResult, list[bytes]]:
    """A training nobody interrupted, and its state after each epoch."""
    return fit(index, QUICK)


def is_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_trivial_task_is_learnt(index: VolumesIndex) -> None:
    result, _ = fit(index, QUICK.model_copy(update={"epochs": 10}))
    assert result.metrics["accuracy_3class"] >= 0.9  # chance is 1/3
    assert result.metrics["auc_ncp"] >= 0.95


def test_the_same_settings_give_the_same_bits(index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]) -> None:
    first, again = whole[0], fit(index, QUICK)[0]
    assert is_same_state(first.state, again.state)
    assert first.history == again.history


def test_the_seed_decides_order_and_augmentation(index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]) -> None:
    other, _ = fit(index, QUICK.model_copy(update={"seed": 1}))
    assert not is_same_state(whole[0].state, other.state)


def test_every_fold_of_every_seed_starts_from_weights_of_its_own() -> None:
    def draw(seed: int, fold: int) -> bytes:
        network = build_start(NETWORK, QUICK.model_copy(update={"seed": seed}), fold)
        return network.head.weight.detach().numpy().tobytes()

    drawn = [draw(seed, fold) for seed in range(3) for fold in range(5)]
    assert len(set(drawn)) == 15
    assert drawn == [draw(seed, fold) for seed in range(3) for fold in range(5)]


def test_a_start_has_the_networks_and_the_heads_settings() -> None:
    wide = build_start(NETWORK, QUICK.model_copy(update={"head_init_std": 0.5}), 1)
    plain = build_start(NETWORK, QUICK, 1)
    assert wide.config == NETWORK
    assert torch.allclose(wide.head.weight, plain.head.weight * 50)


@pytest.mark.parametrize("epochs_done", [1, 2, 3])
def test_a_resumed_training_ends_in_the_bits_of_an_uninterrupted_one(
    index: VolumesIndex, whole: tuple[FoldResult, list[bytes]], epochs_done: int
) -> None:
    expected, states = whole
    resumed, later = fit(index, QUICK, resume=states[epochs_done - 1])
    assert len(later) == QUICK.epochs - epochs_done
    assert is_same_state(resumed.state, expected.state)
    assert (resumed.metrics, resumed.history) == (expected.metrics, expected.history)
    if later:
        last, wanted = (torch.load(io.BytesIO(item), weights_only=True) for item in (later[-1], states[-1]))
        assert is_same_state(last["network"], wanted["network"])
        moments = (state["optimizer"]["state"].values() for state in (last, wanted))
        assert all(is_same_state(one, other) for one, other in zip(*moments, strict=True))


def test_the_rate_follows_a_half_cosine_down_to_zero(whole: tuple[FoldResult, list[bytes]]) -> None:
    result, states = whole
    expected = [QUICK.learning_rate * (1 + np.cos(np.pi * epoch / 3)) / 2 for epoch in range(4)]
    assert [item["learning_rate"] for item in result.history] == pytest.approx(expected[:3])
    final = torch.load(io.BytesIO(states[-1]), weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    assert final == pytest.approx(expected[3], abs=1e-12)


def test_the_best_epoch_is_kept_and_its_metrics_can_be_measured_again(
    index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]
) -> None:
    result, states = whole
    best = max(result.history, key=lambda item: (item["accuracy_3class"], -item["validation_loss"], item["epoch"]))
    assert result.metrics == best
    saved = torch.load(io.BytesIO(states[int(best["epoch"])]), weights_only=True)
    assert is_same_state(result.state, saved["network"])
    network = build_network(NETWORK, seed=9)
    network.load_state_dict(result.state)
    measured = evaluate(network, index, index.select_validation(0), 4, ALONE)
    assert measured.items() <= best.items()


class Scripted(nn.Module):
    """A stand-in for a network: whose validation metrics an epoch has is fixed by the test."""

    def __init__(self, logits_by_epoch: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("epochs", torch.tensor(-1))
        self.logits_by_epoch = torch.tensor(logits_by_epoch)

    def train(self, mode: bool = True) -> "Scripted":
        self.epochs += int(mode)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * 0 + self.logits_by_epoch[self.epochs]).expand(len(x), 3)


@pytest.mark.parametrize(
    ("logits_by_epoch", "expected"),
    [
        ([[1, 0, 0], [2, 0, 0], [3, 0, 0]], 0),  # equal accuracy 1/3: the lowest loss is the least sure one
        ([[3, 0, 0], [1, 0, 0], [2, 0, 0]], 1),
        ([[1, 0, 0], [1, 0, 0], [2, 0, 0]], 1),  # equal loss as well: the later epoch
    ],
)
def test_ties_go_to_the_lower_loss_then_to_the_later_epoch(
    index: VolumesIndex, logits_by_epoch: list[list[float]], expected: int
) -> None:
    config = TrainConfig(epochs=3, num_folds=2)
    result = fit_fold(Scripted(logits_by_epoch), index, 0, config, lambda *_: None)
    assert result.metrics["epoch"] == expected


def test_a_fold_trains_on_its_own_training_rows_only(index: VolumesIndex) -> None:
    for epoch in range(3):
        trained = list(chain(*list_batches(index.select_training(1), 1, epoch, QUICK, ALONE)))
        assert sorted(trained) == index.select_training(1).tolist()
        assert not set(trained) & set(index.select_validation(1))


@pytest.mark.slow
def test_a_temperature_fits_the_chosen_networks_validation_scans_and_changes_nothing_else(
    index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]
) -> None:
    result, _ = fit(index, QUICK.model_copy(update={"temperature_scaling": True}))
    assert is_same_state(result.state, whole[0].state)
    network, rows = build_network(NETWORK, seed=9), index.select_validation(0)
    network.load_state_dict(result.state)
    logits, labels = infer_logits(network, VolumeDataset(index), rows, 2, ALONE.device), index.labels[rows]
    grid = np.geomspace(0.05, 20, 1500)
    losses = [
        log_loss(labels, softmax(logits / temperature, axis=1), labels=[0, 1, 2], normalize=False)
        for temperature in grid
    ]
    assert (logits.argmax(axis=1) != labels).any()  # else it would not be below 1
    likeliest = grid[np.argmin(losses - scipy.stats.norm.logpdf(np.log(grid), 0, 0.5))]
    assert result.temperature == pytest.approx(likeliest, rel=0.01)
    assert whole[0].temperature == 1


def test_ranks_share_each_step_of_the_same_order() -> None:
    rows = np.arange(100, 127)
    alone = list_batches(rows, 0, 5, QUICK, ALONE)
    assert [len(batch) for batch in alone] == [4] * 6  # three scans sit this epoch out
    for world_size in (2, 4):
        ranks = [
            list_batches(rows, 0, 5, QUICK, Gang(rank, world_size, ALONE.gather, ALONE.device))
            for rank in range(world_size)
        ]
        assert [list(chain(*shares)) for shares in zip(*ranks, strict=True)] == alone


def test_every_epoch_and_fold_has_an_order_of_its_own() -> None:
    rows = np.arange(64)
    orders = {str(list_batches(rows, fold, epoch, QUICK, ALONE)) for fold in range(3) for epoch in range(5)}
    assert len(orders) == 15


class Meeting:
    """Threads that stand in for ranks: each hands in an item and gets everyone's."""

    def __init__(self, world_size: int) -> None:
        self.items: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)

    def join(self, rank: int) -> Gang:
        def gather(item: Any) -> list[Any]:
            self.items[rank] = item
            self.barrier.wait()
            gathered = list(self.items)
            self.barrier.wait()
            return gathered

        return Gang(rank, len(self.items), gather, ALONE.device)


def run_ranks(world_size: int, work: Any) -> list[Any]:
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        results[rank] = work(meeting.join(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("num_rows", "world_size"), [(7, 2), (5, 4), (2, 4)])
def test_each_validation_scan_counts_once_however_many_ranks(
    index: VolumesIndex, num_rows: int, world_size: int
) -> None:
    rows, network = index.select_validation(0)[:num_rows], build_network(NETWORK, seed=3)

    def measure(gang: Gang) -> Metrics:
        return evaluate(network, index, rows, 2, gang)

    alone = measure(ALONE)
    for metrics in run_ranks(world_size, measure):
        assert metrics == pytest.approx(alone, nan_ok=True, abs=1e-6)


def test_validation_agrees_with_scikit_learn(index: VolumesIndex) -> None:
    network, rows = build_network(NETWORK, seed=3).eval(), index.select_validation(0)
    volumes = torch.stack([VolumeDataset(index)[int(row)][0] for row in rows])
    with torch.no_grad():
        probabilities = softmax(network(volumes).double().numpy(), axis=1)
    measured = evaluate(network, index, rows, 4, ALONE)
    assert measured["accuracy_3class"] == accuracy_score(index.labels[rows], probabilities.argmax(axis=1))
    assert measured["validation_loss"] == pytest.approx(log_loss(index.labels[rows], probabilities), abs=1e-6)


def test_all_ranks_validate_and_choose_rank_zeros_network(index: VolumesIndex) -> None:
    # Without DDP the two ranks learn apart; batch norm's statistics must be rank 0's all the same.
    config = QUICK.model_copy(update={"epochs": 1})
    networks = [build_network(NETWORK, seed=0) for _ in range(2)]

    def work(gang: Gang) -> dict[str, torch.Tensor]:
        return fit_fold(networks[gang.rank], index, 0, config, lambda *_: None, gang).state

    first, second = run_ranks(2, work)
    statistics = [name for name in first if "running" in name]
    assert statistics
    assert all(torch.equal(first[name], second[name]) for name in statistics)
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_inference_is_unaugmented_and_in_row_order(index: VolumesIndex) -> None:
    network = build_network(NETWORK, seed=3)
    rows = np.array([5, 1, 9])
    together = infer_logits(network, VolumeDataset(index), rows, 2, ALONE.device)
    for row, logits in zip(rows, together, strict=True):
        single = infer_logits(network, VolumeDataset(index), np.array([row]), 2, ALONE.device)
        assert single[0] == pytest.approx(logits, abs=1e-5)


def test_what_does_not_fit_is_refused_by_name(index: VolumesIndex) -> None:
    with pytest.raises(UsageError, match="3 workers do not divide a batch of 4"):
        check_fold(index, 0, QUICK, 3)
    with pytest.raises(UsageError, match=r"has 2 folds, train\.num_folds is 5"):
        check_fold(index, 0, TrainConfig(), 1)
    with pytest.raises(UsageError, match="fold 0 has 12 training and 12 validation scans"):
        check_fold(index, 0, QUICK.model_copy(update={"batch_size": 13}), 1)
    with pytest.raises(UsageError, match="fold 2 has 24 training and 0 validation scans"):
        check_fold(index, 2, QUICK, 1)


def test_a_loss_that_is_no_number_stops_the_fold(index: VolumesIndex) -> None:
    with pytest.raises(RunError, match=r"lower train.learning_rate"):
        fit(index, QUICK.model_copy(update={"learning_rate": 1e30}))


def test_a_finished_state_gives_the_result_without_training(whole: tuple[FoldResult, list[bytes]]) -> None:
    expected, states = whole
    result = make_result(0, torch.load(io.BytesIO(states[-1]), weights_only=True))
    assert is_same_state(result.state, expected.state)
    assert (result.metrics, result.history) == (expected.metrics, expected.history)


def test_a_warm_up_climbs_in_equal_steps_and_the_cosine_takes_over_at_its_top() -> None:
    config = TrainConfig(epochs=7, warmup_epochs=3)
    rates = [scale_rate(epoch, config) for epoch in range(8)]
    half = np.sqrt(0.5) / 2
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 0.5 + half, 0.5, 0.5 - half, 0])
    with pytest.raises(ValueError, match="warmup_epochs 3 must be fewer than epochs"):
        TrainConfig(epochs=3, warmup_epochs=3)


def make_unequal(folder: Path) -> VolumesIndex:
    """Fold 1's training scans are 2 CP, 2 NCP and 8 Normal."""
    frame = make_cohort(folder, num_train=24, num_folds=2)
    frame.loc[(frame["fold"] == 0) & (frame.index >= 12), "diagnosis"] = "Normal"
    write_index(open_store(str(folder)), frame, SMALL_VOLUME)
    return read_index(folder)


def test_balanced_classes_weigh_what_scikit_learn_says(tmp_path: Path) -> None:
    index = make_unequal(tmp_path)
    config = QUICK.model_copy(update={"class_weights": "balanced"})
    weights, rows = weigh_classes(index, 1, config), index.select_training(1)
    assert weights is not None
    assert np.bincount(index.labels[rows]).tolist() == [2, 2, 8]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=index.labels[rows])
    assert weights.numpy() == pytest.approx(expected)
    assert weights[index.labels[rows]].mean() == pytest.approx(1)
    assert weigh_classes(index, 1, QUICK) is None


def test_weighed_losses_of_two_ranks_have_the_mean_of_one() -> None:
    """A mean over the sum of weights, torch's own, would not."""
    logits, labels, weights = torch.randn(4, 3), torch.tensor([0, 0, 1, 2]), torch.tensor([0.5, 2.0, 4.0])

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    def measure(rows: slice) -> float:
        network = Given()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        return train_steps(network, optimizer, [(logits[rows], labels[rows])], ALONE.device, weights)[0]

    log_shares = torch.log_softmax(logits.double(), dim=1)
    expected = np.mean([-weights[label].item() * log_shares[row, label].item() for row, label in enumerate(labels)])
    assert measure(slice(0, 4)) == pytest.approx(expected, rel=1e-5)
    assert (measure(slice(0, 2)) + measure(slice(2, 4))) / 2 == pytest.approx(expected, rel=1e-5)


def test_classes_cannot_be_balanced_where_one_is_absent(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, num_train=24, num_folds=2)
    frame.loc[(frame["fold"] == 0) & (frame["diagnosis"] == "NCP"), "diagnosis"] = "CP"
    write_index(open_store(str(tmp_path)), frame, SMALL_VOLUME)
    index = read_index(tmp_path)
    with pytest.raises(UsageError, match="fold 1 has no training scan with NCP"):
        check_fold(index, 1, QUICK.model_copy(update={"class_weights": "balanced"}), 1)


def test_mixed_precision_trains_to_finite_numbers_and_validates_in_full_precision(index: VolumesIndex) -> None:
    """bfloat16 is emulated on most CPUs: how fast it is, or how well it learns on a GPU, cannot be seen here."""
    config = QUICK.model_copy(update={"amp": True, "epochs": 1})
    result, _ = fit(index, config)
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert all(tensor.dtype != torch.bfloat16 for tensor in result.state.values())
    assert not is_same_state(result.state, fit(index, config.model_copy(update={"amp": False}))[0].state)
    network = build_network(NETWORK, seed=9)
    network.load_state_dict(result.state)
    assert evaluate(network, index, index.select_validation(0), 4, ALONE).items() <= result.metrics.items()


def test_mixed_precision_reads_no_memory_that_nobody_wrote() -> None:
    """What oneDNN's gradients in bfloat16 do. Freed memory is full of NaN here, so that what is read of it shows."""
    network = build_network(NETWORK, seed=0)
    optimizer = build_optimizer(network, QUICK, ALONE.device)
    batches = [(torch.rand(4, 1, *SMALL_VOLUME.shape), torch.tensor([0, 1, 2, 0]))]
    for _ in range(2):
        waste = [torch.full((2**power,), math.nan) for power in range(6, 21) for _ in range(40)]
        del waste
        train_steps(network, optimizer, batches, ALONE.device, amp=True)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


def test_synchronised_batch_norm_replaces_every_layer_and_is_refused_on_a_cpu() -> None:
    config = QUICK.model_copy(update={"sync_batchnorm": True})
    with pytest.raises(UsageError, match="sync_batchnorm needs GPUs"):
        equip_network(build_network(NETWORK, seed=0), config, torch.device("cpu"))
    plain = build_network(NETWORK, seed=0)
    num_norms = sum(isinstance(module, nn.BatchNorm3d) for module in plain.modules())
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    network = equip_network(plain, config, torch.device("cuda"))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == num_norms == 20
    assert not any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    assert is_same_state(network.state_dict(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own compiler
def test_a_compiled_network_keeps_the_names_of_its_weights() -> None:
    """Compiling itself takes minutes on a CPU and is left to the first step."""
    plain, compiled = build_network(NETWORK, seed=0), build_network(NETWORK, seed=0)
    equip_network(compiled, QUICK.model_copy(update={"compile": True}), ALONE.device)
    assert compiled._compiled_call_impl is not None
    assert is_same_state(plain.state_dict(), compiled.state_dict())
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig(compile=True, gradient_checkpointing=True)


def test_adam_is_fused_on_a_gpu_alone() -> None:
    """What is fused rounds otherwise: on a CPU a resumed training must end in the bits it would have had."""
    network = build_network(NETWORK, seed=0)
    assert build_optimizer(network, QUICK, torch.device("cuda")).defaults["fused"] is True
    assert not build_optimizer(network, QUICK, torch.device("cpu")).defaults["fused"]


def test_gradient_checkpointing_ends_in_the_same_bits(
    index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]
) -> None:
    config = QUICK.model_copy(update={"gradient_checkpointing": True})
    network = equip_network(build_network(NETWORK, seed=0), config, ALONE.device)
    result = fit_fold(network, index, 0, config, lambda *_: None)
    assert is_same_state(result.state, whole[0].state)
    assert result.history == whole[0].history


def test_the_layout_of_a_network_is_a_setting_that_changes_last_digits_alone(
    index: VolumesIndex, whole: tuple[FoldResult, list[bytes]]
) -> None:
    built = build_network(NETWORK, seed=0)
    assert not all(parameter.is_contiguous() for parameter in built.parameters())
    network = equip_network(built, QUICK.model_copy(update={"channels_last_3d": False}), ALONE.device)
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    result = fit_fold(network, index, 0, QUICK, lambda *_: None)
    expected = whole[0].history[0]["train_loss"]
    assert result.history[0]["train_loss"] == pytest.approx(expected, rel=1e-3)


# Stored output of our own code, the only one: a change that is not meant to alter numbers must not alter these.
LOSS_TRACE = [1.0910714, 1.0847386, 1.1096232, 1.0550747, 1.1126966]


def test_the_first_five_losses_are_what_they_were(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, num_train=30, num_folds=3)
    network = build_network(NETWORK, seed=0)
    batches = list_batches(index.select_training(1), 1, 0, QUICK, ALONE)
    augmentation = Augmentation(AugmentConfig(), seed=0, fold=1, epoch=0)
    loader = DataLoader(VolumeDataset(index, augmentation), batch_sampler=batches)
    optimizer = torch.optim.Adam(network.parameters(), lr=QUICK.learning_rate)
    losses = train_steps(network, optimizer, loader, ALONE.device)
    assert losses == pytest.approx(LOSS_TRACE, rel=1e-4)
