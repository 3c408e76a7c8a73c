"""One evaluation, from settings to files: a predictions table, or a bundle and a test cohort, enters; a report leaves.

Both take the same road: the bundle's predictions are written as a table, and that table is evaluated. No Ray: a test
cohort is hundreds of scans that are already resampled.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from darnet.auditing.record import AUDIT_FILE, AuditRecord, read_audit
from darnet.bundle import count_network_parameters, read_model
from darnet.cohort import Division, count_cohort, describe_division, describe_excluded, has_leak, tell_leak
from darnet.config import digest_json
from darnet.errors import UsageError
from darnet.evaluation.measures import (
    Evaluation,
    Origin,
    compare_predictions,
    describe_evaluation,
    evaluate_predictions,
    find_warnings,
    resample_predictions,
)
from darnet.evaluation.networks import StoredNetwork, load_members, read_networks, score_cohort
from darnet.evaluation.predictions import PROBABILITIES, Predictions, read_predictions_table
from darnet.evaluation.report import render_report, round_headlines
from darnet.evaluation.seeds import refuse_unlike
from darnet.evaluation.study import NetworkRun, describe_study, make_study
from darnet.evaluation.study_maps import CohortScores, add_maps
from darnet.evaluation.study_report import draw_cases, render_study, render_study_csv, render_study_tex
from darnet.evaluation.tabulate import format_interval, format_metric, render_csv, render_tex, tabulate_comparison
from darnet.evaluation.truth import Truth, read_truths
from darnet.manifest import BundleManifest, FoldRecord, find_bundles
from darnet.page import Cell, Section, figure_to_png
from darnet.scan import LABELS, Intensity
from darnet.score import ScanScore
from darnet.settings import EvaluateSettings
from darnet.storage import Store, open_store, read_file
from darnet.terminal import print_table, show_progress
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesIndex, VolumesTable, read_facts

PREDICTIONS_FILE = "predictions.parquet"
TABLE = "predictions table"
# The settings that change a number: of the measuring, and of a bundle's scoring, whose last bits go with its batches.
MEASURING: dict[str, Any] = {"seed": True, "replicates": True}
SCORING: dict[str, Any] = {"score": {"batch_size", "num_threads", "backend", "precision", "folds"}}
UNKNOWN_TRAINING = (
    "The table does not say what the model was trained on. If patients of this cohort also have scans in training, "
    "these figures flatter the model."
)


def run_evaluation(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, and write metrics.json, tables.csv, tables.tex and report.html; returns the job's summary.

    A folder of several bundles is evaluated as the paper's comparison, each network on the same test cohort; and so is
    a single bundle where lesions are known to measure its activation maps by.
    Raises: UsageError naming file and row; StorageError.
    """
    out = open_store(settings.out, create=True)
    if settings.model is not None:
        bundles = find_bundles(open_store(settings.model))
        if len(bundles) > 1 or settings.truth is not None:
            return _run_study(settings, bundles, out)
    second = None if settings.compare is None else read_predictions_table(*read_file(settings.compare, TABLE))
    predictions, origin, audit = _open_predictions(settings, out)
    resampling = resample_predictions(predictions, settings.seed, settings.replicates)
    comparison = None if second is None else compare_predictions(predictions, second, resampling)
    evaluation = evaluate_predictions(predictions, resampling)
    described = describe_evaluation(evaluation, origin, comparison)
    files = {
        "tables.csv": render_csv(evaluation, comparison).encode(),
        "tables.tex": render_tex(evaluation, comparison).encode(),
        "report.html": render_report(evaluation, origin, comparison, _tell_audit(audit)).encode(),
    }
    _show(evaluation, origin)
    summary = _publish(out, described, files, evaluation)
    if comparison is None:
        return summary
    table = tabulate_comparison(evaluation, comparison)
    print_table(f"Against {settings.compare} (research use only)", table.header, _spell(table.rows))
    return summary | {"comparison": round_headlines(comparison.differences)}


def _run_study(settings: EvaluateSettings, places: Sequence[Store], out: Store) -> dict[str, Any]:
    if settings.compare is not None:
        raise UsageError(f"--compare {settings.compare}: {settings.model} holds several networks, compared already")
    device = choose_device(settings)
    index = _open_volumes(settings)
    truths = read_known_truths(settings, index)
    audit = _read_audit_of_volumes(settings, index)
    networks = {network.name: network for network in read_networks(places, settings.score)}
    for network in networks.values():
        _check_fit(settings, network.manifest, index)
    refuse_unlike([network.manifest for network in networks.values()])
    runs: list[NetworkRun] = []
    scores: dict[str, Sequence[ScanScore]] = {}
    for name, network in networks.items():
        scores[name] = _score_test(settings, network.places, network.manifest, index, device)
        runs.append(_describe_run(network, settings, scores[name], index, out, audit))
    study = make_study(runs, count_cohort(index.frame), seed=settings.seed, num_replicates=settings.replicates)
    cohort = CohortScores(
        index,
        scores,
        {name: network.members for name, network in networks.items()},
        lambda name: load_members(networks[name].places, settings.score, device),
        truths,
        find_sided(settings),
    )
    study = add_maps(study, cohort, seed=settings.seed, num_replicates=settings.replicates)
    files = {
        "tables.csv": render_study_csv(study).encode(),
        "tables.tex": render_study_tex(study).encode(),
        **({"fig2.png": figure_to_png(draw_cases(study))} if study.cases else {}),
        "report.html": render_study(study, _tell_audit(audit)).encode(),
    }
    for name, run in study.runs.items():
        _show(study.evaluations[name], run.origin)
    return _publish(out, describe_study(study), files, study.evaluations[study.full])


