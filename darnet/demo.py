"""A small archive of phantoms in every format, some spoiled; and what a person wants to see of its scores."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
from numpy.typing import NDArray
from scipy import ndimage

from darnet.archive import list_sources
from darnet.bundle import read_bundle
from darnet.config import ScoreConfig
from darnet.errors import UsageError
from darnet.ingest import Ingester
from darnet.metrics import compute_metrics
from darnet.phantom import make_phantom
from darnet.phantoms.archive import SHAPE, PhantomScan, WindowHU, build_phantom, store_phantom, write_scan
from darnet.phantoms.canvas import Phantom
from darnet.phantoms.decoys import make_abdomen, make_head
from darnet.phantoms.files import WINDOW_HU, write_dicom
from darnet.publishing.rows import PROBABILITIES, name_probability
from darnet.reading.road import Road
from darnet.report import CamPanel, draw_cam_figure
from darnet.scan import DIAGNOSES, Diagnosis, FloatArray, StandardVolume
from darnet.score import Ensemble, ScanScore
from darnet.storage import open_store
from darnet.volume import apply_window

NUM_TRAIN, NUM_TEST = 30, 8  # scans of each diagnosis
NEAR_MM = 20.0
LAYOUTS = tuple("dicom png nii.gz jpeg2000 jpg mha jpegls zip tif rle nrrd nii".split())
SPOILED_COPIES = ("missing-slice", "truncated", "few-slices", "two-patients")
MARKER = ".darnet-demo"


def empty_folder(out: Path) -> None:
    """Make the demo's folder, or empty the one that an earlier demo made, which its marker tells.

    The marker is there before all else and stays, so that a demo killed at any moment can be started again.
    Raises: UsageError for a file, and for a folder that holds something but no marker.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{out}: cannot be a folder, as a file is there; name another with --out") from error
    marker = out / MARKER
    if not marker.exists() and any(out.iterdir()):
        raise UsageError(
            f"{out}: has no mark that a demo made it, and a demo would delete what it holds; name a new or an empty "
            "folder with --out, or delete this one"
        )
    marker.write_text("Made by jobs.demo. The next demo deletes all else in this folder.\n")
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != marker:
            path.unlink()


def plan_scans() -> list[PhantomScan]:
    """The demo's cohort: every diagnosis in every layout, so that no layout tells the diagnosis."""
    scans = []
    for label, diagnosis in enumerate(DIAGNOSES):
        for index in range(NUM_TRAIN + NUM_TEST):
            cohort = "train" if index < NUM_TRAIN else "test"
            seed, layout = 1000 * (label + 1) + index, LAYOUTS[index % len(LAYOUTS)]
            scans.append(PhantomScan(diagnosis, seed, layout, cohort, _choose_severity(seed)))
    return scans


def plan_arrivals() -> list[PhantomScan]:
    """Three scans that arrive before the second night."""
    seeds = {diagnosis: 9000 + label for label, diagnosis in enumerate(DIAGNOSES)}
    return [PhantomScan(name, seed, "dicom", "none", _choose_severity(seed)) for name, seed in seeds.items()]


def _choose_severity(seed: int) -> float:
    """Plain disease, 0.8 to 1 by seed: a few minutes of training do not teach more than that."""
    return 0.8 + 0.02 * (seed * 7 % 10)


def write_spoiled(archive: Path) -> None:
    """Scans that must never get a score, and strays that are no scans."""
    folder = archive / "spoiled"
    phantom = make_phantom(Diagnosis.NORMAL, 8000, shape=(24, 96, 96))
    paths = {name: write_dicom(phantom, folder / name, patient_id=name) for name in SPOILED_COPIES}
    paths["missing-slice"][10].unlink()
    paths["truncated"][10].write_bytes(paths["truncated"][10].read_bytes()[:4000])
    for path in paths["few-slices"][6:]:
        path.unlink()
    stranger = pydicom.dcmread(paths["two-patients"][10])
    stranger.PatientID = "somebody-else"
    stranger.save_as(paths["two-patients"][10])
    write_dicom(make_head(8001), folder / "head", patient_id="head")
    write_dicom(make_abdomen(8002), folder / "abdomen", patient_id="abdomen")
    (folder / "web-page").mkdir()
    (folder / "web-page" / "1.dcm").write_text("<html>503 Service Unavailable</html>")
    (archive / "dicom" / "README.txt").write_text(
        "A stray file beside the scans. These are phantoms, no patient's data."
    )


def change_archive(archive: Path, replaced: PhantomScan, window_hu: WindowHU) -> None:
    """What happens to an archive between two nights: three scans arrive, one is replaced by another of its patient."""
    for scan in plan_arrivals():
        write_scan(scan, archive, window_hu)
    shutil.rmtree(archive / replaced.source_key)
    stranger = make_phantom(replaced.diagnosis, replaced.seed + 500, shape=SHAPE)
    store_phantom(stranger, replaced, archive, window_hu)


