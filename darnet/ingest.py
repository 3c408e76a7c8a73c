"""A source in; its scans out, each with a status and, where that is OK, the network's input.

This is the one road from bytes to network input: training and scoring both take it.
"""

import functools
import lzma
import pickle
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from darnet.archive import VOLUME_SUFFIXES, is_stray
from darnet.config import DecodeConfig, VolumeConfig
from darnet.decode import (
    check_size,
    open_images,
    open_volume,
    read_dicom_slice,
    set_decoder_threads,
)
from darnet.errors import RunError, ScanError, Status, name_file
from darnet.lung import has_lung, mask_outside_lung, segment_lung
from darnet.pseudonym import pseudonymise
from darnet.reading.dicom import DicomSeries, SliceHeader, arrange_series, hash_series_uid
from darnet.reading.excerpt import ExcerptsTooShort
from darnet.reading.sandbox import Sandbox
from darnet.reading.series import IMAGE_SUFFIXES, sort_files
from darnet.scan import (
    CropBox,
    FloatArray,
    IngestedScan,
    Intensity,
    Manufacturer,
    ScanFacts,
    SliceStack,
    Source,
    StagedFile,
    StandardVolume,
)
from darnet.staging import EXCERPTS, Excerpts, Staging
from darnet.storage import Store
from darnet.volume import list_contributions, make_standard_volume

CPU_MARGIN_S = 30.0  # Source: ours; what threads that libraries start beside those that decode may take of a call
DOUBTFUL = frozenset({Status.ERR_DECODER_CRASH, Status.ERR_MEMORY})  # what a wrong bit of an excerpt may be behind


@dataclass(frozen=True)
class DicomStack:
    """A DICOM series whose slices are decoded when asked for."""

    series: DicomSeries
    intensity: Intensity = Intensity.HU

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns in canonical axes."""
        return self.series.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(z, y, x) in mm."""
        return self.series.spacing_mm

    def read_slice(self, index: int) -> FloatArray:
        """One slice, head first, (rows, columns) float32 HU.

        Raises: ScanError(BAD_PIXELS) naming the file.
        """
        file = self.series.files[index]
        assert file.spans is None or file.path.exists(), "pixels of an excerpt"
        with name_file(file.label):
            pixels = self.series.turn(read_dicom_slice(file.path, self.series.layouts[index]))
            return np.ascontiguousarray(check_size(pixels, self.shape[1:]))


@dataclass(frozen=True)
class Road:
    """What decides a network input: settings, limits, and the secret for patient and series keys.

    A road that travels has only the secret's mark: each node takes the secret from its own environment. One that
    `hides_keys` leads to scans that are named by keyed digests.
    `reversed_sources` are keys of slice-image folders that are stored the other way round than `slice_order` says.
    """

    volume: VolumeConfig
    decode: DecodeConfig
    pseudonym_key: bytes | None = None
    secret_mark: str | None = None
    hides_keys: bool = False
    reversed_sources: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Road(volume={self.volume!r}, decode={self.decode!r})"


@dataclass(frozen=True)
class FoundScan:
    """A scan as its headers tell of it, before its pixels.

    `opening` is a pickle of what opens it, which only a decoding child unpacks: hostile bytes may have made it. The
    identifiers are raw, for the child's owner to make keys of. `paths` are of the DICOM files from which it was told
    what the scan is: its slices, or whatever may spoil them.
    """

    scan_id: str
    facts: ScanFacts
    opening: bytes = field(repr=False)
    patient_id: str = field(default="", repr=False)
    series_uid: str = field(default="", repr=False)
    paths: tuple[Path, ...] = ()

    def open_stack(self) -> SliceStack:
        """The scan's slices. Raises: ScanError."""
        open_stack: Callable[[], SliceStack] = pickle.loads(self.opening)
        return open_stack()

    def name(self, pseudonym_key: bytes | None) -> "FoundScan":
        """The same with the keys of patient and series in its facts, in place of what they are made of."""
        facts = replace(
            self.facts,
            patient_key=pseudonymise(self.patient_id, pseudonym_key),
            series_key=pseudonymise(self.series_uid, pseudonym_key),
        )
        return replace(self, facts=facts, patient_id="", series_uid="")


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
    return Sandbox("darnet.ingest:run_step", limits.memory_bytes, limits.timeout_s, ANSWER_KINDS, cpu_s)


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
            scans = [_refuse(source.key, _count_objects(source), trouble)]
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
        if staging.took_excerpts and not DOUBTFUL.isdisjoint(scan.status for scan in scans):
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
            return [_refuse(staging.source.key, _count_objects(staging.source), error)]

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
            scan = _refuse(found.scan_id, found.facts, error)
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


