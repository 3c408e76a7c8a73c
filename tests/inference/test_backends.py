"""Every backend against the network itself, run as it was trained, on probabilities that lie apart."""

import functools
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from darnet.bundle import Bundle, load_networks, read_bundle, select_model
from darnet.config import ModelConfig, ScoreConfig
from darnet.errors import UsageError
from darnet.inference import openvino_backend
from darnet.inference.graph import ScoringGraph, fold_batch_norm
from darnet.inference.torch_backend import TorchBackend
from darnet.model import build_network, scale_voxels
from darnet.scan import Uint8Array
from darnet.score import Ensemble, ScanScore
from darnet.settings import ScoreSettings, read_settings
from darnet.storage import open_store
from darnet.volumes_folder import VolumesIndex
from tests.inference_fixtures import NETWORK, TEMPERATURES, VOLUME
from tests.places import ROOT

BACKENDS = ("torch", "openvino")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=BACKENDS)
def config(request: pytest.FixtureRequest, cache: Path) -> ScoreConfig:
    return ScoreConfig(backend=request.param, cache=cache, batch_size=18)


@pytest.fixture(scope="module")
def eager(trained: Bundle, voxels: Uint8Array) -> dict[str, Any]:
    """Probabilities, class maps and gates from the networks as they are, batch norm and all, in double precision."""
    probability, class_maps, gates = [], [], []
    x = torch.from_numpy(voxels)[:, None].double() / 255
    for network, temperature in zip(load_networks(trained), TEMPERATURES, strict=True):
        with torch.inference_mode():
            trace = network.double().trace(x)
            probability.append((network.classify(trace.features) / temperature).softmax(1).numpy())
            weight = network.head.weight.numpy()
        class_maps.append(np.tensordot(weight, trace.features.numpy(), axes=(1, 1)).swapaxes(0, 1))
        assert trace.depth_gates is not None
        gates.append(trace.depth_gates.numpy().mean(axis=1))
    return {
        "fold_probability": np.stack(probability, axis=1),
        "class_maps": np.mean(class_maps, axis=0),
        "depth_gates": np.mean(gates, axis=0),
    }


def _score(trained: Bundle, config: ScoreConfig, voxels: Uint8Array) -> list[ScanScore]:
    return Ensemble.from_bundle(trained, config).score(voxels)


def _gather(scores: list[ScanScore]) -> np.ndarray:
    return np.stack([score.fold_probability for score in scores])


def test_the_trained_networks_have_opinions_that_lie_apart(eager: dict[str, Any]) -> None:
    """Else equality would show little: networks that know nothing agree in everything."""
    probability = eager["fold_probability"]  # (N, folds, classes)
    assert probability.std(axis=0).mean() > 0.1
    assert np.ptp(probability) > 0.8
    assert np.abs(np.diff(probability, axis=1)).mean() > 0.02
    assert set(probability.mean(axis=1).argmax(axis=1)) == {0, 1, 2}


def test_a_backend_says_in_fp32_what_the_network_says(
    trained: Bundle, config: ScoreConfig, voxels: Uint8Array, eager: dict[str, Any]
) -> None:
    scores = _score(trained, config, voxels)
    np.testing.assert_allclose(_gather(scores), eager["fold_probability"], atol=1e-4)
    for name in ("class_maps", "depth_gates"):
        found = np.stack([getattr(score, name) for score in scores])
        np.testing.assert_allclose(found, eager[name], rtol=1e-3, atol=1e-3 * np.abs(eager[name]).max())
    assert all(score.fold_probability.dtype == score.class_maps.dtype == np.float32 for score in scores)


def test_a_scan_has_the_same_bits_alone_in_any_company_and_another_time(
    trained: Bundle, config: ScoreConfig, voxels: Uint8Array
) -> None:
    together = _score(trained, config, voxels[:5])
    ensemble = Ensemble.from_bundle(trained, config)
    for order in ([0], [1, 0], [4, 3, 2, 1, 0], [2, 2, 2]):
        for place, score in zip(order, ensemble.score(voxels[order]), strict=True):
            np.testing.assert_array_equal(score.fold_probability, together[place].fold_probability)
            np.testing.assert_array_equal(score.class_maps, together[place].class_maps)
            np.testing.assert_array_equal(score.depth_gates, together[place].depth_gates)


