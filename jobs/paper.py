"""python -m jobs.paper: archive + cohort -> volumes, audit, four networks of five folds, one report."""

import functools
import sys
from typing import Any

import jobs.prepare
import jobs.train
from darnet.bundle import NETWORKS, name_model
from darnet.config import EvaluateSettings, PaperSettings, PrepareSettings, TrainSettings
from darnet.job import run_job
from darnet.ray_evaluate import evaluate_on_cluster
from darnet.steps import Step, claim_folder, run_steps


def work(settings: PaperSettings) -> dict[str, Any]:
    """Make what `out` still lacks."""
    out = settings.out.absolute()
    claim_folder(out, settings)
    tree: dict[str, Any] = {
        name: getattr(settings, name) for name in ("volume", "cohorts", "network", "train", "score")
    }
    volumes, bundles, report = out / "volumes", out / "bundles", out / "report"
    cohort: dict[str, Any] = {"archive": settings.archive, "cohort": settings.cohort, "volumes": str(volumes)}
    prepare = PrepareSettings(**cohort, **tree)
    audit = PrepareSettings(**cohort, audit=True, out=str(out / "audit"), **tree)
    steps = [
        Step("volumes and folds", volumes / "volumes.json", lambda: jobs.prepare.work(prepare)),
        Step("audit of the cohort", out / "audit" / "excluded.csv", lambda: jobs.prepare.work(audit)),
    ]
    for attentions in NETWORKS:
        network = settings.network.model_copy(update=attentions)
        bundle = bundles / name_model(network)
        train = TrainSettings(
            volumes=str(volumes),
            out=bundle,
            workers=settings.workers,
            mlflow=settings.mlflow,
            **tree | {"network": network},
        )
        steps.append(Step(f"training {bundle.name}", bundle / "bundle.json", functools.partial(jobs.train.work, train)))
    evaluate = EvaluateSettings(
        model=str(bundles),
        volumes=str(volumes),
        out=str(report),
        truth=settings.truth,
        replicates=settings.replicates,
        **tree,
    )
    steps.append(Step("evaluation", report / "report.html", lambda: evaluate_on_cluster(evaluate)))
    return {"out": str(out), "done": run_steps(steps), "report": str(report / "report.html")}


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("paper", PaperSettings, work, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
