"""The activation maps of a study: scores of several networks and the truth, where it is known, enter; a `Study` leaves.

The map is always that of the true class, right or wrong as the decision may be: so every network has one of each scan.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from darnet.cam import upsample_cam
from darnet.evaluation.cam_truth import (
    MEASURES,
    MapStudy,
    MeasuredMaps,
    correlate_maps,
    estimate_mean,
    map_class,
    measure_map,
    redraw_last_stage,
    study_maps,
    tabulate_measures,
)
from darnet.evaluation.intervals import resample_scans
from darnet.evaluation.paper import DEPTH_PAIRS
from darnet.evaluation.study import Study
from darnet.evaluation.truth import Truth
from darnet.model import DARNet
from darnet.report import CamPanel
from darnet.scan import DIAGNOSES, CropBox, Diagnosis, FloatArray, Uint8Array
from darnet.score import ScanScore
from darnet.volumes_folder import VolumesIndex

NUM_CASES = 3  # Source: paper Fig. 2: mild, moderate, severe
NUM_REDRAWN = 12  # scans of the sanity check: it asks whether maps change at all, and costs a forward pass a fold
REDRAW_SEED = 1_000_000  # far from the seeds that networks are trained from
MAP_PAIRS = (*DEPTH_PAIRS, ("DA+CA", "ResNet18"))  # what both attentions add. Source: paper sec. 4.4 and 4.5


@dataclass(frozen=True, eq=False, slots=True)
class CohortScores:
    """The test cohort of a study: its rows of the index, and what every network says of each.

    `scores` is network -> one score a row; `members` is network -> fold and seed of each of its models, in the order
    of the scores; `networks` makes these models one after another; `truths` is by scan_id;
    `sided` are the scans whose left and right are known, which those of display images are not.
    """

    index: VolumesIndex
    scores: Mapping[str, Sequence[ScanScore]]
    members: Mapping[str, Sequence[tuple[int, int]]]
    networks: Callable[[str], Iterator[DARNet]]
    truths: Mapping[str, Truth]
    sided: frozenset[str] = frozenset()

    @property
    def scan_ids(self) -> list[str]:
        """In the order of the scores."""
        frame = self.index.frame
        ids: list[str] = frame.loc[frame["cohort"] == "test", "scan_id"].tolist()
        return ids

    def read_voxels(self, scan_id: str) -> Uint8Array:
        """Shape: (D, H, W)."""
        frame = self.index.frame
        (name,) = frame.loc[frame["scan_id"] == scan_id, "array"]
        voxels: Uint8Array = np.load(self.index.folder / name)
        return voxels

    def read_map(self, network: str, scan_id: str, label: int) -> FloatArray:
        """The class map as it was scored; shape: (d, h, w)."""
        class_map: FloatArray = self.scores[network][self.scan_ids.index(scan_id)].class_maps[label]
        return class_map

    def draw_cam(self, network: str, scan_id: str, diagnosis: Diagnosis) -> FloatArray:
        """Shape: (D, H, W)."""
        score = self.scores[network][self.scan_ids.index(scan_id)]
        return score.draw_cam(diagnosis, self.index.volume.shape)

    def draw_model_cams(self, network: str, scan_id: str, diagnosis: Diagnosis) -> Iterator[FloatArray]:
        """Each model's by itself, by fold and then by seed; (D, H, W) each."""
        score, members = self.scores[network][self.scan_ids.index(scan_id)], self.members[network]
        for place in sorted(range(len(members)), key=lambda place: members[place]):
            class_map = score.fold_class_maps[place, DIAGNOSES.index(diagnosis)]
            yield upsample_cam(torch.from_numpy(class_map), self.index.volume.shape)

    def list_scans(self, diagnosis: Diagnosis) -> list[str]:
        """Those of a diagnosis."""
        frame = self.index.frame
        is_wanted = (frame["cohort"] == "test") & (frame["diagnosis"] == str(diagnosis))
        ids: list[str] = frame.loc[is_wanted, "scan_id"].tolist()
        return ids

    def list_patients(self, scan_ids: Sequence[str]) -> list[str]:
        """Whose each scan is."""
        patients: list[str] = self.index.frame.set_index("scan_id")["patient_id"].loc[list(scan_ids)].tolist()
        return patients


def add_maps(study: Study, scans: CohortScores, *, seed: int, num_replicates: int) -> Study:
    """The study with the cases that are shown, and the maps measured where lesions are known."""
    known = {
        diagnosis: [scan_id for scan_id in scans.list_scans(diagnosis) if _has_lesion(scans.truths.get(scan_id))]
        for diagnosis in (Diagnosis.NCP, Diagnosis.CP)
    }
    num_studies = sum(bool(scan_ids) for scan_ids in known.values())
    studies = [
        _measure(scans, diagnosis, scan_ids, seed, num_replicates, num_studies)
        for diagnosis, scan_ids in known.items()
        if scan_ids
    ]
    cases, is_severity_known = draw_cases(scans, study.full)
    return replace(study, maps=studies, cases=cases, is_severity_known=is_severity_known)


def draw_cases(scans: CohortScores, full: str) -> tuple[list[list[CamPanel]], bool]:
    """The NCP cases of least, middle and most severity, under the map of each network; and whether that was known.

    Severity is the lesions' share of the lungs, where the truth is known of every case. Else cases are chosen by the
    NCP probability of the full network: not by how ill a patient is, only by how sure the network.
    """
    cases = scans.list_scans(Diagnosis.NCP)
    is_known = all(scan_id in scans.truths for scan_id in cases)
    ncp, ids = DIAGNOSES.index(Diagnosis.NCP), scans.scan_ids
    values = [
        scans.truths[case].lesion_share if is_known else float(scans.scores[full][ids.index(case)].probability[ncp])
        for case in cases
    ]
    what = "lesions {:.0%} of the lungs" if is_known else "NCP probability {:.2f}"
    drawn = [_draw_case(scans, cases[place], what.format(values[place])) for place in choose_cases(values)]
    return drawn, is_known


