"""From the files of a source to the network's input, as a decoding child walks it: find its scans, decode each.

Hostile bytes may have made whatever is read here: the owner of the child (`darnet.ingest`) takes only nouns back.
"""

import functools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from darnet.archive import VOLUME_SUFFIXES
from darnet.config import DecodeConfig, VolumeConfig
from darnet.decode import check_size, open_images, open_volume, read_dicom_slice
from darnet.errors import ScanError, Status, name_file
from darnet.lung import has_lung, mask_outside_lung, segment_lung
from darnet.pseudonym import pseudonymise
from darnet.reading.dicom import DicomSeries, SliceHeader, arrange_series, hash_series_uid
from darnet.reading.excerpt import ExcerptsTooShort
from darnet.reading.series import sort_files
from darnet.reading.zipped import unpack_zip
from darnet.scan import FloatArray, IngestedScan, Intensity, ScanFacts, SliceStack, StagedFile
from darnet.threads import set_decoder_threads
from darnet.volume import list_contributions, make_standard_volume


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


def run_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """What the sandbox calls: `find_scans` for a source, `list_read_files` and `decode_scan` for each of its scans.

    An error that nobody thought of is told by its name alone, as its owner knows no class of it.
    """
    set_decoder_threads()
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
            return _find_slices(source_key, unpack_zip(path, folder, road.decode), road)
        except ScanError as error:
            return [refuse_scan(source_key, _count(staged), error)]
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
    uids = Counter(hash_series_uid(uid) for uid in files.series)
    for uid, headers in sorted(files.series.items()):
        if uids[hash_series_uid(uid)] > 1:
            continue
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
    for digest in (digest for digest, num_series in uids.items() if num_series > 1):
        headers = [header for uid, part in files.series.items() if hash_series_uid(uid) == digest for header in part]
        told = "series whose UIDs have one digest; put them into sources of their own"
        refused = IngestedScan(f"{source_key}#{digest}", Status.BAD_MIXED_SERIES, told, _describe_series(headers))
        found.append(refused)
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
        return refuse_scan(found.scan_id, facts, error)


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


def refuse_scan(scan_id: str, facts: ScanFacts, error: Exception) -> IngestedScan:
    """What a scan, or a source whose scans are not known, becomes where it ends in an error.

    Decoders meet input nobody thought of, and what they say of it may hold DICOM values: only its kind is told.
    """
    if isinstance(error, ScanError):
        return IngestedScan(scan_id, error.status, error.detail, facts)
    return IngestedScan(scan_id, Status.ERR_DECODER_CRASH, _name_unexpected(error), facts)


def _name_unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}"
