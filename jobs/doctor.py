"""python -m jobs.doctor: machine, cluster, bundle, archive and results tried out -> what is wrong, and what to do."""

import sys
from typing import Any

from darnet.checkup.findings import examine, report_findings
from darnet.checkup.machine import check_bundle
from darnet.checkup.places import check_archive, check_results
from darnet.job import run_job
from darnet.ray_doctor import check_cluster, examine_machines
from darnet.settings import DoctorSettings
from darnet.storage import open_store


def work(settings: DoctorSettings) -> dict[str, Any]:
    """Try everything that is named; the cluster and its machines always."""
    findings = [finding for group in check_cluster() for finding in examine(group)]
    findings += examine_machines()
    groups = []
    if settings.model:
        groups.append(check_bundle(open_store(settings.model), settings.score))
    if settings.archive:
        groups.append(check_archive(open_store(settings.archive)))
    if settings.results:
        groups += check_results(open_store(settings.results, create=True))
    return report_findings(findings + [finding for group in groups for finding in examine(group)])


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("doctor", DoctorSettings, work, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
