"""A store's listing, page by page, in; sources that may hold scans, judged by their names alone, out."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from darnet.scan import Source, StoredObject

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".zip")
STRAY_SUFFIXES = frozenset(
    ".bak .css .csv .db .doc .docx .gif .htm .html .ini .js .json .log .md .md5 .parquet .pdf .ps1 .py .rtf .sh .sha1"
    " .sha256 .svg .tmp .toml .tsv .txt .xls .xlsx .xml .yaml .yml".split()
)
STRAY_NAMES = frozenset(
    "authors changelog changes checksums citation copying dicomdir licence license lockfile makefile manifest notice"
    " readme version".split()
)
STRAY_STEMS = ("thumb", "preview")


def list_sources(objects: Iterable[StoredObject]) -> Iterator[Source]:
    """Group a sorted listing into sources as it streams; nothing is opened and no more than one branch is held.

    A prefix that directly holds slice files is one source, each volume file or zip another. Stray files
    (licences, text, thumbnails, DICOMDIR, dot files) are left out.
    Raises: ValueError if the listing is not sorted, since a prefix could then come twice.
    """
    branch: list[tuple[str, list[StoredObject]]] = []
    previous = b""
    for item in objects:
        order = item.key.encode("utf-8", "surrogateescape")
        if order < previous:
            raise ValueError(f"listing is not sorted at {item.key!r}")
        previous = order
        if is_stray(item.key):
            continue
        while branch and not _is_below(item.key, branch[-1][0]):
            yield _close(branch.pop())
        if item.key.lower().endswith(VOLUME_SUFFIXES):
            yield Source(item.key, (item,))
            continue
        prefix = item.key.rpartition("/")[0]
        if not branch or branch[-1][0] != prefix:
            branch.append((prefix, []))
        branch[-1][1].append(item)
    while branch:
        yield _close(branch.pop())


def is_stray(key: str) -> bool:
    """Whether a file, by its name, is none of a scan's."""
    name = PurePosixPath(key).name.lower()
    if key.endswith("/") or name.startswith((".", "__macosx")) or "__MACOSX/" in key:
        return True
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    if suffix in STRAY_SUFFIXES or stem.startswith(STRAY_STEMS):
        return True
    return suffix == "" and stem in STRAY_NAMES


def name_format(source: Source) -> str:
    """The file format of a source by its names: the commonest suffix, without its dot; `none` where there is none."""
    suffixes = Counter(_find_suffix(item.key) for item in source.objects)
    return max(sorted(suffixes), key=lambda suffix: suffixes[suffix]) or "none"


def _find_suffix(key: str) -> str:
    name = PurePosixPath(key).name.lower()
    known = [suffix for suffix in VOLUME_SUFFIXES if name.endswith(suffix)]
    suffix = max(known, key=len, default=PurePosixPath(name).suffix).removeprefix(".")
    return "" if suffix.isdigit() else suffix  # DICOM files are often called after their UID


def _is_below(key: str, prefix: str) -> bool:
    return prefix == "" or key.startswith(prefix + "/")


def _close(branch: tuple[str, list[StoredObject]]) -> Source:
    """A source whose slices lie at the archive's root is called "."."""
    prefix, objects = branch
    return Source(prefix or ".", tuple(objects))
