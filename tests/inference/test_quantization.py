"""INT8: what it changes is measured again by other means, and what is wrong with it is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darnet.bundle import Bundle, load_networks, read_bundle, select_model
from darnet.bundle_writing import TrainedFold
from darnet.config import ScoreConfig, TrainConfig
from darnet.errors import HeldError, UsageError
from darnet.inference.openvino_backend import load_openvino
from darnet.inference.quantization import quantize_bundle
from darnet.manifest import BundleSettings, Int8Record
from darnet.scan import Uint8Array
from darnet.score import Ensemble
from darnet.storage import open_store
from darnet.volumes_folder import VolumesIndex, read_voxels
from jobs import quantize
from tests.bundle_fixtures import write_bundle
from tests.inference_fixtures import NETWORK, TEMPERATURES, VOLUME

pytestmark = pytest.mark.slow

CONFIG = ScoreConfig(backend="openvino", precision="int8")


@pytest.fixture(scope="module")
def model(trained: Bundle, index: VolumesIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two of the trained folds: two are enough, and quantising takes its time."""
    out = tmp_path_factory.mktemp("quantization") / "bundle"
    folds = [
        TrainedFold(network.state_dict(), 1, fold, {}, TEMPERATURES[fold])
        for fold, network in enumerate(load_networks(trained)[:2])
    ]
    settings = BundleSettings(volume=VOLUME, network=NETWORK, train=TrainConfig(num_folds=3))
    facts = {"cohort_sha256": index.cohort_sha256, "model_version": "1", "code_version": "0", "trained_on": "noise"}
    write_bundle(str(out), settings=settings, folds=folds, **facts)
    return out


@pytest.fixture(scope="module")
def quantized(model: Path, index: VolumesIndex) -> Path:
    out = model.with_name("quantized")
    quantize_bundle(open_store(str(model)), index, str(out), ScoreConfig(), bound=1.0)
    return out


def _read(path: Path) -> Bundle:
    return read_bundle(open_store(str(path)))


def _records(path: Path) -> list[Int8Record]:
    return [fold.int8 for fold in _read(path).manifest.folds if fold.int8 is not None]


