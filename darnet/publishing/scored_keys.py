"""The table's key columns go in; which sources of an archive are settled comes out, from a database on local disk.

So planning takes as much memory for a million sources as for ten thousand. On disk a row takes some 70 bytes while the
table is read, and 50 while the archive is listed.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.errors import StorageError
from darnet.pseudonym import KeyNames
from darnet.publishing.objects import Stored, demand_origin, list_commit_objects, read_commit_number, stream_objects
from darnet.publishing.origin import Origin
from darnet.publishing.rows import MODEL_KEY, SOURCE_KEY, Reason, is_of_model, spell_key
from darnet.scan import Source
from darnet.storage import Store
from darnet.storage_local import find_temporary_folder

CACHE_KIB = 1_024  # Source: ours; of the database in memory, and as much to sort it: more was no faster
DIGEST_BYTES = 8

# `source` is a digest of 64 bits of a source's key, `input` one of key and bytes. Both decide what is scored, the first
# alone no more than the reason that people read. `newness` is twice a commit's number, and one more of an open scan:
# the largest is the newest commit's word on the source, and odd if any of its scans is open.
_BEGIN = """
CREATE TABLE said (source INTEGER, input INTEGER, newness INTEGER);
CREATE TABLE said_elsewhere (source INTEGER);
"""
_SETTLE = """
CREATE TABLE scored (source INTEGER, input INTEGER, is_open INTEGER, PRIMARY KEY (source, input)) WITHOUT ROWID;
INSERT INTO scored SELECT source, input, max(newness) % 2 FROM said GROUP BY source, input;
DROP TABLE said;
CREATE TABLE scored_elsewhere (source INTEGER PRIMARY KEY);
INSERT INTO scored_elsewhere SELECT DISTINCT source FROM said_elsewhere ORDER BY source;
DROP TABLE said_elsewhere;
"""
_LACKS_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CORRUPT,
)


class ScoredKeys:
    """What the table says of sources under one model and preprocessing, as of its object `last_commit`.

    Several threads may ask it. `read_scored_keys` makes it, and takes its database away.
    """

    def __init__(self, database: sqlite3.Connection, last_commit: int, names: KeyNames) -> None:
        self.last_commit, self.names = last_commit, names
        self._database, self._lock = database, threading.Lock()

    def find_reasons(self, sources: Sequence[Source]) -> list[Reason | None]:
        """Why to score each source tonight; None if every one of its scans has a final row.

        Raises: StorageError if this machine's disk fails.
        """
        spelled = [spell_key(self.names.name_source(source.key)) for source in sources]
        pairs = _digest_pairs(spelled, [source.input_sha256 for source in sources])
        with self._lock, _explain_disk():
            return [self._find_reason(*pair) for pair in pairs]

    def _find_reason(self, source: int, input_: int) -> Reason | None:
        found = self._ask("SELECT is_open FROM scored WHERE source = ? AND input = ?", source, input_)
        if found is not None:
            return Reason.RETRY if found[0] else None
        if self._ask("SELECT 1 FROM scored WHERE source = ?", source):
            return Reason.CHANGED
        return (
            Reason.OTHER_MODEL if self._ask("SELECT 1 FROM scored_elsewhere WHERE source = ?", source) else Reason.NEW
        )

    def _ask(self, question: str, *digests: int) -> Any:
        return self._database.execute(question, digests).fetchone()


@contextmanager
def read_scored_keys(
    store: Store, model_sha256: str, preprocessing_version: str, origin: Origin
) -> Iterator[ScoredKeys]:
    """What is settled under this model and preprocessing, read commit after commit, until the `with` block ends.

    A source is done if its newest commit holds no ERR row: a commit tells of all its scans that were not final.
    Raises: UsageError if a run of this origin may not add to the table; StorageError, also where there is no room on
        this machine.
    """
    names, objects = origin.recall_names(), list_commit_objects(store)
    with closing(_open_database()) as database:
        with _give_memory_back(), _explain_disk():
            for stored in demand_origin(stream_objects(store, objects, [*SOURCE_KEY, *MODEL_KEY, "status"]), origin):
                _note(database, stored, is_of_model(stored.rows, model_sha256, preprocessing_version))
            database.executescript(_SETTLE)
        last_commit = read_commit_number(objects[-1].key) if objects else 0
        yield ScoredKeys(database, last_commit, names)


def _open_database() -> sqlite3.Connection:
    """An empty database in a file without a name, which is gone when it is closed, or with the process."""
    folder = find_temporary_folder()
    with _explain_disk():
        database = sqlite3.connect("", check_same_thread=False)
        quoted = folder.replace("'", "''")  # else SQLite takes /var/tmp, where nobody looks for it
        settings = (f"temp_store_directory = '{quoted}'", "temp_store = FILE", "journal_mode = OFF")
        for setting in (*settings, f"cache_size = -{CACHE_KIB}"):
            database.execute(f"PRAGMA {setting}")
        database.executescript(_BEGIN)
    return database


def _note(database: sqlite3.Connection, stored: Stored, is_ours: Any) -> None:
    """Add rows of a commit, which may come in several pieces; `is_ours` says which are under this model."""
    rows = stored.rows.filter(is_ours)
    pairs = _digest_pairs(rows["source"].to_pylist(), rows["input_sha256"].to_pylist())
    newness = pc.add(2 * stored.commit, pc.starts_with(rows["status"], "ERR_").cast("int64")).to_pylist()
    elsewhere = _digest(stored.rows["source"].filter(pc.invert(is_ours)).unique().to_pylist())
    said = ((*pair, new) for pair, new in zip(pairs, newness, strict=True))
    database.executemany("INSERT INTO said VALUES (?, ?, ?)", said)
    database.executemany("INSERT INTO said_elsewhere VALUES (?)", zip(elsewhere, strict=True))


@contextmanager
def _give_memory_back() -> Iterator[None]:
    """Let Arrow take memory as C does: its own way keeps what was freed, and more of it the larger the objects are.

    It is one setting for all of a process, and one thread's business at a time.
    """
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


@contextmanager
def _explain_disk() -> Iterator[None]:
    """Turn what SQLite says of a disk into a StorageError that names the folder."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF  # Source: SQLite, result codes
        if kind not in _LACKS_DISK:
            raise
        raise StorageError(
            f"{find_temporary_folder()}: cannot keep what is settled ({error}); make room there, or set TMPDIR to a "
            "folder that has it"
        ) from error


def _digest_pairs(keys: Sequence[str], input_sha256: Sequence[str]) -> Iterator[tuple[int, int]]:
    return zip(_digest(keys), _digest(map("\0".join, zip(keys, input_sha256, strict=True))), strict=True)


def _digest(texts: Iterable[str]) -> list[int]:
    """Of each text 64 bits, as the integers that SQLite has."""
    digests = (hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return [int.from_bytes(digest, "big", signed=True) for digest in digests]
