"""An archive's listing and the results table go in; the run of a night that is to be scored, or its preview, comes out.

Planning never holds the listing: prefixes stream side by side, and what is not settled goes to a file as it is found.
"""

import contextlib
import gc
import json
import queue
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from darnet.archive import Selection, batch_by, list_sources
from darnet.errors import UsageError
from darnet.publishing.objects import Listing
from darnet.publishing.rows import Reason
from darnet.publishing.runs import PlannedSource, RunFolder, RunRecord, Work, sort_unfinished, write_plan
from darnet.publishing.scored_keys import ScoredKeys, read_scored_keys
from darnet.scan import Source
from darnet.storage import Store
from darnet.storage_local import explain_os_errors, find_temporary_folder
from darnet.terminal import print_table

LIST_THREADS = 8  # Source: ours; half of the store's connections
LOOKUP_OBJECTS = 4_096  # Source: ours; a few pages of a listing, 2 MB
AHEAD_LOOKUPS = 4  # Source: ours; found of each prefix before its turn comes: some 60 MB of 8 prefixes


@dataclass
class Survey:
    """What planning counted: sources listed and selected, those still arriving, and those to score by reason.

    `misdated` are those of the last whose time lies too far in the future to wait for, `first_misdated` the row of the
    first in the plan, counted from 1; `empty_prefixes` were asked for and select nothing.
    """

    listed: int = 0
    selected: int = 0
    waiting: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    misdated: int = 0
    first_misdated: int = 0
    empty_prefixes: list[str] = field(default_factory=list)

    def add(self, other: "Survey") -> None:
        """Count another part of the archive in."""
        self.listed += other.listed
        self.selected += other.selected
        self.waiting += other.waiting
        if other.misdated and not self.misdated:
            self.first_misdated = self.reasons.total() + other.first_misdated
        self.misdated += other.misdated
        self.reasons += other.reasons
        self.empty_prefixes += other.empty_prefixes

    def describe(self) -> dict[str, Any]:
        """For a summary."""
        return {
            "listed_sources": self.listed,
            "selected_sources": self.selected,
            "waiting_sources": self.waiting,
            "misdated_sources": self.misdated,
            "planned_sources": self.reasons.total(),
            "empty_prefixes": self.empty_prefixes,
            "reasons": {str(reason): self.reasons[reason] for reason in Reason if self.reasons[reason]},
        }


@dataclass(frozen=True)
class Plan:
    """A night's run, None if there is nothing to score, and what was counted on the way."""

    folder: RunFolder | None
    survey: Survey


def plan_night(
    archive: Store,
    results: Store,
    work: Work,
    night: date,
    selection: Selection,
    choose_device: Callable[[], str] = lambda: "",
) -> Plan:
    """Begin the run of what is selected and not settled, in the archive's order; a run of the same work goes on.

    Where the work names no device, `choose_device` is asked for one, once there is something to plan.

    All times are of the results store's clock, so that runs of several machines can be told which came first.

    Raises: UsageError as `survey_archive`, and for a run of the same name and other parameters; as `choose_device`.
        StorageError, also where there is no room for the plan on this machine.
    """
    survey = Survey()
    # The table is read first, then the clock: see Listing.
    with read_scored_keys(results, work.model_sha256, work.preprocessing_version, work.origin) as keys:
        started_at = results.read_clock()

        def make_record(plan_sha256: str) -> RunRecord:
            listing = Listing(keys.last_commit, started_at, results.read_clock())
            record = RunRecord(night, chosen, selection.describe(), plan_sha256, listing)
            while RunFolder(results, record.run_id).is_over:
                record = replace(record, attempt=record.attempt + 1)
            return record

        # Closed whatever happens: an error keeps this frame, and threads that list ahead would wait for ever.
        with contextlib.closing(survey_archive(archive, keys, selection, started_at.timestamp(), survey)) as planned:
            first = next(planned, None)
            if first is None:
                return Plan(None, survey)
            chosen = replace(work, device=work.device or choose_device())
            place = find_temporary_folder()
            with explain_os_errors(place, "write a plan"), tempfile.TemporaryDirectory(prefix="darnet-") as temporary:
                path = Path(temporary) / "plan.parquet"
                record = write_plan(chain([first], planned), path, make_record)
                folder = RunFolder(results, record.run_id)
                folder.begin(record, path)
    return Plan(folder, survey)


def preview_night(
    archive: Store,
    results: Store,
    work: Work,
    selection: Selection,
    clock: Callable[[], datetime],
) -> dict[str, Any]:
    """Say on stdout what would be scored and why, a line of JSON each, and the counts on stderr and for a summary.

    Writes nothing. What an unfinished run holds is said too: it would be scored in the same call.
    """
    unfinished, others = sort_unfinished(results, work)
    warn_of_others(results, others)
    survey = Survey()
    with (
        read_scored_keys(results, work.model_sha256, work.preprocessing_version, work.origin) as keys,
        contextlib.closing(survey_archive(archive, keys, selection, clock().timestamp(), survey)) as planned,
    ):
        for item in planned:
            line = {
                "source": keys.names.name_source(item.source.key),
                "reason": str(item.reason),
                "objects": len(item.source.objects),
                "bytes": item.source.num_bytes,
            }
            print(json.dumps(line))
    counts = survey.describe()
    reasons, empty = counts.pop("reasons"), counts.pop("empty_prefixes")
    print_table("What a night would do", ["", "sources"], [*_spell_counts(counts), *reasons.items()])
    return {
        "dry_run": True,
        "unfinished_runs": [folder.run_id for folder in unfinished],
        "left_behind_runs": others,
        **counts,
        "empty_prefixes": empty,
        "reasons": reasons,
        "published": None,
    }


