"""python -m jobs.phantoms: synthetic chests with cohort table and truth, to try jobs.paper on."""

import sys
from typing import Any

from darnet.errors import UsageError
from darnet.job import leave, run_job
from darnet.phantoms.archive import write_cohort
from darnet.phantoms.study import plan_study, write_study
from darnet.settings import PhantomsSettings
from darnet.terminal import show_progress


def work(settings: PhantomsSettings) -> dict[str, Any]:
    """Write archive, truth and, when both are whole, the cohort table."""
    archive, truth, cohort = (settings.out / name for name in ("archive", "truth", "cohort.csv"))
    if cohort.exists():
        raise UsageError(f"{cohort}: exists already, and is never overwritten; name another folder")
    scans = plan_study(settings.train_scans, settings.test_scans)
    with show_progress("writing phantoms", len(scans)) as meter:
        write_study(scans, archive, truth, settings.volume, lambda: meter.advance(1, {}))
    write_cohort(scans, cohort)
    return {"archive": str(archive), "truth": str(truth), "cohort": str(cohort), "scans": len(scans)}


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("phantoms", PhantomsSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
