"""Standard volumes and a bundle's networks in; probabilities, class maps and results rows out.

The forward pass always has the same batch shape and number of threads, so that a scan's numbers depend on nothing else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from darnet.bundle import Bundle, BundleManifest, load_networks
from darnet.cam import CamStatistics, class_activation_maps, measure_cam, upsample_cam
from darnet.config import ScoreConfig
from darnet.model import DARNet
from darnet.scan import DIAGNOSES, Diagnosis, FloatArray, IngestedScan, StandardVolume, Uint8Array

CPU_FORWARD_SCANS = 2


@dataclass(frozen=True)
class ScanScore:
    """What the ensemble says of one scan.

    Shape: `fold_probability` (folds, classes); `fold_class_maps` (folds, classes, d, h, w); `depth_gates` (d,), mean
           over channels and folds, None without depth attention.
    """

    fold_probability: FloatArray
    fold_class_maps: FloatArray
    depth_gates: FloatArray | None
    model_s: float

    @property
    def probability(self) -> FloatArray:
        """Mean over the folds; shape (classes,)."""
        mean: FloatArray = self.fold_probability.mean(axis=0)
        return mean

    @property
    def class_maps(self) -> FloatArray:
        """Mean over the folds; shape (classes, d, h, w)."""
        mean: FloatArray = self.fold_class_maps.mean(axis=0)
        return mean

    @property
    def prediction(self) -> Diagnosis:
        """The class of the highest mean probability, the first of equals."""
        return DIAGNOSES[int(self.probability.argmax())]

    def draw_cam(self, diagnosis: Diagnosis, shape: tuple[int, int, int]) -> FloatArray:
        """The class's map on the network input, (D, H, W), nowhere negative."""
        return upsample_cam(torch.from_numpy(self.class_maps[DIAGNOSES.index(diagnosis)]), shape)


@dataclass(frozen=True)
class RunFacts:
    """What all rows of a run have in common."""

    run_id: str
    night: date
    model: BundleManifest
    code_version: str