def _spell_counts(counts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name.removesuffix("_sources"), count) for name, count in counts.items()]


def survey_archive(
    archive: Store, keys: ScoredKeys, selection: Selection, now_s: float, survey: Survey
) -> Generator[PlannedSource, None, None]:
    """The sources to score, in the archive's order, while the prefixes are listed side by side.

    A prefix whose turn has not come is listed on, until it has found what `AHEAD_LOOKUPS` lookups may; what is settled
    is none of that.
    Raises: UsageError if nothing at all was listed: a mistyped prefix of a bucket lists as empty; StorageError.
    """
    is_over = threading.Event()
    waiting = iter(selection.list_prefixes())
    ahead: deque[tuple[_Listing, Future[None]]] = deque()
    gc.freeze()  # else the collector walks through all that was loaded for every page
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        try:
            while True:
                for prefix in islice(waiting, LIST_THREADS - len(ahead)):
                    listing = _Listing(archive, prefix, keys, selection, now_s, is_over)
                    ahead.append((listing, pool.submit(listing.run)))
                if not ahead:
                    break
                listing, end = ahead[0]
                yield from listing.read()
                end.result()
                survey.add(listing.survey)
                ahead.popleft()
        finally:
            is_over.set()
            for listing, _ in ahead:
                listing.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            gc.unfreeze()
    within = f" below {' or '.join(selection.prefixes)}" if selection.prefixes else ""
    if survey.listed == 0:
        raise UsageError(f"{archive.uri}: nothing in it{within} looks like a scan; is the address right?")
    if survey.selected == 0 and selection.since is None:
        raise UsageError(
            f"{archive.uri}: of {survey.listed} sources{within} none matches the glob {selection.glob!r}, or a prefix "
            "ends inside a source's name; are they right?"
        )
    _warn(survey)


def _warn(survey: Survey) -> None:
    """Tell people what may be wrong with an archive, or with what was asked for; its keys may name patients."""
    if survey.misdated:
        print(
            f"{survey.misdated} sources are dated more than a day ahead, the first in row {survey.first_misdated} of "
            "the run's plan.parquet, or of what --dry-run prints; they are scored as they are: mend the clock of what "
            "writes them",
            file=sys.stderr,
        )
    for prefix in survey.empty_prefixes:
        print(f"prefix {prefix!r} selects nothing; is it right?", file=sys.stderr)


def warn_of_others(results: Store, others: Mapping[str, str]) -> None:
    """Tell people of unfinished runs that nobody goes on with, as `sort_unfinished` finds them."""
    for run_id, difference in others.items():
        print(
            f"run {run_id} is unfinished and left as it is: it has {difference}. Its own command finishes it, unless "
            "that still runs, with --score.device if that is the difference; or drop it: "
            f"python -m jobs.score --results {results.uri} --discard {run_id} --reason WHY",
            file=sys.stderr,
        )


class _Listing:
    """One prefix on its way to planned sources: one thread lists, and another reads what it finds."""

    def __init__(
        self,
        archive: Store,
        prefix: str,
        keys: ScoredKeys,
        selection: Selection,
        now_s: float,
        is_over: threading.Event,
    ) -> None:
        asked_for = [asked for asked in dict.fromkeys(selection.prefixes) if asked.startswith(prefix)]
        self.survey = Survey(empty_prefixes=asked_for)
        self._keys, self._selection, self._now_s = keys, selection, now_s
        self._sources, self._is_over = list_sources(archive.list_objects(prefix)), is_over
        self._found: queue.SimpleQueue[list[PlannedSource]] = queue.SimpleQueue()  # an empty one is the last
        self._room = threading.Semaphore(AHEAD_LOOKUPS)

    def run(self) -> None:
        """List to the end, as far ahead of the reader as there is room."""
        try:
            sources = takewhile(lambda _: not self._is_over.is_set(), self._sources)
            for batch in batch_by(self._select(sources), lambda source: len(source.objects), LOOKUP_OBJECTS):
                if found := self._plan(batch):
                    self._room.acquire()
                    if self._is_over.is_set():
                        return
                    self._found.put(found)
        finally:
            self._found.put([])

    def read(self) -> Iterator[PlannedSource]:
        """What is found, as it comes."""
        while found := self._found.get():
            self._room.release()
            yield from found

    def stop(self) -> None:
        """Let `run` come to its end where it waits for room, once all is over."""
        self._room.release()

    def _plan(self, batch: Sequence[Source]) -> list[PlannedSource]:
        planned = []
        for source, reason in zip(batch, self._keys.find_reasons(batch), strict=True):
            if reason is None:
                continue
            if self._selection.is_arriving(source, self._now_s):
                self.survey.waiting += 1
                continue
            if self._selection.is_misdated(source, self._now_s):
                self.survey.misdated += 1
                self.survey.first_misdated = self.survey.first_misdated or self.survey.reasons.total() + 1
            self.survey.reasons[reason] += 1
            planned.append(PlannedSource(source, reason))
        return planned

    def _select(self, sources: Iterator[Source]) -> Iterator[Source]:
        for source in sources:
            self.survey.listed += 1
            if self.survey.empty_prefixes:
                self.survey.empty_prefixes = self._selection.list_empty(self.survey.empty_prefixes, source)
            if self._selection.admits(source):
                self.survey.selected += 1
                yield source