def _refuse(scan_id: str, facts: ScanFacts, error: Exception) -> IngestedScan:
    """What a scan, or a source whose scans are not known, becomes where it ends in an error.

    Decoders meet input nobody thought of, and what they say of it may hold DICOM values: only its kind is told.
    """
    if isinstance(error, ScanError):
        return IngestedScan(scan_id, error.status, error.detail, facts)
    return IngestedScan(scan_id, Status.ERR_DECODER_CRASH, _name_unexpected(error), facts)


def _name_unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}"


def _count_objects(source: Source) -> ScanFacts:
    return ScanFacts(num_files=len(source.objects), num_bytes=source.num_bytes)


def _label_entry(index: int, entries: Sequence[zipfile.ZipInfo]) -> str:
    return f"entry {index + 1} of {len(entries)}"


def run_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """What the sandbox calls: `find_scans` for a source, `list_read_files` and `decode_scan` for each of its scans.

    An error that nobody thought of is told by its name alone, as its owner knows no class of it.
    """
    set_decoder_threads(1)
    try:
        return step(*arguments)
    except (ScanError, ExcerptsTooShort, OSError, MemoryError):
        raise
    except Exception as error:
        raise ScanError(Status.ERR_DECODER_CRASH, _name_unexpected(error)) from error


def find_scans(
    source_key: str, staged: Sequence[StagedFile], folder: Path, road: Road
) -> list[FoundScan | IngestedScan]:
    """All scans of one staged source, by its headers; those that can be refused by now are."""
    path = staged[0].path  # its suffix, and not the key's: a prefix may be called like a file
    if path.name.endswith(".zip"):
        try:
            return _find_slices(source_key, _unpack_zip(path, folder, road.decode), road)
        except ScanError as error:
            return [_refuse(source_key, _count(staged), error)]
    if path.name.endswith(VOLUME_SUFFIXES):
        return [FoundScan(source_key, _count(staged), _pack(open_volume, path, road.decode))]
    return _find_slices(source_key, staged, road)


def _find_slices(source_key: str, staged: Sequence[StagedFile], road: Road) -> list[FoundScan | IngestedScan]:
    """Every DICOM series is a scan, and so are slice images unless they are thumbnails beside DICOM.

    The row named like the source itself is that of the images, or of unreadable files that no series can be blamed for.
    """
    files = sort_files(staged, road.decode.min_slices)
    images = files.images
    found: list[FoundScan | IngestedScan] = []
    for uid, headers in sorted(files.series.items()):
        told_by = staged if files.spoiling[uid] else [header.file for header in headers]
        found.append(
            FoundScan(
                f"{source_key}#{hash_series_uid(uid)}",
                _describe_series(headers),
                _pack(_open_series, headers, road.decode, files.spoiling[uid]),
                headers[0].patient_id,
                headers[0].series_uid,
                tuple(file.path for file in told_by),
            )
        )
    if files.unplaced:
        facts = _count([*(fragment.file for fragment in files.unplaced), *images])
        found.append(IngestedScan(source_key, Status.BAD_UNREADABLE, files.unplaced[0].error.detail, facts))
    elif images:
        is_head_first = (road.volume.slice_order == "head_first") != (source_key in road.reversed_sources)
        opening = _pack(open_images, images, road.decode, is_head_first=is_head_first)
        found.append(FoundScan(source_key, _count(images), opening))
    return found or [IngestedScan(source_key, Status.BAD_UNREADABLE, "no file is a slice", _count(staged))]


def _pack(open_stack: Callable[..., SliceStack], *arguments: Any, **settings: Any) -> bytes:
    return pickle.dumps(functools.partial(open_stack, *arguments, **settings), protocol=pickle.HIGHEST_PROTOCOL)


def _open_series(headers: Sequence[SliceHeader], limits: DecodeConfig, unreadable: Sequence[ScanError]) -> SliceStack:
    """One DICOM series; an unreadable file spoils the series it lies with."""
    return DicomStack(arrange_series(headers, limits, unreadable))


def list_read_files(found: FoundScan, config: VolumeConfig) -> list[Path]:
    """Where the files of a DICOM series must be whole for `decode_scan`: those that its row tells of.

    These are the slices that contribute, the first and the last, from which spacing is measured, and the one whose
    header speaks for the series. The headers of the others only have to agree with them. Of what headers refuse, as
    they do a scout, no pixels are read.
    """
    try:
        stack = found.open_stack()
    except ScanError:
        return []
    if not isinstance(stack, DicomStack):
        return []
    series, num_slices = stack.series, stack.shape[0]
    read = {item.source for item in list_contributions(num_slices, config.shape[0], config.depth_resampling)}
    return [series.spokesman.path, *(series.files[index].path for index in read | {0, num_slices - 1})]


