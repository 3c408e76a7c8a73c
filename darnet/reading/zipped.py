"""Zips of slices, unpacked where no name in them can lead elsewhere."""

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from darnet.archive import IMAGE_SUFFIXES, is_stray
from darnet.config import DecodeConfig
from darnet.errors import ScanError, Status, name_file
from darnet.scan import StagedFile


def unpack_zip(path: Path, folder: Path, limits: DecodeConfig) -> list[StagedFile]:
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


def _label_entry(index: int, entries: Sequence[zipfile.ZipInfo]) -> str:
    return f"entry {index + 1} of {len(entries)}"
