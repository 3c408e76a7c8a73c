"""One evaluation, from settings to files: a predictions table, or a bundle and a test cohort, enters; a report leaves.

Both take the same road: the bundle's predictions are written as a table, and that table is evaluated. No Ray: a test
cohort is hundreds of scans that are already resampled.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from darnet.bundle import BundleManifest, load_networks, read_bundle
from darnet.cohort import find_leaking_patients
from darnet.config import EvaluateSettings, ScoreConfig
from darnet.dataset import VolumesIndex, read_index
from darnet.errors import UsageError
from darnet.evaluation import (
    Evaluation,
    Origin,
    compare_predictions,
    describe_evaluation,
    evaluate_predictions,
    find_warnings,
    resample_predictions,
)
from darnet.evaluation_report import (
    format_interval,
    format_metric,
    render_csv,
    render_report,
    render_tex,
    round_headlines,
)
from darnet.model import DARNet
from darnet.predictions import PROBABILITIES, Predictions, read_predictions_table
from darnet.scan import FloatArray
from darnet.score import Ensemble
from darnet.storage import Store, open_store, read_file
from darnet.terminal import print_table, show_progress

PREDICTIONS_FILE = "predictions.parquet"
TABLE = "predictions table"
UNKNOWN_TRAINING = (
    "The table does not say what the model was trained on. If patients of this cohort also have scans in training, "
    "these figures flatter the model."
)


def run_evaluation(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, and write metrics.json, tables.csv, tables.tex and report.html; returns the job's summary.

    Raises: UsageError naming file and row; StorageError.
    """
    out = open_store(settings.out, create=True)
    second = None if settings.compare is None else read_predictions_table(*read_file(settings.compare, TABLE))
    predictions, origin = _open_predictions(settings, out)
    resampling = resample_predictions(predictions, settings.seed, settings.replicates)
    comparison = None if second is None else compare_predictions(predictions, second, resampling)
    evaluation = evaluate_predictions(predictions, resampling)
    described = describe_evaluation(evaluation, origin, comparison)
    files = {
        "metrics.json": json.dumps(described, indent=2, allow_nan=False) + "\n",
        "tables.csv": render_csv(evaluation),
        "tables.tex": render_tex(evaluation),
        "report.html": render_report(evaluation, origin, comparison),
    }
    for name, text in files.items():
        out.write_bytes(name, text.encode())
    _show(evaluation, origin)
    return {
        "out": out.uri,
        "num_scans": len(predictions.scan_ids),
        **round_headlines(evaluation.metrics),
        "warnings": described["warnings"],
        "notice": described["notice"],
    }


