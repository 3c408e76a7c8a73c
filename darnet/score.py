"""Standard volumes and a bundle's networks in; probabilities, class maps and results rows out.

The forward pass always has the same batch shape and number of threads, so that a scan's numbers depend on nothing else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import numpy as np
import torch
from scipy.special import softmax

from darnet.bundle import Bundle, load_network, select_model
from darnet.cam import upsample_cam
from darnet.cam_statistics import CamStatistics, measure_cam
from darnet.config import ScoreConfig
from darnet.inference.graph import Backend
from darnet.inference.openvino_backend import OpenVINOBackend
from darnet.inference.torch_backend import TorchBackend
from darnet.manifest import RunFacts
from darnet.publishing.rows import PROBABILITIES
from darnet.scan import DIAGNOSES, Diagnosis, FloatArray, IngestedScan, StandardVolume, Uint8Array


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


class Ensemble:
    """The folds' networks behind a forward pass of fixed shape, and each fold's temperature."""

    def __init__(self, backend: Backend, *, batch_size: int, temperatures: Sequence[float]) -> None:
        self._backend = backend
        self._batch_size = batch_size
        self._temperatures = temperatures

    @classmethod
    def from_bundle(cls, bundle: Bundle, config: ScoreConfig, device: str = "cpu") -> Self:
        """What the settings choose of a bundle's networks, each at its temperature.

        Raises: UsageError as `select_model` and `OpenVINOBackend`.
        """
        model = select_model(bundle, config)
        backend = (
            OpenVINOBackend(model, config) if config.backend == "openvino" else _start_torch(model, config, device)
        )
        temperatures = [fold.temperature for fold in model.manifest.folds]
        return cls(backend, batch_size=config.batch_size, temperatures=temperatures)

    def score(self, volumes: Sequence[Uint8Array]) -> list[ScanScore]:
        """Score up to a batch of standard volumes.

        Shape:  (D, H, W) uint8 each, at most `batch_size` of them.
        Raises: ValueError for more than a batch.
        """
        num_scans, step = len(volumes), self._backend.forward_scans
        if num_scans > self._batch_size:
            raise ValueError(f"{num_scans} volumes in a batch of {self._batch_size}")
        return [
            score for start in range(0, num_scans, step) for score in self._score_at_once(volumes[start : start + step])
        ]

    def _score_at_once(self, volumes: Sequence[Uint8Array]) -> list[ScanScore]:
        """One forward pass a fold.

        The temperature is in the probabilities alone: a class map splits the logit that the network itself gave.
        """
        num_scans = len(volumes)
        start_s = time.perf_counter()
        answers = self._backend.forward(volumes)
        folds = zip(answers, self._temperatures, strict=True)
        logits = np.stack([answer.logits / np.float32(temperature) for answer, temperature in folds], axis=1)
        probability = softmax(logits, axis=2)  # (B, folds, classes)
        class_maps = np.stack([answer.class_maps for answer in answers], axis=1)  # (B, folds, classes, d, h, w)
        gates = [answer.depth_gates for answer in answers if answer.depth_gates is not None]
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


def _start_torch(model: Bundle, config: ScoreConfig, device: str) -> TorchBackend:
    assert config.precision != "int8", "the settings have checked it"
    return TorchBackend(
        (load_network(model, place) for place in range(len(model.weights))),
        batch_size=config.batch_size,
        num_threads=config.num_threads,
        device=device,
        precision=config.precision,
        compiles=config.compile,
    )


def _volume_of(scan: IngestedScan) -> StandardVolume:
    assert scan.volume is not None, "only a scan that is OK has a score"
    return scan.volume


def _score_columns(scan: IngestedScan, score: ScanScore | None) -> dict[str, Any]:
    """Probabilities and CAM of a scored scan, all null for one that was not."""
    ncp = DIAGNOSES.index(Diagnosis.NCP)
    cam = CamStatistics() if score is None else measure_score(scan, score)
    columns: dict[str, Any] = {name: getattr(cam, name) for name in CamStatistics.__slots__}
    for index, name in enumerate(PROBABILITIES):
        columns[name] = None if score is None else float(score.probability[index])
    columns["prediction"] = None if score is None else str(score.prediction)
    columns["fold_probability_ncp"] = None if score is None else score.fold_probability[:, ncp].tolist()
    columns["fold_std_ncp"] = None if score is None else float(score.fold_probability[:, ncp].std())
    return columns