def test_the_record_says_what_int8_changes(quantized: Path, index: VolumesIndex) -> None:
    """Against the networks in torch and double precision, and the files as OpenVINO alone reads them."""
    core = load_openvino().Core()
    bundle = _read(quantized)
    for place, (network, record) in enumerate(zip(load_networks(bundle), _records(quantized), strict=True)):
        rows = np.flatnonzero(index.frame["fold"].fillna(-1) == place)
        assert (record.num_scans, record.calibration_scans) == (len(rows), 32)
        volumes = np.stack([read_voxels(index, row) for row in rows])
        with torch.inference_mode():
            exact = network.double()(torch.from_numpy(volumes)[:, None].double() / 255)
        graph = core.compile_model(quantized / f"fold{place}.int8.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        rounded = torch.from_numpy(np.concatenate([graph([scan[None]])[0] for scan in volumes])).double()
        expected, found = ((logits / TEMPERATURES[place]).softmax(1).numpy() for logits in (exact, rounded))
        difference = np.abs(found - expected)
        assert record.max_difference == pytest.approx(difference.max(), abs=1e-4)
        assert record.mean_difference == pytest.approx(difference.mean(), abs=1e-5)
        assert record.changed_predictions == (found.argmax(1) != expected.argmax(1)).sum()
        assert record.max_difference > 1e-4  # INT8 it is


def test_every_weight_has_half_its_range_so_that_two_products_fit_into_16_bits(quantized: Path) -> None:
    """255 * 64 + 255 * 64 < 2 ** 15: what a processor without VNNI adds up in 16 bits."""
    for place in range(2):
        graph = load_openvino().Core().read_model(quantized / f"fold{place}.int8.xml")
        constants = [item for item in graph.get_ordered_ops() if item.get_type_name() == "Constant"]
        weights = [item.get_data() for item in constants if item.get_element_type().get_type_name() == "i8"]
        assert len(weights) > 10
        assert max(int(np.abs(values.astype(int)).max()) for values in weights) in (63, 64)


def test_scoring_in_int8_is_near_another_model_and_the_same_bits_anywhere(
    quantized: Path, voxels: Uint8Array, tmp_path: Path
) -> None:
    bundle, config = _read(quantized), CONFIG.model_copy(update={"cache": tmp_path, "batch_size": 18})
    scores = Ensemble.from_bundle(bundle, config).score(voxels)
    alone = Ensemble.from_bundle(bundle, config).score(voxels[7:8])
    np.testing.assert_array_equal(alone[0].fold_probability, scores[7].fold_probability)
    np.testing.assert_array_equal(alone[0].class_maps, scores[7].class_maps)
    exact = Ensemble.from_bundle(bundle, ScoreConfig(batch_size=18)).score(voxels)
    pairs = zip(scores, exact, strict=True)
    difference = np.stack([score.fold_probability - other.fold_probability for score, other in pairs])
    assert 1e-5 < np.abs(difference).mean() < 0.1


def test_the_bundle_is_the_same_model_in_fp32_and_another_in_int8(model: Path, quantized: Path) -> None:
    before, after = _read(model), _read(quantized)
    assert after.weights == before.weights
    assert after.manifest.model_sha256 == before.manifest.model_sha256
    int8 = select_model(after, CONFIG).manifest
    assert int8.model_sha256 != before.manifest.model_sha256
    assert int8.model_version == f"{before.manifest.model_version} int8"
    card = (quantized / "MODEL_CARD.md").read_text()
    assert card.startswith((model / "MODEL_CARD.md").read_text())
    assert all(f"| {record.max_difference:.4f} |" in card for record in _records(quantized))


def test_a_difference_above_the_bound_is_held_and_nothing_written(
    model: Path, index: VolumesIndex, tmp_path: Path
) -> None:
    """And no scan of the test cohort is read: theirs are gone here."""
    folder = tmp_path / "volumes"
    shutil.copytree(index.folder, folder)
    for name in index.frame.loc[index.frame["cohort"] == "test", "array"]:
        (folder / name).unlink()
    rest = replace(index, place=str(folder), folder=folder)
    with pytest.raises(HeldError, match=r"INT8 moves a probability of fold \d by 0\.\d+ .* more than 1e-05") as caught:
        quantize_bundle(open_store(str(model)), rest, str(tmp_path / "out"), ScoreConfig(), bound=1e-5)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(caught.value.facts["int8"]) == 2


def _swap(folder: Path) -> None:
    first, second = folder / "fold0.int8.bin", folder / "fold1.int8.bin"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "fold0.int8.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _edit(folder: Path) -> None:
    path = folder / "fold0.int8.xml"
    path.write_bytes(path.read_bytes() + b" ")


def _remove(folder: Path) -> None:
    (folder / "fold0.int8.xml").unlink()


@pytest.mark.parametrize("damage", [_swap, _truncate, _edit, _remove])
def test_a_damaged_graph_is_refused_by_name(quantized: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(quantized, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"fold0\.int8\.(xml|bin): (damaged|missing)"):
        _read(tmp_path / "bundle")


def test_other_volumes_than_the_bundle_was_trained_on_are_refused(
    model: Path, index: VolumesIndex, tmp_path: Path
) -> None:
    other = replace(index, cohort_sha256="f" * 64)
    with pytest.raises(UsageError, match="not the volumes that the bundle was trained on"):
        quantize_bundle(open_store(str(model)), other, str(tmp_path / "out"), ScoreConfig())


def test_the_job_never_overwrites_a_bundle(
    model: Path, index: VolumesIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--model", str(model), "--volumes", str(index.folder), "--out", str(model)]
    monkeypatch.setattr(sys, "argv", ["quantize", *places])
    assert quantize.main() == 2
    assert "exists already" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
