"""A source in; its scans out, each with a status and, where that is OK, the network's input.

This is the one road from bytes to network input: training and scoring both take it.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath

from darnet.config import DecodeConfig
from darnet.errors import RunError, ScanError, Status
from darnet.reading.excerpt import ExcerptsTooShort
from darnet.reading.road import FoundScan, Road, decode_scan, find_scans, list_read_files, refuse_scan
from darnet.reading.sandbox import Sandbox
from darnet.scan import CropBox, IngestedScan, Intensity, Manufacturer, ScanFacts, Source, StandardVolume
from darnet.staging import EXCERPTS, Excerpts, Staging
from darnet.storage import Store

CPU_MARGIN_S = 30.0  # Source: ours; what threads that libraries start beside those that decode may take of a call
DOUBTFUL = frozenset({Status.ERR_DECODER_CRASH, Status.ERR_MEMORY})  # what a wrong bit of an excerpt may be behind


class ExcerptWrong(Exception):  # noqa: N818
    """Headers were read in an excerpt that has other bytes than the file."""


# What a child's answer may be made of besides arrays: the nouns of a scan, and paths.
ANSWER_KINDS = (
    *(FoundScan, IngestedScan, ScanFacts, StandardVolume, CropBox, Intensity, Manufacturer),
    *(ExcerptsTooShort, PosixPath),
)


def make_sandbox(limits: DecodeConfig) -> Sandbox:
    """A child that decodes under these limits."""
    cpu_s = limits.num_threads * limits.timeout_s + CPU_MARGIN_S
    return Sandbox("darnet.reading.road:run_step", limits.memory_bytes, limits.timeout_s, ANSWER_KINDS, cpu_s)


class Ingester:
    """Fetches sources from a store and decodes them in a child process of its own, one after another.

    A source's headers are read in one call of the child, and each scan is decoded in one of its own, every call under
    the limits of time and memory: what one scan does to its decoder costs the others nothing.
    """

    def __init__(self, store: Store, road: Road, sandbox: Sandbox | None = None, excerpts: Excerpts = EXCERPTS) -> None:
        self._store = store
        self._road = road
        self._sandbox = sandbox or make_sandbox(road.decode)
        self._excerpts = excerpts
        self._fetcher = ThreadPoolExecutor(1, "fetch")  # one, so that a source is fetched after the one before it
        self._ahead: _Fetch | None = None

    def ingest(self, source: Source, following: Source | None = None) -> list[IngestedScan]:
        """Every scan of the source, at least one; what cannot be scored has a status that says why.

        Where the store is remote, `following` is fetched while this one is decoded, for the next call. Two at once may
        want more room than the disk has: what fails of that is read again by itself.
        """
        came_ahead = self._ahead is not None and self._ahead.staging.source == source
        scans = self._ingest(source, following)
        if any(scan.status is Status.ERR_STORAGE for scan in scans) and (came_ahead or self._ahead is not None):
            self.drop_ahead()
            scans = self._ingest(source, None)
        return scans

    def _ingest(self, source: Source, following: Source | None) -> list[IngestedScan]:
        clock = _Clock()
        try:
            with self._take(source) as fetch:
                clock = fetch.clock
                if following is not None and self._store.local_path(following.objects[0].key) is None:
                    with suppress(OSError):  # no room for its folder now: its own call tries again, and tells
                        self._ahead = self._begin(following)
                scans = self._read_twice(fetch)
        except OSError as error:  # also where there is no room for the folder itself
            trouble = ScanError(Status.ERR_STORAGE, f"{error.strerror} on the decoding machine")
            scans = [refuse_scan(source.key, _count_objects(source), trouble)]
        # A source is fetched and its headers are read for all its scans at once: each has an equal part in that time.
        shared_s = (clock.decode_s - sum(scan.decode_s for scan in scans)) / len(scans)
        fetch_s = clock.fetch_s / len(scans)
        return [replace(scan, fetch_s=fetch_s, decode_s=scan.decode_s + shared_s) for scan in scans]

    def drop_ahead(self) -> None:
        """Forget what was fetched for a next call, and delete it."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.delete()

    @contextmanager
    def _take(self, source: Source) -> Iterator["_Fetch"]:
        """A source that was begun by the call before, or is now."""
        if self._ahead is not None and self._ahead.staging.source != source:
            self.drop_ahead()
        fetch, self._ahead = self._ahead or self._begin(source), None
        try:
            yield fetch
        finally:
            fetch.delete()

    def _begin(self, source: Source) -> "_Fetch":
        folder, clock = tempfile.TemporaryDirectory(prefix="darnet-"), _Clock()
        staging = Staging(self._store, source, Path(folder.name))

        def fetch() -> None:
            with clock.time("fetch_s"):
                staging.fetch(self._road.volume, self._excerpts)

        return _Fetch(folder, staging, clock, self._fetcher.submit(fetch))

    def _read_twice(self, fetch: "_Fetch") -> list[IngestedScan]:
        """Read a source by excerpts of what does not contribute, and whole if they cannot be relied on.

        Nothing guards an excerpt's bits: a wrong one must not condemn a scan, and no row rests on one. The slices that
        a row tells of are whole (`list_read_files`); where a scan is refused, its others are fetched too, and must have
        the bytes of their excerpts (`_hold_refusals`).
        """
        staging, clock = fetch.staging, fetch.clock

        def complete() -> None:
            with clock.time("fetch_s"):
                staging.complete()

        scans = self._read(staging, clock, fetch.done.result)
        # A wrong bit may also hang, starve or kill a decoder, and none of these is final: the next night fetches anew.
        # But a hang has cost its whole time limit and would again; the other two end soon, and are worth a second look.
        statuses = {scan.status for scan in scans}
        if staging.took_excerpts and not DOUBTFUL.isdisjoint(statuses) and Status.ERR_TIMEOUT not in statuses:
            scans = self._read(staging, clock, complete)
        return scans

    def _read(self, staging: Staging, clock: "_Clock", fetch: Callable[[], object]) -> list[IngestedScan]:
        try:
            fetch()
            try:
                found = self._find(staging, clock)
                if staging.has_excerpts:
                    self._fetch_read_files(found, staging, clock)
                with clock.time("decode_s"):
                    scans = [self._decode(item) if isinstance(item, FoundScan) else item for item in found]
                if staging.has_excerpts:
                    self._hold_refusals(found, scans, staging, clock)
                return scans
            finally:  # what went wrong with a source that changed says nothing of the one that was planned
                staging.check_unchanged()
        except (RunError, OSError):
            raise
        except Exception as error:  # before its scans are known, the source becomes a row
            return [refuse_scan(staging.source.key, _count_objects(staging.source), error)]

    def _find(self, staging: Staging, clock: "_Clock") -> list["FoundScan | IngestedScan"]:
        def find() -> list[FoundScan | IngestedScan]:
            with clock.time("decode_s"):
                open_road, key = replace(self._road, pseudonym_key=None), self._road.pseudonym_key
                found: list[FoundScan | IngestedScan] = self._sandbox.call(
                    find_scans, staging.source.key, staging.files, staging.folder, open_road
                )
                return [item.name(key) if isinstance(item, FoundScan) else item for item in found]

        try:
            return find()
        except ExcerptsTooShort as short:
            with clock.time("fetch_s"):
                staging.complete(short.paths)
            return find()

    def _fetch_read_files(self, found: Sequence["FoundScan | IngestedScan"], staging: Staging, clock: "_Clock") -> None:
        """Fetch whole what decoding will read. Raises: ExcerptWrong; what `list_read_files` and the store raise."""
        with clock.time("decode_s"):
            scans = [item for item in found if isinstance(item, FoundScan)]
            paths = {path for scan in scans for path in self._sandbox.call(list_read_files, scan, self._road.volume)}
        with clock.time("fetch_s"):
            if not staging.complete(paths):
                raise ExcerptWrong

    def _hold_refusals(
        self,
        found: Sequence["FoundScan | IngestedScan"],
        scans: Sequence[IngestedScan],
        staging: Staging,
        clock: "_Clock",
    ) -> None:
        """Fetch whole what scans are refused for, once and for all. Raises: ExcerptWrong; what the store raises."""
        is_refused = [scan.status.is_final and scan.status is not Status.OK for scan in scans]
        refused = [item for item, is_out in zip(found, is_refused, strict=True) if is_out]
        with clock.time("fetch_s"):
            if not all(staging.complete(item.paths if isinstance(item, FoundScan) else None) for item in refused):
                raise ExcerptWrong

    def _decode(self, found: FoundScan) -> IngestedScan:
        start_s = time.perf_counter()
        try:
            scan: IngestedScan = self._sandbox.call(
                decode_scan, found, self._road.volume, self._road.decode.num_threads
            )
        except (RunError, OSError):
            raise
        except Exception as error:  # what ended the child, or could not leave it
            scan = refuse_scan(found.scan_id, found.facts, error)
        return replace(scan, decode_s=time.perf_counter() - start_s)

    def close(self) -> None:
        """End the child process, and what is fetched."""
        self.drop_ahead()
        self._fetcher.shutdown()
        self._sandbox.close()


@dataclass(frozen=True)
class _Fetch:
    """A source on its way to a folder of its own, in another thread; `done` holds what the store raised."""

    folder: "tempfile.TemporaryDirectory[str]"
    staging: Staging
    clock: "_Clock"
    done: "Future[None]"

    def delete(self) -> None:
        """Delete the folder, once nothing more comes."""
        wait([self.done])
        self.folder.cleanup()


@dataclass
class _Clock:
    """Seconds that a source took, also where it failed."""

    fetch_s: float = 0.0
    decode_s: float = 0.0

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start_s)


def _count_objects(source: Source) -> ScanFacts:
    return ScanFacts(num_files=len(source.objects), num_bytes=source.num_bytes)