def _describe_run(
    network: StoredNetwork,
    settings: EvaluateSettings,
    scores: Sequence[ScanScore],
    index: VolumesIndex,
    out: Store,
    audit: AuditRecord | None,
) -> NetworkRun:
    """What one network says of the test cohort, kept as a table, and what is known of it."""
    manifest = network.manifest
    return NetworkRun(
        name=network.name,
        origin=_describe_origin(settings, manifest, index, audit),
        predictions=_keep_predictions(out, f"predictions-{manifest.model_name}.parquet", index, scores, manifest.folds),
        num_parameters=count_network_parameters(manifest.settings.network),
        history=network.history,
    )


def read_known_truths(settings: EvaluateSettings, index: VolumesTable) -> dict[str, Truth]:
    """What is known of the test cohort's lesions, by scan_id; of none where the settings name no place.

    Raises: UsageError as `read_truths`; StorageError.
    """
    if settings.truth is None:
        return {}
    scan_ids = index.frame.loc[index.frame["cohort"] == "test", "scan_id"].tolist()
    return read_truths(open_store(settings.truth), scan_ids, index.volume.shape)


def find_sided(settings: EvaluateSettings) -> frozenset[str]:
    """Scans whose left and right jobs.prepare knew: those in HU."""
    facts = read_facts(open_store(str(settings.volumes)))
    return frozenset(facts.loc[facts["intensity"] == str(Intensity.HU), "scan_id"] if "intensity" in facts else ())


def _read_audit(
    settings: EvaluateSettings, of: str, scans: Sequence[Sequence[Any]], division: Division | None = None
) -> AuditRecord | None:
    """What jobs.prepare --audit found, if the settings say where that is, and it is of these scans."""
    if settings.audit is None:
        return None
    _, data = read_file(f"{settings.audit}/{AUDIT_FILE}", "folder that jobs.prepare --audit wrote")
    audit = read_audit(f"{settings.audit}/{AUDIT_FILE}", data)
    audit.check(of, scans, division)
    return audit


def _read_audit_of_volumes(settings: EvaluateSettings, index: VolumesIndex) -> AuditRecord | None:
    columns, division = ["scan_id", "diagnosis", "patient_id"], index.division
    if division is not None and division.cohorts_by != "patient":
        columns += ["cohort", "fold"] if division.folds_by == "fold" else ["cohort"]
    rows = index.frame[columns].astype(object).where(index.frame[columns].notna(), "")
    return _read_audit(settings, str(settings.volumes), rows.to_numpy().tolist(), division)


def _tell_audit(audit: AuditRecord | None) -> list[Section]:
    return [] if audit is None else [audit.describe()]


def choose_device(settings: EvaluateSettings) -> str:
    """What the networks run on here, by `train.device`, as torch names it.

    Raises: UsageError if a GPU is asked for where torch sees none.
    """
    asked, has_gpu = settings.train.device, torch.cuda.is_available()
    if asked == "gpu" and not has_gpu:
        raise UsageError("train.device is gpu, and torch sees no GPU here; run this where there is one, or say cpu")
    return "cuda" if has_gpu and asked != "cpu" else "cpu"


