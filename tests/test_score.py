"""Ensemble and rows, against one network at a time and sums written out."""

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from darnet.bundle import Bundle, load_networks
from darnet.config import ScoreConfig
from darnet.errors import Status
from darnet.inference.torch_backend import TorchBackend
from darnet.manifest import RunFacts
from darnet.model import DARNet, ResidualBlock
from darnet.publishing.commit import check_rows
from darnet.publishing.rows import SCHEMA
from darnet.scan import CropBox, IngestedScan, Intensity, Manufacturer, ScanFacts, StandardVolume, Uint8Array
from darnet.score import Ensemble, ScanScore, make_row
from tests.bundle_fixtures import SHAPE, write_random_bundle
from tests.results_fixtures import ORIGIN, stage

NOW = datetime(2026, 1, 2, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_random_bundle(tmp_path_factory.mktemp("score") / "bundle")


@pytest.fixture(scope="module")
def voxels() -> Uint8Array:
    return np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def scores(bundle: Bundle, voxels: Uint8Array) -> list[ScanScore]:
    return _gather(load_networks(bundle)).score(voxels)


def _gather(networks: Sequence[DARNet], batch_size: int = 4) -> Ensemble:
    backend = TorchBackend(networks, batch_size=batch_size, num_threads=1)
    return Ensemble(backend, batch_size=batch_size, temperatures=[1.0] * len(networks))


def _scan(voxels: Uint8Array, intensity: Intensity = Intensity.HU) -> IngestedScan:
    depth, height, width = voxels.shape
    volume = StandardVolume(voxels, intensity, (1.0, 1.0, 1.0), CropBox(depth, 0, 0, height, width))
    lung = np.zeros(voxels.shape, np.bool_)
    lung[:, : height // 2] = True
    return IngestedScan("a#00000000", Status.OK, "", ScanFacts(3, 9), volume, lung)


def test_probabilities_are_those_of_each_network_alone(
    bundle: Bundle, voxels: Uint8Array, scores: Sequence[ScanScore]
) -> None:
    for index, network in enumerate(load_networks(bundle)):
        with torch.inference_mode():
            alone = network(torch.from_numpy(voxels)[:, None].float() / 255).softmax(1).numpy()
        found = np.stack([score.fold_probability[index] for score in scores])
        np.testing.assert_allclose(found, alone, atol=1e-5)
    np.testing.assert_allclose(scores[0].probability, scores[0].fold_probability.sum(0) / 5, rtol=1e-6)
    spread = [score.fold_probability.std() for score in scores]
    assert min(spread) > 0.01  # folds that all say the same would show nothing


def test_each_fold_is_divided_by_its_own_temperature_before_the_mean(bundle: Bundle, voxels: Uint8Array) -> None:
    temperatures = (0.5, 1.0, 2.0, 3.0, 4.0)
    folds = zip(bundle.manifest.folds, temperatures, strict=True)
    changed = [fold.model_copy(update={"temperature": temperature}) for fold, temperature in folds]
    scaled = Bundle(bundle.manifest.model_copy(update={"folds": tuple(changed)}), bundle.weights)
    (score,) = Ensemble.from_bundle(scaled, ScoreConfig()).score(voxels[:1])
    expected = []
    for network, temperature in zip(load_networks(bundle), temperatures, strict=True):
        with torch.inference_mode():
            logits = network(torch.from_numpy(voxels[:1])[:, None].float() / 255)[0].double().numpy()
        raised = [math.exp(value / temperature) for value in logits]
        expected.append([value / sum(raised) for value in raised])
    np.testing.assert_allclose(score.fold_probability, expected, atol=1e-5)
    np.testing.assert_allclose(score.probability, np.mean(expected, axis=0), atol=1e-5)


def test_a_scan_has_the_same_bits_alone_and_in_any_company(
    bundle: Bundle, voxels: Uint8Array, scores: Sequence[ScanScore]
) -> None:
    ensemble = _gather(load_networks(bundle))
    for order in ([0], [1, 0], [2, 1, 0], [0, 0, 0, 0]):
        for place, score in zip(order, ensemble.score(voxels[order]), strict=True):
            np.testing.assert_array_equal(score.fold_probability, scores[place].fold_probability)
            np.testing.assert_array_equal(score.class_maps, scores[place].class_maps)


def test_more_than_a_batch_is_refused(bundle: Bundle, voxels: Uint8Array) -> None:
    with pytest.raises(ValueError, match="3 volumes in a batch of 2"):
        _gather(load_networks(bundle), batch_size=2).score(voxels)


def test_class_map_is_the_mean_of_the_folds_and_explains_their_logits(
    bundle: Bundle, voxels: Uint8Array, scores: Sequence[ScanScore]
) -> None:
    with torch.inference_mode():
        x = torch.from_numpy(voxels)[:, None].float() / 255
        logits = np.mean([(network(x) - network.head.bias).numpy() for network in load_networks(bundle)], axis=0)
    for score, expected in zip(scores, logits, strict=True):
        np.testing.assert_allclose(score.class_maps.mean(axis=(1, 2, 3)), expected, atol=1e-4)


def test_a_row_has_every_column_and_passes_the_gate(
    bundle: Bundle, voxels: Uint8Array, scores: Sequence[ScanScore]
) -> None:
    run = RunFacts("r1", date(2026, 1, 2), bundle.manifest, "0")
    row = make_row(run, "a", "0" * 64, _scan(voxels[0]), scores[0], NOW)
    assert set(row) == set(SCHEMA.names)
    check_rows(["a"], stage([row]), ORIGIN)
    cam = scores[0].draw_cam(scores[0].prediction, SHAPE)
    assert row["prediction"] == str(scores[0].prediction) == row["cam_class"]
    assert row["probability_ncp"] == pytest.approx(scores[0].fold_probability[:, 1].mean())
    assert row["fold_probability_ncp"] == scores[0].fold_probability[:, 1].tolist()
    assert row["fold_std_ncp"] == pytest.approx(np.std(row["fold_probability_ncp"]))
    assert row["cam_in_lung_fraction"] == pytest.approx(cam[:, : SHAPE[1] // 2].sum() / cam.sum(), rel=1e-5)
    assert row["cam_left_fraction"] == pytest.approx(cam[..., SHAPE[2] // 2 :].sum() / cam.sum(), rel=1e-5)
    assert row["lung_fraction"] == 0.5
    assert sum(row["cam_depth_profile"]) == pytest.approx(1)


def _explain_slowly(network: DARNet, voxels: Uint8Array) -> tuple[list[float], list[NDArray[np.float64]], list[float]]:
    """Logits, class maps and mean depth gates of one network in double precision, gates and maps from their equations.

    Source: paper eq. 1-2 for the gates, ref. 27 for the maps.
    """
    seen: list[NDArray[np.float64]] = []
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    handle = blocks[-1].residual.register_forward_hook(lambda *call: seen.append(call[-1][0].numpy()))
    with torch.inference_mode():
        features = network.features(torch.from_numpy(voxels)[None, None].double() / 255)[0].numpy()
    handle.remove()
    attention = blocks[-1].depth_attention
    assert attention is not None
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in attention.parameters())
    means = seen[0].mean(axis=(2, 3))  # (C, d)
    hidden = np.maximum(w1 @ means.flatten() + b1, 0)
    gates = (1 / (1 + np.exp(-(w2 @ hidden + b2)))).reshape(means.shape)
    weight, bias = network.head.weight.detach().numpy(), network.head.bias.detach().numpy()
    maps, logits = [], []
    for label in range(3):
        maps.append(sum(weight[label, channel] * features[channel] for channel in range(len(features))))
        logits.append(float(maps[-1].mean() + bias[label]))
    return logits, maps, [float(gates[:, depth].mean()) for depth in range(gates.shape[1])]


def _load_with_opinions_on_depth(bundle: Bundle) -> list[DARNet]:
    """The bundle's networks with gates that lie far apart, as those of an untrained one do not."""
    networks, generator = load_networks(bundle), torch.Generator().manual_seed(0)
    for network in networks:
        for block in (module for module in network.modules() if isinstance(module, ResidualBlock)):
            assert block.depth_attention is not None
            block.depth_attention.excite.weight.data *= 1000
            block.depth_attention.excite.bias.data.normal_(1, 3, generator=generator)
    return networks


def test_every_number_of_a_row_agrees_with_a_slow_computation(bundle: Bundle, voxels: Uint8Array) -> None:
    networks = _load_with_opinions_on_depth(bundle)
    (score,) = _gather(networks).score(voxels[:1])
    lung = np.random.default_rng(1).random(SHAPE) < 0.3
    box = CropBox(num_slices=40, top=5, left=7, height=60, width=50)
    facts = ScanFacts(40, 123_456, Intensity.HU, 40, 70, 64, 2.5, 0.75, Manufacturer.GE, "p" * 64, "s" * 64)
    volume = StandardVolume(voxels[0], Intensity.HU, (6.25, 1.4, 1.2), box)
    scan = IngestedScan("a#00000000", Status.OK, "", facts, volume, lung, fetch_s=1.5, decode_s=2.5)
    run = RunFacts("r1", date(2026, 1, 2), bundle.manifest, "0.9")
    row = make_row(run, "a", "f" * 64, scan, score, NOW)

    folds = [_explain_slowly(network.double(), voxels[0]) for network in networks]
    per_fold = []
    for logits, _, _ in folds:
        raised = [math.exp(value) for value in logits]
        per_fold.append([value / sum(raised) for value in raised])
    mean = [sum(fold[label] for fold in per_fold) / 5 for label in range(3)]
    label = max(range(3), key=mean.__getitem__)
    ncp = [fold[1] for fold in per_fold]
    small = sum(maps[label] for _, maps, _ in folds) / 5
    grid = np.meshgrid(
        *((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(SHAPE, small.shape, strict=True)), indexing="ij"
    )
    cam = map_coordinates(np.maximum(small, 0), grid, order=1, mode="nearest")
    highest = [place for place in np.ndindex(*SHAPE) if cam[place] > cam.max() * (1 - 1e-6)]
    peak = min(highest, key=lambda place: sum((at - (n - 1) / 2) ** 2 for at, n in zip(place, SHAPE, strict=True)))
    places = [(place + 0.5) * size / cells for place, size, cells in zip(peak, (40, 60, 50), SHAPE, strict=True)]
    expected = {
        "probability_cp": mean[0],
        "probability_ncp": mean[1],
        "probability_normal": mean[2],
        "fold_probability_ncp": ncp,
        "fold_std_ncp": math.sqrt(sum((value - mean[1]) ** 2 for value in ncp) / 5),
        "cam_in_lung_fraction": sum(cam[place] for place in np.ndindex(*SHAPE) if lung[place]) / cam.sum(),
        "cam_left_fraction": sum(cam[place] for place in np.ndindex(*SHAPE) if place[2] >= 16) / cam.sum(),
        "cam_extent_fraction": sum(cam[place] >= cam.max() / 2 for place in np.ndindex(*SHAPE)) / cam.size,
        "cam_depth_profile": [float(plane.sum() / cam.sum()) for plane in cam],
        "depth_gate_profile": [sum(fold[2][depth] for fold in folds) / 5 for depth in range(small.shape[0])],
        "lung_fraction": sum(bool(value) for value in lung.flat) / lung.size,
    }
    exact = {
        "prediction": ("CP", "NCP", "Normal")[label],
        "cam_class": ("CP", "NCP", "Normal")[label],
        "cam_peak_slice": math.floor(places[0]),
        "cam_peak_y": 5 + math.floor(places[1]),
        "cam_peak_x": 7 + math.floor(places[2]),
        "run_id": "r1",
        "commit": 0,
        "night": date(2026, 1, 2),
        "scored_at": NOW,
        "source": "a",
        "scan_id": "a#00000000",
        "patient_key": "p" * 64,
        "series_key": "s" * 64,
        "input_sha256": "f" * 64,
        "num_files": 40,
        "num_bytes": 123_456,
        "status": "OK",
        "status_detail": "",
        "model_name": bundle.manifest.model_name,
        "model_version": bundle.manifest.model_version,
        "model_sha256": bundle.manifest.model_sha256,
        "preprocessing_version": bundle.manifest.preprocessing_version,
        "code_version": "0.9",
        "intensity": "HU",
        "num_slices": 40,
        "slice_spacing_mm": 2.5,
        "pixel_spacing_mm": 0.75,
        "manufacturer": "GE",
        "fetch_s": 1.5,
        "decode_s": 2.5,
        "model_s": score.model_s,
    }
    assert expected.keys() | exact.keys() == set(SCHEMA.names)
    assert {name: row[name] for name in exact} == exact
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert np.ptp(expected["depth_gate_profile"]) > 0.005
    assert 0.05 < row["cam_extent_fraction"] < 0.95  # a map that is even or a point would show little
    assert score.model_s > 0


def test_a_scan_that_is_not_ok_has_a_row_without_numbers(bundle: Bundle) -> None:
    run = RunFacts("r1", date(2026, 1, 2), bundle.manifest, "0")
    scan = IngestedScan("a", Status.BAD_TRUNCATED, "ends early", ScanFacts(1, 5))
    row = make_row(run, "a", "0" * 64, scan, None, NOW)
    check_rows(["a"], stage([row]), ORIGIN)
    numbers = [name for name in row if name.startswith(("probability", "cam_", "fold_", "depth_"))]
    assert {row[name] for name in [*numbers, "prediction", "lung_fraction", "model_s"]} == {None}
