"""Volumes of another machine, as files of the one that trains on them: an address enters, a local index leaves.

Each node copies a volumes folder once, whichever of its workers comes first; what it opens is checked by digest.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from darnet.errors import StorageError, UsageError
from darnet.storage import Store, open_store, transfer_all
from darnet.storage_local import explain_os_errors
from darnet.volumes_folder import (
    ARRAYS_FOLDER,
    VOLUMES_FILE,
    VolumesIndex,
    VolumesTable,
    read_index,
    read_table,
    write_index,
)

MOUNTS = Path("/proc/self/mounts")
# Memory-mapping them reads over the network in every epoch, page by page. Source: Linux's names of their drivers
NETWORK_FILESYSTEMS = frozenset("nfs nfs4 cifs smb3 ceph lustre gpfs beegfs glusterfs afs orangefs fuse".split())


def open_volumes(uri: str, cache: Path, cohort_sha256: str = "") -> VolumesIndex:
    """The volumes folder where it lies on a disk of this machine, else this node's copy below `cache`, which is made if
    there is none: of a bucket, or of a folder that comes over the network.

    Raises: UsageError and StorageError as `read_index`; StorageError naming an array whose digest is wrong; UsageError
            if the folder declares another cohort than the one of this digest.
    """
    store = open_store(uri)
    _refuse_other(uri, read_table(store).cohort_sha256, cohort_sha256)  # before 13 GB are copied
    here = store.local_path(VOLUMES_FILE)
    if here is None or is_on_network(here.parent, _read_mounts()):
        index = read_index(copy_volumes(store, cache.expanduser()))
    else:
        index = read_index(here.parent)
    _refuse_other(uri, index.cohort_sha256, cohort_sha256)
    _check_digests(index)
    return index


def _refuse_other(uri: str, found: str, wanted: str) -> None:
    if wanted and found != wanted:
        raise UsageError(
            f"{uri}: prepared anew since this training began (cohort {found[:12]}, not {wanted[:12]}): prepare the "
            "first cohort there again and go on, or train anew with this one"
        )


def _read_mounts() -> str:
    return MOUNTS.read_text() if MOUNTS.is_file() else ""


def is_on_network(folder: Path, mounts: str) -> bool:
    """Whether a folder is another machine's, by the table of what is mounted where, as Linux has it in `MOUNTS`."""
    place = folder.resolve()
    rows = [line.split() for line in mounts.splitlines()]
    above = {Path(row[1].encode().decode("unicode_escape")): row[2] for row in rows if len(row) > 2}
    kind = next((above[path] for path in (place, *place.parents) if path in above), "")
    return kind.partition(".")[0] in NETWORK_FILESYSTEMS


def copy_volumes(store: Store, cache: Path) -> Path:
    """Copy a volumes folder below `cache`, unless it is there; whoever comes meanwhile waits.

    The copy's name holds the digest of all its arrays, so it can never be an older one; its tables are written anew. A
    copy that was broken off goes on where it stopped.
    """
    table = read_table(store)
    folder = cache / f"{table.volume.preprocessing_version}-{table.cohort_sha256[:24]}"
    with _lock(folder.with_suffix(".lock")):
        local = open_store(str(folder), create=True)
        _copy_arrays(store, local, table)
        write_index(local, table.frame, table.volume, table.division, table.excluded)
    return folder


def _copy_arrays(store: Store, local: Store, table: VolumesTable) -> None:
    """Those that are not there yet; the tables, which declare them complete, come after them."""
    present = {item.key for item in local.list_objects(f"{ARRAYS_FOLDER}/")}
    digests = dict(zip(table.frame["array"], table.frame["sha256"], strict=True))
    missing = [name for name in digests if name not in present]
    transfer_all(lambda name: _copy_array(store, local, name, digests[name]), missing)


def _copy_array(store: Store, local: Store, name: str, sha256: str) -> None:
    data = store.read_bytes(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StorageError(f"{store.uri}/{name}: damaged (its digest is not the table's); delete it and prepare again")
    local.write_bytes(name, data)


def _check_digests(index: VolumesIndex) -> None:
    """Hold every array against its digest, once a node: those whose size and time are noted as checked stay unread.

    Source: ours: a process a fold would read 13 GB each. A file that changes and keeps its time goes unnoticed until
    the node starts anew or clears its temporary files, where the note lies.
    Raises: StorageError naming an array whose digest is wrong.
    """
    notes = Path(tempfile.gettempdir()) / f"darnet-{os.getuid()}"
    name = hashlib.sha256(str(index.folder.resolve()).encode()).hexdigest()[:24]
    with _lock(notes / f"{name}.lock"):
        found, store = _describe_arrays(index), open_store(str(notes))
        try:
            known = json.loads((notes / f"{name}.json").read_bytes())
        except (OSError, ValueError):  # none yet, or cut off: all are read
            known = {}
        unknown = [array for array, facts in found.items() if known.get(array) != facts]
        transfer_all(lambda array: _check_digest(index.folder / array, str(found[array][0])), unknown)
        if unknown:
            store.write_bytes(f"{name}.json", json.dumps(found).encode())


def _describe_arrays(index: VolumesIndex) -> dict[str, list[str | int]]:
    """Digest, size and time of change by array."""
    described: dict[str, list[str | int]] = {}
    for name, sha256 in zip(index.frame["array"], index.frame["sha256"], strict=True):
        with explain_os_errors(str(index.folder / name), "read an array"):
            stat = (index.folder / name).stat()
        described[name] = [sha256, stat.st_size, stat.st_mtime_ns]
    return described


def _check_digest(path: Path, sha256: str) -> None:
    with explain_os_errors(str(path), "read an array"), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise StorageError(f"{path}: damaged (its digest is not the table's); delete it and copy or prepare it again")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock of a process that dies is released."""
    with explain_os_errors(str(path), "lock the copy of the volumes"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
        fcntl.flock(handle, fcntl.LOCK_EX)
    with handle:
        yield
