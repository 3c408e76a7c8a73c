"""python -m jobs.demo: the whole road on phantoms, on one machine without any service."""

import sys
from typing import Any

import jobs.prepare
import jobs.score
import jobs.train
from darnet import demo
from darnet.job import leave, run_job
from darnet.phantoms.archive import write_archive, write_cohort
from darnet.results import read_predictions
from darnet.settings import DemoSettings, PrepareSettings, ScoreSettings, TrainSettings
from darnet.terminal import print_heading, print_table, show_progress


def work(settings: DemoSettings) -> dict[str, Any]:
    """Make an archive, train on it, score it on two nights, and show the results."""
    out = settings.out
    demo.empty_folder(out)
    archive, volumes, bundle, results = (out / name for name in ("archive", "volumes", "bundle", "results"))
    scans = demo.plan_scans()
    print_heading("1  Synthetic chest CTs in every format, and some spoiled ones")
    with show_progress("writing phantoms", len(scans)) as meter:
        write_archive(scans, archive, settings.volume.window_hu, lambda: meter.advance(1, {}))
    demo.write_spoiled(archive)
    write_cohort(scans, out / "cohort.csv")
    tree: dict[str, Any] = {
        name: getattr(settings, name) for name in ("volume", "cohorts", "network", "train", "score")
    }

    print_heading("2  jobs.prepare: archive + cohort -> standard volumes and folds")
    cohort = str(out / "cohort.csv")
    prepare = PrepareSettings(archive=str(archive), cohort=cohort, volumes=str(volumes), **tree)
    jobs.prepare.work(prepare)
    jobs.prepare.work(prepare.model_copy(update={"audit": True, "out": str(out / "audit")}))
    print_heading("3  jobs.train: volumes -> a bundle of five folds")
    jobs.train.work(TrainSettings(volumes=str(volumes), out=str(bundle), **tree))

    night = ScoreSettings(archive=str(archive), model=str(bundle), results=str(results), **tree)
    print_heading("4  jobs.score, night one: everything is new")
    first = jobs.score.work(night.model_copy(update={"night": "2026-01-01"}))
    print_heading("5  jobs.score, night two: three scans arrived, one was replaced")
    demo.change_archive(archive, scans[0], settings.volume.window_hu)
    second = jobs.score.work(night.model_copy(update={"night": "2026-01-02"}))

    print_heading("6  What an analyst sees")
    predictions = read_predictions(str(results))
    figures = demo.measure_demo(predictions, scans)
    show(predictions, figures)
    demo.draw_demo(predictions, scans, archive, bundle, out / "cam.png")
    nights = [{name: run[name] for name in ("published", "planned_sources", "statuses")} for run in (first, second)]
    return {"results": str(results), "picture": str(out / "cam.png"), "nights": nights, **figures}


def show(predictions: Any, figures: dict[str, Any]) -> None:
    """Print the tables."""
    for title, table in demo.tabulate(predictions):
        print_table(title, list(table.columns), table.to_numpy().tolist())
    rows = [[name, value] for name, value in figures.items()]
    print_table("On the phantoms of the test cohort (synthetic; research use only)", ["figure", "value"], rows)


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("demo", DemoSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
