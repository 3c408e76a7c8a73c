"""Truth on disk and of phantoms: it comes back as it was, lies where the scan's lesion is, and refuses other grids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.evaluation.truth import Truth, name_truth, read_truths, write_truth
from darnet.ingest import Ingester
from darnet.phantoms.archive import build_phantom
from darnet.phantoms.study import LAYOUTS, SEVERITIES, plan_study, trace_truth, write_study_scan
from darnet.reading.road import Road
from darnet.scan import Diagnosis
from darnet.storage import open_store

SHAPE = (8, 12, 16)
VOLUME = VolumeConfig(shape=(24, 96, 128), crop="body", window_hu=(-1000.0, -200.0))


def make_truth(scan_id: str = "files/P1#0a") -> Truth:
    rng = np.random.default_rng(1)
    lung = rng.random(SHAPE) < 0.5
    return Truth(scan_id, lung & (rng.random(SHAPE) < 0.25), lung, (5.0, 2.5, 2.0))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), create=True)
    truth = make_truth()
    write_truth(store, truth)
    found = read_truths(store, ["unknown", truth.scan_id], SHAPE)
    assert list(found) == [truth.scan_id]
    np.testing.assert_array_equal(found[truth.scan_id].lesion, truth.lesion)
    np.testing.assert_array_equal(found[truth.scan_id].lung, truth.lung)
    assert found[truth.scan_id].spacing_mm == truth.spacing_mm
    assert truth.lesion_share == np.count_nonzero(truth.lesion) / np.count_nonzero(truth.lung)


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _swap(path: Path) -> None:
    write_truth(open_store(str(path.parent)), make_truth("another"))
    path.with_name(name_truth("another")).rename(path)


@pytest.mark.parametrize(
    ("change", "shape", "complaint"),
    [
        (_damage, SHAPE, "not a truth file"),
        (_swap, SHAPE, "the truth of 'another', not of"),
        (lambda _: None, (8, 12, 12), "with the volume settings of jobs.prepare"),
        (lambda path: path.unlink(), SHAPE, "no truth of any test scan"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    change: Callable[[Path], None], shape: tuple[int, int, int], complaint: str, tmp_path: Path
) -> None:
    truth = make_truth()
    write_truth(open_store(str(tmp_path), create=True), truth)
    change(tmp_path / name_truth(truth.scan_id))
    with pytest.raises(UsageError, match=complaint):
        read_truths(open_store(str(tmp_path)), [truth.scan_id], shape)


def test_the_truth_of_a_phantom_lies_where_its_ingested_scan_is_opaque(tmp_path: Path) -> None:
    """In the lungs, a lesion is brighter than the rest by far; moved along any axis it is less so."""
    scan = next(item for item in plan_study(1, 3) if item.diagnosis is Diagnosis.NCP and item.cohort == "test")
    write_study_scan(scan, tmp_path / "archive", tmp_path / "truth", VOLUME)
    store = open_store(str(tmp_path / "archive"))
    (source,) = list_sources(store.list_objects())
    ingester = Ingester(store, Road(VOLUME, DecodeConfig()))
    (ingested,) = ingester.ingest(source)
    ingester.close()
    assert ingested.volume is not None
    assert ingested.lung is not None
    (truth,) = read_truths(open_store(str(tmp_path / "truth")), [scan.source_key], VOLUME.shape).values()
    assert not (truth.lesion & ~truth.lung).any()
    assert (truth.lung & ingested.lung).sum() > 0.8 * max(truth.lung.sum(), ingested.lung.sum())
    voxels = ingested.volume.voxels.astype(float)
    contrast = voxels[truth.lesion].mean() - voxels[truth.lung & ~truth.lesion].mean()
    assert contrast > 80  # of 255
    for axis in range(3):
        shifted = np.roll(truth.lesion, 8, axis) & truth.lung
        assert voxels[shifted].mean() - voxels[truth.lung & ~shifted].mean() < contrast - 10
    assert truth.spacing_mm == pytest.approx(ingested.volume.spacing_mm, rel=1e-4)


def test_only_test_scans_have_a_truth_on_disk(tmp_path: Path) -> None:
    scan = plan_study(1, 1)[0]
    write_study_scan(scan, tmp_path / "archive", tmp_path / "truth", VOLUME)
    assert scan.cohort == "train"
    assert not (tmp_path / "truth").exists()


def test_neither_layout_nor_severity_tells_the_diagnosis() -> None:
    scans = plan_study(18, 9)
    assert len({scan.patient_id for scan in scans}) == len({scan.source_key for scan in scans}) == 81
    for cohort, size in (("train", 18), ("test", 9)):
        described = {
            diagnosis: sorted((s.layout, s.severity) for s in scans if s.cohort == cohort and s.diagnosis is diagnosis)
            for diagnosis in Diagnosis
        }
        assert described[Diagnosis.CP] == described[Diagnosis.NCP] == described[Diagnosis.NORMAL]
        assert len(described[Diagnosis.CP]) == size
        assert {layout for layout, _ in described[Diagnosis.CP]} == set(LAYOUTS)
        assert {severity for _, severity in described[Diagnosis.CP]} == set(SEVERITIES)


def test_a_severer_phantom_has_more_lesion() -> None:
    scans = [scan for scan in plan_study(3, 0) if scan.diagnosis is Diagnosis.NCP]
    shares = []
    for severity in SEVERITIES:
        scan = type(scans[0])(Diagnosis.NCP, scans[0].seed, "mha", "test", severity)
        shares.append(trace_truth(build_phantom(scan), "x", VOLUME).lesion_share)
    assert 0.01 < shares[0] < shares[1] < shares[2] < 0.9
