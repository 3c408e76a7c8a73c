"""The table's key columns go in; which sources of an archive are settled comes out, from a database on local disk.

So planning takes as much memory for a million sources as for ten thousand, and some 60 bytes of disk for each.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from darnet.errors import StorageError
from darnet.pseudonym import OPEN_KEYS, KeyNames
from darnet.publishing.objects import Stored, demand_origin, list_commit_objects, read_commit_number, stream_objects
from darnet.publishing.origin import Origin
from darnet.publishing.rows import MODEL_KEY, SOURCE_KEY, Reason, is_of_model, spell_key
from darnet.scan import Source
from darnet.storage import Store

CACHE_KIB = 1_024  # Source: ours; of the database in memory, and as much to sort it: more was no faster
DIGEST_BYTES = 8

# `source` is a digest of 64 bits of a source's key, `input` one of key and bytes. Both decide what is scored, the first
# alone no more than the reason that people read. What its scans say of a source in `said` is as new as its `newness`:
# twice a commit's number, and one more if the scan is open. The newest counts.
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
_FIND_UNSETTLED = """
WITH wanted AS MATERIALIZED (
    SELECT key AS place, json_extract(value, '$[0]') AS source, json_extract(value, '$[1]') AS input FROM json_each(?)
)
SELECT
    place,
    is_open IS NOT NULL,
    EXISTS (SELECT 1 FROM scored AS known WHERE known.source = wanted.source),
    EXISTS (SELECT 1 FROM scored_elsewhere AS known WHERE known.source = wanted.source)
FROM wanted LEFT JOIN scored USING (source, input)
WHERE is_open IS NOT 0
"""


class ScoredKeys:
    """What the table says of sources under one model and preprocessing, as of its object `last_commit`.

    Several threads may ask it. Its database is one of SQLite, in a file without a name that is gone at the end of the
    `with` block, or of the process.
    """

    def __init__(self, names: KeyNames = OPEN_KEYS) -> None:
        self.last_commit, self.names = 0, names
        self._lock = threading.Lock()
        with _explain_disk():
            self._database = sqlite3.connect("", check_same_thread=False)
            for setting in ("temp_store = FILE", "journal_mode = OFF", f"cache_size = -{CACHE_KIB}"):
                self._database.execute(f"PRAGMA {setting}")
            self._database.executescript(_BEGIN)

    def note(self, stored: Stored, is_ours: Any) -> None:
        """Add rows of a commit, which may come in several pieces; `is_ours` says which are under this model."""
        rows = stored.rows.filter(is_ours)
        sources, inputs = _digest_pairs(rows["source"].to_pylist(), rows["input_sha256"].to_pylist())
        newness = pc.add(2 * stored.commit, pc.starts_with(rows["status"], "ERR_").cast("int64")).to_pylist()
        elsewhere = _digest(stored.rows["source"].filter(pc.invert(is_ours)).unique().to_pylist())
        with _explain_disk():
            self._database.executemany("INSERT INTO said VALUES (?, ?, ?)", zip(sources, inputs, newness, strict=True))
            self._database.executemany("INSERT INTO said_elsewhere VALUES (?)", zip(elsewhere, strict=True))

    def settle(self, last_commit: int) -> None:
        """Sort what was noted, and forget what was said before the newest of it."""
        self.last_commit = last_commit
        with _explain_disk():
            self._database.executescript(_SETTLE)

    def find_reasons(self, sources: Sequence[Source]) -> list[Reason | None]:
        """Why to score each source tonight; None if every one of its scans has a final row."""
        spelled = [spell_key(self.names.name_source(source.key)) for source in sources]
        wanted = zip(*_digest_pairs(spelled, [source.input_sha256 for source in sources]), strict=True)
        asked = json.dumps(list(wanted))
        with self._lock, _explain_disk():
            unsettled = self._database.execute(_FIND_UNSETTLED, (asked,)).fetchall()
        reasons: list[Reason | None] = [None] * len(sources)
        for place, *told in unsettled:
            reasons[place] = _name_reason(*map(bool, told))
        return reasons

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the disk back; who asks afterwards gets an error."""
        with self._lock:
            self._database.close()


def _name_reason(is_retried: bool, is_known: bool, is_known_elsewhere: bool) -> Reason:
    if is_retried:
        return Reason.RETRY
    if is_known:
        return Reason.CHANGED
    return Reason.OTHER_MODEL if is_known_elsewhere else Reason.NEW


def read_scored_keys(store: Store, model_sha256: str, preprocessing_version: str, origin: Origin) -> ScoredKeys:
    """What is settled under this model and preprocessing, read commit after commit.

    A source is done if its newest commit holds no ERR row: a commit tells of all its scans that were not final.
    Raises: UsageError if a run of this origin may not add to the table; StorageError, also where there is no room on
        this machine.
    """
    keys, objects = ScoredKeys(origin.recall_names()), list_commit_objects(store)
    with _give_memory_back():
        for stored in demand_origin(stream_objects(store, objects, [*SOURCE_KEY, *MODEL_KEY, "status"]), origin):
            keys.note(stored, is_of_model(stored.rows, model_sha256, preprocessing_version))
    keys.settle(read_commit_number(objects[-1].key) if objects else 0)
    return keys


@contextmanager
def _give_memory_back() -> Iterator[None]:
    """Let Arrow take memory as C does: its own way keeps what was freed, and more of it the larger the objects are."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


@contextmanager
def _explain_disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"this machine's folder for temporary files: cannot keep what is settled ({error}); make room in it, or "
            "set TMPDIR to another"
        ) from error


def _digest_pairs(keys: Sequence[str], input_sha256: Sequence[str]) -> tuple[list[int], list[int]]:
    return _digest(keys), _digest(map("\0".join, zip(keys, input_sha256, strict=True)))


def _digest(texts: Iterable[str]) -> list[int]:
    """Of each text 64 bits, as the integers that SQLite has."""
    digests = (hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return [int.from_bytes(digest, "big", signed=True) for digest in digests]
