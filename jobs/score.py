"""python -m jobs.score: archive + bundle -> the next object of the results table."""

import sys
from dataclasses import replace
from datetime import date
from typing import Any

from darnet.archive import Selection
from darnet.cam_images import CamImages
from darnet.errors import UsageError
from darnet.job import leave, run_job
from darnet.pseudonym import choose_names
from darnet.publishing.hold import decide_hold
from darnet.ray_score import NightRequest, preview_archive, score_archive
from darnet.settings import ScoreSettings
from darnet.storage import open_store


def work(settings: ScoreSettings) -> dict[str, Any]:
    """Score the archive, say what would be scored, or decide on a run."""
    is_decision = settings.accept is not None or settings.discard is not None
    results = open_store(settings.results, create=not (is_decision or settings.dry_run))
    if is_decision:
        return decide_hold(results, settings)
    try:
        night = None if settings.night is None else date.fromisoformat(settings.night)
    except ValueError as error:
        raise UsageError(f"--night {settings.night}: not a date, write YYYY-MM-DD") from error
    request = NightRequest(
        archive=open_store(settings.archive, is_archive=True),
        model=open_store(settings.model),
        results=results,
        config=settings.score,
        night=night,
        selection=Selection(settings.prefix, settings.since, settings.glob, settings.settle_s),
        names=choose_names(settings.scan_id),
        moved_from=settings.archive_moved_from,
    )
    if settings.dry_run:
        return preview_archive(request)
    if settings.cam_images:
        pictures = CamImages(open_store(settings.cam_images, create=True), settings.cam_choice)
        request = replace(request, images=pictures)
    return score_archive(request)


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("score", ScoreSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