def _spell(rows: Sequence[Sequence[Cell]]) -> list[list[str]]:
    """Cells of a page's table for the screen."""
    return [[format_metric(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]


def _publish(
    out: Store, described: Mapping[str, Any], files: Mapping[str, bytes], evaluation: Evaluation
) -> dict[str, Any]:
    """Write metrics.json, then the files, report.html the last; returns the job's summary."""
    metrics = json.dumps(described, indent=2, allow_nan=False) + "\n"
    for name, data in {"metrics.json": metrics.encode(), **files}.items():
        out.write_bytes(name, data)
    return {
        "out": out.uri,
        "num_scans": len(evaluation.predictions.scan_ids),
        **round_headlines(evaluation.metrics),
        "warnings": described["warnings"],
        "notice": described["notice"],
    }


def tabulate_predictions(
    index: VolumesIndex, scores: Sequence[ScanScore], records: Sequence[FoldRecord]
) -> pd.DataFrame:
    """The predictions table of a scored test cohort, one row a fold, seed and scan."""
    test = index.frame[index.frame["cohort"] == "test"]
    facts = pd.DataFrame(
        {"scan_id": test["scan_id"], "patient_id": test["patient_id"], "label": test["diagnosis"]}
    ).reset_index(drop=True)
    folds = [
        pd.concat(
            [facts.assign(fold=record.number, seed=record.seed), pd.DataFrame(values, columns=list(PROBABILITIES))],
            axis=1,
        )
        for record, values in zip(records, np.stack([score.fold_probability for score in scores], axis=1), strict=True)
    ]
    return pd.concat(folds, ignore_index=True)


def describe_leak(index: VolumesIndex, manifest: BundleManifest) -> tuple[str, bool]:
    """Say whether the bundle knows patients of the test cohort, and whether that is something to be warned of."""
    is_leaking = has_leak(index.frame)
    told = tell_leak(index.frame) + (": these figures flatter the model." if is_leaking else ".")
    if manifest.cohort_sha256 == index.cohort_sha256:
        return told, is_leaking
    return f"The bundle was trained on another cohort than the volumes folder declares; by the latter: {told}", True


def _open_predictions(settings: EvaluateSettings, out: Store) -> tuple[Predictions, Origin, AuditRecord | None]:
    if settings.predictions is not None:
        predictions = read_predictions_table(*read_file(settings.predictions, TABLE))
        names = [LABELS[label] for label in predictions.labels]
        patients = () if predictions.patient_ids is None else (predictions.patient_ids,)
        scans = list(zip(predictions.scan_ids, names, *patients, strict=True))
        audit = _read_audit(settings, predictions.name, scans)
        return predictions, Origin(predictions.name, UNKNOWN_TRAINING, _describe_settings(settings, audit)), audit
    assert settings.model is not None, "the settings have checked it"
    (place,) = find_bundles(open_store(settings.model))
    device = choose_device(settings)
    manifest, index = read_model(place, settings.score).manifest, _open_volumes(settings)
    _check_fit(settings, manifest, index)
    audit = _read_audit_of_volumes(settings, index)
    scores = _score_test(settings, [place], manifest, index, device)
    predictions = _keep_predictions(out, PREDICTIONS_FILE, index, scores, manifest.folds)
    return predictions, _describe_origin(settings, manifest, index, audit), audit


def _describe_settings(settings: EvaluateSettings, audit: AuditRecord | None) -> dict[str, Any]:
    """What the numbers depend on beside their input, and which audit is told of."""
    included = MEASURING if settings.model is None else MEASURING | SCORING
    digest = digest_json(settings.model_dump(mode="json", include=included))
    told = {} if audit is None else {"audit": audit.place, "audit_sha256": audit.sha256}
    return {"settings_sha256": digest, "ci95_seed": settings.seed, **told}


def _open_volumes(settings: EvaluateSettings) -> VolumesIndex:
    assert settings.volumes is not None, "the settings have checked it"
    return open_volumes(settings.volumes, settings.cache)


def _score_test(
    settings: EvaluateSettings, places: Sequence[Store], manifest: BundleManifest, index: VolumesIndex, device: str
) -> list[ScanScore]:
    num_test = int((index.frame["cohort"] == "test").sum())
    with show_progress(f"scoring the test cohort, {manifest.model_name}", num_test * len(places)) as meter:
        return score_cohort(places, index, settings.score, device, lambda done: meter.advance(done, {}))


def _keep_predictions(
    out: Store, name: str, index: VolumesIndex, scores: Sequence[ScanScore], records: Sequence[FoldRecord]
) -> Predictions:
    """Write the predictions table and read it as anybody's."""
    buffer = io.BytesIO()
    tabulate_predictions(index, scores, records).to_parquet(buffer, index=False)
    out.write_bytes(name, buffer.getvalue())
    return read_predictions_table(name, buffer.getvalue())


def _check_fit(settings: EvaluateSettings, manifest: BundleManifest, index: VolumesIndex) -> None:
    """Raises: UsageError if the bundle cannot be measured on these volumes."""
    if manifest.preprocessing_version != index.volume.preprocessing_version:
        raise UsageError(
            f"{settings.volumes}: prepared as {index.volume.preprocessing_version}, but {settings.model} was trained "
            f"on volumes of {manifest.preprocessing_version}; run jobs.prepare with the bundle's volume settings"
        )
    if not (index.frame["cohort"] == "test").any():
        raise UsageError(f"{settings.volumes}: no scan is in the test cohort; run jobs.prepare with one")


def _describe_origin(
    settings: EvaluateSettings, manifest: BundleManifest, index: VolumesIndex, audit: AuditRecord | None
) -> Origin:
    told, is_warning = describe_leak(index, manifest)
    facts = {
        "model_name": manifest.model_name,
        "model_version": manifest.model_version,
        "model_sha256": manifest.model_sha256,
        "preprocessing_version": manifest.preprocessing_version,
        "cohort_sha256": index.cohort_sha256,
        "bundle_settings_sha256": manifest.settings_sha256,
        **_describe_settings(settings, audit),
        "division": describe_division(index.division),
        "excluded": describe_excluded(index.excluded),
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
