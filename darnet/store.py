"""What a store does, whichever it is: keys and bytes go in, objects and named errors come out."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from darnet.scan import StoredObject


class Store(Protocol):
    """A place with objects in it. Keys are relative to its root and use `/`."""

    @property
    def uri(self) -> str:
        """The root as a person writes it."""

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in the order of the keys' UTF-8 bytes, one at a time.

        Raises: FolderMissing, StorageError, CredentialsError.
        """

    def read_bytes(self, key: str) -> bytes:
        """The whole object.

        Raises: ObjectMissing, StorageError, CredentialsError.
        """

    def fetch(self, item: StoredObject, path: Path) -> None:
        """Copy exactly the object that was listed, same version and length, to a local file.

        Raises: ScanError ERR_GONE, ERR_INPUT_CHANGED, ERR_DENIED, ERR_ARCHIVED or ERR_STORAGE, which concern this
            object; CredentialsError when the store no longer accepts us at all, because every other scan would fail the
            same way.
        """

    def fetch_span(self, item: StoredObject, path: Path, span: range) -> bool:
        """Copy these bytes of the object that was listed to their place in a local file as long as the object.

        Other bytes of a file that is there already are kept, of a new one they are zeros. Spans have no checksum. Where
        the store gives whole objects only, the file holds all of it: returns whether that is so.
        Raises: as `fetch`.
        """

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, if it does."""

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace an object; readers see the old or the new one, never a part.

        Raises: StorageError, CredentialsError.
        """

    def open_range_reader(self, item: StoredObject) -> BinaryIO:
        """The object as a seekable file that fetches what is asked of it and nothing else.

        For objects that never change: a part read later may else be of another version.
        Raises: ObjectMissing, StorageError, CredentialsError, here or when it is read.
        """

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """Create an object, of bytes or of a local file, unless one of this key exists; whether this call created it.

        Raises: PutUncertain if the store's answer got lost; StorageError, CredentialsError.
        """

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine.

        Raises: StorageError, CredentialsError.
        """

    def read_clock(self) -> datetime:
        """The store's own time, which is one for all who write to it; on S3 in whole seconds. Leaves nothing behind.

        Raises: StorageError, CredentialsError.
        """

    def child(self, prefix: str) -> "Store":
        """The store rooted at a folder of this one."""