def measure_demo(predictions: pd.DataFrame, scans: Sequence[PhantomScan]) -> dict[str, Any]:
    """How the test cohort fared, and how far the CAM peaks of its NCP scans are from a planted lesion, in mm."""
    rows = predictions.set_index("source")
    test = [scan for scan in scans if scan.cohort == "test"]
    probability = rows.loc[[scan.source_key for scan in test], PROBABILITIES].to_numpy(np.float64)
    metrics = compute_metrics(probability, np.array([DIAGNOSES.index(scan.diagnosis) for scan in test]))
    called = [
        scan
        for scan in test
        if scan.diagnosis is Diagnosis.NCP and rows.loc[scan.source_key, "prediction"] == Diagnosis.NCP
    ]
    peaks = rows.loc[[scan.source_key for scan in called], ["cam_peak_slice", "cam_peak_y", "cam_peak_x"]]
    voxels = peaks.to_numpy(np.int64)
    distances_mm = np.array([measure_distance(*pair) for pair in zip(called, voxels, strict=True)])
    near = {
        "ncp_test_scans_called_ncp": len(called),
        "cam_peak_in_lesion": int((distances_mm == 0).sum()),
        "cam_peak_within_20_mm_of_lesion": int((distances_mm <= NEAR_MM).sum()),
        "any_lung_voxel_within_20_mm_of_lesion": round(float(np.mean([measure_chance(scan) for scan in called])), 4),
    }
    return {"test_scans": len(test), **{name: round(value, 4) for name, value in metrics.items()}, **near}


def measure_distance(scan: PhantomScan, voxel: NDArray[np.int64]) -> float:
    """Distance in mm from a voxel (slice, y, x) to the nearest voxel of the planted lesion; 0 inside it."""
    return float(_measure_distances(build_phantom(scan))[tuple(voxel)])


def measure_chance(scan: PhantomScan) -> float:
    """How often a voxel picked blindly from the lungs is near the planted lesion: what a CAM peak has to beat."""
    phantom = build_phantom(scan)
    return float((_measure_distances(phantom)[phantom.lung] <= NEAR_MM).mean())


def _measure_distances(phantom: Phantom) -> FloatArray:
    """Distance in mm of each voxel to the lesion; shape of the phantom."""
    distances_mm: FloatArray = ndimage.distance_transform_edt(~phantom.lesion, sampling=phantom.spacing_mm)
    return distances_mm


def draw_demo(predictions: pd.DataFrame, scans: Sequence[PhantomScan], archive: Path, bundle: Path, path: Path) -> None:
    """Write a picture: of each class the test scan that is surest, the slice of its CAM's peak beside the CAM."""
    rows = predictions.set_index("source")
    model, store, panels = read_bundle(open_store(str(bundle))), open_store(str(archive)), []
    settings, config = model.manifest.settings, ScoreConfig()
    ensemble = Ensemble.from_bundle(model, config)
    ingester = Ingester(store, Road(settings.volume, config.decode))
    for diagnosis in DIAGNOSES:
        probability, peak = rows[name_probability(diagnosis)].astype(float), rows["cam_peak_slice"]
        test = [scan for scan in scans if (scan.cohort, scan.diagnosis) == ("test", diagnosis)]
        scan = max(test, key=lambda scan: probability[scan.source_key])
        (source,) = list_sources(store.list_objects(scan.source_key))
        (ingested,) = ingester.ingest(source)
        assert ingested.volume is not None
        (score,) = ensemble.score([ingested.volume.voxels])
        panels.append(_make_panel(scan, ingested.volume, score, int(peak[scan.source_key])))
    ingester.close()
    draw_cam_figure(panels, "DARNet demo: synthetic chests, planted lesions outlined in blue", path)


def _make_panel(scan: PhantomScan, volume: StandardVolume, score: ScanScore, number: int) -> CamPanel:
    """A slice of a phantom in full resolution, under its map."""
    cam = score.draw_cam(score.prediction, volume.voxels.shape)
    phantom = build_phantom(scan)
    return CamPanel(
        title=f"{scan.diagnosis} phantom, slice {number + 1} of {len(phantom.voxels_hu)}",
        caption=f"map of {score.prediction}, probability {score.probability.max():.2f}",
        image=np.rint(255 * apply_window(phantom.voxels_hu[number], WINDOW_HU)).astype(np.uint8),
        cam=cam[number * len(cam) // volume.crop.num_slices] / max(float(cam.max()), np.finfo(np.float32).tiny),
        box=volume.crop,
        lesion=phantom.lesion[number],
        pixel_aspect=phantom.spacing_mm[1] / phantom.spacing_mm[2],
    )


def tabulate(predictions: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The questions an analyst asks first: how did the scans end, and which are most likely COVID-19?"""
    counts = predictions.groupby("status").size().rename("scans").reset_index().sort_values("scans", ascending=False)
    suspects = predictions[predictions["status"] == "OK"].sort_values("probability_ncp", ascending=False).head(8)
    columns = ["scan_id", "prediction", "probability_ncp", "fold_std_ncp", "cam_in_lung_fraction", "cam_left_fraction"]
    refused = predictions[predictions["status"] != "OK"][["scan_id", "status", "status_detail"]]
    return [
        ("Scans by status", counts),
        ("Scans without a score, and why", refused),
        ("Highest probability of COVID-19", suspects[columns].fillna("-")),
    ]