class Ensemble:
    """The folds' networks on one device, behind a forward pass of fixed shape.

    A GPU takes a batch at a time, a CPU two scans: it gains nothing from more, and of one scan on one thread torch
    takes a convolution eight times slower. The number of threads of this process is set, since it is part of the
    numbers.
    """

    def __init__(
        self,
        networks: Sequence[DARNet],
        *,
        batch_size: int,
        num_threads: int,
        device: str = "cpu",
        temperatures: Sequence[float] | None = None,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._networks = [network.to(device).eval() for network in networks]
        self._temperatures = [1.0] * len(networks) if temperatures is None else temperatures
        self._batch_size = batch_size
        self._forward_size = CPU_FORWARD_SCANS if device == "cpu" else batch_size
        self._device = device

    @classmethod
    def from_bundle(cls, bundle: Bundle, config: ScoreConfig, device: str = "cpu") -> Self:
        """The networks of a bundle, each at its temperature."""
        return cls(
            load_networks(bundle),
            batch_size=config.batch_size,
            num_threads=config.num_threads,
            device=device,
            temperatures=[fold.temperature for fold in bundle.manifest.folds],
        )

    def score(self, voxels: Uint8Array) -> list[ScanScore]:
        """Score up to a batch of standard volumes.

        Shape:  (n, D, H, W) uint8, n <= batch_size.
        Raises: ValueError for more than a batch.
        """
        num_scans = len(voxels)
        if num_scans > self._batch_size:
            raise ValueError(f"{num_scans} volumes in a batch of {self._batch_size}")
        starts = range(0, num_scans, self._forward_size)
        return [score for start in starts for score in self._score_at_once(voxels[start : start + self._forward_size])]

    def _score_at_once(self, voxels: Uint8Array) -> list[ScanScore]:
        """One forward pass a fold, padded with zeros where there are too few scans."""
        num_scans = len(voxels)
        start_s = time.perf_counter()
        batch = torch.zeros((self._forward_size, 1, *voxels.shape[1:]), dtype=torch.float32, device=self._device)
        batch[:num_scans, 0] = torch.from_numpy(voxels).to(self._device, torch.float32) / 255
        with torch.inference_mode():
            folds = zip(self._networks, self._temperatures, strict=True)
            results = [_score_fold(network, temperature, batch) for network, temperature in folds]
        probability = np.stack([fold[0] for fold in results], axis=1)  # (B, folds, classes)
        class_maps = np.stack([fold[1] for fold in results], axis=1)  # (B, folds, classes, d, h, w)
        gates = [fold[2] for fold in results if fold[2] is not None]
        depth_gates = np.mean(gates, axis=0) if gates else None  # (B, d)
        model_s = (time.perf_counter() - start_s) / num_scans
        return [
            ScanScore(
                probability[index], class_maps[index], None if depth_gates is None else depth_gates[index], model_s
            )
            for index in range(num_scans)
        ]


def measure_score(scan: IngestedScan, score: ScanScore) -> CamStatistics:
    """The CAM columns of a scan, for the class it is predicted to have."""
    volume = _volume_of(scan)
    return measure_cam(
        score.draw_cam(score.prediction, volume.voxels.shape),
        score.prediction,
        crop=volume.crop,
        intensity=volume.intensity,
        lung=scan.lung,
        depth_gate_profile=None if score.depth_gates is None else score.depth_gates.tolist(),
    )


def make_row(
    run: RunFacts, source: str, input_sha256: str, scan: IngestedScan, score: ScanScore | None, scored_at: datetime
) -> dict[str, Any]:
    """One row of the results table; `commit` is filled when it is published."""
    facts, model = scan.facts, run.model
    return {
        "run_id": run.run_id,
        "commit": 0,
        "night": run.night,
        "scored_at": scored_at,
        "source": source,
        "scan_id": scan.scan_id,
        "patient_key": facts.patient_key,
        "series_key": facts.series_key,
        "input_sha256": input_sha256,
        "num_files": facts.num_files,
        "num_bytes": facts.num_bytes,
        "status": str(scan.status),
        "status_detail": scan.status_detail,
        "model_name": model.model_name,
        "model_version": model.model_version,
        "model_sha256": model.model_sha256,
        "preprocessing_version": model.preprocessing_version,
        "code_version": run.code_version,
        "intensity": None if facts.intensity is None else str(facts.intensity),
        "num_slices": facts.num_slices,
        "slice_spacing_mm": facts.slice_spacing_mm,
        "pixel_spacing_mm": facts.pixel_spacing_mm,
        "manufacturer": None if facts.manufacturer is None else str(facts.manufacturer),
        **_score_columns(scan, score),
        "lung_fraction": None if scan.lung is None else float(scan.lung.mean()),
        "fetch_s": scan.fetch_s,
        "decode_s": scan.decode_s,
        "model_s": None if score is None else score.model_s,
    }


def _score_fold(network: DARNet, temperature: float, batch: Tensor) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """One fold's probabilities (B, classes), class maps (B, classes, d, h, w) and mean depth gates (B, d).

    The temperature is in the probabilities alone: a class map splits the logit that the network itself gave.
    """
    trace = network.trace(batch)
    probability = (network.classify(trace.features) / temperature).softmax(dim=1)
    class_maps = class_activation_maps(trace.features, network.head.weight)
    gates = None if trace.depth_gates is None else trace.depth_gates.mean(dim=1).cpu().numpy()
    return probability.cpu().numpy(), class_maps.cpu().numpy(), gates


def _volume_of(scan: IngestedScan) -> StandardVolume:
    assert scan.volume is not None, "only a scan that is OK has a score"
    return scan.volume


def _score_columns(scan: IngestedScan, score: ScanScore | None) -> dict[str, Any]:
    """Probabilities and CAM of a scored scan, all null for one that was not."""
    ncp = DIAGNOSES.index(Diagnosis.NCP)
    cam = CamStatistics() if score is None else measure_score(scan, score)
    columns: dict[str, Any] = {name: getattr(cam, name) for name in CamStatistics.__slots__}
    for diagnosis in DIAGNOSES:
        index = DIAGNOSES.index(diagnosis)
        columns[f"probability_{diagnosis.lower()}"] = None if score is None else float(score.probability[index])
    columns["prediction"] = None if score is None else str(score.prediction)
    columns["fold_probability_ncp"] = None if score is None else score.fold_probability[:, ncp].tolist()
    columns["fold_std_ncp"] = None if score is None else float(score.fold_probability[:, ncp].std())
    return columns
