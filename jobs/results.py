"""python -m jobs.results: check, clean, copy the latest of, or document a results table."""

import sys

from darnet.job import leave, run_job
from darnet.publishing.check import run_verb
from darnet.settings import ResultsSettings


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("results", ResultsSettings, run_verb, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
