"""The volumes folder: what is written is read back, and what is wrong with it is named."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from darnet.config import AugmentConfig, VolumeConfig
from darnet.dataset import Augmentation, VolumeDataset, load_batches
from darnet.errors import UsageError
from darnet.storage import open_store
from darnet.volumes_folder import digest_cohort, read_index, write_array, write_index
from tests.volumes_fixtures import DIVISION, SMALL_VOLUME, make_cohort, make_volumes, make_voxels


def test_an_array_is_named_by_its_scan_and_its_content(tmp_path: Path) -> None:
    voxels = make_voxels("NCP", 1)
    name, sha256 = write_array(open_store(str(tmp_path)), "a/ü#12", voxels)
    assert name == f"arrays/{hashlib.sha256('a/ü#12'.encode()).hexdigest()[:16]}-{sha256[:16]}.npy"
    assert sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert np.array_equal(np.load(tmp_path / name), voxels)
    assert [path.name for path in (tmp_path / "arrays").iterdir()] == [Path(name).name]


def test_an_index_is_read_back_as_written(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, 6, 2, num_test=3)
    cohort_sha256 = write_index(open_store(str(tmp_path)), frame.sample(frac=1, random_state=0), SMALL_VOLUME)
    index = read_index(tmp_path)
    pd.testing.assert_frame_equal(index.frame, frame)
    assert index.volume == SMALL_VOLUME
    assert index.cohort_sha256 == cohort_sha256
    assert index.labels.tolist() == [0, 1, 2] * 3
    assert index.division is None
    assert json.loads((tmp_path / "volumes.json").read_text())["preprocessing_version"].startswith("2-")


def test_the_division_is_declared_and_that_of_an_older_folder_is_unknown(tmp_path: Path) -> None:
    assert make_volumes(tmp_path, 6, 2).division == DIVISION
    declared = json.loads((tmp_path / "volumes.json").read_text())
    assert (declared["division"]["cohorts_by"], declared["division"]["cohorts"]["seed"]) == ("cohort", 5)
    del declared["division"]
    (tmp_path / "volumes.json").write_text(json.dumps(declared))
    assert read_index(tmp_path).division is None


def test_no_test_scan_is_trained_or_validated_on(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 12, 2, num_test=6)
    assert index.num_folds == 2
    for fold in range(2):
        training, validation = index.select_training(fold), index.select_validation(fold)
        assert sorted([*training, *validation]) == list(range(12))
        assert set(index.frame["fold"].iloc[validation]) == {fold}


def test_voxels_become_floats_between_0_and_1(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 6, 2)
    volume, label = VolumeDataset(index)[4]
    assert label == 1
    assert volume.shape == (1, 8, 32, 32)
    assert volume.dtype == torch.float32
    assert np.array_equal(volume[0].numpy(), np.float32(make_voxels("NCP", 4)) / np.float32(255))


def test_augmentation_depends_on_seed_fold_epoch_and_row_only(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 6, 2)

    def load(row: int, **changed: int) -> torch.Tensor:
        keys = {"seed": 1, "fold": 0, "epoch": 3} | changed
        return VolumeDataset(index, Augmentation(AugmentConfig(), **keys))[row][0]

    assert torch.equal(load(1), load(1))
    assert not torch.equal(load(1), VolumeDataset(index)[1][0])
    for other in (load(1, seed=2), load(1, fold=1), load(1, epoch=4)):
        assert not torch.equal(load(1), other)


def spoil(frame: pd.DataFrame, row: int, **values: object) -> pd.DataFrame:
    spoilt = frame.copy()
    for column, value in values.items():
        spoilt.loc[row, column] = value
    return spoilt


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"diagnosis": "Flu"}, "an unknown diagnosis: scan_id scan-004"),
        ({"cohort": "validation", "fold": None}, "an unknown cohort: scan_id scan-004"),
        ({"fold": None}, "a training scan without a fold: scan_id scan-004"),
        ({"cohort": "test"}, "a test scan with a fold: scan_id scan-004"),
        ({"fold": -1}, "a negative fold: scan_id scan-004"),
        ({"scan_id": "scan-000"}, "a scan in two rows: scan_id scan-000"),
        ({"patient_id": "patient-000"}, r"a patient in two folds: scan_id scan-000 \(patient_id patient-000"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, values: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        write_index(open_store(str(tmp_path)), spoil(make_cohort(tmp_path, 6, 2), 4, **values), SMALL_VOLUME)
    assert not (tmp_path / "volumes.json").exists()


def test_a_patient_may_have_test_scans_too_as_in_the_papers_split(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, 6, 2, num_test=3)
    write_index(open_store(str(tmp_path)), spoil(frame, 7, patient_id="patient-001"), SMALL_VOLUME)
    assert len(read_index(tmp_path).frame) == 9


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column patient_id"):
        write_index(open_store(str(tmp_path)), make_cohort(tmp_path, 6, 2).drop(columns="patient_id"), SMALL_VOLUME)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere/volumes.json: no such file"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["volumes.json", "cohort.parquet"])
def test_a_missing_table_is_named(tmp_path: Path, name: str) -> None:
    make_volumes(tmp_path, 6, 2)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: no such file"):
        read_index(tmp_path)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    name = make_volumes(tmp_path, 6, 2).frame["array"][3]
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=name):
        read_index(tmp_path)


def test_half_an_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / make_volumes(tmp_path, 6, 2).frame["array"][3]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=f"{path.name}: cannot be read"):
        read_index(tmp_path)


def test_an_array_of_another_shape_is_named(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 6, 2)
    np.save(tmp_path / index.frame["array"][3], np.zeros((8, 32, 31), np.uint8))
    with pytest.raises(UsageError, match=r"npy: uint8 of shape \(8, 32, 31\), expected uint8 of shape \(8, 32, 32\)"):
        read_index(index.folder)


def test_a_table_that_was_changed_afterwards_is_refused(tmp_path: Path) -> None:
    frame = make_volumes(tmp_path, 6, 2).frame
    spoil(frame, 0, diagnosis="Normal").to_parquet(tmp_path / "cohort.parquet", index=False)
    with pytest.raises(UsageError, match="is not the table"):
        read_index(tmp_path)


def test_volumes_of_another_preprocessing_are_refused(tmp_path: Path) -> None:
    make_volumes(tmp_path, 6, 2)
    declared = json.loads((tmp_path / "volumes.json").read_text())
    declared["preprocessing_version"] = "0-0123456789ab"
    (tmp_path / "volumes.json").write_text(json.dumps(declared))
    with pytest.raises(UsageError, match=f"0-0123456789ab.*{VolumeConfig(shape=(8, 32, 32)).preprocessing_version}"):
        read_index(tmp_path)


def test_a_declaration_that_is_no_json_is_named(tmp_path: Path) -> None:
    make_volumes(tmp_path, 6, 2)
    (tmp_path / "volumes.json").write_text("{")
    with pytest.raises(UsageError, match=r"volumes.json: not written by jobs.prepare"):
        read_index(tmp_path)


def test_the_cohort_digest_changes_with_what_matters_only(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, 6, 2, num_test=3)
    digest = digest_cohort(frame)
    assert digest_cohort(frame.sample(frac=1, random_state=1)) == digest
    assert digest_cohort(spoil(frame, 2, array="elsewhere.npy")) == digest
    for column, value in {"fold": 1, "diagnosis": "NCP", "patient_id": "p", "sha256": "0", "scan_id": "s"}.items():
        assert digest_cohort(spoil(frame, 2, **{column: value})) != digest


def test_batches_read_ahead_are_those_of_torchs_loader(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 12, 2)
    dataset = VolumeDataset(index, Augmentation(AugmentConfig(), 0, 0, 0))
    batches = [[3, 1, 7, 5], [0, 11, 2, 4], [9, 8], [6], [10]]
    expected = list(DataLoader(dataset, batch_sampler=batches))
    loaded = list(load_batches(dataset, batches))
    assert len(loaded) == len(expected)
    for (volumes, labels), (wanted, wanted_labels) in zip(loaded, expected, strict=True):
        assert torch.equal(volumes, wanted)
        assert torch.equal(labels, wanted_labels)
    assert list(load_batches(dataset, [])) == []


def test_batches_are_read_ahead_as_bytes_and_scaled_where_they_are_trained_on(tmp_path: Path) -> None:
    """Torch's device without memory stands in for a GPU: what gets there is bytes, and floats are made there."""
    dataset, sent = VolumeDataset(make_volumes(tmp_path, 6, 2)), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            found = function(*arguments, **(keywords or {}))
            if function is torch.ops.aten._to_copy.default and arguments[0].device != found.device:
                sent.append((tuple(found.shape), found.dtype))
            return found

    with Watch():
        ((volumes, labels),) = load_batches(dataset, [[0, 4]], torch.device("meta"))
    assert sent == [((2, *SMALL_VOLUME.shape), torch.uint8), ((2,), torch.int64)]
    assert (volumes.device.type, volumes.dtype, volumes.shape) == ("meta", torch.float32, (2, 1, *SMALL_VOLUME.shape))
    assert labels.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_same_batches(tmp_path: Path) -> None:
    dataset, batches = VolumeDataset(make_volumes(tmp_path, 12, 2)), [[3, 1, 7, 5], [0, 11, 2, 4], [9, 8]]
    sent = load_batches(dataset, batches, torch.device("cuda"))
    for (volumes, labels), (wanted, wanted_labels) in zip(sent, load_batches(dataset, batches), strict=True):
        assert torch.allclose(volumes.cpu(), wanted, rtol=1e-6, atol=0)
        assert torch.equal(labels.cpu(), wanted_labels)


def test_a_row_that_cannot_be_read_stops_its_batch_and_no_thread_stays(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, 6, 2)
    (tmp_path / index.frame["array"][4]).unlink()
    before = threading.active_count()
    with pytest.raises(FileNotFoundError):
        list(load_batches(VolumeDataset(index), [[0, 1], [2, 4], [3, 5]]))
    assert threading.active_count() == before
