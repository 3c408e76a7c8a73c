"""What the model card says of its data: counted by hand, and never a patient's name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, roc_auc_score

from darnet.config import ModelConfig
from darnet.dataset import VolumeDataset
from darnet.evaluation.model_card import NO_TEST, describe_cohort, describe_leak, describe_test, evaluate_test
from darnet.inference.torch_backend import TorchBackend
from darnet.model import build_network
from darnet.score import Ensemble
from darnet.storage import open_store
from darnet.volumes_folder import read_index, write_index
from tests.volumes_fixtures import SMALL_VOLUME, make_cohort, make_volumes


def test_scans_are_counted_by_fold_cohort_and_diagnosis(tmp_path: Path) -> None:
    """Scan by scan CP, NCP, Normal and three by three into folds: 21 are 4 and 3 of each, 4 in test are 2, 1, 1."""
    told = describe_cohort(make_volumes(tmp_path, num_train=21, num_folds=2, num_test=4))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if "|" in line]
    assert rows[0] == ["", "CP", "NCP", "Normal", "scans", "patients"]
    assert rows[2:] == [
        ["fold 0", "4", "4", "4", "12", "12"],
        ["fold 1", "3", "3", "3", "9", "9"],
        ["train", "7", "7", "7", "21", "21"],
        ["test", "2", "1", "1", "4", "4"],
    ]
    assert "no patient is in two folds" in told
    assert "Not among them: 2 BAD_TRUNCATED, 1 NOT_IN_ARCHIVE (excluded.csv beside the volumes names each)." in told
    assert "Division patient: cohorts of the table's column cohort; 2 folds dealt by patient (seed 5)" in told
    assert "No patient of the test cohort has a scan in the training cohort." in told
    assert not re.search(r"patient-\d|scan-\d", told)


def test_patients_in_both_cohorts_are_told_as_what_flatters_the_model(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, 6, 2, num_test=3)
    frame.loc[[6, 7], "patient_id"] = "patient-001"
    write_index(open_store(str(tmp_path)), frame, SMALL_VOLUME)
    told = describe_leak(read_index(tmp_path))
    assert told.startswith("**1 of 2 test patients (2 of 3 test scans) also have scans in the training cohort")
    assert describe_leak(make_volumes(tmp_path / "none", 6, 2)) == NO_TEST


def test_a_test_scan_with_the_voxels_of_a_training_scan_is_told_though_its_patient_is_another(tmp_path: Path) -> None:
    frame = make_cohort(tmp_path, 6, 2, num_test=3)
    frame.loc[7, ["array", "sha256"]] = frame.loc[1, ["array", "sha256"]]
    write_index(open_store(str(tmp_path)), frame, SMALL_VOLUME)
    told = describe_leak(read_index(tmp_path))
    assert told.startswith(
        "**No patient of the test cohort has a scan in the training cohort; the standard volumes of 1 "
    )
    assert (
        "of 1 of 3 test scans are also those of training scans: figures on the test cohort flatter the model." in told
    )


def test_the_test_cohorts_figures_are_those_of_scikit_learn(tmp_path: Path) -> None:
    index = make_volumes(tmp_path, num_train=6, num_folds=2, num_test=12)
    networks = [
        build_network(ModelConfig(base_channels=4, volume_shape=SMALL_VOLUME.shape), seed, 1.0) for seed in (1, 2)
    ]
    backend = TorchBackend(networks, batch_size=4, num_threads=1)
    evaluation = evaluate_test(Ensemble(backend, batch_size=4, temperatures=(1.0, 1.0)), index, 4, seed=0)
    dataset, rows = VolumeDataset(index), range(6, 18)
    volumes = torch.stack([dataset[row][0] for row in rows])
    with torch.no_grad():
        folds = [softmax(network.eval()(volumes).double().numpy(), axis=1) for network in networks]
    probability, labels = np.mean(folds, axis=0), index.labels[6:]
    assert evaluation.metrics["accuracy_3class"] == pytest.approx(accuracy_score(labels, probability.argmax(axis=1)))
    assert evaluation.metrics["auc_ncp"] == pytest.approx(roc_auc_score(labels == 1, probability[:, 1]))
    told = describe_test(evaluation)
    assert f"| auc_ncp | {evaluation.metrics['auc_ncp']:.4f} |" in told
    assert "12 scans of 12 patients" in told
    assert "95% interval by patient" in told
    assert "Research use only" in told
    assert "Few patients (4 CP, 4 NCP, 4 Normal)" in told