@pytest.mark.slow
def test_some_folds_are_the_mean_of_these(
    trained: Bundle, config: ScoreConfig, voxels: Uint8Array, eager: dict[str, Any]
) -> None:
    scores = _score(trained, config.model_copy(update={"folds": (2, 0)}), voxels[:4])
    expected = eager["fold_probability"][:4, [0, 2]].mean(axis=1)
    np.testing.assert_allclose([score.probability for score in scores], expected, atol=1e-4)
    assert np.abs(expected - eager["fold_probability"][:4].mean(axis=1)).max() > 1e-2


@pytest.mark.slow
def test_bf16_is_near_and_not_the_same(
    trained: Bundle, config: ScoreConfig, voxels: Uint8Array, eager: dict[str, Any]
) -> None:
    changed = config.model_copy(update={"precision": "bf16"})
    if config.backend == "openvino" and not _has_bf16():
        with pytest.raises(UsageError, match="this processor has none"):
            _score(trained, changed, voxels[:1])
        return
    difference = np.abs(_gather(_score(trained, changed, voxels)) - eager["fold_probability"])
    assert 1e-6 < difference.mean() < 0.02


def _has_bf16() -> bool:
    return any(name in Path("/proc/cpuinfo").read_text() for name in ("amx_bf16", "avx512_bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("attentions", [(False, False), (True, False), (False, True)])
def test_networks_without_attention_are_converted_too(
    attentions: tuple[bool, bool], tmp_path: Path, voxels: Uint8Array
) -> None:
    from darnet.inference.openvino_backend import ask_graph, convert_network

    depth, channel = attentions
    network = build_network(
        NETWORK.model_copy(update={"depth_attention": depth, "channel_attention": channel}), 0, head_std=1.0
    ).eval()
    (answer,) = ask_graph(convert_network(network), ScoreConfig(cache=tmp_path), voxels[:1])
    with torch.inference_mode():
        logits = network(torch.from_numpy(voxels[:1])[:, None].float() / 255).numpy()
    np.testing.assert_allclose(answer.logits, logits, rtol=1e-4, atol=1e-4)
    assert (answer.depth_gates is not None) == depth


def test_folding_leaves_the_network_as_it_was(trained: Bundle) -> None:
    network = load_networks(trained)[0]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_batch_of_a_gpu_has_the_right_shapes() -> None:
    """Without a GPU only shapes and types can be tried, on tensors without memory."""
    backend = TorchBackend([], batch_size=4, num_threads=1, device="meta")
    assert backend.forward_scans == 4
    x = scale_voxels(torch.zeros((4, 64, 224, 224), dtype=torch.uint8, device="meta"))
    answer = backend.ask(build_network(ModelConfig(), 0).to("meta").eval(), x)
    assert [tuple(tensor.shape) for tensor in answer] == [(4, 3), (4, 3, 8, 14, 14), (4, 8)]


def test_a_forward_pass_of_several_scans_takes_them_from_wherever_they_lie() -> None:
    """Read-only, apart from each other, and fewer than the pass has room for, which zeros fill."""
    backend = TorchBackend([], batch_size=2, num_threads=1)
    volumes = [np.full((2, 3, 4), value, np.uint8) for value in (7, 9)]
    for voxels in volumes:
        voxels.flags.writeable = False
    sent = backend._send(volumes).numpy()
    np.testing.assert_array_equal(sent, np.stack(volumes))
    np.testing.assert_array_equal(
        backend._send(volumes[1:]).numpy(), np.stack([volumes[1], np.zeros((2, 3, 4), np.uint8)])
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_gpu_gives_the_probabilities_of_a_cpu(
    precision: str, tolerance: float, trained: Bundle, voxels: Uint8Array
) -> None:
    """fp32 as every backend, bf16 as INT8 may move them."""
    config = ScoreConfig(batch_size=4, precision=precision)
    here = Ensemble.from_bundle(trained, ScoreConfig(batch_size=4)).score(voxels[:4])
    there = Ensemble.from_bundle(trained, config, "cuda").score(voxels[:4])
    np.testing.assert_allclose(_gather(there), _gather(here), atol=tolerance)


@pytest.mark.slow
def test_compiling_takes_the_whole_network_once_for_all_folds(
    trained: Bundle, voxels: Uint8Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making kernels takes a minute here; the networks as torch's compiler captured them are run in their place."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    whole = functools.partial(torch.compile, backend=keep, fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    compiled = _score(trained, ScoreConfig(batch_size=4, compile=True, folds=(0, 1)), voxels[:4])
    assert len(graphs) == 1, "one graph for all folds and forward passes, which are of one shape"
    plain = _score(trained, ScoreConfig(batch_size=4, folds=(0, 1)), voxels[:4])
    np.testing.assert_allclose(_gather(compiled), _gather(plain), atol=1e-6)


def test_openvino_is_not_compiled_twice() -> None:
    with pytest.raises(ValueError, match="compiles by itself"):
        ScoreConfig(backend="openvino", compile=True)


def test_what_leaves_bf16_is_float32(voxels: Uint8Array) -> None:
    backend = TorchBackend([], batch_size=4, num_threads=1, precision="bf16")
    answer = backend.ask(build_network(NETWORK, 0).eval(), scale_voxels(torch.from_numpy(voxels[:4])))
    assert [tuple(tensor.shape) for tensor in answer] == [(4, 3), (4, 3, 2, 2, 2), (4, 2)]
    assert {tensor.dtype for tensor in answer} == {torch.float32}


@pytest.mark.slow
def test_compiled_networks_are_kept_and_give_the_same_bits(trained: Bundle, voxels: Uint8Array, tmp_path: Path) -> None:
    config = ScoreConfig(backend="openvino", cache=tmp_path, folds=(0,))
    first = _score(trained, config, voxels[:2])
    (blob,) = (tmp_path / "compiled").glob("*.blob")
    whole, written = blob.read_bytes(), blob.stat().st_mtime_ns
    np.testing.assert_array_equal(_gather(_score(trained, config, voxels[:2])), _gather(first))
    assert blob.stat().st_mtime_ns == written
    for damaged in (whole[:-1], b""):
        blob.write_bytes(damaged)
        np.testing.assert_array_equal(_gather(_score(trained, config, voxels[:2])), _gather(first))
        kept = hashlib.sha256(blob.read_bytes()).hexdigest()  # made anew: OpenVINO's bytes differ from time to time
        assert blob.with_suffix(".sha256").read_text() == kept != hashlib.sha256(damaged).hexdigest()


@pytest.mark.slow
def test_another_selection_or_number_of_threads_is_compiled_anew(trained: Bundle, tmp_path: Path) -> None:
    base = ScoreConfig(backend="openvino", cache=tmp_path, folds=(1,))
    for count, change in enumerate(({}, {"num_threads": 2}, {"folds": (0,)}), start=1):
        Ensemble.from_bundle(trained, base.model_copy(update=change))
        assert len(list((tmp_path / "compiled").glob("*.blob"))) == count


def test_a_cache_that_cannot_be_written_stops_nothing(trained: Bundle, voxels: Uint8Array, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = ScoreConfig(backend="openvino", cache=tmp_path / "file", folds=(0,))
    assert len(_score(trained, config, voxels[:1])) == 1


def test_a_cache_that_others_may_write_is_refused(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes a network there writes its digest too."""
    cache = tmp_path / "compiled"
    openvino_backend.refuse_shared_cache(cache)  # none is there yet
    cache.mkdir()
    for mode in (0o700, 0o755):
        cache.chmod(mode)
        openvino_backend.refuse_shared_cache(cache)
    for mode in (0o775, 0o757, 0o1777):
        cache.chmod(mode)
        with pytest.raises(UsageError, match=r"compiled: others may write there.*; delete it,.*--score\.cache"):
            openvino_backend.refuse_shared_cache(cache)
    with pytest.raises(UsageError, match="others may write there"):
        Ensemble.from_bundle(trained, ScoreConfig(backend="openvino", cache=tmp_path))
    cache.chmod(0o700)
    os.chown(cache, os.geteuid() or 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # a stranger's, though nobody else may write
    with pytest.raises(UsageError, match="others may write there"):
        openvino_backend.refuse_shared_cache(cache)


def test_a_new_cache_is_its_users_own_whatever_the_mask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        openvino_backend._keep_compiled(
            tmp_path / "cache" / "compiled", "key", SimpleNamespace(export_model=lambda: io.BytesIO(b"x"))
        )
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "compiled" / "key.blob").read_bytes() == b"x"
    openvino_backend.refuse_shared_cache(tmp_path / "cache" / "compiled")


def test_without_openvino_it_is_said_what_to_install(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install '.\[cpu\]'"):
        Ensemble.from_bundle(trained, ScoreConfig(backend="openvino", cache=tmp_path))


@pytest.mark.slow
def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    """Openvino's own telemetry is not even imported, and leaves no file in the home."""
    code = (
        "import sys\nfrom darnet.inference.openvino_backend import load_nncf\nload_nncf()\n"
        "assert 'openvino' in sys.modules and 'nncf' in sys.modules\n"
        "assert not [name for name, module in sys.modules.items() if 'openvino_telemetry' in name and module]\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_a_selection_is_another_model_and_a_backend_is_not(trained: Bundle) -> None:
    def name(**changes: Any) -> str:
        return select_model(trained, ScoreConfig(**changes)).manifest.model_sha256

    whole = trained.manifest.model_sha256
    assert name() == name(backend="openvino") == name(folds=(2, 1, 0)) == name(num_threads=2) == whole
    others = [
        name(folds=(0,)),
        name(folds=(1,)),
        name(folds=(0, 1)),
        name(precision="bf16"),
        name(precision="bf16", backend="openvino"),
        name(precision="bf16", folds=(0,)),
    ]
    assert len({whole, *others}) == 1 + len(others)
    assert name(folds=(1, 0)) == name(folds=(0, 1))


def test_the_version_of_a_selection_says_what_it_is(trained: Bundle) -> None:
    selected = select_model(trained, ScoreConfig(folds=(2, 0), precision="bf16"))
    assert selected.manifest.model_version == f"{trained.manifest.model_version} folds 0,2 bf16"
    assert [record.file for record in selected.manifest.folds] == ["fold0.safetensors", "fold2.safetensors"]


def test_a_fold_that_is_not_there_is_refused(trained: Bundle) -> None:
    with pytest.raises(UsageError, match=r"folds 3, 7: not in the model bundle, whose folds are 0, 1, 2"):
        select_model(trained, ScoreConfig(folds=(7, 0, 3)))


def test_int8_needs_a_bundle_that_has_it(trained: Bundle, index: VolumesIndex) -> None:
    with pytest.raises(UsageError, match=r"fold 0 of the model bundle has no INT8 graph.*jobs\.quantize"):
        Ensemble.from_bundle(trained, ScoreConfig(backend="openvino", precision="int8"))
    assert read_bundle(open_store(str(index.folder.parent / "bundle"))).int8 == ()


def test_what_is_said_night_by_night_has_short_flags() -> None:
    places = ["--archive", "a", "--model", "m", "--results", "r"]
    said = ["--folds", "0,2", "--backend", "openvino", "--precision", "int8"]
    score = read_settings(ScoreSettings, [*places, *said], "x").score
    assert (score.folds, score.backend, score.precision) == ((0, 2), "openvino", "int8")
    assert read_settings(ScoreSettings, [*places, "--score.folds", "1"], "x").score.folds == (1,)
    for wrong, complaint in (
        (["--folds", "1,1"], "name each once"),
        (["--backend", "openvino", "--score.device", "gpu"], "device gpu needs backend torch"),
        (["--precision", "int8"], "needs backend openvino"),
    ):
        with pytest.raises(UsageError, match=complaint):
            read_settings(ScoreSettings, [*places, *wrong], "x")


def test_the_traced_graph_is_the_module(trained: Bundle, voxels: Uint8Array) -> None:
    """`ScoringGraph` is what OpenVINO converts: its three outputs are those of the network's parts."""
    network = load_networks(trained)[1]
    with torch.inference_mode():
        logits, class_maps, gates = ScoringGraph(network)(torch.from_numpy(voxels[:2]))
        expected = network(torch.from_numpy(voxels[:2])[:, None].float() / 255)
    assert tuple(class_maps.shape[2:]) == (2, 2, 2)
    assert tuple(gates.shape) == (2, VOLUME.shape[0] // 8)
    torch.testing.assert_close(logits, expected)
