"""One face for a local folder and an S3 prefix: keys and bytes go in, objects and named errors come out.

The face is `store`; `storage_local` and `storage_s3` are what is behind it. Stores are values without open handles, so
they travel to other processes.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from darnet.errors import ObjectMissing, UsageError
from darnet.storage_local import LocalStore, explain_os_errors
from darnet.storage_s3 import TRANSFERS, S3Store
from darnet.store import Store as Store

ItemT = TypeVar("ItemT")


def open_store(uri: str, *, create: bool = False, is_archive: bool = False) -> Store:
    """Name a place: a local folder, or s3://bucket/prefix. With `create`, a missing local folder is made.

    What `is_archive` means to a listing, `LocalStore` says.
    Raises: UsageError for an empty address or another scheme; StorageError if the folder cannot be made.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    if scheme is None and uri:
        root = Path(uri).absolute()
        if create:
            with explain_os_errors(str(root), "make the folder"):
                root.mkdir(parents=True, exist_ok=True)
        return LocalStore(root, is_archive)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UsageError(f"{uri!r}: not a place we know; give a local folder or s3://bucket/prefix")
    return S3Store(bucket, prefix.rstrip("/") + "/" if prefix.strip("/") else "")


def read_file(uri: str, kind: str) -> tuple[str, bytes]:
    """Name and bytes of the one file that a person named: a local path, or s3://bucket/key.

    Raises: UsageError saying that it should be a `kind`, if there is no file; StorageError, CredentialsError.
    """
    place, _, name = uri.rpartition("/")
    store = open_store(place or ("/" if uri.startswith("/") else "."))
    try:
        return name, store.read_bytes(name)
    except ObjectMissing as error:
        raise UsageError(f"{uri}: no such file; name a {kind}") from error


def transfer_all(move: Callable[[ItemT], None], items: Sequence[ItemT]) -> None:
    """Call `move` on every item, `TRANSFERS` at a time; when this returns or raises, none is still being moved.

    Raises: what `move` raises on the first item, in their order, that fails; later ones may then be left out.
    """
    if not items:
        return
    with ThreadPoolExecutor(min(TRANSFERS, len(items)), "transfer") as pool:
        moves = [pool.submit(move, item) for item in items]
        try:
            for moved in moves:
                moved.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def has_object(store: Store, key: str) -> bool:
    """Whether there is a (small) object of this key.

    Raises: StorageError, CredentialsError.
    """
    try:
        store.read_bytes(key)
    except ObjectMissing:
        return False
    return True