def decode_scan(found: FoundScan, config: VolumeConfig, num_threads: int = 1) -> IngestedScan:
    """One scan to the network's input; whatever is wrong with it ends here."""
    facts = found.facts
    try:
        stack = found.open_stack()
        facts = _measure(facts, stack)
        volume = make_standard_volume(stack, config, num_threads)
        lung = None
        if volume.intensity is Intensity.HU:
            lung = segment_lung(volume, config.window_hu)
            if not has_lung(lung, volume):
                raise ScanError(Status.SKIP_NO_LUNG, "no lung in the scan")
        if config.mask_outside_lung != "no":
            volume = replace(volume, voxels=mask_outside_lung(volume, config.window_hu, config.mask_outside_lung))
            if not volume.voxels.any():
                raise ScanError(Status.SKIP_NO_LUNG, "no lung in the images, so nothing could be masked")
        return IngestedScan(found.scan_id, Status.OK, "", facts, volume, lung)
    except MemoryError:
        raise
    except Exception as error:
        return _refuse(found.scan_id, facts, error)


def _measure(facts: ScanFacts, stack: SliceStack) -> ScanFacts:
    spacing_mm = stack.spacing_mm
    return replace(
        facts,
        intensity=stack.intensity,
        num_slices=stack.shape[0],
        num_rows=stack.shape[1],
        num_columns=stack.shape[2],
        slice_spacing_mm=None if spacing_mm is None else round(spacing_mm[0], 6),
        pixel_spacing_mm=None if spacing_mm is None else round(spacing_mm[1], 6),
    )


def _describe_series(headers: Sequence[SliceHeader]) -> ScanFacts:
    return ScanFacts(
        num_files=len(headers),
        num_bytes=sum(header.file.header_path.stat().st_size for header in headers),
        num_slices=len(headers),
        manufacturer=headers[0].manufacturer,
    )


def _count(files: Sequence[StagedFile]) -> ScanFacts:
    return ScanFacts(num_files=len(files), num_bytes=sum(file.header_path.stat().st_size for file in files))


def _unpack_zip(path: Path, folder: Path, limits: DecodeConfig) -> list[StagedFile]:
    """Unpack a zip's slices under names of our own, so that no name in it can reach another folder.

    Raises: ScanError: BAD_ZIP for a damaged, encrypted or hostile zip, BAD_LIMIT for one that unpacks too large.
    """
    staged = []
    with _zip_errors(), zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir() and not is_stray(entry.filename)]
        _check_zip(entries, limits)
        if any(_is_outside(entry.filename) for entry in archive.infolist()):
            raise ScanError(Status.BAD_ZIP, "the zip places a file outside itself that is no slice")
        for index, entry in enumerate(entries):
            suffix = PurePosixPath(entry.filename).suffix.lower()
            target = folder / f"zip{index:06d}{suffix if suffix in IMAGE_SUFFIXES else ''}"
            label = _label_entry(index, entries)
            # In pieces: a whole read inflates all there is, however little the entry says.
            with name_file(label), _zip_errors(), archive.open(entry) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
            staged.append(StagedFile(entry.filename, target, label))
    return staged


@contextmanager
def _zip_errors() -> Iterator[None]:
    """Whatever a damaged zip makes its reader raise is BAD_ZIP."""
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ScanError(Status.BAD_ZIP, f"does not unpack: {type(error).__name__}") from error


def _is_outside(name: str) -> bool:
    """Whether some system would unpack a file of this name outside of the folder it is unpacked to."""
    path = PureWindowsPath(name)  # takes both separators
    return ".." in path.parts or bool(path.root)


def _check_zip(entries: Sequence[zipfile.ZipInfo], limits: DecodeConfig) -> None:
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        with name_file(_label_entry(index, entries)):
            if entry.flag_bits & 1:
                raise ScanError(Status.BAD_ZIP, "encrypted in the zip")
            if _is_outside(entry.filename):
                raise ScanError(Status.BAD_ZIP, "the zip places it outside itself")
            if entry.filename in seen:
                raise ScanError(Status.BAD_ZIP, "twice in the zip")
            seen.add(entry.filename)
    if len(entries) > limits.max_slices or sum(entry.file_size for entry in entries) > limits.max_scan_bytes:
        raise ScanError(Status.BAD_LIMIT, f"zip of {len(entries)} files is too large")
