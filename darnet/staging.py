"""A source's objects in; files on this machine's disk out, under names that any decoder accepts.

What is on this disk already is linked. Of large remote slices an excerpt comes first, with what their headers and the
checks of their lengths need, and the whole file when its pixels count.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from darnet.archive import IMAGE_SUFFIXES, VOLUME_SUFFIXES
from darnet.config import VolumeConfig
from darnet.errors import name_file
from darnet.scan import Source, StagedFile
from darnet.storage import Store, transfer_all
from darnet.storage_local import check_unchanged as check_file
from darnet.volume import list_contributions

# The number of a slice behind two letters at most: too little for a patient's name, number or UID. Source: ours.
HARMLESS_NAME = re.compile(r"[a-z]{0,2}[-_]?0*[0-9]{1,4}(\.[a-z]{2,5})?", re.IGNORECASE)
# Transfer syntaxes without fragments, whose length the header tells.
_NATIVE = [syntax.encode() for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)]


@dataclass(frozen=True)
class Excerpts:
    """Of which slices an excerpt comes first, how many bytes of their beginning and, if compressed, of their end.

    They must have `min_bytes`, and of all of them at most `max_share` contribute to the network's input: an excerpt
    costs a request. Source: ours; headers seen have 1 to 5 KB, private elements and icons take some tens, and below
    these limits 30 ms of waiting and 40 MB/s for one worker gain nothing (`make bench-fetching`).
    """

    min_bytes: int = 256 * 1024
    head_bytes: int = 64 * 1024
    tail_bytes: int = 4 * 1024
    max_share: float = 0.5


EXCERPTS = Excerpts()


class Staging:
    """One source's files in a folder, in the order of its objects; nothing is there before `fetch`.

    What is fetched raises ScanError and CredentialsError as `Store.fetch`.
    """

    def __init__(self, store: Store, source: Source, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.took_excerpts = False
        self._store = store
        self.files = [
            StagedFile(PurePosixPath(item.key).name, folder / _name_file(index, item.key), _label_object(source, index))
            for index, item in enumerate(source.objects)
        ]

    @property
    def has_excerpts(self) -> bool:
        """Whether some files are not whole."""
        return any(file.spans is not None for file in self.files)

    def fetch(self, config: VolumeConfig, excerpts: Excerpts = EXCERPTS) -> None:
        """Put every object here: a link, a whole file, or an excerpt of a slice that may not contribute."""
        remote = []
        for index, item in enumerate(self.source.objects):
            here = self._store.local_path(item.key)
            if here is None:
                remote.append(index)
            else:
                self.files[index].path.symlink_to(here)
        large = [index for index in remote if self._is_large_slice(index, excerpts)]
        chosen = large if _share_contributing(len(large), config) <= excerpts.max_share else []
        whole = set(remote).difference(chosen)
        transfer_all(
            lambda index: self._fetch(index) if index in whole else self._fetch_excerpt(index, excerpts), remote
        )
        self.check_unchanged()

    def complete(self, paths: Collection[Path] | None = None) -> bool:
        """Fetch whole what is an excerpt, of these files or of all; whether their excerpts had the same bytes.

        No checksum guards an excerpt.
        """
        chosen = [
            index
            for index, file in enumerate(self.files)
            if file.spans is not None and (paths is None or file.path in paths)
        ]
        wrong: list[int] = []
        transfer_all(lambda index: self._complete(index, wrong), chosen)
        return not wrong

    def check_unchanged(self) -> None:
        """Files read in place must still be the planned ones; fetched ones were checked while they were fetched.

        Raises: ScanError, as `storage_local.check_unchanged`.
        """
        for item, file in zip(self.source.objects, self.files, strict=True):
            path = self._store.local_path(item.key)
            if path is None:
                return
            with name_file(file.label):
                check_file(path, item)

    def _is_large_slice(self, index: int, excerpts: Excerpts) -> bool:
        item = self.source.objects[index]
        is_slice = not item.key.lower().endswith((*VOLUME_SUFFIXES, *IMAGE_SUFFIXES))
        return is_slice and item.num_bytes >= max(excerpts.min_bytes, excerpts.head_bytes + excerpts.tail_bytes)

    def _fetch(self, index: int) -> None:
        with name_file(self.files[index].label):
            self._store.fetch(self.source.objects[index], self.files[index].path)

    def _fetch_excerpt(self, index: int, excerpts: Excerpts) -> None:
        item, file = self.source.objects[index], self.files[index]
        head, tail = range(excerpts.head_bytes), range(item.num_bytes - excerpts.tail_bytes, item.num_bytes)
        part = replace(file, spans=(head,))
        with name_file(file.label):
            is_whole = self._store.fetch_span(item, part.header_path, head)
            if not is_whole and _has_fragments(_read_span(part.header_path, head)):
                part = replace(part, spans=(head, tail))
                is_whole = self._store.fetch_span(item, part.header_path, tail)
        if is_whole:
            part.header_path.rename(file.path)
        else:
            self.files[index], self.took_excerpts = part, True

    def _complete(self, index: int, wrong: list[int]) -> None:
        """No file is at its path before it is whole, so that nobody takes the zeros of an excerpt for pixels."""
        item, file = self.source.objects[index], self.files[index]
        fetched = file.path.with_name(f"{file.path.name}.fetched")
        with name_file(file.label):
            self._store.fetch(item, fetched)
        if any(_read_span(fetched, span) != _read_span(file.header_path, span) for span in file.spans or ()):
            wrong.append(index)
        fetched.rename(file.path)
        file.header_path.unlink()
        self.files[index] = replace(file, spans=None)


def _share_contributing(num_slices: int, config: VolumeConfig) -> float:
    """Of so many slices of one series; of none all, as there is nothing to spare."""
    if num_slices == 0:
        return 1.0
    found = list_contributions(num_slices, config.shape[0], config.depth_resampling)
    return len({item.source for item in found}) / num_slices


def _has_fragments(head: bytes) -> bool:
    """Whether a header names a compressed transfer syntax: a guess at what its reader will ask for, not a verdict."""
    _, is_named, rest = head.partition(b"\2\0\x10\0UI")
    syntax = rest[2 : 2 + int.from_bytes(rest[:2], "little")].rstrip(b"\0 ")
    return bool(is_named) and syntax not in _NATIVE


def _read_span(path: Path, span: range) -> bytes:
    with path.open("rb") as body:
        body.seek(span.start)
        return body.read(len(span))


def _name_file(index: int, key: str) -> str:
    """A number with the suffix by which decoders are chosen, if the key has such a one."""
    suffixes: Sequence[str] = [suffix for suffix in (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES) if key.lower().endswith(suffix)]
    return f"{index:06d}{max(suffixes, key=len, default='')}"


def _label_object(source: Source, index: int) -> str:
    """Name a file by its own name where that is but a number, else by its place in the sorted source."""
    name = PurePosixPath(source.objects[index].key).name
    return name if HARMLESS_NAME.fullmatch(name) else f"file {index + 1} of {len(source.objects)}"
