"""A store's listing, page by page, in; sources that may hold scans, judged by their names alone, out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, TypeVar

from darnet.errors import StorageError
from darnet.scan import Source, StoredObject

ItemT = TypeVar("ItemT")

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".zip")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
STRAY_SUFFIXES = frozenset(
    ".bak .css .csv .db .doc .docx .gif .htm .html .ini .js .json .log .md .md5 .parquet .pdf .ps1 .py .rtf .sh .sha1"
    " .sha256 .svg .tmp .toml .tsv .txt .xls .xlsx .xml .yaml .yml".split()
)
STRAY_NAMES = frozenset(
    "authors changelog changes checksums citation dicomdir lockfile makefile manifest notice version".split()
)
FUTURE_S = 86_400.0  # Source: ours; more than any mistaken time zone (14 hours), and over by the next night
STRAY_STEMS = ("thumb", "preview")
STRAY_BEGINNINGS = ("copying", "copyright", "licence", "license", "readme", "_success")


def list_sources(objects: Iterable[StoredObject]) -> Iterator[Source]:
    """Group a sorted listing into sources as it streams; nothing is opened and no more than one branch is held.

    A prefix that directly holds slice files is one source, each volume file or zip another. Stray files
    (licences, text, thumbnails, DICOMDIR, dot files) are left out.
    Raises: StorageError if the listing is not sorted, since a prefix could then come twice.
    """
    branch: list[tuple[str, list[StoredObject]]] = []
    previous = b""
    for number, item in enumerate(objects, 1):
        order = encode_key(item.key)
        if order < previous:  # keys may name patients, and are told to nobody
            raise StorageError(
                f"the listing is not sorted at its object {number}; use a store that lists by the bytes of its keys, "
                "as AWS S3 does in general purpose buckets"
            )
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
    name = key.rpartition("/")[2].lower()
    if not name or name.startswith((".", "__macosx")) or "__MACOSX/" in key:
        return True
    stem, dot, suffix = name.rpartition(".")  # a million times a night: PurePosixPath takes five times as long
    if not suffix or not dot or suffix.isdigit():  # a version or a UID ends in a number
        return name.startswith((*STRAY_STEMS, *STRAY_BEGINNINGS)) or name in STRAY_NAMES
    return f".{suffix}" in STRAY_SUFFIXES or stem.startswith(STRAY_STEMS)


@dataclass(frozen=True)
class Selection:
    """Which sources of an archive a night looks at: by default every one.

    `prefixes` and `glob` are matched with the source's key, where `*` also takes a `/`; `since` with the time of its
    newest object. A source whose newest object is younger than `settle_s` seconds is still arriving.
    """

    prefixes: tuple[str, ...] = ()
    since: datetime | None = None
    glob: str = "*"
    settle_s: float = 0.0

    def list_prefixes(self) -> list[str]:
        """What to list, in the order of a listing: prefixes within others are left out."""
        chosen: list[str] = []
        for prefix in sorted(self.prefixes or ("",), key=encode_key):
            if not chosen or not prefix.startswith(chosen[-1]):
                chosen.append(prefix)
        return chosen

    def admits(self, source: Source) -> bool:
        """Whether to look at a source: also not at one of which a prefix lists only a part."""
        if not _name_folder(source).startswith(self.prefixes or ""):
            return False
        if self.since is not None and source.modified_s < self.since.timestamp():
            return False
        return fnmatchcase(source.key, self.glob)

    def list_empty(self, prefixes: Sequence[str], source: Source) -> list[str]:
        """Those of some prefixes that select nothing yet, now that a source was listed; whenever that is from."""
        if not fnmatchcase(source.key, self.glob):
            return list(prefixes)
        return [prefix for prefix in prefixes if not _name_folder(source).startswith(prefix)]

    def is_arriving(self, source: Source, now_s: float) -> bool:
        """Whether a source may not be whole yet: its newest object is young, or from a future that still comes soon."""
        return self.settle_s > 0 and now_s - self.settle_s < source.modified_s <= now_s + FUTURE_S

    def is_misdated(self, source: Source, now_s: float) -> bool:
        """Whether a source's time says nothing of whether it is whole. Waiting for it would take days or years."""
        return self.settle_s > 0 and source.modified_s > now_s + FUTURE_S

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        since = None if self.since is None else self.since.isoformat()
        return {"prefixes": self.list_prefixes(), "since": since, "glob": self.glob, "settle_s": self.settle_s}


EVERYTHING = Selection()


def encode_key(key: str) -> bytes:
    """What listings are sorted by."""
    return key.encode("utf-8", "surrogateescape")


def batch_by(items: Iterable[ItemT], weigh: Callable[[ItemT], int], limit: int) -> Iterator[list[ItemT]]:
    """Items in their order, in batches that end when they weigh `limit` or more."""
    batch: list[ItemT] = []
    weight = 0
    for item in items:
        batch.append(item)
        weight += weigh(item)
        if weight >= limit:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def _name_folder(source: Source) -> str:
    """What a source's key begins with for prefixes: a slash at its end, so that none ends within it unnoticed."""
    return "" if source.key == "." else f"{source.key.rstrip('/')}/"


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
    """A source whose slices lie at the archive's root is called ".".

    A prefix named like a volume file, or ".", keeps its slash: S3 may hold `x.zip` beside `x.zip/1.dcm`. So it does
    where it ends in slashes of its own: S3 may also hold `x.zip//1.dcm`.
    """
    prefix, objects = branch
    name = prefix.rstrip("/")
    is_ambiguous = name == "." or name.lower().endswith(VOLUME_SUFFIXES)
    return Source(f"{prefix}/" if is_ambiguous else prefix or ".", tuple(objects))
