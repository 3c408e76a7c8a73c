"""A source in; its scans out, each with a status and, where that is OK, the network's input.

This is the one road from bytes to network input: training and scoring both take it.
"""

import functools
import lzma
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
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
from darnet.reading.sandbox import Sandbox
from darnet.reading.series import IMAGE_SUFFIXES, sort_files
from darnet.scan import FloatArray, IngestedScan, Intensity, ScanFacts, SliceStack, Source, StagedFile, StoredObject
from darnet.storage import Store, transfer_all
from darnet.storage_local import check_unchanged as check_file
from darnet.volume import make_standard_volume

DECODE_TARGET = "darnet.ingest:run_step"
# The number of a slice behind two letters at most: too little for a patient's name, number or UID. Source: ours.
HARMLESS_NAME = re.compile(r"[a-z]{0,2}[-_]?0*[0-9]{1,4}(\.[a-z]{2,5})?", re.IGNORECASE)


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
    """A scan as its headers tell of it, before its pixels; travels to the child, which opens it."""

    scan_id: str
    facts: ScanFacts
    open_stack: Callable[[], SliceStack]


class Ingester:
    """Fetches sources from a store and decodes them in a child process of its own, one after another.

    A source's headers are read in one call of the child, and each scan is decoded in one of its own, every call under
    the limits of time and memory: what one scan does to its decoder costs the others nothing.
    """

    def __init__(self, store: Store, road: Road, sandbox: Sandbox | None = None) -> None:
        self._store = store
        self._road = road
        self._sandbox = sandbox or Sandbox(DECODE_TARGET, road.decode.memory_bytes, road.decode.timeout_s)

    def ingest(self, source: Source) -> list[IngestedScan]:
        """Every scan of the source, at least one; what cannot be scored has a status that says why."""
        clock = _Clock()
        try:
            with tempfile.TemporaryDirectory(prefix="darnet-") as folder:
                scans = self._read(source, Path(folder), clock)
        except OSError as error:  # also where there is no room for the folder itself
            trouble = ScanError(Status.ERR_STORAGE, f"{error.strerror} on the decoding machine")
            scans = [_refuse(source.key, _count_objects(source), trouble)]
        # Headers are read for all scans of a source at once, so that each has an equal part in the time they took.
        shared_s = (clock.decode_s - sum(scan.decode_s for scan in scans)) / len(scans)
        return [replace(scan, fetch_s=clock.fetch_s, decode_s=scan.decode_s + shared_s) for scan in scans]

    def _read(self, source: Source, folder: Path, clock: "_Clock") -> list[IngestedScan]:
        try:
            with clock.time("fetch_s"):
                staged = stage_source(self._store, source, folder)
            try:
                with clock.time("decode_s"):
                    found = self._sandbox.call(find_scans, source.key, staged, folder, self._road)
                    scans = [self._decode(item) if isinstance(item, FoundScan) else item for item in found]
            finally:  # what went wrong with a source that changed says nothing of the one that was planned
                check_unchanged(self._store, source)
            return scans
        except (RunError, OSError):
            raise
        except Exception as error:  # before its scans are known, the source becomes a row
            return [_refuse(source.key, _count_objects(source), error)]

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
        """End the child process."""
        self._sandbox.close()


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
            setattr(self, stage, time.perf_counter() - start_s)


def _refuse(scan_id: str, facts: ScanFacts, error: Exception) -> IngestedScan:
    """What a scan, or a source whose scans are not known, becomes where it ends in an error.

    Decoders meet input nobody thought of, and what they say of it may hold DICOM values: only its kind is told.
    """
    if isinstance(error, ScanError):
        return IngestedScan(scan_id, error.status, error.detail, facts)
    return IngestedScan(scan_id, Status.ERR_DECODER_CRASH, f"unexpected {type(error).__name__}", facts)


def _count_objects(source: Source) -> ScanFacts:
    return ScanFacts(num_files=len(source.objects), num_bytes=source.num_bytes)