def choose_cases(values: Sequence[float]) -> list[int]:
    """Places of the least, the middle and the highest; fewer where there are fewer."""
    order = np.argsort(values, kind="stable").tolist()
    chosen = np.linspace(0, len(order) - 1, min(NUM_CASES, len(order))).round().astype(int)
    return [int(order[place]) for place in chosen]


def _measure(
    scans: CohortScores, diagnosis: Diagnosis, known: Sequence[str], seed: int, num_replicates: int, num_studies: int
) -> MapStudy:
    maps = {name: measure_network(scans, name, diagnosis, known) for name in scans.scores}
    rng = np.random.default_rng(seed)
    patients = scans.list_patients(known)
    resampling = resample_scans(len(known), patients, rng, num_replicates)
    redrawn = {}
    if diagnosis is Diagnosis.NCP:
        some = [known[place] for place in sorted(rng.permutation(len(known))[:NUM_REDRAWN])]
        label = DIAGNOSES.index(diagnosis)
        fewer = resample_scans(len(some), scans.list_patients(some), rng, num_replicates)
        for name in scans.scores:
            maps_of_redrawn = _map_redrawn(scans, name, some, label)
            values = [
                correlate_maps(scans.read_map(name, item, label), redrawn_map)
                for item, redrawn_map in zip(some, maps_of_redrawn, strict=True)
            ]
            redrawn[name] = estimate_mean(np.array(values), fewer)
    pairs = [pair for pair in MAP_PAIRS if set(pair) <= set(scans.scores)]
    truths = [scans.truths[scan_id] for scan_id in known]
    return study_maps(str(diagnosis), maps, truths, pairs, redrawn, resampling, num_studies=num_studies)


def _map_redrawn(scans: CohortScores, name: str, scan_ids: Sequence[str], label: int) -> FloatArray:
    """The class map of each scan by a network whose last stage was drawn anew, mean over its models.

    Shape: (scans, d, h, w).
    """
    volumes = [scans.read_voxels(scan_id) for scan_id in scan_ids]

    def map_model(seed: int, network: DARNet) -> FloatArray:
        changed = redraw_last_stage(network, seed)
        return np.stack([map_class(changed, voxels, label) for voxels in volumes])

    # By `map`, which unlike a loop's variable does not hold a model while the next is made.
    by_model = list(map(map_model, itertools.count(REDRAW_SEED), scans.networks(name)))
    mean: FloatArray = torch.from_numpy(np.stack(by_model)).mean(dim=0).numpy()
    return mean


def measure_network(scans: CohortScores, name: str, diagnosis: Diagnosis, known: Sequence[str]) -> MeasuredMaps:
    """One network's maps of scans whose truth is known: its ensemble's, and each fold's and seed's by itself."""
    ensemble = tabulate_measures(
        [measure_map(scans.draw_cam(name, scan_id, diagnosis), scans.truths[scan_id]) for scan_id in known]
    )
    models = [
        [measure_map(cam, scans.truths[scan_id]) for cam in scans.draw_model_cams(name, scan_id, diagnosis)]
        for scan_id in known
    ]
    num_folds = len({fold for fold, _ in scans.members[name]})
    by_measure = {}
    for measure in MEASURES:
        values = np.array([[row[measure] for row in rows] for rows in models])  # (scans, models): fold by fold
        by_measure[measure] = values.reshape(len(known), num_folds, -1).transpose(2, 1, 0)  # (seeds, folds, scans)
    return MeasuredMaps(ensemble, by_measure)


def _draw_case(scans: CohortScores, scan_id: str, severity: str) -> list[CamPanel]:
    """One case's most telling slice: that with most lesion, or where the networks' maps are strongest."""
    cams = {name: _normalise(scans.draw_cam(name, scan_id, Diagnosis.NCP)) for name in scans.scores}
    truth, voxels = scans.truths.get(scan_id), scans.read_voxels(scan_id)
    known = _has_lesion(truth)
    weight = truth.lesion if truth is not None and known else np.mean(list(cams.values()), axis=0)
    telling = int(weight.sum(axis=(1, 2)).argmax())
    ncp, place = DIAGNOSES.index(Diagnosis.NCP), scans.scan_ids.index(scan_id)
    return [
        CamPanel(
            title=f"{severity}\nslice {telling + 1} of {len(voxels)}",
            caption=f"{name}\nNCP probability {scans.scores[name][place].probability[ncp]:.2f}",
            image=voxels[telling],
            cam=cam[telling],
            box=CropBox(len(voxels), 0, 0, *voxels.shape[1:]),
            lesion=None if truth is None else truth.lesion[telling],
            is_side_known=scan_id in scans.sided,
            pixel_aspect=1.0 if truth is None else truth.spacing_mm[1] / truth.spacing_mm[2],
        )
        for name, cam in cams.items()
    ]


def _normalise(cam: FloatArray) -> FloatArray:
    """To a share of its maximum; a map that is nowhere positive stays 0."""
    return cam / max(float(cam.max()), float(np.finfo(np.float32).tiny))


def _has_lesion(truth: Truth | None) -> bool:
    return truth is not None and bool(truth.lesion.any())
