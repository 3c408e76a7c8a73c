"""python -m jobs.score: archive + bundle -> the next object of the results table."""

import sys
from datetime import date
from typing import Any

from darnet.cam_images import CamImages
from darnet.config import ScoreSettings
from darnet.errors import UsageError
from darnet.job import run_job
from darnet.publishing.hold import decide_hold
from darnet.ray_score import score_archive
from darnet.storage import open_store


def work(settings: ScoreSettings) -> dict[str, Any]:
    """Score the archive, or decide on a run that was held."""
    results = open_store(settings.results, create=True)
    if settings.accept is not None or settings.discard is not None:
        return decide_hold(results, settings)
    try:
        night = None if settings.night is None else date.fromisoformat(settings.night)
    except ValueError as error:
        raise UsageError(f"--night {settings.night}: not a date, write YYYY-MM-DD") from error
    images = None
    if settings.cam_images:
        images = CamImages(open_store(settings.cam_images, create=True), settings.cam_choice)
    stores = open_store(settings.archive), open_store(settings.model), results
    return score_archive(*stores, settings.score, night, images)


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("score", ScoreSettings, work, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
