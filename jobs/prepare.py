"""python -m jobs.prepare: archive + cohort table -> standard volumes, folds; or an audit of the cohort."""

import sys
from typing import Any

from darnet.auditing.audit import audit_cohort
from darnet.auditing.report import write_audit
from darnet.cohort import read_cohort
from darnet.job import leave, run_job
from darnet.ray_prepare import prepare_volumes
from darnet.settings import PrepareSettings
from darnet.storage import open_store, read_file


def work(settings: PrepareSettings) -> dict[str, Any]:
    """Prepare the volumes folder, or audit what it would be made of."""
    cohort = read_cohort(*read_file(settings.cohort, "cohort table"), num_folds=settings.train.num_folds)
    if settings.audit:
        return write_audit(audit_cohort(cohort, settings), settings.out)
    return prepare_volumes(open_store(settings.archive), cohort, open_store(settings.volumes, create=True), settings)


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("prepare", PrepareSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
