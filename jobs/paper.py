"""python -m jobs.paper: archive + cohort -> volumes, audit, four networks of five folds and some seeds, one report."""

import sys
from typing import Any

import jobs.prepare
import jobs.train
from darnet.bundle import NETWORK_NAMES
from darnet.job import run_job
from darnet.ray_evaluate import evaluate_on_cluster
from darnet.settings import EvaluateSettings, PaperSettings, PrepareSettings, TrainSettings
from darnet.steps import BEFORE_VOLUMES, Step, claim_folder, run_steps
from darnet.storage import has_object, open_store, read_file

VOLUMES = "volumes/volumes.json"


def work(settings: PaperSettings) -> dict[str, Any]:
    """Make what `out` still lacks."""
    store = open_store(settings.out, create=True)
    _, table = read_file(settings.cohort, "cohort table")
    is_prepared = has_object(store, VOLUMES)
    claim_folder(store, settings, {"cohort": table}, () if is_prepared else BEFORE_VOLUMES)
    out = store.uri
    tree: dict[str, Any] = {
        name: getattr(settings, name) for name in ("volume", "cohorts", "network", "train", "score", "cache")
    }
    volumes, bundles, report = (f"{out}/{name}" for name in ("volumes", "bundles", "report"))
    cohort: dict[str, Any] = {"archive": settings.archive, "cohort": settings.cohort, "volumes": volumes}
    prepare = PrepareSettings(**cohort, **tree)
    audit = PrepareSettings(**cohort, audit=True, out=f"{out}/audit", **tree)
    train = TrainSettings(
        volumes=volumes,
        out=bundles,
        networks=("plain", "ca", "da", "da-ca"),
        seeds=settings.seeds,
        workers=settings.workers,
        mlflow=settings.mlflow,
        **tree,
    )
    evaluate = EvaluateSettings(
        model=bundles,
        volumes=volumes,
        out=report,
        truth=settings.truth,
        audit=f"{out}/audit",
        replicates=settings.replicates,
        **tree,
    )
    last = f"seed{settings.seeds[-1]}/{NETWORK_NAMES[-1]}" if len(settings.seeds) > 1 else NETWORK_NAMES[-1]
    steps = [
        Step("volumes and folds", store, VOLUMES, lambda: jobs.prepare.work(prepare)),
        Step("audit of the cohort", store, "audit/excluded.csv", lambda: jobs.prepare.work(audit)),
        Step("training", store, f"bundles/{last}/bundle.json", lambda: jobs.train.work(train)),
        Step("evaluation", store, "report/report.html", lambda: evaluate_on_cluster(evaluate)),
    ]
    return {"out": out, "done": run_steps(steps), "report": f"{report}/report.html"}


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("paper", PaperSettings, work, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