def predict_cohort(
    networks: list[DARNet], index: VolumesIndex, config: ScoreConfig, advance: Callable[[int], None]
) -> FloatArray:
    """Each fold's probabilities of the index's test scans, in the order of its rows; `advance` hears of each batch.

    Shape: (folds, N, 3).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = Ensemble(networks, batch_size=config.batch_size, num_threads=config.num_threads, device=device)
    arrays = index.frame.loc[index.frame["cohort"] == "test", "array"].tolist()
    probabilities = []
    for start in range(0, len(arrays), config.batch_size):
        batch = np.stack([np.load(index.folder / name) for name in arrays[start : start + config.batch_size]])
        probabilities += [score.fold_probability for score in ensemble.score(batch)]
        advance(len(batch))
    return np.stack(probabilities, axis=1)


def tabulate_predictions(index: VolumesIndex, fold_probabilities: FloatArray) -> pd.DataFrame:
    """The predictions table of a test cohort, one row a fold and scan.

    Shape: (folds, N, 3).
    """
    test = index.frame[index.frame["cohort"] == "test"]
    facts = pd.DataFrame(
        {"scan_id": test["scan_id"], "patient_id": test["patient_id"], "label": test["diagnosis"]}
    ).reset_index(drop=True)
    folds = [
        pd.concat([facts.assign(fold=fold), pd.DataFrame(values, columns=list(PROBABILITIES))], axis=1)
        for fold, values in enumerate(fold_probabilities)
    ]
    return pd.concat(folds, ignore_index=True)


def describe_leak(index: VolumesIndex, manifest: BundleManifest) -> tuple[str, bool]:
    """Say whether the bundle knows patients of the test cohort, and whether that is something to be warned of."""
    test = index.frame[index.frame["cohort"] == "test"]
    leaking = find_leaking_patients(index.frame)
    num_scans = int(test["patient_id"].isin(leaking).sum())
    if leaking:
        told = (
            f"{len(leaking)} of {test['patient_id'].nunique()} test patients ({num_scans} of {len(test)} test scans) "
            "also have scans in the training cohort: these figures flatter the model."
        )
    else:
        told = "No patient of the test cohort has a scan in the training cohort."
    if manifest.cohort_sha256 == index.cohort_sha256:
        return told, bool(leaking)
    return f"The bundle was trained on another cohort than the volumes folder declares; by the latter: {told}", True


def _open_predictions(settings: EvaluateSettings, out: Store) -> tuple[Predictions, Origin]:
    if settings.predictions is not None:
        predictions = read_predictions_table(*read_file(settings.predictions, TABLE))
        return predictions, Origin(predictions.name, UNKNOWN_TRAINING, {})
    assert settings.model is not None, "the settings have checked it"
    assert settings.volumes is not None, "the settings have checked it"
    if "://" in settings.volumes:
        raise UsageError(f"--volumes {settings.volumes}: give a folder on this machine; volumes are read as files")
    bundle, index = read_bundle(open_store(settings.model)), read_index(Path(settings.volumes).absolute())
    _check_fit(settings, bundle.manifest, index)
    num_test = int((index.frame["cohort"] == "test").sum())
    with show_progress("scoring the test cohort", num_test) as meter:
        networks = load_networks(bundle)
        values = predict_cohort(networks, index, settings.score, lambda done: meter.advance(done, {}))
    buffer = io.BytesIO()
    tabulate_predictions(index, values).to_parquet(buffer, index=False)
    out.write_bytes(PREDICTIONS_FILE, buffer.getvalue())
    return read_predictions_table(PREDICTIONS_FILE, buffer.getvalue()), _describe_origin(bundle.manifest, index)


def _check_fit(settings: EvaluateSettings, manifest: BundleManifest, index: VolumesIndex) -> None:
    """Raises: UsageError if the bundle cannot be measured on these volumes."""
    if manifest.preprocessing_version != index.volume.preprocessing_version:
        raise UsageError(
            f"{settings.volumes}: prepared as {index.volume.preprocessing_version}, but {settings.model} was trained "
            f"on volumes of {manifest.preprocessing_version}; run jobs.prepare with the bundle's volume settings"
        )
    if not (index.frame["cohort"] == "test").any():
        raise UsageError(f"{settings.volumes}: no scan is in the test cohort; run jobs.prepare with one")


def _describe_origin(manifest: BundleManifest, index: VolumesIndex) -> Origin:
    told, is_warning = describe_leak(index, manifest)
    facts = {
        "model_name": manifest.model_name,
        "model_version": manifest.model_version,
        "model_sha256": manifest.model_sha256,
        "preprocessing_version": manifest.preprocessing_version,
        "cohort_sha256": index.cohort_sha256,
    }
    subject = f"{manifest.model_name} {manifest.model_version}"
    return Origin(subject, told, facts, warning=told if is_warning else "")


def _show(evaluation: Evaluation, origin: Origin) -> None:
    """Print the metrics, and what a reader has to know of them."""
    rows = [
        [name, format_metric(value), format_interval(evaluation.intervals[name])]
        for name, value in evaluation.metrics.items()
    ]
    title = f"{origin.subject}: {len(evaluation.predictions.scan_ids)} scans (research use only)"
    print_table(title, ["metric", "value", f"95% interval by {evaluation.clustered_by}"], rows)
    warnings = find_warnings(evaluation, origin)
    if warnings:
        print_table("Before you believe these figures", ["mind"], [[warning] for warning in warnings])
