"""What a model card says of the data: tables of a volumes folder and an ensemble enter, Markdown leaves.

Counts and metrics only; no patient or scan is named.
"""

from collections.abc import Sequence

import numpy as np

from darnet import RESEARCH_USE
from darnet.cohort import COHORTS, describe_division, describe_excluded, has_leak, tell_leak
from darnet.evaluation.intervals import NUM_REPLICATES
from darnet.evaluation.measures import Evaluation, Origin, evaluate_predictions, find_warnings, resample_predictions
from darnet.evaluation.predictions import Predictions
from darnet.evaluation.tabulate import format_interval, format_metric
from darnet.scan import LABELS
from darnet.score import Ensemble
from darnet.volumes_folder import VolumesIndex, VolumesTable

NO_TEST = "The volumes hold no test cohort: nothing was measured on scans that training has not seen."


def describe_cohort(table: VolumesTable) -> str:
    """Scans of each cohort, fold and diagnosis, how they were divided, and who is in both cohorts."""
    rows = table.frame[table.frame["cohort"] == "train"]
    return "\n\n".join(
        [
            f"{len(rows)} scans of {rows['patient_id'].nunique()} patients in {table.num_folds} folds, divided by "
            "patient: no patient is in two folds.",
            f"Division {describe_division(table.division)}.",
            f"Not among them: {describe_excluded(table.excluded)}.",
            _render_table([["", *LABELS, "scans", "patients"], *_count_parts(table)]),
            describe_leak(table),
        ]
    )


def describe_leak(table: VolumesTable) -> str:
    """Whether patients of the test cohort are in training too."""
    if not (table.frame["cohort"] == "test").any():
        return NO_TEST
    if not has_leak(table.frame):
        return f"{tell_leak(table.frame)}."
    return f"**{tell_leak(table.frame)}: figures on the test cohort flatter the model.**"


def evaluate_test(ensemble: Ensemble, index: VolumesIndex, batch_size: int, seed: int) -> Evaluation:
    """Score the test cohort of the volumes and measure it; intervals count patients."""
    test = index.frame[index.frame["cohort"] == "test"]
    scores = [score for batch in index.read_batches("test", batch_size) for score in ensemble.score(list(batch))]
    probabilities = np.stack([score.fold_probability for score in scores], axis=1)  # (folds, N, classes)
    predictions = Predictions(
        name="test cohort",
        sha256=index.cohort_sha256,
        scan_ids=tuple(test["scan_id"]),
        patient_ids=tuple(test["patient_id"]),
        labels=index.labels[test.index],
        folds=tuple(str(fold) for fold in range(len(probabilities))),
        fold_probabilities=probabilities.astype(np.float64),
    )
    return evaluate_predictions(predictions, resample_predictions(predictions, seed, NUM_REPLICATES))


def describe_test(evaluation: Evaluation) -> str:
    """Metrics on the test cohort with 95% intervals, each fold's mean and deviation, and what to mind."""
    rows = [
        [
            name,
            format_metric(value),
            format_interval(evaluation.intervals[name]),
            format_metric(evaluation.fold_means[name], evaluation.fold_stds[name]),
        ]
        for name, value in evaluation.metrics.items()
    ]
    head = ["metric", "ensemble", f"95% interval by {evaluation.clustered_by}", "folds, mean ± deviation"]
    warnings = find_warnings(evaluation, Origin("", "", {}))
    return "\n\n".join(
        [
            f"{len(evaluation.predictions.scan_ids)} scans of {evaluation.predictions.num_patients} patients, measured "
            f"when training ended; intervals from {evaluation.num_replicates} bootstrap replicates. {RESEARCH_USE}.",
            _render_table([head, *rows]),
            *(f"- {warning}" for warning in warnings),
        ]
    )


def _count_parts(table: VolumesTable) -> list[list[str]]:
    """Rows of counts: each fold, then each cohort."""
    frame = table.frame
    parts = {f"fold {fold}": (frame["fold"] == fold).fillna(False) for fold in range(table.num_folds)}
    parts |= {cohort: frame["cohort"] == cohort for cohort in COHORTS}
    rows = []
    for name, is_in in parts.items():
        part = frame[is_in]
        counts = [int((part["diagnosis"] == label).sum()) for label in LABELS]
        rows.append([name, *map(str, [*counts, len(part), part["patient_id"].nunique()])])
    return rows


def _render_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the header."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])
