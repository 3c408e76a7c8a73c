"""python -m jobs.paper: archive + cohort -> volumes, audit, four networks of five folds and some seeds, one report."""

import sys
from typing import Any

import jobs.prepare
import jobs.train
from darnet.evaluation.evaluate import read_known_truths
from darnet.evaluation.truth import refuse_empty
from darnet.job import leave, run_job
from darnet.manifest import NETWORK_NAMES
from darnet.ray_cluster import connect
from darnet.ray_evaluate import evaluate_on_cluster
from darnet.ray_folds import plan_training
from darnet.settings import EvaluateSettings, PaperSettings, PrepareSettings, TrainSettings
from darnet.steps import Step, claim_folder, run_steps
from darnet.storage import has_object, open_store, read_file
from darnet.store import Store
from darnet.volumes_folder import read_table

# The settings that each step is made with, beyond those of the steps before it
COHORT = ("archive", "cohort", "cohort_sha256", "volume", "cohorts", "score.decode", "train.num_folds")
TRAINING = ("network", "train", "seeds", "workers")
EVALUATION = ("truth", "replicates", "score")


def work(settings: PaperSettings) -> dict[str, Any]:
    """Make what `out` still lacks."""
    store = open_store(settings.out, create=True)
    _, table = read_file(settings.cohort, "cohort table")
    steps = list_steps(settings, store)
    training, evaluation = steps[-2:]
    if settings.truth is not None:
        refuse_empty(open_store(settings.truth))
    if not has_object(store, training.proof):  # hours of other work come before it
        connect()
        num_folds = len(settings.seeds) * len(NETWORK_NAMES) * settings.train.num_folds
        plan_training(settings.train, settings.workers, num_folds)
    done = run_steps(steps, claim_folder(store, settings, {"cohort": table}, steps))
    report = {"out": store.uri, "done": list(done), "report": f"{store.uri}/report/report.html"}
    return {**done.get(evaluation.title, {}), **report}


def list_steps(settings: PaperSettings, store: Store) -> list[Step]:
    """From the archive to the report, each with the file in `store` that it leaves last."""
    out = store.uri
    tree: dict[str, Any] = {
        name: getattr(settings, name) for name in ("volume", "cohorts", "network", "train", "score", "cache")
    }
    volumes, bundles, report = (f"{out}/{name}" for name in ("volumes", "bundles", "report"))
    cohort: dict[str, Any] = {"archive": settings.archive, "cohort": settings.cohort, "volumes": volumes} | tree
    prepare, audit = PrepareSettings(**cohort), PrepareSettings(**cohort, audit=True, out=f"{out}/audit")
    chosen = {name: getattr(settings, name) for name in ("seeds", "workers", "mlflow")}
    train = TrainSettings(volumes=volumes, out=bundles, networks=("plain", "ca", "da", "da-ca"), **chosen, **tree)
    measured: dict[str, Any] = {"truth": settings.truth, "audit": f"{out}/audit", "replicates": settings.replicates}
    evaluate = EvaluateSettings(model=bundles, volumes=volumes, out=report, **measured, **tree)
    last = f"seed{settings.seeds[-1]}/{NETWORK_NAMES[-1]}" if len(settings.seeds) > 1 else NETWORK_NAMES[-1]

    def train_networks() -> dict[str, Any]:
        read_known_truths(evaluate, read_table(open_store(volumes)))  # a wrong place is told of now, not in a week
        return jobs.train.work(train)

    return [
        Step("volumes and folds", store, "volumes/volumes.json", lambda: jobs.prepare.work(prepare), COHORT),
        Step("audit of the cohort", store, "audit/excluded.csv", lambda: jobs.prepare.work(audit)),
        Step("training", store, f"bundles/{last}/bundle.json", train_networks, TRAINING, first="bundles"),
        Step("evaluation", store, "report/report.html", lambda: evaluate_on_cluster(evaluate), EVALUATION),
    ]


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("paper", PaperSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
