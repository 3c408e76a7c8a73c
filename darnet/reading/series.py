"""The files of one source in; what they belong to out: DICOM series with what spoils each, slice images, and the rest.

Files are judged by their headers, and where those are lost by what their names have in common with others.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from darnet.archive import IMAGE_SUFFIXES
from darnet.errors import ScanError, Status, name_file
from darnet.reading.dicom import SliceHeader, read_header
from darnet.reading.excerpt import ExcerptsTooShort, MissingBytes
from darnet.scan import StagedFile

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
THUMBNAIL_SHARE = 0.5  # of the images, more than which show a file of the same name; a scan of its own shares few


@dataclass(frozen=True)
class Fragment:
    """A file that should be a slice and is not whole: what is left of its SeriesInstanceUID, and what is wrong."""

    file: StagedFile
    uid_start: str
    error: ScanError


@dataclass(frozen=True)
class SortedFiles:
    """A source's files by what they belong to; series and what spoils them by SeriesInstanceUID."""

    series: dict[str, list[SliceHeader]]
    spoiling: dict[str, list[ScanError]]
    unplaced: list[Fragment]
    images: list[StagedFile]


def sort_files(staged: Sequence[StagedFile], min_slices: int) -> SortedFiles:
    """Find each file's place. Thumbnails and strays have none and are left out.

    A fragment spoils the series it lies with: the only one of the source, or else every series whose UID begins with
    what is left of the fragment's and whose files are named alike. So a lost slice may take two series with it that
    share names and folder, and never leaves one that looks whole. A fragment named like no series is unplaced.
    Raises: ExcerptsTooShort, where files are no slices by what is there of them, or may be none.
    """
    images = [file for file in staged if file.name.lower().endswith(IMAGE_SUFFIXES)]
    headers, fragments = _read_headers([file for file in staged if not file.name.lower().endswith(IMAGE_SUFFIXES)])
    if (headers or fragments) and _are_thumbnails(images, staged, min_slices):
        images = []
    headers, cut = _set_apart(headers)
    series, spoiling, unplaced = defaultdict(list), defaultdict(list), []
    for header in headers:
        series[header.series_uid].append(header)
    for fragment in [*fragments, *cut]:
        uids = list(_find_series(fragment, series))
        for uid in uids:
            spoiling[uid].append(fragment.error)
        if not uids:
            unplaced.append(fragment)
    return SortedFiles(series, spoiling, unplaced, images)


def _read_headers(files: Sequence[StagedFile]) -> tuple[list[SliceHeader], list[Fragment]]:
    """Headers of the DICOM files, and a fragment for each file that claims to be one and is not."""
    headers, fragments, others, short = [], [], [], []
    for file in files:
        try:
            with name_file(file.label):
                header = read_header(file)
        except MissingBytes:
            short.append(file.path)
        except ScanError as error:
            fragments.append(Fragment(file, "", error))
        else:
            if header is None:
                others.append(file)
            else:
                headers.append(header)
    short += [file.path for file in (*others, *(fragment.file for fragment in fragments)) if file.spans is not None]
    if short:
        raise ExcerptsTooShort(short)
    suffixes = {*DICOM_SUFFIXES, *(_find_suffix(header.file) for header in headers)}
    for file in others:
        if _claims_dicom(file, suffixes):
            reason = ScanError(Status.BAD_UNREADABLE, f"{file.label}: should be DICOM and is not")
            fragments.append(Fragment(file, "", reason))
    return headers, fragments


def _claims_dicom(file: StagedFile, suffixes: set[str]) -> bool:
    """Whether a file that is no DICOM was one, judged by its name; strays known by name never come here."""
    is_numbered = _find_suffix(file) == "" and any(sign.isdigit() for sign in PurePosixPath(file.name).name)
    return is_numbered or _find_suffix(file) in suffixes or file.path.stat().st_size == 0


def _find_suffix(file: StagedFile) -> str:
    """The suffix, none for a number: DICOM files are often called after their UID."""
    suffix = PurePosixPath(file.name).suffix.lower()
    return "" if suffix[1:].isdigit() else suffix


def _set_apart(headers: Sequence[SliceHeader]) -> tuple[list[SliceHeader], list[Fragment]]:
    """Part headers that name their series from those cut before or in its UID: such a UID is the start of a sound one.

    Without a single sound header nothing can be told, and every header is taken at its word.
    """
    sound = {header.series_uid for header in headers if header.damage is None} - {""}
    whole, fragments = [], []
    for header in headers:
        if header.series_uid in sound or not any(uid.startswith(header.series_uid) for uid in sound):
            whole.append(header)
            continue
        error = header.damage or ScanError(Status.BAD_HEADER, "SeriesInstanceUID is missing")
        named = ScanError(error.status, f"{header.file.label}: {error.detail}")
        fragments.append(Fragment(header.file, header.series_uid, named))
    return whole, fragments


def _find_series(fragment: Fragment, series: dict[str, list[SliceHeader]]) -> Iterator[str]:
    """The UIDs of the series that a fragment lies with."""
    pattern = _find_pattern(fragment.file)
    for uid, members in series.items():
        is_alike = any(_find_pattern(member.file) == pattern for member in members)
        if len(series) == 1 or (is_alike and uid.startswith(fragment.uid_start)):
            yield uid


def _find_pattern(file: StagedFile) -> str:
    """A name without its numbers, UIDs included."""
    return re.sub(r"[\d.]+", "#", file.name.lower())


def _are_thumbnails(images: Sequence[StagedFile], staged: Sequence[StagedFile], min_slices: int) -> bool:
    """Whether images beside DICOM are too few for a scan, or most show a file of the same name, readable or not."""
    names = {file.name for file in staged} - {image.name for image in images}
    names |= {name.rpartition(".")[0] for name in names}
    num_shown = sum(image.name.rpartition(".")[0] in names for image in images)
    return len(images) < min_slices or num_shown > THUMBNAIL_SHARE * len(images)
