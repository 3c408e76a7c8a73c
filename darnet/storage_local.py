"""The store on a local disk: keys and bytes go in, files and named errors come out.

Writes are whole or not at all, also when the power fails; a key can never name a place outside the root.
"""

import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from darnet.errors import FolderMissing, ObjectMissing, ScanError, Status, StorageError, UsageError
from darnet.scan import StoredObject

COPY_CHUNK_BYTES = 1 << 20
NOT_LISTED = "(may not be listed)"  # name of the object that stands for a closed folder; version of what is denied
_DENIED = "may not be read; give this job the right to"


@dataclass(frozen=True)
class LocalStore:
    """Objects are the files below a folder. Symbolic links are followed; one that leads back up is not listed.

    In an archive, a folder below the root that may not be listed is told as one object, which may not be read: whoever
    scores the archive goes on without it and says so. In any other store it is an error.
    """

    root: Path
    is_archive: bool = False

    @property
    def uri(self) -> str:
        return str(self.root)

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        if not self.root.exists():
            raise FolderMissing(f"{self.uri}: no such folder; correct the address or create it")
        if not self.root.is_dir():
            raise UsageError(f"{self.uri}: a file, not a folder; give the folder that holds it")
        yield from self._walk(self.root, "", prefix, frozenset())

    def read_bytes(self, key: str) -> bytes:
        path = self.local_path(key)
        with explain_os_errors(str(path), "read the file"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise ObjectMissing(f"{path}: no such file") from error

    def fetch(self, item: StoredObject, path: Path) -> None:
        origin = self.local_path(item.key)
        with path.open("wb") as sink:
            check_unchanged(origin, item)
            with _explain_reading(), origin.open("rb") as body:
                shutil.copyfileobj(body, sink, COPY_CHUNK_BYTES)
            check_unchanged(origin, item)

    def fetch_span(self, item: StoredObject, path: Path, span: range) -> bool:  # noqa: ARG002
        self.fetch(item, path)
        return True

    def local_path(self, key: str) -> Path:
        """Raises: UsageError for a key that could lead out of the root or name a file in two ways."""
        segments = key.split("/")
        if "\0" in key or not {"", ".", ".."}.isdisjoint(segments):
            raise UsageError(f"{self.uri}: {key!r} is not a key of a file below this folder")
        return self.root.joinpath(*segments)

    def write_bytes(self, key: str, data: bytes) -> None:
        path = self.local_path(key)
        with explain_os_errors(str(path), "write the file"), _staged(path, data) as staged:
            staged.replace(path)
            _sync_folder(path.parent)

    def open_range_reader(self, item: StoredObject) -> BinaryIO:
        path = self.local_path(item.key)
        with explain_os_errors(str(path), "read the file"):
            try:
                return path.open("rb")
            except FileNotFoundError as error:
                raise ObjectMissing(f"{path}: no such file") from error

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        path = self.local_path(key)
        with explain_os_errors(str(path), "write the file"), _staged(path, data) as staged:
            try:
                path.hardlink_to(staged)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with explain_os_errors(str(path), "delete the file"):
            path.unlink(missing_ok=True)

    def read_clock(self) -> datetime:
        with explain_os_errors(self.uri, "write to the folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                modified_us = os.fstat(file.fileno()).st_mtime_ns // 1000  # the server's, on a mount; never rounded up
                return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=modified_us)

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self.local_path(prefix.rstrip("/")))

    def _walk(
        self, folder: Path, inside: str, prefix: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[StoredObject]:
        """List the files below a folder whose key begins with `inside`; `above` are the folders we came through."""
        modified_s, entries = 0.0, None
        is_named = not self.is_archive or prefix.startswith(inside)  # else it may be named like a patient
        place = str(folder) if is_named else f"{self.uri}, {inside.count('/')} folders down"
        with explain_os_errors(place, "list the folder"):
            try:
                found = folder.stat()
                modified_s = found.st_mtime
                entries = _read_folder(folder)
            except FileNotFoundError:  # deleted while we list
                return
            except PermissionError:
                if not (self.is_archive and inside and inside.startswith(prefix)):
                    raise
        if entries is None:
            yield StoredObject(inside + NOT_LISTED, 0, NOT_LISTED, modified_s)
            return
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        for name, entry in entries:
            key = inside + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(Path(entry.path), key, prefix, above | {here})
            elif key.startswith(prefix) and (item := _describe(entry, key)) is not None:
                yield item


def _read_folder(folder: Path) -> list[tuple[str, "os.DirEntry[str]"]]:
    """Names in a folder, folders with a `/` at the end, so that the order is that of the whole keys' bytes."""
    with os.scandir(folder) as entries:
        named = [(entry.name + "/" if _is_folder(entry) else entry.name, entry) for entry in entries]
    return sorted(named, key=lambda pair: os.fsencode(pair[0]))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where we may not look
        return False


def _describe(entry: "os.DirEntry[str]", key: str) -> StoredObject | None:
    """What a listing says of a file; a dangling link is listed as itself, a file deleted meanwhile is not.

    Nothing but its name is told of a file in a folder that may be listed and not entered.
    """
    item = None
    for follow in (True, False):
        try:
            found = entry.stat(follow_symlinks=follow)
        except PermissionError:
            item = StoredObject(key, 0, NOT_LISTED)
        except OSError:
            continue
        else:
            return StoredObject(key, found.st_size, str(found.st_mtime_ns), found.st_mtime)
    return item


def check_unchanged(path: Path, item: StoredObject) -> None:
    """Demand the right to read a file, and its size and time when it was listed; before and after it is read.

    Raises: ScanError: ERR_GONE, ERR_INPUT_CHANGED, ERR_DENIED, ERR_STORAGE.
    """
    if item.version == NOT_LISTED:
        raise ScanError(Status.ERR_DENIED, _DENIED)
    with _explain_reading():
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise ScanError(Status.ERR_STORAGE, "not a regular file")
    if (found.st_size, str(found.st_mtime_ns)) != (item.num_bytes, item.version):
        raise ScanError(Status.ERR_INPUT_CHANGED, "replaced since it was listed")
    if not os.access(path, os.R_OK, effective_ids=True):  # a decoder would call the scan damaged, for good
        raise ScanError(Status.ERR_DENIED, _DENIED)


@contextmanager
def _explain_reading() -> Iterator[None]:
    """What the operating system's errors mean to the one scan being read."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ScanError(Status.ERR_GONE, "deleted since it was listed") from error
    except PermissionError as error:
        raise ScanError(Status.ERR_DENIED, _DENIED) from error
    except OSError as error:
        raise ScanError(Status.ERR_STORAGE, str(error.strerror)) from error


@contextmanager
def _staged(path: Path, data: bytes | Path) -> Iterator[Path]:
    """A complete, synced file beside `path` under a hidden name no `*.parquet` matches; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("xb") as sink:  # not tempfile: its mode 0600 would shut other readers out
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as body:
                shutil.copyfileobj(body, sink, COPY_CHUNK_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name in this folder survive a power cut, where the file system can."""
    with suppress(OSError):  # some network mounts cannot; the file's own bytes are safe already
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def find_temporary_folder() -> str:
    """This machine's folder for temporary files, which TMPDIR names.

    Raises: StorageError if there is none that can be written to.
    """
    with explain_os_errors("this machine", "find a folder for temporary files"):
        folder = tempfile.gettempdir()  # as it was found once: it may be gone
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: no folder for temporary files; make it, or set TMPDIR to another")
    return folder


@contextmanager
def explain_os_errors(place: str, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{place}: cannot {doing} ({error.strerror}); check rights, space and the mount") from error
