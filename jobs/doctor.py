"""python -m jobs.doctor: machine, cluster, bundle, archive and results tried out -> what is wrong, and what to do."""

import sys
from typing import Any

from darnet.checkup.findings import examine, report_findings
from darnet.checkup.machine import check_bundle
from darnet.checkup.places import Trial, check_archive, check_removal, check_results
from darnet.job import leave, run_job
from darnet.ray_doctor import check_cluster, examine_machines
from darnet.settings import DoctorSettings
from darnet.storage import open_store


def work(settings: DoctorSettings) -> dict[str, Any]:
    """Try everything that is named; the cluster and its machines always."""
    model = open_store(settings.model) if settings.model else None
    archive = open_store(settings.archive, is_archive=True) if settings.archive else None
    trial = Trial(open_store(settings.results, create=True)) if settings.results else None
    findings = [finding for group in check_cluster() for finding in examine(group)]
    if model is not None:
        findings += examine(check_bundle(model, settings.score))
    if archive is not None:
        findings += examine(check_archive(archive))
    if trial is not None:
        findings += [finding for group in check_results(trial) for finding in examine(group)]
    try:
        findings += examine_machines(archive, model, trial, settings.score)
    finally:
        if trial is not None:
            findings += examine(check_removal(trial))
    return report_findings(findings)


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("doctor", DoctorSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
