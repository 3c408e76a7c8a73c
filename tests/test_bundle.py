"""Bundles: what is read back predicts to the bit what was trained, and anything else is refused by name."""

import copy
import functools
import hashlib
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file

from darnet import config
from darnet.bundle import Bundle, load_networks, read_bundle, read_model
from darnet.bundle_writing import TrainedFold, make_bundle, publish_bundles, refuse_existing
from darnet.config import ModelConfig, ScoreConfig, TrainConfig, VolumeConfig
from darnet.errors import StorageError, UsageError
from darnet.manifest import BundleSettings, digest_model, find_bundles, name_model, read_manifest
from darnet.model import DARNet, build_network
from darnet.scan import DIAGNOSES
from darnet.storage import Store, open_store
from tests.bundle_fixtures import write_bundle

SHAPE = (8, 16, 16)
NETWORK = ModelConfig(volume_shape=SHAPE, base_channels=2)
SETTINGS = BundleSettings(volume=VolumeConfig(shape=SHAPE), network=NETWORK, train=TrainConfig(epochs=3))
COHORT_SHA256 = hashlib.sha256(b"cohort").hexdigest()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def _trained_network(seed: int, network: ModelConfig = NETWORK) -> DARNet:
    """A network whose running statistics are no longer the initial ones."""
    trained = build_network(network, seed)
    trained(torch.rand((2, 1, *SHAPE), generator=torch.Generator().manual_seed(seed)))
    return trained.eval()


def _fold(number: int, **changes: Any) -> TrainedFold:
    fields = {"world_size": 2, "seed": number, "validation": {"accuracy_3class": 0.625, "auc_ncp": float("nan")}}
    return TrainedFold(**({"state": _trained_network(number).state_dict(), **fields} | changes))


def _write(out: Path | str, **changes: Any) -> Bundle:
    arguments: dict[str, Any] = {
        "settings": SETTINGS,
        "folds": [_fold(seed) for seed in range(3)],
        "cohort_sha256": COHORT_SHA256,
        "model_version": "2026-01-02",
        "code_version": "0.1.0",
        "trained_on": "Twelve phantoms of no patient.",
    }
    return write_bundle(str(out), **(arguments | changes))


def _read(path: Path) -> Bundle:
    return read_bundle(open_store(str(path)))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    change(manifest)
    (path / "bundle.json").write_text(json.dumps(manifest))


def test_loaded_networks_predict_to_the_bit_what_was_trained(tmp_path: Path) -> None:
    trained = [_trained_network(seed) for seed in range(3)]
    written = _write(tmp_path / "bundle", folds=[_fold(seed, state=n.state_dict()) for seed, n in enumerate(trained)])
    bundle = _read(tmp_path / "bundle")
    assert bundle == written
    x = torch.rand((2, 1, *SHAPE), generator=torch.Generator().manual_seed(9))
    loaded = load_networks(bundle)
    assert len(loaded) == 3
    for before, after in zip(trained, loaded, strict=True):
        assert not after.training
        assert torch.equal(before(x), after(x))
        assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def test_the_folder_holds_the_folds_a_manifest_and_a_card(tmp_path: Path) -> None:
    _write(tmp_path / "new" / "bundle", folds=[_fold(seed) for seed in range(5)])
    names = [f"fold{index}.safetensors" for index in range(5)]
    assert sorted(p.name for p in (tmp_path / "new" / "bundle").iterdir()) == ["MODEL_CARD.md", "bundle.json", *names]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bundle"]


