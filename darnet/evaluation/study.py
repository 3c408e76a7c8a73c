"""The paper's comparison: predictions of several networks on one test cohort enter; tables, tests and facts leave.

Every network is measured on the same resampled sets, so that differences are paired. The full network (the last in
the order of Table 3) speaks for the study where one has to.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from darnet.errors import UsageError
from darnet.evaluation.cam_truth import MapStudy, describe_maps
from darnet.evaluation.measures import (
    Comparison,
    Evaluation,
    Origin,
    compare_predictions,
    correct_comparisons,
    describe_comparison,
    describe_evaluation,
    evaluate_predictions,
    resample_predictions,
)
from darnet.evaluation.paper import NETWORKS
from darnet.evaluation.predictions import Predictions
from darnet.report import CamPanel

Counts = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, eq=False, slots=True)
class NetworkRun:
    """One network's predictions of the test cohort, and what is known of it.

    `name` is the paper's; `history` has one row an epoch, fold and seed, or none where the bundle keeps none.
    """

    name: str
    origin: Origin
    predictions: Predictions
    num_parameters: int
    history: pd.DataFrame


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """First against second network, the later against the earlier in the order of Table 3."""

    first: str
    second: str
    comparison: Comparison


@dataclass(frozen=True, eq=False, slots=True)
class Study:
    """Networks in the order of Table 3, each with its evaluation; `counts` is cohort -> diagnosis -> scans.

    `maps` are the activation maps measured, one study a diagnosis with known lesions; `cases` those that are shown,
    each with a panel a network, in the order of their severity if that is known, else of the full network's NCP
    probability.
    """

    runs: Mapping[str, NetworkRun]
    evaluations: Mapping[str, Evaluation]
    pairs: Sequence[Pair]
    counts: Counts
    maps: Sequence[MapStudy] = ()
    cases: Sequence[Sequence[CamPanel]] = ()
    is_severity_known: bool = False

    @property
    def full(self) -> str:
        """The network that speaks for the study."""
        return list(self.runs)[-1]


def make_study(runs: Sequence[NetworkRun], counts: Counts, *, seed: int, num_replicates: int) -> Study:
    """Evaluate every network and compare all, two at a time.

    To compare only some, chosen by the scans that they are then compared on, would flatter these.

    Raises: UsageError for predictions of other scans, or networks trained with other folds or seeds than the rest:
            a mean over more models is better by that alone.
    """
    ordered = sorted(runs, key=lambda run: NETWORKS.index(run.name))
    by_name = {run.name: run for run in ordered}
    for run in ordered[1:]:
        if _list_members(run) != _list_members(ordered[0]):
            raise UsageError(
                f"{run.name} has other folds or seeds ({', '.join(_list_members(run))}) than {ordered[0].name} "
                f"({', '.join(_list_members(ordered[0]))}); train every network with the same"
            )
    resampling = resample_predictions(ordered[0].predictions, seed, num_replicates)
    evaluations = {name: evaluate_predictions(run.predictions, resampling) for name, run in by_name.items()}
    names = [(first, second) for second, first in itertools.combinations(by_name, 2)]
    compared = [
        compare_predictions(by_name[first].predictions, by_name[second].predictions, resampling)
        for first, second in names
    ]
    pairs = [Pair(*pair, item) for pair, item in zip(names, correct_comparisons(compared), strict=True)]
    return Study(by_name, evaluations, pairs, counts)


def _list_members(run: NetworkRun) -> list[str]:
    return [f"{fold} of seed {seed}" for fold, seed in run.predictions.members]


def describe_study(study: Study) -> dict[str, Any]:
    """What metrics.json says: at its top level what it says of the full network alone, then every network."""
    described = {
        name: describe_evaluation(study.evaluations[name], run.origin, None) | {"num_parameters": run.num_parameters}
        for name, run in study.runs.items()
    }
    return described[study.full] | {
        "network": study.full,
        "networks": described,
        "cohort_counts": {cohort: dict(counts) for cohort, counts in study.counts.items()},
        "comparisons": [
            {"first": pair.first, "second": pair.second} | describe_comparison(pair.comparison) for pair in study.pairs
        ],
        "activation_maps": [describe_maps(maps) for maps in study.maps],
    }
