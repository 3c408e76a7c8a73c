"""python -m jobs.evaluate: predictions table, or bundle + test cohort -> metrics, tables, report."""

import sys

from darnet.evaluation.evaluate import run_evaluation
from darnet.job import leave, run_job
from darnet.settings import EvaluateSettings


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("evaluate", EvaluateSettings, run_evaluation, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