def test_the_manifest_says_what_was_trained_and_how(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["model_name"] == "darnet-da-ca"
    assert manifest["classes"] == ["CP", "NCP", "Normal"]
    assert manifest["cohort_sha256"] == COHORT_SHA256
    assert manifest["settings"] == SETTINGS.model_dump(mode="json")
    for index, fold in enumerate(manifest["folds"]):
        data = (tmp_path / "bundle" / fold["file"]).read_bytes()
        assert fold == {
            "file": f"fold{index}.safetensors",
            "sha256": hashlib.sha256(data).hexdigest(),
            "world_size": 2,
            "seed": index,
            "validation": {"accuracy_3class": 0.625, "auc_ncp": None},
            "temperature": 1.0,
        }


def test_fold_files_are_plain_safetensors(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle" / "fold1.safetensors")
    state = _trained_network(1).state_dict()
    assert stored.keys() == state.keys()
    assert all((stored[name] == tensor.numpy()).all() for name, tensor in state.items())


def test_weights_in_another_memory_layout_are_stored_alike(tmp_path: Path) -> None:
    network = copy.deepcopy(_trained_network(0)).to(memory_format=torch.channels_last_3d)
    plain = _write(tmp_path / "plain", folds=[_fold(0)])
    assert _write(tmp_path / "last", folds=[_fold(0, state=network.state_dict())]) == plain


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(UsageError, match="bundle: exists already"):
        _write(tmp_path / "bundle")
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.symlink_to(tmp_path / "nowhere")  # exists for rename only, so the very last step fails
    with pytest.raises(StorageError, match="bundle: cannot write"):
        _write(out)
    assert list(tmp_path.iterdir()) == [out]


def test_weights_of_another_network_are_not_written(tmp_path: Path) -> None:
    plain = ModelConfig(volume_shape=SHAPE, base_channels=2, depth_attention=False)
    state = {f"module.{name}": tensor for name, tensor in _trained_network(0).state_dict().items()}
    for wrong in (_trained_network(0, plain).state_dict(), state):
        with pytest.raises(ValueError, match="not of the network"):
            _write(tmp_path / "bundle", folds=[_fold(0, state=wrong)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("volume", "network"),
    [
        (VolumeConfig(shape=(8, 16, 24)), NETWORK),
        (VolumeConfig(shape=SHAPE), NETWORK.model_copy(update={"num_classes": 2})),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(volume: VolumeConfig, network: ModelConfig) -> None:
    with pytest.raises(ValidationError, match=r"is not network.volume_shape|there are 3 diagnoses"):
        BundleSettings(volume=volume, network=network, train=TrainConfig())


@pytest.mark.parametrize("name", ["bundle.json", "fold0.safetensors", "fold2.safetensors"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "bundle")
    (tmp_path / "bundle" / name).unlink()
    with pytest.raises(UsageError, match=rf"{name}: missing.*copy the bundle again"):
        _read(tmp_path / "bundle")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere/bundle.json: missing"):
        _read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["bundle.json", "fold1.safetensors"])
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, kept: int) -> None:
    _write(tmp_path / "bundle")
    path = tmp_path / "bundle" / name
    path.write_bytes(path.read_bytes().rstrip()[:kept])
    with pytest.raises(UsageError, match=rf"{name}: .*copy the bundle again"):
        _read(tmp_path / "bundle")


def test_swapped_folds_are_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    first, second = tmp_path / "bundle" / "fold0.safetensors", tmp_path / "bundle" / "fold1.safetensors"
    first.rename(tmp_path / "third")
    second.rename(first)
    (tmp_path / "third").rename(second)
    with pytest.raises(UsageError, match=r"fold0.safetensors: damaged, or of another model"):
        _read(tmp_path / "bundle")


def test_one_flipped_bit_of_a_weight_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    path = tmp_path / "bundle" / "fold2.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"fold2.safetensors: damaged"):
        _read(tmp_path / "bundle")


class Forged:
    """Where it is unpacked, `note` runs there."""

    def __reduce__(self) -> tuple[object, ...]:
        return note, ("unpacked",)


NOTES: list[str] = []


def note(text: str) -> str:
    NOTES.append(text)
    return text


def _pickle_weights() -> bytes:
    """As torch saves them, a zip with a pickle inside."""
    sink = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("write", "is_read"),
    [
        (lambda: pickle.dumps(Forged()), False),
        (_pickle_weights, False),
        (lambda: struct.pack("<Q", 2) + b"{}surplus", True),
        (lambda: safetensors.torch.save({"weight": torch.zeros(3)}), True),  # of another network
    ],
)
def test_other_bytes_behind_right_digests_are_refused_by_name(
    tmp_path: Path, write: Callable[[], bytes], is_read: bool
) -> None:
    """Of whoever can write a bundle, and so its digests; what only loading finds out is refused there."""
    bundle = _write(tmp_path / "bundle")
    data = write()
    folds = list(bundle.manifest.folds)
    folds[1] = folds[1].model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    model_sha256 = digest_model(bundle.manifest.settings, bundle.manifest.classes, folds)
    manifest = bundle.manifest.model_copy(update={"folds": tuple(folds), "model_sha256": model_sha256})
    for name, content in (("fold1.safetensors", data), ("bundle.json", manifest.model_dump_json().encode())):
        (tmp_path / "bundle" / name).unlink()
        (tmp_path / "bundle" / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"fold1.safetensors: not weights of this network as safetensors .*again"):
        load_networks(_read(tmp_path / "bundle"))
    if is_read:
        assert _read(tmp_path / "bundle").weights[1] == data
    assert NOTES == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["settings"]["volume"].update(window_hu=[-1000.0, 150.0]),
        lambda m: m["settings"]["volume"].update(crop="body"),
        lambda m: m["settings"]["network"].update(channel_attention=False),
        lambda m: m["settings"]["train"].update(epochs=4),
        lambda m: m["settings"]["train"].pop("epochs"),
        lambda m: m.update(classes=["NCP", "CP", "Normal"]),
        lambda m: m.update(model_name="darnet-plain"),
        lambda m: m["folds"].reverse(),
        lambda m: m["folds"].pop(),
        lambda m: m["folds"].clear(),
        lambda m: m["folds"][0].update(sha256="0" * 64),
        lambda m: m["folds"][0].update(file="../fold0.safetensors"),
        lambda m: m["folds"][0].update(seed="0"),
        lambda m: m.update(model_sha256="0" * 64),
        lambda m: m.update(settings_sha256="0" * 64),
        lambda m: m.update(surprise=1),
        lambda m: m.pop("code_version"),
    ],
)
def test_an_edited_manifest_is_refused_by_name(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _write(tmp_path / "bundle")
    _edit(tmp_path / "bundle", change)
    with pytest.raises(UsageError, match=r"bundle.json: .*again"):
        _read(tmp_path / "bundle")


@pytest.mark.parametrize("settings", [ScoreConfig(), ScoreConfig(folds=(2, 0)), ScoreConfig(precision="bf16")])
def test_a_manifest_is_read_without_the_weights(settings: ScoreConfig, tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    store = open_store(str(tmp_path / "bundle"))
    manifest = read_model(store, settings).manifest
    for path in (tmp_path / "bundle").glob("*.safetensors"):
        path.unlink()
    assert read_manifest(store, settings) == manifest
    with pytest.raises(UsageError, match="folds 7: not in the model bundle"):
        read_manifest(store, ScoreConfig(folds=(7,)))
    _edit(tmp_path / "bundle", lambda told: told["folds"].reverse())
    with pytest.raises(UsageError, match=r"bundle.json: .*again"):
        read_manifest(store, settings)


def test_a_bundle_trained_on_other_preprocessing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "bundle")
    monkeypatch.setattr(config, "PREPROCESSING_REVISION", config.PREPROCESSING_REVISION + 1)
    with pytest.raises(UsageError, match=r"bundle.json: trained on volumes of preprocessing .*use code version 0.1.0"):
        _read(tmp_path / "bundle")


def _update(settings: BundleSettings, part: str, **changes: Any) -> BundleSettings:
    section = getattr(settings, part)
    return settings.model_copy(update={part: section.model_copy(update=changes)})


@pytest.mark.parametrize(
    "changes",
    [
        lambda: {"settings": _update(SETTINGS, "volume", window_hu=(-1350.0, 151.0))},
        lambda: {"settings": _update(SETTINGS, "volume", crop="body")},
        lambda: {"settings": _update(SETTINGS, "volume", depth_resampling="area")},
        lambda: {"settings": _update(SETTINGS, "volume", slice_order="feet_first")},
        lambda: {"folds": [_fold(0), _fold(1)]},
        lambda: {"folds": [_fold(0), _fold(2), _fold(1)]},
        lambda: {"folds": [_fold(0), _fold(1), _fold(3)]},
        lambda: {"folds": [_fold(0), _fold(1), _fold(2, temperature=1.5)]},
    ],
)
def test_model_sha256_changes_with_what_changes_a_prediction(
    tmp_path: Path, changes: Callable[[], dict[str, Any]]
) -> None:
    changed = _write(tmp_path / "changed", **changes()).manifest.model_sha256
    assert changed != _write(tmp_path / "plain").manifest.model_sha256


def test_two_bundles_of_one_day_have_versions_of_their_own(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", folds=[_fold(0)]).manifest
    other = _write(tmp_path / "other", folds=[_fold(1)]).manifest
    assert one.model_version == f"2026-01-02-{one.model_sha256[:8]}"
    assert other.model_version == f"2026-01-02-{other.model_sha256[:8]}" != one.model_version
    assert (tmp_path / "one" / "MODEL_CARD.md").read_text().startswith(f"# {one.model_name} {one.model_version}\n")


def test_model_sha256_changes_with_the_network_settings(tmp_path: Path) -> None:
    digests = set()
    for index, (da, ca) in enumerate([(False, False), (False, True), (True, False), (True, True)]):
        network = NETWORK.model_copy(update={"depth_attention": da, "channel_attention": ca})
        settings = SETTINGS.model_copy(update={"network": network})
        folds = [_fold(0, state=_trained_network(0, network).state_dict())]
        digests.add(_write(tmp_path / str(index), settings=settings, folds=folds).manifest.model_sha256)
    assert len(digests) == 4


def test_model_sha256_changes_with_the_preprocessing_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _write(tmp_path / "before").manifest.model_sha256
    monkeypatch.setattr(config, "PREPROCESSING_REVISION", config.PREPROCESSING_REVISION + 1)
    assert _write(tmp_path / "after").manifest.model_sha256 != before


@pytest.mark.parametrize(
    "changes",
    [
        lambda: {"settings": _update(SETTINGS, "train", epochs=4)},
        lambda: {"folds": [_fold(seed, world_size=1, validation={"accuracy_3class": 0.5}) for seed in range(3)]},
        lambda: {"folds": [_fold(0), _fold(1), _fold(2, seed=5)]},
        lambda: {"cohort_sha256": "0" * 64},
        lambda: {"model_version": "another"},
        lambda: {"code_version": "another"},
        lambda: {"trained_on": "Something else."},
        lambda: {"folds": [_fold(seed, history=HISTORY) for seed in range(3)]},
    ],
)
def test_model_sha256_ignores_what_leaves_predictions_alone(
    tmp_path: Path, changes: Callable[[], dict[str, Any]]
) -> None:
    changed = _write(tmp_path / "changed", **changes()).manifest.model_sha256
    assert changed == _write(tmp_path / "plain").manifest.model_sha256


HISTORY = [{"epoch": 0.0, "train_loss": 1.5}, {"epoch": 1.0, "train_loss": float("nan")}]


def test_a_bundle_keeps_the_history_of_every_fold_and_checks_it(tmp_path: Path) -> None:
    written = _write(tmp_path / "bundle", folds=[_fold(seed, history=HISTORY) for seed in range(2)])
    path = tmp_path / "bundle" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(fold, epoch, loss) for fold in (0, 1) for epoch, loss in ((0, 1.5), (1, None))]
    assert [(line["fold"], line["epoch"], line["train_loss"]) for line in lines] == expected
    assert _read(tmp_path / "bundle") == written
    path.write_text(path.read_text().replace("1.5", "0.5"))
    with pytest.raises(UsageError, match=r"metrics\.jsonl: damaged"):
        _read(tmp_path / "bundle")
    path.unlink()
    with pytest.raises(UsageError, match=r"metrics\.jsonl: missing"):
        _read(tmp_path / "bundle")


def test_model_sha256_ignores_the_model_card(tmp_path: Path) -> None:
    written = _write(tmp_path / "bundle")
    (tmp_path / "bundle" / "MODEL_CARD.md").write_text("translated\n")
    assert _read(tmp_path / "bundle") == written


def test_the_card_tells_this_run_and_no_figure_of_the_paper(tmp_path: Path) -> None:
    digest = _write(tmp_path / "bundle").manifest.model_sha256
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    expected = ["Research use only", "Twelve phantoms of no patient.", digest, "0.6250", "undefined", "8 x 16 x 16"]
    assert [text for text in expected if text not in card] == []
    assert [line for line in card.splitlines() if line.startswith(("0. ", "1. ", "2. "))] == [
        f"{index}. {name}" for index, name in enumerate(DIAGNOSES)
    ]
    assert [text for text in ("94.7", "0.947", "93.7", "0.99", "state of the art") if text in card] == []
    assert card.count("| fold") == 3
    assert not set("{}") & set(card)


@pytest.mark.parametrize(
    ("depth", "channel", "name"),
    [
        (True, True, "darnet-da-ca"),
        (True, False, "darnet-da"),
        (False, True, "darnet-ca"),
        (False, False, "darnet-plain"),
    ],
)
def test_the_name_tells_the_attention_modules(depth: bool, channel: bool, name: str) -> None:
    assert name_model(ModelConfig(depth_attention=depth, channel_attention=channel)) == name


def test_a_bundle_does_not_print_its_weights(tmp_path: Path) -> None:
    assert len(repr(_write(tmp_path / "bundle"))) < 10_000


def test_other_users_may_read_the_bundle(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_bundle_is_written_to_any_place_once(store: Store) -> None:
    written = _write(store.uri)
    assert read_bundle(store) == written
    assert [place.uri for place in find_bundles(store)] == [store.uri]
    with pytest.raises(UsageError, match="exists already"):
        _write(store.uri)
    assert read_bundle(store) == written


@pytest.mark.s3
def test_in_a_bucket_nothing_is_a_bundle_until_the_files_of_all_are_there(s3: Callable[[], str]) -> None:
    out = s3() + "/bundles"
    facts: dict[str, Any] = {
        "cohort_sha256": COHORT_SHA256,
        "model_version": "1",
        "code_version": "0",
        "trained_on": "",
    }
    bundle, files = make_bundle(settings=SETTINGS, folds=[_fold(0)], **facts)
    spoiled = dict(files) | {"MODEL_CARD.md": 7}
    with pytest.raises(TypeError):
        publish_bundles(out, {"darnet-plain": files, "darnet-da-ca": spoiled}.items())  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"no bundle\.json here"):
        find_bundles(open_store(out))
    refuse_existing(out)
    publish_bundles(out, {"darnet-plain": files, "darnet-da-ca": files}.items())
    assert [read_bundle(place) for place in find_bundles(open_store(out))] == [bundle, bundle]
    with pytest.raises(UsageError, match="bundles: exists already"):
        refuse_existing(out)
    _, others = make_bundle(settings=SETTINGS, folds=[_fold(1)], **facts)
    with pytest.raises(UsageError, match="bundles: exists already"):  # another training that began meanwhile
        publish_bundles(out, [("darnet-da-ca", others)])
    assert read_bundle(open_store(f"{out}/darnet-da-ca")) == bundle


@pytest.mark.s3
def test_a_publishing_that_was_killed_between_two_bundles_goes_on(s3: Callable[[], str]) -> None:
    out, names = s3() + "/bundles", ("darnet-plain", "darnet-da-ca")
    facts: dict[str, Any] = {"cohort_sha256": COHORT_SHA256, "code_version": "0", "trained_on": ""}
    bundle, files = make_bundle(settings=SETTINGS, folds=[_fold(0)], model_version="the day it was killed", **facts)
    publish_bundles(out, [(names[0], files)])
    refuse_existing(out, names)
    later, files = make_bundle(settings=SETTINGS, folds=[_fold(0)], model_version="a day later", **facts)
    publish_bundles(out, dict.fromkeys(names, files).items())
    assert [read_bundle(place) for place in find_bundles(open_store(out))] == [bundle, later]
    with pytest.raises(UsageError, match="exists already"):
        refuse_existing(out, names)