def stage_source(store: Store, source: Source, folder: Path) -> list[StagedFile]:
    """Put the source's objects on this disk under names any decoder accepts: links where they are here already.

    Raises: ScanError, CredentialsError, as `Store.fetch`.
    """
    staged, remote = [], []
    for index, item in enumerate(source.objects):
        suffixes = [suffix for suffix in (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES) if item.key.lower().endswith(suffix)]
        path = folder / f"{index:06d}{max(suffixes, key=len, default='')}"
        file = StagedFile(PurePosixPath(item.key).name, path, _label_object(source, index))
        here = store.local_path(item.key)
        if here is not None:
            path.symlink_to(here)
        else:
            remote.append((item, file))
        staged.append(file)
    transfer_all(functools.partial(_fetch, store), remote)
    check_unchanged(store, source)
    return staged


def _fetch(store: Store, wanted: tuple[StoredObject, StagedFile]) -> None:
    item, file = wanted
    with name_file(file.label):
        store.fetch(item, file.path)


def _label_object(source: Source, index: int) -> str:
    """Name a file by its own name where that is but a number, else by its place in the sorted source."""
    name = PurePosixPath(source.objects[index].key).name
    return name if HARMLESS_NAME.fullmatch(name) else f"file {index + 1} of {len(source.objects)}"


def _label_entry(index: int, entries: Sequence[zipfile.ZipInfo]) -> str:
    return f"entry {index + 1} of {len(entries)}"


def check_unchanged(store: Store, source: Source) -> None:
    """Files read in place must still be the planned ones; fetched ones were checked while they were fetched.

    Raises: ScanError, as `storage_local.check_unchanged`.
    """
    for index, item in enumerate(source.objects):
        path = store.local_path(item.key)
        if path is None:
            return
        with name_file(_label_object(source, index)):
            check_file(path, item)


def run_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """What the sandbox calls: `find_scans` once for a source, `decode_scan` for each of its scans."""
    set_decoder_threads(1)
    return step(*arguments)


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
        return [FoundScan(source_key, _count(staged), functools.partial(open_volume, path, road.decode))]
    return _find_slices(source_key, staged, road)


def _find_slices(source_key: str, staged: Sequence[StagedFile], road: Road) -> list[FoundScan | IngestedScan]:
    """Every DICOM series is a scan, and so are slice images unless they are thumbnails beside DICOM.

    The row named like the source itself is that of the images, or of unreadable files that no series can be blamed for.
    """
    files = sort_files(staged, road.decode.min_slices)
    images = files.images
    found: list[FoundScan | IngestedScan] = [
        FoundScan(
            f"{source_key}#{hash_series_uid(uid)}",
            _describe_series(headers, road.pseudonym_key),
            functools.partial(_open_series, headers, road.decode, files.spoiling[uid]),
        )
        for uid, headers in sorted(files.series.items())
    ]
    if files.unplaced:
        facts = _count([*(fragment.file for fragment in files.unplaced), *images])
        found.append(IngestedScan(source_key, Status.BAD_UNREADABLE, files.unplaced[0].error.detail, facts))
    elif images:
        is_head_first = (road.volume.slice_order == "head_first") != (source_key in road.reversed_sources)
        open_stack = functools.partial(open_images, images, road.decode, is_head_first=is_head_first)
        found.append(FoundScan(source_key, _count(images), open_stack))
    return found or [IngestedScan(source_key, Status.BAD_UNREADABLE, "no file is a slice", _count(staged))]


def _open_series(headers: Sequence[SliceHeader], limits: DecodeConfig, unreadable: Sequence[ScanError]) -> SliceStack:
    """One DICOM series; an unreadable file spoils the series it lies with."""
    return DicomStack(arrange_series(headers, limits, unreadable))


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
        if config.mask_outside_lung:
            volume = replace(volume, voxels=mask_outside_lung(volume, config.window_hu))
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


def _describe_series(headers: Sequence[SliceHeader], pseudonym_key: bytes | None) -> ScanFacts:
    first = headers[0]
    return ScanFacts(
        num_files=len(headers),
        num_bytes=sum(header.file.path.stat().st_size for header in headers),
        num_slices=len(headers),
        manufacturer=first.manufacturer,
        patient_key=pseudonymise(first.patient_id, "patient", pseudonym_key),
        series_key=pseudonymise(first.series_uid, "series", pseudonym_key),
    )


def _count(files: Sequence[StagedFile]) -> ScanFacts:
    return ScanFacts(num_files=len(files), num_bytes=sum(file.path.stat().st_size for file in files))


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
